"""Hostile bodies: deep or wide JSON, forms of many parts, bombs, and paths and addresses where an image belongs."""

import base64
import io
import json
import struct
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from giantleap.service.errors import GiantleapError
from giantleap.service.jobs import images as images_in
from giantleap.service.jobs.latents import read_latent
from tests.service.compat_fakes import FileProducer, build_app

PROMPT = "a red sphere on a green floor"
JSON = {"Content-Type": "application/json"}
SAFETENSORS = "application/x-safetensors"
ADDRESSES = (
    "file:///etc/passwd",
    "/etc/passwd",
    "etc/passwd00",  # base64 of something, by its letters
    "../../../../etc/passwd",
    "http://169.254.169.254/latest/meta-data/",
    "https://127.0.0.1:6379/",
    "ftp://127.0.0.1/x",
    "data:text/plain,hello",
    "data:image/png;base64,file:///etc/passwd",
    "\\\\host\\share\\x.png",
    "s3://bucket/key",
)


@pytest.fixture
def producer() -> FileProducer:
    return FileProducer()


@pytest.fixture
async def client(producer: FileProducer, bundle_dirs: tuple[Path, ...]) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(producer, bundle_dirs)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        yield client


def nested(depth: int, opening: str, closing: str) -> bytes:
    return (opening * depth + "1" + closing * depth).encode()


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations", "/v2/models/paper/infer"])
@pytest.mark.parametrize(
    "body",
    [
        nested(100_000, "[", "]"),
        nested(100_000, '{"a":', "}"),
        b'{"prompt":' + nested(50_000, "[", "]") + b"}",
        b'{"prompt":"x","seed":' + b"9" * 100_000 + b"}",
        b'{"prompt":"x","guidance_scale":1e' + b"9" * 10_000 + b"}",
        b'{"prompt":"x",' + b",".join(b'"k%d":0' % number for number in range(50_000)) + b"}",
        b'{"prompt":"\\ud800"}',
        b'{"prompt":"x\\u0000"}' * 2,
        b"[" * 900_000,
    ],
    ids=lambda body: f"{body[:12]!r} {len(body)}",
)
async def test_deep_and_wide_json_is_refused(
    path: str, body: bytes, client: httpx.AsyncClient, producer: FileProducer
) -> None:
    response = await client.post(path, content=body, headers=JSON)
    assert response.status_code in (400, 413, 422), response.text[:200]
    assert len(response.content) < 8 << 10
    assert not producer.records


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations", "/v2/models/paper/infer"])
async def test_json_of_too_many_parts_is_not_parsed(path: str, client: httpx.AsyncClient) -> None:
    body = json.dumps({f"k{number}": 0 for number in range(20_000)}).encode()
    response = await client.post(path, content=body, headers=JSON)
    assert response.status_code == 413, response.text


async def test_a_large_image_as_base64_is_no_hostile_json(client: httpx.AsyncClient, producer: FileProducer) -> None:
    image = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 480, 3), np.uint8)).save(image, "png")
    text = base64.b64encode(image.getvalue()).decode()
    prompt = "a, b, [c], " * 18
    response = await client.post("/generate", json={"prompt": prompt, "init_image": text})
    assert response.status_code == 200 and len(text) > 900_000


async def test_the_first_32_wrong_fields_are_reported(client: httpx.AsyncClient) -> None:
    response = await client.post("/generate", json={"prompt": PROMPT} | {f"k{number}": 0 for number in range(1000)})
    assert response.status_code == 422
    assert len(response.json()["errors"]) == 32 and response.json()["detail"].endswith("and 968 more")


async def test_an_address_that_is_too_long_is_refused(client: httpx.AsyncClient) -> None:
    for path in ("/upscale?" + "scale=2&" * 5000, "/jobs/" + "x" * 40_000):
        assert (await client.post(path)).status_code == 431


def form(parts: list[tuple[str, bytes]], boundary: bytes = b"xx") -> dict[str, Any]:
    body = b"".join(b"--%s\r\n%s\r\n\r\n%s\r\n" % (boundary, head.encode(), data) for head, data in parts)
    content_type = f"multipart/form-data; boundary={boundary.decode()}"
    return {"content": body + b"--%s--\r\n" % boundary, "headers": {"Content-Type": content_type}}


