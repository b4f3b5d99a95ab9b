"""What is served: a directory with `bundle.toml`, which names a pipeline, its latent space and the LUA weights.

`read_bundle` checks all that can be checked without loading weights, so that the API process can call it too: it
imports no torch. `check_files` compares the weights with their digests. The form of the file is in
`models/bundle_descriptor.py`; `models/route.py` loads what is named here.
"""

import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from models.bundle_descriptor import About, Defaults, Descriptor, Limits, nearest_sides, to_toml
from models.latent_space import LatentSpace
from models.lua_spec import SPEC_KEY, LuaSpec

__all__ = [
    "Bundle",
    "BundleError",
    "Descriptor",
    "SizeError",
    "check_files",
    "file_hashes",
    "read_bundle",
    "write_bundle",
]

DESCRIPTOR = "bundle.toml"
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".onnx")


class BundleError(ValueError):
    """A bundle that cannot be served as it is."""


class SizeError(BundleError):
    """A size or scale that a bundle does not reach; the message names what it does."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle as read from its directory.

    Args:
        directory: Where `bundle.toml` lies.
        descriptor: Its content, checked.
    """

    directory: Path
    descriptor: Descriptor

    @property
    def name(self) -> str:
        return self.descriptor.bundle.name

    @property
    def about(self) -> About:
        """Name, title, licence and provenance."""
        return self.descriptor.bundle

    @property
    def pipeline(self) -> Path | str:
        """What `DiffusionPipeline.from_pretrained` takes: a directory, or a hub id (then with `revision`)."""
        source = self.descriptor.pipeline
        return self.directory / source.path if source.path is not None else str(source.hub_id)

    @property
    def revision(self) -> str | None:
        """The revision of a hub id."""
        return self.descriptor.pipeline.revision

    @property
    def latent_space(self) -> LatentSpace:
        return self.descriptor.latent_space.to_latent_space()

    @property
    def lua(self) -> Path:
        """The LUA weights, for `read_lua`."""
        return self.directory / self.descriptor.lua.file

    @property
    def scales(self) -> tuple[int, ...]:
        """Every enlargement on offer: 1, which leaves LUA out, and the scale heads."""
        return (1, *sorted(self.descriptor.lua.scales))

    @property
    def defaults(self) -> Defaults:
        return self.descriptor.defaults

    @property
    def limits(self) -> Limits:
        return self.descriptor.limits

    @property
    def closed_vocabulary(self) -> bool:
        """Whether words beyond the tokenizer's own mean nothing to the model."""
        return self.descriptor.vocabulary.closed

    def base_size(self, width_px: int, height_px: int, scale: int) -> tuple[int, int]:
        """Width and height of the base image whose enlargement has exactly the given size.

        Raises:
            SizeError: No base image gives this size; the message names the nearest that can be reached.
        """
        if scale not in self.scales:
            raise SizeError(f"scale {scale}: bundle {self.name} has {', '.join(map(str, self.scales))}")
        limits = self.limits
        (less_width, more_width), (less_height, more_height) = (
            nearest_sides(side / scale, limits) for side in (width_px, height_px)
        )
        if (less_width * scale, less_height * scale) == (width_px, height_px):
            return less_width, less_height
        less = f"{less_width * scale}x{less_height * scale}"
        more = f"{more_width * scale}x{more_height * scale}"
        nearest = less if less == more else f"{less} and {more}"
        least, most = nearest_sides(0, limits)[0] * scale, nearest_sides(limits.max_base_px, limits)[0] * scale
        raise SizeError(
            f"{width_px}x{height_px} px at scale {scale}: bundle {self.name} reaches sides from {least} to {most} px "
            f"in steps of {limits.multiple_px * scale}; nearest: {nearest}"
        )

    def check_lua(self, spec: LuaSpec) -> None:
        """Refuses weights of other channels or heads than the descriptor says.

        Raises:
            BundleError: They differ.
        """
        space, scales = self.latent_space, self.scales[1:]
        if spec.scales != scales:
            raise BundleError(f"{self.lua}: found heads for scales {spec.scales}; {DESCRIPTOR} says {scales}")
        if spec.channels != space.channels:
            raise BundleError(
                f"{self.lua}: found {spec.channels} channels; latent space {space.name} has {space.channels}"
            )


