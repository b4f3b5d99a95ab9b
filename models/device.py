"""The device that a route runs on: its choice, its compute type, and the time and memory that work takes there."""

import gc
import importlib.util
import logging
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

log = logging.getLogger(__name__)

StageName = Literal["generate", "vae_encode", "upscale", "refine", "decode", "encode"]
PartCallback = Callable[[float | None], None]
"""Called after each part of a stage with the fraction of the stage that is done, None if unknown. It may raise."""


class StageObserver(Protocol):
    """What sees each stage of a batch begin and end: a clock, a trace, a progress report."""

    def measure(self, stage: StageName) -> AbstractContextManager[None]:
        """A context manager that the stage runs in."""
        ...

    def report_part(self, stage: StageName, fraction: float | None) -> None:
        """Called after each part of a stage, as a `PartCallback`: a tile, a strip, a layer."""
        ...


class NoObserver:
    """A `StageObserver` that does nothing."""

    def measure(self, stage: StageName) -> AbstractContextManager[None]:
        """A context manager without effect."""
        return nullcontext()

    def report_part(self, stage: StageName, fraction: float | None) -> None:
        """No effect."""


@dataclass(slots=True)
class StageClock:
    """A `StageObserver` that adds up seconds per stage of one batch.

    It synchronizes the device before and after each stage, so that the time includes the device's work.
    """

    device: torch.device
    stages_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: StageName) -> Iterator[None]:
        """Add the time of the block to `stage`, also when the block raises."""
        synchronize(self.device)
        started_s = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self.device)
            self.stages_s[stage] = self.stages_s.get(stage, 0.0) + time.perf_counter() - started_s

    def report_part(self, stage: StageName, fraction: float | None) -> None:
        """No effect: a stage is timed as a whole."""


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """The most memory in use since the last reset, and what was measured: a process cannot reset its own peak."""

    size_bytes: int
    source: Literal["cuda_allocated", "process_rss"]


def part_of(on_part: PartCallback | None, done: int, total: int, items: int = 1) -> PartCallback | None:
    """The callback for the next `items` of `total`, of which `done` are: it reports the fraction of the total."""
    if on_part is None:
        return None
    return lambda fraction: on_part(None if fraction is None else (done + items * fraction) / total)


def compiler_fault(device: torch.device) -> str:
    """Why this machine cannot compile a network for a device; empty if it can."""
    if device.type == "cuda":
        missing = importlib.util.find_spec("triton") is None
        return "on a GPU needs the package triton, which comes with torch for CUDA: install it" if missing else ""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        line = str(error).strip().partition("\n")[0]
        return f"on a CPU needs a C++ compiler: {line}; install one (Debian: g++) or leave it out"
    return ""


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one for libraries beside torch; without it they use the first GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def choose_device(name: str) -> torch.device:
    """The device of a setting; `auto` is the first GPU, else the CPU.

    Raises:
        ValueError: This machine does not have the named GPU.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def choose_dtype(name: str, device: torch.device, preferred: str | None = None) -> torch.dtype:
    """The compute type of a setting; `auto` is float32 on a CPU, and on a GPU the bundle's type, else bfloat16.

    Args:
        name: The setting.
        device: Where it runs.
        preferred: The bundle's type (`Bundle.dtype`), used for `auto` on a GPU.

    Raises:
        ValueError: The device does not compute in that type.
    """
    if name == "auto":
        name = "float32" if device.type == "cpu" else preferred or "bfloat16"
    if name == "float16" and device.type == "cpu":
        raise ValueError("dtype float16 on a CPU: many of its operators are missing there; use float32 or bfloat16")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    warn_of_slow_dtype(dtypes[name], device)
    return dtypes[name]


def warn_of_slow_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Log a warning where a processor only emulates a type: bfloat16 was 50 times slower than float32 there."""
    if is_emulated(dtype, device):
        log.warning("this processor has no arithmetic for bfloat16 (AVX512-BF16 or AMX): float32 is far faster on it")


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device computes in a type only by way of float32, slower than in float32 itself."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not has_fast_bfloat16()


def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16 itself."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_upscaler_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type that SwinIR and LUA compute in if the pipeline computes in `dtype`: never float16.

    Their residual stream is not normalized and grows from group to group; that of published SwinIR files exceeds the
    65,504 of float16, and every value becomes NaN. bfloat16 has the range of float32. GPUs before Ampere have no
    arithmetic for it.
    """
    if dtype != torch.float16:
        return dtype
    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the machine had no memory left for a tensor."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of `peak_memory`, if the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> PeakMemory:
    """Peak memory since the last reset; on a CPU, of the process since it started."""
    if device.type == "cuda":
        return PeakMemory(torch.cuda.max_memory_allocated(device), "cuda_allocated")
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return PeakMemory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes, "process_rss")


def free_cache(device: torch.device) -> None:
    """Release memory that no tensor uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
