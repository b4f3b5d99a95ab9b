"""The VAE of a bundle as a training needs it: frozen, encoding to posterior means, decoding with a gradient.

`giantleap.models.vae.autoencoder.Vae.decode` serves and keeps no gradient; a pixel loss through it would train nothing
and say nothing. `decode_with_gradient` here is the only decode that a loss may see, and it refuses to return what
carries no gradient.
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from giantleap.models.bundle.bundle import Bundle, BundleError
from giantleap.models.bundle.digests import file_hashes
from giantleap.models.vae.autoencoder import Vae, read_vae_model
from giantleap.models.vae.decode import FRAME_CLASSES


class NoGradientError(RuntimeError):
    """A decode for a loss that would train nothing."""


def read_vae(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> Vae:
    """Loads the VAE alone, frozen and in eval mode; of the pipeline nothing else is read.

    Args:
        dtype: What it is asked to compute in; `giantleap.models.vae.autoencoder.choose_vae_dtype` has the last word.

    Raises:
        BundleError: The VAE is still on the hub.
        OSError: A file is missing. VaeError: it is not of the bundle's latent space.
    """
    require_vae(bundle)
    model = read_vae_model(bundle, device, torch.float32).requires_grad_(False).eval()
    return Vae(model, bundle.latent_space, dtype=dtype)


def require_vae(bundle: Bundle) -> Path:
    """Where the VAE lies that the bundle decodes with.

    Raises:
        BundleError: It is still on the hub.
    """
    if bundle.vae_directory is None:
        raise BundleError(
            f"bundle {bundle.name}: its VAE is on the hub: run `giantleap bundle pull {bundle.name}` first"
        )
    return bundle.vae_directory


def vae_hash(bundle: Bundle) -> str:
    """One SHA-256 over the VAE's weight files: pairs and runs name it, so that they cannot be of two VAEs.

    Raises:
        BundleError: The VAE is still on the hub.
    """
    hashes = file_hashes(require_vae(bundle))
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def decode_with_gradient(vae: Vae, raw: Tensor, is_checkpointed: bool = True) -> Tensor:
    """Raw latents to pictures, differentiable in the latents; the VAE's own weights stay as they are.

    Pictures are decoded one after the other. With checkpoints the feature maps of one picture are alive at a time,
    whatever the batch: the backward pass computes each picture's again.

    Args:
        vae: Its weights are frozen (`read_vae`).
        raw: Has a gradient.

    Returns:
        Pictures whose visible range is [-1, 1]; not clamped.

    **Shape** [batch, channels, h, w] -> [batch, 3, stride * h, stride * w], float32.

    **Raises** NoGradientError: the latents carry no gradient, or it is lost on the way.
    """
    if not (torch.is_grad_enabled() and raw.requires_grad):
        raise NoGradientError("latents to decode for a loss carry no gradient: the loss would train nothing")
    images: list[Tensor] = []
    for latent in raw.to(vae.device, vae.dtype).split(1):
        if is_checkpointed:
            images.append(checkpoint(_decode, vae, latent, use_reentrant=False))
        else:
            images.append(_decode(vae, latent))
    decoded = torch.cat(images).float()
    if not decoded.requires_grad:
        raise NoGradientError("the decoder lost the gradient: the loss would train nothing")
    return decoded


@torch.no_grad()
def decode_target(vae: Vae, raw: Tensor) -> Tensor:
    """The pictures that `decode_with_gradient` is compared with, by the same arithmetic; no gradient.

    **Shape** [batch, channels, h, w] -> [batch, 3, stride * h, stride * w], float32.
    """
    return torch.cat([_decode(vae, latent) for latent in raw.to(vae.device, vae.dtype).split(1)]).float()


def _decode(vae: Vae, latent: Tensor) -> Tensor:
    frames = isinstance(vae.model, FRAME_CLASSES)
    vae.model.use_tiling = False
    image: Tensor = vae.model.decode(latent[:, :, None] if frames else latent, return_dict=False)[0]
    return (image[:, :, 0] if frames else image)[:, :3]
