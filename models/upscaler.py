"""One LUA on one device, as a Python object: `load_upscaler` loads it from a bundle or from a weight file.

`giantleap.models.route.Route` is the whole way from a prompt to an image and uses the same `open_lua`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from giantleap.models.bundle.bundle import Bundle, BundleError, check_files
from giantleap.models.bundle.names import load_bundle
from giantleap.models.device import choose_device, choose_dtype, choose_upscaler_dtype
from giantleap.models.engines.base import Artifact, Engine, EngineName
from giantleap.models.engines.factory import open_engine
from giantleap.models.latent_space import LatentSpace
from giantleap.models.lua.checkpoints import read_lua
from giantleap.models.lua.clamp import LatentClamp
from giantleap.models.lua.spec import WEIGHT_SUFFIXES
from giantleap.models.lua.statistics import read_statistics


@dataclass(frozen=True, slots=True)
class Upscaler:
    """Upscales raw latents: `large = upscaler(latents, scale=2)`.

    Args:
        name: Of the bundle or of the weight file.
        engine: The loaded network.
        device: Where it runs.
        dtype: What it computes in; input and output are float32.
        scales: The scales that it is called with.
        latent_space: The latents that it is for; None for a weight file, which does not say.
        clamp: Bounds the output; None for no bound.
    """

    name: str
    engine: Engine
    device: torch.device
    dtype: torch.dtype
    scales: tuple[float, ...]
    latent_space: LatentSpace | None = None
    clamp: LatentClamp | None = None

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.engine.spec.channels

    @property
    def window(self) -> int:
        """Side of an attention window in latent pixels; latents of any size are padded to multiples of it."""
        return self.engine.spec.window

    def __call__(self, latents: Tensor, scale: float = 2) -> Tensor:
        """Upscale raw latents.

        Args:
            latents: [batch, channels, height, width], floating point, on any device. Latents that a pipeline returns
                are scaled: `upscaler.latent_space.to_raw` makes raw ones of them.
            scale: One of `scales`.

        Returns:
            [batch, channels, scale * height, scale * width], float32, on the upscaler's device.

        Raises:
            ValueError: The shape, the type, a value or the scale is wrong.
        """
        if not latents.is_floating_point():
            raise ValueError(f"latents must be floating point; found {latents.dtype}")
        if latents.dim() != 4 or latents.shape[1] != self.channels or 0 in latents.shape:
            raise ValueError(
                f"latents must be [batch, {self.channels}, height, width]; found {list(latents.shape)}{self._hint()}"
            )
        if scale not in self.scales:
            raise ValueError(f"scale must be one of {', '.join(map(str, self.scales))}; found {scale}")
        if not bool(latents.isfinite().all()):
            raise ValueError("latents hold NaN or infinite values; all must be finite")
        latents = latents.to(self.device, torch.float32)
        upscaled = self.engine.run(latents, scale)
        return upscaled if self.clamp is None else self.clamp.limit(latents, upscaled, scale)

    def __repr__(self) -> str:
        space = None if self.latent_space is None else self.latent_space.name
        return (
            f"Upscaler(name={self.name!r}, latent_space={space!r}, channels={self.channels}, scales={self.scales}, "
            f"window={self.window}, engine={self.engine.name!r}, device={str(self.device)!r}, dtype={self.dtype})"
        )

    def _hint(self) -> str:
        if self.latent_space is None or self.latent_space.packing == "none":
            return ""
        return "; unpack latents of a pipeline with upscaler.latent_space.to_raw(latents, height_px, width_px)"


def load_upscaler(
    source: Bundle | Path | str, *, device: torch.device | str = "auto", dtype: torch.dtype | str = "auto"
) -> Upscaler:
    """Load the LUA of a bundle, or one from a weight file.

    Args:
        source: A bundle, its directory or its name (`load_bundle`), or a `.safetensors`, `.pth`, `.pt` or `.ckpt` file.
        device: Where it runs; "auto" is the first GPU, else the CPU.
        dtype: What it computes in; "auto" is float32 on a CPU, on a GPU the type that the bundle names, else bfloat16.

    Raises:
        BundleError: The bundle cannot be read, has no LUA, or a file differs from its digest.
        CheckpointError: The weights cannot be read.
        FileNotFoundError: There is no such file.
        ValueError: The device does not exist or cannot compute in that type.
    """
    chosen = choose_device(str(device))
    dtype_name = str(dtype).removeprefix("torch.")
    if not isinstance(source, Bundle):
        path = Path(source)
        if path.is_file() or path.suffix.lower() in WEIGHT_SUFFIXES:
            return _load_file(path, chosen, choose_dtype(dtype_name, chosen))
        source = load_bundle(source)
    if source.lua is None:
        raise BundleError(source.unavailable_reason("lua"))
    check_files(source)
    compute_dtype = choose_dtype(dtype_name, chosen, source.dtype)
    engine, clamp = open_lua(source, source.lua, chosen, compute_dtype)
    scales = source.scales_of("lua")[1:]
    own_dtype = choose_upscaler_dtype(compute_dtype, chosen)
    return Upscaler(source.name, engine, chosen, own_dtype, scales, source.latent_space, clamp)


def open_lua(
    bundle: Bundle,
    weights: Path,
    device: torch.device,
    dtype: torch.dtype,
    engine: EngineName = "torch",
    artifacts: Mapping[int, Artifact] | None = None,
) -> tuple[Engine, LatentClamp | None]:
    """Load the LUA of a bundle and the bound that the bundle asks for.

    Raises:
        BundleError: The weights do not fit the descriptor.
        CheckpointError: The weights cannot be read.
        EngineError: The engine cannot run here.
        StatisticsError: The bundle asks for a bound and the weights hold no statistics.
    """
    net = read_lua(weights)
    bundle.check_lua(net.spec)
    sigmas = bundle.clamp_sigmas
    clamp = None if sigmas is None else LatentClamp(read_statistics(weights), sigmas, device)
    return open_engine(engine, net, device, dtype, artifacts), clamp


def _load_file(path: Path, device: torch.device, dtype: torch.dtype) -> Upscaler:
    net, dtype = read_lua(path), choose_upscaler_dtype(dtype, device)
    return Upscaler(path.name, open_engine("torch", net, device, dtype), device, dtype, net.spec.scales)
