"""Compares an artifact with PyTorch, at other batches and sizes than those of the trace.

A graph that took the example's batch for a constant runs without an error and is wrong for every other batch. The
reference is PyTorch in float32, whatever the artifact's precision.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.export.manifest import ArtifactError, Case, Parity, Part, Precision
from giantleap.models.engines.base import Profile, Runner
from giantleap.models.pixels.images import psnr_db

# In float32 the largest absolute difference; in half types a share of the reference's root mean square, because
# rounding is relative. A step of an 8-bit pixel is 7.8e-3 in [-1, 1].
ALLOWED_ERROR: dict[tuple[Part, Precision], float] = {
    ("lua", "fp32"): 1e-4,
    ("decoder", "fp32"): 1e-3,
}
ALLOWED_RELATIVE: dict[Precision, float] = {"fp16": 0.05, "bf16": 0.3}
ALLOWED_PSNR_DB: dict[Precision, float] = {"fp32": 60.0, "fp16": 50.0, "bf16": 40.0}
# Batch, rows and columns in units of the window. The example of `giantleap.export.graphs.trace` has (2, 2, 3).
CASES = ((1, 1, 1), (3, 2, 3), (8, 3, 1), (1, 5, 8))
PSNR_CASE = 1  # of CASES: large enough to have inner and outer windows, small enough to decode


def choose_cases(unit: int, profiles: Sequence[Profile] = ()) -> tuple[tuple[int, int, int], ...]:
    """Batch, height and width of the comparisons, in latent pixels.

    Args:
        unit: Sides are multiples of this.
        profiles: If the engine has profiles, each is compared at its best shape and at its largest batch, not square.
    """
    if not profiles:
        return tuple((batch, rows * unit, columns * unit) for batch, rows, columns in CASES)
    cases: list[tuple[int, int, int]] = [(1, unit, unit)]
    for profile in profiles:
        batch, height, width = profile.max_shape
        cases += [profile.opt_shape, (batch, unit * max(1, height // (2 * unit)), width)]
    return tuple(dict.fromkeys(cases))


def sample_latents(shape: tuple[int, int, int, int], mean: Tensor, std: Tensor, seed: int) -> Tensor:
    """Latents with the statistics of real ones: half of their variance smooth, as in images, half fine.

    Args:
        shape: [batch, channels, h, w].
        mean: [channels].
        std: [channels].
        seed: Of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape
    coarse = torch.randn(batch, channels, -(-height // 4), -(-width // 4), generator=generator)
    fine = torch.randn(shape, generator=generator)
    mixed = math.sqrt(0.5) * (F.interpolate(coarse, size=(height, width), mode="nearest") + fine)
    return mixed * std.view(-1, 1, 1) + mean.view(-1, 1, 1)


def compare(
    part: Part,
    precision: Precision,
    run: Runner,
    reference: Runner,
    to_image: Runner | None,
    cases: Sequence[tuple[int, int, int]],
    statistics: tuple[Tensor, Tensor],
    device: torch.device,
) -> Parity:
    """Run an artifact and its reference on the same latents.

    Args:
        part: The part that the artifact is of.
        precision: Of the artifact.
        run: The artifact.
        reference: PyTorch in float32.
        to_image: Decodes both outputs, for the PSNR; None without a decoder.
        cases: From `choose_cases`.
        statistics: Mean and standard deviation of real latents, each [channels].
        device: Where both run.

    Raises:
        ArtifactError: Shapes or values differ by more than the precision allows; the message names the worst case.
    """
    mean, std = statistics
    done: list[Case] = []
    decoded_db: float | None = None
    for index, (batch, height, width) in enumerate(cases):
        latents = sample_latents((batch, len(mean), height, width), mean, std, seed=index).to(device)
        with torch.inference_mode(), whole_float32():
            expected, actual = reference(latents).float(), run(latents).float()
        done.append(_to_case(actual, expected, latents, precision))
        if to_image is not None and index == min(PSNR_CASE, len(cases) - 1):
            decoded_db = psnr_db(to_image(actual[:1]), to_image(expected[:1]))
    worst = max(done, key=lambda case: case.max_error)
    allowed = _allowed_error(part, precision, worst.reference_rms)
    parity = Parity(
        max_error=worst.max_error,
        mean_error=max(case.mean_error for case in done),
        allowed_error=allowed,
        psnr_db=decoded_db,
        allowed_psnr_db=None if decoded_db is None else ALLOWED_PSNR_DB[precision],
        device=device.type,
        cases=tuple(done),
    )
    _refuse(parity, worst)
    return parity


@contextmanager
def whole_float32() -> Iterator[None]:
    """Disable TF32 in float32 convolutions, which torch enables on a GPU by default.

    It rounds factors to 10 bits of mantissa, which alone exceeds the allowed difference of a float32 artifact.
    """
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield


def _to_case(actual: Tensor, expected: Tensor, latents: Tensor, precision: Precision) -> Case:
    """The difference between an artifact's output and PyTorch's."""
    batch, _, height, width = latents.shape
    where = f"batch {batch}, latents of {height}x{width}"
    if actual.shape != expected.shape:
        raise ArtifactError(f"at {where} the artifact returns {list(actual.shape)}; expected {list(expected.shape)}")
    if not bool(actual.isfinite().all()):
        raise ArtifactError(f"at {where} the artifact returns values that are not finite in {precision}")
    error = (actual - expected).abs()
    return Case(
        batch=batch,
        latent_height=height,
        latent_width=width,
        max_error=error.max().item(),
        mean_error=error.mean().item(),
        reference_rms=expected.square().mean().sqrt().item(),
    )


def _allowed_error(part: Part, precision: Precision, reference_rms: float) -> float:
    relative = ALLOWED_RELATIVE.get(precision)
    return ALLOWED_ERROR[part, "fp32"] if relative is None else relative * reference_rms


def _refuse(parity: Parity, worst: Case) -> None:
    if not parity.max_error <= parity.allowed_error:
        raise ArtifactError(
            f"differs from PyTorch by {parity.max_error:.2e} at batch {worst.batch}, latents of "
            f"{worst.latent_height}x{worst.latent_width}; allowed are {parity.allowed_error:.2e}"
        )
    if parity.psnr_db is not None and parity.allowed_psnr_db is not None and parity.psnr_db < parity.allowed_psnr_db:
        raise ArtifactError(
            f"the decoded image is {parity.psnr_db:.1f} dB from PyTorch's; at least {parity.allowed_psnr_db:.0f} dB is "
            "required"
        )
