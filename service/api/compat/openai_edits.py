"""OpenAI image edits over the same jobs: a multipart form of images, a mask and the fields of a generation.

With a mask, its transparent area is generated again. Without one, a bundle that takes reference images uses the images
as references, and another one starts from the image. `docs/compatibility.md` lists the fields.
"""

import asyncio
from base64 import b64encode
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field, TypeAdapter
from starlette.datastructures import UploadFile

from giantleap.service.api.compat.openai import ImagesRequest, ImagesResponse, OpenAIError, plan_job, respond
from giantleap.service.api.compat.shared import validate_as
from giantleap.service.api.dependencies import AppState, AppStateDep
from giantleap.service.api.openapi import describe_responses
from giantleap.service.api.paths import OPENAI_PATH
from giantleap.service.api.sse import EVENT_STREAM_TYPE
from giantleap.service.api.submission import CompatOptionsDep, SubmitOptions, require_media_type
from giantleap.service.api.uploads import open_form
from giantleap.service.errors import GiantleapError, InvalidFields
from giantleap.service.jobs.bundles import ServedBundle
from giantleap.service.jobs.edits.checks import max_references
from giantleap.service.jobs.edits.inputs import to_input, to_mask
from giantleap.service.jobs.edits.sizes import size_like
from giantleap.service.jobs.images import check_image
from giantleap.service.jobs.job import GenerateParams, Job
from giantleap.service.jobs.media_types import FORM_TYPE
from giantleap.service.jobs.planning import choose_method, choose_scale

router = APIRouter(prefix=OPENAI_PATH, tags=["OpenAI"])

MAX_IMAGES = 16
_IMAGE_FIELDS = ("image", "image[]")
_MASK_FIELD = "mask"
_JSON: TypeAdapter[object] = TypeAdapter(object)
# Fields whose text in a form is JSON; the others are text.
_JSON_FIELDS = frozenset(
    {
        *("n", "stream", "partial_images", "output_compression", "num_inference_steps", "guidance_scale"),
        *("seed", "scale", "strength", "refine", "loras"),
    }
)


class EditsRequest(ImagesRequest):
    """The fields of an edit other than its files: those of a generation, and two more."""

    input_fidelity: Literal["low"] | None = Field(default=None, description="Accepted; changes nothing.")
    strength: float | None = Field(
        default=None, description="Share of the steps to run from the image, as in /generate."
    )


@dataclass(frozen=True, slots=True)
class EditForm:
    """The parts of an edit's form."""

    body: EditsRequest
    images: tuple[bytes, ...]
    mask: bytes | None


def _form_body() -> dict[str, Any]:
    """The form, which FastAPI does not parse."""
    file = {"type": "string", "format": "binary"}
    schema = EditsRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    files = {"image": {"type": "array", "items": file, "maxItems": MAX_IMAGES}, "mask": file}
    schema |= {"properties": files | schema["properties"], "required": ["image", "prompt"]}
    example = {"image": ["photo.png"], "mask": "mask.png", "prompt": "a red sphere on a green floor"}
    return {"requestBody": {"required": True, "content": {FORM_TYPE: {"schema": schema, "example": example}}}}


@router.post(
    "/images/edits",
    response_model=ImagesResponse,
    responses=describe_responses(
        {200: {"content": {EVENT_STREAM_TYPE: {"schema": {"type": "string"}}}}},
        *(400, 404, 409, 413, 415, 422, 429, 503, 504),
        model=OpenAIError,
    ),
    openapi_extra=_form_body(),
)
async def post_edit(request: Request, state: AppStateDep, options: CompatOptionsDep) -> Response:
    """Edit images with a prompt; transparent areas of the mask are generated again."""
    require_media_type(request, FORM_TYPE)
    form = await read_form(request)
    job, blob = await asyncio.to_thread(plan_edit, form, state, options)
    return await respond(request, state, form.body, job, blob, options, "image_edit")


