"""KServe v2, the Open Inference Protocol: a latent in, the larger latent or its images out, over the same jobs.

A bundle is a model. Its one input is `latent`; of its two outputs, `latent` and `image`, a request gets the one that it
names. Tensors are JSON numbers or follow the JSON as bytes (the binary tensor extension).
`docs/compatibility.md` lists the parameters.
"""

import asyncio
import base64
import json
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Header, Request, Response
from pydantic import BaseModel, Field, ValidationError

from giantleap.models.lua.spec import scaled_size
from giantleap.service.api.compat.shared import find_bundle, stack_latents, validate_as
from giantleap.service.api.dependencies import AppState, AppStateDep
from giantleap.service.api.negotiation import MAX_CANCEL_AFTER_S
from giantleap.service.api.openapi import describe_responses, file_content
from giantleap.service.api.paths import KSERVE_PATH
from giantleap.service.api.responses import read_results, result_headers
from giantleap.service.api.submission import (
    CompatOptionsDep,
    new_job,
    require_media_type,
    run_in_thread_if_large,
    run_job,
)
from giantleap.service.errors import (
    InvalidFields,
    MalformedRequest,
    NotReady,
    PayloadTooLarge,
    validation_problem,
)
from giantleap.service.jobs.bundles import ServedBundle
from giantleap.service.jobs.fields import FormatName, Integer, JsonRequest
from giantleap.service.jobs.job import JobRecord, Priority, UpscaleParams
from giantleap.service.jobs.latents import wrap_tensor
from giantleap.service.jobs.media_types import JSON_TYPE, OCTETS_TYPE, SAFETENSORS_TYPE
from giantleap.service.jobs.requests import Scale, UpscaleQuery

router = APIRouter(prefix=KSERVE_PATH, tags=["KServe v2"])

# JSON numbers take up to 30 times their size once parsed; a latent that is larger than this goes as bytes.
MAX_JSON_BYTES = 8 << 20
MAX_JSON_VALUES = 1 << 20
MAX_JSON_NAMES = 1024
_DATATYPES = {"FP32": "F32", "FP16": "F16", "BF16": "BF16"}


class InputParameters(JsonRequest):
    """Parameters of the input."""

    binary_data_size: Integer | None = Field(default=None, ge=0, description="Bytes of this tensor after the JSON.")


class InferInput(JsonRequest):
    """The latent to upscale."""

    name: Literal["latent"]
    datatype: Literal["FP32", "FP16", "BF16"]
    shape: list[Integer] = Field(min_length=1, max_length=5)
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = Field(default=None, description="Numbers, flat or nested; only FP32.")


class OutputParameters(JsonRequest):
    """Parameters of an output."""

    binary_data: bool | None = Field(default=None, description="Send this output as bytes after the JSON.")


class InferOutput(JsonRequest):
    """The requested output."""

    name: Literal["latent", "image"]
    parameters: OutputParameters = OutputParameters()


class InferParameters(JsonRequest):
    """How to upscale; each as in the query of /upscale."""

    scale: Scale | None = None
    method: str | None = None
    scaled: bool = False
    latent_space: str | None = None
    decode: str | None = None
    width: Integer | None = None
    height: Integer | None = None
    output_format: FormatName | None = Field(default=None, description="Format of the output image; default: png.")
    compression: str | None = None
    quality: Integer | None = None
    priority: Integer = Field(default=0, ge=0, le=2, description="0 and 1: high; 2: low.")
    timeout: Integer | None = Field(
        default=None, ge=1, le=MAX_CANCEL_AFTER_S * 10**6, description="Deadline in microseconds, like Cancel-After."
    )
    binary_data_output: bool = Field(
        default=False, description="Send outputs as bytes unless an output sets `binary_data`."
    )


class InferRequest(JsonRequest):
    """An inference request of one input and one output."""

    id: str | None = Field(default=None, max_length=256)
    parameters: InferParameters = InferParameters()
    inputs: list[InferInput] = Field(min_length=1, max_length=1)
    outputs: list[InferOutput] = Field([InferOutput(name="latent")], min_length=1, max_length=1)


class KServeError(BaseModel):
    """An error."""

    error: str


class TensorMetadata(BaseModel):
    """A tensor of a model."""

    name: str
    datatype: str
    shape: list[int] = Field(description="Shape; -1: any size.")


class ServerMetadata(BaseModel):
    """The server and its extensions."""

    name: str
    version: str
    extensions: list[str]


