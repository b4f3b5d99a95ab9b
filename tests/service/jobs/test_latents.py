"""A latent body is read exactly, or refused with a 4xx; nothing in it is believed or run."""

import io
import json
import pickle
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from giantleap.service.errors import GiantleapError, InvalidRequest, MalformedRequest, UnsupportedMediaType
from giantleap.service.jobs.latents import read_latent, read_values, to_blob
from giantleap.service.jobs.media_types import NPY_TYPE, OCTETS_TYPE, SAFETENSORS_TYPE

LATENT = np.random.default_rng(0).standard_normal((2, 4, 6, 5)).astype(np.float32)


def npy(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def npy_with(header: str, data: bytes = b"\0" * 64) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def tensors(header: dict[str, Any] | str, data: bytes = b"\0" * 64) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], *offsets: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("content_type", [None, OCTETS_TYPE, SAFETENSORS_TYPE, "application/x-safetensors; a=b"])
def test_safetensors_are_read_exactly(dtype: type[np.floating[Any]], content_type: str | None) -> None:
    sent = LATENT.astype(dtype)
    read = read_latent(save({"anything": sent}), content_type)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, sent.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("content_type", [None, OCTETS_TYPE, NPY_TYPE])
def test_npy_is_read_exactly(dtype: type[np.floating[Any]], content_type: str | None) -> None:
    sent = LATENT.astype(dtype)
    np.testing.assert_array_equal(read_latent(npy(sent), content_type), sent.astype(np.float32))


def test_npy_in_fortran_order_keeps_its_axes() -> None:
    np.testing.assert_array_equal(read_latent(npy(np.asfortranarray(LATENT)), NPY_TYPE), LATENT)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_npy_is_read(version: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, LATENT, version=version)
    np.testing.assert_array_equal(read_latent(buffer.getvalue(), NPY_TYPE), LATENT)


def test_npy_of_python_2_is_read() -> None:
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (4L, 2L, 2L)}"
    data = np.arange(16, dtype=np.float32)
    np.testing.assert_array_equal(read_latent(npy_with(header, data.tobytes()), NPY_TYPE), data.reshape(4, 2, 2))


def test_bfloat16_is_read_exactly() -> None:
    exact = np.array([[[1.0, -2.5], [0.15625, 3e38]]], np.float32)
    upper = (exact.view(np.uint32) >> 16).astype("<u2")
    body = tensors({"z": entry("BF16", [1, 2, 2], 0, 8)}, upper.tobytes())
    expected = (upper.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(read_latent(body, None), expected)
    np.testing.assert_allclose(read_latent(body, None), exact, rtol=2**-7)


def test_latent_is_taken_by_name_from_several_tensors() -> None:
    np.testing.assert_array_equal(read_latent(save({"noise": LATENT[:1], "latent": LATENT}), None), LATENT)
    with pytest.raises(InvalidRequest, match="2 tensors"):
        read_latent(save({"noise": LATENT, "other": LATENT}), None)


def test_blob_is_what_the_worker_expects() -> None:
    read = load(to_blob(LATENT[:, ::-1]))
    assert list(read) == ["latent"] and read["latent"].dtype == np.float32
    np.testing.assert_array_equal(read["latent"], LATENT[:, ::-1])


@pytest.mark.parametrize("content_type", [SAFETENSORS_TYPE, NPY_TYPE])
def test_float16_goes_to_the_worker_as_it_came(content_type: str) -> None:
    sent = LATENT.astype(np.float16)
    sent.flat[0] = 65504.0
    body = save({"latent": sent}) if content_type == SAFETENSORS_TYPE else npy(sent)
    read = load(to_blob(read_values(body, content_type)))["latent"]
    assert read.dtype == np.float16
    np.testing.assert_array_equal(read, sent)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_values_that_are_not_finite_are_refused(value: float, dtype: type[np.floating[Any]]) -> None:
    latent = LATENT.astype(dtype)
    latent[1, 2, 3, 4] = value
    for body in (save({"latent": latent}), npy(latent)):
        with pytest.raises(InvalidRequest, match="1 of 240 values"):
            read_latent(body, None)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the pickle was run",))


def test_pickles_are_never_loaded() -> None:
    array = np.empty((1, 1), dtype=object)
    array[0, 0] = Bomb()
    with pytest.raises(UnsupportedMediaType, match="never loaded"):
        read_latent(npy(array, allow_pickle=True), NPY_TYPE)
    for content_type in (OCTETS_TYPE, SAFETENSORS_TYPE, NPY_TYPE):
        with pytest.raises(UnsupportedMediaType, match="never loaded"):
            read_latent(pickle.dumps(Bomb()), content_type)


@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<i4", "<c8", "|b1", "|S4", "<M8[s]"])
def test_npy_of_another_dtype_is_unsupported(dtype: str) -> None:
    with pytest.raises(UnsupportedMediaType):
        read_latent(npy(np.zeros((4, 2, 2), dtype)), NPY_TYPE)


def test_structured_npy_is_unsupported() -> None:
    with pytest.raises(UnsupportedMediaType):
        read_latent(npy(np.zeros((4, 2, 2), [("a", "<f4")])), NPY_TYPE)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8, np.bool_])
