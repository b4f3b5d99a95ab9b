"""Options of `generate` and `upscale` besides the prompt or the source. The service checks the values."""

from typing import Literal, TypedDict

from giantleap_client.payloads import Source

Priority = Literal["high", "low"]
Decode = Literal["exact", "tiled", "tiny"]
Compression = Literal["fast", "small"]


class Refine(TypedDict, total=False):
    """A second, short sampling of the enlarged latent."""

    strength: float
    steps: int


class Lora(TypedDict, total=False):
    """A LoRA for one job."""

    name: str
    weight: float


class Webhook(TypedDict, total=False):
    """Where to report the end of the job."""

    url: str
    events: list[str]


class GenerateOptions(TypedDict, total=False):
    """The fields of `POST /generate`; an image is anything that `upscale` takes as one."""

    negative_prompt: str
    scale: float
    width: int
    height: int
    steps: int
    guidance_scale: float
    seed: int
    num_images: int
    bundle: str
    output_format: str
    compression: Compression
    quality: int
    priority: Priority
    method: str
    decode: Decode
    init_image: Source
    mask: Source
    images: list[Source]
    strength: float
    refine: Refine
    loras: list[Lora]
    previews: int
    embed_parameters: bool
    webhook: str | Webhook


class UpscaleOptions(TypedDict, total=False):
    """The parameters of `POST /upscale`."""

    scale: float
    latent_space: str
    scaled: bool
    bundle: str
    output: Literal["image", "latent"]
    output_format: str
    compression: Compression
    quality: int
    priority: Priority
    method: str
    decode: Decode
    width: int
    height: int
    refine_strength: float
    refine_steps: int
    prompt: str
    negative_prompt: str
    guidance_scale: float
    seed: int
    webhook_url: str
    webhook_events: str
