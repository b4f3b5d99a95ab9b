"""What runs LUA: one small protocol, and `open_engine` which builds the engine that a setting names.

`torch` runs the network as PyTorch has it, on a CPU in the prepared form of `models/engine_cpu.py`. The others are in
modules of their own, whose libraries are imported only when they are asked for. An engine that cannot run here as
asked is an error and never another engine.
"""

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from models.engine_cpu import LatentUpscaler, PreparedLua, prepare_lua
from models.lua import Lua
from models.lua_spec import LuaSpec

EngineName = Literal["torch", "torch-compile", "onnx", "tensorrt", "aoti"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)


class EngineError(ValueError):
    """An engine that cannot run here as asked; one line that says why and what to do."""


class Engine(Protocol):
    """A LUA that is loaded on a device."""

    name: EngineName
    spec: LuaSpec

    def run(self, latent: Tensor, scale: int) -> Tensor:
        """Enlarges a raw latent of any size.

        **Shape** [batch, channels, height, width] -> [batch, channels, scale * height, scale * width], float32.

        **Raises** ValueError: another shape, or a scale or size that the engine was not built for.
        """
        ...

    def close(self) -> None:
        """Frees what the device holds; the engine runs no more."""
        ...


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
        return isinstance(self._net, PreparedLua)

    def run(self, latent: Tensor, scale: int) -> Tensor:
        """As `Engine.run`."""
        if self._net is None:
            raise EngineError("engine torch is closed")
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            return self._net(latent.to(self._device), scale).float()

    def close(self) -> None:
        """As `Engine.close`."""
        self._net = None
