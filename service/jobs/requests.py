"""What a client may ask for, as pydantic models: the body of /generate, the query of /upscale.

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
    None, description="Of an image file: fast, which is the default, or small: fewer bytes in several times the time."
)
QualityField: Any = Field(
    None, ge=1, le=100, description="Of JPEG and WebP: 1 to 100, 95 if left out. PNG keeps every pixel."
)
Scale = Annotated[float, Field(ge=1, le=64, allow_inf_nan=False), AfterValidator(to_scale)]
DecodeField: Any = Field(
    "exact",
    description="exact: the whole image at once, in strips where memory asks for it, to the same result; tiled: "
    "overlapping tiles, which changes the image; tiny: a fast preview by a small decoder, where the bundle has one.",
)


Base64Image = Annotated[str, Field(min_length=1)]


class WebhookRequest(JsonRequest):
    """Where to post a signed notification when the job has ended."""

    url: str = Field(min_length=1, max_length=2048, description="http or https; an address that is not public: 422.")
    events: Annotated[tuple[FinalState, ...], Field(min_length=1, max_length=3, strict=False)] = Field(
        FINAL_STATES, description="The final states to report."
    )

    def to_webhook(self) -> Webhook:
        """The webhook as a job stores it."""
        return Webhook(self.url, self.events)


def _to_webhook(value: object) -> object:
    """A URL alone as a webhook for every final state."""
    return {"url": value} if isinstance(value, str) else value


class RefineRequest(JsonRequest):
    """A second, short sampling of the enlarged latent, which adds detail; the bundle says whether it can."""

    strength: float = Field(
        DEFAULT_STRENGTH,
        ge=0.0,
        le=MAX_STRENGTH,
        allow_inf_nan=False,
        description="Share of the noise schedule that is run again: how far to leave the enlarged latent; 0: no pass.",
    )
    steps: Integer = Field(DEFAULT_STEPS, ge=1, le=100, description="Denoising steps that are run; start with 4 to 8.")


class LoraRequest(JsonRequest):
    """A LoRA that acts on the images of a job."""

    name: str = Field(min_length=1, max_length=64, description="One that GET /models lists for the bundle.")
    weight: float = Field(
        1.0, ge=-8.0, le=8.0, allow_inf_nan=False, description="Factor of what it adds; 1 as it was trained."
    )


Loras = Annotated[tuple[LoraRequest, ...], Field(max_length=8, strict=False)]
LORAS_FIELD: Any = Field((), description="LoRAs for this job alone, each once.")


class GenerateRequest(JsonRequest):
    """A prompt to draw. What is left out takes the bundle's default (`GET /models` lists them)."""

    prompt: Annotated[
        str,
        Field(min_length=1, examples=["a red sphere on a green floor"]),
        Pattern(r"\S", "is empty; describe the image"),
    ] = Field(description="What to draw.")
    negative_prompt: Text | None = Field(None, description="What to keep away from.")
    scale: Scale | None = Field(
        None, examples=[2], description="Enlargement of the base latent; 1: none. The bundle lists them."
    )
    width: SideField = Field(None, description="Width of the final image, pixels.")
    height: SideField = Field(None, description="Height of the final image, pixels.")
    steps: Integer | None = Field(None, ge=1, le=1000, description="Denoising steps.")
    guidance_scale: float | None = Field(
        None, ge=0.0, le=100.0, allow_inf_nan=False, description="Weight of the prompt; 1 or less: no guidance."
    )
    seed: Integer | None = Field(
        None, ge=0, le=MAX_SEED, description="Seed of the first image, the next ones follow; drawn if left out."
    )
    num_images: Integer = Field(1, ge=1, description="Images of this job.")
    bundle: str | None = Field(None, max_length=128, description="Name of a bundle; the first one if left out.")
    output_format: FormatName | None = Field(
        None, description="File format; if left out, the one that Accept names, else png."
    )
    compression: Compression | None = CompressionField
    quality: Integer | None = QualityField
    priority: PriorityName = Field("high", description="high is claimed before low.")
    method: Method | None = Field(
        None,
        description="lua: enlarge the latent, decode once; bicubic: the same by interpolation; swinir: decode, then "
        "enlarge pixels; direct: draw at the final size. To compare with, by drawing again at the final size: "
        "rectifiedhr, hidiffusion, demofusion, scalecrafter, and lsrna, here with LUA as its latent enlarger. The "
        "bundle's default if left out; never replaced by another.",
    )
    decode: DecodeName = DecodeField
    init_image: str | None = Field(
        None,
        min_length=1,
        description="Image to start from, PNG, JPEG or WebP as base64, also as a data: URL; resized to the base size.",
    )
    strength: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        allow_inf_nan=False,
        description="How far to leave init_image: its share of the steps is run. If left out 0.6, with a mask 1.",
    )
    mask: str | None = Field(
        None,
        min_length=1,
        description="Which part of init_image to draw anew: an image of its size, white there and black elsewhere.",
    )
    images: Annotated[tuple[Base64Image, ...], Field(max_length=16, strict=False)] = Field(
        (), description="Images that the prompt talks about, as base64; the bundle says how many it takes."
    )
    refine: RefineRequest | None = Field(None, description="Sample the enlarged latent again; not done if left out.")
    loras: Loras = LORAS_FIELD
    previews: Integer = Field(
        0, ge=0, le=MAX_PREVIEWS, description="So many small JPEGs of each image on its way come as events."
    )
    embed_parameters: bool = Field(
        False, description="Write prompt, seed and the other parameters into the file's XMP; else it names none."
    )
    webhook: Annotated[
        WebhookRequest | None, BeforeValidator(_to_webhook, json_schema_input_type=WebhookRequest | str | None)
    ] = Field(None, description="Whom to tell when the job has ended; a URL alone: of every final state.")


