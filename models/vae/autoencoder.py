"""One autoencoder of a known family: raw latents to images and back, in a precision that it does not overflow in.

`Vae` chooses the decode of the class, the number type and, for "exact", between the whole decode, the compiled one and
strips. The decodes are in `models/vae/decode.py`, their memory in `models/vae/strip_plan.py`; `models/vae/dc_strips.py`
has both for AutoencoderDC, `models/vae/compiled.py` the compiled decode.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.models.auto_model import AutoModel
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from PIL import Image
from torch import Tensor

from giantleap.models.bundle.bundle import Bundle, ModelSource
from giantleap.models.bundle.descriptor import DecodeName
from giantleap.models.bundle.load_errors import load_errors
from giantleap.models.device import PartCallback
from giantleap.models.latent_space import LatentSpace
from giantleap.models.pixels.images import to_pixels
from giantleap.models.vae.dc_strips import DcStrips
from giantleap.models.vae.decode import (
    DC_CLASSES,
    FRAME_CLASSES,
    STRIP_CLASSES,
    decode_exact,
    decode_plain,
    decode_tiled,
    decode_tiny,
    encode_mean,
)
from giantleap.models.vae.decoder_check import UnknownDecoderError, check_decoder
from giantleap.models.vae.strip_plan import DecoderShape, plan_decode, prefers_strips

if TYPE_CHECKING:
    from giantleap.models.vae.compiled import CompiledDecoder

DecodeWay = Literal["whole", "strips", "compiled", "recompiled", "tiled", "tiny"]
"""How an image was decoded; `recompiled`: compiled, and the compiler ran for it, since its size was of another kind."""
FREE_SHARE = 0.8  # of a GPU's free memory that a decode may plan with: estimates are within a quarter


class VaeError(ValueError):
    """An autoencoder of another class or latent space, or a use that it does not support."""


def choose_vae_dtype(force_upcast: bool | None, latent_channels: int, dtype: torch.dtype) -> torch.dtype:
    """The type that a VAE computes in if the rest of the pipeline computes in `dtype`.

    float16 is used only for a VAE that states that it does not overflow there (force_upcast false, such as the fp16-fix
    of SDXL). Otherwise the 4-channel VAEs of SD and SDXL get float32. Those with more channels get bfloat16, which has
    the range of float32 and in which their pipelines run; their force_upcast is true only by default.

    Args:
        force_upcast: From the VAE's configuration; None if it has no such key.
        latent_channels: Channels of a raw latent.
        dtype: The type of the pipeline.
    """
    if dtype != torch.float16 or force_upcast is False:
        return dtype
    return torch.float32 if latent_channels == 4 else torch.bfloat16


class Vae:
    """An autoencoder and its decodes.

    Args:
        model: An AutoencoderKL, AutoencoderKLFlux2, AutoencoderDC, AutoencoderKLQwenImage, AutoencoderKLQwenImage21
            or AutoencoderKLWan, on its device. It is converted to the type of `choose_vae_dtype`.
        latent_space: Of its latents.
        dtype: The type of the pipeline; None for the model's own.
        tiny: A decoder of the TAESD family for the same latents, on the same device, for previews.
        budget_bytes: Memory that a decode may use beyond weights and latents; above it "exact" works in strips if it
            can. None for the free memory of a GPU, and for no limit on a CPU.

    Attributes:
        compiled: The compiled decoder (`giantleap.models.vae.compiled.compile_decoder`); None for none.
        on_decode: Called after each decode with its way and the number of images.

    Raises:
        VaeError: The model is of another class, its latents are not those of the space, or `tiny` does not fit.
    """

    def __init__(
        self,
        model: Any,
        latent_space: LatentSpace,
        *,
        dtype: torch.dtype | None = None,
        tiny: AutoencoderTiny | None = None,
        budget_bytes: int | None = None,
    ) -> None:
        _check_model(model, latent_space)
        _check_tiny(tiny, latent_space)
        self.model = model
        self.latent_space = latent_space
        self.tiny = tiny
        self.budget_bytes = budget_bytes
        self.dtype = choose_vae_dtype(
            model.config.get("force_upcast"), latent_space.channels, model.dtype if dtype is None else dtype
        )
        self.compiled: CompiledDecoder | None = None
        self.on_decode: Callable[[DecodeWay, int], None] = _ignore
        self._shape = _strip_shape(model)
        self._dc_strips = DcStrips.of(model, self.dtype)
        self._restore_dtype()

    @property
    def decodes(self) -> tuple[DecodeName, ...]:
        """The available decodes."""
        return ("exact", "tiled") if self.tiny is None else ("exact", "tiled", "tiny")

    @property
    def device(self) -> torch.device:
        """The model's device."""
        device: torch.device = self.model.device
        return device

    def decode(self, raw: Tensor, how: DecodeName = "exact", on_part: PartCallback | None = None) -> Tensor:
        """Decode raw latents.

        Args:
            raw: [batch, channels, h, w], on any device, of any floating type.
            how: "exact" gives the image of the model's own decode, whole or in strips. "tiled" and "tiny" change it.
            on_part: Called after each part: a strip or a layer.

        Returns:
            [batch, 3, stride * h, stride * w], float32, on the model's device. The visible range is [-1, 1]; values are
            not clamped, so that values that are not finite can be detected.

        Raises:
            LatentSpaceError: These are no raw latents of the space.
            VaeError: The decode is not available.
        """
        self.latent_space.check_raw(tuple(raw.shape))
        if self.model.decoder is None:
            raise VaeError("this process only generates latents and has no VAE decoder")
        if how not in self.decodes:
            raise VaeError(f"decode {how!r}: this VAE has {', '.join(self.decodes)}{_missing_reason(how)}")
        image, way = self._decode(raw, how, on_part)
        self.on_decode(way, len(raw))
        return image.float()

    def _decode(self, raw: Tensor, how: DecodeName, on_part: PartCallback | None) -> tuple[Tensor, DecodeWay]:
        if how == "tiny" and self.tiny is not None:
            latents = raw.to(self.tiny.device, self.tiny.dtype)
            return decode_tiny(self.tiny, latents, self.latent_space, on_part), "tiny"
        raw = self._prepare(raw)
        if how == "tiled":
            return decode_tiled(self.model, raw, on_part), "tiled"
        shape, budget_bytes = tuple(raw.shape), self._budget_bytes()
        if self.compiled is not None and self.works_compiled(shape, budget_bytes):
            image, is_new = self.compiled.decode(raw, on_part)
            return image, "recompiled" if is_new else "compiled"
        if not self.works_in_strips(shape, budget_bytes):
            return decode_plain(self.model, raw, on_part), "whole"
        if self._dc_strips is not None:
            rows = self._dc_strips.choose_rows(*raw.shape[2:], batch=len(raw), budget_bytes=budget_bytes)
            return self._dc_strips.decode(self.model, raw, rows, on_part)[:, :3], "strips"
        return decode_exact(self.model, raw, budget_bytes, on_part=on_part), "strips"

    @torch.inference_mode()
    def decode_in_strips(self, raw: Tensor) -> Tensor:
        """As `decode` with "exact", but in strips at any size, as a large image is decoded.

        A VAE that cannot work in strips decodes the whole image.
        """
        raw = self._prepare(raw)
        if self._dc_strips is not None:
            return self._dc_strips.decode(self.model, raw, rows=1)[:, :3].float()
        if self._shape is None:
            return decode_plain(self.model, raw).float()
        dtype = str(self.dtype).removeprefix("torch.")
        plan = plan_decode(self._shape, raw.shape[2], raw.shape[3], dtype, batch=len(raw), min_strip_bytes=0)
        return decode_exact(self.model, raw, plan=plan).float()

    def encode(self, images: Tensor, on_part: PartCallback | None = None) -> Tensor:
        """Encode images to raw latents, the mean of the posterior.

        Args:
            images: [batch, 3, height_px, width_px] in [-1, 1], on any device; sides are multiples of the stride.
            on_part: Called after each layer.

        Returns:
            [batch, channels, h, w], float32, on the model's device.

        Raises:
            VaeError: The shape or a side does not fit.
        """
        stride_px = self.latent_space.stride_px
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape) < 1:
            raise VaeError(f"images to encode are [batch, 3, height, width]; found {list(images.shape)}")
        if images.shape[2] % stride_px or images.shape[3] % stride_px:
            raise VaeError(
                f"sides of images to encode are multiples of {stride_px} px in latent space {self.latent_space.name}; "
                f"found {images.shape[3]}x{images.shape[2]}"
            )
        return encode_mean(self.model, self._prepare(images), on_part).float()

    def drop_decoder(self) -> None:
        """Free the decoder's weights in a process that only generates latents; encoding still works."""
        self.model.decoder = None

    def works_in_strips(self, shape: tuple[int, ...], budget_bytes: int | None = None) -> bool:
        """Whether "exact" decodes latents of this shape in strips rather than whole."""
        batch, _, height, width = shape
        device = self.device.type
        if self._dc_strips is not None:
            return self._dc_strips.prefers_strips(height, width, batch=batch, device=device, budget_bytes=budget_bytes)
        if self._shape is None:
            return False
        dtype = str(self.dtype).removeprefix("torch.")
        return prefers_strips(self._shape, height, width, dtype, batch=batch, device=device, budget_bytes=budget_bytes)

    def works_compiled(self, shape: tuple[int, ...], budget_bytes: int | None = None) -> bool:
        """Whether "exact" decodes latents of this shape by the compiled decoder, which takes one image at a time.

        It needs the memory of the whole decode. Strips that are only faster give way for an AutoencoderDC whose memory
        is limited by a budget; of the other classes nothing was measured, and without a limit strips save memory.
        """
        if self.compiled is None:
            return False
        if self._dc_strips is not None and budget_bytes is not None:
            return not self._dc_strips.needs_strips(*shape[2:], budget_bytes=budget_bytes)
        return not self.works_in_strips((1, *shape[1:]), budget_bytes)

    def _budget_bytes(self) -> int | None:
        if self.budget_bytes is not None or self.device.type != "cuda":
            return self.budget_bytes
        kept_bytes = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(FREE_SHARE * (torch.cuda.mem_get_info(self.device)[0] + kept_bytes))

    def _prepare(self, values: Tensor) -> Tensor:
        self._restore_dtype()
        return values.to(self.model.device, self.dtype)

    def _restore_dtype(self) -> None:
        # SDXL's img2img pipeline leaves the VAE in the type of the prompt embeddings, which may be float16.
        if self.model.dtype != self.dtype:
            self.model.to(self.dtype)


