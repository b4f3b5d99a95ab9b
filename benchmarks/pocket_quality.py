"""Measure the quality of the pocket bundle against its floors.

`python -m benchmarks.pocket_quality` measures photographs (VAE and LUA, `benchmarks/quality/photos.py`) and prompt
following (`benchmarks/quality/studio_following.py`), writes `benchmarks/results/pocket_quality.json` and
`docs/pocket_photos.png`, and ends with status 1 when a floor is missed.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

from benchmarks.machine import PHOTO_PACKAGES, read_machine
from benchmarks.quality.photos import SCALES, PhotoScores, measure_photos
from benchmarks.quality.studio_following import Following, measure
from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.lua.checkpoints import read_lua

PROMPTS = 200


@dataclass(frozen=True)
class Floor:
    """One figure and its required minimum."""

    name: str
    value: float
    floor: float
    unit: str

    @property
    def is_met(self) -> bool:
        """Whether the value reaches the floor."""
        return self.value >= self.floor

    def line(self) -> str:
        """Format one line."""
        verdict = "pass" if self.is_met else "FAIL"
        return f"{self.name:<34}{self.value:>8.2f} {self.unit:<3}{self.floor:>8.2f}   {verdict}"


def judge_photos(mean: PhotoScores) -> list[Floor]:
    """Compare VAE and LUA with their floors."""
    floors = [Floor("VAE round trip", mean.round_trip, 36.0, "dB")]
    for scale, pixel_floor, latent_floor in ((2, 0.35, 3.5), (4, 0.1, 3.0)):
        lua = mean.lua[scale]
        floors += [
            Floor(f"LUA x{scale} over pixel bicubic", lua - mean.pixel_bicubic[scale], pixel_floor, "dB"),
            Floor(f"LUA x{scale} over latent bicubic", lua - mean.latent_bicubic[scale], latent_floor, "dB"),
        ]
    return floors


def judge_prompts(following: Following) -> list[Floor]:
    """Compare prompt following with its floors, in percent."""
    minimums = dict.fromkeys(("floor", "sky", "color", "shape", "position"), 95.0) | {"two objects": 80.0}
    return [Floor(f"prompt: {slot}", 100.0 * following.generated[slot], floor, "%") for slot, floor in minimums.items()]


def photo_table(scores: dict[str, PhotoScores]) -> str:
    """Format one line per photograph, in dB."""
    titles = [f"x{scale} {name}" for scale in SCALES for name in ("LUA", "pixel", "latent")]
    lines = [f"{'photo':<12}{'VAE':>8}" + "".join(f"{title:>11}" for title in titles)]
    for name, score in scores.items():
        values = [table[scale] for scale in SCALES for table in (score.lua, score.pixel_bicubic, score.latent_bicubic)]
        lines.append(f"{name:<12}{score.round_trip:>8.2f}" + "".join(f"{value:>11.2f}" for value in values))
    return "\n".join(lines)


def main(
    bundle: Annotated[Path, typer.Option(help="Bundle directory with vae/ and lua.safetensors.")] = Path(
        "bundles/pocket"
    ),
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/pocket_quality.json"),
    sheet: Annotated[Path, typer.Option(help="Contact sheet of photo crops.")] = Path("docs/pocket_photos.png"),
    prompts: Annotated[bool, typer.Option(help="Also measure prompt following (minutes).")] = True,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Measure, print, write the JSON; exit status 1 when a floor is missed."""
    torch.set_num_threads(threads)
    vae = AutoencoderDC.from_pretrained(bundle / "vae").float().eval()
    photos = measure_photos(vae, read_lua(bundle / "lua.safetensors"), sheet)
    typer.echo(photo_table(photos))
    floors = judge_photos(photos["mean"])
    record: dict[str, Any] = {"photos": {name: asdict(score) for name, score in photos.items()}}
    if prompts:
        defaults = read_bundle(bundle).defaults
        following = measure(bundle, PROMPTS, defaults.steps, defaults.guidance_scale)
        typer.echo(following.table())
        floors += judge_prompts(following)
        record["prompts"] = asdict(following)
    typer.echo(f"{'figure':<34}{'reached':>8} {'':<3}{'floor':>8}")
    for floor in floors:
        typer.echo(floor.line())
    record = {
        "machine": read_machine(PHOTO_PACKAGES),
        "floors": [{**asdict(f), "is_met": f.is_met} for f in floors],
        **record,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")
    if not all(floor.is_met for floor in floors):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
