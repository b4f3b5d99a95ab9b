"""The engine `aoti`: a package of AOTInductor, which is machine code for one kind of device."""

import torch

from giantleap.models.engines.base import Artifact, EngineError, Runner, first_line


def open_package(artifact: Artifact, device: torch.device) -> Runner:
    """Load a package on a device of the kind that it was compiled for.

    The file is executable code: check its digest first (`giantleap.export.manifest.check_manifest`).

    Raises:
        EngineError: The file is damaged or was built with another version of torch.
    """
    try:
        index = (device.index or 0) if device.type == "cuda" else -1
        compiled = torch._inductor.aoti_load_package(str(artifact.path), device_index=index)
    except (RuntimeError, OSError, ValueError) as error:
        raise EngineError(f"{artifact.path} cannot be loaded: {first_line(error)}") from error
    return lambda latent: compiled(latent)
