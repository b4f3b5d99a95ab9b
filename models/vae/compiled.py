"""Compiles the decoder of an autoencoder, and checks at load that it still gives the same image."""

import torch

from giantleap.models.device import compiler_fault
from giantleap.models.vae.autoencoder import Vae, VaeError
from giantleap.models.vae.decode import decode_plain

_SIDE = 16  # latent pixels
# Mean difference in images of [-1, 1], where a step of 8 bits is 0.0078. A half type rounds at other places once it is
# compiled.
_MOST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def compile_decoder(vae: Vae) -> None:
    """Compile the decoder that whole images go through; strips run as before.

    Raises:
        VaeError: There is no compiler, or the compiled decoder gives another image.
    """
    if fault := compiler_fault(vae.device):
        raise VaeError(f"modes.compile_vae {fault}")
    space = vae.latent_space
    shape = (1, space.channels, _SIDE, _SIDE)
    raw = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(vae.device, vae.dtype)
    expected = decode_plain(vae.model, raw).float()
    vae.model.decoder.compile()
    check_parity(expected, decode_plain(vae.model, raw).float(), vae.dtype, type(vae.model).__name__)


def check_parity(expected: torch.Tensor, compiled: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    """Compare two decoded images.

    Raises:
        VaeError: They differ by more than rounding does.
    """
    difference = float((compiled - expected).abs().mean() / expected.abs().max().clamp(min=1))
    if not difference <= _MOST_DIFFERENCE[dtype]:
        raise VaeError(
            f"modes.compile_vae: the compiled decoder of {name} differs by {difference:.2g} on average, at most "
            f"{_MOST_DIFFERENCE[dtype]:g} is rounding; leave it out"
        )
