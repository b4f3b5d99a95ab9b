"""Average the weights of several runs.

Runs that continue from one another lie in one basin of the loss, so the mean of their weights is a network too, and
often a better one than each (model soups, arXiv 2203.05482).
"""

from collections.abc import Sequence
from pathlib import Path

from giantleap.models.lua.checkpoints import CheckpointError, read_lua
from giantleap.models.lua.network import Lua


def average_weights(files: Sequence[Path]) -> Lua:
    """Average the weights of networks of one spec.

    Args:
        files: At least one, in any layout that `read_lua` reads.

    Raises:
        CheckpointError: A file cannot be read, or has another spec than the first.
    """
    average = read_lua(files[0]).float()
    sums = average.state_dict()
    for file in files[1:]:
        net = read_lua(file).float()
        if net.spec != average.spec:
            raise CheckpointError(f"{file}: another network than {files[0]}; only networks of one spec can be averaged")
        for key, value in net.state_dict().items():
            if value.is_floating_point():
                sums[key] += value
    for value in sums.values():
        if value.is_floating_point():
            value /= len(files)
    return average
