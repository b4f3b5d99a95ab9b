"""Requests as pydantic models: the body of /generate, the query of /upscale.

Only the form is checked here: types and ranges that never change. `giantleap.service.jobs.planning` checks the values
against the bundle and the settings. Sizes are pixels of the final image.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from giantleap.models.bundle.descriptor import DecodeName, Method
from giantleap.models.generation.refinement import DEFAULT_STEPS, DEFAULT_STRENGTH, MAX_STRENGTH
from giantleap.models.lua.spec import to_scale
from giantleap.models.pixels.image_formats import Compression
from giantleap.service.jobs.fields import FormatName, Integer, JsonRequest, Pattern, Text, to_whole
from giantleap.service.jobs.job import FINAL_STATES, FinalState, Webhook

PriorityName = Literal["high", "low"]
MAX_SEED = 2**63 - 1
MAX_PREVIEWS = 10
_ANY_STATE = "|".join(FINAL_STATES)

SideField = Annotated[int | None, Field(ge=1, le=65_536, examples=[256]), BeforeValidator(to_whole)]


CompressionField: Any = Field(
    None, description="Compression of an image file: fast (default), or small: a smaller file, several times slower."
)
QualityField: Any = Field(
    None, ge=1, le=100, description="Quality of JPEG and WebP, 1 to 100; default: 95. PNG is lossless."
)
Scale = Annotated[float, Field(ge=1, le=64, allow_inf_nan=False), AfterValidator(to_scale)]
DecodeField: Any = Field(
    "exact",
    description="exact: the VAE's decode, in strips if memory requires it, with the same result; tiled: overlapping "
    "tiles, which change the image; tiny: a fast preview by a small decoder, if the bundle has one.",
)


Base64Image = Annotated[str, Field(min_length=1)]


class WebhookRequest(JsonRequest):
    """Where to post a signed notification when the job has ended."""

    url: str = Field(min_length=1, max_length=2048, description="http or https URL of a public address.")
    events: Annotated[tuple[FinalState, ...], Field(min_length=1, max_length=3, strict=False)] = Field(
        FINAL_STATES, description="Final states to report."
    )

    def to_webhook(self) -> Webhook:
        """The webhook as a job stores it."""
        return Webhook(self.url, self.events)


def _to_webhook(value: object) -> object:
    """A URL alone as a webhook for every final state."""
    return {"url": value} if isinstance(value, str) else value


class RefineRequest(JsonRequest):
    """A refine pass: a second, short sampling of the enlarged latent, which adds detail."""

    strength: float = Field(
        DEFAULT_STRENGTH,
        ge=0.0,
        le=MAX_STRENGTH,
        allow_inf_nan=False,
        description="Share of the noise schedule to run again; a larger share changes the image more; 0: no pass.",
    )
    steps: Integer = Field(DEFAULT_STEPS, ge=1, le=100, description="Denoising steps to run; start with 4 to 8.")


class LoraRequest(JsonRequest):
    """A LoRA for the images of one job."""

    name: str = Field(min_length=1, max_length=64, description="Name of a LoRA that GET /models lists for the bundle.")
    weight: float = Field(1.0, ge=-8.0, le=8.0, allow_inf_nan=False, description="Weight of the LoRA; 1: as trained.")


Loras = Annotated[tuple[LoraRequest, ...], Field(max_length=8, strict=False)]
LORAS_FIELD: Any = Field((), description="LoRAs for this job, each at most once.")


class GenerateRequest(JsonRequest):
    """A request to generate. Fields left out take the bundle's defaults (`GET /models`)."""

    prompt: Annotated[
        str,
        Field(min_length=1, examples=["a red sphere on a green floor"]),
        Pattern(r"\S", "is empty; describe the image"),
    ] = Field(description="Prompt.")
    negative_prompt: Text | None = Field(None, description="Negative prompt.")
    scale: Scale | None = Field(
        None, examples=[2], description="Scale factor, one that the bundle lists; 1: no upscaling."
    )
    width: SideField = Field(None, description="Width of the final image, pixels.")
    height: SideField = Field(None, description="Height of the final image, pixels.")
    steps: Integer | None = Field(None, ge=1, le=1000, description="Denoising steps.")
    guidance_scale: float | None = Field(
        None, ge=0.0, le=100.0, allow_inf_nan=False, description="Guidance scale; 1 or less: no guidance."
    )
    seed: Integer | None = Field(
        None, ge=0, le=MAX_SEED, description="Seed of the first image; image i uses seed + i; default: random."
    )
    num_images: Integer = Field(1, ge=1, description="Number of images.")
    bundle: str | None = Field(None, max_length=128, description="Name of a bundle; the first one if left out.")
    output_format: FormatName | None = Field(
        None, description="Format of the image file; default: the one in Accept, else png."
    )
    compression: Compression | None = CompressionField
    quality: Integer | None = QualityField
    priority: PriorityName = Field("high", description="high is claimed before low.")
    method: Method | None = Field(
        None,
        description="lua: upscale the latent, decode once; bicubic: the same by interpolation; swinir: decode, then "
        "upscale pixels; direct: generate at the final size. For comparison, sampling again at the final size: "
        "rectifiedhr, hidiffusion, demofusion, scalecrafter, and lsrna, here with LUA as its latent upscaler. Default: "
        "the bundle's. An unavailable method is an error, never replaced by another.",
    )
    decode: DecodeName = DecodeField
    init_image: str | None = Field(
        None,
        min_length=1,
        description="Start image: PNG, JPEG or WebP as base64 or as a data: URL; resized to the base size.",
    )
    strength: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        allow_inf_nan=False,
        description="Share of the steps to run from init_image; more changes it more. Default: 0.6, with a mask 1.",
    )
    mask: str | None = Field(
        None,
        min_length=1,
        description="Mask of the size of init_image: white is generated again, black is kept.",
    )
    images: Annotated[tuple[Base64Image, ...], Field(max_length=16, strict=False)] = Field(
        (), description="Reference images as base64; GET /models has the maximum number (`max_images_in`)."
    )
    refine: RefineRequest | None = Field(None, description="Refine pass; default: none.")
    loras: Loras = LORAS_FIELD
    previews: Integer = Field(0, ge=0, le=MAX_PREVIEWS, description="Number of previews per image, sent as events.")
    embed_parameters: bool = Field(
        False, description="Write prompt, seed and the other parameters into the file's XMP metadata."
    )
    webhook: Annotated[
        WebhookRequest | None, BeforeValidator(_to_webhook, json_schema_input_type=WebhookRequest | str | None)
    ] = Field(None, description="Webhook to post when the job has ended; a plain URL gets every final state.")


