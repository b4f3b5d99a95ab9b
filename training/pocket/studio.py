"""Captioned scenes for text to latent: what the prompt says in soft light, and nothing else.

The same renderer as `training/pocket/drawing/still_life.py`, with calm surfaces, so that the pictures stay easy to
learn. A pool holds pictures, their prompts, and the latents of each picture and its mirror image.
"""

import dataclasses
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from giantleap.training.pocket.drawing.prompts import Prompt, draw_prompt
from giantleap.training.pocket.drawing.scenes import PALETTE, Scene, draw_scene
from giantleap.training.pocket.drawing.still_life import StillLife, place_solid, render_still_life
from giantleap.training.pocket.drawing.surfaces import Finish, Ground, Sky

IMAGE_PX = 128
HAZE = 0.2
LATENTS, PICTURES, PROMPTS, PLAN = "latents.npy", "pictures.npy", "prompts.jsonl", "done.json"


def draw_studio(rng: np.random.Generator, prompt: Prompt) -> StillLife:
    """Draw a scene of a prompt: places, light and surfaces vary a little."""
    main = draw_scene(rng, prompt.slots)
    return studio_scene(rng, prompt, [main, *(draw_scene(rng, slots) for slots in prompt.objects[1:])])


def studio_scene(rng: np.random.Generator, prompt: Prompt, plains: list[Scene]) -> StillLife:
    """Light and surfaces for objects at the given places; the first one's horizon and light count."""
    main = plains[0]
    placed = [dataclasses.replace(plain, horizon_y=main.horizon_y) for plain in plains]
    return StillLife(
        slots=prompt.slots,
        solids=tuple(place_solid(plain, _draw_finish(rng, plain)) for plain in placed),
        ground=Ground(
            pattern="plain",
            color=PALETTE[str(prompt.slots.floor)],
            contrast=rng.uniform(0.05, 0.2),
            period=rng.uniform(0.4, 0.8),
            yaw=rng.uniform(0.0, 1.57),
        ),
        sky=Sky(PALETTE[str(prompt.slots.sky)], clouds=0.0, hills=0, hill_color=(0.3, 0.3, 0.3), haze=HAZE),
        horizon_y=main.horizon_y,
        light=(main.light_x, 1.0, main.light_z),
        light_radius=rng.uniform(0.05, 0.14),
        warmth=rng.uniform(-0.2, 0.5),
        exposure=rng.uniform(0.98, 1.1),
        noise_seed=int(rng.integers(2**31)),
    )


def _draw_finish(rng: np.random.Generator, plain: Scene) -> Finish:
    """A surface of one color: matte, or with a coat."""
    return Finish("plain", PALETTE[str(plain.slots.color)], 0.3, float(rng.choice((0.0, rng.uniform(0.3, 0.9)))))


@dataclass(frozen=True)
class StudioPool:
    """Pictures [count, 3, px, px] in 0..255, prompts, and latents [count, 2, channels, h, w] of both views."""

    pictures: NDArray[np.uint8]
    prompts: list[Prompt]
    latents: NDArray[np.float16]


def write_pool(folder: Path, vae: AutoencoderDC, count: int, seed: int, processes: int = 1) -> None:
    """Render and encode a pool; scene i depends on the seed and i alone. `done.json` marks a complete pool."""
    folder.mkdir(parents=True, exist_ok=True)
    side = IMAGE_PX // int(vae.spatial_compression_ratio)
    codes = (count, 2, int(vae.config["latent_channels"]), side, side)
    pixels = (count, 3, IMAGE_PX, IMAGE_PX)
    latents = np.lib.format.open_memmap(folder / LATENTS, mode="w+", dtype=np.float16, shape=codes)
    pictures = np.lib.format.open_memmap(folder / PICTURES, mode="w+", dtype=np.uint8, shape=pixels)
    drawn = tqdm(_draw_all(count, seed, processes), total=count, desc="scenes", unit="img", mininterval=10.0)
    with (folder / PROMPTS).open("w") as lines:
        for index, (prompt, picture) in enumerate(drawn):
            pictures[index] = picture
            latents[index] = encode_views(vae, torch.from_numpy(picture) / 127.5 - 1.0).numpy()
            lines.write(json.dumps(prompt.as_json()) + "\n")
    latents.flush()
    pictures.flush()
    (folder / PLAN).write_text(json.dumps({"count": count, "seed": seed, "image_px": IMAGE_PX}))


def _draw_all(count: int, seed: int, processes: int) -> Iterator[tuple[Prompt, NDArray[np.uint8]]]:
    tasks = [(seed, index) for index in range(count)]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_draw_one, tasks, chunksize=8)


def _draw_one(task: tuple[int, int]) -> tuple[Prompt, NDArray[np.uint8]]:
    torch.set_num_threads(1)
    rng = np.random.default_rng(task)
    prompt = draw_prompt(rng)
    picture: NDArray[np.uint8] = (render_still_life(draw_studio(rng, prompt), IMAGE_PX) * 255.0).round().byte().numpy()
    return prompt, picture


@torch.no_grad()
def encode_views(vae: AutoencoderDC, picture: Tensor) -> Tensor:
    """Latents of a picture [3, h, w] in [-1, 1] and of its mirror image: [2, channels, h, w]."""
    views = torch.stack([picture, picture.flip(-1)]).contiguous(memory_format=torch.channels_last)
    latents: Tensor = vae.encode(views).latent
    return latents


def read_pool(folder: Path) -> StudioPool:
    """Open a complete pool, memory-mapped.

    Raises:
        FileNotFoundError: The pool is missing or not complete.
    """
    if not (folder / PLAN).is_file():
        raise FileNotFoundError(
            f"{folder} holds no finished pool of scenes: run `python -m giantleap.training.pocket scenes` to render one"
        )
    lines = (folder / PROMPTS).read_text().splitlines()
    return StudioPool(
        pictures=np.load(folder / PICTURES, mmap_mode="r"),
        prompts=[Prompt.from_json(json.loads(line)) for line in lines],
        latents=np.load(folder / LATENTS, mmap_mode="r"),
    )
