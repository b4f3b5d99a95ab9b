"""One loaded bundle on one device: generate, upscale, decode.

A worker holds one `Route` per bundle (`giantleap.service.worker.loop`); the command line uses it without a service.
Each stage is a method: an upscale job starts at the second, and a latent ends there (`giantleap.models.bundle.stages`).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from giantleap.models.bundle.bundle import Bundle, check_files
from giantleap.models.bundle.descriptor import NEEDS_DECODER, REDIFFUSION, DecodeName, Method
from giantleap.models.bundle.load_errors import load_errors
from giantleap.models.bundle.stages import stages_of
from giantleap.models.device import (
    NoObserver,
    PartCallback,
    PeakMemory,
    StageClock,
    StageObserver,
    free_cache,
    part_of,
    peak_memory,
    reset_peak_memory,
)
from giantleap.models.engines.base import Artifact, Engine, EngineName
from giantleap.models.engines.swinir import PixelUpscaler
from giantleap.models.generation.generator import Generator
from giantleap.models.generation.items import CancelCheck, GenerationItem, StepCallback
from giantleap.models.generation.previews import PreviewCallback
from giantleap.models.generation.refine import refine_latent
from giantleap.models.lua.clamp import LatentClamp
from giantleap.models.lua.network import pad_to_window
from giantleap.models.lua.spec import scaled_size
from giantleap.models.methods.sampling import Tools, sample_items
from giantleap.models.upscaler import open_lua
from giantleap.models.vae.autoencoder import Vae, read_tiny, read_vae_model
from giantleap.models.vae.compiled import compile_decoder
from giantleap.models.vae.pixels import decode_items, decode_pixels, encode_items, encode_pixels
from giantleap.models.vae.preview import Previewer, open_previewer
from giantleap.models.worker_role import WorkerRole

NO_OBSERVER = NoObserver()


class Route:
    """A loaded bundle.

    Args:
        name: Name of the bundle.
        generator: Generates raw latents from prompts; None in a worker that does not.
        lua: Upscales latents; None if the bundle has no LUA.
        pixel: Upscales pixels, for the method `swinir`; None if the bundle has no SwinIR weights.
        vae: Decodes latents and encodes images.
        device: Where all of them are.
        dtype: The compute type.
        clamp: Bounds the output of LUA; None for no bound.
        lua_scales: The scales that the bundle serves; empty for those of the network's heads.
        role: The stages that run here.
        previewer: Shows latents that are not finished; None if the bundle has nothing for that.
    """

    def __init__(
        self,
        name: str,
        generator: Generator | None,
        lua: Engine | None,
        pixel: PixelUpscaler | None,
        vae: Vae,
        device: torch.device,
        dtype: torch.dtype,
        clamp: LatentClamp | None = None,
        lua_scales: Sequence[float] = (),
        role: WorkerRole = WorkerRole.ALL,
        previewer: Previewer | None = None,
    ) -> None:
        self.name = name
        self._generator = generator
        self.lua = lua
        self.pixel = pixel
        self.vae = vae
        self.device = device
        self.dtype = dtype
        self.clamp = clamp
        self.lua_scales = tuple(lua_scales)
        self.role = role
        self.previewer = previewer

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        device: torch.device,
        dtype: torch.dtype,
        engine: EngineName = "torch",
        artifacts: Mapping[int, Artifact] | None = None,
        role: WorkerRole = WorkerRole.ALL,
    ) -> Self:
        """Load what the role needs of a bundle. Nothing runs yet (`warm`).

        Args:
            bundle: The bundle.
            device: Where everything goes.
            dtype: The compute type.
            engine: What runs LUA.
            artifacts: Exported graphs by scale, for the engines that run them; the caller has checked them.
            role: `GENERATE` loads the pipeline with the VAE's encoder, `DECODE` the VAE and the upscalers, `ALL` both.

        Raises:
            EngineError: The engine cannot run here.
            BundleError: A weight file differs from its digest, a part cannot be loaded, or LUA does not fit the
                descriptor.
            VaeError: The VAE is of an unknown class or of another latent space.
            CheckpointError: The LUA weights cannot be read.
        """
        check_files(bundle)
        lua, clamp = None, None
        if bundle.lua is not None and role.loads_decoder:
            lua, clamp = open_lua(bundle, bundle.lua, device, dtype, engine, artifacts)
        pixel = PixelUpscaler.open(bundle.swinir, device, dtype) if bundle.swinir and role.loads_decoder else None
        generator = Generator.open(bundle, device, dtype) if role.loads_pipeline else None
        space = bundle.latent_space if generator is None else generator.latent_space
        model = read_vae_model(bundle, device, dtype) if generator is None else generator.pipeline.vae
        with load_errors(bundle, "tiny VAE"):
            tiny = read_tiny(bundle.tiny_vae, device, dtype) if bundle.tiny_vae else None
        vae = Vae(model, space, dtype=dtype, tiny=tiny)
        if not role.loads_decoder:
            vae.drop_decoder()
        elif bundle.modes.compile_vae:
            compile_decoder(vae, _served_latents(bundle))
        scales = bundle.scales_of("lua")[1:]
        previewer = open_previewer(bundle, tiny)
        return cls(bundle.name, generator, lua, pixel, vae, device, dtype, clamp, scales, role, previewer)

    @property
    def generator(self) -> Generator:
        """The generator of raw latents.

        Raises:
            ValueError: The role of this route does not generate.
        """
        if self._generator is None:
            raise ValueError(f"bundle {self.name}: a worker of role {self.role} generates no latents")
        return self._generator

    @property
    def engine(self) -> str:
        """Name of the engine that runs LUA; `torch` if there is no LUA."""
        return "torch" if self.lua is None else self.lua.name

    @property
    def decoder(self) -> str:
        """What decodes whole images: `plain`, or `compiled`."""
        return "plain" if self.vae.compiled is None else "compiled"

    @property
    def window(self) -> int:
        """Side of LUA's window in latent pixels; latents of equal size after padding to it can share a batch."""
        return 1 if self.lua is None else self.lua.spec.window

    def scales_of(self, method: Method) -> tuple[float, ...]:
        """The scales of a method, 1 included; `bicubic` and `direct` need no weights and take any."""
        if method == "lua":
            return (1,) if self.lua is None else (1, *(self.lua_scales or self.lua.spec.scales))
        if method == "swinir":
            return (1,) if self.pixel is None else (1, *self.pixel.scales)
        if method == "lsrna":
            return tuple(scale for scale in self.scales_of("lua") if isinstance(scale, int))
        return (1, 2, 4)

    def clock(self) -> StageClock:
        """A clock for the stages of one batch."""
        return StageClock(self.device)

    def generate_latents(
        self, item: GenerationItem, clock: StageClock, method: Method = "lua", scale: float = 1
    ) -> list[Tensor]:
        """Generate and time the raw latent of one item; noise of its size if this role does not generate."""
        if not self.role.loads_pipeline:
            factor = scale if method in REDIFFUSION else 1
            height, width = self.vae.latent_space.latent_size(item.height_px, item.width_px)
            sides = scaled_size(height, factor), scaled_size(width, factor)
            return [torch.randn(self.vae.latent_space.channels, *sides, device=self.device)]
        with clock.measure("generate"):
            latents = self.generate([item], method, scale)
        return [latent for latent in latents if latent is not None]

    def generate(
        self,
        items: Sequence[GenerationItem],
        method: Method = "lua",
        scale: float = 1,
        *,
        on_step: StepCallback | None = None,
        is_canceled: CancelCheck | None = None,
        on_part: PartCallback | None = None,
        on_preview: PreviewCallback | None = None,
    ) -> list[Tensor | None]:
        """Generate the raw latents that the other stages of a method start from; see `Generator.generate`.

        Those of a re-diffusion method are of the final size, `scale` times that of the items. It calls `on_part` within
        long steps, which may raise.

        Raises:
            ValueError: As `Generator.generate`, or the method needs a decoder, which this role does not load.
        """
        if method not in REDIFFUSION or scale == 1:
            return self.generator.generate(items, on_step=on_step, is_canceled=is_canceled, on_preview=on_preview)
        if method in NEEDS_DECODER and not self.role.loads_decoder:
            raise ValueError(f"method {method} decodes while it generates; a worker of role {self.role} has no decoder")
        tools = Tools(self.vae, self.upscale)
        return sample_items(
            self.generator, tools, items, method, round(scale), on_step, is_canceled, on_part, on_preview
        )

    def encode_image(self, pixels: NDArray[np.uint8], on_part: PartCallback | None = None) -> Tensor:
        """Encode an image to its raw latent; see `encode_pixels`."""
        return encode_pixels(self.vae, pixels, on_part)

    @torch.inference_mode()
    def upscale(self, latents: Tensor, scale: float, method: Method = "lua") -> Tensor:
        """Upscale raw latents by LUA, clamped if the bundle asks for it, or by bicubic interpolation.

        Shape:
            [batch, channels, h, w] -> [batch, channels, scale * h, scale * w], float32; unchanged at scale 1.

        Raises:
            ValueError: There is no head for the scale, or the method does not upscale latents.
        """
        latents = latents.to(self.device, torch.float32)
        if scale == 1:
            return latents
        if method == "bicubic":
            height, width = (scaled_size(side, scale) for side in latents.shape[-2:])
            return F.interpolate(latents, size=(height, width), mode="bicubic")
        if method != "lua" or self.lua is None:
            raise ValueError(f"bundle {self.name} does not upscale latents by {method}")
        upscaled = self.lua.run(latents, scale)
        return upscaled if self.clamp is None else self.clamp.limit(latents, upscaled, scale)

    @torch.inference_mode()
    def upscale_pixels(
        self, images: Sequence[Tensor | None], scale: float, on_part: PartCallback | None = None
    ) -> list[Tensor | None]:
        """Upscale decoded images one by one with SwinIR; None stays None.

        Shape:
            Each [height_px, width_px, 3], uint8 -> [scale * height_px, scale * width_px, 3], on the CPU.

        Raises:
            ValueError: The bundle has no SwinIR weights, or none of that scale.
        """
        if self.pixel is None:
            raise ValueError(f"bundle {self.name} has no SwinIR weights to upscale pixels with")
        return self.pixel.upscale_pixels(images, scale, on_part)

    def decode(
        self, latents: Tensor, how: DecodeName = "exact", on_part: PartCallback | None = None
    ) -> list[Tensor | None]:
        """Decode raw latents in one call; see `decode_pixels`."""
        return decode_pixels(self.vae, latents, how, on_part)

    def upscale_items(self, latents: Sequence[Tensor], scale: float, method: Method = "lua") -> list[Tensor]:
        """Upscale latents. LUA takes latents of different sizes in one batch, each padded as `Lua.forward` pads it.

        Shape:
            Each [channels, h, w] -> [channels, scale * h, scale * w]; all of equal size once padded to the window.

        Raises:
            ValueError: The padded sizes differ, or as `upscale`.
        """
        if method != "lua":
            return [self.upscale(latent[None], scale, method)[0] for latent in latents]
        padded = [pad_to_window(latent[None].to(self.device), self.window) for latent in latents]
        if len({latent.shape for latent in padded}) > 1:
            raise ValueError(f"latents of one batch must be of one size after padding to {self.window}")
        enlarged = self.upscale(torch.cat(padded), scale)
        sizes = [[scaled_size(side, scale) for side in latent.shape[-2:]] for latent in latents]
        return [upscaled[:, :height, :width] for upscaled, (height, width) in zip(enlarged, sizes, strict=True)]

    def refine_items(
        self, latents: Sequence[Tensor], items: Sequence[GenerationItem], on_part: PartCallback | None = None
    ) -> list[Tensor]:
        """Refine latents of any sizes one by one, each as its item asks for (`refine_latent`)."""
        return [
            refine_latent(self.generator, latent.to(self.device), item, part_of(on_part, index, len(items)))
            for index, (latent, item) in enumerate(zip(latents, items, strict=True))
        ]

    def upscale_and_decode(
        self,
        latents: list[Tensor],
        scale: float,
        method: Method = "lua",
        decode: DecodeName | None = "exact",
        observer: StageObserver = NO_OBSERVER,
        refine: Sequence[GenerationItem] = (),
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Run the stages of a method on base latents.

        Args:
            latents: Raw, each [channels, h, w].
            scale: One of `scales_of(method)`.
            method: How to upscale.
            decode: How to decode; None for latents without images.
            observer: Sees each stage; a `StageClock` times them.
            refine: What to refine each latent by; empty for no refine pass.

        Returns:
            The upscaled latents, and the images as `decode` returns them (empty without it).
        """
        images: list[Tensor | None] = []
        for stage in stages_of(method, scale, bool(refine)):
            if decode is None and stage == "decode":
                continue
            with observer.measure(stage):
                report = partial(observer.report_part, stage)
                if stage == "decode" and decode is not None:
                    images = decode_items(self.vae, latents, decode, report)
                elif stage == "refine":
                    latents = self.refine_items(latents, refine, report)
                elif stage == "vae_encode":
                    latents = encode_items(self.vae, images, latents, report)
                elif method == "swinir":
                    images = self.upscale_pixels(images, scale, report)
                else:
                    latents = self.upscale_items(latents, scale, method)
        return latents, images

    def upscale_images(
        self,
        pixels: Sequence[NDArray[np.uint8]],
        scale: float,
        method: Method = "lua",
        decode: DecodeName | None = "exact",
        observer: StageObserver = NO_OBSERVER,
        refine: Sequence[GenerationItem] = (),
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Upscale images: encoded to latents or, by `swinir`, in pixels, which are encoded only to be refined.

        Args and Returns are those of `upscale_and_decode`; the latents are those of the padded images.

        Shape:
            Each [height_px, width_px, 3] -> [scale * height_px, scale * width_px, 3], uint8, on the CPU.
        """
        sides = [(scaled_size(image.shape[0], scale), scaled_size(image.shape[1], scale)) for image in pixels]
        images: list[Tensor | None] = [torch.from_numpy(image) for image in pixels]
        if method == "swinir" and scale > 1:
            with observer.measure("upscale"):
                images = self.upscale_pixels(images, scale, partial(observer.report_part, "upscale"))
            if not refine:
                return [], images
            scale = 1
        with observer.measure("vae_encode"):
            latents = encode_items(self.vae, images, (), partial(observer.report_part, "vae_encode"))
        latents, images = self.upscale_and_decode(latents, scale, method, decode, observer, refine)
        cut = [
            None if image is None else image[:height, :width].contiguous()
            for image, (height, width) in zip(images, sides, strict=False)  # no images without `decode`
        ]
        return latents, cut

    def reset_peak_memory(self) -> None:
        """Reset the peak of `peak_memory`, if the device can."""
        reset_peak_memory(self.device)

    def peak_memory(self) -> PeakMemory:
        """Peak memory since the last reset; on a CPU, of the process since it started."""
        return peak_memory(self.device)

    def free_cache(self) -> None:
        """Release memory that no tensor uses."""
        free_cache(self.device)


def _served_latents(bundle: Bundle) -> list[tuple[int, int]]:
    """Height and width of latents to decode: the smallest, and those of the default size at every scale."""
    space, defaults, smallest_px = bundle.latent_space, bundle.defaults, bundle.limits.min_base_px
    height, width = space.latent_size(defaults.base_height_px, defaults.base_width_px)
    scaled = [(scaled_size(height, scale), scaled_size(width, scale)) for scale in bundle.scales]
    return [space.latent_size(smallest_px, smallest_px), *scaled]
