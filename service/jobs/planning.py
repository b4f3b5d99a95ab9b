"""Turns what was asked into what will run: defaults of the bundle, its limits and those of the settings, all checked.

Pure functions of values, apart from `load_bundles`; `giantleap.service.api.routes.create` enqueues what they return.
Nothing here imports torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from giantleap.models.bundle.bundle import Bundle, BundleError, SizeError, read_bundle
from giantleap.models.bundle.descriptor import DecodeName, Method, nearest_sides
from giantleap.models.bundle.vocabulary import PromptWords, read_prompt_words
from giantleap.models.latent_space import LatentSpace, LatentSpaceError
from giantleap.models.lua.spec import is_whole, scaled_size
from giantleap.service.errors import InvalidFields
from giantleap.service.jobs.capacity import (
    BundleMemory,
    DeviceShare,
    check_capacity,
    largest_note,
    read_memory,
    to_workload,
)
from giantleap.service.jobs.grid import LatentGrid, count_items, output_latent_px
from giantleap.service.jobs.images import ImageSize, check_image, is_image
from giantleap.service.jobs.job import GenerateParams, JobParams, UpscaleParams
from giantleap.service.jobs.latents import Values, read_values, require_finite, to_blob
from giantleap.service.jobs.requests import GenerateRequest, OutputFormat, UpscaleQuery
from giantleap.service.settings import Settings

DEFAULT_STRENGTH = 0.6
_MAX_WORD_WARNINGS = 32

Check = tuple[bool, str, str]  # whether something is wrong, the field to blame, and what is wrong with it


@dataclass(frozen=True, slots=True)
class ServedBundle:
    """A bundle that jobs may name; `words` is None where its vocabulary is open."""

    bundle: Bundle
    words: PromptWords | None
    memory: BundleMemory


def load_bundles(settings: Settings) -> dict[str, ServedBundle]:
    """The bundles of the settings by name, the default first.

    Raises:
        BundleError: one cannot be served, or two have the same name.
    """
    served: dict[str, ServedBundle] = {}
    for directory in settings.bundle:
        bundle = read_bundle(directory)
        if bundle.name in served:
            raise BundleError(f"{directory}: a bundle named {bundle.name} is served already; names must differ")
        served[bundle.name] = ServedBundle(bundle, _read_words(bundle), read_memory(bundle))
    return served


def _read_words(bundle: Bundle) -> PromptWords | None:
    if not bundle.closed_vocabulary or isinstance(bundle.pipeline, str):
        return None
    try:
        return read_prompt_words(bundle.pipeline)
    except (FileNotFoundError, ValueError) as error:
        raise BundleError(f"bundle {bundle.name}: {error}") from error


def select_bundle(bundles: Mapping[str, ServedBundle], name: str | None) -> ServedBundle:
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
    asked: GenerateRequest,
    bundle: Bundle,
    settings: Settings,
    seed: int,
    output_format: OutputFormat,
    places: Sequence[DeviceShare] = (),
) -> GenerateParams:
    """What to draw: the bundle's defaults where the request is silent, everything within the limits.

    Args:
        places: Devices that the job may run on; none where they are not known, which refuses nothing.

    Raises:
        InvalidFields: the method is not there, or a value is beyond a limit; all of them are named.
        DoesNotFit: no device can hold one image.
    """
    defaults = bundle.defaults
    method = choose_method(bundle, asked.method)
    scale = choose_scale(bundle, method, asked.scale)
    params = GenerateParams(
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt or "",
        scale=scale,
        width_px=asked.width or scaled_size(defaults.base_width_px, scale),
        height_px=asked.height or scaled_size(defaults.base_height_px, scale),
        steps=asked.steps or defaults.steps,
        guidance_scale=defaults.guidance_scale if asked.guidance_scale is None else asked.guidance_scale,
        seed=seed,
        num_images=asked.num_images,
        output_format=output_format,
        method=method,
        decode=asked.decode,
        strength=None if asked.init_image is None else asked.strength or DEFAULT_STRENGTH,
    )
    _refuse(
        (
            (
                asked.strength is not None and params.strength is None,
                "strength",
                "is of init_image, which is not there",
            ),
            *_prompt_checks(params, bundle, settings.max_prompt_chars),
            *_step_checks(params, bundle),
            _no_decode(params.decode, bundle),
            _too_many("num_images", params.num_images, settings),
            _too_large("width", params, bundle, settings, places),
            _no_base_size(params, bundle),
        )
    )
    check_capacity(params, bundle, places, settings.max_image_px)
    return params


def _refuse(checks: Iterable[Check]) -> None:
    """Names every fault at once, so that a client mends its request in one go.

    Raises:
        InvalidFields: at least one check found something wrong.
    """
    if faults := tuple((field, reason) for is_wrong, field, reason in checks if is_wrong):
        raise InvalidFields(faults)


def _prompt_checks(params: GenerateParams, bundle: Bundle, most: int) -> tuple[Check, ...]:
    return (
        (len(params.prompt) > most, "prompt", f"has {len(params.prompt)} characters; at most {most}"),
        (len(params.negative_prompt) > most, "negative_prompt", f"has more than {most} characters"),
        (
            bool(params.negative_prompt) and not bundle.takes_negative_prompt,
            "negative_prompt",
            f"is not taken by the pipeline of bundle {bundle.name}; leave it out",
        ),
    )


def _step_checks(params: GenerateParams, bundle: Bundle) -> tuple[Check, ...]:
    """Enough steps and not too many: a start image runs its share of them only."""
    steps, strength, most = params.steps, params.strength, bundle.limits.max_steps
    return (
        (steps > most, "steps", f"is {steps}; bundle {bundle.name} takes at most {most}"),
        (
            strength is not None and not bundle.supports_init_image,
            "init_image",
            f"is not taken: the pipeline of bundle {bundle.name} starts from noise only",
        ),
        (
            strength is not None and int(steps * strength) < 1,
            "strength",
            f"of {strength} leaves no step of {steps}; raise one of them",
        ),
    )


def choose_method(bundle: Bundle, asked: Method | None) -> Method:
    """The method that was asked for, or the bundle's default; never another one.

    Raises:
        InvalidFields: the bundle does not have it.
    """
    method = bundle.defaults.method if asked is None else asked
    if reason := bundle.unavailable_reason(method):
        raise InvalidFields((("method", f"{method}: {reason}; there are {', '.join(bundle.methods)}"),))
    return method


def choose_scale(bundle: Bundle, method: Method, asked: float | None) -> float:
    """The scale that was asked for; else the bundle's default where the method has it, or the method's smallest.

    Raises:
        InvalidFields: the method does not have it.
    """
    scales = bundle.scales_of(method)
    if asked is None:
        return bundle.defaults.scale if bundle.defaults.scale in scales else scales[1]
    if asked not in scales:
        known = ", ".join(map(str, scales))
        raise InvalidFields((("scale", f"is {asked}; bundle {bundle.name} has {known} by method {method}"),))
    return scales[scales.index(asked)]


def _no_base_size(params: GenerateParams, bundle: Bundle) -> Check:
    """Whether no base image gives the size: the side to blame, with the bundle's reason."""
    width_px, height_px, scale, method = params.width_px, params.height_px, params.scale, params.method
    try:
        bundle.base_size(width_px, height_px, scale, method)
    except SizeError as error:
        drawn_px = width_px / (1 if method == "direct" else scale)
        right = nearest_sides(drawn_px, bundle.limits_at(scale, method), method) == (drawn_px, drawn_px)
        return True, "height" if right else "width", str(error)
    return False, "width", ""


