"""The engine `torch-compile`: the packed network through `torch.compile`, on a GPU replayed as CUDA graphs.

A graph is captured per scale and size at the first latent of that size, for batches of 1, 2, 4, 8, ...; smaller batches
are padded, which changes no image. The compiler runs at the first latent of a scale and at the first larger batch. Its
kernels take any size, except for some sizes of a few windows, which are compiled again. A failure to compile is an
error; torch by itself would continue without the compiler.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from giantleap.models.device import choose_upscaler_dtype, compiler_fault, on_device
from giantleap.models.engines.base import EngineError, EngineName
from giantleap.models.engines.packed_lua import Grids, PackedLua
from giantleap.models.lua.network import Lua, check_latent, pad_to_window
from giantleap.models.lua.spec import scaled_size

GRAPHS_KEPT = 16
_CAPTURE_WARMUPS = 3
_MAX_COMPILED = 64  # for all scales; two scales at odd sizes exceed torch's limit of 8, after which it stops compiling


@dataclass(frozen=True, slots=True)
class Captured:
    """A CUDA graph with its input and output tensors."""

    graph: torch.cuda.CUDAGraph
    input: Tensor
    grids: Grids
    output: Tensor


class CompileEngine:
    """A compiled LUA.

    Args:
        net: The packed form with torch's own layers.
        device: Where it is.
    """

    name: EngineName = "torch-compile"

    def __init__(self, net: PackedLua, device: torch.device) -> None:
        self.spec = net.spec
        self._net = net
        self._device = device
        self._compiled: dict[int, Callable[[Tensor, Grids], Tensor]] = {
            scale: torch.compile(partial(net.core, scale=scale), fullgraph=True) for scale in net.spec.scales
        }
        self._graphs: OrderedDict[tuple[int, ...], Captured] = OrderedDict()
        self._stream: torch.cuda.Stream | None = None  # of all captures
        self._pool: Any = None  # torch's handle of the memory pool of all captures

    @classmethod
    def open(cls, net: Lua, device: torch.device, dtype: torch.dtype, width_multiple: int = 1) -> "CompileEngine":
        """Prepare for compilation in `choose_upscaler_dtype`; nothing is compiled yet.

        Args:
            net: The network.
            device: Where it runs.
            dtype: The compute type of the pipeline.
            width_multiple: As in `PackedLua`.

        Raises:
            EngineError: There is no compiler for the device.
        """
        require_compiler(device)
        dtype = choose_upscaler_dtype(dtype, device)
        return cls(PackedLua(net.to(device), dtype, packed=False, width_multiple=width_multiple), device)

    @torch.inference_mode()
    def run(self, latent: Tensor, scale: float) -> Tensor:
        """See `Engine.run`."""
        check_latent(self.spec, latent, (scale,))
        if scale not in self._compiled:
            raise EngineError("engine torch-compile is closed")
        height, width = latent.shape[-2:]
        padded = pad_to_window(latent.to(self._device, torch.float32), self.spec.window)
        padded = padded.clone(memory_format=torch.contiguous_format)  # other strides would be compiled again
        with on_device(self._device):
            if self._device.type == "cuda":
                upscaled = self._replay(padded, int(scale))
            else:
                upscaled = self._compute(int(scale), *self._open_sizes(padded))
        return upscaled[..., : scaled_size(height, scale), : scaled_size(width, scale)]

    def _open_sizes(self, padded: Tensor) -> tuple[Tensor, Grids]:
        """The inputs of the network, marked as of any size; the compiler keeps a batch of 1 as a case of its own."""
        grids = self._net.grids_of(padded)
        torch._dynamo.maybe_mark_dynamic(padded, [0, 2, 3])
        for grid in (grids.plain, grids.shifted):
            torch._dynamo.maybe_mark_dynamic(grid.gather, 0)
            torch._dynamo.maybe_mark_dynamic(grid.scatter, 0)
        for tensor in (grids.to_plain, grids.to_shifted, grids.shifted.mask):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return padded, grids

    def _compute(self, scale: int, padded: Tensor, grids: Grids) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=_MAX_COMPILED):
            return self._compiled[scale](padded, grids)

    def _replay(self, padded: Tensor, scale: int) -> Tensor:
        batch = len(padded)
        filled = fill_batch(padded)
        key = (scale, *filled.shape)
        captured = self._graphs.pop(key, None) or self._capture(filled, scale)
        self._graphs[key] = captured
        while len(self._graphs) > GRAPHS_KEPT:
            self._graphs.popitem(last=False)
        captured.input.copy_(filled)
        captured.graph.replay()
        return captured.output[:batch].clone()

    def _capture(self, filled: Tensor, scale: int) -> Captured:
        """Capture a graph for this size, in memory that all graphs share.

        Graphs run one at a time and the output is copied before the next run, so that together they take the memory of
        the largest. Torch reuses that memory only for captures on one stream.
        """
        input, grids = self._open_sizes(filled.clone())
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()
        side = self._stream
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_CAPTURE_WARMUPS):
                self._compute(scale, input, grids)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with the GPU meanwhile. Torch's own stream for this is of the first GPU ever used.
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            output = self._compute(scale, input, grids)
        return Captured(graph, input, grids, output)

    def close(self) -> None:
        """See `Engine.close`."""
        self._graphs.clear()
        self._compiled.clear()


def fill_batch(latents: Tensor) -> Tensor:
    """Pad a batch to a power of two with copies of its last latent."""
    size = 1 << (len(latents) - 1).bit_length()
    return (
        latents if size == len(latents) else torch.cat([latents, latents[-1:].expand(size - len(latents), -1, -1, -1)])
    )


def require_compiler(device: torch.device) -> None:
    """Check that this machine can compile for a device.

    Raises:
        EngineError: There is no C++ compiler for a CPU, or no Triton for a GPU.
    """
    if fault := compiler_fault(device):
        raise EngineError(f"engine torch-compile {fault}")
