"""Measure whether the pictures of the pocket bundle show their prompts, of one object or two.

Floor and sky are read from fixed strips; an object's color from the pixels where it must be; shape and size, at each of
the three places, by a small network trained here on true renders. A wrong position thus also counts against the color.
The ceiling is the same measure on true renders of the prompts, before and after the VAE's round trip.
"""

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.quality.colors import FLOOR_ROWS, SHADES, SKY_ROWS, object_core, read_color
from benchmarks.quality.prompt_sheet import write_prompt_sheet
from giantleap.training.pocket.drawing.captions import POSITIONS, SHAPES, SIZES, Slots
from giantleap.training.pocket.drawing.prompts import Prompt, draw_prompt, prompt_caption
from giantleap.training.pocket.drawing.still_life import render_still_life
from giantleap.training.pocket.studio import IMAGE_PX, draw_studio
from giantleap.training.pocket.tokenizer import MAX_TOKENS

SCORES = ("floor", "sky", "color", "shape", "position", "size", "two objects")
CHANCE = {"floor": 0.1, "sky": 0.1, "color": 0.1, "shape": 0.25, "position": 0.25, "size": 0.33, "two objects": 0.0}
JUDGE_PX = 64
JUDGE_RENDERS = 3000
JUDGE_STEPS = 800
TRUTH_SEED, JUDGE_SEED = 5, 77


@dataclass(frozen=True)
class Seen:
    """What was read from one picture.

    Args:
        floor: Color of the floor.
        sky: Color of the sky.
        colors: Color at the place of each object of the prompt.
        shapes: Shape at each of `POSITIONS`, None where nothing stands.
        sizes: Size at each of `POSITIONS`.
    """

    floor: str
    sky: str
    colors: tuple[str, ...]
    shapes: tuple[str | None, ...]
    sizes: tuple[str | None, ...]


class Judge(nn.Module):
    """A small convolutional network that says what stands left, in the centre and right."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 64)
        layers: list[nn.Module] = []
        for wide_in, wide_out in pairwise(widths):
            layers += [nn.Conv2d(wide_in, wide_out, 3, 2, 1), nn.GroupNorm(4, wide_out), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 128), nn.SiLU())
        choices = {"shape": len(SHAPES), "size": len(SIZES)}
        self.heads = nn.ModuleDict({slot: nn.Linear(128, 3 * (1 + count)) for slot, count in choices.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images [batch, 3, 64, 64] in 0..1 to logits [batch, 3 places, 1 + choices]; choice 0 is nothing."""
        features = self.body(images * 2 - 1)
        return {slot: head(features).unflatten(1, (3, -1)) for slot, head in self.heads.items()}


def draw_truth(prompt: Prompt, rng: np.random.Generator, image_px: int) -> Tensor:
    """Render a prompt: [3, image_px, image_px] in 0..1."""
    return render_still_life(draw_studio(rng, prompt), image_px)