class UpscaleQuery(BaseModel):
    """How to read and upscale the latent or the image in the body.

    Unknown names are refused by `giantleap.service.api.route_table`: a route has more parameters than these.
    """

    model_config = ConfigDict(frozen=True)

    scale: Scale | None = Field(None, description="Scale factor; default: the bundle's.")
    latent_space: str | None = Field(
        None, max_length=64, description="Latent space of the tensor; must be the bundle's."
    )
    scaled: bool = Field(
        False,
        description="true: a latent as a pipeline returns it, (raw - shift) x scale; false: a raw VAE latent.",
    )
    bundle: str | None = Field(None, max_length=128, description="Name of a bundle; the first one if left out.")
    output: Literal["image", "latent"] = Field(
        "image", description="image: decode the result; latent: return the raw latent."
    )
    output_format: FormatName | None = Field(
        None, description="Format of the image file; default: the one in Accept, else png."
    )
    compression: Compression | None = CompressionField
    quality: Integer | None = QualityField
    priority: PriorityName = Field("high", description="high is claimed before low.")
    method: Literal["lua", "bicubic", "swinir"] | None = Field(
        None, description="As in /generate; swinir upscales the pixels of an image without the VAE."
    )
    decode: DecodeName = DecodeField
    width: SideField = Field(None, description="Only for a packed latent: width of its image before upscaling, pixels.")
    height: SideField = Field(
        None, description="Only for a packed latent: height of its image before upscaling, pixels."
    )
    refine_strength: float | None = Field(
        None,
        ge=0.0,
        le=MAX_STRENGTH,
        allow_inf_nan=False,
        description="As refine.strength of /generate; this or refine_steps requests a refine pass; send a prompt.",
    )
    refine_steps: Annotated[int | None, Field(ge=1, le=100)] = Field(None, description="As refine.steps of /generate.")
    prompt: Annotated[str, Pattern(r"\S", "is empty; describe the image")] | None = Field(
        None, description="Prompt of the refine pass; send it as a form field, because proxies log URLs."
    )
    negative_prompt: str | None = Field(None, description="As in /generate, for the refine pass.")
    guidance_scale: float | None = Field(
        None, ge=0.0, le=100.0, allow_inf_nan=False, description="As in /generate, for the refine pass."
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Seed of the refine pass; default: random.")
    webhook_url: str | None = Field(
        None, min_length=1, max_length=2048, description="URL to post a signed notification to when the job has ended."
    )
    webhook_events: (
        Annotated[
            str,
            Pattern(f"^({_ANY_STATE})(,({_ANY_STATE})){{0,2}}$", f"must be one or more of {', '.join(FINAL_STATES)}"),
        ]
        | None
    ) = Field(
        None,
        description="Final states to report, comma-separated; default: all.",
    )

    def to_webhook(self) -> Webhook | None:
        """The webhook as a job stores it; None where the query names none."""
        if self.webhook_url is None:
            return None
        names = FINAL_STATES if self.webhook_events is None else self.webhook_events.split(",")
        return Webhook(self.webhook_url, tuple(state for state in FINAL_STATES if state in names))
