"""The engine `onnx`: an exported graph in onnxruntime, on the execution provider of the device and on no other.

On a GPU onnxruntime keeps the arithmetic of shapes on the CPU; other operators without a CUDA kernel would run there
too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from giantleap.models.engines.base import Artifact, EngineError, Runner, first_line
from giantleap.models.messages import install_hint

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def load_onnxruntime(device: torch.device) -> Any:
    """Import onnxruntime and check that it has the provider of the device.

    Raises:
        EngineError: It is not installed, or was built without that provider.
    """
    try:
        import onnxruntime
    except ImportError as error:
        extra = "gpu" if device.type == "cuda" else "cpu"
        raise EngineError(f"engine onnx needs the package onnxruntime: {install_hint(extra)}") from error
    provider, available = PROVIDERS[device.type], onnxruntime.get_available_providers()
    if provider not in available:
        raise EngineError(
            f"engine onnx on {device} needs {provider}; this onnxruntime has {', '.join(available)} "
            "(onnxruntime-gpu and onnxruntime exclude each other)"
        )
    return onnxruntime


def open_graph(artifact: Artifact, device: torch.device) -> Runner:
    """Load a graph.

    Raises:
        EngineError: The library or its provider is missing, the file is damaged, or the provider did not start.
    """
    ort = load_onnxruntime(device)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    with _engine_errors(f"cannot load {artifact.path}"):
        session = ort.InferenceSession(str(artifact.path), options, providers=choose_provider(device))
    session.disable_fallback()
    started = session.get_providers()
    if started[0] != PROVIDERS[device.type]:
        raise EngineError(f"onnxruntime runs {artifact.path.name} on {started[0]}; expected {PROVIDERS[device.type]}")
    names = ([value.name for value in session.get_inputs()], [value.name for value in session.get_outputs()])
    if names != ([artifact.input], [artifact.output]):
        raise EngineError(
            f"{artifact.path}: found inputs {names[0]} and outputs {names[1]}; "
            f"expected {artifact.input} and {artifact.output}"
        )

    def run(latent: Tensor) -> Tensor:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # onnxruntime works on a stream of its own
            return run_bound(session, artifact, latent)
        with _engine_errors(f"failed in {artifact.path.name}"):
            (output,) = session.run([artifact.output], {artifact.input: latent.numpy()})
        return torch.from_numpy(output)

    return run


def choose_provider(device: torch.device) -> list[Any]:
    """The `providers` argument of `InferenceSession`: this GPU, and no TF32 in float32.

    TF32, which onnxruntime has on by default, rounds the factors of products to 10 bits of mantissa.
    """
    provider = PROVIDERS[device.type]
    return [(provider, {"device_id": device.index or 0, "use_tf32": 0})] if device.type == "cuda" else [provider]


def run_bound(session: Any, artifact: Artifact, latent: Tensor) -> Tensor:
    """Run a graph from and to the memory of the latent's device, without a copy through the CPU.

    Args:
        session: An `InferenceSession`.
        artifact: Names its input and output.
        latent: [batch, channels, h, w], contiguous, float32.
    """
    binding = session.io_binding()
    kind, index = latent.device.type, latent.device.index or 0
    binding.bind_input(artifact.input, kind, index, "float32", list(latent.shape), latent.data_ptr())
    binding.bind_output(artifact.output, kind, index)
    with _engine_errors(f"failed in {artifact.path.name}"):
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
    (output,) = binding.get_outputs()
    return torch.utils.dlpack.from_dlpack(output).clone()


@contextmanager
def _engine_errors(action: str) -> Iterator[None]:
    try:
        yield
    except _runtime_errors() as error:
        raise EngineError(f"onnxruntime {action}: {first_line(error)}") from error


def _runtime_errors() -> tuple[type[Exception], ...]:
    """All errors of onnxruntime, which share no base class, and those of its Python part."""
    from onnxruntime.capi import onnxruntime_pybind11_state as binding

    own = [value for value in vars(binding).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*own, RuntimeError, ValueError)
