"""Fetches the ten photographs under CC0 or CC-BY that the pocket networks train on, and cuts crops from them.

The pictures come from Debian's package `lomiri-wallpapers-16.04` and are never stored in the repository. Pictures of
that package under a share-alike license are left out. `Crops` holds square crops in memory-mapped files; the networks
that read them are in `training/pocket/network.py`.
"""

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from giantleap.models.atomic_file import replacing

Pixels = NDArray[np.uint8]

PACKAGE = "lomiri-wallpapers-16.04"
VERSION = "20.04.0-2"
SHA256 = "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab"
SHORT_SIDE_PX = 900  # photographs are shrunk at least to this, which removes sensor noise and JPEG blocks
MIN_SHRINK = 2.0
MAX_ZOOM = 2.2  # a crop shows up to this much more of the picture than its own size
CANDIDATES = 3  # of so many windows the most detailed one becomes a crop


@dataclass(frozen=True)
class Photograph:
    """One picture of the package: its file, its author and its license as the package's copyright file states them."""

    file: str
    author: str
    license: str


PHOTOGRAPHS = (
    Photograph("aitzgorri_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", "CC-BY-4.0"),
    Photograph("friends_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", "CC-BY-4.0"),
    Photograph("picosdeeuropa_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", "CC-BY-4.0"),
    Photograph("Picture_0B_by_freespace.jpg", 'Trevor "Freespace"', "CC-BY-4.0"),
    Photograph("Picture_1A_by_freespace.jpg", 'Trevor "Freespace"', "CC-BY-4.0"),
    Photograph("seeding_by_Clements_Engelhardt.jpg", "Clemens Engelhardt", "CC0-1.0"),
    Photograph("sunset_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", "CC-BY-4.0"),
    Photograph("umang_by_Abhishek_Mudgal.jpg", "Abhishek Mudgal", "CC-BY-4.0"),
    Photograph("Wine_by_Jakkub_Mede.jpg", "Jakub Mede", "CC-BY-4.0"),
)
HELD_OUT = (Photograph("life_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", "CC-BY-4.0"),)


class PhotographsError(RuntimeError):
    """The photographs cannot be fetched; the message says which step failed and what to do."""


def fetch_photographs(folder: Path) -> Path:
    """Downloads and unpacks the package where it is not there yet.

    Args:
        folder: where the package and its files go.

    Returns:
        The directory of the pictures.

    Raises:
        PhotographsError: there is no apt, no network, or the package is not the one of `SHA256`.

    Effects:
        Writes the package and the ten pictures below `folder`; does nothing where all ten are there.
    """
    pictures = folder / "photographs"
    files = [photograph.file for photograph in (*PHOTOGRAPHS, *HELD_OUT)]
    if all((pictures / file).is_file() for file in files):
        return pictures
    package = _download(folder)
    unpacked = folder / "unpacked"
    _run(["dpkg-deb", "-x", package.name, unpacked.name], folder)
    pictures.mkdir(exist_ok=True)
    for file in files:
        shutil.copyfile(unpacked / "usr/share/backgrounds" / file, pictures / file)
    shutil.copyfile(unpacked / f"usr/share/doc/{PACKAGE}/copyright", pictures / "copyright")
    shutil.rmtree(unpacked)
    return pictures


def _download(folder: Path) -> Path:
    """Fetches the Debian package and checks its hash."""
    folder.mkdir(parents=True, exist_ok=True)
    package = folder / f"{PACKAGE}_{VERSION}_all.deb"
    if not package.is_file():
        _run(["apt-get", "download", f"{PACKAGE}={VERSION}"], folder)
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    if digest != SHA256:
        raise PhotographsError(f"{package} has SHA-256 {digest}, expected {SHA256}; delete it and try again")
    return package


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise PhotographsError(f"{command[0]} is not installed; fetch the photographs on a Debian or Ubuntu machine")
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise PhotographsError(
            f"`{' '.join(command)}` failed with status {result.returncode}: {result.stderr.strip()}; "
            f"check the network, or put {PACKAGE}_{VERSION}_all.deb into {folder}"
        )


def read_photograph(path: Path) -> Pixels:
    """Reads a photograph shrunk by at least `MIN_SHRINK`, and at least so far that its short side is 900 px.

    Shape:
        returns [height, width, 3].
    """
    with Image.open(path) as image:
        factor = max(MIN_SHRINK, min(image.size) / SHORT_SIDE_PX)
        size = round(image.width / factor), round(image.height / factor)
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.uint8)


def cut_crop(rng: np.random.Generator, photograph: Pixels, size_px: int) -> Pixels:
    """Cuts one square: the most detailed of some random windows, shrunk to the size.

    Shape:
        returns [size_px, size_px, 3].
    """
    height, width = photograph.shape[:2]
    best, best_detail = photograph[:size_px, :size_px], -1.0
    for _ in range(CANDIDATES):
        side = min(height, width, round(size_px * np.exp(rng.uniform(0.0, np.log(MAX_ZOOM)))))
        top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
        window = photograph[top : top + side, left : left + side]
        gray = window.mean(axis=2)
        detail = float(np.abs(np.diff(gray, axis=0)).mean() + np.abs(np.diff(gray, axis=1)).mean())
        if detail > best_detail:
            best, best_detail = window, detail
    square = Image.fromarray(np.ascontiguousarray(best))
    return np.asarray(square.resize((size_px, size_px), Image.Resampling.LANCZOS), dtype=np.uint8)


def read_crops(
    folder: Path, photographs: tuple[Photograph, ...], count: int, size_px: int, seed: int, name: str
) -> Pixels:
    """Opens a pool of crops, cutting it first where it is not on disk; each picture gives crops by its area.

    Effects:
        Writes `<name>_<seed>_<size>_<count>.npy` into the folder, once.

    Shape:
        returns [count, size_px, size_px, 3], memory-mapped.
    """
    path = folder / f"{name}_{seed}_{size_px}_{count}.npy"
    if not path.is_file():
        pictures = fetch_photographs(folder)
        images = [read_photograph(pictures / photograph.file) for photograph in photographs]
        areas = np.array([image.shape[0] * image.shape[1] for image in images], dtype=np.float64)
        rng = np.random.default_rng((seed, size_px))
        crops = np.empty((count, size_px, size_px, 3), dtype=np.uint8)
        for index in tqdm(range(count), desc=f"crops of {name}", unit="img"):
            crops[index] = cut_crop(rng, images[rng.choice(len(images), p=areas / areas.sum())], size_px)
        with replacing(path) as file:
            np.save(file, crops, allow_pickle=False)
    pool: Pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    return pool