def test_safetensors_of_another_dtype_is_unsupported(dtype: type[np.floating[Any]]) -> None:
    with pytest.raises(UnsupportedMediaType):
        read_latent(save({"latent": np.zeros((4, 2, 2), dtype)}), None)


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "image/png", "nonsense"])
def test_other_content_types_are_unsupported(content_type: str) -> None:
    with pytest.raises(UnsupportedMediaType):
        read_latent(save({"latent": LATENT}), content_type)


def test_declared_type_must_be_the_real_one() -> None:
    with pytest.raises(MalformedRequest):
        read_latent(npy(LATENT), SAFETENSORS_TYPE)
    with pytest.raises(MalformedRequest):
        read_latent(save({"latent": LATENT}), NPY_TYPE)


@pytest.mark.parametrize("shape", [(), (5,), (1, 1, 1, 4, 2, 2), (0, 2, 2), (4, 0, 2)])
def test_shapes_that_are_no_latent_are_refused(shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, np.float32)
    for body in (save({"latent": array}), npy(array)):
        with pytest.raises(InvalidRequest):
            read_latent(body, None)


BROKEN = {
    "empty": b"",
    "one byte": b"\x93",
    "only a length": struct.pack("<Q", 8),
    "safetensors cut in its header": save({"latent": LATENT})[:20],
    "safetensors cut in its data": save({"latent": LATENT})[:-1],
    "safetensors with a tail": save({"latent": LATENT}) + b"\0",
    "safetensors header length lies": struct.pack("<Q", 2**63) + b'{"latent":1}',
    "safetensors header longer than the body": struct.pack("<Q", 1000) + b"{}",
    "safetensors header that is no JSON": tensors("{nonsense"),
    "safetensors without a tensor": tensors({}, b""),
    "safetensors nested deeply": tensors('{"a":' * 3000 + "1" + "}" * 3000),
    "safetensors shape larger than data": tensors({"z": entry("F32", [4, 1000, 1000], 0, 64)}),
    "safetensors shape that overflows": tensors({"z": entry("F32", [2**62, 2**62, 4], 0, 64)}),
    "safetensors offsets outside": tensors({"z": entry("F32", [1, 4, 4], 0, 640)}),
    "safetensors offsets backwards": tensors({"z": entry("F32", [1, 4, 4], 64, 0)}),
    "safetensors that overlap": tensors(
        {"a": entry("F32", [1, 4, 4], 0, 64), "latent": entry("F32", [1, 4, 4], 0, 64)}
    ),
    "safetensors with a hole": tensors({"z": entry("F32", [1, 4, 2], 32, 64)}),
    "safetensors negative shape": tensors({"z": entry("F32", [-1, 4, 4], 0, 64)}),
    "safetensors huge header": tensors(json.dumps({"__metadata__": {"x": "y" * 100_000}})),
    "npy cut in its header": npy(LATENT)[:30],
    "npy cut in its data": npy(LATENT)[:-1],
    "npy with a tail": npy(LATENT) + b"\0",
    "npy of an unknown version": b"\x93NUMPY\x09\x00" + npy(LATENT)[8:],
    "npy header that is code": npy_with("__import__('os').abort()"),
    "npy header without a shape": npy_with("{'descr': '<f4', 'fortran_order': False}"),
    "npy shape larger than data": npy_with("{'descr':'<f4','fortran_order':False,'shape':(4, 100000, 100000)}"),
    "npy negative shape": npy_with("{'descr':'<f4','fortran_order':False,'shape':(-1, -4, -4)}"),
    "npy fractional shape": npy_with("{'descr':'<f4','fortran_order':False,'shape':(1.0, 4, 4)}"),
    "npy boolean shape": npy_with("{'descr':'<f4','fortran_order':False,'shape':(True, 4, 4)}"),
    "npy shape of huge numbers": npy_with("{'descr':'<f4','fortran_order':False,'shape':(0x" + "f" * 9000 + ", 4, 4)}"),
    "npy dtype that is a huge number": npy_with(
        "{'descr':0x" + "f" * 9000 + ",'fortran_order':False,'shape':(1, 4, 4)}"
    ),
    "npy nested deeply": npy_with("(" * 4000 + ")" * 4000),
    "a PNG": b"\x89PNG\r\n\x1a\n" + b"\0" * 64,
    "a zip": b"PK\x03\x04" + b"\0" * 64,
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
def test_broken_bodies_are_the_clients_fault_and_cost_no_memory(body: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(GiantleapError) as refused:
        read_latent(body, OCTETS_TYPE)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused.value.status in (400, 415, 422)
    assert peak_bytes < 4 * len(body) + 4_000_000
    assert len(refused.value.detail) < 400


@settings(max_examples=200, deadline=None)
@given(
    body=st.sampled_from([save({"latent": LATENT[:1, :2, :2, :2]}), npy(LATENT[:1, :2, :2, :2])]),
    at=st.integers(0, 159),
    byte=st.integers(0, 255),
)
def test_one_changed_byte_is_read_or_refused_but_never_a_fault(body: bytes, at: int, byte: int) -> None:
    at %= len(body)
    try:
        read = read_latent(body[:at] + bytes([byte]) + body[at + 1 :], OCTETS_TYPE)
    except GiantleapError as refused:
        assert refused.status in (400, 415, 422)
    else:
        assert np.isfinite(read).all() and read.size == 8


def test_a_latent_of_comfyui_is_read_as_comfyui_reads_it() -> None:
    """`LoadLatent` divides by 0.18215 unless the file has the empty tensor that marks raw latents."""
    metadata = {"workflow": "a node " * 100_000, "prompt": '"data_offsets" ' * 100}
    mark = {"latent_format_version_0": np.zeros(0, np.float32)}
    raw = save({"latent_tensor": LATENT} | mark, metadata)
    np.testing.assert_array_equal(read_latent(raw, None), LATENT)
    scaled = save({"latent_tensor": LATENT * np.float32(0.18215)}, metadata)
    np.testing.assert_allclose(read_latent(scaled, None), LATENT, rtol=1e-6)
    half = save({"latent_tensor": (LATENT * np.float32(0.18215)).astype(np.float16)})
    np.testing.assert_allclose(read_latent(half, None), LATENT, rtol=2e-3)


@pytest.mark.parametrize("name", ["latent", "latents", "samples", "latent_tensor"])
def test_a_latent_has_one_of_the_usual_names_among_other_tensors(name: str) -> None:
    tensors_of_file = {"batch_index": LATENT[:1], name: LATENT, "noise_mask": LATENT[:1]}
    mark = {"latent_format_version_0": np.zeros(0, np.float32)}
    np.testing.assert_array_equal(read_latent(save(tensors_of_file | mark), None), LATENT)


def test_a_file_of_many_tensors_is_refused_before_it_is_parsed() -> None:
    body = save({"latent": LATENT} | {f"t{number}": np.zeros(0, np.float32) for number in range(100)})
    with pytest.raises(InvalidRequest, match="more than 64 tensors"):
        read_latent(body, None)
