"""Two nodes that send a LATENT to `/upscale` of a Giantleap service: one returns a LATENT, one a decoded IMAGE.

ComfyUI applies the scale and shift of a VAE within its models, so the samples of a LATENT are raw latents,
[B, C, h, w] or [B, C, 1, h, w] of a video VAE, which `/upscale` takes as they are. FLUX.2 is the exception: its LATENT
has the 2 x 2 patches of the transformer as channels, normalized by statistics of the VAE.
"""

import contextlib
import json
import os
import time
from typing import Any

import torch
from comfy.model_management import InterruptProcessingException, throw_exception_if_processing_interrupted
from torch import Tensor

from giantleap_client import Client, GiantleapError, Result, upscale_request
from giantleap_client.calls import Request
from giantleap_client.options import UpscaleOptions

_POLL_S = 0.2
_FINAL = frozenset({"succeeded", "failed", "canceled"})


class _Upscale:
    CATEGORY = "latent/giantleap"
    FUNCTION = "upscale"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs. The key is none of them: ComfyUI writes inputs into workflows and images."""
        return {
            "required": {
                "samples": ("LATENT",),
                "scale": ("FLOAT", {"default": 2.0, "min": 1.0, "max": 8.0, "step": 0.25}),
                "url": ("STRING", {"default": "http://127.0.0.1:8000"}),
                "bundle": (
                    "STRING",
                    {"default": "", "tooltip": "Of the model that made the latent; empty: the first."},
                ),
                "method": (["default", "lua", "bicubic", "swinir"],),
                "timeout_s": ("FLOAT", {"default": 300.0, "min": 1.0, "max": 86_400.0}),
            }
        }


class UpscaleLatent(_Upscale):
    """A larger LATENT."""

    RETURN_TYPES = ("LATENT",)

    def upscale(
        self, samples: dict[str, Any], scale: float, url: str, bundle: str, method: str, timeout_s: float
    ) -> tuple[dict[str, Any]]:
        """Upscale the samples; other entries of the LATENT, such as a noise mask, are kept."""
        options: UpscaleOptions = {"scale": scale, "output": "latent"}
        result, space = _send(samples["samples"], url, bundle, method, timeout_s, options)
        raw = torch.stack([result.tensor(index).float() for index in range(len(result))])
        larger = _fold(raw, space) if _is_folded(samples["samples"], space) else raw
        return ({**samples, "samples": larger},)


class UpscaleDecode(_Upscale):
    """A larger IMAGE, decoded by the service."""

    RETURN_TYPES = ("IMAGE",)

    def upscale(
        self, samples: dict[str, Any], scale: float, url: str, bundle: str, method: str, timeout_s: float
    ) -> tuple[Tensor]:
        """Enlarge and decode: float32 [B, H, W, 3] from 0 to 1."""
        result, _ = _send(samples["samples"], url, bundle, method, timeout_s, {"scale": scale})
        return (torch.stack([result.tensor(index).permute(1, 2, 0) for index in range(len(result))]),)


NODE_CLASS_MAPPINGS = {"GiantleapUpscaleLatent": UpscaleLatent, "GiantleapUpscaleDecode": UpscaleDecode}
NODE_DISPLAY_NAME_MAPPINGS = {
    "GiantleapUpscaleLatent": "Upscale Latent (Giantleap)",
    "GiantleapUpscaleDecode": "Upscale Latent and Decode (Giantleap)",
}


def _send(
    latents: Tensor, url: str, bundle: str, method: str, timeout_s: float, options: UpscaleOptions
) -> tuple[Result, dict[str, Any]]:
    """The files, and the latent space of the bundle as `GET /models` describes it."""
    with Client(url, os.environ.get("GIANTLEAP_API_KEY"), timeout_s=timeout_s) as client:
        model = _find_model(client, bundle)
        options["bundle"] = model["name"]
        if method != "default":
            options["method"] = method
        space: dict[str, Any] = model["latent_space"]
        if _is_folded(latents, space):  # as a row of tokens, which is the form of the pipeline
            height, width = (2 * space["stride"] * side for side in latents.shape[-2:])
            options |= {"scaled": True, "height": height, "width": width}
            latents = latents.flatten(2).transpose(1, 2)
        return _run(client, upscale_request(latents, **options), timeout_s), space


def _find_model(client: Client, bundle: str) -> dict[str, Any]:
    models: list[dict[str, Any]] = json.loads(client.send("GET", "models"))
    for model in models:
        if bundle in ("", model["name"]):
            return model
    raise ValueError(f"the service has no bundle {bundle!r}; it has {', '.join(model['name'] for model in models)}")


def _run(client: Client, request: Request, timeout_s: float) -> Result:
    """Wait for a job; ComfyUI's button cancels it."""
    job = client.submit(request, cancel_after_s=timeout_s)
    try:
        while job.show()["status"] not in _FINAL:
            throw_exception_if_processing_interrupted()
            time.sleep(_POLL_S)
    except InterruptProcessingException:
        with contextlib.suppress(GiantleapError):  # it has ended
            job.cancel()
        raise
    return job.result()


def _is_folded(latents: Tensor, space: dict[str, Any]) -> bool:
    return bool(space["packing"] == "flux" and latents.shape[1] == 4 * space["channels"])


def _fold(raw: Tensor, space: dict[str, Any]) -> Tensor:
    """Shape: [B, C, 2 h, 2 w] raw -> [B, 4 C, h, w] normalized."""
    batch, channels, height, width = raw.shape
    patches = raw.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    folded = patches.reshape(batch, 4 * channels, height // 2, width // 2)
    mean, std = (torch.tensor(space[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    return (folded - mean) / std * float(space["scale"])