def _no_decode(decode: DecodeName, bundle: Bundle) -> Check:
    return decode not in bundle.decodes, "decode", f"is {decode}; bundle {bundle.name} has {', '.join(bundle.decodes)}"


def total_latent_px(params: JobParams, bundle: Bundle) -> int:
    """Latent pixels of all images of a job after upscaling: what the limit of queued work counts."""
    grid = LatentGrid(bundle.latent_space.stride_px, window=1)
    return count_items(params) * output_latent_px(params, grid)


def warn_of_words(served: ServedBundle, params: GenerateParams) -> tuple[str, ...]:
    """A warning for each word of the prompts that the bundle does not know, up to a number that fits an answer."""
    if served.words is None:
        return ()
    unknown = list(
        dict.fromkeys(served.words.unknown_words(params.prompt) + served.words.unknown_words(params.negative_prompt))
    )
    warnings = [
        f"bundle {served.bundle.name} does not know the word {word!r:.80}" for word in unknown[:_MAX_WORD_WARNINGS]
    ]
    if len(unknown) > _MAX_WORD_WARNINGS:
        warnings.append(f"bundle {served.bundle.name} does not know {len(unknown) - _MAX_WORD_WARNINGS} more words")
    return tuple(warnings)


def prepare_upscale(
    asked: UpscaleQuery,
    body: bytes,
    content_type: str | None,
    bundle: Bundle,
    settings: Settings,
    output_format: OutputFormat,
    places: Sequence[DeviceShare] = (),
) -> tuple[UpscaleParams, bytes]:
    """What to enlarge, and the job's input blob, from a body that holds a latent or an image.

    Args:
        places: As for `plan_generate`.

    Raises:
        GiantleapError: the body cannot be read (`read_values`, `check_image`), or a value is beyond a limit.
        DoesNotFit: no device can hold one image.
    """
    if is_image(body, content_type):
        size = check_image(body, content_type, settings.max_image_px)
        params = plan_upscale_image(asked, size, bundle, settings, output_format, places)
        check_capacity(params, bundle, places, settings.max_image_px)
        return params, body
    params, latent = plan_upscale(asked, read_values(body, content_type), bundle, settings, output_format, places)
    check_capacity(params, bundle, places, settings.max_image_px)
    return params, to_blob(latent)


