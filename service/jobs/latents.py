"""Reads a latent from a request body, safetensors or .npy, without running code and without trusting its header.

Works on bytes and numpy only, so that the API process needs no torch. `giantleap.service.jobs.planning` decides what
the numbers mean (which latent space, scaled or raw, packed or not); the worker reads the blob that `to_blob` writes.
"""

import io
import math
import tokenize
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.lib.format as npy
import numpy.typing as npt
import safetensors

from giantleap.models.safetensors_header import FLOAT_DTYPES, to_file_bytes, to_floats
from giantleap.service.errors import InvalidRequest, MalformedRequest, UnsupportedMediaType
from giantleap.service.jobs.media_types import NPY_TYPE, OCTETS_TYPE, SAFETENSORS_TYPE, name_format, read_media_type

LATENT_TENSOR = "latent"
_COMFY_TENSOR = "latent_tensor"
# What programs call a latent, in the order in which a file with several tensors is searched.
_LATENT_NAMES = (LATENT_TENSOR, "latents", "samples", _COMFY_TENSOR)
# ComfyUI marks latents that are raw; those of its first version are multiplied by this factor.
_COMFY_MARK, _COMFY_FACTOR = "latent_format_version_0", 0.18215
# The limits keep a hostile header from costing many times its size when it is parsed. One of safetensors also holds
# metadata, such as the workflow that made the latent; its tensors are counted before.
_MAX_HEADER_BYTES = 8 << 20
_MAX_TENSORS = 64
_MAX_NPY_HEADER_BYTES = 16_384
_MAX_DIMS = 5
_READ = "send a latent as safetensors or .npy, or an image as PNG, JPEG or WebP"
# Version 3 differs from 2 in the encoding of field names only, which no dtype that is read has.
_NPY_HEADERS = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
    (3, 0): npy.read_array_header_2_0,
}
# What numpy raises on headers that are not valid, by the place of the fault.
_NPY_FAULTS = (
    *(ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, RecursionError, MemoryError),
    tokenize.TokenError,
)

Floats = npt.NDArray[np.float32]
Values = npt.NDArray[np.float32] | npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor before its values are read: safetensors name of the dtype, shape, and where the bytes start."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray
    offset_bytes: int = 0
    fortran_order: bool = False
    factor: float = 1.0


def read_latent(body: bytes, content_type: str | None) -> Floats:
    """The one tensor of a safetensors or .npy body as float32; otherwise as `read_values`."""
    return read_values(body, content_type).astype(np.float32, copy=False)


def read_values(body: bytes, content_type: str | None) -> Values:
    """Read the one tensor of a safetensors or .npy body: F16 as float16, F32 and BF16 as float32.

    A safetensors file may hold one tensor of any name, or several of which one is called `latent`, `latents`, `samples`
    or `latent_tensor`. The last is ComfyUI's name: without its mark of a version, the values are divided by 0.18215.

    Returns:
        The tensor in the shape in which it was sent: [C, h, w], [B, C, h, w], a video [B, C, frames, h, w], or packed
        [N, C'] and [B, N, C']; no side is 0.

    Raises:
        UnsupportedMediaType: Another content type, a pickled body, or a dtype other than F32, F16 and BF16.
        MalformedRequest: The bytes do not match their header.
        InvalidRequest: The tensor is empty, has a wrong number of dimensions, or a NaN or an infinity.
    """
    tensor = _read_npy(body) if _is_npy(body, content_type) else _read_safetensors(body)
    if not 2 <= len(tensor.shape) <= _MAX_DIMS:
        raise InvalidRequest(
            f"the tensor has {len(tensor.shape)} dimensions; send [C, h, w], [B, C, h, w], a video of one frame "
            "[B, C, 1, h, w] or, packed, [B, N, C]"
        )
    if 0 in tensor.shape:
        raise InvalidRequest(f"the tensor is empty, its shape is {list(tensor.shape)}; every side must be at least 1")
    # The readers compared shape and length: nothing larger than the body has been allocated.
    flat = np.frombuffer(tensor.data, FLOAT_DTYPES[tensor.dtype], math.prod(tensor.shape), tensor.offset_bytes)
    values: Values = to_floats(flat.reshape(tensor.shape, order="F" if tensor.fortran_order else "C"), tensor.dtype)
    if tensor.factor != 1.0:
        with np.errstate(over="ignore"):  # overflow is refused below
            values = values.astype(np.float32) * np.float32(tensor.factor)
    require_finite(values)
    return values


def require_finite(latent: Values) -> None:
    """Refuse NaN and infinities, which would spread over the whole image.

    Raises:
        InvalidRequest: Some value is not finite.
    """
    # numpy converts each float16 for isfinite, which takes ten times as long as checking the exponent bits.
    finite = (latent.view(np.uint16) & 0x7C00) != 0x7C00 if latent.dtype == np.float16 else np.isfinite(latent)
    if not finite.all():
        bad = int(latent.size - np.count_nonzero(finite))
        raise InvalidRequest(f"{bad} of {latent.size} values are NaN or infinite; send finite values only")


def to_blob(latent: Values) -> bytes:
    """The input blob of a job: a safetensors file with one tensor `latent` of shape [B, C, h, w], F16 or F32."""
    dtype = "F16" if latent.dtype == np.float16 else "F32"
    values = np.ascontiguousarray(latent, dtype=FLOAT_DTYPES[dtype])
    return to_file_bytes(LATENT_TENSOR, dtype, values.shape, values.data.cast("B"))


