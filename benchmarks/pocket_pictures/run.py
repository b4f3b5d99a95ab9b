"""Draw the pictures of the README with the pocket bundle: methods side by side, photographs, prompts.

`python -m benchmarks.pocket_pictures` writes `docs/methods.png`, `docs/pocket_photos.png` and `docs/pocket_prompts.png`
in two minutes; `benchmarks/pocket_quality` measures the same routes.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.quality.photos import Photo, enlarge_photos, write_photo_sheet
from benchmarks.quality.prompt_following import write_sheet as write_prompts
from benchmarks.quality.routes import Networks
from giantleap.cli.paper.sheet import write_sheet
from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.bundle.descriptor import Method
from giantleap.models.device import choose_device, choose_dtype
from giantleap.models.generation.items import GenerationItem
from giantleap.models.pixels.images import to_pixels, to_signed
from giantleap.models.route import Route
from giantleap.models.runs import run_once
from giantleap.training.evaluation.cases import shrink

PROMPT = "a large green cone on a purple floor under an orange sky, in the centre"
PROMPT_SCALE, SEED = 2, 0
COLUMNS = ("base", "decoded, then bicubic", "LUA", "decoded, then SwinIR")
PHOTOS = (("chelsea", 2), ("coffee", 4))  # and their scales


def draw_prompt_row(route: Route, bundle: Bundle, prompt: str, seed: int, scale: int) -> dict[str, Image.Image]:
    """Generate one prompt and enlarge it by every way that starts at the same latent, by `COLUMNS`."""
    defaults = bundle.defaults
    size = (defaults.base_width_px, defaults.base_height_px)
    item = GenerationItem(prompt, "", seed, *size, defaults.steps, defaults.guidance_scale)

    def draw(factor: int, method: Method) -> Tensor:
        _, image = run_once(route, item, factor, method)
        if image is None:
            raise RuntimeError(f"{method} x{factor} of {prompt!r} has values that are not finite")
        return image

    base = draw(1, "bicubic")
    resized = F.interpolate(to_signed(base)[None] / 2 + 0.5, scale_factor=float(scale), mode="bicubic")
    images = (base, to_pixels(resized)[0], draw(scale, "lua"), draw(scale, "swinir"))
    return {name: Image.fromarray(image.numpy()) for name, image in zip(COLUMNS, images, strict=True)}


def photo_row(networks: Networks, photo: Photo, scale: int) -> dict[str, Image.Image]:
    """Return the same columns for a photograph that was reduced before."""
    pictures = photo.enlarged[scale]
    base = networks.round_trip(shrink(photo.original, scale))
    images = (base, pictures["resized"], pictures["lua"], pictures["swinir"])
    pixels = (to_pixels(image / 2 + 0.5)[0].numpy() for image in images)
    return {name: Image.fromarray(each) for name, each in zip(COLUMNS, pixels, strict=True)}


def run(directory: Path, out: Path, threads: int, prompts: int) -> None:
    """Generate, enlarge, write the three pictures."""
    torch.set_num_threads(threads)
    bundle = read_bundle(directory)
    device = choose_device("auto")
    route = Route.open(bundle, device, choose_dtype("auto", device))
    networks, defaults = Networks.open(directory), bundle.defaults
    photos = enlarge_photos(networks)
    rows = [(f"x{scale}", photo_row(networks, photos[name], scale)) for name, scale in PHOTOS]
    rows += [(f"x{PROMPT_SCALE}", draw_prompt_row(route, bundle, PROMPT, SEED, PROMPT_SCALE))]
    write_sheet(rows, out / "methods.png")
    write_photo_sheet(photos, out / "pocket_photos.png")
    write_prompts(directory, out / "pocket_prompts.png", prompts, defaults.steps, defaults.guidance_scale)
