"""The engine `tensorrt`: a plan in NVIDIA's native runtime.

It uses one stream, and per optimization profile one execution context whose buffers are bound once, at the first latent
of the profile. Written for the API of TensorRT 10.13.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from giantleap.models.engines.base import Artifact, EngineError, Runner, choose_profile
from giantleap.models.messages import install_hint


def load_tensorrt(device: torch.device) -> Any:
    """Import `tensorrt`.

    Raises:
        EngineError: The device is no GPU, or the package is not installed.
    """
    if device.type != "cuda":
        raise EngineError(f"engine tensorrt runs on a GPU; the device is {device}: set it to cuda, or use engine onnx")
    try:
        import tensorrt
    except ImportError as error:
        raise EngineError(f"engine tensorrt needs the package tensorrt: {install_hint('gpu')}") from error
    return tensorrt


def open_plan(artifact: Artifact, device: torch.device) -> Runner:
    """Load a plan on a GPU.

    Raises:
        EngineError: As `load_tensorrt` and `PlanRunner`.
    """
    return PlanRunner(load_tensorrt(device), artifact, device)


@dataclass(frozen=True, slots=True)
class Slot:
    """A context with its bound buffers, flat and of the size of the profile's largest shape."""

    context: Any
    input_buffer: Tensor
    output: Tensor


class PlanRunner:
    """Runs one plan.

    Args:
        trt: The module `tensorrt`.
        artifact: The plan, with its profiles.
        device: A GPU of the model that the plan was built for.

    Raises:
        EngineError: The plan is for another GPU or version, or has other profiles than its manifest.
    """

    def __init__(self, trt: Any, artifact: Artifact, device: torch.device) -> None:
        self._artifact, self._device = artifact, device
        self._stream = torch.cuda.Stream(device)
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))  # must outlive the engine
        with torch.cuda.device(device):
            engine = self._runtime.deserialize_cuda_engine(artifact.path.read_bytes())
        if engine is None:
            raise EngineError(f"TensorRT cannot load {artifact.path}: it was built for another GPU or version")
        if engine.num_optimization_profiles != len(artifact.profiles):
            raise EngineError(
                f"{artifact.path} has {engine.num_optimization_profiles} profiles; "
                f"its manifest names {len(artifact.profiles)}"
            )
        self._engine = engine
        self._allocation = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE  # not for the largest profile
        self._slots: dict[int, Slot] = {}

    def __call__(self, latent: Tensor) -> Tensor:
        """Run one batch; a batch larger than the profiles runs in parts.

        Raises:
            EngineError: No profile holds the size.
        """
        max_batch = max(profile.max_shape[0] for profile in self._artifact.profiles)
        if len(latent) <= max_batch:
            return self._run(latent)
        return torch.cat([self._run(part) for part in latent.split(max_batch)])

    def _run(self, latent: Tensor) -> Tensor:
        batch, _, height, width = latent.shape
        index = choose_profile(self._artifact.profiles, (batch, height, width))
        slot = self._slots.get(index) or self._open_slot(index, latent.shape[1])
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            slot.input_buffer[: latent.numel()].view(latent.shape).copy_(latent)
            latent.record_stream(self._stream)
            if not slot.context.set_input_shape(self._artifact.input, tuple(latent.shape)):
                raise EngineError(f"{self._artifact.path.name} does not take the shape {list(latent.shape)}")
            shape = tuple(slot.context.get_tensor_shape(self._artifact.output))
            if not slot.context.execute_async_v3(self._stream.cuda_stream):
                raise RuntimeError(f"TensorRT failed in {self._artifact.path.name}")
            output = slot.output[: torch.Size(shape).numel()].view(shape).clone()
        caller.wait_stream(self._stream)
        output.record_stream(caller)
        return output

    def _open_slot(self, index: int, channels: int) -> Slot:
        batch, height, width = self._artifact.profiles[index].max_shape
        context = self._engine.create_execution_context(self._allocation)
        if not context.set_optimization_profile_async(index, self._stream.cuda_stream):
            raise EngineError(f"TensorRT refuses profile {self._artifact.profiles[index].name}")
        context.set_input_shape(self._artifact.input, (batch, channels, height, width))
        elements = torch.Size(tuple(context.get_tensor_shape(self._artifact.output))).numel()
        input_buffer = torch.empty(batch * channels * height * width, device=self._device)
        output = torch.empty(elements, device=self._device)
        context.set_tensor_address(self._artifact.input, input_buffer.data_ptr())
        context.set_tensor_address(self._artifact.output, output.data_ptr())
        self._stream.synchronize()
        slot = self._slots[index] = Slot(context, input_buffer, output)
        return slot
