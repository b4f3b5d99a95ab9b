"""Measure every engine of LUA on one GPU by the paper's protocol: `python -m benchmarks.gpu_check engines`.

A case is a preset, latent size, scale, batch and dtype with random weights and inputs. The variants are the published
forward in float32 and in the dtype, the network under autocast (fused attention), the packed form eager, compiled and
as CUDA graphs with and without rows padded to 64 channels, onnxruntime and TensorRT. A failure is a row with its
reason. It has not run on a GPU; its tests run the variants that work on a CPU.
"""

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engines.published_swinir import PublishedForward
from giantleap.cli.bench.engines import Timing, interleave
from giantleap.export.graphs import LuaGraph, trace
from giantleap.export.manifest import INPUT, OUTPUTS, Precision
from giantleap.export.onnx_files import write_onnx
from giantleap.export.parity import whole_float32
from giantleap.export.tensorrt_plans import PlanOptions, build_plan, plan_profiles
from giantleap.models.engines.base import Artifact
from giantleap.models.engines.compiled import CompileEngine
from giantleap.models.engines.eager import TorchEngine
from giantleap.models.engines.onnx_runtime import open_graph
from giantleap.models.engines.packed_lua import PackedLua
from giantleap.models.engines.tensorrt_runtime import PlanRunner, load_tensorrt
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec

Variant = Literal[
    "published float32", "published", "autocast", "prepared", "compiled", "compiled, padded", "onnx", "tensorrt"
]
VARIANTS: tuple[Variant, ...] = (
    "published float32", "published", "autocast", "prepared", "compiled", "compiled, padded", "onnx", "tensorrt",
)  # fmt: skip
PRECISIONS: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PADDED_MULTIPLE = 64  # 180 -> 192: rows of 16-byte multiples for tensor cores
TARGETS = {64: 5.0, 128: 3.0, 256: 2.2}  # minimum speed-up over "published": bfloat16, batch 1, medium, x2, H200
MATRIX_SIDE = 8192
WARMUPS = 20
RUNS = 20
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EngineCase:
    """One spec with random weights, one scale, one input shape, one compute type."""

    preset: str
    spec: LuaSpec
    side: int
    scale: int
    batch: int
    dtype: torch.dtype


@dataclass(frozen=True)
class EngineFigures:
    """One variant of one case; `error` is the reason for missing figures.

    `ratio` is the speed-up over `published` in the same dtype, `ratio_float32` over `published float32`, `share` the
    fraction of the card's measured matrix-product rate in that dtype. `max_error` is to `published float32` without
    TF32, and `std` the standard deviation of that output.
    """

    preset: str
    side: int
    scale: int
    batch: int
    dtype: str
    variant: Variant
    median_ms: float | None = None
    p95_ms: float | None = None
    ratio: float | None = None
    ratio_float32: float | None = None
    share: float | None = None
    max_error: float | None = None
    std: float | None = None
    target: float | None = None
    error: str | None = None

    def to_record(self) -> dict[str, object]:
        """Return the fields as a dict for JSON."""
        return asdict(self)


@contextmanager
def open_variant(variant: Variant, net: Lua, case: EngineCase, device: torch.device, folder: Path) -> Iterator[Run]:
    """Open a variant's forward; it is freed at the end.

    Raises:
        ValueError: A library is missing, or an export or a build fails.
    """
    scale, dtype, precision = case.scale, case.dtype, PRECISIONS[case.dtype]
    if variant == "published float32":
        yield partial(PublishedForward(net), scale=scale)
    elif variant == "published":
        published = PublishedForward(copy.deepcopy(net).to(dtype))
        yield lambda x: published(x.to(dtype), scale).float()
    elif variant == "autocast":
        yield partial(TorchEngine(net, device, dtype).run, scale=scale)
    elif variant == "prepared":
        yield partial(PackedLua(net, dtype, packed=False), scale=scale)
    elif variant in ("compiled", "compiled, padded"):
        multiple = PADDED_MULTIPLE if variant == "compiled, padded" else 1
        engine = CompileEngine.open(net, device, dtype, width_multiple=multiple)
        try:
            yield partial(engine.run, scale=scale)
        finally:
            engine.close()
            torch._dynamo.reset()
    else:
        graph = folder / f"{case.preset}_{net.spec.channels}_x{scale}_{precision}.onnx"
        if not graph.exists():
            source = copy.deepcopy(net).cpu()
            write_onnx(
                trace(LuaGraph(source, scale, precision), net.spec.channels, net.spec.window), graph, OUTPUTS["lua"]
            )
        yield _open_exported(variant, graph, case, device)


