"""How much memory a job needs at its peak, before anything is loaded or enqueued, and the largest size that fits.

`models/memory/from_bundle.py` reads a plan from a bundle. Pure functions of values, and no torch, since the API process
refuses with it (`service/jobs/planning.py`). Weights stay on the device, so their bytes add up; the stages run one
after the other, so of theirs the largest counts. Feature maps are estimated by the formulas of
`models/memory/activations.py` and `models/vae/strip_plan.py`, within a quarter of what was measured
(`benchmarks/memory.py`). Where no formula is known there is no estimate, and the reason is said.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, Self

from giantleap.models.bundle.descriptor import DecodeName, Method
from giantleap.models.lua.spec import LuaSpec, scaled_size
from giantleap.models.memory.activations import (
    denoiser_elements,
    encoder_elements,
    guided_batch,
    lua_bytes,
    prepared_lua_bytes,
    prompt_tokens,
    text_encoder_elements,
    video_decoder_elements,
    video_tiled_elements,
)
from giantleap.models.vae.strip_plan import (
    ELEMENT_BYTES,
    DecodeBudgetError,
    DecoderShape,
    estimate_peak_bytes,
    plan_decode,
    prefers_strips,
)
from giantleap.models.worker_role import WorkerRole

DeviceKind = Literal["cpu", "cuda"]
Stage = Literal["encode", "generate", "upscale", "decode"]

# Of `giantleap.models.engines.swinir`, which imports torch: an image of up to its square goes whole, a larger one in
# tiles.
TILE_PX = 512
IMAGE_COPIES = 4  # float32 images alive while a decoded one becomes bytes (`giantleap.models.images.to_pixels`)
_ROUNDING = 1e-6  # of a pixel


class UnknownMemoryError(ValueError):
    """A bundle, or a way through it, whose memory cannot be told; the message says why."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What runs on the device at one time: the items of one batch.

    Args:
        width_px: Of the final image.
        height_px: Of the final image.
        scale: Of the final image over the base image; "direct" draws the final one.
        method: How the image becomes large.
        decode: How a latent becomes an image; None leaves it a latent.
        items: Images in the batch.
        source: What it starts from: a prompt, a prompt and an image, a latent, or an image.
        guidance_scale: Of a prompt.
    """

    width_px: int
    height_px: int
    scale: float
    method: Method = "lua"
    decode: DecodeName | None = "exact"
    items: int = 1
    source: Literal["prompt", "prompt and image", "latent", "image"] = "prompt"
    guidance_scale: float = 7.5

    @property
    def base_px(self) -> tuple[int, int]:
        """Width and height of the base image; of an image that is enlarged, with its sides rounded up."""
        factor = 1 if self.method == "direct" else self.scale
        return math.ceil(self.width_px / factor - _ROUNDING), math.ceil(self.height_px / factor - _ROUNDING)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes on the device: weights of the bundle, and each stage's peak beyond them."""

    weights_bytes: int
    stages: Mapping[Stage, int]

    @property
    def peak_bytes(self) -> int:
        """Of the whole: weights stay, stages follow one another."""
        return self.weights_bytes + max(self.stages.values(), default=0)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What of a bundle decides the memory of its jobs.

    Args:
        name: Of the bundle.
        device: Where it runs.
        dtype: That the base model and the upscalers compute in.
        vae_dtype: That the VAE computes in.
        weights_bytes: Of everything loaded, with what upscalers keep between calls.
        stride_px: Image pixels per latent pixel.
        side_multiple: Latent sides are multiples of this.
        channels: Of a raw latent.
        denoiser: Configuration of the UNet or transformer.
        text_encoders: Configurations.
        vae: Configuration of the VAE that decodes.
        tiny: Configuration of the tiny decoder; None where there is none.
        lua: Spec of the LUA; None where there is none, or where its file does not tell.
        swinir: Specs of the pixel upscalers by scale.
        prepared: Whether the upscalers run in the form for a CPU, which needs less; a worker finds out which is faster.
        base_bytes: Of the weights, those that only draw: the pipeline without its VAE.
        vae_weights_bytes: Of the weights, those of the VAE.
        role: Of the worker there.
    """

    name: str
    device: DeviceKind
    dtype: str
    vae_dtype: str
    weights_bytes: int
    stride_px: int
    side_multiple: int
    channels: int
    denoiser: Mapping[str, Any]
    text_encoders: tuple[Mapping[str, Any], ...]
    vae: Mapping[str, Any]
    tiny: Mapping[str, Any] | None = None
    lua: LuaSpec | None = None
    swinir: Mapping[int, LuaSpec] = field(default_factory=dict)
    prepared: bool = False
    base_bytes: int = 0
    vae_weights_bytes: int = 0
    role: WorkerRole = WorkerRole.ALL

    def of_role(self, role: WorkerRole) -> Self:
        """The plan of a worker that runs only these; one that draws counts its VAE whole, also the decoder."""
        if role is self.role:
            return self
        drawing_bytes = self.base_bytes + self.vae_weights_bytes
        kept_bytes = self.weights_bytes - self.base_bytes if role.loads_decoder else drawing_bytes
        return replace(self, role=role, weights_bytes=kept_bytes)

    def estimate(self, work: Workload, memory_bytes: int | None = None) -> Estimate:
        """What a batch needs.

        Args:
            work: The batch.
            memory_bytes: Of the device for this bundle: an exact decode that would exceed it works in strips. None is
                for no limit.

        Raises:
            UnknownMemoryError: no formula is known for a network on this way.
        """
        try:
            return Estimate(self.weights_bytes, MappingProxyType(self._stages(work, memory_bytes)))
        except UnknownMemoryError:
            raise
        except (ValueError, KeyError) as error:
            raise UnknownMemoryError(f"bundle {self.name}: {error}") from error

    def fits(self, work: Workload, memory_bytes: int) -> bool:
        """Whether the device is large enough. Raises: as `estimate`."""
        return self.estimate(work, memory_bytes).peak_bytes <= memory_bytes

    def max_items(self, work: Workload, memory_bytes: int) -> int:
        """How many items of this kind fit at once, up to the given number; at least one.

        Raises:
            UnknownMemoryError: as `estimate`.
        """
        fitting = (items for items in range(work.items, 1, -1) if self.fits(replace(work, items=items), memory_bytes))
        return next(fitting, 1)

    def _stages(self, work: Workload, memory_bytes: int | None) -> dict[Stage, int]:
        stages: dict[Stage, int] = {}
        unit_px = self.stride_px * self.side_multiple
        latent_height, latent_width = (-(-side // unit_px) * self.side_multiple for side in reversed(work.base_px))
        pixels_alone = work.source == "image" and work.method == "swinir" and work.scale > 1
        starts_here = self.role.loads_pipeline if work.source == "prompt and image" else self.role.loads_decoder
        if work.source in ("image", "prompt and image") and starts_here and not pixels_alone:
            stages["encode"] = self._encode_bytes(work, latent_height, latent_width)
        if work.source in ("prompt", "prompt and image") and self.role.loads_pipeline:
            stages["generate"] = self._generate_bytes(work, latent_height, latent_width)
        if not self.role.loads_decoder:
            return stages
        enlarges = work.scale > 1 and work.method != "direct"
        if enlarges:
            stages["upscale"] = self._upscale_bytes(work, latent_height, latent_width)
        if work.decode is not None and not pixels_alone:
            factor = work.scale if enlarges and work.method != "swinir" else 1
            budget_bytes = None if memory_bytes is None else max(0, memory_bytes - self.weights_bytes)
            sides = (scaled_size(latent_height, factor), scaled_size(latent_width, factor))
            stages["decode"] = self._decode_bytes(work.decode, work.items, *sides, budget_bytes)
        return stages

    def _encode_bytes(self, work: Workload, latent_height: int, latent_width: int) -> int:
        batch = (
            work.items if work.source == "prompt and image" else 1
        )  # `giantleap.models.route.Route.embed` takes one at a time
        height_px, width_px = latent_height * self.stride_px, latent_width * self.stride_px
        elements = encoder_elements(self.vae, height_px, width_px) + 3 * height_px * width_px
        return batch * elements * ELEMENT_BYTES[self.vae_dtype]

    def _generate_bytes(self, work: Workload, latent_height: int, latent_width: int) -> int:
        batch = guided_batch(self.denoiser, work.items, work.guidance_scale)
        elements = denoiser_elements(self.denoiser, batch, latent_height, latent_width, self.dtype)
        tokens = prompt_tokens(self.denoiser)
        texts = [text_encoder_elements(config, work.items, tokens) for config in self.text_encoders]
        latents = (batch + 2 * work.items) * self.channels * latent_height * latent_width
        return (max(elements, *texts) + latents if texts else elements + latents) * ELEMENT_BYTES[self.dtype]

    def _upscale_bytes(self, work: Workload, latent_height: int, latent_width: int) -> int:
        if work.method == "bicubic":
            pixels = scaled_size(latent_height, work.scale) * scaled_size(latent_width, work.scale)
            return 4 * work.items * self.channels * pixels
        if work.method == "swinir":
            return self._pixel_upscale_bytes(work)
        if self.lua is None:
            raise UnknownMemoryError(f"bundle {self.name}: the LUA's file does not tell its shape without torch")
        return self._network_bytes(self.lua, work.items, latent_height, latent_width, work.scale)

    def _network_bytes(self, spec: LuaSpec, batch: int, height: int, width: int, scale: float) -> int:
        if self.prepared and spec.head == "pixelshuffle":
            return prepared_lua_bytes(spec, batch, height, width, int(scale), self.dtype)
        return lua_bytes(spec, batch, height, width, scale, self.dtype, self.device)

    def _pixel_upscale_bytes(self, work: Workload) -> int:
        """One image after the other, in tiles where it is large; the enlarged image is whole."""
        scale = int(work.scale)
        spec = self.swinir.get(scale) if scale == work.scale else None
        if spec is None:
            raise UnknownMemoryError(
                f"bundle {self.name}: the SwinIR file of scale {work.scale} does not tell its shape"
            )
        width_px, height_px = work.base_px
        if width_px * height_px > TILE_PX**2:
            width_px, height_px = min(width_px, TILE_PX), min(height_px, TILE_PX)
        image_bytes = 3 * work.width_px * work.height_px * 4
        tile_bytes = self._network_bytes(spec, 1, height_px, width_px, scale)
        return max(image_bytes + tile_bytes, IMAGE_COPIES * image_bytes)

    def _decode_bytes(
        self, decode: DecodeName, items: int, latent_height: int, latent_width: int, budget_bytes: int | None
    ) -> int:
        batch = 1 if self.device == "cpu" else items  # `giantleap.models.route.Route.decode_items`
        image_bytes = 3 * latent_height * latent_width * self.stride_px**2 * 4
        if decode == "tiny" and self.tiny is not None:
            peak_bytes = estimate_peak_bytes(self.tiny, latent_height, latent_width, self.dtype, "tiny", batch=batch)
        elif "up_block_types" not in self.vae:
            count = video_tiled_elements if decode == "tiled" else video_decoder_elements
            elements = count(self.vae, latent_height, latent_width, self.stride_px)
            peak_bytes = batch * elements * ELEMENT_BYTES[self.vae_dtype]
        elif decode == "tiled":
            peak_bytes = estimate_peak_bytes(
                self.vae, latent_height, latent_width, self.vae_dtype, "tiled", batch=batch
            )
        else:
            peak_bytes = self._exact_bytes(batch, latent_height, latent_width, budget_bytes)
        return max(peak_bytes, batch * IMAGE_COPIES * image_bytes)

    def _exact_bytes(self, batch: int, latent_height: int, latent_width: int, budget_bytes: int | None) -> int:
        """Whole or in strips, as `giantleap.models.vae.autoencoder.Vae` chooses; with strips as thin as they get where
        nothing fits."""
        shape, dtype = DecoderShape.from_config(self.vae), self.vae_dtype
        size = (latent_height, latent_width, dtype)
        if not prefers_strips(shape, *size, batch=batch, device=self.device, budget_bytes=budget_bytes):
            return estimate_peak_bytes(self.vae, *size, "plain", batch=batch)
        try:
            return plan_decode(shape, *size, batch=batch, budget_bytes=budget_bytes).peak_bytes
        except DecodeBudgetError:
            return plan_decode(shape, *size, batch=batch, strip_bytes=0).peak_bytes


def largest_fit(
    work: Workload, on_grid: Callable[[int, int], tuple[int, int]], fits: Callable[[Workload], bool]
) -> tuple[int, int] | None:
    """The largest final size of about the same aspect that fits, up to the one asked for; None if none does.

    Args:
        work: What was asked for.
        on_grid: Brings a wished final width and height down to one that there is, or up to the least.
        fits: Whether a size fits; with a size, all smaller ones do.

    Returns:
        Final width and height.
    """
    longest = max(work.width_px, work.height_px)

    def at(side_px: int) -> tuple[int, int]:
        return on_grid(work.width_px * side_px // longest, work.height_px * side_px // longest)

    def is_possible(side_px: int) -> bool:
        width_px, height_px = at(side_px)
        return fits(replace(work, width_px=width_px, height_px=height_px))

    small, large = 0, longest + 1  # small fits, large does not
    while large - small > 1:
        middle = (small + large) // 2
        small, large = (middle, large) if is_possible(middle) else (small, middle)
    return at(small) if small else None
