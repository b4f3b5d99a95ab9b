"""The engine `onnx`: an exported graph in onnxruntime, on the provider of the device or not at all.

With a GPU onnxruntime itself keeps the arithmetic of shapes on the CPU, and would run there what its provider for CUDA
has no kernel for.
"""

from typing import Any

import torch
from torch import Tensor

from giantleap.models.engines.base import Artifact, EngineError, Runner, first_line

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def load_onnxruntime(device: torch.device) -> Any:
    """The module, which must have the provider of the device.

    Raises:
        EngineError: it is not installed, or was built without that provider.
    """
    try:
        import onnxruntime
    except ImportError as error:
        extra = "gpu" if device.type == "cuda" else "cpu"
        raise EngineError(
            f"engine onnx needs the package onnxruntime; install it with: pip install 'giantleap[{extra}]'"
        ) from error
    wanted, present = PROVIDERS[device.type], onnxruntime.get_available_providers()
    if wanted not in present:
        raise EngineError(
            f"engine onnx on {device} needs {wanted}; this onnxruntime has {', '.join(present)} "
            "(onnxruntime-gpu and onnxruntime exclude each other)"
        )
    return onnxruntime


def runtime_errors() -> tuple[type[Exception], ...]:
    """Every error of onnxruntime, which share no base of their own, and what its Python part raises."""
    from onnxruntime.capi import onnxruntime_pybind11_state as binding

    own = [each for each in vars(binding).values() if isinstance(each, type) and issubclass(each, Exception)]
    return (*own, RuntimeError, ValueError)


def open_graph(artifact: Artifact, device: torch.device) -> Runner:
    """Loads a graph.

    Raises:
        EngineError: the library or its provider is missing, the file is damaged, or the provider did not start.
    """
    ort = load_onnxruntime(device)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    wanted, chosen = PROVIDERS[device.type], choose_provider(device)
    try:
        session = ort.InferenceSession(str(artifact.path), options, providers=chosen)
    except runtime_errors() as error:
        raise EngineError(f"onnxruntime cannot load {artifact.path}: {first_line(error)}") from error
    session.disable_fallback()
    started = session.get_providers()
    if started[0] != wanted:
        raise EngineError(f"onnxruntime started {artifact.path.name} on {started[0]}; {wanted} was asked for")
    names = ([each.name for each in session.get_inputs()], [each.name for each in session.get_outputs()])
    if names != ([artifact.input], [artifact.output]):
        raise EngineError(
            f"{artifact.path}: found inputs {names[0]} and outputs {names[1]}; "
            f"expected {artifact.input} and {artifact.output}"
        )

    def run_on_cpu(latent: Tensor) -> Tensor:
        (answer,) = session.run([artifact.output], {artifact.input: latent.numpy()})
        return torch.from_numpy(answer)

    def run_on_gpu(latent: Tensor) -> Tensor:
        torch.cuda.current_stream(device).synchronize()  # onnxruntime works on a stream of its own
        return run_bound(session, artifact, latent)

    return run_on_gpu if device.type == "cuda" else run_on_cpu


def choose_provider(device: torch.device) -> list[Any]:
    """The provider of a device, as `InferenceSession` takes it: this GPU of several, and no TF32 in float32.

    TF32, which onnxruntime has on by default, rounds what is multiplied to 10 bits of mantissa.
    """
    provider = PROVIDERS[device.type]
    return [(provider, {"device_id": device.index or 0, "use_tf32": 0})] if device.type == "cuda" else [provider]


def run_bound(session: Any, artifact: Artifact, latent: Tensor) -> Tensor:
    """Runs a graph from and to the memory of the latent's device, with no copy by way of the CPU.

    **Shape** [batch, channels, h, w], contiguous, float32 -> what the graph makes of it.
    """
    binding = session.io_binding()
    kind, index = latent.device.type, latent.device.index or 0
    binding.bind_input(artifact.input, kind, index, "float32", list(latent.shape), latent.data_ptr())
    binding.bind_output(artifact.output, kind, index)
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    (answer,) = binding.get_outputs()
    return torch.utils.dlpack.from_dlpack(answer).clone()
