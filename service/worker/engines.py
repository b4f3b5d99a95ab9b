"""Opens a bundle with the engine that the settings name, after checking the exported artifacts that it runs.

`giantleap.export.manifest.check_manifest` refuses artifacts that are damaged or were made from another bundle or for
another machine, with the command that builds the right ones.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from giantleap.export.machine import read_machine
from giantleap.export.manifest import FILE, check_manifest
from giantleap.models.adapters.files import find_files
from giantleap.models.bundle.bundle import Bundle
from giantleap.models.device import choose_device, choose_dtype
from giantleap.models.engines.base import Artifact, EngineError
from giantleap.models.engines.onnx_runtime import load_onnxruntime
from giantleap.models.engines.tensorrt_runtime import load_tensorrt
from giantleap.models.engines.threads import set_threads
from giantleap.models.route import Route
from giantleap.service.settings import Settings


def open_route(bundle: Bundle, settings: Settings, device: torch.device, dtype: torch.dtype) -> Route:
    """Load what the role of the settings needs of a bundle; nothing runs yet.

    Raises:
        ValueError: as `find_artifacts`, as `giantleap.models.engines.factory.open_engine`, or as `Route.open`.
        OSError: the pipeline lacks a file.
    """
    artifacts = find_artifacts(bundle, settings, device) if settings.role.loads_decoder else {}
    route = Route.open(bundle, device, dtype, settings.engine, artifacts, settings.role)
    if settings.lora_dir is not None and settings.role.loads_pipeline:
        route.generator.adapters.offer(find_files(settings.lora_dir), settings.lora_memory_bytes)
    return route


def open_local_route(bundle: Bundle, settings: Settings) -> Route:
    """Load a bundle in a process without a queue, on the device of the settings.

    Raises:
        ValueError: the device does not exist or cannot compute in that type, or as `open_route`.
        OSError: the pipeline lacks a file.
    """
    set_threads(settings.torch_threads)
    device = choose_device(settings.device)
    return open_route(bundle, settings, device, choose_dtype(settings.dtype, device, bundle.dtype))


def find_artifacts(bundle: Bundle, settings: Settings, device: torch.device) -> Mapping[int, Artifact]:
    """The exported LUA of a bundle by scale; none for an engine without artifacts or a bundle without LUA.

    Raises:
        EngineError: the engine's library, provider or GPU is missing.
        ArtifactError: the artifacts are missing, damaged, or not for this bundle or machine.
    """
    engine = settings.engine
    if bundle.lua is None or engine == "torch" or engine == "torch-compile":
        return {}
    if engine == "onnx":
        load_onnxruntime(device)
    elif engine == "tensorrt":
        load_tensorrt(device)
    directory = artifact_directory(bundle, settings)
    scales = [scale for scale in bundle.scales_of("lua")[1:] if isinstance(scale, int)]
    if len(scales) < len(bundle.scales_of("lua")[1:]):
        raise EngineError(f"engine {engine} runs no LIIF head: set the engine to torch")
    manifest = check_manifest(directory, bundle, engine=engine, scales=scales, machine=read_machine(device))
    found = {scale: manifest.get("lua", scale) for scale in scales}
    return {scale: each.locate(directory) for scale, each in found.items() if each is not None}


def artifact_directory(bundle: Bundle, settings: Settings) -> Path:
    """Directory of a bundle's artifacts: that of the settings, or a folder of the bundle's name in it."""
    if settings.engine_dir is None:
        return settings.data_dir / "exports" / f"{bundle.name}-{settings.engine}-fp32"
    own = settings.engine_dir / bundle.name
    return own if len(settings.bundle) > 1 or (own / FILE).is_file() else settings.engine_dir
