"""Measure whether images show their prompts: seeded random prompts, one score per slot, with its ceiling.

Floor and sky are read from fixed strips; the object's color from the pixels where the requested object must be; shape,
position and size by a small network trained here on true renders. A wrong position thus also counts against the color.
The ceiling is the same measure on true renders of the prompts, before and after the VAE's round trip.
`python -m benchmarks.quality.prompt_following bundles/pocket` prints the table.
"""

import argparse
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.quality.prompt_sheet import write_prompt_sheet
from giantleap.training.pocket.captions import COLORS, POSITIONS, SHAPES, SIZES, Slots, draw_prompts
from giantleap.training.pocket.scenes import PALETTE, draw_scene, plain_scene, render

SLOTS = ("floor", "sky", "color", "shape", "position", "size")
CHOICES = {"floor": COLORS, "sky": COLORS, "color": COLORS, "shape": SHAPES, "position": POSITIONS, "size": SIZES}
SKY_ROWS = (0.02, 0.14)  # above every object
FLOOR_ROWS = (0.90, 0.98)  # below every object
SHADES = (0.5, 0.65, 0.8, 1.0)  # brightness of an object's faces
JUDGE_PX = 64
JUDGE_RENDERS = 4000
JUDGE_STEPS = 500


@dataclass(frozen=True)
class Following:
    """Shares of prompts whose slot was read back correctly, in 0..1."""

    generated: dict[str, float]
    render: dict[str, float]  # ceiling: true renders of the same prompts
    round_trip: dict[str, float]  # ceiling: the same through encode and decode
    count: int
    steps: int
    guidance_scale: float

    def table(self) -> str:
        """Format one line per slot, in percent."""
        lines = [f"{'slot':<10}{'generated':>10}{'render':>10}{'round trip':>12}{'chance':>8}   (%, n = {self.count})"]
        for slot in SLOTS:
            values = (self.generated[slot], self.render[slot], self.round_trip[slot], 1 / len(CHOICES[slot]))
            lines.append(f"{slot:<10}{values[0]:>10.1%}{values[1]:>10.1%}{values[2]:>12.1%}{values[3]:>8.0%}")
        return "\n".join(lines)


class Judge(nn.Module):
    """A small convolutional network that classifies shape, position and size."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 64)
        layers: list[nn.Module] = []
        for wide_in, wide_out in pairwise(widths):
            layers += [nn.Conv2d(wide_in, wide_out, 3, 2, 1), nn.GroupNorm(4, wide_out), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 96), nn.SiLU())
        self.heads = nn.ModuleDict({slot: nn.Linear(96, len(CHOICES[slot])) for slot in ("shape", "position", "size")})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images [batch, 3, 64, 64] in 0..1 to logits [batch, choices] per slot."""
        features = self.body(images * 2 - 1)
        return {slot: head(features) for slot, head in self.heads.items()}