def plan_upscale_image(
    asked: UpscaleQuery,
    image: ImageSize,
    bundle: Bundle,
    settings: Settings,
    output_format: OutputFormat,
    places: Sequence[DeviceShare] = (),
) -> UpscaleParams:
    """How to enlarge an image: encode it to the posterior mean, enlarge the latent, decode; `swinir` takes it as it is.

    Raises:
        InvalidFields: a value is of latents only, or beyond a limit.
    """
    space = bundle.latent_space
    unit_px = space.multiple_px
    latent_height, latent_width = (
        -(-side_px // unit_px) * unit_px // space.stride_px for side_px in (image.height_px, image.width_px)
    )
    method = choose_method(bundle, asked.method)
    scale = choose_scale(bundle, method, asked.scale)
    params = UpscaleParams(
        scale=scale,
        latent_space=space.name,
        batch_items=1,
        channels=space.channels,
        latent_height=latent_height,
        latent_width=latent_width,
        output=asked.output,
        output_format=output_format,
        method=method,
        decode=asked.decode,
        image_width_px=image.width_px,
        image_height_px=image.height_px,
    )
    _refuse(
        (
            (asked.scaled, "scaled", "is of latents; the body is an image"),
            (asked.latent_space is not None, "latent_space", "is of latents; the body is an image"),
            (asked.width is not None or asked.height is not None, "width", "and height belong to packed latents"),
            *_upscale_checks(params, bundle, settings, places),
            (
                not all(
                    is_whole(side, scale) for side in (image.width_px, image.height_px, latent_height, latent_width)
                ),
                "body",
                f"is an image of {image.width_px}x{image.height_px} px; at scale {scale} send sides in multiples of "
                f"{bundle.whole_px(unit_px, scale)} px",
            ),
        )
    )
    return params


def plan_upscale(
    asked: UpscaleQuery,
    tensor: Values,
    bundle: Bundle,
    settings: Settings,
    output_format: OutputFormat,
    places: Sequence[DeviceShare] = (),
) -> tuple[UpscaleParams, Values]:
    """What to enlarge, and the raw latent that is enlarged.

    One rule says how the tensor is read: `scaled=true` is the latent as the bundle's pipeline hands it out, packed
    if the latent space is packed (then width and height of its image are needed); else it is raw.

    Shape: [C, h, w] or [B, C, h, w], packed [N, 4 C] or [B, N, 4 C], of a video VAE also its one frame, [C, 1, h, w] or
    [B, C, 1, h, w] -> [B, C, h, w].

    Raises:
        InvalidFields: the tensor is no latent of the bundle's space, or a value is beyond a limit.
    """
    space = bundle.latent_space
    if asked.latent_space not in (None, space.name):
        raise InvalidFields((("latent_space", f"is not that of bundle {bundle.name}, which takes {space.name}"),))
    method = choose_method(bundle, asked.method)
    scale = choose_scale(bundle, method, asked.scale)
    latent = _to_raw(asked, tensor, space)
    batch_items, channels, latent_height, latent_width = latent.shape
    params = UpscaleParams(
        scale=scale,
        latent_space=space.name,
        batch_items=batch_items,
        channels=channels,
        latent_height=latent_height,
        latent_width=latent_width,
        output=asked.output,
        output_format=output_format,
        method=method,
        decode=asked.decode,
        one_frame=is_one_frame(tensor.shape, space),
    )
    _refuse(
        (
            (
                not (is_whole(latent_height, scale) and is_whole(latent_width, scale)),
                "body",
                f"is a latent of {latent_height}x{latent_width}, which scale {scale} makes no whole one",
            ),
            *_upscale_checks(params, bundle, settings, places),
        )
    )
    return params, latent


def _to_raw(asked: UpscaleQuery, tensor: Values, space: LatentSpace) -> Values:
    """The raw latents [B, C, h, w] that a body's tensor means.

    Raises:
        InvalidFields: it is no latent of this space, or not finite.
    """
    packed = asked.scaled and space.is_packed
    if not asked.scaled and is_one_frame(tensor.shape, space):
        tensor = tensor.squeeze(-3)
    if (asked.width is not None or asked.height is not None) and not packed:
        raise InvalidFields((("width", "and height belong to packed latents; this one tells its size itself"),))
    latent = tensor[None] if tensor.ndim == (space.scaled_dims - 1 if asked.scaled else 3) else tensor
    try:
        if asked.scaled:
            with np.errstate(over="ignore"):  # what overflows is refused just below
                latent = latent.astype(np.float32, copy=False)
                space.check_scaled_values(latent)
                latent = space.to_raw(latent, asked.height, asked.width)
        space.check_raw(latent.shape)
    except LatentSpaceError as error:
        video = f", or a video of one frame [batch, {space.channels}, 1, h, w]" if space.packing == "frame" else ""
        raise InvalidFields((("body", f"{error}{video}"),)) from error
    require_finite(latent)
    return latent


def is_one_frame(shape: Sequence[int], space: LatentSpace) -> bool:
    """Whether a latent of this shape is one frame of a space of videos: [C, 1, h, w] or [B, C, 1, h, w]."""
    return space.packing == "frame" and len(shape) in (4, 5) and shape[-4] == space.channels and shape[-3] == 1


def _upscale_checks(
    params: UpscaleParams, bundle: Bundle, settings: Settings, places: Sequence[DeviceShare]
) -> tuple[Check, ...]:
    """What holds for a latent and for an image."""
    to_latent = params.output == "latent" and params.method == "swinir" and params.scale > 1
    return (
        _no_decode(params.decode, bundle),
        (to_latent, "output", "is a latent; swinir enlarges pixels"),
        _too_many("body", params.batch_items, settings),
        _too_large("body", params, bundle, settings, places),
    )


def _too_many(field: str, images: int, settings: Settings) -> Check:
    most = settings.max_num_images
    return images > most, field, f"asks for {images} images; at most {most} are made by one job"


def _too_large(
    field: str, params: JobParams, bundle: Bundle, settings: Settings, places: Sequence[DeviceShare]
) -> Check:
    work, most = to_workload(params, bundle), settings.max_image_px
    image_px = work.width_px * work.height_px
    note = largest_note(work, bundle, places, most) if image_px > most else ""
    return image_px > most, field, f"makes an image of {image_px} pixels; at most {most} are allowed{note}"
