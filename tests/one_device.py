"""Finds tensors that code makes on the CPU while it computes elsewhere, which a machine without a GPU does not notice.

Networks and inputs go to "meta", where nothing is computed and shapes, types and devices are followed. What a forward
then makes without naming its device lies on the CPU, and the first operator that meets both is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
_COPIES = frozenset({torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default})


class MixedDevicesError(AssertionError):
    """An operator that would fail on a GPU."""


class OneDevice(TorchDispatchMode):
    """Refuses operators on tensors of two devices, but for copies; a single number may lie on the CPU, as with CUDA."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor) and each.dim()]
        if func not in _COPIES and len({each.device.type for each in tensors}) > 1:
            raise MixedDevicesError(f"{func}: {[f'{each.device} {list(each.shape)}' for each in tensors]}")
        if func is torch.ops.aten.batch_norm_update_stats.default:  # has no form for "meta"
            return args[1].clone(), args[2].clone()
        return func(*args, **(kwargs or {}))
