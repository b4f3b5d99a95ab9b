"""Measures the pocket autoencoder of stride 4 and its LUA: `python -m benchmarks.quality.stride4 --lua <file>`.

On the six photographs of `benchmarks/quality/photos.py`: the round trip at full, half and quarter size, LUA and its
rivals. On held-out rendered scenes: the scene rendered small and enlarged, against the scene rendered large. Prints
JSON.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from torch import Tensor
from tqdm import tqdm

from benchmarks.quality.photos import SCALES, measure_photos, psnr_db, read_photos
from giantleap.models.lua.checkpoints import read_lua
from giantleap.models.lua.network import Lua
from giantleap.training.checkpoint import read_checkpoint
from giantleap.training.evaluation.cases import shrink
from giantleap.training.pocket.pictures import draw_held_out_scene
from giantleap.training.run_config import LuaConfig

SCENES = 4
SCENE_PX = 128
SMALL_SAMPLES = 4  # per pixel and direction: with the 2 of the large ones, fine patterns would alias


@dataclass(frozen=True)
class SceneScores:
    """Means over the scenes, in dB against the scene rendered large."""

    lua: dict[int, float]
    pixel_bicubic: dict[int, float]


@torch.no_grad()
def round_trips(vae: AutoencoderDC) -> dict[str, dict[str, float]]:
    """PSNR of the round trip of each photograph at full, half and quarter size, and the means."""
    scores: dict[str, dict[str, float]] = {}
    for name, photo in tqdm(read_photos().items(), desc="round trips"):
        sizes = {"full": photo, "half": shrink(photo, 2), "quarter": shrink(photo, 4)}
        scores[name] = {size: psnr_db(_round_trip(vae, picture), picture) for size, picture in sizes.items()}
    means = {size: float(np.mean([each[size] for each in scores.values()])) for size in ("full", "half", "quarter")}
    return {**scores, "mean": means}


def _round_trip(vae: AutoencoderDC, picture: Tensor) -> Tensor:
    """Encodes and decodes; sides that are no multiple of the stride are continued by their last value."""
    height, width = picture.shape[-2:]
    stride_px = int(vae.spatial_compression_ratio)
    padded = F.pad(picture, (0, -width % stride_px, 0, -height % stride_px), mode="replicate")
    decoded: Tensor = vae.decode(vae.encode(padded).latent).sample
    return decoded[..., :height, :width].clamp(-1.0, 1.0)


@torch.no_grad()
def measure_scenes(vae: AutoencoderDC, lua: Lua) -> SceneScores:
    """Enlarges scenes of 128 px and compares them with the same scenes rendered at 256 and 512 px."""
    scores: dict[str, dict[int, list[float]]] = {"lua": {}, "pixel_bicubic": {}}
    for index in tqdm(range(SCENES), desc="scenes"):
        codes = vae.encode(_levels(draw_held_out_scene(index, SCENE_PX, SMALL_SAMPLES))).latent
        small = vae.decode(codes).sample.clamp(-1.0, 1.0)
        for scale in SCALES:
            large = _levels(draw_held_out_scene(index, scale * SCENE_PX))
            pictures = {
                "lua": vae.decode(lua(codes, scale)).sample,
                "pixel_bicubic": F.interpolate(small, scale_factor=float(scale), mode="bicubic"),
            }
            for name, picture in pictures.items():
                scores[name].setdefault(scale, []).append(psnr_db(picture, large))
    means = {name: {scale: float(np.mean(v)) for scale, v in values.items()} for name, values in scores.items()}
    return SceneScores(**means)


def _levels(image: Tensor) -> Tensor:
    """An image in 0..1 as an 8-bit picture in [-1, 1]; [1, 3, height, width]."""
    return (image[None] * 255.0).round() / 127.5 - 1.0


def read_average(path: Path, channels: int) -> Lua:
    """The average weights of a run's checkpoint, to follow a run that has not ended."""
    checkpoint = read_checkpoint(path)
    net = Lua(LuaConfig.model_validate(checkpoint.origin["lua"]).to_spec(channels))
    average = {key.removeprefix("ema."): value for key, value in checkpoint.tensors.items() if key.startswith("ema.")}
    net.load_state_dict(average)
    return net.eval()


def measure(vae: AutoencoderDC, lua: Lua | None, sheet: Path | None) -> dict[str, object]:
    """All figures; those of LUA where one is given."""
    report: dict[str, object] = {"round_trips": round_trips(vae)}
    if lua is not None:
        photos = measure_photos(vae, lua, sheet)
        mean = photos["mean"]
        scenes = measure_scenes(vae, lua)
        report["photos"] = {name: asdict(scores) for name, scores in photos.items()}
        report["photo_gain"] = {scale: mean.lua[scale] - mean.pixel_bicubic[scale] for scale in SCALES}
        report["scenes"] = asdict(scenes)
        report["scene_gain"] = {scale: scenes.lua[scale] - scenes.pixel_bicubic[scale] for scale in SCALES}
    return report


def main(
    vae: Annotated[Path, typer.Option(help="Directory of the autoencoder.")] = Path("bundles/pocket/vae"),
    lua: Annotated[Path | None, typer.Option(help="Weights of the adapter.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="In place of weights: a checkpoint of a run.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes too.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Where a sheet of pictures goes.")] = None,
    threads: int = 1,
) -> None:
    """Print the figures of an autoencoder, and of an adapter where one is given."""
    torch.set_num_threads(threads)
    autoencoder = AutoencoderDC.from_pretrained(vae).float().eval()
    net = None if lua is None else read_lua(lua)
    if checkpoint is not None:
        net = read_average(checkpoint, autoencoder.config["latent_channels"])
    text = json.dumps(measure(autoencoder, net, sheet), indent=1)
    typer.echo(text)
    if out is not None:
        out.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