class ModelMetadata(BaseModel):
    """A bundle as a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerLive(BaseModel):
    """Whether this process answers."""

    live: bool


class ServerReady(BaseModel):
    """Whether requests are accepted."""

    ready: bool


class ModelReady(BaseModel):
    """Whether requests for a model are accepted."""

    name: str
    ready: bool


@dataclass(frozen=True, slots=True)
class Inference:
    """A request that was read and planned."""

    request: InferRequest
    params: UpscaleParams
    blob: bytes

    @property
    def output(self) -> InferOutput:
        """The one output that the request names."""
        return self.request.outputs[0]

    @property
    def binary(self) -> bool:
        """Whether the output follows the JSON as bytes."""
        requested = self.output.parameters.binary_data
        return self.request.parameters.binary_data_output if requested is None else requested


@router.get("")
async def get_server() -> ServerMetadata:
    """Name, version and extensions of this server."""
    return ServerMetadata(name="giantleap", version=version("giantleap"), extensions=["binary_tensor_data"])


@router.get("/health/live")
async def get_live() -> ServerLive:
    """Liveness of this process."""
    return ServerLive(live=True)


@router.get("/health/ready", responses=describe_responses({}, 503, model=KServeError))
async def get_ready(state: AppStateDep) -> ServerReady:
    """Readiness of the service."""
    await _require_ready(state)
    return ServerReady(ready=True)


@router.get("/models/{model}", responses=describe_responses({}, 404, model=KServeError))
async def get_model(model: str, state: AppStateDep) -> ModelMetadata:
    """Inputs and outputs of a bundle: raw latents, and image files."""
    bundle = find_bundle(state, model).bundle
    latent = TensorMetadata(name="latent", datatype="FP32", shape=[-1, bundle.latent_space.channels, -1, -1])
    image = TensorMetadata(name="image", datatype="BYTES", shape=[-1])
    return ModelMetadata(name=model, versions=[], platform="giantleap", inputs=[latent], outputs=[latent, image])


@router.get("/models/{model}/ready", responses=describe_responses({}, 404, 503, model=KServeError))
async def get_model_ready(model: str, state: AppStateDep) -> ModelReady:
    """Readiness of a bundle."""
    find_bundle(state, model)
    await _require_ready(state)
    return ModelReady(name=model, ready=True)


async def _require_ready(state: AppState) -> None:
    if reasons := await state.unready_reasons():
        raise NotReady("; ".join(reasons))


_EITHER_FORM: dict[str, Any] = {JSON_TYPE: {"schema": {"type": "object"}}} | file_content(OCTETS_TYPE)


@router.post(
    "/models/{model}/infer",
    response_class=Response,
    responses=describe_responses(
        {200: {"content": _EITHER_FORM}}, *(400, 404, 413, 415, 422, 429, 503, 504), model=KServeError
    ),
    openapi_extra={"requestBody": {"required": True, "content": _EITHER_FORM}},
)
async def post_infer(
    model: str,
    request: Request,
    state: AppStateDep,
    options: CompatOptionsDep,
    inference_header_content_length: Annotated[
        int | None, Header(ge=0, description="Length of the JSON in bytes, if a tensor follows it.")
    ] = None,
) -> Response:
    """Enlarge a latent: to the larger latent, or decoded once to images."""
    served = find_bundle(state, model)
    require_media_type(request, JSON_TYPE, OCTETS_TYPE, "")
    body = await request.body()
    inference = await run_in_thread_if_large(
        len(body), plan_infer, body, inference_header_content_length, served, state
    )
    parameters = inference.request.parameters
    deadline_s = choose_deadline(options.cancel_after_s, parameters.timeout)
    priority = Priority.LOW if parameters.priority == 2 else Priority.HIGH
    job = new_job(served, inference.params, replace(options, cancel_after_s=deadline_s), priority=priority)
    record = await run_job(request, state, job, inference.blob, options)
    return await asyncio.to_thread(write_infer, inference, record, await read_results(state, record))


def choose_deadline(cancel_after_s: float | None, timeout_us: int | None) -> float | None:
    """The deadline of the header Cancel-After or of the parameter timeout, seconds.

    Raises:
        InvalidFields: Both are there.
    """
    if timeout_us is None:
        return cancel_after_s
    if cancel_after_s is not None:
        raise InvalidFields(("parameters.timeout", "conflicts with the header Cancel-After; send one of them"))
    return timeout_us / 1e6


def plan_infer(body: bytes, json_bytes: int | None, served: ServedBundle, state: AppState) -> Inference:
    """Read and check the whole request.

    Args:
        body: JSON, followed by the tensor's bytes unless `json_bytes` is None.
        json_bytes: Inference-Header-Content-Length.
        served: The bundle that the path names.
        state: State of the process.

    Raises:
        GiantleapError: It cannot be read, or a value is not valid or over a limit.
    """
    request = _read_request(body, json_bytes)
    tensor, parameters, output = request.inputs[0], request.parameters, request.outputs[0]
    if output.name == "latent" and parameters.output_format is not None:
        raise InvalidFields(("output_format", "applies to images; leave it out with the output latent"))
    latent = wrap_tensor(_DATATYPES[tensor.datatype], tensor.shape, _tensor_bytes(tensor, body, json_bytes))
    values = parameters.model_dump(exclude_none=True, exclude={"priority", "timeout", "binary_data_output"})
    query = validate_as(UpscaleQuery, values | {"output": output.name})
    file_format = parameters.output_format or "png"
    params, blob = state.prepare_upscale(query, latent, SAFETENSORS_TYPE, served, file_format)
    inference = Inference(request, params, blob)
    latent_px = scaled_size(params.latent_height, params.scale) * scaled_size(params.latent_width, params.scale)
    numbers = params.batch_items * params.channels * latent_px
    if output.name == "latent" and not inference.binary and numbers > MAX_JSON_VALUES:
        raise InvalidFields(("outputs", f"would be {numbers} JSON numbers; request binary_data"))
    return inference


def _read_request(body: bytes, json_bytes: int | None) -> InferRequest:
    text = body if json_bytes is None else body[:json_bytes]
    if json_bytes is not None and json_bytes > len(body):
        raise MalformedRequest(f"Inference-Header-Content-Length is {json_bytes}; the body has {len(body)} bytes")
    if len(text) > MAX_JSON_BYTES:
        raise PayloadTooLarge(f"the JSON has {len(text)} bytes; at most {MAX_JSON_BYTES}; send the tensor as bytes")
    if text.count(b":") > MAX_JSON_NAMES:
        raise PayloadTooLarge(f"the JSON has more than the {MAX_JSON_NAMES} names that are allowed")
    try:
        return InferRequest.model_validate_json(text)
    except ValidationError as error:
        raise validation_problem(error.errors(include_url=False, include_input=False)) from error


def _tensor_bytes(tensor: InferInput, body: bytes, json_bytes: int | None) -> bytes:
    """The tensor's bytes, from after the JSON or from its numbers."""
    size_bytes = tensor.parameters.binary_data_size
    if json_bytes is not None:
        if size_bytes is None or tensor.data is not None or size_bytes != len(body) - json_bytes:
            raise MalformedRequest(
                f"{len(body) - json_bytes} bytes follow the JSON; the input's binary_data_size must say so, and no data"
            )
        return body[json_bytes:]
    if tensor.data is None or size_bytes is not None:
        raise MalformedRequest("the input has no data; a tensor as bytes needs Inference-Header-Content-Length")
    if tensor.datatype != "FP32":
        raise InvalidFields(("inputs.0.datatype", f"is {tensor.datatype}, which has no JSON form; send bytes"))
    try:
        values = np.asarray(tensor.data)
    except ValueError as error:
        raise InvalidFields(("inputs.0.data", "has rows of different lengths")) from error
    if values.dtype.kind not in "iuf" or (values.ndim > 1 and list(values.shape) != tensor.shape):
        raise InvalidFields(("inputs.0.data", "must be numbers, flat or nested as the shape says"))
    with np.errstate(over="ignore"):  # overflow is refused as not finite
        return values.astype("<f4").tobytes()


