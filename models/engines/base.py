"""The terms that all engines share: their names, the `Engine` protocol, exported artifacts and errors.

An engine is what runs LUA; `models/engines/factory.py` opens the one that a setting names. This module imports no
torch, so that the settings and `giantleap.export.manifest` can use it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from giantleap.models.lua.spec import LuaSpec

if TYPE_CHECKING:
    from torch import Tensor

EngineName = Literal["torch", "torch-compile", "onnx", "tensorrt", "aoti"]
ArtifactEngineName = Literal["onnx", "tensorrt", "aoti"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

Runner = Callable[["Tensor"], "Tensor"]
"""float32 [batch, channels, h, w], multiples of the window -> float32 [batch, channels, scale * h, scale * w]."""

InputShape = tuple[int, int, int]
"""Batch, height and width in latent pixels."""


class EngineError(ValueError):
    """An engine that cannot run here; the message is one line that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A range of input shapes that an artifact was tuned for, as TensorRT's optimization profiles are.

    Args:
        name: Side of the largest square, in latent pixels.
        min_shape: Smallest batch, height and width.
        opt_shape: The shape that kernels are chosen for.
        max_shape: Largest batch, height and width.
    """

    name: str
    min_shape: InputShape
    opt_shape: InputShape
    max_shape: InputShape

    def holds(self, shape: InputShape) -> bool:
        """Whether an input of this shape is in the range."""
        return all(low <= side <= high for low, side, high in zip(self.min_shape, shape, self.max_shape, strict=True))


@dataclass(frozen=True, slots=True)
class Artifact:
    """An exported graph of one scale.

    Args:
        path: The file that the engine opens.
        input: Name of its input.
        output: Name of its output.
        profiles: Shapes that it takes, smallest first; empty for any shape.
    """

    path: Path
    input: str
    output: str
    profiles: tuple[Profile, ...] = ()


class Engine(Protocol):
    """A LUA that is loaded on a device."""

    @property
    def name(self) -> EngineName:
        """Name of the engine."""
        ...

    @property
    def spec(self) -> LuaSpec:
        """The network's spec."""
        ...

    def run(self, latent: "Tensor", scale: float) -> "Tensor":
        """Upscale a raw latent of any size.

        Args:
            latent: [batch, channels, height, width].
            scale: One of the scales of `spec`.

        Returns:
            [batch, channels, scale * height, scale * width], float32.

        Raises:
            ValueError: The shape is wrong, or the engine was not built for the scale or size.
        """
        ...

    def close(self) -> None:
        """Free device memory; the engine cannot run after that."""
        ...


def choose_profile(profiles: Sequence[Profile], shape: InputShape) -> int:
    """Index of the first profile that holds a shape.

    Raises:
        EngineError: No profile holds it; the message names the largest.
    """
    for index, profile in enumerate(profiles):
        if profile.holds(shape):
            return index
    batch, height, width = shape
    raise EngineError(
        f"no profile holds a batch of {batch} latents of {height}x{width}; the largest is {profiles[-1].max_shape}"
    )


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, at most 300 characters."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
