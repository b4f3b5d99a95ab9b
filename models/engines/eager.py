"""The engine `torch`: PyTorch without compilation, on a CPU in the packed form (`models/engines/cpu.py`)."""

import torch
from torch import Tensor

from giantleap.models.device import choose_upscaler_dtype
from giantleap.models.engines.base import EngineError, EngineName
from giantleap.models.engines.cpu import LatentUpscaler, pack_lua
from giantleap.models.engines.packed_lua import PackedLua
from giantleap.models.lua.network import Lua


class TorchEngine:
    """A network in PyTorch.

    Args:
        net: The network; a `Lua` computes in `dtype` under autocast.
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
        """Move a network to a device and pack it if possible (`pack_lua`); in `choose_upscaler_dtype`.

        Raises:
            PackingError: The packed form computes something else.
        """
        dtype = choose_upscaler_dtype(dtype, device)
        return cls(pack_lua(net.to(device), device, dtype), device, dtype)

    @property
    def is_packed(self) -> bool:
        """Whether the network runs in the packed form."""
        return isinstance(self._net, PackedLua)

    @torch.inference_mode()
    def run(self, latent: Tensor, scale: float) -> Tensor:
        """See `Engine.run`."""
        if self._net is None:
            raise EngineError("engine torch is closed")
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            return self._net(latent.to(self._device), scale).float()

    def close(self) -> None:
        """See `Engine.close`."""
        self._net = None
