"""Turns what was asked into what will run: defaults of the bundle, its limits and those of the settings, all checked.

Pure functions of values, apart from `read_served`; `service.routes_create` enqueues what they return. Nothing here
imports torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from models.bundle import Bundle, BundleError, SizeError, read_bundle
from models.bundle_descriptor import nearest_sides
from models.latent_space import LatentSpaceError
from models.prompt_words import PromptWords, read_prompt_words
from service.jobs import GenerateParams, UpscaleParams
from service.latents_in import Floats, require_finite
from service.problems import InvalidFields
from service.schemas import GenerateRequest, OutputFormat, UpscaleQuery
from service.settings import Settings

_MOST_WORD_WARNINGS = 32


@dataclass(frozen=True, slots=True)
class Served:
    """A bundle that jobs may name; `words` is None where its vocabulary is open."""

    bundle: Bundle
    words: PromptWords | None


def read_served(settings: Settings) -> dict[str, Served]:
    """The bundles of the settings by name, the default first.

    Raises:
        BundleError: one cannot be served, or two have the same name.
    """
    served: dict[str, Served] = {}
    for directory in settings.bundle:
        bundle = read_bundle(directory)
        if bundle.name in served:
            raise BundleError(f"{directory}: a bundle named {bundle.name} is served already; names must differ")
        served[bundle.name] = Served(bundle, _read_words(bundle))
    return served


def _read_words(bundle: Bundle) -> PromptWords | None:
    if not bundle.closed_vocabulary or isinstance(bundle.pipeline, str):
        return None
    try:
        return read_prompt_words(bundle.pipeline)
    except (FileNotFoundError, ValueError) as error:
        raise BundleError(f"bundle {bundle.name}: {error}") from error


def choose_served(bundles: Mapping[str, Served], name: str | None) -> Served:
    """The bundle that was named, or the default.

    Raises:
        InvalidFields: there is none of that name.
    """
    if name is None:
        return next(iter(bundles.values()))
    if name not in bundles:
        raise InvalidFields((("bundle", f"is not served here; there are {', '.join(bundles)}"),))
    return bundles[name]


def plan_generate(
    asked: GenerateRequest, bundle: Bundle, settings: Settings, seed: int, output_format: OutputFormat
) -> GenerateParams:
    """What to draw: the bundle's defaults where the request is silent, everything within the limits.

    Raises:
        InvalidFields: a value is beyond a limit; all of them are named.
    """
    defaults, limits = bundle.defaults, bundle.limits
    scale = defaults.scale if asked.scale is None else asked.scale
    width_px = asked.width or defaults.base_width_px * scale
    height_px = asked.height or defaults.base_height_px * scale
    steps = asked.steps or defaults.steps
    longest = settings.max_prompt_chars
    found = [
        (len(asked.prompt) > longest, "prompt", f"has {len(asked.prompt)} characters; at most {longest}"),
        (len(asked.negative_prompt or "") > longest, "negative_prompt", f"has more than {longest} characters"),
        (steps > limits.max_steps, "steps", f"is {steps}; bundle {bundle.name} takes at most {limits.max_steps}"),
        _too_many("num_images", asked.num_images, settings),
        _too_large("width", width_px * height_px, settings),
    ]
    faults = [(name, reason) for is_fault, name, reason in found if is_fault]
    faults += _size_faults(bundle, width_px, height_px, scale)
    if faults:
        raise InvalidFields(tuple(faults))
    return GenerateParams(
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt or "",
        scale=scale,
        width_px=width_px,
        height_px=height_px,
        steps=steps,
        guidance_scale=defaults.guidance_scale if asked.guidance_scale is None else asked.guidance_scale,
        seed=seed,
        num_images=asked.num_images,
        output_format=output_format,
    )


def _size_faults(bundle: Bundle, width_px: int, height_px: int, scale: int) -> list[tuple[str, str]]:
    """The field to blame for a size that no base image gives, with the bundle's reason."""
    try:
        bundle.base_size(width_px, height_px, scale)
    except SizeError as error:
        if scale not in bundle.scales:
            return [("scale", str(error))]
        base_px, limits = width_px / scale, bundle.limits
        return [("height" if nearest_sides(base_px, limits) == (base_px, base_px) else "width", str(error))]
    return []