def _ignore(_way: DecodeWay, _images: int) -> None:
    pass


def read_vae_model(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the autoencoder that a bundle decodes with, without its pipeline: the weights that the pipeline would load.

    Raises:
        BundleError: A file is missing or damaged.
    """
    with load_errors(bundle, "VAE"):
        model = _load_vae_model(bundle, dtype)
    return model.to(device)


def _load_vae_model(bundle: Bundle, dtype: torch.dtype) -> Any:
    source = bundle.vae or ModelSource(bundle.pipeline, bundle.revision, bundle.variant)
    variant = source.variant
    place = bundle.vae_directory or source.place
    if isinstance(place, Path) and not any(place.glob(f"*.{variant}[.-]*safetensors")):
        variant = None  # a part without files of the variant has files without one
    in_pipeline = bundle.vae is None and isinstance(place, str)
    return AutoModel.from_pretrained(
        str(place),
        subfolder="vae" if in_pipeline else "",
        revision=source.revision,
        variant=variant,
        torch_dtype=dtype,
        use_safetensors=True,
        local_files_only=isinstance(place, Path),
    )


def read_tiny(source: ModelSource, device: torch.device, dtype: torch.dtype) -> AutoencoderTiny:
    """Load the tiny VAE of a bundle, from safetensors only, and from disk only if it is a directory.

    Raises:
        OSError: The directory or a file in it is missing.
    """
    tiny: Any = AutoencoderTiny.from_pretrained(
        str(source.place),
        revision=source.revision,
        variant=source.variant,
        torch_dtype=dtype,
        use_safetensors=True,
        local_files_only=isinstance(source.place, Path),
    )
    moved: AutoencoderTiny = tiny.to(device)
    return moved


def _strip_shape(model: Any) -> DecoderShape | None:
    """The shape of a decoder that can work in strips; None for other decoders."""
    try:
        check_decoder(model)
    except UnknownDecoderError:
        return None
    return DecoderShape.from_config(model.config)


def decode_images(vae: Any, latents: Tensor) -> list[Image.Image]:
    """Decode raw latents with the VAE of a diffusers pipeline; large ones in strips, which saves memory.

    Args:
        vae: `pipe.vae`, of one of the classes that `Vae` takes.
        latents: Raw ones, [batch, channels, h, w], on any device.

    Raises:
        VaeError: The VAE is of another class.
        ValueError: The latents have another shape, or an image has a value that is not finite.
    """
    channels, stride_px = _latent_layout(vae)
    decoded = Vae(vae, LatentSpace(type(vae).__name__, channels, stride_px, scale=1.0)).decode(latents)
    if not bool(decoded.isfinite().all()):
        raise ValueError("a decoded image has values that are not finite; check the latents, or use another dtype")
    return [Image.fromarray(pixels.numpy()) for pixels in to_pixels(decoded / 2 + 0.5)]


def _latent_layout(model: Any) -> tuple[int, int]:
    """Channels of a raw latent, and image pixels per latent pixel."""
    if isinstance(model, STRIP_CLASSES):
        return model.config["latent_channels"], 2 ** (len(model.config["block_out_channels"]) - 1)
    if isinstance(model, DC_CLASSES):
        return model.config["latent_channels"], model.spatial_compression_ratio
    if isinstance(model, FRAME_CLASSES):
        return model.config["z_dim"], model.spatial_compression_ratio
    known = ", ".join(cls.__name__ for cls in (*STRIP_CLASSES, *DC_CLASSES, *FRAME_CLASSES))
    raise VaeError(f"a VAE is one of {known}; found {type(model).__name__}")


def _check_model(model: Any, space: LatentSpace) -> None:
    channels, stride_px = _latent_layout(model)
    if (channels, stride_px) != (space.channels, space.stride_px):
        raise VaeError(
            f"this {type(model).__name__} has {channels} latent channels and a stride of {stride_px} px; latent space "
            f"{space.name} has {space.channels} and {space.stride_px}"
        )


def _check_tiny(tiny: Any, space: LatentSpace) -> None:
    if tiny is None:
        return
    if not isinstance(tiny, AutoencoderTiny):
        raise VaeError(f"a tiny VAE is an AutoencoderTiny; found {type(tiny).__name__}")
    channels = tiny.config["latent_channels"]
    if channels != space.channels:
        raise VaeError(
            f"this AutoencoderTiny has {channels} latent channels; latent space {space.name} has {space.channels}"
        )
    if space.statistics_in_vae:
        raise VaeError(f"latent space {space.name}: no AutoencoderTiny is known that takes its scaled latents")


def _missing_reason(how: str) -> str:
    return "; tiny needs a tiny VAE of the bundle" if how == "tiny" else ""
