"""An imperceptible mark in the pixels: the number of a service, found again after JPEG, resizing and cropping.

Spread spectrum: a faint pattern of middle frequencies, the same in each tile of 128 px, is added to the brightness, and
more of it where the image is busy. The phases of some frequencies are known; they tell where the tiles lie. Each bit of
the number and of its checksum turns the phases of a group of others. The pattern is public: who knows this file can
remove or forge the mark.

Ref: Cox, Kilian, Leighton, Shamoon, 10.1109/83.650120; phase correlation: Kuglin, Hines 1975.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

MAX_NUMBER: Final = (1 << 16) - 1
THRESHOLD: Final = 6.5
"""Standard deviations of chance that a mark must exceed; `python -m benchmarks.watermark` measures false alarms."""
_TILE = 128
_BAND = (4, 20)  # cycles per tile: above what JPEG spends bits on, below what half the size loses
_SYNC_SHARE = 0.4
_BITS = 24  # 16 of the number, 8 of the checksum
_WEAKEST, _PER_CONTRAST, _STRONGEST = 1.2, 0.1, 3.0  # levels of 255, as standard deviations
_STRIP = 4 * _TILE  # rows at once, which bounds the memory
_CLIP = 4.0  # levels: an edge counts no more than the mark may
_WINDOW_PX = 512
_LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True, slots=True)
class Watermark:
    """A mark that was found: its number, and how far above chance, in standard deviations."""

    number: int
    score: float


class _Layout(NamedTuple):
    """The frequencies of the band: where in a tile's spectrum, their phases, and their bit (-1: known to all)."""

    rows: npt.NDArray[np.intp]
    columns: npt.NDArray[np.intp]
    phases: npt.NDArray[np.complex128]
    groups: npt.NDArray[np.intp]