def file_part(number: int = 0, more: str = "") -> str:
    return f'Content-Disposition: form-data; name="f{number}"; filename="f{number}"{more}'


@pytest.mark.parametrize(
    "sent",
    [
        form([(file_part(number), b"x") for number in range(2)]),
        form([(file_part(number), b"x") for number in range(10_000)]),
        form([(f'Content-Disposition: form-data; name="v{number}"', b"x") for number in range(10_000)]),
        form([(file_part(more="; x=" + "y" * 500_000), b"x")]),
        form([(file_part() + "\r\nX-A: b" * 50_000, b"x")]),
        form([(file_part(), b"x")]) | {"headers": {"Content-Type": "multipart/form-data"}},
        form([(file_part(), b"x")]) | {"headers": {"Content-Type": "multipart/form-data; boundary=" + "y" * 10_000}},
        form([]),
    ],
    ids=["two files", "many files", "many fields", "long head", "many heads", "no boundary", "long boundary", "none"],
)
async def test_a_form_is_one_file_with_a_plain_head(
    sent: dict[str, Any], client: httpx.AsyncClient, producer: FileProducer
) -> None:
    response = await client.post("/upscale", **sent)
    assert response.status_code in (400, 415), response.text
    assert not producer.records


@pytest.mark.parametrize("text", ADDRESSES)
async def test_an_address_where_an_image_belongs_is_refused_and_not_opened(
    text: str, client: httpx.AsyncClient, producer: FileProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"opened {args[:1]}")

    monkeypatch.setattr("builtins.open", opened)
    monkeypatch.setattr("socket.socket.connect", opened)
    response = await client.post("/generate", json={"prompt": PROMPT, "init_image": text})
    monkeypatch.undo()
    assert response.status_code == 422, response.text
    assert [error["field"] for error in response.json()["errors"]] == ["init_image"]
    assert text not in response.text and not producer.records


@pytest.mark.parametrize("text", ADDRESSES)
async def test_an_address_is_no_bundle_and_no_body(
    text: str, client: httpx.AsyncClient, producer: FileProducer
) -> None:
    assert (await client.post("/generate", json={"prompt": PROMPT, "bundle": text})).status_code == 422
    assert (await client.post("/upscale", params={"bundle": text}, content=b"x" * 100)).status_code in (415, 422)
    assert (await client.post("/upscale", content=text.encode())).status_code in (400, 415)
    assert (await client.post("/v1/images/generations", json={"prompt": PROMPT, "model": text})).status_code == 422
    assert not producer.records


