"""What `python -m benchmarks.gpu_check engines` measures: every engine of LUA on one GPU, by the paper's protocol.

A case is a preset, latent size, scale, batch and dtype with random weights and inputs. Its variants run in turns: the
published forward in float32 and in the dtype, the network under autocast (fused attention), the prepared form eager,
compiled and replayed as CUDA graphs with and without rows padded to 64 channels, onnxruntime and TensorRT. What cannot
run is a row that says why. It has not run on hardware; on a CPU its tests run the variants that need no GPU.
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
from giantleap.cli.engine_bench import Timing, interleave
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
TARGETS = {64: 5.0, 128: 3.0, 256: 2.2}  # least speed over "published" in bfloat16, batch 1, medium, x2, on an H200
MATRIX_SIDE = 8192
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EngineCase:
    """Random weights of a spec, one scale, one input shape, one compute type."""

    preset: str
    spec: LuaSpec
    side: int
    scale: int
    batch: int
    dtype: torch.dtype


@dataclass(frozen=True)
class EngineFigures:
    """One variant of one case; `error` says why there are no figures.

    `ratio` is the speed over `published` in the same dtype, `ratio_float32` over `published float32`, `share` the part
    of the card's own matrix-product rate in that dtype. `max_error` is to `published float32` without TF32, and `std`
    the deviation of that answer.
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
        return asdict(self)


@contextmanager
def open_variant(variant: Variant, net: Lua, case: EngineCase, device: torch.device, folder: Path) -> Iterator[Run]:
    """A variant's forward, freed at the end.

    Raises:
        ValueError: a library is missing, or an export or a build fails.
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
    """Of one forward, a multiply and an add each; matrix products and convolutions only."""
    with FlopCounterMode(display=False) as counter:
        run(latent)
    return int(counter.get_total_flops())


def measure_matrix_rate(device: torch.device, dtype: torch.dtype, side: int = MATRIX_SIDE) -> float:
    """FLOP/s of a square matrix product on random numbers: the roof of this card."""
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
    warmups: int = 20,
    runs: int = 20,
) -> list[EngineFigures]:
    """All variants of one case; "published float32" and "published" must be among them.

    One network is opened at a time, so variants are interleaved with the yardstick and not all with each other.
    """
    torch.manual_seed(0)
    net = Lua(replace(case.spec, scales=(case.scale,))).eval().to(device)
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(case.batch, case.spec.channels, case.side, case.side, generator=generator).to(device)
    yardstick = partial(PublishedForward(copy.deepcopy(net).to(case.dtype)), scale=case.scale)
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
                calls = {"yardstick": partial(yardstick, latent.to(case.dtype)), "variant": partial(run, latent)}
                timings = interleave(calls, warmups, runs, device)
        except (ValueError, RuntimeError) as error:  # missing libraries, too little memory, kernels that do not exist
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
                ratio=_speed(timings["yardstick"], timing),
                ratio_float32=None if float32_s is None else float32_s / timing.median_s,
                share=flops / timing.median_s / matrix_rate,
                max_error=max_error,
                std=float(expected.std()),
                target=target_of(case, variant),
            )
        )
    return rows


def _speed(yardstick: Timing, timing: Timing) -> float:
    return statistics.median(yardstick.wall_s) / timing.median_s


def target_of(case: EngineCase, variant: Variant) -> float | None:
    """What `compiled` and its padded form are asked for, where something is."""
    asked = (case.preset, case.scale, case.batch, case.dtype) == ("medium", 2, 1, torch.bfloat16)
    return TARGETS.get(case.side) if asked and variant in ("compiled", "compiled, padded") else None


def line(row: EngineFigures) -> str:
    """One row of the table."""
    head = f"{row.preset:<8}{row.side:>4} x{row.scale} b{row.batch} {row.dtype:<9}{row.variant:<18}"
    if row.error is not None or row.median_ms is None:
        return f"{head}{row.error}"
    target = (
        "" if row.target is None else f"  asked {row.target}: {'met' if (row.ratio or 0) >= row.target else 'MISSED'}"
    )
    return (
        f"{head}{row.median_ms:>9.2f} ms{row.ratio:>7.2f}x{row.share:>8.1%} of the roof"
        f"  error {row.max_error:.1e}{target}"
    )
