"""Compare the decode methods (time, memory, difference to the plain decode) on full-size decoders with random weights.

Each method runs in a separate process, so that resident memory is its own. Live bytes are counted on the meta device
(`models/live_storage.py`), which also covers sizes that do not fit in memory. Timing does not depend on the weights;
the difference of the tiled decode does. On a GPU: `benchmarks/gpu_check/decode.py`.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.images.decode.cases import VAE_CONFIGS, Case, DecodeMethod, stride_px
from giantleap.models.latent_space import LATENT_SPACES
from giantleap.models.live_storage import LiveStorage
from giantleap.models.vae.dc_strips import DcStrips
from giantleap.models.vae.decode import decode_exact, decode_plain, decode_tiled, decode_tiny
from giantleap.models.vae.strip_plan import DecoderShape, plain_decode_bytes, plan_decode

SEED = 0


@dataclass(frozen=True)
class DecodeFigures:
    """One method at one size. Differences are to the plain decode; None without a comparison.

    `wall_s` and `cpu_s` are medians over the runs after a small warm-up, `rss_bytes` is the growth of resident memory,
    `live_bytes` and `largest_elements` are counted on the meta device.
    """

    method: DecodeMethod
    image_px: int
    wall_s: float | None
    cpu_s: float | None
    rss_bytes: int | None
    live_bytes: int
    estimated_bytes: int | None
    largest_elements: int
    max_difference: float | None
    mean_difference: float | None


def build_decoder(family: str, method: DecodeMethod) -> Any:
    """Build the autoencoder of a family (AutoencoderTiny for "tiny") at full size with fixed random weights."""
    torch.manual_seed(SEED)
    if method == "tiny":
        return AutoencoderTiny(latent_channels=VAE_CONFIGS[family]["latent_channels"]).eval()
    cls: Any = AutoencoderDC if "encoder_block_out_channels" in VAE_CONFIGS[family] else AutoencoderKL
    return cls(**VAE_CONFIGS[family]).eval()


def random_latents(family: str, image_px: int, device: str | torch.device = "cpu") -> Tensor:
    """Return random raw latents of one square image."""
    side = image_px // stride_px(family)
    generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(SEED)
    shape = (1, VAE_CONFIGS[family]["latent_channels"], side, side)
    return torch.randn(shape, generator=generator, device=device)


def run_decode(
    vae: Any, family: str, method: DecodeMethod, latents: Tensor, dc_strips: DcStrips | None = None
) -> Tensor:
    """Decode by one of the methods; an AutoencoderDC with its own strips."""
    if method == "exact" and dc_strips is not None:
        return dc_strips.decode(vae, latents, dc_strips.choose_rows(*latents.shape[2:]))
    if method == "exact":
        return decode_exact(vae, latents)
    if method == "tiled":
        return decode_tiled(vae, latents)
    if method == "tiny":
        return decode_tiny(vae, latents, LATENT_SPACES[family])
    return decode_plain(vae, latents)


def count_live(family: str, method: DecodeMethod, image_px: int, dtype: torch.dtype) -> LiveStorage:
    """Measure the peak of live tensors on the meta device."""
    with torch.device("meta"):
        vae = build_decoder(family, method).to(dtype)
    live, dc_strips = LiveStorage(), DcStrips.of(vae, dtype)
    latents = random_latents(family, image_px, "meta").to(dtype)
    with live:
        run_decode(vae, family, method, latents, dc_strips)
    return live


def run_child(case: Case, method: DecodeMethod, image_px: int, image_path: Path) -> dict[str, float]:
    """Measure time and resident memory of one method in this process and write the image to `image_path`."""
    torch.set_num_threads(case.threads)
    diffusers_logging.set_verbosity_error()
    family, dtype = case.family, getattr(torch, case.dtype)
    vae = build_decoder(family, method).to(dtype)
    if case.channels_last:
        vae.to(memory_format=torch.channels_last)
    latents = random_latents(family, image_px).to(dtype)
    dc_strips = DcStrips.of(vae, dtype)
    run_decode(vae, family, method, random_latents(family, 64).to(dtype), dc_strips)
    before_bytes = psutil.Process().memory_info().rss
    walls_s, cpus_s = [], []
    for _ in range(case.runs):
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        image = run_decode(vae, family, method, latents, dc_strips)
        walls_s.append(time.perf_counter() - wall_s)
        cpus_s.append(time.process_time() - cpu_s)
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
    save_file({"image": image.float().contiguous()}, image_path)
    return {
        "wall_s": statistics.median(walls_s),
        "cpu_s": statistics.median(cpus_s),
        "rss_bytes": peak_bytes - before_bytes,
    }


def run_in_process(case: Case, method: DecodeMethod, image_px: int, image_path: Path) -> dict[str, Any]:
    """Run `run_child` in a separate process.

    Raises:
        RuntimeError: The process failed; the message has the end of its output.
    """
    command = [sys.executable, "-m", "benchmarks.images.decode", *case.options, "--methods", method]
    command += ["--px", str(image_px), "--child", str(image_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{method} at {image_px} px ended with {ended.returncode}: {ended.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return figures


def measure_size(
    case: Case, methods: Sequence[DecodeMethod], image_px: int, largest_run_px: int
) -> list[DecodeFigures]:
    """Measure all methods at one size; above `largest_run_px` only on the meta device."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.safetensors"
        for method in methods:
            measured: dict[str, Any] = {"wall_s": None, "cpu_s": None, "rss_bytes": None}
            difference: tuple[float | None, float | None] = (None, None)
            if image_px <= largest_run_px:
                path = Path(folder) / f"{method}.safetensors"
                measured = run_in_process(case, method, image_px, path)
                if method in ("exact", "tiled") and plain.exists():
                    difference = compare(path, plain)
            live = count_live(case.family, method, image_px, getattr(torch, case.dtype))
            side = image_px // stride_px(case.family)
            estimate = estimate_bytes(case.family, method, side, case.dtype)
            row = DecodeFigures(
                method,
                image_px,
                **measured,
                live_bytes=live.peak_bytes,
                estimated_bytes=estimate,
                largest_elements=live.largest_elements,
                max_difference=difference[0],
                mean_difference=difference[1],
            )
            print(line(row), flush=True)
            rows.append(row)
    return rows


