"""A row of a batch job, converted to the parameters of a service job: the same checks, the same errors."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from pydantic import ValidationError

from giantleap.batch.store import BatchError
from giantleap.models.bundle.bundle import Bundle
from giantleap.models.bundle.descriptor import Method
from giantleap.models.pixels.image_formats import ImageFormat
from giantleap.service.errors import GiantleapError, InvalidFields, validation_problem
from giantleap.service.jobs.images import is_image
from giantleap.service.jobs.job import JobParams
from giantleap.service.jobs.planning import choose_method, choose_scale, plan_generate, prepare_upscale
from giantleap.service.jobs.requests import GenerateRequest, UpscaleQuery
from giantleap.service.settings import Settings

PROMPT_FIELDS: Final = ("negative_prompt", "seed", "width", "height", "steps", "guidance_scale")
"""Options that a row with a prompt may set."""
BODY_FIELDS: Final = ("width", "height")
"""Options that a row with a packed latent may set: the size of its image."""
_KEY: Final = re.compile(r"(?!/|_batch/)[^\x00-\x1f\x7f\\]{1,200}")

OutputKind = Literal["images", "latents"]


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt, or a file that holds a latent or an image.

    Attributes:
        key: Names the output.
        prompt: None for a file.
        body: The file; None for a prompt.
        fields: Of `PROMPT_FIELDS` or `BODY_FIELDS`.
        error: Why the row could not be read; then it has neither.
    """

    key: str
    prompt: str | None = None
    body: bytes | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """The options of all rows of a job, on which the outputs depend.

    Attributes:
        scale: None for the bundle's default; so `method`.
        width_px: Of the final images of prompts; None for the bundle's default; so `height_px`.
        seed: With the key of a row gives its seed.
        scaled: Latents are as pipelines return them, not raw.
        batch_size: Most rows that run together.
        shard_rows: Rows that a process claims and sorts at once.
    """

    scale: float | None = None
    method: Method | None = None
    width_px: int | None = None
    height_px: int | None = None
    seed: int = 0
    scaled: bool = False
    out: OutputKind = "images"
    format: ImageFormat = "png"
    batch_size: int = 8
    shard_rows: int = 256

    @property
    def suffix(self) -> str:
        """The suffix of output files."""
        return ".safetensors" if self.out == "latents" else {"jpeg": ".jpg"}.get(self.format, f".{self.format}")

    def to_job(self, bundle: Bundle) -> dict[str, Any]:
        """The record in the output that keeps other jobs from writing into it."""
        return {"bundle": bundle.name, **asdict(self)}


def check_options(options: BatchOptions, bundle: Bundle) -> None:
    """Refuse options that would fail in every row.

    Raises:
        BatchError: The bundle lacks the method or the scale, or the method makes no latents.
    """
    try:
        method = choose_method(bundle, options.method)
        choose_scale(bundle, method, options.scale)
    except InvalidFields as error:
        raise BatchError(error.detail) from error
    if options.out == "latents" and method == "swinir":
        raise BatchError("out: is latents, but method swinir enlarges pixels; choose another method")


def row_seed(seed: int, key: str) -> int:
    """The seed of a row, 63 bits: it depends on nothing but the seed of the job and the key."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8]) >> 1


def plan_row(row: Row, options: BatchOptions, bundle: Bundle, settings: Settings) -> tuple[JobParams, bytes | None]:
    """Convert a row to the parameters and the input of a job.

    Raises:
        BatchError: The row cannot be read, or the service would refuse it.
    """
    if row.error is not None:
        raise BatchError(row.error)
    if not _KEY.fullmatch(row.key) or ".." in row.key.split("/"):
        raise BatchError("the key cannot be the name of a file: use letters, digits, - _ . and /")
    try:
        if row.body is None:
            return _plan_prompt(row, options, bundle, settings), None
        return _plan_body(row, row.body, options, bundle, settings)
    except ValidationError as error:
        raise BatchError(validation_problem(error.errors()).detail) from error
    except (ValueError, GiantleapError) as error:
        raise BatchError(" ".join(str(error).split())) from error


def _plan_prompt(row: Row, options: BatchOptions, bundle: Bundle, settings: Settings) -> JobParams:
    given = {"width": options.width_px, "height": options.height_px, "seed": row_seed(options.seed, row.key)}
    own = {name: row.fields[name] for name in PROMPT_FIELDS if row.fields.get(name) is not None}
    request = GenerateRequest.model_validate(
        given | own | {"prompt": row.prompt, "scale": options.scale, "method": options.method}
    )
    assert request.seed is not None, "given above"
    return plan_generate(request, bundle, settings, request.seed, options.format)


def _plan_body(
    row: Row, body: bytes, options: BatchOptions, bundle: Bundle, settings: Settings
) -> tuple[JobParams, bytes]:
    of_latent = {"scaled": options.scaled, **{name: row.fields.get(name) for name in BODY_FIELDS}}
    query = UpscaleQuery.model_validate(
        {
            "scale": options.scale,
            "method": options.method,
            "output": "latent" if options.out == "latents" else "image",
            **({} if is_image(body, None) else of_latent),
        }
    )
    params, blob = prepare_upscale(query, body, None, bundle, settings, options.format)
    if params.batch_items != 1:
        raise BatchError(f"the file holds {params.batch_items} latents; a row is a file with one")
    return params, blob