def _open_exported(variant: Variant, graph: Path, case: EngineCase, device: torch.device) -> Run:
    if variant == "onnx":
        return open_graph(Artifact(graph, INPUT, OUTPUTS["lua"]), device)
    trt = load_tensorrt(device)
    options = PlanOptions(max_batch=8)
    profiles = plan_profiles(case.spec.window, options.max_batch)
    path = graph.with_suffix(".plan")
    if not path.exists():
        path.write_bytes(build_plan(trt, graph, case.spec.channels, profiles, PRECISIONS[case.dtype], options))
    return PlanRunner(trt, Artifact(path, INPUT, OUTPUTS["lua"], profiles), device)


def count_flops(run: Run, latent: Tensor) -> int:
    """Count the FLOPs of one forward: multiplies and adds of matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        run(latent)
    return int(counter.get_total_flops())


def measure_matrix_rate(device: torch.device, dtype: torch.dtype, side: int = MATRIX_SIDE) -> float:
    """Return the FLOP/s of a square matrix product: the roofline of this card."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    timing = interleave({"product": lambda: left @ right}, 3, 10, device)["product"]
    return float(2 * side**3 / timing.median_s)


@torch.inference_mode()
def measure_case(
    case: EngineCase,
    device: torch.device,
    folder: Path,
    matrix_rate: float,
    variants: Sequence[Variant] = VARIANTS,
    warmups: int = WARMUPS,
    runs: int = RUNS,
) -> list[EngineFigures]:
    """Measure all variants of one case; "published float32" and "published" must be among them.

    One network is open at a time: each variant is interleaved with the baseline.
    """
    torch.manual_seed(0)
    net = Lua(replace(case.spec, scales=(case.scale,))).eval().to(device)
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(case.batch, case.spec.channels, case.side, case.side, generator=generator).to(device)
    baseline = partial(PublishedForward(copy.deepcopy(net).to(case.dtype)), scale=case.scale)
    with whole_float32():
        expected = PublishedForward(net)(latent, case.scale)
    flops = count_flops(partial(PublishedForward(net), scale=case.scale), latent)
    rows: list[EngineFigures] = []
    float32_s: float | None = None
    for variant in variants:
        row = EngineFigures(
            case.preset, case.side, case.scale, case.batch, str(case.dtype).removeprefix("torch."), variant
        )
        try:
            with open_variant(variant, net, case, device, folder) as run:
                max_error = float((run(latent) - expected).abs().max())
                calls = {"baseline": partial(baseline, latent.to(case.dtype)), "variant": partial(run, latent)}
                timings = interleave(calls, warmups, runs, device)
        except (ValueError, RuntimeError) as error:  # missing library, too little memory, missing kernel
            lines = str(error).splitlines() or [""]
            rows.append(replace(row, error=f"{type(error).__name__}: {lines[0][:300]}"))
            continue
        timing = timings["variant"]
        float32_s = timing.median_s if variant == "published float32" else float32_s
        rows.append(
            replace(
                row,
                median_ms=1e3 * timing.median_s,
                p95_ms=1e3 * timing.p95_s,
                ratio=_speed(timings["baseline"], timing),
                ratio_float32=None if float32_s is None else float32_s / timing.median_s,
                share=flops / timing.median_s / matrix_rate,
                max_error=max_error,
                std=float(expected.std()),
                target=target_of(case, variant),
            )
        )
    return rows


def _speed(baseline: Timing, timing: Timing) -> float:
    return statistics.median(baseline.wall_s) / timing.median_s


def target_of(case: EngineCase, variant: Variant) -> float | None:
    """Return the target of `compiled` and its padded form, if there is one."""
    has_target = (case.preset, case.scale, case.batch, case.dtype) == ("medium", 2, 1, torch.bfloat16)
    return TARGETS.get(case.side) if has_target and variant in ("compiled", "compiled, padded") else None


def line(row: EngineFigures) -> str:
    """Format one row."""
    head = f"{row.preset:<8}{row.side:>4} x{row.scale} b{row.batch} {row.dtype:<9}{row.variant:<18}"
    if row.error is not None or row.median_ms is None:
        return f"{head}{row.error}"
    target = (
        "" if row.target is None else f"  target {row.target}: {'met' if (row.ratio or 0) >= row.target else 'MISSED'}"
    )
    return (
        f"{head}{row.median_ms:>9.2f} ms{row.ratio:>7.2f}x{row.share:>8.1%} of the roof"
        f"  error {row.max_error:.1e}{target}"
    )
