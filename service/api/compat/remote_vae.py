"""Hugging Face's remote VAE: the requests of diffusers' `remote_decode` and `remote_encode`, over the same jobs.

The body is the bare bytes of a tensor; the query tells its shape, its dtype and how it was scaled
(diffusers 0.42, `diffusers/utils/remote_utils.py`). With `?scale=2` in the endpoint's address the decode is of the
enlarged latent, which no other remote VAE does.
"""

import asyncio
import io
import json
import math
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Query, Request, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from giantleap.models.bundle.bundle import Bundle
from giantleap.models.bundle.descriptor import DecodeName
from giantleap.models.image_formats import ImageFormat
from giantleap.models.latent_space import LatentSpace, LatentSpaceError
from giantleap.service.api.compat.errors import REMOTE_VAE_PATH
from giantleap.service.api.compat.shared_job import (
    TermsDep,
    describe_errors,
    find_bundle,
    new_job,
    read_results,
    response_headers,
    run_in_thread_if_large,
    run_job,
    stack_latents,
    validate_as,
)
from giantleap.service.api.dependencies import AppState, AppStateDep
from giantleap.service.api.openapi import file_content
from giantleap.service.errors import InvalidFields, InvalidRequest, UnsupportedMediaType
from giantleap.service.jobs.job import JobRecord, UpscaleParams
from giantleap.service.jobs.latents import read_latent, to_blob, wrap_tensor
from giantleap.service.jobs.media_types import OCTETS_TYPE, SAFETENSORS_TYPE
from giantleap.service.jobs.planning import prepare_upscale
from giantleap.service.jobs.requests import Scale, UpscaleQuery

router = APIRouter(prefix=REMOTE_VAE_PATH, tags=["remote VAE"])

PixelForm = Literal["bytes", "zero_one", "minus_one_one"]

TENSOR_TYPE = "tensor/binary"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_STATUSES = (400, 404, 413, 415, 422, 429, 503, 504)


class RemoteVaeError(BaseModel):
    error: str
    code: str = Field(examples=["queue_full"])


class ScalingQuery(BaseModel):
    """How a latent is scaled. A factor that is not the bundle's is refused: the latent is of another VAE."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scaling_factor: float | None = Field(default=None, allow_inf_nan=False)
    shift_factor: float | None = Field(default=None, allow_inf_nan=False)


class EncodeQuery(ScalingQuery):
    """What `remote_encode` says; of an image that is a tensor also the two that lead to its refusal."""

    shape: list[int] | None = Field(default=None, description="Refused: the body is an image file.")
    dtype: str | None = Field(default=None, description="Refused.")


class DecodeQuery(ScalingQuery):
    """What `remote_decode` says of its tensor and asks for, and our own scale, method and decode."""

    shape: list[int] = Field(min_length=1, max_length=5)
    dtype: Literal["float32", "float16", "bfloat16"]
    do_scaling: bool = Field(default=False, description="The latent is scaled as the bundle's pipeline does it.")
    output_type: Literal["pil", "pt"] = Field(default="pil", description="A file, or the bytes of a tensor.")
    image_format: Literal["png", "jpg"] = Field(default="jpg", description="Of output_type pil.")
    partial_postprocess: bool = Field(
        default=False, description="Of output_type pt: uint8 [B, H, W, 3]; else float16 [B, 3, H, W] in [-1, 1]."
    )
    height: int | None = Field(default=None, description="Only for a packed tensor: height of its image, pixels.")
    width: int | None = None
    scale: Scale = Field(default=1, description="Enlarge the latent before its decode.")
    method: Literal["lua", "bicubic", "swinir"] | None = None
    decode: DecodeName = "exact"


@router.post(
    "/{bundle}/decode",
    response_class=Response,
    responses=describe_errors(
        RemoteVaeError, *_STATUSES, good={"content": file_content("image/jpeg", "image/png", TENSOR_TYPE)}
    ),
    openapi_extra={"requestBody": {"required": True, "content": file_content(TENSOR_TYPE, OCTETS_TYPE)}},
)
async def post_decode(
    bundle: str, request: Request, query: Annotated[DecodeQuery, Query()], serving: AppStateDep, terms: TermsDep
) -> Response:
    """Decode a latent once, as it is or enlarged."""
    served = find_bundle(serving, bundle)
    _require_type(request, TENSOR_TYPE, OCTETS_TYPE)
    body = await request.body()
    # diffusers asks for "pil" but accepts only tensors where it postprocesses the image itself.
    floats = query.output_type == "pil" and request.headers.get("accept") == TENSOR_TYPE
    as_tensor = floats or query.output_type == "pt"
    file_format: ImageFormat = "png" if as_tensor or query.image_format == "png" else "jpeg"
    params, blob = await run_in_thread_if_large(
        len(body), plan_decode, query, body, served.bundle, serving, file_format
    )
    if not as_tensor and params.batch_items != 1:
        raise InvalidFields(("shape", f"has {params.batch_items} latents; a file holds one image; ask for pt"))
    ended = await run_job(request, serving, new_job(served, params, terms.cancel_after_s), blob, terms.key)
    if isinstance(ended, Response):
        return ended
    results = await read_results(serving, ended)
    if not as_tensor:
        return Response(results[0], 200, response_headers(ended), ended.results[0].content_type)
    form: PixelForm = "zero_one" if floats else "bytes" if query.partial_postprocess else "minus_one_one"
    return tensor_answer(ended, await asyncio.to_thread(to_tensor, results, form))


def plan_decode(
    query: DecodeQuery, body: bytes, bundle: Bundle, serving: AppState, file_format: ImageFormat
) -> tuple[UpscaleParams, bytes]:
    """What to decode, and the job's input blob.

    Raises:
        GiantleapError: the tensor cannot be read, was scaled for another VAE, or is beyond a limit.
    """
    scaled = query.do_scaling or query.scaling_factor is not None
    require_factors(query, bundle.latent_space, scaled)
    tensor = wrap_tensor(_DTYPES[query.dtype], query.shape, body)
    size = {"width": query.width, "height": query.height}
    if not scaled and bundle.latent_space.is_packed and query.height is not None:
        # Scaled back by the client, but still packed.
        plain = replace(bundle.latent_space, scale=1.0, shift=0.0, mean=None, std=None, statistics_in_vae=False)
        try:
            tensor = to_blob(plain.to_raw(_batched(read_latent(tensor, SAFETENSORS_TYPE)), query.height, query.width))
        except LatentSpaceError as error:
            raise InvalidFields(("shape", str(error))) from error
        size = {}
    asked = {"scale": query.scale, "method": query.method, "decode": query.decode, "scaled": scaled}
    return prepare_upscale(
        validate_as(UpscaleQuery, asked | size),
        tensor,
        SAFETENSORS_TYPE,
        bundle,
        serving.settings,
        file_format,
        serving.places(bundle.name),
    )


def _batched(tokens: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return tokens[None] if tokens.ndim == 2 else tokens


def require_factors(query: ScalingQuery, space: LatentSpace, scaled: bool) -> None:
    """Check the factors that were sent against the bundle's own, which are then used.

    Raises:
        InvalidFields: one differs, is missing, or means nothing in this latent space.
    """
    found = []
    if query.scaling_factor is not None:
        if space.mean is not None or space.statistics_in_vae:
            found.append(("scaling_factor", f"means nothing in latent space {space.name}; send do_scaling=true"))
        elif not math.isclose(query.scaling_factor, space.scale, rel_tol=1e-3):
            found.append(("scaling_factor", f"is {query.scaling_factor}; latent space {space.name} has {space.scale}"))
        elif query.shift_factor is None and space.shift != 0.0:
            found.append(("shift_factor", f"is missing; latent space {space.name} has {space.shift}"))
    if query.shift_factor is not None:
        if not scaled:
            found.append(("shift_factor", "goes with a scaling_factor, which is missing"))
        elif not math.isclose(query.shift_factor, space.shift, rel_tol=1e-3):
            found.append(("shift_factor", f"is {query.shift_factor}; latent space {space.name} has {space.shift}"))
    if found:
        raise InvalidFields(*tuple(found))


def to_tensor(files: list[bytes], form: PixelForm) -> npt.NDArray[np.generic]:
    """The pixels of PNG files as diffusers hands them out. Values are those of 8 bits, whatever the form.

    Shape: [B, H, W, 3] uint8, or [B, 3, H, W] float16.
    """
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    if form == "bytes":
        return pixels
    values = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255
    return (values if form == "zero_one" else 2 * values - 1).astype("<f2")


def tensor_answer(record: JobRecord, tensor: npt.NDArray[np.generic]) -> Response:
    """The tensor's bytes; `shape` and `dtype` are headers."""
    headers = response_headers(record) | {"shape": json.dumps(list(tensor.shape)), "dtype": tensor.dtype.name}
    return Response(tensor.tobytes(), 200, headers, TENSOR_TYPE)


