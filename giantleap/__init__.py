"""Giantleap upscales the latents of diffusion models with a Latent Upscaler Adapter (LUA).

The names below are the Python interface; docs/python.md shows their use. They are imported on first use, so that
`import giantleap` loads neither torch nor diffusers. `giantleap.cli` is the command line, `giantleap.service` the
service.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from giantleap.models.bundle.bundle import Bundle, BundleError
    from giantleap.models.bundle.names import load_bundle
    from giantleap.models.generation.items import GenerationItem
    from giantleap.models.load import load_route
    from giantleap.models.route import Route
    from giantleap.models.upscaler import Upscaler, load_upscaler
    from giantleap.models.vae.autoencoder import decode_images

__all__ = [
    "Bundle",
    "BundleError",
    "GenerationItem",
    "Route",
    "Upscaler",
    "decode_images",
    "load_bundle",
    "load_route",
    "load_upscaler",
]

_MODULES = {
    "Bundle": "models.bundle.bundle",
    "BundleError": "models.bundle.bundle",
    "GenerationItem": "models.generation.items",
    "Route": "models.route",
    "Upscaler": "models.upscaler",
    "decode_images": "models.vae.autoencoder",
    "load_bundle": "models.bundle.names",
    "load_route": "models.load",
    "load_upscaler": "models.upscaler",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'giantleap' has no attribute {name!r}")
    return getattr(import_module(f"giantleap.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
