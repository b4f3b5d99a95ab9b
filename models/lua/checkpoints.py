"""Reads and writes the weights of a LUA.

Our own file is safetensors with the spec as JSON in its header. The authors' multi-head release and single-head SwinIR
files are read as well (`models/lua/released_layouts.py`), also as training loops wrap them
(`models/lua/weight_files.py`). A file that does not fit is rejected with the key, its value
and the expected value.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from giantleap.models.atomic_file import replace_file
from giantleap.models.lua.network import Lua
from giantleap.models.lua.released_layouts import CheckpointError, convert_state_dict
from giantleap.models.lua.spec import SPEC_KEY, LuaSpec
from giantleap.models.lua.weight_files import read_weights

__all__ = ["CheckpointError", "read_lua", "write_lua"]


def write_lua(path: Path, net: Lua, metadata: Mapping[str, str] | None = None) -> None:
    """Write our own format. A reader of `path` sees the old file or the new one, never a part.

    Args:
        path: Target; its directory must exist.
        net: The network, on any device and in any dtype.
        metadata: Further entries of the header, such as provenance and license.

    Raises:
        CheckpointError: A weight is NaN or infinite, or `metadata` uses the key of the spec.
    """
    extra = dict(metadata or {})
    if SPEC_KEY in extra:
        raise CheckpointError(f"{path}: the metadata key {SPEC_KEY!r} is taken by the spec")
    weights = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    _refuse_not_finite(path, weights)
    replace_file(path, save(weights, {**extra, SPEC_KEY: net.spec.to_json()}))


def read_lua(path: Path, device: torch.device | str = "cpu") -> Lua:
    """Read a LUA in our format, in the authors' released layout or in SwinIR's.

    Args:
        path: A `.safetensors`, `.pth`, `.pt` or `.ckpt` file.
        device: Where the network goes.

    Returns:
        The network in eval mode and float32, whatever the dtype of the file.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, its layout is not known, or it does not fit its spec.
    """
    header, weights = read_weights(path)
    try:
        spec = LuaSpec.from_json(header[SPEC_KEY]) if SPEC_KEY in header else None
    except ValueError as error:
        raise CheckpointError(f"{path}: header {SPEC_KEY}: {error}") from error
    try:
        if spec is None:
            spec, weights = convert_state_dict(weights)
        net = _build(spec, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    _refuse_not_finite(path, net.state_dict())
    return net.to(device).eval()


def _build(spec: LuaSpec, weights: Mapping[str, Tensor]) -> Lua:
    """A network of this spec that holds exactly these weights."""
    with torch.device("meta"):  # no time or random numbers for weights that are replaced
        net = Lua(spec)
    expected = net.state_dict()
    for word, keys in (("missing", expected.keys() - weights.keys()), ("unknown", weights.keys() - expected.keys())):
        if keys:
            first = ", ".join(sorted(keys)[:3])
            raise CheckpointError(f"{len(keys)} {word} keys, first {first}; expected the keys of {spec.to_json()}")
    for key, value in weights.items():
        if value.shape != expected[key].shape or not value.is_floating_point():
            raise CheckpointError(
                f"key {key}: found {value.dtype} {list(value.shape)}, expected floats {list(expected[key].shape)}"
            )
    # Copies, because safetensors returns views of the file, which may be overwritten.
    own = {key: value.to(torch.float32, copy=True) for key, value in weights.items()}
    net.load_state_dict(own, assign=True)
    return net


def _refuse_not_finite(path: Path, weights: Mapping[str, Tensor]) -> None:
    for key, value in weights.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{path}: key {key}: found NaN or infinite values, expected finite numbers")
