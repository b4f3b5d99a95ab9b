"""One bundle on one device: generate -> upscale -> decode, each stage on raw latents, timed with the device at rest.

`Route` is what a worker holds (`service.worker`) and what the command line uses without a service. The stages are
methods of their own, because an upscale job starts at the second one and a latent result ends there.
"""

import gc
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor

from models.bundle import Bundle, check_files
from models.checkpoints import read_lua
from models.generator import CancelCheck, DrawItem, Generator, StepWatcher
from models.lua import Lua, pad_to_window

STAGES = ("generate", "upscale", "decode", "encode")


@dataclass(slots=True)
class StageClock:
    """Seconds per stage of one batch. The device is synchronised at both ends, so that its work is counted."""

    device: torch.device
    stages_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time of the block to `stage`, also when the block raises."""
        synchronize(self.device)
        started_s = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self.device)
            self.stages_s[stage] = self.stages_s.get(stage, 0.0) + time.perf_counter() - started_s


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """The most memory in use since the last reset, and what was measured: a process cannot reset its own peak."""

    size_bytes: int
    source: Literal["cuda_allocated", "process_rss"]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_device(name: str) -> torch.device:
    """The device that a setting names; `auto` is the first GPU where there is one, else the CPU.

    Raises:
        ValueError: a GPU is named that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute type that a setting names; `auto` is float32 on a CPU and bfloat16 on a GPU.

    Raises:
        ValueError: the device does not compute in that type.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name == "float16" and device.type == "cpu":
        raise ValueError("dtype float16 on a CPU: many of its operators are missing there; use float32 or bfloat16")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return dtypes[name]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the machine had no memory left for a tensor."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class Route:
    """A loaded bundle.

    Args:
        name: The bundle's name.
        generator: Prompt to raw latent.
        lua: The upscaler, in float32; it computes in `dtype` under autocast.
        vae: The decoder.
        device: Where all three are.
        dtype: The compute type.
    """

    engine = "torch"

    def __init__(
        self, name: str, generator: Generator, lua: Lua, vae: Any, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.name = name
        self.generator = generator
        self.lua = lua
        self.vae = vae
        self.device = device
        self.dtype = dtype

    @classmethod
    def open(cls, bundle: Bundle, device: torch.device, dtype: torch.dtype) -> Self:
        """Load everything that the bundle names; nothing runs yet (`warm`).

        Raises:
            BundleError: a weight file is not the one that the bundle was made with, or LUA does not fit it.
            CheckpointError: the LUA weights cannot be read.
            OSError: the pipeline lacks a file.
        """
        check_files(bundle)
        lua = read_lua(bundle.lua, device)
        bundle.check_lua(lua.spec)
        generator = Generator.open(bundle, device, dtype)
        vae = generator.pipeline.vae
        if dtype == torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)  # this decoder overflows in float16 and says so in its configuration
        return cls(bundle.name, generator, lua, vae, device, dtype)

    @property
    def scales(self) -> tuple[int, ...]:
        """The scales that `upscale` takes."""
        return (1, *self.lua.spec.scales)

    def clock(self) -> StageClock:
        """A clock for the stages of one batch."""
        return StageClock(self.device)

    def generate(self, items: Sequence[DrawItem], on_step: StepWatcher, canceled: CancelCheck) -> list[Tensor | None]:
        """Draw raw latents; see `Generator.draw`."""
        return self.generator.draw(items, on_step, canceled)

    @torch.inference_mode()
    def upscale(self, latents: Tensor, scale: int) -> Tensor:
        """Enlarge raw latents; scale 1 gives them back.

        **Shape** [batch, channels, h, w] -> [batch, channels, scale * h, scale * w], float32.

        **Raises** ValueError: there is no head for the scale.
        """
        latents = latents.to(self.device, torch.float32)
        if scale == 1:
            return latents
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            enlarged: Tensor = self.lua(latents, scale)
        return enlarged.float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Tensor | None]:
        """Decode raw latents, once; None where an image has a value that is not finite.

        **Shape** [batch, channels, h, w] -> per item [stride * h, stride * w, 3], uint8, on the CPU.
        """
        decoded = self.vae.decode(latents.to(self.device, self.vae.dtype), return_dict=False)[0].float()
        finite = finite_items(decoded)
        pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
        return [image if good else None for image, good in zip(pixels, finite, strict=True)]

    def upscale_items(self, latents: Sequence[Tensor], scale: int) -> list[Tensor]:
        """Enlarge latents of different sizes in one batch: each is padded to the window as `Lua.forward` would do it.

        **Shape** each [channels, h, w] -> [channels, scale * h, scale * w]; all equal once padded to the window.

        **Raises** ValueError: the padded sizes differ.
        """
        window = self.lua.spec.window
        padded = [pad_to_window(latent[None].to(self.device), window) for latent in latents]
        if len({latent.shape for latent in padded}) > 1:
            raise ValueError(f"latents of one batch must be equal once padded to {window}; upscale them in several")
        enlarged = self.upscale(torch.cat(padded), scale)
        sizes = [latent.shape[-2:] for latent in latents]
        return [grown[:, : scale * h, : scale * w] for grown, (h, w) in zip(enlarged, sizes, strict=True)]

    def decode_items(self, latents: Sequence[Tensor]) -> list[Tensor | None]:
        """Decode latents of any sizes, on a GPU those of one size together; see `decode`."""
        images: list[Tensor | None] = [None] * len(latents)
        # On a CPU a batch of 8 took 1.27 times as long per image as one at a time: activations leave the cache.
        most = 1 if self.device.type == "cpu" else len(latents)
        for size in dict.fromkeys(latent.shape for latent in latents):
            alike = [index for index, latent in enumerate(latents) if latent.shape == size]
            for chosen in (alike[start : start + most] for start in range(0, len(alike), most)):
                decoded = self.decode(torch.stack([latents[index] for index in chosen]))
                for index, image in zip(chosen, decoded, strict=True):
                    images[index] = image
        return images

    def warm(self, width_px: int, height_px: int, steps: int) -> dict[int, dict[str, float]]:
        """Run every scale once at the shapes of a real request of this base size; seconds per stage and scale."""
        item = DrawItem("", "", 0, width_px, height_px, steps, 2.0)
        return {scale: run_once(self, item, scale).stages_s for scale in self.scales}

    def reset_peak_memory(self) -> None:
        """Start measuring anew, where the device can."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> PeakMemory:
        """Peak memory since the last reset; on a CPU, of the process since it started."""
        if self.device.type == "cuda":
            return PeakMemory(torch.cuda.max_memory_allocated(self.device), "cuda_allocated")
        unit_bytes = 1 if sys.platform == "darwin" else 1024
        return PeakMemory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes, "process_rss")

    def free_cache(self) -> None:
        """Give back the memory that no tensor uses."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def finite_items(batch: Tensor) -> list[bool]:
    """For each item of a batch, whether all of its values are finite."""
    finite: list[bool] = batch.isfinite().flatten(1).all(dim=1).tolist()
    return finite


def run_once(route: Route, item: DrawItem, scale: int) -> StageClock:
    """One image through the three stages, its pixels thrown away; the clock that timed them."""
    clock = route.clock()
    with clock.measure("generate"):
        latents = route.generate([item], lambda step, steps: None, set)
    drawn = [latent for latent in latents if latent is not None]
    if scale > 1:
        with clock.measure("upscale"):
            drawn = route.upscale_items(drawn, scale)
    with clock.measure("decode"):
        route.decode_items(drawn)
    return clock
