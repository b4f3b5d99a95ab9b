"""The requests that the doctor makes of a bundle, from its entry in /models: small ones, and a long one."""

import io
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

_NEEDED: Final = frozenset(
    {"name", "scale", "min_base", "max_base", "max_steps", "max_images", "max_image_pixels", "methods", "latent_space"}
)
_PROMPT: Final = "a red sphere on a green floor"
_SEED: Final = 7


@dataclass(frozen=True, slots=True)
class LatentRequest:
    """A latent to enlarge.

    Args:
        query: Of /upscale.
        body: The latent as .npy.
        shape: That of the enlarged one: channels, height, width.
    """

    query: dict[str, str]
    body: bytes
    shape: tuple[int, int, int]


def are_models(document: Any) -> bool:
    """Whether a JSON document is that of /models, as this version reads it."""
    entries = document if isinstance(document, list) else []
    return bool(entries) and all(isinstance(entry, dict) and entry.keys() >= _NEEDED for entry in entries)


def to_small_body(model: dict[str, Any]) -> dict[str, Any]:
    """The body of /generate for the smallest image of a bundle."""
    side_px = int(model["min_base"] * model["scale"])
    return {
        "prompt": _PROMPT,
        "bundle": model["name"],
        "scale": model["scale"],
        "width": side_px,
        "height": side_px,
        "seed": _SEED,
        "output_format": "png",
    }


def to_long_body(model: dict[str, Any]) -> dict[str, Any]:
    """The body of the longest job that a bundle allows at its default scale; the doctor cancels it."""
    side_px = int(model["max_base"] * model["scale"])
    largest_px = int(model["max_image_pixels"] ** 0.5)
    small = to_small_body(model)
    if side_px > largest_px:
        side_px = small["width"]
    return small | {
        "width": side_px,
        "height": side_px,
        "steps": model["max_steps"],
        "num_images": model["max_images"],
    }


def to_openai_body(model: dict[str, Any]) -> dict[str, Any]:
    """The body of /v1/images/generations for the smallest image; its answer has a whole URL."""
    small = to_small_body(model)
    size = f"{small['width']}x{small['height']}"
    return {"prompt": _PROMPT, "model": model["name"], "size": size, "response_format": "url"}


def to_latent_request(model: dict[str, Any]) -> LatentRequest | None:
    """A small random latent for /upscale; None where the bundle enlarges no latents."""
    space, methods = model["latent_space"], model["methods"]
    method = next((name for name in ("lua", "bicubic") if methods.get(name)), None)
    scales = [] if method is None else [scale for scale in methods[method] if scale > 1]
    if method is None or not scales:
        return None
    side = -(-model["min_base"] // space["stride"])
    shape = (space["channels"], side, side)
    file = io.BytesIO()
    np.save(file, np.random.default_rng(_SEED).standard_normal(shape).astype(np.float32))
    enlarged = (space["channels"], int(side * scales[0]), int(side * scales[0]))
    query = {"bundle": model["name"], "scale": f"{scales[0]}", "method": method, "output": "latent"}
    return LatentRequest(query, file.getvalue(), enlarged)
