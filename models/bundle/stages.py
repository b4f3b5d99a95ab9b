"""The order of the stages after the base latent, by method. Nothing here imports torch."""

from typing import TYPE_CHECKING

from giantleap.models.bundle.descriptor import REDIFFUSION, Method

if TYPE_CHECKING:
    from giantleap.models.device import StageName


def stages_of(method: Method, scale: float, refines: bool = False) -> "tuple[StageName, ...]":
    """The stages after the base latent, in order.

    `swinir` upscales pixels, `lua` and `bicubic` latents; the others generate at the final size. A refine pass takes
    latents, so that pixels are encoded for it.
    """
    refine: tuple[StageName, ...] = ("refine",) if refines else ()
    if scale == 1 or method == "direct" or method in REDIFFUSION:
        return (*refine, "decode")
    if method == "swinir":
        return ("decode", "upscale", "vae_encode", "refine", "decode") if refines else ("decode", "upscale")
    return ("upscale", *refine, "decode")
