"""Measure the quality of the pocket bundle against its floors.

`python -m benchmarks.pocket_quality` measures photographs (`benchmarks/quality/photos.py`), rendered scenes
(`benchmarks/quality/scenes.py`) and prompt following (`benchmarks/quality/prompt_following.py`), prints the figures
with their ceilings, writes `benchmarks/results/pocket_quality.json` and ends with status 1 when a floor is missed.
`python -m benchmarks.pocket_pictures` draws what it measures.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.machine import PHOTO_PACKAGES, read_machine
from benchmarks.pocket_quality import Part
from benchmarks.quality.photos import enlarge_photos
from benchmarks.quality.prompt_following import measure
from benchmarks.quality.routes import METHODS, SCALES, Networks, Scores, mean_scores, open_jod
from benchmarks.quality.scenes import KINDS, measure_scenes
from giantleap.models.bundle.bundle import read_bundle
from giantleap.training.evaluation.perceptual import Jod

PROMPTS = 100
ROUND_TRIP_DB = 36.0
PHOTO_GAIN_DB = {2: 0.35, 4: 0.1}
PHOTO_DB = {2: 29.2, 4: 25.7}
SCENE_GAIN_DB = {2: 2.5, 4: 1.5}
PROMPT_PERCENT = {"floor": 95.0, "sky": 95.0, "color": 95.0, "shape": 95.0, "position": 95.0, "two objects": 80.0}


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
        return f"{self.name:<44}{self.value:>8.2f} {self.unit:<3}{self.floor:>8.2f}   {verdict}"


def measure_photos(networks: Networks, jod: Jod | None) -> dict[str, dict[str, Any]]:
    """Return the round trip by size and the scores of every method by scale, for each photograph and their `mean`."""
    photos: dict[str, dict[str, Any]] = {
        name: {
            "round_trip_db": photo.round_trip_db(),
            **{f"x{scale}": each for scale, each in photo.scores(jod).items()},
        }
        for name, photo in enlarge_photos(networks).items()
    }
    rows = list(photos.values())
    sizes = rows[0]["round_trip_db"]
    mean: dict[str, Any] = {
        "round_trip_db": {size: sum(row["round_trip_db"][size] for row in rows) / len(rows) for size in sizes}
    }
    return photos | {"mean": mean | {f"x{s}": mean_scores([row[f"x{s}"] for row in rows]) for s in SCALES}}


def measure_all_scenes(networks: Networks, jod: Jod | None) -> dict[str, dict[str, Any]]:
    """Return the scores of every scene and their `mean`, by kind and scale."""
    scenes: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        measured = measure_scenes(networks, kind, jod)
        scenes[kind] = {f"x{scale}": {"scenes": each, "mean": mean_scores(each)} for scale, each in measured.items()}
    return scenes


def gain_db(scores: Scores) -> float:
    """Decibels of LUA over the decoded and resized picture."""
    return scores["lua"]["psnr_db"] - scores["resized"]["psnr_db"]


def judge_pictures(photos: Mapping[str, Any], scenes: Mapping[str, Any]) -> list[Floor]:
    """Compare VAE and LUA with their floors."""
    floors = [
        Floor(f"round trip, {size} size", photos["round_trip_db"][size], ROUND_TRIP_DB, "dB")
        for size in ("full", "half")
    ]
    for scale in SCALES:
        scores = photos[f"x{scale}"]
        floors += [
            Floor(f"photographs x{scale}: LUA over resizing", gain_db(scores), PHOTO_GAIN_DB[scale], "dB"),
            Floor(f"photographs x{scale}: LUA", scores["lua"]["psnr_db"], PHOTO_DB[scale], "dB"),
        ]
    return floors + [
        Floor(f"{kind} x{scale}: LUA over resizing", gain_db(each[f"x{scale}"]["mean"]), SCENE_GAIN_DB[scale], "dB")
        for kind, each in scenes.items()
        for scale in SCALES
    ]


def judge_prompts(shares: Mapping[str, float]) -> list[Floor]:
    """Compare prompt following with its floors, in percent."""
    return [Floor(f"prompt: {slot}", 100.0 * shares[slot], floor, "%") for slot, floor in PROMPT_PERCENT.items()]


def score_table(sets: Mapping[str, Scores]) -> str:
    """Format one line per set of pictures and method."""
    lines = [f"{'pictures':<22}{'method':<16}{'PSNR dB':>9}{'MS-SSIM':>9}{'FLIP':>8}{'JOD':>7}"]
    for name, scores in sets.items():
        for method in METHODS:
            row = scores[method]
            jod = f"{row['jod']:>7.3f}" if "jod" in row else f"{'-':>7}"
            lines.append(f"{name:<22}{method:<16}{row['psnr_db']:>9.2f}{row['ms_ssim']:>9.4f}{row['flip']:>8.4f}{jod}")
    return "\n".join(lines)


def photo_table(photos: Mapping[str, Mapping[str, Any]]) -> str:
    """Format one line per photograph: the round trips, LUA and its gain, in dB."""
    lines = [f"{'photo':<12}{'full':>8}{'half':>8}{'quarter':>8}{'x2 LUA':>9}{'gain':>7}{'x4 LUA':>9}{'gain':>7}"]
    for name, row in photos.items():
        trips = "".join(f"{value:>8.2f}" for value in row["round_trip_db"].values())
        cells = ((row[f"x{scale}"]["lua"]["psnr_db"], gain_db(row[f"x{scale}"])) for scale in SCALES)
        lines.append(f"{name:<12}{trips}" + "".join(f"{lua:>9.2f}{gain:>+7.2f}" for lua, gain in cells))
    return "\n".join(lines)


def measure_pictures(networks: Networks) -> dict[str, Any]:
    """Measure photographs and scenes, and print them."""
    jod = open_jod()
    photos, scenes = measure_photos(networks, jod), measure_all_scenes(networks, jod)
    typer.echo(photo_table(photos))
    sets = {f"photographs x{scale}": photos["mean"][f"x{scale}"] for scale in SCALES}
    sets |= {f"{kind} x{scale}": each[f"x{scale}"]["mean"] for kind, each in scenes.items() for scale in SCALES}
    typer.echo(score_table(sets))
    return {"photos": photos, "scenes": scenes}


def measure_prompts(directory: Path) -> dict[str, Any]:
    """Measure prompt following with the bundle's own number of steps and guidance, and print it."""
    defaults = read_bundle(directory).defaults
    following = measure(directory, PROMPTS, defaults.steps, defaults.guidance_scale)
    typer.echo(following.table())
    return asdict(following)


def run(bundle: Path, lua: Path | None, out: Path, part: Part, threads: int) -> None:
    """Measure, print, write the JSON; exit status 1 when a floor is missed."""
    torch.set_num_threads(threads)
    record: dict[str, Any] = {} if part == "all" else json.loads(out.read_text())
    record["machine"] = read_machine((*PHOTO_PACKAGES, "flip-evaluator", "torchmetrics"))
    if part != "prompts":
        record |= measure_pictures(Networks.open(bundle, lua))
    if part != "pictures":
        record["prompts"] = measure_prompts(bundle)
    floors = judge_pictures(record["photos"]["mean"], record["scenes"]) + judge_prompts(record["prompts"]["generated"])
    typer.echo(f"{'figure':<44}{'reached':>8} {'':<3}{'floor':>8}")
    for floor in floors:
        typer.echo(floor.line())
    record["floors"] = [{**asdict(floor), "is_met": floor.is_met} for floor in floors]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    if not all(floor.is_met for floor in floors):
        raise typer.Exit(1)
