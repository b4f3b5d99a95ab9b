"""Request bodies as they should be, and what a hostile or broken client makes of them: all drawn from one seed.

`draw_request` gives one request to a route that reads tensors or images; the same seed gives the same request.
"""

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from safetensors.numpy import save

CHANNELS = 16
SAFETENSORS, NPY, OCTETS = "application/x-safetensors", "application/x-npy", "application/octet-stream"
_TYPES = (SAFETENSORS, NPY, OCTETS, "image/png", "image/jpeg", "image/webp", "application/json", "text/plain", "", "//")
_SHAPES = ((CHANNELS, 4, 4), (1, CHANNELS, 4, 6), (3, CHANNELS, 4, 4), (CHANNELS, 6, 4))
_QUERIES: tuple[dict[str, str], ...] = (
    {}, {"output": "latent"}, {"scale": "4"}, {"scaled": "true"}, {"output_format": "webp"}, {"method": "bicubic"},
    {"method": "swinir"}, {"decode": "tiled"}, {"scale": "0"}, {"scale": "1e9"}, {"scale": "-1"}, {"scale": "NaN"},
    {"bundle": "../../etc/passwd"}, {"bundle": "\x00"}, {"width": "64", "height": "99999999999"}, {"output": "latent",
    "output_format": "png"}, {"latent_space": "é" * 40}, {"priority": "urgent"}, {"unknown": "1"}, {"decode": "tiny"},
)  # fmt: skip
_JSON_VALUES = (
    "NaN", "-1", "1e400", "18446744073709551616", "null", "[]", "{}", '"x"', "[1,2]", "true", "9" * 400, "[" * 400,
    "[" * 9000 + "]" * 9000, '"\\ud800"', "[9223372036854775807, 2]", "[0, 0]", "[4294967296, 4294967296]",
    "[1, 16, 65536, 65536]", "[-1, 16, 4]", "[16.0, 4, 4]", '"F8_E4M3"', '"BF16"', '"I64"', '"__import__"',
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sent:
    """One request: `name` says how it was made."""

    name: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


def draw_request(number: int, seed: int = 0) -> Sent:
    """Request `number` of the run with this seed; about one in five is as it should be."""
    dice = random.Random(f"{seed}-{number}")
    maker = dice.choices((_tensor, _picture, _form, _prompt_image, _kserve), (50, 20, 15, 10, 5))[0]
    sent = maker(dice)
    if dice.random() < 0.2:
        sent = replace(sent, query=sent.query | dice.choice(_QUERIES)) if sent.path == "/upscale" else sent
    for _ in range(dice.choices((0, 1, 2, 3), (5, 5, 3, 1))[0]):
        sent = dice.choice((_flip_bits, _cut, _lengthen, _repeat, _splice, _swap_type))(dice, sent)
    return sent


def _values(dice: random.Random) -> np.ndarray:
    shape = dice.choice(_SHAPES)
    values = np.random.default_rng(dice.getrandbits(32)).standard_normal(shape).astype(np.float32)
    if dice.random() < 0.1:
        values.flat[dice.randrange(values.size)] = dice.choice((np.nan, np.inf, -np.inf, 3e38))
    return values


def _cast(values: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(all="ignore"):  # what does not fit is what is wanted
        return values.astype(dtype)


def _tensor(dice: random.Random) -> Sent:
    body, content_type = dice.choice((_safetensors, _npy))(dice)
    headers = {"content-type": dice.choice((content_type, OCTETS))}
    return Sent("tensor", "/upscale", {}, headers, body)


def _safetensors(dice: random.Random) -> tuple[bytes, str]:
    values = _cast(_values(dice), dice.choice(("<f4", "<f4", "<f2", "<f2", "<f8", "|i1")))
    names = dice.choice((("latent",), ("latent",), ("x",), ("latent", "other"), ("a", "b")))
    body = save(dict.fromkeys(names, values))
    return (_edit_header(dice, body) if dice.random() < 0.4 else body), SAFETENSORS


def _edit_header(dice: random.Random, body: bytes) -> bytes:
    """A safetensors file whose header says something else: another value, a key twice, a false length."""
    size_bytes = int.from_bytes(body[:8], "little")
    header, data = body[8 : 8 + size_bytes].decode(), body[8 + size_bytes :]
    fields = json.loads(header)
    tensor = fields[next(iter(fields))]
    key = dice.choice(("dtype", "shape", "data_offsets"))
    old = json.dumps(tensor[key], separators=(",", ":"))
    new = dice.choice(_JSON_VALUES)
    edit: Callable[[], str] = dice.choice(
        (
            lambda: header.replace(old, new, 1),
            lambda: header.replace(f'"{key}":{old}', f'"{key}":{old},"{key}":{new}', 1),
            lambda: header.strip()[:-1] + "," + header.strip()[1:],
            lambda: header.replace('{"', '{"__metadata__":{"a":' + new + '},"', 1),
        )
    )
    changed = edit().encode("utf-8", "replace")
    length = dice.choice((len(changed), len(changed), len(changed) + 8, 2**63, 0, 2**64 - 1))
    return length.to_bytes(8, "little") + changed + data


def _npy(dice: random.Random) -> tuple[bytes, str]:
    values = _cast(_values(dice), dice.choice(("<f4", "<f4", "<f2", "<f2", ">f4", "<f8", "<c8", "|i1")))
    file = io.BytesIO()
    np.save(file, np.asfortranarray(values) if dice.random() < 0.2 else values)
    body = file.getvalue()
    if dice.random() < 0.4:
        old, new = dice.choice(
            (
                (b"'<f4'", b"'|O'"),
                (b"'descr'", b"'shape'"),
                (b"(16,", b"(-16,"),
                (b"(16,", b"(10**99,"),
                (b"(", b"(" * 300),
                (b"False", b"None"),
                (b"{", b"__import__('os').system('true') or {"),
                (b"4)", b"4294967296)"),
                (b"'<f2'", b"[('a','<f4')]"),
                (b"4,", b"9" * 5000 + b","),
            )
        )
        body = body.replace(old, new, 1)
    return body, NPY


def _image_file(dice: random.Random) -> tuple[bytes, str]:
    name = dice.choice(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"))
    mode = dice.choice(("RGB", "RGB", "L", "RGBA", "P", "1")) if name == "PNG" else "RGB"
    file = io.BytesIO()
    Image.effect_noise((dice.randint(1, 48), dice.randint(1, 48)), 64).convert(mode).save(file, name)
    body = file.getvalue()
    if name == "PNG" and dice.random() < 0.3:
        body = _claim_size(body, dice.choice((0, 1, 20_000, 2**31 - 1, 2**32 - 1)), dice.choice((1, 30_000, 2**31)))
    return body, f"image/{name.lower()}"


def _claim_size(png: bytes, width_px: int, height_px: int) -> bytes:
    """A PNG file whose header names another size, its checksum right."""
    header = b"IHDR" + struct.pack(">II", width_px, height_px) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def _picture(dice: random.Random) -> Sent:
    body, content_type = _image_file(dice)
    return Sent("picture", "/upscale", {}, {"content-type": dice.choice((content_type, OCTETS))}, body)


def _form(dice: random.Random) -> Sent:
    """A multipart form; its frame is broken as often as its file."""
    body, content_type = dice.choice((_image_file, _safetensors, _npy))(dice)
    part = (
        b"--edge\r\nContent-Disposition: form-data; name="
        + dice.choice((b'"image"', b'"\xff"', b"", b'"' + b"n" * 9000 + b'"'))
        + dice.choice((b'; filename="a.png"', b"", b'; filename="../../a"', b"; filename*=utf-8''%00"))
        + b"\r\nContent-Type: "
        + content_type.encode()
        + b"\r\n\r\n"
        + body
        + b"\r\n"
    )
    whole = part * dice.choice((1, 1, 1, 0, 2, 40)) + dice.choice((b"--edge--\r\n", b"", b"--edge"))
    kind = dice.choice(("multipart/form-data; boundary=edge",) * 4 + ("multipart/form-data", "multipart/mixed"))
    return Sent("form", "/upscale", {}, {"content-type": kind}, whole)


def _prompt_image(dice: random.Random) -> Sent:
    """A prompt with an image in base64; some fields hold what JSON allows and nobody sends."""
    text = base64.b64encode(_image_file(dice)[0]).decode()
    if dice.random() < 0.4:
        at = dice.randrange(len(text) + 1)
        text = text[:at] + dice.choice(("=", "é", "\\u0000", "%", "data:", "====")) + text[at:]
    fields = {"prompt": '"a red sphere"', "init_image": f'"{text}"', "strength": "0.5", "steps": "4"}
    if dice.random() < 0.5:
        fields[dice.choice((*fields, "seed", "width", "guidance_scale", "num_images"))] = dice.choice(_JSON_VALUES)
    body = "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"
    if dice.random() < 0.2:
        body = body[:-1] + "," + body[1:]
    return Sent("prompt", "/generate", {}, {"content-type": "application/json"}, body.encode("utf-8", "replace"))


def _kserve(dice: random.Random) -> Sent:
    values = _values(dice)
    shape = dice.choice((json.dumps(list(values.shape)), dice.choice(_JSON_VALUES)))
    size = dice.choice((str(values.nbytes), dice.choice(_JSON_VALUES)))
    head = (
        f'{{"inputs":[{{"name":"latent","datatype":"FP32","shape":{shape},"parameters":{{"binary_data_size":{size}}}}}]}}'
    ).encode()
    claimed = dice.choice((len(head), len(head), 0, 10**12, -1))
    headers = {"content-type": OCTETS, "inference-header-content-length": str(claimed)}
    return Sent("kserve", "/v2/models/paper/infer", {}, headers, head + values.tobytes())


def _flip_bits(dice: random.Random, sent: Sent) -> Sent:
    body = bytearray(sent.body)
    # Half of them near the start, where the headers are.
    reach = min(len(body), 200) if dice.random() < 0.5 else len(body)
    for _ in range(dice.randint(1, 16) if reach else 0):
        body[dice.randrange(reach)] ^= 1 << dice.randrange(8)
    return replace(sent, name=f"{sent.name}, bits", body=bytes(body))


def _cut(dice: random.Random, sent: Sent) -> Sent:
    return replace(sent, name=f"{sent.name}, cut", body=sent.body[: dice.randrange(len(sent.body) + 1)])


def _lengthen(dice: random.Random, sent: Sent) -> Sent:
    return replace(sent, name=f"{sent.name}, longer", body=sent.body + dice.randbytes(dice.choice((1, 8, 4096))))


def _repeat(dice: random.Random, sent: Sent) -> Sent:
    return replace(sent, name=f"{sent.name}, twice", body=sent.body * 2)


def _splice(dice: random.Random, sent: Sent) -> Sent:
    at, to = sorted(dice.randrange(len(sent.body) + 1) for _ in range(2))
    return replace(sent, name=f"{sent.name}, spliced", body=sent.body[:at] + sent.body[to:])


def _swap_type(dice: random.Random, sent: Sent) -> Sent:
    return replace(sent, name=f"{sent.name}, type", headers=sent.headers | {"content-type": dice.choice(_TYPES)})
