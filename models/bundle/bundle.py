"""Reads and checks a bundle: a directory with `bundle.toml`, which names pipeline, latent space and LUA weights.

`read_bundle` checks everything that needs no weights; it imports no torch, so that the API process can call it.
`check_files` compares the weights with their digests. `models/bundle/descriptor.py` has the form of the file;
`models/route.py` loads what it names.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError, safe_open

from giantleap.models.bundle.descriptor import (
    IMAGE_TO_IMAGE,
    METHODS,
    NO_NEGATIVE_PROMPT,
    REFINING,
    SHORT_SCHEDULES,
    About,
    DecodeName,
    Defaults,
    Descriptor,
    DescriptorError,
    DtypeName,
    Limits,
    Method,
    VaeSource,
    from_toml,
    nearest_sides,
    to_toml,
)
from giantleap.models.bundle.digests import file_hash, weight_files
from giantleap.models.bundle.errors import BundleError, MethodError, SizeError
from giantleap.models.bundle.modes import Modes
from giantleap.models.bundle.paths import DESCRIPTOR, check_paths, check_vae, find_descriptor, inside
from giantleap.models.bundle.rediffusion import refused_pipeline
from giantleap.models.latent_space import LatentSpace, read_vae_statistics
from giantleap.models.lua.spec import SPEC_KEY, LuaSpec, is_whole, scaled_size
from giantleap.models.lua.statistics import StatisticsError, read_statistics

__all__ = [
    "DESCRIPTOR",
    "Bundle",
    "BundleError",
    "MethodError",
    "ModelSource",
    "SizeError",
    "check_files",
    "read_bundle",
    "write_bundle",
]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The arguments of `from_pretrained`: a directory, or a hub id with its revision; and the weights' variant."""

    place: Path | str
    revision: str | None = None
    variant: str | None = None