@router.post(
    "/{bundle}/encode",
    response_class=Response,
    responses=describe_errors(RemoteVaeError, *_STATUSES, good={"content": file_content(TENSOR_TYPE)}),
    openapi_extra={"requestBody": {"required": True, "content": file_content("image/png", OCTETS_TYPE)}},
)
async def post_encode(
    bundle: str, request: Request, query: Annotated[EncodeQuery, Query()], serving: AppStateDep, terms: TermsDep
) -> Response:
    """Encode an image file to its posterior mean: float32 [1, C, h, w], raw, or scaled where the factors are sent."""
    served = find_bundle(serving, bundle)
    if query.shape is not None or query.dtype is not None:
        raise UnsupportedMediaType("the image is a tensor; send an image file: PNG, JPEG or WebP")
    scaled = query.scaling_factor is not None
    require_factors(query, served.bundle.latent_space, scaled)
    body = await request.body()
    content_type = request.headers.get("content-type", OCTETS_TYPE)
    params, blob = await asyncio.to_thread(plan_encode, body, content_type, served.bundle, serving)
    ended = await run_job(request, serving, new_job(served, params, terms.cancel_after_s), blob, terms.key)
    if isinstance(ended, Response):
        return ended
    latent = stack_latents(await read_results(serving, ended))
    space = served.bundle.latent_space
    return tensor_answer(ended, ((latent - space.shift) * space.scale if scaled else latent).astype("<f4"))


def plan_encode(body: bytes, content_type: str, bundle: Bundle, serving: AppState) -> tuple[UpscaleParams, bytes]:
    """The image as a job that ends with its latent.

    Raises:
        GiantleapError: it is no image file, too large, or has sides that make no whole latent.
    """
    query = validate_as(UpscaleQuery, {"scale": 1, "output": "latent"})
    places = serving.places(bundle.name)
    params, blob = prepare_upscale(query, body, content_type, bundle, serving.settings, "png", places)
    width_px, height_px, multiple_px = params.image_width_px, params.image_height_px, bundle.latent_space.multiple_px
    if width_px is None or height_px is None:
        raise InvalidRequest("the body is a latent; send an image file")
    if width_px % multiple_px or height_px % multiple_px:
        raise InvalidRequest(f"the image has {width_px}x{height_px} pixels; send sides in multiples of {multiple_px}")
    return params, blob


def _require_type(request: Request, *allowed: str) -> None:
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared not in allowed:
        raise UnsupportedMediaType(f"content type {declared[:80]!r}; send {' or '.join(allowed)}")