def warn_of_words(served: Served, params: GenerateParams) -> tuple[str, ...]:
    """A warning for each word of the prompts that the bundle does not know, up to a number that fits an answer."""
    if served.words is None:
        return ()
    unknown = list(
        dict.fromkeys(served.words.unknown_words(params.prompt) + served.words.unknown_words(params.negative_prompt))
    )
    warnings = [
        f"bundle {served.bundle.name} does not know the word {word!r:.80}" for word in unknown[:_MOST_WORD_WARNINGS]
    ]
    if len(unknown) > _MOST_WORD_WARNINGS:
        warnings.append(f"bundle {served.bundle.name} does not know {len(unknown) - _MOST_WORD_WARNINGS} more words")
    return tuple(warnings)


def plan_upscale(
    asked: UpscaleQuery, tensor: Floats, bundle: Bundle, settings: Settings, output_format: OutputFormat
) -> tuple[UpscaleParams, Floats]:
    """What to enlarge, and the raw latent that is enlarged.

    One rule says how the tensor is read: `scaled=true` is the latent as the bundle's pipeline hands it out, packed
    if the latent space is packed (then width and height of its image are needed); else it is raw.

    Shape: [C, h, w] or [B, C, h, w], packed [N, 4 C] or [B, N, 4 C] -> [B, C, h, w].

    Raises:
        InvalidFields: the tensor is no latent of the bundle's space, or a value is beyond a limit.
    """
    space = bundle.latent_space
    if asked.latent_space not in (None, space.name):
        raise InvalidFields((("latent_space", f"is not that of bundle {bundle.name}, which takes {space.name}"),))
    scale = bundle.defaults.scale if asked.scale is None else asked.scale
    if scale not in bundle.scales:
        raise InvalidFields((("scale", f"is {scale}; bundle {bundle.name} has {bundle.scales}"),))
    packed = asked.scaled and space.packing != "none"
    if (asked.width is not None or asked.height is not None) and not packed:
        raise InvalidFields((("width", "and height belong to packed latents; this one tells its size itself"),))
    latent = tensor[None] if tensor.ndim == (2 if packed else 3) else tensor
    try:
        if asked.scaled:
            with np.errstate(over="ignore"):  # what overflows is refused just below
                latent = space.to_raw(latent, asked.height, asked.width)
        space.check_raw(latent.shape)
    except LatentSpaceError as error:
        raise InvalidFields((("body", str(error)),)) from error
    require_finite(latent)
    batch_items, channels, latent_height, latent_width = latent.shape
    image_px = latent_height * latent_width * (space.stride_px * scale) ** 2
    found = (_too_many("body", batch_items, settings), _too_large("body", image_px, settings))
    faults = tuple((name, reason) for is_fault, name, reason in found if is_fault)
    if faults:
        raise InvalidFields(faults)
    params = UpscaleParams(
        scale=scale,
        latent_space=space.name,
        batch_items=batch_items,
        channels=channels,
        latent_height=latent_height,
        latent_width=latent_width,
        output=asked.output,
        output_format=output_format,
    )
    return params, latent


def _too_many(field: str, images: int, settings: Settings) -> tuple[bool, str, str]:
    most = settings.max_num_images
    return images > most, field, f"asks for {images} images; at most {most} are made by one job"


def _too_large(field: str, image_px: int, settings: Settings) -> tuple[bool, str, str]:
    most = settings.max_image_px
    return image_px > most, field, f"makes an image of {image_px} pixels; at most {most} are allowed"