def add_watermark(image: Pixels, number: int) -> Pixels:
    """The image with a mark.

    Args:
        image: [height_px, width_px, 3].
        number: 0 to `MAX_NUMBER`.
    """
    height, width = image.shape[:2]
    marked, halo = np.empty_like(image), 5
    pattern = np.tile(_pattern(number), (_STRIP // _TILE, -(-width // _TILE)))[:, :width]
    for top in range(0, height, _STRIP):
        first, last = max(0, top - halo), min(height, top + _STRIP + halo)
        luma = image[first:last] @ _LUMA
        mean = _box_mean(luma, 4)
        contrast = np.sqrt(np.maximum(_box_mean(luma * luma, 4) - mean * mean, 0))
        strength = np.minimum(_WEAKEST + _PER_CONTRAST * contrast, _STRONGEST)[top - first :][:_STRIP]
        rows = image[top : top + _STRIP]
        marked[top : top + _STRIP] = np.clip(np.rint(rows + (strength * pattern[: len(rows)])[..., None]), 0, 255)
    return marked


def find_watermark(image: Image.Image) -> Watermark | None:
    """The mark of an image, also of one that was resized from a size that a service makes, or cropped."""
    score, number = max(_scores(image), key=lambda found: found[0])
    return None if number is None or score < THRESHOLD else Watermark(number, round(score, 1))


def strongest_match(image: Image.Image) -> float:
    """The highest score that an image reaches, whether or not it is a mark."""
    return max(score for score, _ in _scores(image))


def _scores(image: Image.Image) -> Iterator[tuple[float, int | None]]:
    """Score and number at each size that the image may have had; ends at the first that is certain."""
    luma = image.convert("L").convert("F")
    width, height = luma.size
    longest = max(width, height)
    sides = [longest, *range(32, 1024, 32), *range(1024, 4097, 64)]
    for side in dict.fromkeys(side for side in sides if longest <= 2 * side and side <= 2.5 * longest):
        scale = side / longest
        cut_width, cut_height = min(width, int(_WINDOW_PX / scale)), min(height, int(_WINDOW_PX / scale))
        left, top = (width - cut_width) // 2, (height - cut_height) // 2
        size = (round(cut_width * scale), round(cut_height * scale))
        box = (left, top, left + cut_width, top + cut_height)
        found = _read(np.asarray(luma.resize(size, Image.Resampling.BICUBIC, box=box), np.float64))
        yield found
        if found[0] >= THRESHOLD and found[1] is not None:
            return


def _read(luma: Floats) -> tuple[float, int | None]:
    """How far above chance the known phases match at their best place, and the number if its checksum is right."""
    layout, spectrum = _layout(), np.fft.fft2(_fold(luma))
    seen = spectrum[layout.rows, layout.columns]
    agreement = seen / np.maximum(np.abs(seen), 1e-9) * layout.phases.conj()
    known = layout.groups < 0
    matched = np.zeros((_TILE, _TILE), np.complex128)
    matched[layout.rows[known], layout.columns[known]] = agreement[known]
    places = np.fft.ifft2(matched).real * _TILE**2
    down, across = divmod(int(places.argmax()), _TILE)
    score = float(places[down, across] / np.sqrt(known.sum() / 2))
    turned = agreement * np.exp(2j * np.pi * (layout.rows * down + layout.columns * across) / _TILE)
    sums = np.bincount(layout.groups[~known], turned.real[~known], _BITS)
    word = sum(1 << bit for bit in range(_BITS) if sums[bit] < 0)
    return score, word >> 8 if _to_word(word >> 8) == word else None


def _fold(luma: Floats) -> Floats:
    """The sum of all tiles of the image minus its local mean, edges clipped."""
    detail = np.clip(luma - _box_mean(luma, 8), -_CLIP, _CLIP)
    padded = np.pad(detail, [(0, -side % _TILE) for side in detail.shape])
    folded: Floats = padded.reshape(len(padded) // _TILE, _TILE, -1, _TILE).sum((0, 2))
    return folded


def _box_mean(values: Floats, radius: int) -> Floats:
    side = 2 * radius + 1
    sums = np.pad(values, ((radius + 1, radius), (radius + 1, radius)), mode="edge").cumsum(0).cumsum(1)
    mean: Floats = (sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]) / side**2
    return mean


@cache
def _layout() -> _Layout:
    cycles = np.fft.fftfreq(_TILE, 1 / _TILE)
    down, across = np.meshgrid(cycles, cycles, indexing="ij")
    radius = np.hypot(down, across)
    half = (down > 0) | ((down == 0) & (across > 0))  # the other half mirrors it
    rows, columns = np.nonzero(half & (radius >= _BAND[0]) & (radius < _BAND[1]))
    count = len(rows)
    drawn = np.frombuffer(hashlib.shake_256(b"giantleap watermark 1").digest(8 * count), "<u4").reshape(2, count)
    known = int(_SYNC_SHARE * count)
    groups = np.empty(count, np.intp)
    groups[np.argsort(drawn[1], kind="stable")] = [-1] * known + [index % _BITS for index in range(count - known)]
    return _Layout(rows, columns, np.exp(2j * np.pi * drawn[0] / 2**32), groups)


@cache
def _pattern(number: int) -> Floats:
    """One tile, of mean 0 and standard deviation 1."""
    layout, word = _layout(), _to_word(number)
    signs = np.array([1 - 2 * (word >> bit & 1) for bit in range(_BITS)] + [1])  # the last is that of group -1
    spectrum = np.zeros((_TILE, _TILE), np.complex128)
    spectrum[layout.rows, layout.columns] = layout.phases * signs[layout.groups]
    tile = np.fft.ifft2(spectrum).real
    pattern: Floats = tile / tile.std()
    return pattern


def _to_word(number: int) -> int:
    """The number and a checksum of 8 bits (CRC-8, polynomial 0x07)."""
    remainder = number << 8
    for bit in range(23, 7, -1):
        if remainder >> bit & 1:
            remainder ^= 0x107 << (bit - 8)
    return number << 8 | remainder