def train_judge(seed: int = 1, steps: int = JUDGE_STEPS) -> Judge:
    """Train the judge on seeded renders with random color, blur and noise augmentation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judge = Judge()
    scenes = [draw_scene(np.random.default_rng([seed, 77, i])) for i in range(JUDGE_RENDERS)]
    images = torch.cat([render(scenes[i : i + 50], JUDGE_PX)[0] for i in range(0, len(scenes), 50)])
    labels = {s: torch.tensor([CHOICES[s].index(str(getattr(c.slots, s))) for c in scenes]) for s in judge.heads}
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="judge", unit="step"):
        index = torch.randint(0, len(scenes), (64,), generator=generator)
        predictions = judge(_disturb(images[index], generator))
        losses = [F.cross_entropy(predictions[slot], labels[slot][index]) for slot in predictions]
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


def read_color(pixels: Tensor, shades: tuple[float, ...] = (1.0,)) -> str:
    """Return the palette color nearest to most of the pixels [n, 3] in 0..1."""
    palette = torch.tensor([[c * shade for c in PALETTE[name]] for name in COLORS for shade in shades])
    votes = torch.cdist(pixels, palette).argmin(1) // len(shades)
    return COLORS[int(votes.bincount(minlength=len(COLORS)).argmax())]


def object_core(slots: Slots, image_px: int) -> Tensor:
    """Return the mask [image_px, image_px] of the requested object, eroded by 4 % of the frame."""
    _, mask = render([plain_scene(slots)], image_px)
    margin = max(1, round(0.04 * image_px))
    eroded = -F.max_pool2d(-mask, 2 * margin + 1, 1, margin)
    core = eroded if (eroded > 0.99).sum() >= 16 else mask
    return core[0, 0] > 0.99


def _strip(image: Tensor, rows: tuple[float, float]) -> Tensor:
    height = image.shape[1]
    return image[:, round(rows[0] * height) : round(rows[1] * height)].flatten(1).T


@torch.no_grad()
def read_slots(images: Tensor, expected: list[Slots], judge: Judge) -> list[Slots]:
    """Read all slots of images [batch, 3, px, px] in 0..1."""
    small = F.interpolate(images, (JUDGE_PX, JUDGE_PX), mode="area")
    predictions = {slot: logits.argmax(1).tolist() for slot, logits in judge(small).items()}
    seen = []
    for index, (image, slots) in enumerate(zip(images, expected, strict=True)):
        core = object_core(slots, images.shape[-1])
        seen.append(
            Slots(
                shape=SHAPES[predictions["shape"][index]],
                color=read_color(image[:, core].T, SHADES),
                floor=read_color(_strip(image, FLOOR_ROWS)),
                sky=read_color(_strip(image, SKY_ROWS)),
                position=POSITIONS[predictions["position"][index]],
                size=SIZES[predictions["size"][index]],
            )
        )
    return seen


def score(images: Tensor, expected: list[Slots], judge: Judge) -> dict[str, float]:
    """Return the share of images whose slot matches, by slot."""
    seen = read_slots(images, expected, judge)
    pairs = list(zip(seen, expected, strict=True))
    return {slot: float(np.mean([getattr(a, slot) == getattr(b, slot) for a, b in pairs])) for slot in SLOTS}


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
            part, num_inference_steps=steps, guidance_scale=guidance_scale, generator=noise, output_type="pt"
        )
        images.append(result.images.float())
    return torch.cat(images)


@torch.no_grad()
def round_trip(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode and decode images in 0..1, a few at a time."""
    parts = [vae.decode(vae.encode(part * 2 - 1).latent_dist.mode()).sample for part in images.split(8)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def measure(
    bundle: Path, count: int = 200, seed: int = 2026, steps: int = 20, guidance_scale: float = 3.0
) -> Following:
    """Score a bundle over seeded random prompts, with both ceilings."""
    prompts = draw_prompts(count, seed)
    expected = [slots for _, slots in prompts]
    pipeline = DiffusionPipeline.from_pretrained(bundle)
    judge = train_judge()
    images = generate(pipeline, [text for text, _ in prompts], steps, guidance_scale, seed)
    scenes = [draw_scene(np.random.default_rng([seed, 5, i]), slots) for i, slots in enumerate(expected)]
    truth = torch.cat([render(scenes[i : i + 20], images.shape[-1])[0] for i in range(0, count, 20)])
    return Following(
        generated=score(images, expected, judge),
        render=score(truth, expected, judge),
        round_trip=score(round_trip(pipeline.vae, truth), expected, judge),
        count=count,
        steps=steps,
        guidance_scale=guidance_scale,
    )


SHEET_PROMPTS = (
    "a large red sphere on a green floor under a blue sky, on the left",
    "a big yellow box on a purple ground under an orange sky",
    "a small white cone on a black floor under a pink sky, on the right",
    "a medium cyan cylinder on an orange floor under a black sky, in the middle",
    "a green ball on a white floor under a cyan sky, right, large",
    "under a red sky, a blue cube on a yellow floor",
)


def write_sheet(bundle: Path, path: Path, count: int, steps: int, guidance_scale: float, seed: int = 7) -> None:
    """Write a contact sheet: hand-written prompts first, then random ones, with captions."""
    drawn = [text for text, _ in draw_prompts(count - len(SHEET_PROMPTS), seed)]
    prompts = [*SHEET_PROMPTS, *drawn]
    images = generate(DiffusionPipeline.from_pretrained(bundle), prompts, steps, guidance_scale, seed)
    write_prompt_sheet(path, prompts, images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure how well a bundle follows its prompts.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--json", type=Path, help="where to store the figures")
    parser.add_argument("--sheet", type=Path, help="where to store a contact sheet instead of measuring")
    arguments = parser.parse_args()
    if arguments.sheet:
        write_sheet(arguments.bundle, arguments.sheet, 30, arguments.steps, arguments.guidance)
    else:
        following = measure(arguments.bundle, arguments.count, steps=arguments.steps, guidance_scale=arguments.guidance)
        print(following.table())
        if arguments.json:
            arguments.json.write_text(json.dumps(following.__dict__, indent=1))
