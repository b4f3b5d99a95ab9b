"""Turns a request into the parameters of a job: fills in the bundle's defaults and checks every limit.

Pure functions of values; `giantleap.service.api.submission` enqueues what they return. Nothing here imports torch.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from giantleap.models.adapters.files import AdapterUse
from giantleap.models.bundle.bundle import Bundle, SizeError
from giantleap.models.bundle.descriptor import (
    NEEDS_DECODER,
    REDIFFUSION,
    DecodeName,
    Method,
    nearest_sides,
    smallest_steps,
)
from giantleap.models.latent_space import LatentSpace, LatentSpaceError
from giantleap.models.lua.spec import is_whole, scaled_size
from giantleap.models.pixels.image_formats import FileOptions, ImageFormat
from giantleap.service.errors import InvalidFields
from giantleap.service.jobs.bundles import ServedBundle
from giantleap.service.jobs.capacity import (
    check_capacity,
    largest_note,
    to_workload,
)
from giantleap.service.jobs.devices import Device
from giantleap.service.jobs.edits.checks import edit_checks
from giantleap.service.jobs.grid import LatentGrid, count_items, output_latent_px
from giantleap.service.jobs.images import ImageSize, check_image, is_image
from giantleap.service.jobs.job import GenerateParams, JobParams, UpscaleParams
from giantleap.service.jobs.latents import Values, read_values, require_finite, to_blob
from giantleap.service.jobs.marking import file_checks, no_file_options
from giantleap.service.jobs.refining import Check, query_checks, refine_checks, to_refinement, with_refine
from giantleap.service.jobs.requests import GenerateRequest, UpscaleQuery
from giantleap.service.settings import Settings

DEFAULT_STRENGTH = 0.6
_MAX_WORD_WARNINGS = 32


def plan_generate(
    request: GenerateRequest,
    bundle: Bundle,
    settings: Settings,
    seed: int,
    output_format: ImageFormat,
    devices: Sequence[Device] = (),
    loras: tuple[AdapterUse, ...] = (),
    others: Sequence[Bundle] = (),
) -> GenerateParams:
    """The parameters of a /generate job, with the bundle's defaults for what the request leaves out.

    Memory is checked for `devices`. `loras` are the files that the request names, `others` the bundles it might name.

    Raises:
        InvalidFields: The bundle lacks the method, or values are over a limit; all of them are named.
        DoesNotFit: No device can hold one image.
    """
    defaults = bundle.defaults
    method = choose_method(bundle, request.method)
    scale = choose_scale(bundle, method, request.scale, (request.width, request.height))
    default_strength = DEFAULT_STRENGTH if request.mask is None else 1.0
    params = GenerateParams(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or "",
        scale=scale,
        width_px=request.width or scaled_size(defaults.base_width_px, scale),
        height_px=request.height or scaled_size(defaults.base_height_px, scale),
        steps=request.steps or defaults.steps,
        guidance_scale=defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        seed=seed,
        num_images=request.num_images,
        output_format=output_format,
        method=method,
        decode=request.decode,
        strength=None if request.init_image is None else request.strength or default_strength,
        mask=request.mask is not None,
        images=len(request.images),
        refine=None if request.refine is None else to_refinement(request.refine.strength, request.refine.steps),
        embed_parameters=request.embed_parameters,
        loras=loras,
        previews=request.previews,
        file=FileOptions(request.compression or "fast", request.quality),
    )
    _refuse(
        (
            *_prompt_checks(params, bundle, settings.max_prompt_chars),
            *_step_checks(params, bundle),
            *edit_checks(request, params, bundle, others),
            *refine_checks(params.refine, bundle, devices),
            *_rediffusion_checks(params, devices),
            _no_decode(params.decode, bundle),
            _too_many("num_images", params.num_images, settings),
            _too_large("width", params, bundle, settings, devices),
            *file_checks(params, bundle),
            _no_base_size(params, bundle),
        )
    )
    check_capacity(params, bundle, devices, settings.max_image_px)
    return params


def _refuse(checks: Iterable[Check]) -> None:
    """Report every wrong field at once.

    Raises:
        InvalidFields: At least one check failed.
    """
    if faults := [(field, reason) for is_wrong, field, reason in checks if is_wrong]:
        raise InvalidFields(*faults)


def _prompt_checks(params: JobParams, bundle: Bundle, max_chars: int) -> tuple[Check, ...]:
    texts = {"prompt": params.prompt, "negative_prompt": params.negative_prompt}
    return (
        *(
            (len(t) > max_chars, name, f"has {len(t)} characters; send at most {max_chars}")
            for name, t in texts.items()
        ),
        (
            bool(params.negative_prompt) and not bundle.takes_negative_prompt,
            "negative_prompt",
            f"is not supported by the pipeline of bundle {bundle.name}; leave it out",
        ),
    )


def _no_previews(params: GenerateParams, bundle: Bundle) -> Check:
    reason = bundle.descriptor.previews_unavailable if params.previews else ""
    return bool(reason), "previews", f"are not available: {reason}; leave them out"


def _step_checks(params: GenerateParams, bundle: Bundle) -> tuple[Check, ...]:
    """At least one step and not too many: with an init_image only the share `strength` of the steps is run."""
    steps, strength, max_steps = params.steps, params.strength, bundle.limits.max_steps
    return (
        _no_previews(params, bundle),
        (steps > max_steps, "steps", f"is {steps}; bundle {bundle.name} takes at most {max_steps}"),
        (
            strength is not None and int(steps * strength) < 1,
            "strength",
            f"is {strength}, which leaves no step of {steps} to run; raise one of them",
        ),
    )


def _rediffusion_checks(params: GenerateParams, devices: Sequence[Device]) -> tuple[Check, ...]:
    """What the methods that sample again cannot do."""
    method, steps = params.method, smallest_steps(params.method, params.scale)
    if method not in REDIFFUSION or params.scale == 1:
        return ()
    generating = [device.role for device in devices if device.role.loads_pipeline]
    has_decoder = not generating or any(role.loads_decoder for role in generating)
    noise = f"not supported by method {method}, which starts from noise"
    return (
        (params.strength is not None, "init_image", f"is {noise}"),
        (params.images > 0, "images", f"are {noise}"),
        (params.steps < steps, "steps", f"is {params.steps}; method {method} at scale {params.scale} needs {steps}"),
        (
            method in NEEDS_DECODER and not has_decoder,
            "method",
            f"is {method}, which decodes while it generates; workers of role generate have no decoder",
        ),
    )


def choose_method(bundle: Bundle, requested: Method | None) -> Method:
    """The requested method, or the bundle's default where it is None; never another one.

    Raises:
        InvalidFields: The bundle lacks the method.
    """
    method = bundle.defaults.method if requested is None else requested
    if reason := bundle.unavailable_reason(method):
        raise InvalidFields(("method", f"is {method}: {reason}; available are {', '.join(bundle.methods)}"))
    return method


def choose_scale(
    bundle: Bundle, method: Method, requested: float | None, size_px: tuple[int | None, int | None] = (None, None)
) -> float:
    """The requested scale; where it is None the bundle's default if the method has it, else the method's smallest.

    If that does not reach the requested size of the final image but another scale does, that one: the next larger one,
    which is the least work, before smaller ones.

    Raises:
        InvalidFields: The method lacks the scale.
    """
    scales = bundle.scales_of(method)
    if requested is None:
        default = bundle.defaults.scale if bundle.defaults.scale in scales else scales[1]
        if size_px == (None, None):
            return default
        ordered = sorted(scales, key=lambda scale: (scale < default, abs(scale - default)))
        return next((scale for scale in ordered if _reaches(bundle, method, scale, size_px)), default)
    if requested not in scales:
        known = ", ".join(map(str, scales))
        raise InvalidFields(("scale", f"is {requested}; bundle {bundle.name} has {known} by method {method}"))
    return scales[scales.index(requested)]


def _reaches(bundle: Bundle, method: Method, scale: float, size_px: tuple[int | None, int | None]) -> bool:
    """Whether some base image gives this final size; a side that is None is the default one."""
    width_px = size_px[0] or scaled_size(bundle.defaults.base_width_px, scale)
    height_px = size_px[1] or scaled_size(bundle.defaults.base_height_px, scale)
    try:
        bundle.base_size(width_px, height_px, scale, method)
    except SizeError:
        return False
    return True


def _no_base_size(params: GenerateParams, bundle: Bundle) -> Check:
    """Fails where no base image gives the final size; names the side that is wrong."""
    width_px, height_px, scale, method = params.width_px, params.height_px, params.scale, params.method
    try:
        bundle.base_size(width_px, height_px, scale, method)
    except SizeError as error:
        base_px = width_px / (1 if method == "direct" else scale)
        width_fits = nearest_sides(base_px, bundle.limits_at(scale, method), method) == (base_px, base_px)
        size_px = (width_px, height_px)
        others = [str(each) for each in bundle.scales_of(method) if _reaches(bundle, method, each, size_px)]
        hint = f"; scale {' or '.join(others)} reaches {width_px}x{height_px}" if others else ""
        return True, "height" if width_fits else "width", f"{error}{hint}"
    return False, "width", ""


def _no_decode(decode: DecodeName, bundle: Bundle) -> Check:
    return decode not in bundle.decodes, "decode", f"is {decode}; bundle {bundle.name} has {', '.join(bundle.decodes)}"


def total_latent_px(params: JobParams, bundle: Bundle) -> int:
    """Latent pixels of all images of a job after upscaling, which the limit on queued work counts."""
    grid = LatentGrid(bundle.latent_space.stride_px, window=1)
    return count_items(params) * output_latent_px(params, grid)


def warn_of_words(served: ServedBundle, params: JobParams) -> tuple[str, ...]:
    """A warning for each word of the prompts that the bundle does not know, at most 32."""
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
    query: UpscaleQuery,
    body: bytes,
    content_type: str | None,
    bundle: Bundle,
    settings: Settings,
    output_format: ImageFormat,
    devices: Sequence[Device] = (),
    seed: int = 0,
) -> tuple[UpscaleParams, bytes]:
    """The parameters of an /upscale job and its input blob, from a body that holds a latent or an image.

    The worker encodes an image to its posterior mean, enlarges the latent and decodes it; `swinir` enlarges pixels. A
    latent with `scaled=true` is as the bundle's pipeline returns it: scaled, and packed if the latent space is packed
    (then the width and height of its image are needed). Otherwise it is raw. `seed` is that of a refine pass.

    Without `devices`, those that the job may run on, memory is not checked.

    Raises:
        GiantleapError: The body cannot be read (`read_values`, `check_image`), is not a latent of the bundle's space,
            or a value is over a limit.
        DoesNotFit: No device can hold one image.
    """
    space = bundle.latent_space
    image: ImageSize | None = None
    if is_image(body, content_type):
        image = check_image(body, content_type, settings.max_image_px)
        unit_px = space.multiple_px
        height, width = (-(-side // unit_px) * unit_px // space.stride_px for side in (image.height_px, image.width_px))
        shape: tuple[int, ...] = (1, space.channels, height, width)
        one_frame = False
    else:
        tensor = read_values(body, content_type)
        if query.latent_space not in (None, space.name):
            raise InvalidFields(("latent_space", f"is not that of bundle {bundle.name}; send a latent of {space.name}"))
        latent = _to_raw(query, tensor, space)
        shape, one_frame = latent.shape, space.is_one_frame(tensor.shape)
    method = choose_method(bundle, query.method)
    params = UpscaleParams(
        scale=choose_scale(bundle, method, query.scale),
        latent_space=space.name,
        batch_items=shape[0],
        channels=shape[1],
        latent_height=shape[2],
        latent_width=shape[3],
        output=query.output,
        output_format=output_format,
        method=method,
        decode=query.decode,
        image_width_px=None if image is None else image.width_px,
        image_height_px=None if image is None else image.height_px,
        one_frame=one_frame,
        file=FileOptions(query.compression or "fast", query.quality),
    )
    params = with_refine(query, params, bundle, seed)
    own_checks = (*_body_checks(query, params, bundle, image), *no_file_options(query), *query_checks(query))
    _refuse((*own_checks, *_upscale_checks(params, bundle, settings, devices)))
    check_capacity(params, bundle, devices, settings.max_image_px)
    return params, body if image is not None else to_blob(latent)


def _body_checks(
    query: UpscaleQuery, params: UpscaleParams, bundle: Bundle, image: ImageSize | None
) -> tuple[Check, ...]:
    """The scale must keep all sides whole; an image has no fields of latents."""
    height, width, scale = params.latent_height, params.latent_width, params.scale
    whole_latent = is_whole(height, scale) and is_whole(width, scale)
    if image is None:
        return (
            (not whole_latent, "body", f"is a latent of {height}x{width}, whose sides times {scale} are not whole"),
        )
    whole_image = is_whole(image.height_px, scale) and is_whole(image.width_px, scale)
    has_size = query.width is not None or query.height is not None
    return (
        (query.scaled, "scaled", "applies to latents; the body is an image"),
        (query.latent_space is not None, "latent_space", "applies to latents; the body is an image"),
        (has_size, "width", "and height apply to packed latents; leave them out"),
        (
            not (whole_image and whole_latent),
            "body",
            f"is an image of {image.width_px}x{image.height_px} px; at scale {scale} send sides in multiples of "
            f"{bundle.whole_px(bundle.latent_space.multiple_px, scale)} px",
        ),
    )


def _to_raw(query: UpscaleQuery, tensor: Values, space: LatentSpace) -> Values:
    """The tensor of a body as raw latents.

    Shape:
        [C, h, w] or [B, C, h, w]; of a video VAE also a video of one frame, [C, 1, h, w] or [B, C, 1, h, w]; scaled
        ones also packed, [N, 4 C] or [B, N, 4 C] -> [B, C, h, w].

    Raises:
        InvalidFields: The tensor is not a latent of this space, or not finite.
    """
    packed = query.scaled and space.is_token_row(tensor.shape)
    latent = tensor.squeeze(-3) if space.is_one_frame(tensor.shape) else tensor
    latent = latent[None] if latent.ndim == (2 if packed else 3) else latent
    try:
        if packed:
            with np.errstate(over="ignore"):  # overflow is refused below
                latent = latent.astype(np.float32, copy=False)
                space.check_scaled_values(latent)
                latent = space.to_raw(latent, query.height, query.width)
        else:
            space.check_raw(latent.shape, tensor.shape)
            _check_size(query, latent, space)
            latent = _unscale(latent, space) if query.scaled else latent
    except LatentSpaceError as error:
        forms = f", or a packed one {space.scaled_form}" if query.scaled and space.is_packed else ""
        forms += f", or a video of one frame [batch, {space.channels}, 1, h, w]" if space.takes_frames else ""
        raise InvalidFields(("body", f"{error}{forms}")) from error
    if query.scaled:  # else these are the values that `read_values` has checked
        require_finite(latent)
    return latent


def _unscale(latent: Values, space: LatentSpace) -> Values:
    with np.errstate(over="ignore"):  # overflow is refused by the caller
        latent = latent.astype(np.float32, copy=False)
        space.check_scaled_values(latent)
        return space.unscale(latent)


def _check_size(query: UpscaleQuery, latent: Values, space: LatentSpace) -> None:
    """Check a size that was sent with a latent that tells its own.

    Raises:
        InvalidFields: It is another.
    """
    for name, side_px, side in (("width", query.width, latent.shape[3]), ("height", query.height, latent.shape[2])):
        own_px = space.stride_px * side
        if side_px is not None and abs(side_px - own_px) >= space.multiple_px:
            raise InvalidFields((name, f"is {side_px}; the latent is of {own_px} px: leave it out"))


def _upscale_checks(
    params: UpscaleParams, bundle: Bundle, settings: Settings, devices: Sequence[Device]
) -> tuple[Check, ...]:
    """Checks that apply to latents and images."""
    to_latent = params.output == "latent" and params.method == "swinir" and params.scale > 1
    return (
        _no_decode(params.decode, bundle),
        (to_latent, "output", "is latent, but swinir enlarges pixels; choose another method"),
        *_prompt_checks(params, bundle, settings.max_prompt_chars),
        *refine_checks(params.refine, bundle, devices, ("refine_strength", "refine_strength", "refine_steps")),
        _too_many("body", params.batch_items, settings),
        _too_large("body", params, bundle, settings, devices),
        *file_checks(params, bundle),
    )


def _too_many(field: str, images: int, settings: Settings) -> Check:
    max_images = settings.max_num_images
    return images > max_images, field, f"makes {images} images; one job makes at most {max_images}"


def _too_large(field: str, params: JobParams, bundle: Bundle, settings: Settings, devices: Sequence[Device]) -> Check:
    work, max_px = to_workload(params, bundle), settings.max_image_px
    image_px = work.width_px * work.height_px
    note = largest_note(work, bundle, devices, max_px) if image_px > max_px else ""
    return image_px > max_px, field, f"makes an image of {image_px} pixels; at most {max_px} are allowed{note}"
