"""The whole decoder through `torch.compile`: compiled and compared with the plain one when a bundle is loaded.

The code takes any size of the kinds that it was compiled for (`choose_examples`). An image of another kind is compiled
when it comes, with a warning in the log, and never decoded without the compiler because of that. `Vae.decode` says
where the compiled decoder is used.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from giantleap.models.device import PartCallback, compiler_fault, part_of
from giantleap.models.vae.autoencoder import Vae, VaeError
from giantleap.models.vae.decode import DC_CLASSES, choose_memory_format, decode_plain

log = logging.getLogger(__name__)

# Values of a convolution's input over which torch takes oneDNN on a CPU; compiled code holds on one side of it.
_MANY_VALUES = 20_480
_MAX_COMPILED = 64  # of all bundles of a process and of odd sizes; over torch's limit of 8 it is an error
# Mean difference in images of [-1, 1], where a step of 8 bits is 0.0078. A half type rounds at other places once it is
# compiled.
_MOST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class CompiledDecoder:
    """A decoder that decodes whole latents, one image after the other.

    Args:
        model: An autoencoder of a class in `giantleap.models.bundle.modes.COMPILED_VAES`, on its device. The weights of
            an AutoencoderDC are put into the memory format that it decodes in.
        backend: Of torch.compile; "eager" follows the decoder and compiles nothing.
    """

    def __init__(self, model: Any, backend: str = "inductor") -> None:
        self._model = model
        self._format = torch.contiguous_format
        if isinstance(model, DC_CLASSES):  # group norms of the others would drift (docs/lab/vae.md)
            self._format = choose_memory_format(model.decoder.conv_in.weight)
            model.decoder.to(memory_format=self._format)
        self._network: Callable[[Tensor], Tensor] = torch.compile(model.decoder, fullgraph=True, backend=backend)

    @torch.inference_mode()
    def compile(self, latent: Tensor) -> Tensor:
        """Decode a latent, [1, channels, h, w], and compile for all of its kind, with sides from 2 on.

        Raises:
            TorchDynamoException: The compiler does not take the decoder, or only at this size.
        """
        prepared = self._prepare(latent)
        for dimension in (2, 3):
            torch._dynamo.mark_dynamic(prepared, dimension)
        return self._run(prepared)

    @torch.inference_mode()
    def decode(self, latents: Tensor, on_part: PartCallback | None = None) -> tuple[Tensor, bool]:
        """Decode raw latents.

        Args:
            latents: In the dtype and on the device of the model.
            on_part: Called after each image.

        Shape:
            [batch, channels, h, w] -> [batch, 3, stride * h, stride * w].

        Returns:
            The images, and whether the compiler had to run for them.
        """
        images, before, started_s = [], _count_graphs(), time.monotonic()
        for index, latent in enumerate(latents.split(1)):
            images.append(self._run(self._prepare(latent)))
            if (report := part_of(on_part, index, len(latents))) is not None:
                report(1.0)
        is_new = _count_graphs() > before
        if is_new:
            seconds, sides = round(time.monotonic() - started_s, 1), list(latents.shape[2:])
            log.warning("decoder compiled again", extra={"fields": {"latent": sides, "decode_s": seconds}})
        return torch.cat(images), is_new

    def _prepare(self, latent: Tensor) -> Tensor:
        convolution = getattr(self._model, "post_quant_conv", None)
        latent = latent if convolution is None else convolution(latent)
        return latent.clone(memory_format=self._format)  # other strides would be compiled again

    def _run(self, latent: Tensor) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=_MAX_COMPILED):
            image: Tensor = self._network(latent)
        return image[:, :3]


def choose_examples(channels: int, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Heights and widths to compile for so that latents of these sizes are covered.

    A size beyond that at which every convolution has many values stands for all larger ones.
    """
    side = math.isqrt(_MANY_VALUES // channels) + 1
    large = (side, side + 1)
    return sorted({min(size, large, key=math.prod) for size in sizes}, key=math.prod)


def _count_graphs() -> int:
    """How many graphs this process has compiled."""
    return int(counters["stats"]["unique_graphs"])


def compile_decoder(vae: Vae, sizes: Sequence[tuple[int, int]], backend: str = "inductor") -> None:
    """Compile the decoder of a VAE, compare it with the plain one, and let the VAE use it.

    Args:
        vae: Of a class in `giantleap.models.bundle.modes.COMPILED_VAES`.
        sizes: Heights and widths of latents that are to be covered.
        backend: See `CompiledDecoder`.

    Raises:
        VaeError: There is no compiler, it does not take the decoder, or the compiled one gives another image.
    """
    if fault := compiler_fault(vae.device):
        raise VaeError(f"modes.compile_vae {fault}")
    name, channels, started_s = type(vae.model).__name__, vae.latent_space.channels, time.monotonic()
    decoder, generator = CompiledDecoder(vae.model, backend), torch.Generator().manual_seed(0)
    differences = []
    for sides in choose_examples(channels, sizes):
        raw = torch.randn((1, channels, *sides), generator=generator).to(vae.device, vae.dtype)
        try:
            image = decoder.compile(raw).float()
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0][:300]
            raise VaeError(
                f"modes.compile_vae: the decoder of {name} does not compile ({reason}); leave it out"
            ) from error
        differences.append(check_parity(decode_plain(vae.model, raw).float(), image, vae.dtype, name))
    fields = {"vae": name, "compile_s": round(time.monotonic() - started_s, 1), "difference": max(differences)}
    log.info("decoder compiled", extra={"fields": fields})
    vae.compiled = decoder


def check_parity(expected: Tensor, compiled: Tensor, dtype: torch.dtype, name: str) -> float:
    """The mean difference of two decoded images.

    Raises:
        VaeError: They differ by more than rounding does.
    """
    difference = float((compiled - expected).abs().mean() / expected.abs().max().clamp(min=1))
    if not difference <= _MOST_DIFFERENCE[dtype]:
        raise VaeError(
            f"modes.compile_vae: the compiled decoder of {name} differs by {difference:.2g} on average, at most "
            f"{_MOST_DIFFERENCE[dtype]:g} is rounding; leave it out"
        )
    return difference
