"""The part of the route that a worker process runs: all of it, or one half of a route split between two machines.

The halves meet at the raw latent: `generate` needs the base model, `decode` needs LUA and the VAE decoder.
`giantleap.service.jobqueue.consumer` transfers the latents from one to the other.
"""

from enum import StrEnum


class WorkerRole(StrEnum):
    """What a worker loads and runs."""

    ALL = "all"
    GENERATE = "generate"
    DECODE = "decode"

    @property
    def loads_pipeline(self) -> bool:
        """Whether this role generates base latents from prompts."""
        return self is not WorkerRole.DECODE

    @property
    def loads_decoder(self) -> bool:
        """Whether this role upscales latents and decodes them to images."""
        return self is not WorkerRole.GENERATE
