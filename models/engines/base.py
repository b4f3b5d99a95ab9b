"""What runs LUA: one small protocol, and `open_engine` which builds the engine that a setting names.

`torch` runs the network as PyTorch has it, on a CPU in the prepared form of `models/engines/cpu.py`. The others are in
modules of their own, whose libraries are imported only when they are asked for; those that run exported artifacts get
them as `Artifact`, checked by whoever calls. An engine that cannot run here as asked is an error and never another
engine.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from giantleap.models.engines.cpu import LatentUpscaler, prepare_lua
from giantleap.models.engines.packed_lua import PackedLua
from giantleap.models.lua.network import Lua, check_latent, pad_to_window
from giantleap.models.lua.spec import LuaSpec, scaled_size

EngineName = Literal["torch", "torch-compile", "onnx", "tensorrt", "aoti"]
ArtifactEngineName = Literal["onnx", "tensorrt", "aoti"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

Runner = Callable[[Tensor], Tensor]
"""float32 [batch, channels, h, w], multiples of the window -> float32 [batch, channels, scale * h, scale * w]."""


class EngineError(ValueError):
    """An engine that cannot run here as asked; one line that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A range of input shapes that an artifact was tuned for, each [batch, height, width] in latent pixels."""

    name: str
    least: tuple[int, int, int]
    most: tuple[int, int, int]

    def holds(self, shape: tuple[int, int, int]) -> bool:
        """Whether an input of this shape is in the range."""
        return all(low <= side <= high for low, side, high in zip(self.least, shape, self.most, strict=True))


@dataclass(frozen=True, slots=True)
class Artifact:
    """An exported LUA of one scale.

    Args:
        path: What the engine opens.
        input: Name of its input.
        output: Name of its output.
        profiles: The shapes that it takes, smallest first; none: any.
    """

    path: Path
    input: str
    output: str
    profiles: tuple[Profile, ...] = ()


class Engine(Protocol):
    """A LUA that is loaded on a device."""

    @property
    def name(self) -> EngineName: ...

    @property
    def spec(self) -> LuaSpec: ...

    def run(self, latent: Tensor, scale: float) -> Tensor:
        """Enlarges a raw latent of any size.

        **Shape** [batch, channels, height, width] -> [batch, channels, scale * height, scale * width], float32.

        **Raises** ValueError: another shape, or a scale or size that the engine was not built for.
        """
        ...

    def close(self) -> None:
        """Frees what the device holds; the engine runs no more."""
        ...


def open_engine(
    name: EngineName,
    net: Lua,
    device: torch.device,
    dtype: torch.dtype,
    artifacts: Mapping[int, Artifact] | None = None,
) -> Engine:
    """Loads an engine.

    Args:
        name: Which.
        net: The network; engines that run artifacts take only its spec.
        device: Where it is to run.
        dtype: The compute type; an artifact has its own.
        artifacts: By scale, for the engines that run them; one for each scale of the network.

    Raises:
        EngineError: it cannot run here.
        PreparationError: as `prepare_lua`.
    """
    if name == "torch":
        return TorchEngine.open(net, device, dtype)
    if net.spec.head == "liif":
        raise EngineError(f"engine {name} runs no LIIF head: set the engine to torch")
    if name == "torch-compile":
        from giantleap.models.engines.compiled import CompileEngine

        return CompileEngine.open(net, device, dtype)
    given = artifacts or {}
    missing = [scale for scale in net.spec.scales if scale not in given]
    if missing:
        raise EngineError(f"engine {name} has no artifact for x{missing[0]}")
    return ArtifactEngine.open(name, net.spec, given, device)


class TorchEngine:
    """PyTorch without compilation.

    Args:
        net: What to run; a `Lua` computes in `dtype` under autocast.
        device: Where it is.
        dtype: The compute type.
    """

    name: EngineName = "torch"

    def __init__(self, net: LatentUpscaler, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = net.spec
        self._net: LatentUpscaler | None = net
        self._device = device
        self._dtype = dtype

    @classmethod
    def open(cls, net: Lua, device: torch.device, dtype: torch.dtype) -> "TorchEngine":
        """On a CPU in the prepared form, where that is possible and faster.

        Raises:
            PreparationError: as `prepare_lua`.
        """
        return cls(prepare_lua(net.to(device), device, dtype), device, dtype)

    @property
    def prepared(self) -> bool:
        """Whether the network runs in the form for a CPU."""
        return isinstance(self._net, PackedLua)

    @torch.inference_mode()
    def run(self, latent: Tensor, scale: float) -> Tensor:
        """As `Engine.run`."""
        if self._net is None:
            raise EngineError("engine torch is closed")
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            return self._net(latent.to(self._device), scale).float()

    def close(self) -> None:
        """As `Engine.close`."""
        self._net = None


class ArtifactEngine:
    """Exported graphs, one per scale; padding and cropping are done here.

    Args:
        name: Of the engine that runs them.
        spec: Of the network that they were exported from.
        runners: By scale.
        device: Where they run.
    """

    def __init__(self, name: EngineName, spec: LuaSpec, runners: Mapping[int, Runner], device: torch.device) -> None:
        self.name = name
        self.spec = spec
        self._runners = dict(runners)
        self._device = device

    @classmethod
    def open(
        cls, name: ArtifactEngineName, spec: LuaSpec, artifacts: Mapping[int, Artifact], device: torch.device
    ) -> "ArtifactEngine":
        """Loads one artifact per scale of the spec.

        Raises:
            EngineError: a library, a provider or a GPU is missing, or a file cannot be loaded.
        """
        open_one: Callable[[Artifact, torch.device], Runner] = open_package
        if name == "onnx":
            from giantleap.models.engines.onnx_runtime import open_graph as open_one
        elif name == "tensorrt":
            from giantleap.models.engines.tensorrt_runtime import PlanRunner, load_tensorrt

            open_one = partial(PlanRunner, load_tensorrt(device))
        with on_device(device):
            return cls(name, spec, {scale: open_one(artifacts[scale], device) for scale in spec.scales}, device)

    @torch.inference_mode()
    def run(self, latent: Tensor, scale: float) -> Tensor:
        """As `Engine.run`."""
        check_latent(self.spec, latent, (scale,))
        if scale not in self._runners:
            raise EngineError(f"engine {self.name} is closed")
        height, width = latent.shape[-2:]
        padded = pad_to_window(latent.to(self._device, torch.float32), self.spec.window).contiguous()
        with on_device(self._device):
            grown = self._runners[int(scale)](padded)
        return grown[..., : scaled_size(height, scale), : scaled_size(width, scale)]

    def close(self) -> None:
        """As `Engine.close`."""
        self._runners.clear()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the one that libraries beside torch allocate and launch on; else that is the first of several."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def open_package(artifact: Artifact, device: torch.device) -> Runner:
    """A package of AOTInductor, on a device of the kind that it was compiled for.

    It holds machine code: only a file whose digest is known may get here.

    Raises:
        EngineError: the file is damaged or of another version of torch.
    """
    try:
        index = (device.index or 0) if device.type == "cuda" else -1
        compiled = torch._inductor.aoti_load_package(str(artifact.path), device_index=index)
    except (RuntimeError, OSError, ValueError) as error:
        raise EngineError(f"{artifact.path} cannot be loaded: {first_line(error)}") from error
    return lambda latent: compiled(latent)


def choose_profile(profiles: Sequence[Profile], shape: tuple[int, int, int]) -> int:
    """Index of the first profile that holds a shape, [batch, height, width].

    Raises:
        ValueError: None does; the message names the largest.
    """
    for index, profile in enumerate(profiles):
        if profile.holds(shape):
            return index
    batch, height, width = shape
    raise ValueError(
        f"no profile of the artifact holds {batch} latents of {height}x{width}; most are {profiles[-1].most}"
    )


def first_line(error: BaseException) -> str:
    """What a log line needs of a library's error."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