def estimate_bytes(family: str, method: DecodeMethod, side: int, dtype: str) -> int | None:
    """What the decode plan expects; it knows the whole decode and the one in strips."""
    if method not in ("plain", "exact"):
        return None
    with torch.device("meta"):
        vae = build_decoder(family, method)
    cut = DcStrips.of(vae, getattr(torch, dtype))
    if cut is not None:
        whole_bytes = int(cut.whole_decode.bytes_per_px * side * side)
        return whole_bytes if method == "plain" else cut.peak_bytes(side, side, cut.choose_rows(side, side))
    shape = DecoderShape.from_config(vae.config)
    if method == "exact":
        return plan_decode(shape, side, side, dtype).peak_bytes
    return plain_decode_bytes(shape, side, side, dtype)


def compare(path: Path, plain: Path) -> tuple[float, float]:
    """Return the largest and mean absolute difference of two stored images (about [-1, 1])."""
    difference = (load_file(path)["image"] - load_file(plain)["image"]).abs()
    return float(difference.max()), float(difference.mean())


HEADER = (
    f"{'px':>5} {'method':<7}{'wall s':>9}{'cpu s':>9}{'rss MiB':>9}{'live MiB':>10}{'estimate':>10}"
    f"{'largest':>10}{'max diff':>10}{'mean diff':>10}"
)


def line(row: DecodeFigures) -> str:
    """Format one row; "largest" is the largest tensor in units of 2^31 elements."""

    def show(value: float | None, digits: int, unit: float = 1.0) -> str:
        return "-" if value is None else f"{value / unit:.{digits}f}"

    mib = 2.0**20
    differences = [f"{'-' if d is None else f'{d:.1e}':>10}" for d in (row.max_difference, row.mean_difference)]
    return (
        f"{row.image_px:>5} {row.method:<7}{show(row.wall_s, 2):>9}{show(row.cpu_s, 2):>9}"
        f"{show(row.rss_bytes, 0, mib):>9}{show(row.live_bytes, 0, mib):>10}{show(row.estimated_bytes, 0, mib):>10}"
        f"{row.largest_elements / 2**31:>10.4f}" + "".join(differences)
    )


def measure(case: Case, methods: Sequence[DecodeMethod], sides_px: Sequence[int], largest_run_px: int) -> list[Any]:
    """Measure every method at every size, print the table, and return its rows for JSON."""
    print(HEADER)
    return [asdict(row) for image_px in sides_px for row in measure_size(case, methods, image_px, largest_run_px)]
