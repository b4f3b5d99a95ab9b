"""Engines that run exported artifacts: `onnx`, `tensorrt` and `aoti`.

`giantleap.export` compares artifacts with PyTorch through the same `open_runner` that serves them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from giantleap.models.device import on_device
from giantleap.models.engines.aoti_runtime import open_package
from giantleap.models.engines.base import Artifact, ArtifactEngineName, EngineError, EngineName, Runner
from giantleap.models.engines.onnx_runtime import open_graph
from giantleap.models.engines.tensorrt_runtime import open_plan
from giantleap.models.lua.network import check_latent, pad_to_window
from giantleap.models.lua.spec import LuaSpec, scaled_size


class ArtifactEngine:
    """Exported graphs, one per scale. Padding to the window and cropping are done here.

    Args:
        name: The engine that runs the graphs.
        spec: The network that they were exported from.
        runners: The loaded graphs by scale.
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
        """Load one artifact per scale of the spec.

        Raises:
            EngineError: An artifact, a library, a provider or a GPU is missing, or a file cannot be loaded.
        """
        missing = [scale for scale in spec.scales if scale not in artifacts]
        if missing:
            raise EngineError(f"engine {name} has no artifact for x{missing[0]}")
        return cls(name, spec, {scale: open_runner(name, artifacts[scale], device) for scale in spec.scales}, device)

    @torch.inference_mode()
    def run(self, latent: Tensor, scale: float) -> Tensor:
        """See `Engine.run`."""
        check_latent(self.spec, latent, (scale,))
        if scale not in self._runners:
            raise EngineError(f"engine {self.name} is closed")
        height, width = latent.shape[-2:]
        padded = pad_to_window(latent.to(self._device, torch.float32), self.spec.window).contiguous()
        with on_device(self._device):
            upscaled = self._runners[int(scale)](padded)
        return upscaled[..., : scaled_size(height, scale), : scaled_size(width, scale)]

    def close(self) -> None:
        """See `Engine.close`."""
        self._runners.clear()


def open_runner(name: ArtifactEngineName, artifact: Artifact, device: torch.device) -> Runner:
    """Load one artifact on a device.

    Raises:
        EngineError: A library, a provider or a GPU is missing, or the file cannot be loaded.
    """
    with on_device(device):
        if name == "onnx":
            return open_graph(artifact, device)
        if name == "tensorrt":
            return open_plan(artifact, device)
        return open_package(artifact, device)
