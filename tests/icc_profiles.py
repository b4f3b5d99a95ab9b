"""Color profiles built from their numbers, in the layout of ICC.1:2001-04, and what a color of them is in sRGB."""

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]

# Columns are the XYZ of red, green and blue, adapted to D50.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])


def srgb_to_linear(values: Floats) -> Floats:
    """IEC 61966-2-1, from [0, 1] to [0, 1]."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(values: Floats) -> Floats:
    """The inverse of `srgb_to_linear`."""
    inside = np.clip(values, 0.0, 1.0)
    return np.where(inside <= 0.0031308, 12.92 * inside, 1.055 * inside ** (1 / 2.4) - 0.055)


def shown_in_srgb(color: Sequence[int], matrix: Floats, to_linear: Callable[[Floats], Floats]) -> list[int]:
    """A color of 8 bits as sRGB, clipped to its gamut."""
    xyz = matrix @ to_linear(np.array(color) / 255.0)
    values: list[int] = np.rint(255.0 * linear_to_srgb(np.linalg.solve(SRGB, xyz))).astype(int).tolist()
    return values


def rgb_profile(matrix: Floats, to_linear: Callable[[Floats], Floats]) -> bytes:
    """The profile of a display: a curve, then a matrix."""
    columns = {name + b"XYZ": _xyz(matrix[:, index]) for index, name in enumerate((b"r", b"g", b"b"))}
    curves = {name + b"TRC": _curve(to_linear) for name in (b"r", b"g", b"b")}
    return _profile(b"mntr", b"RGB ", b"XYZ ", columns | curves)


def gray_profile(to_linear: Callable[[Floats], Floats]) -> bytes:
    """The profile of a gray display: a curve."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _curve(to_linear)})


def cmyk_profile(lightness: Callable[[tuple[int, ...]], float]) -> bytes:
    """The profile of a printer with gray inks: a table from the 16 corners of ink to a lightness of 0 to 100."""
    corners = [tuple(number >> shift & 1 for shift in (3, 2, 1, 0)) for number in range(16)]
    table = b"".join(bytes((round(2.55 * lightness(corner)), 128, 128)) for corner in corners)
    same = bytes(range(256))
    head = b"mft1" + bytes(4) + bytes((4, 3, 2, 0))
    matrix = struct.pack(">9i", *(65536 * int(index % 4 == 0) for index in range(9)))
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": head + matrix + 4 * same + table + 3 * same})


def _xyz(values: Floats) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * value) for value in values))


def _curve(to_linear: Callable[[Floats], Floats]) -> bytes:
    values = np.rint(65535 * to_linear(np.linspace(0, 1, 1024))).astype(">u2")
    return b"curv" + bytes(4) + struct.pack(">I", len(values)) + values.tobytes()


def _profile(kind: bytes, space: bytes, connection: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    tags = {b"wtpt": _xyz(np.array([0.9642, 1.0, 0.8249])), **tags}
    place, table, data = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">2I", place + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(">I4xI", place + len(data), 0x02400000) + kind + space + connection
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + data
