"""Which stages of the route a process runs: all of them, or one half of a route that is split between two machines.

The halves meet at the raw latent: one draws it and needs the base model, the other enlarges and decodes it and needs
LUA and the VAE. How it travels between them is in `giantleap.service.jobqueue.consumer`.
"""

from typing import Literal

Stages = Literal["generate,upscale,decode", "generate", "upscale,decode"]

WHOLE: Stages = "generate,upscale,decode"
DRAWING: Stages = "generate"
FINISHING: Stages = "upscale,decode"


def draws(stages: Stages) -> bool:
    """Whether raw latents are drawn."""
    return stages != FINISHING


def finishes(stages: Stages) -> bool:
    """Whether raw latents are enlarged and decoded."""
    return stages != DRAWING