def read_bundle(directory: Path) -> Bundle:
    """Reads and checks a bundle, without loading or hashing weights.

    Raises:
        BundleError: The descriptor is missing, not TOML, or has a wrong or unknown key; a path is missing or leaves the
            bundle; LUA or VAE do not fit what the descriptor says.
    """
    path = directory / DESCRIPTOR
    if not path.is_file():
        raise BundleError(f"{directory} is no bundle: {DESCRIPTOR} is missing")
    try:
        descriptor = Descriptor.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: not valid TOML: {error}") from error
    except ValidationError as error:
        raise BundleError(f"{path}: {_explain(error)}") from error
    bundle = Bundle(directory, descriptor)
    _check_paths(bundle)
    _check_lua_header(bundle)
    _check_vae(bundle)
    return bundle


def write_bundle(directory: Path, descriptor: Descriptor) -> None:
    """Writes `bundle.toml` of a directory that holds the rest already.

    **Effects** replaces the file that was there.
    """
    (directory / DESCRIPTOR).write_text(to_toml(descriptor), encoding="utf-8")


def file_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every weight file below a directory, by its path there: the content of `[files]`."""
    return {path.relative_to(directory).as_posix(): _sha256(path) for path in _weight_files(directory)}


def check_files(bundle: Bundle) -> None:
    """Reads every weight file and compares it with its digest.

    Raises:
        BundleError: A file is missing, differs, or is not listed.
    """
    listed = {bundle.descriptor.lua.file: bundle.descriptor.lua.sha256, **bundle.descriptor.files}
    present = {path.relative_to(bundle.directory).as_posix() for path in _weight_files(bundle.directory)}
    if present - set(listed):
        raise BundleError(
            f"bundle {bundle.name}: {min(present - set(listed))} is not listed in [files] of {DESCRIPTOR}"
        )
    for name, expected in listed.items():
        found = _sha256(_inside(bundle.directory, name, "files"))
        if found != expected:
            raise BundleError(f"bundle {bundle.name}: {name} has sha256 {found}; {DESCRIPTOR} says {expected}")


def _check_paths(bundle: Bundle) -> None:
    source = bundle.descriptor.pipeline.path
    if source is not None and not (_inside(bundle.directory, source, "pipeline.path") / "model_index.json").is_file():
        raise BundleError(f"{bundle.pipeline} is no pipeline directory: model_index.json is missing")
    for name, key in ((bundle.descriptor.lua.file, "lua.file"), *((name, "files") for name in bundle.descriptor.files)):
        if not _inside(bundle.directory, name, key).is_file():
            raise BundleError(f"bundle {bundle.name}: {key}: {name} is missing in {bundle.directory}")


def _inside(directory: Path, name: str, key: str) -> Path:
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise BundleError(f"{directory / DESCRIPTOR}: {key}: {name!r} leaves the bundle directory")
    return path


def _check_lua_header(bundle: Bundle) -> None:
    """For files in our own format; the others tell only when they are read (`Bundle.check_lua`)."""
    if bundle.lua.suffix != ".safetensors":
        return
    try:
        with safe_open(bundle.lua, framework="numpy") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise BundleError(f"{bundle.lua}: damaged or no safetensors file: {error}") from error
    if SPEC_KEY in header:
        try:
            spec = LuaSpec.from_json(header[SPEC_KEY])
        except ValueError as error:
            raise BundleError(f"{bundle.lua}: header {SPEC_KEY}: {error}") from error
        bundle.check_lua(spec)


def _check_vae(bundle: Bundle) -> None:
    """A pipeline directory states its factors itself; other ones in the descriptor would spoil every image."""
    if isinstance(bundle.pipeline, str):
        return
    path = bundle.pipeline / "vae" / "config.json"
    if not path.is_file():
        raise BundleError(f"{path} is missing; a bundle decodes with the VAE of its pipeline")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path}: not valid JSON: {error}") from error
    space = bundle.latent_space
    said = {"latent_channels": space.channels, "scaling_factor": space.scale, "shift_factor": space.shift}
    for key, value in said.items():
        found = config.get(key, value) or 0  # a VAE without a shift stores null
        if found != value:
            raise BundleError(f"{path}: {key} is {found}; latent space {space.name} of {DESCRIPTOR} has {value}")


def _weight_files(directory: Path) -> list[Path]:
    """Files with the suffix of weights, without hidden ones, which are not finished yet."""
    found = (path for path in directory.rglob("*") if path.suffix in WEIGHT_SUFFIXES and path.is_file())
    return sorted(path for path in found if not path.name.startswith("."))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _explain(error: ValidationError) -> str:
    def line(fault: Any) -> str:
        place = ".".join(map(str, fault["loc"]))
        found = "" if isinstance(fault["input"], dict) else f"; found {fault['input']!r:.80}"
        return f"{place}: {fault['msg']}{found}" if place else f"{fault['msg']}{found}"

    return "; ".join(line(fault) for fault in error.errors())