class UpscaleQuery(BaseModel):
    """How to read and enlarge the latent or the image in the body.

    Unknown names are refused by `giantleap.service.api.route_table`: a route has more parameters than these.
    """

    model_config = ConfigDict(frozen=True)

    scale: Scale | None = Field(None, description="Enlargement; the bundle's default if left out.")
    latent_space: str | None = Field(
        None, max_length=64, description="Latent space of the tensor; it must be the bundle's."
    )
    scaled: bool = Field(
        False,
        description="true: as a diffusion pipeline hands it out, (raw - shift) x scale; false: raw VAE latent.",
    )
    bundle: str | None = Field(None, max_length=128, description="Name of a bundle; the first one if left out.")
    output: Literal["image", "latent"] = Field("image", description="Decode the result, or answer the raw latent.")
    output_format: FormatName | None = Field(
        None, description="File format of an image; if left out, the one that Accept names, else png."
    )
    compression: Compression | None = CompressionField
    quality: Integer | None = QualityField
    priority: PriorityName = Field("high", description="high is claimed before low.")
    method: Literal["lua", "bicubic", "swinir"] | None = Field(
        None, description="As of /generate; swinir enlarges the pixels of an image as they are."
    )
    decode: DecodeName = DecodeField
    width: SideField = Field(None, description="Only for a packed tensor: width of its own image, pixels.")
    height: SideField = Field(None, description="Only for a packed tensor: height of its own image, pixels.")
    refine_strength: float | None = Field(
        None,
        ge=0.0,
        le=MAX_STRENGTH,
        allow_inf_nan=False,
        description="As refine.strength of /generate; this or refine_steps asks for the pass, which needs a prompt.",
    )
    refine_steps: Annotated[int | None, Field(ge=1, le=100)] = Field(None, description="As refine.steps of /generate.")
    prompt: Annotated[str, Pattern(r"\S", "is empty; describe the image")] | None = Field(
        None, description="What the image shows, for the refine pass; in a form, so that no log of URLs has it."
    )
    negative_prompt: str | None = Field(None, description="As of /generate, for the refine pass.")
    guidance_scale: float | None = Field(
        None, ge=0.0, le=100.0, allow_inf_nan=False, description="As of /generate, for the refine pass."
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Of the refine pass; drawn if left out.")
    webhook_url: str | None = Field(
        None, min_length=1, max_length=2048, description="Where to post a signed note when the job has ended."
    )
    webhook_events: (
        Annotated[
            str,
            Pattern(f"^({_ANY_STATE})(,({_ANY_STATE})){{0,2}}$", f"must be one or more of {', '.join(FINAL_STATES)}"),
        ]
        | None
    ) = Field(
        None,
        description="The final states to report, comma-separated; all if left out.",
    )

    def to_webhook(self) -> Webhook | None:
        """The webhook as a job stores it; None where the query names none."""
        if self.webhook_url is None:
            return None
        names = FINAL_STATES if self.webhook_events is None else self.webhook_events.split(",")
        return Webhook(self.webhook_url, tuple(state for state in FINAL_STATES if state in names))
