"""Hugging Face's remote VAE: the requests of diffusers' `remote_decode` and `remote_encode`, over the same jobs.

The body is the bytes of a tensor; the query has its shape, its dtype and how it was scaled (diffusers 0.42,
`diffusers/utils/remote_utils.py`). With `?scale=2` in the endpoint's address the latent is enlarged before its decode,
which no other remote VAE does.
"""

import asyncio
import io
import json
import math
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Query, Request, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from giantleap.models.bundle.descriptor import DecodeName
from giantleap.models.latent_space import LatentSpace, LatentSpaceError
from giantleap.models.pixels.image_formats import Compression, ImageFormat
from giantleap.service.api.compat.shared import find_bundle, stack_latents, validate_as
from giantleap.service.api.dependencies import AppState, AppStateDep
from giantleap.service.api.openapi import IMAGE_TYPES, describe_responses, file_content
from giantleap.service.api.paths import REMOTE_VAE_PATH
from giantleap.service.api.responses import read_results, result_headers
from giantleap.service.api.submission import (
    CompatOptionsDep,
    new_job,
    require_media_type,
    run_in_thread_if_large,
    run_job,
)
from giantleap.service.errors import InvalidFields, InvalidRequest, UnsupportedMediaType
from giantleap.service.jobs.bundles import ServedBundle
from giantleap.service.jobs.fields import FormatName, Integer
from giantleap.service.jobs.job import JobRecord, UpscaleParams
from giantleap.service.jobs.latents import read_latent, to_blob, wrap_tensor
from giantleap.service.jobs.media_types import OCTETS_TYPE, SAFETENSORS_TYPE
from giantleap.service.jobs.requests import CompressionField, QualityField, Scale, UpscaleQuery

router = APIRouter(prefix=REMOTE_VAE_PATH, tags=["remote VAE"])

PixelForm = Literal["bytes", "zero_one", "minus_one_one"]

TENSOR_TYPE = "tensor/binary"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class RemoteVaeError(BaseModel):
    """An error."""

    error: str
    code: str = Field(examples=["queue_full"])


def _responses(*media_types: str) -> dict[int | str, dict[str, Any]]:
    statuses = (400, 404, 413, 415, 422, 429, 503, 504)
    return describe_responses({200: {"content": file_content(*media_types)}}, *statuses, model=RemoteVaeError)


class ScalingQuery(BaseModel):
    """How a latent is scaled. A factor that is not the bundle's is refused: the latent is of another VAE."""

    model_config = ConfigDict(frozen=True)

    scaling_factor: float | None = Field(default=None, allow_inf_nan=False)
    shift_factor: float | None = Field(default=None, allow_inf_nan=False)


class EncodeQuery(ScalingQuery):
    """The query of `remote_encode`; `shape` and `dtype` come with an image that is a tensor, which is refused."""

    shape: list[int] | None = Field(default=None, description="Refused: the body is an image file.")
    dtype: str | None = Field(default=None, description="Refused.")


class DecodeQuery(ScalingQuery):
    """The query of `remote_decode`, and our own scale, method, decode, compression and quality."""

    shape: list[int] = Field(min_length=1, max_length=5)
    dtype: Literal["float32", "float16", "bfloat16"]
    do_scaling: bool = Field(
        default=False, description="Whether the latent is scaled as the bundle's pipeline returns it."
    )
    output_type: Literal["pil", "pt"] = Field(default="pil", description="A file, or the bytes of a tensor.")
    image_format: FormatName = Field(default="jpeg", description="File format with output_type pil; jpg is jpeg.")
    input_tensor_type: Literal["binary"] = Field(default="binary", description="Older clients send it.")
    output_tensor_type: Literal["binary"] = Field(default="binary", description="Older clients send it.")
    partial_postprocess: bool = Field(
        default=False, description="With output_type pt: uint8 [B, H, W, 3]; else float16 [B, 3, H, W] in [-1, 1]."
    )
    height: int | None = Field(default=None, description="Height of the image of a packed latent, pixels.")
    width: int | None = None
    scale: Scale = Field(default=1, description="Scale factor of the upscale before the decode.")
    method: Literal["lua", "bicubic", "swinir"] | None = None
    decode: DecodeName = "exact"
    compression: Compression | None = CompressionField
    quality: Integer | None = QualityField


@router.post(
    "/{bundle}/decode",
    response_class=Response,
    responses=_responses(*IMAGE_TYPES, TENSOR_TYPE),
    openapi_extra={"requestBody": {"required": True, "content": file_content(TENSOR_TYPE, OCTETS_TYPE)}},
)
async def post_decode(
    bundle: str, request: Request, query: Annotated[DecodeQuery, Query()], state: AppStateDep, options: CompatOptionsDep
) -> Response:
    """Decode a latent, after upscaling it if a scale is given."""
    served = find_bundle(state, bundle)
    require_media_type(request, TENSOR_TYPE, OCTETS_TYPE)
    body = await request.body()
    # diffusers sends output_type "pil" but accepts only tensors where it postprocesses the image itself.
    floats = query.output_type == "pil" and request.headers.get("accept") == TENSOR_TYPE
    as_tensor = floats or query.output_type == "pt"
    file_format: ImageFormat = "png" if as_tensor else query.image_format
    params, blob = await run_in_thread_if_large(len(body), plan_decode, query, body, served, state, file_format)
    if not as_tensor and params.batch_items != 1:
        raise InvalidFields(("shape", f"has {params.batch_items} latents, but a file holds one image; request pt"))
    record = await run_job(request, state, new_job(served, params, options), blob, options)
    results = await read_results(state, record)
    if not as_tensor:
        return Response(results[0], 200, result_headers(record), record.results[0].content_type)
    form: PixelForm = "zero_one" if floats else "bytes" if query.partial_postprocess else "minus_one_one"
    return tensor_response(record, await asyncio.to_thread(to_tensor, results, form))


