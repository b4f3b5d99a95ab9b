"""The items of a batch: their inputs for the route, and their outputs.

`giantleap.service.worker.batch_runner` runs them; `giantleap.service.worker.settlement` ends their jobs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType

import safetensors.torch
import torch
from torch import Tensor

from giantleap.models.adapters.files import AdapterError
from giantleap.models.device import is_out_of_memory
from giantleap.models.filters.chain import FilterChain, FilterFailed, ImageRefused
from giantleap.models.generation.items import GenerationItem, image_seed
from giantleap.models.pixels.image_formats import CONTENT_TYPES
from giantleap.models.pixels.images import finite_items, to_signed
from giantleap.models.provenance.marker import ImageMarker
from giantleap.service.errors import BlockedByFilter, EngineFault, FilterFault, GiantleapError, JobFailed
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobs.edits.inputs import read_input
from giantleap.service.jobs.grid import count_items
from giantleap.service.jobs.images import Pixels, read_image
from giantleap.service.jobs.job import GenerateParams, JobError, JobParams, ResultFile, UpscaleParams
from giantleap.service.jobs.latents import LATENT_TENSOR
from giantleap.service.jobs.marking import to_origin
from giantleap.service.jobs.media_types import SAFETENSORS_TYPE
from giantleap.service.worker.outputs.filters import to_context


class Stop(Enum):
    """Why an item did not run to its end without being at fault."""

    CANCELED = "canceled"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a job in a batch."""

    claim: Claim
    index: int


@dataclass(frozen=True, slots=True)
class Output:
    """The result file of one item."""

    file: ResultFile
    content: bytes


@dataclass(frozen=True, slots=True)
class RawOutput:
    """The output of one item before encoding, on the CPU: pixels [height_px, width_px, 3], uint8, or a latent."""

    values: Tensor


@dataclass(frozen=True, slots=True)
class Latent:
    """The result of an item that another worker decodes: a raw latent [channels, h, w], float32, on the CPU."""

    values: Tensor


_CAUSES: Mapping[type[Exception], type[GiantleapError]] = MappingProxyType(
    {AdapterError: JobFailed, ImageRefused: BlockedByFilter, FilterFailed: FilterFault}
)
"""The text for clients of errors that the models raise, where they may see it."""

Outcome = Output | Latent | JobError | Stop


def to_items(claims: Sequence[Claim]) -> list[Item]:
    """The images that the jobs of a batch request, in order."""
    return [Item(claim, index) for claim in claims for index in range(count_items(claim.job.params))]


def to_job_error(error: Exception) -> JobError:
    """The error that the client of a job sees; an unexpected exception only by its type, since its text may quote."""
    if is_out_of_memory(error):
        error = EngineFault("the device ran out of memory for this job alone; ask for fewer or smaller images")
    for cause, kind in _CAUSES.items():
        if isinstance(error, cause):
            error = kind(str(error))
    if isinstance(error, GiantleapError):
        return JobError(error.code, error.detail, error.retryable)
    return JobError("engine_error", f"the engine raised {type(error).__name__}; the worker's log has the traceback")


def to_generation_item(item: Item) -> GenerationItem:
    """The input of the generator for one image of a job: to generate it, and to refine it."""
    params = item.claim.job.params
    if isinstance(params, UpscaleParams):
        return _to_refine_item(params, item.index)
    return build_generation_item(params, item.index, item.claim.body or b"")


def build_generation_item(params: GenerateParams, index: int, blob: bytes) -> GenerationItem:
    """The input of the generator for image `index` of a job with an input blob."""
    width_px, height_px = params.base_size_px
    generation = GenerationItem(
        prompt=params.prompt,
        negative_prompt=params.negative_prompt,
        seed=image_seed(params.seed, index),
        width_px=width_px,
        height_px=height_px,
        steps=params.steps,
        guidance_scale=params.guidance_scale,
        refine=params.refine,
        loras=params.loras,
        previews=params.previews,
    )
    images = read_input(blob, params)
    generation = replace(generation, references=tuple(map(torch.from_numpy, images.references)))
    if params.strength is None or images.init_image is None:
        return generation
    start, mask = to_signed(torch.from_numpy(images.init_image)), None
    if images.mask is not None:
        mask = torch.from_numpy(images.mask)[None].float()
    return replace(generation, init_image=start, strength=params.strength, mask=mask)


