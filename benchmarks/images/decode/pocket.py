"""Time a bundle's decoder by every way in turns: plain, exact by strips, compiled whole, and in ONNX Runtime.

Each way is compared with the plain decode of the same latents. A way that does not run here is a row with its reason.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from giantleap.cli.bench.engines import interleave
from giantleap.export.graphs import DecoderGraph, trace
from giantleap.export.manifest import INPUT, OUTPUTS
from giantleap.export.onnx_files import write_onnx
from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.engines.base import Artifact
from giantleap.models.engines.compiled import require_compiler
from giantleap.models.engines.onnx_runtime import open_graph
from giantleap.models.vae.autoencoder import read_vae_model
from giantleap.models.vae.compiled import CompiledDecoder
from giantleap.models.vae.dc_strips import DcStrips
from giantleap.models.vae.decode import decode_exact, decode_plain

CPU = torch.device("cpu")
WARMUPS = 1
Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class WayFigures:
    """One way at one size.

    `ratio` is its median over that of the plain decode in the same turns, `max_difference` that of a pixel in [-1, 1].
    """

    way: str
    image_px: int
    median_ms: float | None = None
    ratio: float | None = None
    max_difference: float | None = None
    error: str | None = None


def open_exact(vae: Any, dtype: torch.dtype) -> Decode:
    """The exact decode in the strips that its kind of decoder has."""
    strips = DcStrips.of(vae, dtype)
    if strips is None:
        return partial(decode_exact, vae)
    return lambda latents: strips.decode(vae, latents, strips.choose_rows(*latents.shape[2:]))


def open_compiled(vae: Any, device: torch.device) -> Decode:
    """The compiled decoder that a worker has, of a copy of the VAE; a size of another kind is compiled when it comes.

    Raises:
        EngineError: There is no compiler for the device.
    """
    require_compiler(device)
    return CompiledDecoder(copy.deepcopy(vae)).compile


def open_onnx(vae: Any, channels: int, folder: Path) -> Decode:
    """The graph of `giantleap export --part decoder` in ONNX Runtime.

    Raises:
        EngineError: A package is missing, or the graph cannot be written or opened.
    """
    program = trace(DecoderGraph(vae, torch.float32), channels, 1)
    path, *_ = write_onnx(program, folder / "decoder.onnx", OUTPUTS["decoder"])
    return open_graph(Artifact(path, INPUT, OUTPUTS["decoder"]), CPU)


def open_ways(vae: Any, channels: int, folder: Path) -> tuple[dict[str, Decode], dict[str, str]]:
    """Every way that runs here, and the reason for each that does not."""
    openers: dict[str, Callable[[], Decode]] = {
        "plain": lambda: partial(decode_plain, vae),
        "exact": lambda: open_exact(vae, torch.float32),
        "compiled": lambda: open_compiled(vae, CPU),
        "onnxruntime": lambda: open_onnx(vae, channels, folder),
    }
    ways: dict[str, Decode] = {}
    missing: dict[str, str] = {}
    for way, opener in openers.items():
        try:
            ways[way] = opener()
        except ValueError as error:  # EngineError and what export raises
            missing[way] = f"not available: {str(error).splitlines()[0]}"
    return ways, missing


@torch.inference_mode()
def measure_size(ways: dict[str, Decode], latents: Tensor, runs: int) -> list[WayFigures]:
    """Time the ways in turns on these latents; "plain" must be among them."""
    images = {way: decode(latents) for way, decode in ways.items()}  # compiles
    timings = interleave({way: partial(decode, latents) for way, decode in ways.items()}, WARMUPS, runs, CPU)
    return [
        WayFigures(
            way,
            images[way].shape[-1],
            1e3 * timing.median_s,
            timing.median_s / timings["plain"].median_s,
            float((images[way] - images["plain"]).abs().max()),
        )
        for way, timing in timings.items()
    ]


def measure_bundle(directory: Path, sides_px: Sequence[int], threads: int, runs: int) -> list[dict[str, Any]]:
    """Measure and print every way at every size; random latents of the bundle's latent space."""
    torch.set_num_threads(threads)
    bundle = read_bundle(directory)
    vae = read_vae_model(bundle, CPU, torch.float32).eval()
    rows: list[WayFigures] = []
    with tempfile.TemporaryDirectory() as folder:
        ways, missing = open_ways(vae, bundle.latent_space.channels, Path(folder))
        for side_px in sides_px:
            done = measure_size(ways, random_latents(bundle, side_px), runs)
            done += [WayFigures(way, side_px, error=reason) for way, reason in missing.items()]
            for row in done:
                print(line(row), flush=True)
            rows += done
    return [asdict(row) for row in rows]


def random_latents(bundle: Bundle, side_px: int) -> Tensor:
    """Normal noise for one square image, always the same."""
    side = side_px // bundle.latent_space.stride_px
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, bundle.latent_space.channels, side, side, generator=generator)


def line(row: WayFigures) -> str:
    """Format one row."""
    head = f"{row.image_px:>5} px {row.way:<12}"
    if row.error is not None:
        return f"{head}{row.error}"
    return f"{head}{row.median_ms:>9.1f} ms{row.ratio:>7.2f} of plain  difference {row.max_difference:.1e}"
