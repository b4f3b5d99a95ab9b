"""Sources of a generation besides noise: an image, an image with a mask, or reference images.

`with_images` gives the pipeline that takes them, around the same networks, and its arguments.
"""

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from giantleap.models.bundle.descriptor import takes_mask
from giantleap.models.generation.families import Family
from giantleap.models.generation.items import GenerationItem


def check_images(item: GenerationItem, pipeline: Any, family: Family, channels: int) -> None:
    """Raise ValueError for images of an item that its pipeline does not take, or that do not fit each other.

    Args:
        item: To generate.
        pipeline: Of the family.
        family: Of the pipeline.
        channels: Of a raw latent.
    """
    size, name = (item.height_px, item.width_px), type(pipeline).__name__
    if len(item.references) > family.max_references:
        raise ValueError(f"{name} takes {family.max_references} reference images, not {len(item.references)}")
    if item.references and item.init_image is not None:
        raise ValueError("reference images and an init_image exclude each other; leave one of them out")
    if item.mask is not None:
        _check_mask(item.mask, item.init_image, name, family, channels, size)
    if item.init_image is None:
        return
    if item.mask is None and family.image_pipeline is None:
        raise ValueError(f"{name} cannot start from an image: diffusers has no image-to-image pipeline for it")
    if tuple(item.init_image.shape) != (3, *size):
        raise ValueError(f"init_image must be {[3, *size]}; found {list(item.init_image.shape)}")
    if not 0 < item.strength <= 1 or int(item.steps * item.strength) < 1:
        raise ValueError(
            f"strength {item.strength} of {item.steps} steps: must be above 0, at most 1, and leave a step to do"
        )


def _check_mask(
    mask: Tensor, init_image: Tensor | None, name: str, family: Family, channels: int, size: tuple[int, int]
) -> None:
    if init_image is None:
        raise ValueError("a mask needs the init_image that it belongs to")
    if not takes_mask(name, channels):
        raise ValueError(f"{name} takes no mask: diffusers has no inpaint pipeline for it with {channels} channels")
    if tuple(mask.shape) != (1, *size):
        raise ValueError(f"mask must be {[1, *size]}; found {list(mask.shape)}")
    if family.max_mask_px is not None and size[0] * size[1] > family.max_mask_px:
        raise ValueError(f"{name} takes a mask up to {family.max_mask_px} pixels; {size[1]}x{size[0]} are more")


def with_images(
    pipeline: Any, family: Family, items: Sequence[GenerationItem], stride_px: int
) -> tuple[Any, dict[str, Any]]:
    """The pipeline that takes the images of a batch, and its further arguments; without images the pipeline itself.

    Args:
        pipeline: Of the family. Its networks are shared, not copied.
        family: Of the pipeline.
        items: That `check_images` accepts, alike in whether they have images and a mask; one, if it has references.
        stride_px: Image pixels per latent pixel. A latent pixel of which the mask covers a part is generated again.
    """
    first = items[0]
    if first.references:
        images = [Image.fromarray(reference.numpy()) for reference in first.references]
        return _around(pipeline, type(pipeline)), {"image": images}
    starts = [item.init_image for item in items if item.init_image is not None]
    if not starts:
        return pipeline, {}
    # Pipelines take tensors in [0, 1]; one in [-1, 1] without a negative value would pass as such.
    arguments = {"image": torch.stack(starts).clamp(-1, 1) / 2 + 0.5, "strength": first.strength}
    masks = [item.mask for item in items if item.mask is not None]
    if not masks:
        assert family.image_pipeline is not None
        return _around(pipeline, family.image_pipeline), arguments
    assert family.inpaint_pipeline is not None
    # The pipelines look at one pixel of each latent pixel, and would miss a line between those.
    covered = F.interpolate(F.max_pool2d(torch.stack(masks), stride_px), scale_factor=float(stride_px))
    return _around(pipeline, family.inpaint_pipeline), arguments | {"mask_image": covered}


def _around(pipeline: Any, other: Any) -> Any:
    """Another pipeline class around the same networks; `from_pipe` of diffusers would convert them to float32."""
    parts = pipeline.components | {"vae": _ImageEncoder(pipeline.vae)}
    options = {
        name: pipeline.config[name]
        for name in inspect.signature(other).parameters
        if name in pipeline.config and name not in parts
    }
    made = other(**parts, **options)
    made.set_progress_bar_config(disable=True)
    return made


class _ImageEncoder:
    """The VAE of a pipeline that takes images, which encodes to the posterior's mean and keeps its weights' type.

    The pipelines themselves sample the posterior, give the VAE images of another type than its weights, or (SDXL) leave
    the weights in another type.
    """

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def to(self, *args: Any, **options: Any) -> Self:
        return self

    def encode(self, image: Tensor) -> Any:
        codes = self._vae.encode(image.to(self._vae.dtype))
        mean = (codes.latent if hasattr(codes, "latent") else codes.latent_dist.mode()).to(image.dtype)
        return SimpleNamespace(latents=mean, latent=mean)