def _to_refine_item(params: UpscaleParams, index: int) -> GenerationItem:
    assert params.refine is not None and params.seed is not None
    return GenerationItem(
        prompt=params.prompt,
        negative_prompt=params.negative_prompt,
        seed=image_seed(params.seed, index),
        width_px=0,  # that of the enlarged latent
        height_px=0,
        steps=params.refine.steps,
        guidance_scale=params.guidance_scale,
        refine=params.refine,
    )


def read_latent(item: Item) -> Tensor:
    """The latent of one item from the job's input blob, [channels, h, w], float32."""
    # The blob is float16 where that is exact (`giantleap.service.jobs.latents.to_blob`); a batch may hold both types.
    return safetensors.torch.load(item.claim.body or b"")[LATENT_TENSOR][item.index].float()


def read_pixels(item: Item) -> Pixels:
    """The image of one item from the job's input blob."""
    params = item.claim.job.params
    assert isinstance(params, UpscaleParams) and params.image_width_px and params.image_height_px
    return read_image(item.claim.body or b"", params.image_width_px * params.image_height_px)


def has_input_image(params: JobParams) -> bool:
    """Whether the job upscales an image, not a latent."""
    return isinstance(params, UpscaleParams) and params.image_width_px is not None


def wants_image(params: JobParams) -> bool:
    """Whether the job's results are images, not latents."""
    return isinstance(params, GenerateParams) or params.output == "image"


def to_latents_blob(latents: Sequence[Latent]) -> bytes:
    """The latents of a job as an input blob for another worker; `read_latent` reads the same bits."""
    return safetensors.torch.save({LATENT_TENSOR: torch.stack([latent.values for latent in latents]).contiguous()})


def check_image(item: Item, pixels: Tensor | None, filters: FilterChain) -> RawOutput | JobError:
    """The pixels of one item; an error if they were not finite, or a filter, which may use the device, refuses them."""
    if pixels is None:
        return to_job_error(JobFailed("the decoded image has values that are not finite; try another seed or input"))
    try:
        filters.check(pixels, to_context(item.claim.job.params, item.claim.job.bundle, pixels))
    except (ImageRefused, FilterFailed) as error:
        return to_job_error(error)
    return RawOutput(pixels)


def encode(item: Item, raw: RawOutput, marker: ImageMarker) -> Output | JobError:
    """The result file of one item."""
    if wants_image(item.claim.job.params):
        return to_image_output(item, raw.values, marker)
    return to_latent_output(item, raw.values)


def to_image_output(item: Item, pixels: Tensor, marker: ImageMarker) -> Output:
    """The image file of one item."""
    params, seed = item.claim.job.params, _seed_of(item)
    origin = to_origin(params, item.claim.job.bundle, seed)
    content = marker.to_file(pixels, params.output_format, origin, params.file)
    height_px, width_px = pixels.shape[:2]
    return Output(ResultFile(CONTENT_TYPES[params.output_format], len(content), seed, width_px, height_px), content)


def to_latent_output(item: Item, latent: Tensor) -> Output | JobError:
    """The latent file of one item; an error if its values are not finite."""
    params = item.claim.job.params
    if not finite_items(latent[None])[0]:
        return to_job_error(JobFailed("the upscaled latent has values that are not finite; check the input"))
    shaped = latent[:, None] if isinstance(params, UpscaleParams) and params.one_frame else latent
    content = safetensors.torch.save({LATENT_TENSOR: shaped.float().contiguous()})
    return Output(ResultFile(SAFETENSORS_TYPE, len(content), _seed_of(item)), content)


def _seed_of(item: Item) -> int | None:
    """The seed of one image; None where nothing random was done."""
    seed = item.claim.job.params.seed
    return None if seed is None else image_seed(seed, item.index)