async def read_form(request: Request) -> EditForm:
    """The form of an edit.

    Raises:
        MalformedRequest: It is broken.
        InvalidFields: A field is unknown, there twice, or not valid; or there is no image.
    """
    values: dict[str, object] = {}
    files: list[tuple[str, bytes]] = []
    async with open_form(request, MAX_IMAGES + 1, len(EditsRequest.model_fields)) as form:
        for name, part in form.multi_items():
            if isinstance(part, UploadFile):
                files.append((name, await part.read()))
            elif name in (*_IMAGE_FIELDS, _MASK_FIELD):
                raise InvalidFields((name, "is text; send the file itself: this service fetches no URL"))
            elif name in values:
                raise InvalidFields((name[:64], "is in the form twice; send it once"))
            else:
                values[name] = _to_value(name, part)
    if unknown := [name for name, _ in files if name not in (*_IMAGE_FIELDS, _MASK_FIELD)]:
        raise InvalidFields(
            *((name[:64], "is not a file field of an edit; send image, image[] and mask") for name in unknown)
        )
    images = tuple(content for name, content in files if name in _IMAGE_FIELDS)
    masks = [content for name, content in files if name == _MASK_FIELD]
    if not images or len(masks) > 1:
        raise InvalidFields(
            ("mask", "is given twice; send it once") if images else ("image", "is missing; send one or more files")
        )
    return EditForm(validate_as(EditsRequest, values), images, masks[0] if masks else None)


def _to_value(name: str, text: str) -> object:
    """The value of a form field; text that is not JSON stays text, which is then refused."""
    try:
        return _JSON.validate_json(text) if name in _JSON_FIELDS else text
    except ValueError:
        return text


def plan_edit(form: EditForm, state: AppState, options: SubmitOptions) -> tuple[Job, bytes | None]:
    """The form as a job with its input blob.

    Raises:
        InvalidFields: A value or an image is not valid, or the bundle does not take it; fields have OpenAI's names.
        DoesNotFit: No device can hold one image.
    """
    max_px = state.settings.max_image_px
    try:
        served = state.select_bundle(form.body.model)
        further = _to_images(form, served, max_px)
        if form.body.size in (None, "auto"):
            further |= _size_of_image(form, served, max_px)
        job, request = plan_job(form.body, state, options, further)
        assert isinstance(job.params, GenerateParams), "this protocol makes no other job"
        return job, to_input(request, job.params, max_px)
    except InvalidFields as error:
        raise InvalidFields(*((_own_name(name), reason) for name, reason in error.fields)) from error


def _to_images(form: EditForm, served: ServedBundle, max_px: int) -> dict[str, object]:
    """The files as the fields of /generate."""
    texts = [b64encode(image).decode() for image in form.images]
    if form.mask is None:
        refers = max_references(served.bundle) > 0 or len(texts) > 1
        images: dict[str, object] = {"images": texts} if refers else {"init_image": texts[0]}
        return images | {"strength": form.body.strength}
    if len(texts) > 1:
        raise InvalidFields(("mask", f"goes with one image, not {len(texts)}; leave the others or the mask out"))
    try:
        mask = to_mask(form.mask, max_px)
    except GiantleapError as error:
        raise InvalidFields(("mask", error.detail)) from error
    return {"init_image": texts[0], "mask": b64encode(mask).decode(), "strength": form.body.strength}


def _size_of_image(form: EditForm, served: ServedBundle, max_px: int) -> dict[str, object]:
    """The size of the result where the form names none: the shape of the first image."""
    try:
        image = check_image(form.images[0], None, max_px)
    except GiantleapError as error:
        raise InvalidFields(("image", error.detail)) from error
    method = choose_method(served.bundle, form.body.method)
    scale = choose_scale(served.bundle, method, form.body.scale)
    width_px, height_px = size_like(image, served.bundle, method, scale)
    return {"width": width_px, "height": height_px, "scale": scale, "method": method}


def _own_name(field: str) -> str:
    """A field of /generate by OpenAI's name; `images.1` too."""
    name = field.partition(".")[0]
    return {"bundle": "model", "init_image": "image", "images": "image"}.get(name, field)
