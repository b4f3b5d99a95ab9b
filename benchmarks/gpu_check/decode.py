"""Time full-size decoders with random weights by the paper's protocol (batch 1, 20 warm-ups, median).

The rows are the plain decode, the exact one in strips, tiles, the tiny decoder, the plain one with weights in
channels-last, and the whole decoder compiled. It has not run on a GPU; its test runs small sizes on a CPU.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.cases import GpuMethod
from benchmarks.images.decode.cases import VAE_CONFIGS, stride_px
from benchmarks.images.decode.pocket import Decode, open_compiled, open_exact
from benchmarks.images.decode.run import build_decoder, estimate_bytes, random_latents, run_decode
from giantleap.models.device import synchronize
from giantleap.models.vae.decode import decode_exact, decode_plain
from giantleap.models.vae.strip_plan import DecodePlan, DecoderShape, plan_decode
from giantleap.service.worker.timing import to_statistics

WARMUPS = 20
RUNS = 20
SLOW_S = 2.0  # longer decodes are repeated less often; every row has its counts
SLOW_WARMUPS = 2
SLOW_RUNS = 5


@dataclass(frozen=True)
class GpuFigures:
    """One decoder, method, size and dtype. `error` is the reason for missing figures, such as too little memory.

    `ratio` and differences are to the plain decode of the same dtype. `peak_bytes` is allocated memory beyond weights
    and latents, `reserved_bytes` the allocator's total; a CPU has neither.
    """

    family: str
    method: GpuMethod
    strip_mib: int | None
    image_px: int
    dtype: str
    warmups: int
    runs: int
    median_s: float | None = None
    p95_s: float | None = None
    ratio: float | None = None
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    estimated_bytes: int | None = None
    max_difference: float | None = None
    error: str | None = None


def time_runs(run: Callable[[], Tensor], device: torch.device) -> tuple[list[float], int]:
    """Return the seconds of each counted run, synchronized at both ends, and the number of warm-ups."""

    def once() -> float:
        synchronize(device)
        started_s = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - started_s

    once()  # selects convolution kernels
    slow = once() > SLOW_S
    warmups, runs = (SLOW_WARMUPS, SLOW_RUNS) if slow else (WARMUPS, RUNS)
    for _ in range(warmups - 2):
        once()
    return [once() for _ in range(runs)], warmups


def open_method(case: GpuFigures, vae: Any, device: torch.device, plan: DecodePlan | None) -> Decode:
    """The decode of a row.

    Raises:
        EngineError: There is no compiler for the device.
    """
    if plan is not None:
        return partial(decode_exact, vae, plan=plan)
    if case.method == "exact":
        return open_exact(vae, getattr(torch, case.dtype))
    if case.method == "channels-last":
        vae.to(memory_format=torch.channels_last)
        return lambda latents: decode_plain(vae, latents.contiguous(memory_format=torch.channels_last))
    if case.method == "compiled":
        return open_compiled(vae, device)
    return partial(run_decode, vae, case.family, case.method)


def measure_case(case: GpuFigures, vae: Any, device: torch.device) -> tuple[GpuFigures, Tensor]:
    """Measure one row, without what needs another one; returns it and the image.

    Raises:
        ValueError: There is no compiler for the device.
        RuntimeError: The decode failed, for example with torch.OutOfMemoryError.
    """
    latents = random_latents(case.family, case.image_px).to(device, getattr(torch, case.dtype))
    side = case.image_px // stride_px(case.family)
    plan = None
    known = case.method if case.method in ("exact", "tiled", "tiny") else "plain"
    estimate = estimate_bytes(case.family, known, side, case.dtype) if case.method != "compiled" else None
    if case.strip_mib is not None:
        shape = DecoderShape.from_config(vae.config)
        plan = plan_decode(shape, side, side, case.dtype, strip_bytes=case.strip_mib * 2**20)
        estimate = plan.peak_bytes
    decode = open_method(case, vae, device, plan)
    decode(latents)  # compiles
    peak_bytes = reserved_bytes = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before_bytes = torch.cuda.memory_allocated(device)
        decode(latents)
        torch.cuda.synchronize(device)
        peak_bytes = torch.cuda.max_memory_allocated(device) - before_bytes
        reserved_bytes = torch.cuda.max_memory_reserved(device)
    image = decode(latents).float().cpu()
    seconds, warmups = time_runs(partial(decode, latents), device)
    timed = to_statistics(seconds)
    row = replace(
        case,
        warmups=warmups,
        runs=len(seconds),
        median_s=timed.median_s,
        p95_s=timed.p95_s,
        peak_bytes=peak_bytes,
        reserved_bytes=reserved_bytes,
        estimated_bytes=estimate,
    )
    return row, image


def cases_of(
    family: str, image_px: int, dtype: str, strips_mib: Sequence[int], methods: Sequence[GpuMethod]
) -> list[GpuFigures]:
    """Return the rows of one size: every method, and the exact one also with other strip sizes.

    An AutoencoderDC has strips of its own, whose size is not chosen.
    """
    rows = [GpuFigures(family, method, None, image_px, dtype, 0, 0) for method in methods]
    if "exact" not in methods or "encoder_block_out_channels" in VAE_CONFIGS[family]:
        return rows
    return rows + [GpuFigures(family, "exact", strip_mib, image_px, dtype, 0, 0) for strip_mib in strips_mib]


@torch.inference_mode()
def measure_rows(cases: Sequence[GpuFigures], device: torch.device) -> list[GpuFigures]:
    """Measure the rows of one decoder, size and dtype, the plain one first; a failure is a row with its reason."""
    done: list[GpuFigures] = []
    plain: tuple[float, Tensor] | None = None
    for case in cases:
        vae = build_decoder(case.family, "tiny" if case.method == "tiny" else "plain")
        vae = vae.to(device, getattr(torch, case.dtype))
        try:
            row, image = measure_case(case, vae, device)
        except (ValueError, RuntimeError) as error:  # no compiler, out of memory, or a tensor too large for a kernel
            row = replace(case, error=f"{type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            assert row.median_s is not None
            plain = (row.median_s, image) if case.method == "plain" else plain
            row = row if plain is None else _relate(row, image, *plain)
        print(line(row), flush=True)
        done.append(row)
        del vae
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return done


def _relate(row: GpuFigures, image: Tensor, plain_s: float, plain: Tensor) -> GpuFigures:
    difference = None if row.method in ("plain", "tiny") else float((image - plain).abs().max())
    return replace(row, ratio=(row.median_s or 0.0) / plain_s, max_difference=difference)


def line(row: GpuFigures) -> str:
    """Format one row."""
    strips = "" if row.strip_mib is None else f" strips of {row.strip_mib} MiB"
    name = f"{row.family:<9}{row.image_px:>5} {row.dtype:<9}{row.method + strips:<24}"
    if row.error or row.median_s is None:
        return f"{name} {row.error}"
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
    memory = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
    difference = "-" if row.max_difference is None else f"{row.max_difference:.1e}"
    return f"{name}{row.median_s * 1e3:>9.1f} ms{ratio:>6} of plain{memory:>7} MiB  difference {difference}"


def to_records(rows: Sequence[GpuFigures]) -> list[dict[str, Any]]:
    """The rows for JSON."""
    return [asdict(row) for row in rows]