def _labels(prompts: list[Prompt], slot: str, choices: tuple[str, ...]) -> Tensor:
    labels = torch.zeros(len(prompts), 3, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        for thing in prompt.objects:
            labels[row, POSITIONS.index(str(thing.position))] = 1 + choices.index(str(getattr(thing, slot)))
    return labels


def train_judge(seed: int = 1, renders: int = JUDGE_RENDERS, steps: int = JUDGE_STEPS) -> Judge:
    """Train the judge on seeded renders with random color, blur and noise augmentation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judge = Judge()
    prompts, images = [], torch.empty(renders, 3, JUDGE_PX, JUDGE_PX)
    for index in tqdm(range(renders), desc="judge's renders", unit="img"):
        rng = np.random.default_rng([seed, JUDGE_SEED, index])
        prompts.append(draw_prompt(rng))
        images[index] = draw_truth(prompts[-1], rng, JUDGE_PX)
    labels = {"shape": _labels(prompts, "shape", SHAPES), "size": _labels(prompts, "size", SIZES)}
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="judge", unit="step"):
        index_ = torch.randint(0, renders, (64,), generator=generator)
        logits = judge(_disturb(images[index_], generator))
        losses = [F.cross_entropy(logits[slot].flatten(0, 1), labels[slot][index_].flatten()) for slot in labels]
        torch.autograd.backward(torch.stack(losses).sum())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return judge.eval()


def _disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    images = images[:, torch.randperm(3, generator=generator)]
    if torch.rand((), generator=generator) < 0.5:
        images = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    return images + 0.04 * torch.rand((), generator=generator) * torch.randn(images.shape, generator=generator)


def _strip(image: Tensor, rows: tuple[float, float]) -> Tensor:
    height = image.shape[1]
    return image[:, round(rows[0] * height) : round(rows[1] * height)].flatten(1).T


@torch.no_grad()
def read_pictures(images: Tensor, prompts: list[Prompt], judge: Judge) -> list[Seen]:
    """Read images [batch, 3, px, px] in 0..1."""
    logits = judge(F.interpolate(images, (JUDGE_PX, JUDGE_PX), mode="area"))
    shapes, sizes = (_names(logits[slot], names) for slot, names in (("shape", SHAPES), ("size", SIZES)))
    seen = []
    for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        cores = [object_core(_placed(thing, prompt), image.shape[-1]) for thing in prompt.objects]
        seen.append(
            Seen(
                floor=read_color(_strip(image, FLOOR_ROWS)),
                sky=read_color(_strip(image, SKY_ROWS)),
                colors=tuple(read_color(image[:, core].T, SHADES) for core in cores),
                shapes=shapes[row],
                sizes=sizes[row],
            )
        )
    return seen


def _names(logits: Tensor, names: tuple[str, ...]) -> list[tuple[str | None, ...]]:
    choices: tuple[str | None, ...] = (None, *names)
    return [tuple(choices[index] for index in row) for row in logits.argmax(dim=2).tolist()]


def _placed(thing: Slots, prompt: Prompt) -> Slots:
    """An object's slots with the prompt's floor and sky, which a render needs."""
    return dataclasses.replace(thing, floor=prompt.slots.floor, sky=prompt.slots.sky)


def grade(seen: Seen, prompt: Prompt) -> dict[str, bool]:
    """Whether each part of the prompt is shown; `two objects` only where there are two: color, shape and place."""
    places = [POSITIONS.index(str(thing.position)) for thing in prompt.objects]
    grades = {
        "floor": seen.floor == prompt.slots.floor,
        "sky": seen.sky == prompt.slots.sky,
        "color": seen.colors == tuple(thing.color for thing in prompt.objects),
        "shape": [seen.shapes[place] for place in places] == [thing.shape for thing in prompt.objects],
        "position": {place for place, shape in enumerate(seen.shapes) if shape} == set(places),
        "size": [seen.sizes[place] for place in places] == [thing.size for thing in prompt.objects],
    }
    if prompt.second is not None:
        grades["two objects"] = grades["color"] and grades["shape"] and grades["position"]
    return grades


def score(images: Tensor, prompts: list[Prompt], judge: Judge) -> dict[str, float]:
    """Return the share of pictures that show each part of their prompts."""
    grades = [grade(*pair) for pair in zip(read_pictures(images, prompts, judge), prompts, strict=True)]
    return {name: float(np.mean([each[name] for each in grades if name in each])) for name in SCORES}


def generate(
    pipeline: Any, prompts: list[str], steps: int, guidance_scale: float, seed: int, batch: int = 20
) -> Tensor:
    """Generate one image per prompt with the noise of seed + i: [batch, 3, px, px] in 0..1."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, len(prompts), batch), desc="generate", unit="batch"):
        part = prompts[start : start + batch]
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        result = pipeline(
            part,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=noise,
            width=IMAGE_PX,
            height=IMAGE_PX,
            max_sequence_length=MAX_TOKENS,
            use_resolution_binning=False,
            complex_human_instruction=None,
            output_type="pt",
        )
        images.append(result.images.float())
    return torch.cat(images)


@torch.no_grad()
def round_trip(vae: AutoencoderDC, images: Tensor) -> Tensor:
    """Encode and decode images in 0..1, a few at a time."""
    parts = [vae.decode(vae.encode(part * 2 - 1).latent).sample for part in images.split(8)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class Following:
    """Shares of prompts whose part was read back correctly, in 0..1, with the two ceilings."""

    generated: dict[str, float]
    render: dict[str, float]
    round_trip: dict[str, float]
    count: int
    steps: int
    guidance_scale: float

    def table(self) -> str:
        """Format one line per part, in percent."""
        lines = [f"{'part':<12}{'generated':>10}{'render':>10}{'round trip':>12}{'chance':>8}   (%, n = {self.count})"]
        for name in SCORES:
            values = (self.generated[name], self.render[name], self.round_trip[name], CHANCE[name])
            lines.append(f"{name:<12}{values[0]:>10.1%}{values[1]:>10.1%}{values[2]:>12.1%}{values[3]:>8.0%}")
        return "\n".join(lines)


def measure(directory: Path, count: int, steps: int, guidance_scale: float, seed: int = 2026) -> Following:
    """Score a pipeline over seeded random prompts, with both ceilings."""
    prompts = [draw_prompt(np.random.default_rng([seed, index])) for index in range(count)]
    pipeline = SanaPipeline.from_pretrained(directory)
    judge = train_judge()
    images = generate(pipeline, [prompt_caption(prompt) for prompt in prompts], steps, guidance_scale, seed)
    truth = torch.stack(
        [
            draw_truth(prompt, np.random.default_rng([seed, TRUTH_SEED, index]), IMAGE_PX)
            for index, prompt in enumerate(prompts)
        ]
    )
    return Following(
        generated=score(images, prompts, judge),
        render=score(truth, prompts, judge),
        round_trip=score(round_trip(pipeline.vae, truth), prompts, judge),
        count=count,
        steps=steps,
        guidance_scale=guidance_scale,
    )


SHEET_PROMPTS = (
    "a large red sphere on a green floor under a blue sky, on the left",
    "a big yellow box on a purple ground under an orange sky",
    "a small white cone on a black floor under a pink sky, on the right",
    "a medium cyan cylinder on an orange floor under a black sky, in the middle",
    "a large green ball on the left and a small white cube on the right, on a blue floor under a cyan sky",
    "a small pink cone on the right and a large purple cylinder on the left, on a yellow floor under a white sky",
)


def write_sheet(directory: Path, path: Path, count: int, steps: int, guidance_scale: float, seed: int = 7) -> None:
    """Write a contact sheet: hand-written prompts first, then random ones, with captions."""
    rng = np.random.default_rng(seed)
    drawn = [prompt_caption(draw_prompt(rng)) for _ in range(count - len(SHEET_PROMPTS))]
    prompts = [*SHEET_PROMPTS, *drawn]
    images = generate(SanaPipeline.from_pretrained(directory), prompts, steps, guidance_scale, seed)
    write_prompt_sheet(path, prompts, images)