@dataclass(frozen=True)
class Bundle:
    """A bundle as read from its directory. Its files are read once, because every request needs them.

    Args:
        directory: Where `bundle.toml` is.
        descriptor: Its content.
        statistics: Mean and standard deviation of the latents, if a local VAE stores them as weights (FLUX.2).
        has_other_lua: Whether the LUA weights are a file of the user in place of the bundle's own.
    """

    directory: Path
    descriptor: Descriptor
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    has_other_lua: bool = False

    @property
    def name(self) -> str:
        """The bundle's name."""
        return self.descriptor.bundle.name

    @property
    def about(self) -> About:
        """Name, title, license and provenance."""
        return self.descriptor.bundle

    @cached_property
    def pipeline(self) -> Path | str:
        """The pipeline's directory, or its hub id (then with `revision`)."""
        source = self.descriptor.pipeline
        return self.directory / source.path if source.path is not None else str(source.hub_id)

    @property
    def revision(self) -> str | None:
        """The revision of a hub id."""
        return self.descriptor.pipeline.revision

    @property
    def dtype(self) -> DtypeName | None:
        """The dtype of the base model on a GPU if the settings name none (`choose_dtype`)."""
        return self.descriptor.pipeline.dtype

    @property
    def scheduler(self) -> str | None:
        """The diffusers scheduler class to use in place of the pipeline's own."""
        return self.descriptor.pipeline.scheduler

    @property
    def variant(self) -> str | None:
        """The variant of the pipeline's weight files, as in `from_pretrained`."""
        return self.descriptor.pipeline.variant

    @property
    def vae(self) -> ModelSource | None:
        """The VAE that replaces the pipeline's own."""
        return self._source(self.descriptor.vae)

    @property
    def vae_directory(self) -> Path | None:
        """The directory of the VAE that decodes; None while it is on the hub."""
        place = self.pipeline if self.vae is None else self.vae.place
        if isinstance(place, str):
            return None
        return place / "vae" if self.vae is None else place

    @property
    def tiny_vae(self) -> ModelSource | None:
        """The AutoencoderTiny for previews."""
        return self._source(self.descriptor.tiny_vae)

    @cached_property
    def latent_space(self) -> LatentSpace:
        """The latent space of the base model and LUA."""
        space = self.descriptor.latent_space.to_latent_space()
        return space if self.statistics is None else space.with_statistics(*self.statistics)

    @property
    def lua(self) -> Path | None:
        """The LUA weights, for `read_lua`; None if there are none (`unavailable_reason`)."""
        return None if self.descriptor.lua is None else self.directory / self.descriptor.lua.file

    @property
    def clamp_sigmas(self) -> float | None:
        """The bound of LUA's output in standard deviations (`models/lua/clamp.py`); None for no bound."""
        return None if self.descriptor.lua is None else self.descriptor.lua.clamp_sigmas

    @property
    def swinir(self) -> Mapping[int, Path]:
        """The SwinIR weights by scale; empty if there are none."""
        files = {} if self.descriptor.swinir is None else self.descriptor.swinir.by_scale()
        return MappingProxyType({scale: self.directory / name for scale, name in files.items()})

    @property
    def methods(self) -> tuple[Method, ...]:
        """The upscaling methods of this bundle; one is never used in place of another."""
        return tuple(method for method in METHODS if not self.unavailable_reason(method))

    @property
    def decodes(self) -> tuple[DecodeName, ...]:
        """The decodes of this bundle; "tiled" and "tiny" change the image. "tiny" needs `[tiny_vae]`."""
        return ("exact", "tiled") if self.descriptor.tiny_vae is None else ("exact", "tiled", "tiny")

    @property
    def supports_init_image(self) -> bool:
        """Whether the pipeline can start from an image; True for one on the hub, which is not known."""
        return self.pipeline_class is None or self.pipeline_class in IMAGE_TO_IMAGE

    @property
    def takes_negative_prompt(self) -> bool:
        """Whether the pipeline takes a negative prompt; True for one on the hub, which is not known."""
        return self.pipeline_class not in NO_NEGATIVE_PROMPT

    @cached_property
    def refine_unavailable(self) -> str:
        """Why an enlarged latent cannot be refined; empty if it can, or for a pipeline on the hub, not known yet."""
        if isinstance(self.pipeline, str):
            return ""
        index = json.loads((self.pipeline / "model_index.json").read_text(encoding="utf-8"))
        pipeline, scheduler = str(index.get("_class_name", "")), self.scheduler or index.get("scheduler", ["", ""])[1]
        if pipeline not in REFINING:
            return f"the {pipeline} of bundle {self.name} does not start from a latent with noise"
        if scheduler in SHORT_SCHEDULES:
            return f"the {scheduler} of bundle {self.name} has too few steps for a weak pass"
        return ""

    @property
    def max_side_px(self) -> int:
        """Longest side of an image that the base model generates at once."""
        return self.limits.max_direct_px or self.limits.max_base_px

    @cached_property
    def pipeline_class(self) -> str | None:
        """The diffusers class; None while the pipeline is on the hub, or if it has no index."""
        if isinstance(self.pipeline, str) or not (self.pipeline / "model_index.json").is_file():
            return None
        index = json.loads((self.pipeline / "model_index.json").read_text(encoding="utf-8"))
        return str(index.get("_class_name", ""))

    def unavailable_reason(self, method: Method) -> str:
        """Why a method is not available, and what to do; empty if it is."""
        if method not in self._reasons:
            place = self.pipeline if isinstance(self.pipeline, Path) else None
            self._reasons[method] = (
                self.descriptor.unavailable_reason(method)
                or refused_pipeline(method, place, self.pipeline_class, self.scheduler)
                or self.modes.method_misfit(method)
            )
        return self._reasons[method]

    @cached_property
    def _reasons(self) -> dict[Method, str]:
        return {}

    def scales_of(self, method: Method) -> tuple[float, ...]:
        """The scales of a method, 1 included; empty if the method is not available.

        For "direct", which upscales nothing, a scale gives the image size if the request gives none.
        """
        return () if self.unavailable_reason(method) else self.descriptor.scales_of(method)

    @property
    def scales(self) -> tuple[float, ...]:
        """Every scale of any method."""
        return tuple(sorted({scale for method in METHODS for scale in self.scales_of(method)}))

    @property
    def defaults(self) -> Defaults:
        """Values of a request that does not set them."""
        return self.descriptor.defaults

    @property
    def limits(self) -> Limits:
        """Limits of the base image and of the steps."""
        return self.descriptor.limits

    @property
    def modes(self) -> Modes:
        """How the pipeline is loaded."""
        return self.descriptor.modes

    @property
    def closed_vocabulary(self) -> bool:
        """Whether the model only knows the words of its tokenizer's vocabulary."""
        return self.descriptor.vocabulary.closed

    def whole_px(self, side_px: int, scale: float) -> int:
        """The smallest multiple of a side of whole latents whose upscaled size is whole latents too."""
        unit_px = self.latent_space.multiple_px
        return next(n * side_px for n in count(1) if is_whole(n * side_px // unit_px, scale))

    def limits_at(self, scale: float, method: Method) -> Limits:
        """The limits of the base image, with the step that keeps latents whole at this scale."""
        factor = 1 if method == "direct" else scale
        step_px = self.whole_px(self.limits.multiple_px, factor)
        return self.limits.model_copy(update={"multiple_px": step_px})

    def base_size(self, width_px: int, height_px: int, scale: float, method: Method = "lua") -> tuple[int, int]:
        """Width and height of the base image for a final image of exactly the given size.

        With "direct" it is the final size itself.

        Raises:
            MethodError: The bundle does not have this method.
            SizeError: The method does not reach the scale or the size; the message names the nearest sizes.
        """
        if reason := self.unavailable_reason(method):
            raise MethodError(f"method {method}: {reason}; it has {', '.join(self.methods)}")
        if scale not in self.scales_of(method):
            known = ", ".join(map(str, self.scales_of(method)))
            raise SizeError(f"scale {scale}: bundle {self.name} has {known} by method {method}")
        factor, limits = 1 if method == "direct" else scale, self.limits_at(scale, method)
        (less_width, more_width), (less_height, more_height) = (
            nearest_sides(side / factor, limits, method) for side in (width_px, height_px)
        )
        if (scaled_size(less_width, factor), scaled_size(less_height, factor)) == (width_px, height_px):
            return less_width, less_height
        less = f"{scaled_size(less_width, factor)}x{scaled_size(less_height, factor)}"
        more = f"{scaled_size(more_width, factor)}x{scaled_size(more_height, factor)}"
        nearest = less if less == more else f"{less} and {more}"
        min_px, max_px = (scaled_size(nearest_sides(side, limits, method)[0], factor) for side in (0, sys.maxsize))
        way = "generated directly" if method == "direct" else f"at scale {scale}"
        raise SizeError(
            f"{width_px}x{height_px} px {way}: bundle {self.name} reaches sides from {min_px} to {max_px} px "
            f"in steps of {scaled_size(limits.multiple_px, factor)}; nearest: {nearest}"
        )

    def _source(self, section: VaeSource | None) -> ModelSource | None:
        if section is None:
            return None
        if section.path is not None:
            return ModelSource(self.directory / section.path, variant=section.variant)
        return ModelSource(str(section.hub_id), section.revision, section.variant)

    def check_lua(self, spec: LuaSpec) -> None:
        """Check that weights have the channels and heads of the descriptor.

        Raises:
            BundleError: They differ.
        """
        scales = self.scales_of("lua")[1:]
        if spec.head == "liif":
            if not all(map(spec.takes, scales)):
                raise BundleError(
                    f"{self.lua}: a LIIF head enlarges by any scale above 1 that makes a window of {spec.window} a "
                    f"whole number; {DESCRIPTOR} says {scales}"
                )
        elif spec.scales != scales:
            raise BundleError(f"{self.lua}: found heads for scales {spec.scales}; {DESCRIPTOR} says {scales}")
        self.check_lua_channels(spec)

    def check_lua_channels(self, spec: LuaSpec) -> None:
        """Check that weights are for the channels of the bundle's latents.

        Raises:
            BundleError: They are not.
        """
        space = self.latent_space
        if spec.channels != space.channels:
            raise BundleError(
                f"LUA weights of {spec.channels} channels do not fit bundle {self.name}: latent space {space.name} has "
                f"{space.channels}"
            )


def read_bundle(directory: Path) -> Bundle:
    """Read and check a bundle, without loading or hashing weights.

    Raises:
        BundleError: The descriptor is missing, not TOML, or has a wrong or unknown key; a path is missing or leaves the
            bundle; LUA or VAE do not fit the descriptor.
    """
    path = find_descriptor(directory)
    try:
        descriptor = from_toml(path.read_bytes())
    except DescriptorError as error:
        raise BundleError(f"{path}: {error}") from error
    bundle = Bundle(directory, descriptor)
    check_paths(directory, descriptor)
    _check_lua_header(bundle)
    _check_clamp(bundle)
    if bundle.vae_directory is not None:
        check_vae(bundle.vae_directory, bundle.latent_space)
    return _with_statistics(bundle)


def write_bundle(directory: Path, descriptor: Descriptor) -> None:
    """Write `bundle.toml` into a directory that holds everything else.

    The file is replaced in one step; on a full disk the old one stays.
    """
    draft = directory / f".{DESCRIPTOR}"
    try:
        draft.write_text(to_toml(descriptor), encoding="utf-8")
        draft.replace(directory / DESCRIPTOR)
    finally:
        draft.unlink(missing_ok=True)


def check_files(bundle: Bundle) -> None:
    """Compare every weight file with its digest.

    Raises:
        BundleError: A file is missing, differs, or is not listed.
    """
    lua = None if bundle.has_other_lua else bundle.descriptor.lua
    listed = ({} if lua is None else {lua.file: lua.sha256}) | bundle.descriptor.files
    present = {path.relative_to(bundle.directory).as_posix() for path in weight_files(bundle.directory)}
    if present - set(listed):
        raise BundleError(
            f"bundle {bundle.name}: {min(present - set(listed))} is not listed in [files] of {DESCRIPTOR}"
        )
    for name, expected in listed.items():
        actual = file_hash(inside(bundle.directory, name, "files"))
        if actual != expected:
            raise BundleError(f"bundle {bundle.name}: {name} has sha256 {actual}; {DESCRIPTOR} says {expected}")


def _check_lua_header(bundle: Bundle) -> None:
    """Check files in our own format; released files are checked when they are read (`Bundle.check_lua`)."""
    if bundle.lua is None or bundle.lua.suffix.lower() != ".safetensors":
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


def _check_clamp(bundle: Bundle) -> None:
    if bundle.lua is None or bundle.clamp_sigmas is None:
        return
    try:
        statistics = read_statistics(bundle.lua)
    except StatisticsError as error:
        raise BundleError(f"lua.clamp_sigmas: {error}") from error
    scales = bundle.scales_of("lua")[1:]
    if statistics.channels != bundle.latent_space.channels or max(scales) > max(statistics.residual_rms, default=1):
        raise BundleError(
            f"lua.clamp_sigmas: {bundle.lua} has statistics of {statistics.channels} channels at scales "
            f"{sorted(statistics.residual_rms)}; the bundle has {bundle.latent_space.channels} and {scales}"
        )


def _with_statistics(bundle: Bundle) -> Bundle:
    directory = bundle.vae_directory
    if directory is None or not bundle.latent_space.statistics_in_vae:
        return bundle
    try:
        return replace(bundle, statistics=read_vae_statistics(directory))
    except ValueError as error:
        raise BundleError(str(error)) from error