def wrap_tensor(dtype: str, shape: Sequence[int], data: bytes) -> bytes:
    """Wrap the bytes of a tensor into a safetensors file, so that it passes the same checks as any other latent.

    Args:
        dtype: A key of `FLOAT_DTYPES`.
        shape: Shape as sent.
        data: Values, little-endian, in C order.

    Raises:
        InvalidRequest: The shape has a bad number of dimensions, or a side below 1.
        MalformedRequest: Shape and dtype do not match the number of bytes.
    """
    if not 1 <= len(shape) <= _MAX_DIMS or min(shape) < 1:
        raise InvalidRequest(f"the tensor's shape has {len(shape)} sides; send 2 to {_MAX_DIMS}, all of them positive")
    # The product of hostile sides may be too long to print.
    if math.prod(shape) * FLOAT_DTYPES[dtype].itemsize != len(data):
        raise MalformedRequest(f"the tensor has {len(data)} bytes; its shape and datatype need another number")
    return to_file_bytes(LATENT_TENSOR, dtype, shape, data)


def _is_npy(body: bytes, content_type: str | None) -> bool:
    """Whether the body is .npy; the content type must agree with the first bytes."""
    declared = read_media_type(content_type) or OCTETS_TYPE
    if declared not in (SAFETENSORS_TYPE, NPY_TYPE, OCTETS_TYPE):
        raise UnsupportedMediaType(
            f"the content type is {declared[:80]!r}; send a latent as {SAFETENSORS_TYPE}, {NPY_TYPE} or {OCTETS_TYPE}, "
            "an image as image/png, image/jpeg or image/webp, or either as the one file of a form"
        )
    if not body:
        raise MalformedRequest("the body is empty; send a latent as safetensors or .npy, or an image")
    actual = NPY_TYPE if body.startswith(npy.MAGIC_PREFIX) else SAFETENSORS_TYPE if body[8:9] == b"{" else None
    if actual is None and (name := name_format(body)) is not None:
        raise UnsupportedMediaType(f"the body is {name}; {_READ}")
    if declared == OCTETS_TYPE and actual is None:
        raise UnsupportedMediaType(f"the body is of a format that is not known; {_READ}")
    if declared not in (OCTETS_TYPE, actual):
        raise MalformedRequest(f"the body does not start like {declared}, its declared type; correct one of them")
    return actual == NPY_TYPE


def _read_safetensors(body: bytes) -> _Tensor:
    header_bytes = int.from_bytes(body[:8], "little")
    if header_bytes > min(len(body) - 8, _MAX_HEADER_BYTES):
        raise MalformedRequest(
            f"the safetensors header claims {header_bytes} bytes; the body has {max(0, len(body) - 8)} after "
            f"its length and {_MAX_HEADER_BYTES} are allowed"
        )
    # A tensor's entry has this key; the text of metadata would have a backslash before the last quote.
    if body.count(b'"data_offsets"', 8, 8 + header_bytes) > _MAX_TENSORS:
        raise InvalidRequest(f"the file holds more than {_MAX_TENSORS} tensors; send the latent alone")
    try:
        # The library checks that the tensors fill the file without gap or overlap and that each
        # shape times its dtype is its byte range.
        tensors: dict[str, dict[str, Any]] = dict(safetensors.deserialize(body))
    except safetensors.SafetensorError as error:
        raise MalformedRequest("the body is not valid safetensors: its header does not match its data") from error
    name = _choose_name(tensors)
    tensor = tensors[name]
    factor = 1.0 if name != _COMFY_TENSOR or _COMFY_MARK in tensors else 1.0 / _COMFY_FACTOR
    return _Tensor(_require_dtype(tensor["dtype"]), tuple(tensor["shape"]), tensor["data"], factor=factor)


def _choose_name(tensors: Collection[str]) -> str:
    """The name of the one tensor that is no mark, or a name that is known."""
    others = [name for name in tensors if name != _COMFY_MARK]
    name = others[0] if len(others) == 1 else next((known for known in _LATENT_NAMES if known in tensors), None)
    if name is None:
        raise InvalidRequest(
            f"the file holds {len(others)} tensors; send one, or name one of them {', '.join(_LATENT_NAMES)}"
        )
    return name


def _read_npy(body: bytes) -> _Tensor:
    """Read a .npy header (format versions 1 to 3) and compare it with the length of the body."""
    file = io.BytesIO(body)
    try:
        read_header = _NPY_HEADERS[npy.read_magic(file)]
        shape, fortran_order, stored = read_header(file, max_header_size=_MAX_NPY_HEADER_BYTES)
    except _NPY_FAULTS as error:
        raise MalformedRequest("the .npy header is cut off, too long or not valid; write it with numpy.save") from error
    dtype = _require_dtype({"<f4": "F32", "<f2": "F16"}.get(stored.str, stored.str))
    data_bytes = len(body) - file.tell()
    sizes = all(type(side) is int and side >= 0 for side in shape)  # True and False are ints too
    if not sizes or math.prod(shape) * FLOAT_DTYPES[dtype].itemsize != data_bytes:
        raise MalformedRequest(f"the .npy header's shape and dtype do not match its {data_bytes} bytes of data")
    return _Tensor(dtype, shape, body, file.tell(), bool(fortran_order))


def _require_dtype(dtype: str) -> str:
    if dtype not in FLOAT_DTYPES:
        raise UnsupportedMediaType(
            f"the tensor's dtype is {dtype[:32]}; send little-endian float32 or float16, or bfloat16 in safetensors "
            "(objects would need pickle, which is never loaded)"
        )
    return dtype
