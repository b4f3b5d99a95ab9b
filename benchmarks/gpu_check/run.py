"""Measurements that need a GPU, one subcommand each, as JSON in `benchmarks/results/` with card, driver and versions.

`python -m benchmarks.gpu_check decode` times full-size SDXL and FLUX.1 decoders with random weights by the paper's
protocol (batch 1, 20 warm-ups, median) and measures the peak of allocated memory. `engines` times every engine of LUA
(`benchmarks/gpu_check/engines.py`). Both exit with 2 without CUDA. On a CPU: `benchmarks/images/decode.py` and
`benchmarks/engines/run.py`.
"""

import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.gpu_check.engines import VARIANTS, EngineCase, EngineFigures, measure_matrix_rate
from benchmarks.gpu_check.engines import line as engine_line
from benchmarks.gpu_check.engines import measure_case as measure_engine_case
from benchmarks.images.decode import (
    METHODS,
    DecodeMethod,
    build_decoder,
    estimate_bytes,
    random_latents,
    run_decode,
    stride_px,
)
from benchmarks.machine import read_machine
from giantleap.models.lua.network import preset as lua_preset
from giantleap.models.vae.decode import decode_exact
from giantleap.models.vae.strip_plan import DecoderShape, plan_decode
from giantleap.service.worker.timing import to_statistics

app = typer.Typer(no_args_is_help=True, add_completion=False)

WARMUPS = 20
RUNS = 20
SLOW_S = 2.0  # longer decodes are repeated less often; every row has its counts
SLOW_WARMUPS = 2
SLOW_RUNS = 5
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class GpuFigures:
    """One decoder, method, size and dtype. `error` is the reason for missing figures, such as too little memory.

    `peak_bytes` is allocated memory beyond weights and latents, `reserved_bytes` the allocator's total. Differences are
    to the plain decode of the same dtype.
    """

    family: str
    method: DecodeMethod
    strip_mib: int | None
    image_px: int
    dtype: str
    warmups: int
    runs: int
    median_s: float | None = None
    p95_s: float | None = None
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    estimated_bytes: int | None = None
    max_difference: float | None = None
    error: str | None = None


def require_cuda() -> torch.device:
    """Return the first GPU.

    Raises:
        typer.Exit: With status 2 when there is none.
    """
    if not torch.cuda.is_available():
        typer.echo(
            f"gpu_check needs a CUDA device; torch {torch.__version__} finds none here. Nothing was measured.", err=True
        )
        raise typer.Exit(2)
    return torch.device("cuda:0")


def card(device: torch.device) -> dict[str, Any]:
    """Describe the card, its driver and its libraries."""
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return {
        "card": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": torch.backends.cudnn.allow_tf32,
    }


def time_runs(run: Callable[[], Tensor], device: torch.device) -> tuple[list[float], int]:
    """Return the seconds of each counted run, synchronized at both ends, and the number of warm-ups."""

    def once() -> float:
        torch.cuda.synchronize(device)
        started_s = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        return time.perf_counter() - started_s

    once()  # selects convolution kernels
    slow = once() > SLOW_S
    warmups, runs = (SLOW_WARMUPS, SLOW_RUNS) if slow else (WARMUPS, RUNS)
    for _ in range(warmups - 2):
        once()
    return [once() for _ in range(runs)], warmups


def measure_case(case: GpuFigures, vae: Any, device: torch.device, plain: Tensor | None) -> tuple[GpuFigures, Tensor]:
    """Measure one row; returns it and the image.

    Raises:
        RuntimeError: The decode failed, for example with torch.OutOfMemoryError.
    """
    dtype = DTYPES[case.dtype]
    latents = random_latents(case.family, case.image_px).to(device, dtype)
    side = case.image_px // stride_px(case.family)
    plan = None
    estimate = estimate_bytes(case.family, case.method, side, case.dtype)
    if case.strip_mib is not None:
        shape = DecoderShape.from_config(vae.config)
        plan = plan_decode(shape, side, side, case.dtype, strip_bytes=case.strip_mib * 2**20)
        estimate = plan.peak_bytes

    def run() -> Tensor:
        return decode_exact(vae, latents, plan=plan) if plan else run_decode(vae, case.family, case.method, latents)

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before_bytes = torch.cuda.memory_allocated(device)
    image = run().cpu()
    torch.cuda.synchronize(device)
    peak_bytes = torch.cuda.max_memory_allocated(device) - before_bytes
    reserved_bytes = torch.cuda.max_memory_reserved(device)
    seconds, warmups = time_runs(run, device)
    timed = to_statistics(seconds)
    figures = {
        "warmups": warmups,
        "runs": len(seconds),
        "median_s": timed.median_s,
        "p95_s": timed.p95_s,
        "peak_bytes": peak_bytes,
        "reserved_bytes": reserved_bytes,
        "estimated_bytes": estimate,
        "max_difference": None if plain is None else float((image.float() - plain.float()).abs().max()),
    }
    return GpuFigures(**{**asdict(case), **figures}), image


