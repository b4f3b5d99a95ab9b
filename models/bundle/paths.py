"""Checks that the files which a descriptor names are there, inside the bundle or the Hugging Face cache, and fit it."""

import json
import os
from pathlib import Path
from typing import Any

from giantleap.models.bundle.descriptor import Descriptor
from giantleap.models.bundle.errors import BundleError
from giantleap.models.latent_space import LatentSpace
from giantleap.models.safetensors_header import LFS_ADVICE, is_lfs_pointer

DESCRIPTOR = "bundle.toml"
LOCK = "pull.json"


def find_descriptor(directory: Path) -> Path:
    """The descriptor of a bundle.

    Raises:
        BundleError: The directory has none.
    """
    path = directory / DESCRIPTOR
    if path.is_file():
        return path
    if (directory / LOCK).is_file():
        raise BundleError(
            f"{directory} is an unfinished download: resume it with the same `giantleap bundle pull` as before, "
            f"with --to {directory} unless it is the default place"
        )
    raise BundleError(f"{directory} is no bundle: {DESCRIPTOR} is missing")


def check_paths(directory: Path, descriptor: Descriptor) -> None:
    """Check every path of a descriptor.

    Raises:
        BundleError: A file is missing, outside the bundle, or what Git LFS leaves in its place.
    """
    if descriptor.pipeline.path is not None:
        path = inside(directory, descriptor.pipeline.path, "pipeline.path") / "model_index.json"
        _need_file(path, "pipeline")
        _need_json(path)
    for key, source in (("vae", descriptor.vae), ("tiny_vae", descriptor.tiny_vae)):
        if source is not None and source.path is not None:
            _need_file(inside(directory, source.path, f"{key}.path") / "config.json", "VAE")
    names = [(name, "files") for name in descriptor.files]
    if descriptor.lua is not None:
        names.insert(0, (descriptor.lua.file, "lua.file"))
    for name, key in names:
        file = inside(directory, name, key)
        if not file.is_file():
            raise BundleError(f"bundle {descriptor.bundle.name}: {key}: {name} is missing in {directory}")
        if is_lfs_pointer(file):
            raise BundleError(f"bundle {descriptor.bundle.name}: {name} {LFS_ADVICE}")


def check_vae(directory: Path, space: LatentSpace) -> None:
    """Compare the factors of a local VAE with those of the descriptor; wrong ones would spoil every image.

    A VAE on the hub is checked when it is loaded.

    Raises:
        BundleError: A factor differs, or there is no configuration.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise BundleError(f"{path} is missing; a bundle decodes with the VAE of its pipeline, or with that of [vae]")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path}: not valid JSON: {error}") from error
    expected: dict[str, Any] = {
        "latent_channels": space.channels,
        "scaling_factor": space.scale,
        "shift_factor": space.shift,
    }
    if not space.statistics_in_vae:
        expected |= {"latents_mean": space.mean, "latents_std": space.std}
    for key, value in expected.items():
        actual = config.get(key, value)
        actual = tuple(actual) if isinstance(actual, list) else actual
        if (actual or 0) != (value or 0):  # a VAE without a shift stores null
            raise BundleError(f"{path}: {key} is {actual or 0}; latent space {space.name} of {DESCRIPTOR} has {value}")


def inside(directory: Path, name: str, key: str) -> Path:
    """The path of a name in a descriptor: within the bundle, and no link to elsewhere but the Hugging Face cache.

    Raises:
        BundleError: It leads elsewhere.
    """
    path = directory / name
    is_below = Path(os.path.normpath(path)).is_relative_to(os.path.normpath(directory))
    if is_below and any(path.resolve().is_relative_to(root.resolve()) for root in (directory, hub_cache())):
        return path
    raise BundleError(
        f"{directory / DESCRIPTOR}: {key}: {name!r} leaves the bundle directory; copy it there, or link it into the "
        f"Hugging Face cache at {hub_cache()}"
    )


def hub_cache() -> Path:
    """Where the Hugging Face libraries keep downloads: their variables, else their default."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    home = os.environ.get("HF_HOME") or user / "huggingface"
    chosen = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    return Path(chosen).expanduser()


def _need_file(path: Path, what: str) -> None:
    if not path.is_file():
        raise BundleError(f"{path.parent} is no {what} directory: {path.name} is missing")


def _need_json(path: Path) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path}: found a {type(content).__name__}, expected an object that names the parts")