def write_infer(inference: Inference, record: JobRecord, results: list[bytes]) -> Response:
    """The response: JSON with the output's numbers in it or its bytes after it; an image in JSON is base64 text."""
    described: dict[str, Any] = {"name": inference.output.name}
    following = b""
    if inference.output.name == "latent":
        latent = stack_latents(results)
        described |= {"datatype": "FP32", "shape": list(latent.shape)}
        if inference.binary:
            following = latent.astype("<f4").tobytes()
        else:
            described["data"] = latent.ravel().tolist()
    else:
        described |= {"datatype": "BYTES", "shape": [len(results)]}
        if inference.binary:
            following = b"".join(len(file).to_bytes(4, "little") + file for file in results)
        else:
            described["data"] = [base64.b64encode(file).decode() for file in results]
            described["parameters"] = {"content_type": "base64"}
    if inference.binary:
        described["parameters"] = {"binary_data_size": len(following)}
    params = record.job.params
    content = {
        "model_name": record.job.bundle,
        "parameters": {"job_id": record.job.id, "scale": params.scale, "method": params.method},
        "outputs": [described],
    }
    if inference.request.id is not None:
        content["id"] = inference.request.id
    text = json.dumps(content).encode()
    headers = result_headers(record)
    if inference.binary:
        headers["Inference-Header-Content-Length"] = str(len(text))
    return Response(text + following, 200, headers, OCTETS_TYPE if inference.binary else JSON_TYPE)