def cases_of(family: str, image_px: int, dtype: str, strips_mib: list[int]) -> list[GpuFigures]:
    """Return the rows of one size: every method, and the exact one also with other strip sizes."""
    rows = [GpuFigures(family, method, None, image_px, dtype, 0, 0) for method in METHODS]
    return rows + [GpuFigures(family, "exact", strip_mib, image_px, dtype, 0, 0) for strip_mib in strips_mib]


@torch.inference_mode()
def measure_size(
    family: str, image_px: int, dtype: str, strips_mib: list[int], device: torch.device
) -> list[GpuFigures]:
    """Measure all rows of one decoder, size and dtype; a failure is a row with its reason."""
    done: list[GpuFigures] = []
    plain: Tensor | None = None
    for case in cases_of(family, image_px, dtype, strips_mib):
        vae = build_decoder(family, case.method).to(device, DTYPES[dtype])
        try:
            row, image = measure_case(case, vae, device, None if case.method == "tiny" else plain)
        except RuntimeError as error:  # out of memory, or a tensor too large for a kernel: a result, too
            row = GpuFigures(**{**asdict(case), "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
        else:
            plain = image if case.method == "plain" else plain
        done.append(row)
        typer.echo(line(row))
        del vae
        torch.cuda.empty_cache()
    return done


def line(row: GpuFigures) -> str:
    """Format one row."""
    strips = "" if row.strip_mib is None else f" strips of {row.strip_mib} MiB"
    name = f"{row.family:<6}{row.image_px:>5} {row.dtype:<9}{row.method + strips:<24}"
    if row.error or row.median_s is None or row.peak_bytes is None:
        return f"{name} {row.error}"
    difference = "-" if row.max_difference is None else f"{row.max_difference:.1e}"
    return f"{name}{row.median_s * 1e3:>9.1f} ms{row.peak_bytes / 2**20:>9.0f} MiB  difference {difference}"


@app.callback()
def describe() -> None:
    """Measurements for a machine with a GPU."""


@app.command()
def decode(
    px: Annotated[list[int] | None, typer.Option(help="Side of the square images; may be repeated.")] = None,
    family: Annotated[list[str] | None, typer.Option(help="sdxl or flux1; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16 or float32; may be repeated.")] = None,
    strip_mib: Annotated[list[int] | None, typer.Option(help="More strip sizes of the exact decode.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/gpu_decode.json"),
) -> None:
    """Measure plain, exact, tiled and tiny decodes; status 1 when an exact one could not run."""
    device = require_cuda()
    rows: list[GpuFigures] = []
    for name in family or ["sdxl", "flux1"]:
        for type_name in dtype or list(DTYPES):
            for image_px in px or [1024, 2048, 4096]:
                rows += measure_size(name, image_px, type_name, strip_mib or [4, 64, 256], device)
    record = {"machine": {**read_machine(), **card(device)}, "rows": [asdict(row) for row in rows]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")
    if any(row.error for row in rows if row.method == "exact"):
        raise typer.Exit(1)


@app.command()
def engines(
    preset: Annotated[list[str] | None, typer.Option(help="medium or release; may be repeated.")] = None,
    latent: Annotated[list[int] | None, typer.Option(help="Side of the square latents; may be repeated.")] = None,
    scale: Annotated[list[int] | None, typer.Option(help="2 or 4; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16 or float16; may be repeated.")] = None,
    channels: Annotated[int, typer.Option(help="Channels of the latents.")] = 4,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/gpu_engines.json"),
) -> None:
    """Measure LUA with every installed engine; status 1 when a target of the H200 is missed."""
    device = require_cuda()
    types = [getattr(torch, name) for name in dtype or ["bfloat16", "float16"]]
    roofs = {each: measure_matrix_rate(device, each) for each in types}
    rows: list[EngineFigures] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, side, by, items, each in itertools.product(
            preset or ["medium", "release"], latent or [64, 128, 256], scale or [2, 4], batch or [1, 8], types
        ):
            case = EngineCase(name, lua_preset(name, channels), side, by, items, each)
            done = measure_engine_case(case, device, Path(folder), roofs[each], VARIANTS, WARMUPS, RUNS)
            rows += done
            for row in done:
                typer.echo(engine_line(row))
    rates = {str(each).removeprefix("torch."): rate for each, rate in roofs.items()}
    about = {**read_machine(), **card(device), "matrix_flop_per_s": rates}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": about, "rows": [row.to_record() for row in rows]}, indent=2) + "\n")
    if any(row.target is not None and (row.ratio or 0.0) < row.target for row in rows):
        raise typer.Exit(1)
