"""Measures the largest number of bytes that tensors hold at one time, on a CPU or on shapes alone (device "meta").

A CPU has no allocator statistics, and the resident memory of a process keeps buffers that were freed. This counts the
storage of each operator's result until it is freed. Workspace that an operator allocates and frees inside is not seen.
`tensor_bytes` is what all tensors of the process hold now.
"""

import gc
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorage(TorchDispatchMode):
    """Counts the storages that operators of a `with` block create; what existed before (weights, inputs) is left out.

    `peak_bytes` is the peak of their sum, `largest_elements` the size of the largest tensor that was returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.largest_elements = 0
        self._live_bytes = 0
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        shaped = _shape_alone(func, args, kwargs or {})
        result = func(*args, **(kwargs or {})) if shaped is None else shaped
        for tensor in _tensors(result):
            self.largest_elements = max(self.largest_elements, tensor.numel())
            storage = tensor.untyped_storage()
            if storage._cdata not in arguments and storage._cdata not in self._watched:
                self._watch(storage)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size_bytes = storage._cdata, storage.nbytes()

        def forget(_: weakref.ref[torch.UntypedStorage]) -> None:
            self._live_bytes -= size_bytes
            del self._watched[key]

        self._watched[key] = weakref.ref(storage, forget)
        self._live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)


def tensor_bytes() -> int:
    """Bytes of all tensors on the CPU that Python knows, each storage once. Effects: collects garbage."""
    gc.collect()
    sizes_bytes: dict[int, int] = {}
    for each in gc.get_objects():
        # The type alone: isinstance would run code of lazy objects. Subclasses that dispatch hold plain tensors inside.
        if not issubclass(type(each), Tensor) or type(each).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            continue
        if each.is_mkldnn:
            sizes_bytes[id(each)] = each.numel() * each.element_size()
        elif each.device.type == "cpu" and each.layout == torch.strided:
            storage = each.untyped_storage()
            sizes_bytes[storage._cdata] = storage.nbytes()
    return sum(sizes_bytes.values())


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree, without weights packed for oneDNN, which have no storage."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_mkldnn]


def _shape_alone(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result on "meta" where torch has no shape rule or a slow one; else None."""
    if not (args and isinstance(args[0], Tensor) and args[0].is_meta):
        return None
    if func is torch.ops.aten.batch_norm_update_stats.default:
        statistics = [args[0].new_empty(args[0].shape[1], dtype=torch.float32) for _ in range(2)]
        return statistics[0], statistics[1]
    if func is torch.ops.aten.batch_norm.default:
        return torch.empty_like(args[0])
    if "out" in kwargs:
        return kwargs["out"]
    changes_in_place = func.overloadpacket.__name__.endswith("_")
    return args[0] if changes_in_place else None
