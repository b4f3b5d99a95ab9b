"""What the engines ask of CUDA and of TensorRT, on a machine that has neither: which device and which stream, and when.

Tensors stay on the CPU and are computed at once. What cannot be seen here: kernels, memory, and whether a graph may be
captured at all.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


class FakeStream:
    """A stream of a device; `waits` names the streams that it waited for."""

    def __init__(self, device: torch.device, name: str) -> None:
        self.device, self.name = device, name
        self.cuda_stream = 1000 + len(name)
        self.waits: list[str] = []

    def wait_stream(self, other: "FakeStream") -> None:
        self.waits.append(other.name)

    def synchronize(self) -> None:
        return None


class FakeCuda:
    """The state of CUDA for this thread: the current device and the current stream; graphs that were captured."""

    def __init__(self) -> None:
        self.device = torch.device("cuda:0")
        self.stream = FakeStream(self.device, "default")
        self.captures: list[tuple[torch.device, FakeStream, str, object]] = []
        self.made = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, fake in (
            ("device", self.on_device),
            ("stream", self.on_stream),
            ("current_stream", lambda device=None: self.stream),
            ("Stream", self.new_stream),
            ("CUDAGraph", lambda: SimpleNamespace(replay=lambda: None)),
            ("graph", self.capture),
            ("graph_pool_handle", self.new_pool),
        ):
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **options: empty(*shape, **options))

    def new_stream(self, device: torch.device) -> FakeStream:
        self.made += 1
        return FakeStream(device, f"own {self.made}")

    def new_pool(self) -> tuple[int, int]:
        self.made += 1
        return 0, self.made

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device
        yield
        self.device = before

    @contextmanager
    def on_stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        with self.on_device(stream.device):
            yield
        self.stream = before

    @contextmanager
    def capture(
        self, graph: Any, stream: FakeStream, capture_error_mode: str = "global", pool: object = None
    ) -> Iterator[None]:
        self.captures.append((self.device, stream, capture_error_mode, pool))
        with self.on_stream(stream):
            yield


class FakeTensorRt:
    """The runtime side of `tensorrt`: one engine that answers `network` of what lies at its input's address.

    Args:
        cuda: Says on which device contexts were made.
        network: What the plan computes.
        profiles: How many the plan has.
    """

    class Logger:
        WARNING = 2

        def __init__(self, level: int) -> None:
            self.level = level

    ExecutionContextAllocationStrategy = SimpleNamespace(ON_PROFILE_CHANGE="on profile change")

    def __init__(self, cuda: FakeCuda, network: Callable[[Tensor], Tensor], profiles: int) -> None:
        self.cuda, self.network, self.num_optimization_profiles = cuda, network, profiles
        self.contexts: list[FakeContext] = []

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: None if plan == b"of another GPU" else self)

    def create_execution_context(self, allocation: str) -> "FakeContext":
        assert allocation == "on profile change"
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeContext:
    """One execution context; `runs` holds device, stream and input shape of each execution."""

    def __init__(self, engine: FakeTensorRt) -> None:
        self.engine = engine
        self.made_on = engine.cuda.device
        self.profile: int | None = None
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.runs: list[tuple[torch.device, int, tuple[int, ...]]] = []

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "latent" and self.profile is not None, "a profile is chosen first"
        self.shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == "enlarged"
        return tuple(self.engine.network(torch.zeros(self.shape)).shape)  # a plan knows it without running

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        cuda = self.engine.cuda
        self.runs.append((cuda.device, stream, self.shape))
        answer = self.engine.network(_at(self.addresses["latent"], self.shape)).contiguous()
        _at(self.addresses["enlarged"], tuple(answer.shape)).copy_(answer)
        return True


def _at(address: int, shape: tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32).view(shape)
