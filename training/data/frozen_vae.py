"""The frozen VAE of a bundle for training: encode to posterior means, decode with a gradient.

`giantleap.models.vae.autoencoder.Vae.decode` keeps no gradient, so a pixel loss through it would train nothing.
Losses use `decode_with_gradient`, which raises when no gradient passes.
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from giantleap.models.bundle.bundle import Bundle, BundleError
from giantleap.models.bundle.digests import file_hashes
from giantleap.models.device import warn_of_slow_dtype
from giantleap.models.vae.autoencoder import Vae, read_vae_model
from giantleap.models.vae.decode import FRAME_CLASSES


class NoGradientError(RuntimeError):
    """A decode carries no gradient, so a loss on it would train nothing."""


def read_vae(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> Vae:
    """Load the VAE alone, frozen and in eval mode.

    Args:
        bundle: The bundle.
        device: Where it runs.
        dtype: Requested compute type; `giantleap.models.vae.autoencoder.choose_vae_dtype` may override it.

    Raises:
        BundleError: The VAE is still on the hub.
        OSError: A file is missing.
        VaeError: The VAE does not match the bundle's latent space.
    """
    require_vae(bundle)
    warn_of_slow_dtype(dtype, device)
    model = read_vae_model(bundle, device, torch.float32).requires_grad_(False).eval()
    return Vae(model, bundle.latent_space, dtype=dtype)


def require_vae(bundle: Bundle) -> Path:
    """Return the directory of the bundle's VAE.

    Raises:
        BundleError: It is still on the hub.
    """
    if bundle.vae_directory is None:
        raise BundleError(
            f"bundle {bundle.name}: its VAE is on the hub: run `giantleap bundle pull {bundle.name}` first"
        )
    return bundle.vae_directory


def vae_hash(bundle: Bundle) -> str:
    """Return one SHA-256 over the VAE's weight files; pairs and runs store it to detect a mismatch.

    Raises:
        BundleError: The VAE is still on the hub.
    """
    hashes = file_hashes(require_vae(bundle))
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def decode_with_gradient(vae: Vae, raw: Tensor, is_checkpointed: bool = True) -> Tensor:
    """Decode raw latents to pictures, differentiable in the latents.

    Pictures are decoded one at a time. With checkpoints, the feature maps of only one picture are in memory at a time,
    because the backward pass recomputes them.

    Args:
        vae: The frozen VAE (`read_vae`).
        raw: Latents [batch, channels, h, w] that require a gradient.
        is_checkpointed: Whether to recompute feature maps in the backward pass.

    Returns:
        Pictures [batch, 3, stride * h, stride * w], float32, visible in [-1, 1], not clamped.

    Raises:
        NoGradientError: The latents carry no gradient, or it is lost.
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
    """Decode the targets with the same arithmetic as `decode_with_gradient`, without gradient.

    Maps [batch, channels, h, w] to [batch, 3, stride * h, stride * w], float32.
    """
    return torch.cat([_decode(vae, latent) for latent in raw.to(vae.device, vae.dtype).split(1)]).float()


def _decode(vae: Vae, latent: Tensor) -> Tensor:
    frames = isinstance(vae.model, FRAME_CLASSES)
    vae.model.use_tiling = False
    image: Tensor = vae.model.decode(latent[:, :, None] if frames else latent, return_dict=False)[0]
    return (image[:, :, 0] if frames else image)[:, :3]