def zipped_png(width_px: int, height_px: int, data: bytes) -> bytes:
    """A PNG file that declares a size of its own."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def with_text(text: bytes) -> bytes:
    """A PNG file of one pixel with a compressed text beside it."""
    whole = zipped_png(1, 1, b"\0\xff\xff\xff")
    content = b"k\0\0" + zlib.compress(text)
    extra = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    return whole[:33] + extra + whole[33:]


@pytest.mark.parametrize(
    ("file", "status"),
    [
        (zipped_png(65_535, 65_535, bytes(1 << 20)), 413),
        (zipped_png(2**31 - 1, 2**31 - 1, b""), 413),
        (zipped_png(513, 512, b""), 413),
        (zipped_png(0, 0, b""), 400),
        (zipped_png(512, 512, b""), 400),
    ],
    ids=["4 Gpx", "2^62 px", "one row too many", "no pixel", "cut off"],
)
async def test_an_image_bomb_is_refused_before_it_is_unpacked(
    file: bytes, status: int, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(file) < 200_000
    if status == 413:  # the header alone decides
        monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("pixels were read"))
        monkeypatch.setattr(images_in, "to_rgb", lambda image: pytest.fail("pixels were read"))
    response = await client.post("/upscale", content=file, headers={"Content-Type": "image/png"})
    assert response.status_code == status, response.text
    text = base64.b64encode(file).decode()
    assert (await client.post("/generate", json={"prompt": PROMPT, "init_image": text})).status_code == 422


async def test_a_text_bomb_beside_the_pixels_is_not_unpacked(client: httpx.AsyncClient) -> None:
    file = with_text(bytes(100 << 20))
    tracemalloc.start()
    try:
        response = await client.post("/upscale", content=file, headers={"Content-Type": "image/png"})
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert response.status_code == 200, response.text
    assert peak_bytes < 50 << 20


def tensors(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[int], end: int, dtype: str = "F32", begin: int = 0) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def npy(header: bytes, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


BOMBS = {
    "header of 2^63 bytes": tensors({}, length=2**63),
    "header longer than the body": tensors({}, length=1000),
    "header of 1 MB": tensors(b'{"' + b"a" * 1_000_000 + b'":0}'),
    "2^60 elements": tensors({"latent": tensor([2**20, 2**20, 2**20], 4)}, bytes(4)),
    "a product that overflows": tensors({"latent": tensor([2**32, 2**32], 0)}),
    "negative side": tensors({"latent": tensor([-1, -4], 16)}, bytes(16)),
    "data beyond the body": tensors({"latent": tensor([1, 1, 4, 4], 64)}, bytes(8)),
    "data nobody names": tensors({"latent": tensor([1, 2], 8)}, bytes(800)),
    "overlapping tensors": tensors({"a": tensor([2], 8), "latent": tensor([2], 8)}, bytes(8)),
    "hundreds of tensors": tensors({f"t{n}": tensor([0], 0) for n in range(200)}),
    "deep header": tensors(b'{"a":' + b"[" * 8000 + b"]" * 8000 + b"}"),
    "npy of 2^62 elements": npy(b"{'descr':'<f4','fortran_order':False,'shape':(%d,%d)}" % (2**31, 2**31)),
    "npy of objects": npy(b"{'descr':'|O','fortran_order':False,'shape':(1,1)}", b"cos\nsystem\n(S'id'\ntR."),
    "npy with code": npy(b"__import__('os').system('id')"),
    "npy of minus signs": npy(b"-" * 16_000 + b"1"),
    "npy of brackets": npy(b"(" * 16_000),
    "npy of lists": npy(b"[" * 90 + b"]" * 90),
    "npy with a long number": npy(b"{'descr':'<f4','fortran_order':False,'shape':(" + b"9" * 15_000 + b",)}"),
    "npy of many sides": npy(b"{'descr':'<f4','fortran_order':False,'shape':(" + b"1," * 5000 + b")}", bytes(4)),
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
    "zip of torch.save": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("name", BOMBS)
async def test_a_tensor_bomb_is_refused(name: str, client: httpx.AsyncClient, producer: FileProducer) -> None:
    for content_type in (SAFETENSORS, "application/x-npy", "application/octet-stream"):
        headers = {"Content-Type": content_type}
        response = await client.post("/upscale", content=BOMBS[name], headers=headers)
        assert response.status_code in (400, 415, 422), response.text
    assert not producer.records


@pytest.mark.parametrize("name", BOMBS)
def test_a_tensor_bomb_takes_little_memory(name: str) -> None:
    import tracemalloc

    tracemalloc.start()
    try:
        with pytest.raises(GiantleapError):
            read_latent(BOMBS[name], "application/octet-stream")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/generate", "text/plain"),
        ("/generate", "application/x-www-form-urlencoded"),
        ("/generate", "application/jsonp"),
        ("/generate", None),
        ("/v1/images/generations", "text/plain"),
        ("/v2/models/paper/infer", "text/plain"),
        ("/upscale", "text/plain"),
        ("/upscale", "application/json"),
        ("/upscale", "application/x-www-form-urlencoded"),
        ("/upscale", "application/python-pickle"),
        ("/upscale", "image/svg+xml"),
        ("/upscale", "image/tiff"),
        ("/remote_vae/paper/decode?shape=1&dtype=float32", "text/plain"),
        ("/remote_vae/paper/encode", "text/plain"),
    ],
)
async def test_another_type_than_those_that_are_read_is_415(
    path: str, content_type: str | None, client: httpx.AsyncClient
) -> None:
    png = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(png, "png")
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = await client.post(path, content=png.getvalue(), headers=headers)
    assert response.status_code == 415, response.text
