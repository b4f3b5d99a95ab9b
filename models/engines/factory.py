"""Opens the engine that a setting names. An engine that cannot run here is an error and never another engine."""

from collections.abc import Mapping

import torch

from giantleap.models.engines.artifacts import ArtifactEngine
from giantleap.models.engines.base import Artifact, Engine, EngineError, EngineName
from giantleap.models.engines.compiled import CompileEngine
from giantleap.models.engines.eager import TorchEngine
from giantleap.models.lua.network import Lua


def open_engine(
    name: EngineName,
    net: Lua,
    device: torch.device,
    dtype: torch.dtype,
    artifacts: Mapping[int, Artifact] | None = None,
) -> Engine:
    """Load an engine.

    Args:
        name: Which one.
        net: The network; engines that run artifacts only use its spec.
        device: Where it runs.
        dtype: The compute type of `torch` and `torch-compile`; an artifact has its own.
        artifacts: For the other engines, one for each scale of the network; the caller has checked them.

    Raises:
        EngineError: The engine cannot run here.
        PackingError: The packed form for a CPU computes something else.
    """
    if name == "torch":
        return TorchEngine.open(net, device, dtype)
    if net.spec.head == "liif":
        raise EngineError(f"engine {name} runs no LIIF head: set the engine to torch")
    if name == "torch-compile":
        return CompileEngine.open(net, device, dtype)
    return ArtifactEngine.open(name, net.spec, artifacts or {}, device)
