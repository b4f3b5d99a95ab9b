"""Opens weight files: safetensors, and torch's own format with nothing but tensors and plain values in it.

Training loops store a network inside other dictionaries and below a prefix: `flatten` and `strip_prefix` find it.
`models/lua/checkpoints.py` builds the network.
"""

import pickle
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from giantleap.models.lua.released_layouts import CheckpointError
from giantleap.models.lua.spec import WEIGHT_SUFFIXES
from giantleap.models.safetensors_header import LFS_ADVICE, is_lfs_pointer

_MAX_DEPTH = 5
_USUAL = ("params_ema.", "params.", "state_dict.")
# What compilers and wrappers for sharding and checkpoints add inside a name.
_INSIDE_NAMES = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FIRST = "conv_first.weight"
# What torch.load raised on 12,000 files with changed or missing bytes; it has no error class of its own.
_DAMAGE = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+) was not an allowed global|Unsupported (?:global: GLOBAL|class) (\S+)")

Value = TypeVar("Value")


def read_weights(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read a weight file.

    Args:
        path: A `.safetensors`, `.pth`, `.pt` or `.ckpt` file, in small letters or capitals.

    Returns:
        The metadata of a safetensors file, and the tensors by name (`strip_prefix`).

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, holds something else, or several networks.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no LUA weights at {path}")
    suffix = path.suffix.lower()
    if suffix not in WEIGHT_SUFFIXES:
        raise CheckpointError(f"{path}: found suffix {path.suffix!r}, expected .ckpt, .safetensors, .pth or .pt")
    if is_lfs_pointer(path):
        raise CheckpointError(f"{path} {LFS_ADVICE}")
    header, weights = _read_safetensors(path) if suffix == ".safetensors" else ({}, _read_pickle(path))
    try:
        return header, strip_prefix(weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def flatten(content: object) -> dict[str, Tensor]:
    """The tensors of nested dictionaries under the names on the way to them, joined by dots.

    Raises:
        CheckpointError: There are none.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"found a {type(content).__name__}, expected a dict of tensors")
    tensors = dict(_walk(content, "", _MAX_DEPTH))
    if content and not tensors:
        raise CheckpointError(
            "conv_first.weight is missing: found no tensors, expected them at the top or under params or state_dict"
        )
    return tensors


def _walk(content: Mapping[object, object], start: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{start}{name}", value.detach()
        elif isinstance(value, Mapping) and depth:
            yield from _walk(value, f"{start}{name}.", depth - 1)


def strip_prefix(weights: Mapping[str, Value]) -> dict[str, Value]:
    """The weights under the names of the network itself, without `module.`, `netG.`, `state_dict.` and the like.

    Of several networks in one file the averaged one is taken, whose prefix names an EMA.

    Raises:
        CheckpointError: There are several networks.
    """
    named = {_INSIDE_NAMES.sub("", name): value for name, value in weights.items()}
    prefixes = [name.removesuffix(_FIRST) for name in named if name == _FIRST or name.endswith(f".{_FIRST}")]
    if not prefixes:  # the names of what else it is belong into the error
        prefixes = [prefix for prefix in _USUAL if any(name.startswith(prefix) for name in named)]
    elif len(prefixes) > 1:
        prefixes = [prefix for prefix in prefixes if "ema" in prefix.lower()] or prefixes
        if len(prefixes) > 1:
            raise CheckpointError(f"found {len(prefixes)} networks, {', '.join(map(repr, prefixes))}; save one of them")
    prefix = next(iter(prefixes), "")
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged or no safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        try:
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path}: {_explain(error)}") from error
        except _DAMAGE as error:
            reason = str(error).splitlines()[0] if str(error) else "it ends too early"
            raise CheckpointError(f"{path}: damaged, or holds more than tensors: {reason}") from error
    try:
        return flatten(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _explain(error: pickle.UnpicklingError) -> str:
    """Why torch did not load a file; its own text advises to run the file's code."""
    refused = _REFUSED_GLOBAL.search(str(error))
    if refused is None:
        return "damaged, or holds more than tensors"
    name = refused[1] or refused[2]
    return f"holds more than tensors: {name}, which is never loaded; save the result of net.state_dict() alone"