def plan_decode(
    query: DecodeQuery, body: bytes, served: ServedBundle, state: AppState, file_format: ImageFormat
) -> tuple[UpscaleParams, bytes]:
    """The parameters of the job, and its input blob.

    Raises:
        GiantleapError: The tensor cannot be read, was scaled for another VAE, or is over a limit.
    """
    space = served.bundle.latent_space
    scaled = query.do_scaling or query.scaling_factor is not None
    check_factors(query, space, scaled)
    tensor = wrap_tensor(_DTYPES[query.dtype], query.shape, body)
    size = {"width": query.width, "height": query.height}
    if not scaled and space.is_token_row(query.shape) and query.height is not None:
        # The client has undone the scaling but not the packing.
        plain = replace(space, scale=1.0, shift=0.0, mean=None, std=None, statistics_in_vae=False)
        tokens = read_latent(tensor, SAFETENSORS_TYPE)
        try:
            raw = plain.to_raw(tokens[None] if tokens.ndim == 2 else tokens, query.height, query.width)
        except LatentSpaceError as error:
            raise InvalidFields(("shape", str(error))) from error
        tensor, size = to_blob(raw), {}
    values = {name: getattr(query, name) for name in ("scale", "method", "decode", "compression", "quality")}
    values["scaled"] = scaled
    return state.prepare_upscale(
        validate_as(UpscaleQuery, values | size), tensor, SAFETENSORS_TYPE, served, file_format
    )


def check_factors(query: ScalingQuery, space: LatentSpace, scaled: bool) -> None:
    """Compare the factors of the request with the bundle's own, which are then used.

    Raises:
        InvalidFields: One differs, is missing, or has no meaning in this latent space.
    """
    faults = []
    if query.scaling_factor is not None:
        if space.mean is not None or space.statistics_in_vae:
            faults.append(("scaling_factor", f"has no meaning in latent space {space.name}; send do_scaling=true"))
        elif not math.isclose(query.scaling_factor, space.scale, rel_tol=1e-3):
            faults.append(("scaling_factor", f"is {query.scaling_factor}; latent space {space.name} has {space.scale}"))
        elif query.shift_factor is None and space.shift != 0.0:
            faults.append(("shift_factor", f"is missing; latent space {space.name} has {space.shift}"))
    if query.shift_factor is not None:
        if not scaled:
            faults.append(("shift_factor", "needs a scaling_factor, which is missing"))
        elif not math.isclose(query.shift_factor, space.shift, rel_tol=1e-3):
            faults.append(("shift_factor", f"is {query.shift_factor}; latent space {space.name} has {space.shift}"))
    if faults:
        raise InvalidFields(*faults)


def to_tensor(files: list[bytes], form: PixelForm) -> npt.NDArray[np.generic]:
    """The pixels of PNG files in the forms of diffusers; all have the precision of 8 bits.

    Shape:
        [B, H, W, 3] uint8, or [B, 3, H, W] float16.
    """
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    if form == "bytes":
        return pixels
    values = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255
    return (values if form == "zero_one" else 2 * values - 1).astype("<f2")


def tensor_response(record: JobRecord, tensor: npt.NDArray[np.generic]) -> Response:
    """The tensor's bytes; its shape and dtype are headers."""
    headers = result_headers(record) | {"shape": json.dumps(list(tensor.shape)), "dtype": tensor.dtype.name}
    return Response(tensor.tobytes(), 200, headers, TENSOR_TYPE)


@router.post(
    "/{bundle}/encode",
    response_class=Response,
    responses=_responses(TENSOR_TYPE),
    openapi_extra={"requestBody": {"required": True, "content": file_content("image/png", OCTETS_TYPE)}},
)
async def post_encode(
    bundle: str, request: Request, query: Annotated[EncodeQuery, Query()], state: AppStateDep, options: CompatOptionsDep
) -> Response:
    """Encode an image file to its posterior mean: float32 [1, C, h, w], raw, or scaled where the factors are sent."""
    served = find_bundle(state, bundle)
    if query.shape is not None or query.dtype is not None:
        raise UnsupportedMediaType("the image is a tensor; send an image file: PNG, JPEG or WebP")
    space, scaled = served.bundle.latent_space, query.scaling_factor is not None
    check_factors(query, space, scaled)
    body = await request.body()
    content_type = request.headers.get("content-type", OCTETS_TYPE)
    params, blob = await asyncio.to_thread(plan_encode, body, content_type, served, state)
    record = await run_job(request, state, new_job(served, params, options), blob, options)
    latent = stack_latents(await read_results(state, record))
    return tensor_response(record, ((latent - space.shift) * space.scale if scaled else latent).astype("<f4"))


def plan_encode(body: bytes, content_type: str, served: ServedBundle, state: AppState) -> tuple[UpscaleParams, bytes]:
    """An image as a job that returns its latent.

    Raises:
        GiantleapError: It is not an image file, too large, or has sides that make no whole latent.
    """
    query = validate_as(UpscaleQuery, {"scale": 1, "output": "latent"})
    params, blob = state.prepare_upscale(query, body, content_type, served, "png")
    width_px, height_px = params.image_width_px, params.image_height_px
    multiple_px = served.bundle.latent_space.multiple_px
    if width_px is None or height_px is None:
        raise InvalidRequest("the body is a latent; send an image file")
    if width_px % multiple_px or height_px % multiple_px:
        raise InvalidRequest(f"the image has {width_px}x{height_px} pixels; send sides in multiples of {multiple_px}")
    return params, blob
