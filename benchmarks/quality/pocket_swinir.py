"""Measure the pocket bundle's pixel-space SwinIR on the six held-out photographs, and the effect of tiling.

`python -m benchmarks.quality.pocket_swinir` prints PSNR against bicubic on the same small picture, once clean and once
as the pocket VAE decodes it (which is the input of the method `swinir`), the difference between tiled and untiled, and
between bfloat16 and float32. It writes `benchmarks/results/pocket_swinir.json`.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import PHOTO_PACKAGES, read_machine
from benchmarks.quality.photos import SCALES, psnr_db, read_photos
from giantleap.models.engines.swinir import HALO_PX, PixelUpscaler
from giantleap.training.evaluation.cases import shrink

CPU = torch.device("cpu")
TILE_PX = 192
HALOS_PX = (8, 16, HALO_PX, 48)


@torch.no_grad()
def measure_photo(vae: AutoencoderDC, upscaler: PixelUpscaler, photo: Tensor) -> dict[str, float]:
    """Return the PSNR in dB of SwinIR and bicubic on the clean and the decoded small picture, by scale."""
    scores = {}
    for scale in SCALES:
        clean = shrink(photo, scale)
        decoded = vae.decode(vae.encode(clean).latent).sample.clamp(-1.0, 1.0)
        for name, small in (("clean", clean), ("decoded", decoded)):
            upscaled = upscaler.upscale(small / 2 + 0.5, scale) * 2.0 - 1.0
            scores[f"x{scale} {name} swinir"] = psnr_db(upscaled, photo)
            scores[f"x{scale} {name} bicubic"] = psnr_db(
                F.interpolate(small, scale_factor=scale, mode="bicubic"), photo
            )
    return scores


def measure_tiles(upscaler: PixelUpscaler, image: Tensor) -> list[dict[str, float]]:
    """Return the difference of tiles of 192 px to the whole picture for several halos, in 8-bit levels."""
    rows = []
    for scale in SCALES:
        whole = upscaler.upscale(image, scale)
        for halo_px in HALOS_PX:
            tiled = PixelUpscaler(upscaler.nets, CPU, torch.float32, TILE_PX, halo_px).upscale(image, scale)
            levels = (tiled - whole).abs() * 255.0
            rows.append(
                {
                    "scale": scale,
                    "halo_px": halo_px,
                    "max_levels": float(levels.max()),
                    "mean_levels": float(levels.mean()),
                    "share_of_pixels_that_differ": float(
                        ((tiled * 255).round() != (whole * 255).round()).any(dim=1).float().mean()
                    ),
                }
            )
    return rows


def measure_dtypes(files: dict[int, Path], image: Tensor) -> list[dict[str, float]]:
    """Return the time of one picture in both dtypes, and the difference of bfloat16 in 8-bit levels."""
    single, half = (PixelUpscaler.open(files, CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
    rows = []
    for scale in SCALES:
        levels = (half.upscale(image, scale) - single.upscale(image, scale)).abs() * 255.0
        times_s = {}
        for name, one in (("float32", single), ("bfloat16", half)):
            started_s = time.process_time()
            for _ in range(5):
                one.upscale(image, scale)
            times_s[f"{name}_cpu_s"] = (time.process_time() - started_s) / 5
        rows.append({"scale": scale, "max_levels": float(levels.max()), "mean_levels": float(levels.mean()), **times_s})
    return rows


def table(photos: dict[str, dict[str, float]]) -> str:
    """Format one line per photograph: gain of SwinIR over bicubic and its PSNR, in dB."""
    kinds = [f"x{scale} {name}" for scale in SCALES for name in ("clean", "decoded")]
    lines = [f"{'photo':<12}" + "".join(f"{kind:>18}" for kind in kinds)]
    for name, scores in photos.items():
        cells = [(scores[f"{kind} swinir"], scores[f"{kind} bicubic"]) for kind in kinds]
        lines.append(f"{name:<12}" + "".join(f"{ours - bicubic:>+10.2f} ({ours:.2f})" for ours, bicubic in cells))
    return "\n".join(lines)


def main(
    bundle: Annotated[Path, typer.Option(help="Bundle directory with vae/ and the SwinIR files.")] = Path(
        "bundles/pocket"
    ),
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/pocket_swinir.json"),
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Measure, print, write the JSON."""
    torch.set_num_threads(threads)
    vae = AutoencoderDC.from_pretrained(bundle / "vae").float().eval()
    files = {scale: bundle / f"swinir_x{scale}.safetensors" for scale in SCALES}
    upscaler = PixelUpscaler.open(files, CPU, torch.float32)
    originals = read_photos()
    photos = {name: measure_photo(vae, upscaler, photo) for name, photo in tqdm(originals.items(), desc="photos")}
    photos["mean"] = {key: float(np.mean([s[key] for s in photos.values()])) for key in photos["astronaut"]}
    typer.echo(table(photos))
    astronaut = originals["astronaut"] / 2 + 0.5
    record: dict[str, Any] = {
        "machine": read_machine(PHOTO_PACKAGES),
        "threads": threads,
        "file_bytes": {path.name: path.stat().st_size for path in files.values()},
        "photos": photos,
        "tiles_of_192_px": measure_tiles(upscaler, astronaut),
        "one_picture_of_128_px": measure_dtypes(files, astronaut[..., 192:320, 192:320]),
    }
    for row in (*record["tiles_of_192_px"], *record["one_picture_of_128_px"]):
        typer.echo(json.dumps({key: round(value, 5) for key, value in row.items()}))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
