"""What the page's form offers of a bundle with LoRAs, edits, previews and a refine pass, and what it sends."""

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from giantleap.models.bundle.bundle import write_bundle
from giantleap.models.bundle.descriptor import PreviewFile
from giantleap.models.bundle.digests import file_hashes
from giantleap.models.latent_space import LATENT_SPACES
from giantleap.models.pixels.image_formats import FileOptions
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.edits.inputs import read_input
from giantleap.service.jobs.job import GenerateParams, UpscaleParams
from giantleap.service.settings import Settings
from tests.browser.visits import ERROR, RESULT, Visit, draw, drop, open_visit, sign_in
from tests.lora_files import write_lora
from tests.models.generation.test_generator_families import saved
from tests.tiny_pipelines import tiny_flux1

pytestmark = pytest.mark.browser
PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
USES = "[...document.querySelectorAll('#use option')].map(each => each.value)"
PREVIEW = "document.querySelector('.previews img')?.naturalWidth"


def to_file(pixels: np.ndarray, file_format: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format)
    return file.getvalue()


@pytest.fixture
def visit(settings: Settings, tmp_path: Path) -> Iterator[Visit]:
    """The page of a small FLUX.1 of random weights with a file for previews, and two LoRAs that fit it."""
    directory, loras, pipeline = tmp_path / "flux", tmp_path / "loras", tiny_flux1()
    bundle = saved(directory, pipeline, LATENT_SPACES["flux1"])
    save_file({"weight": torch.zeros(3, 16), "bias": torch.zeros(3)}, directory / "preview.safetensors")
    sections = {"preview": PreviewFile(file="preview.safetensors"), "files": file_hashes(directory)}
    write_bundle(directory, bundle.descriptor.model_copy(update=sections))
    loras.mkdir()
    for name in ("ink", "oil"):
        write_lora(loras / f"{name}.safetensors", pipeline, 1)
    with open_visit(settings.model_copy(update={"lora_dir": loras}), tmp_path, directory, "/ui") as visit:
        sign_in(visit)
        yield visit


def send(visit: Visit) -> tuple[GenerateParams | UpscaleParams, bytes | None]:
    """Send the form; the parameters of its job, and its input."""
    seen = []

    def end(consumer: JobConsumer, claim: Claim) -> None:
        seen.append((claim.job.params, claim.body))
        draw(consumer, claim)

    with visit.worker(end):
        visit.page.click("#submit")
        visit.page.until(RESULT)
    assert visit.page.run(ERROR) == ""
    return seen[0]


def test_loras_a_refine_pass_and_a_format_are_sent_and_come_back_from_the_link(visit: Visit) -> None:
    page = visit.page
    assert page.run("[...document.querySelectorAll('.lora')].map(each => each.textContent)") == ["ink", "oil"]
    for number in (1, 2):
        page.click(f".lora:nth-child({number}) input[type=checkbox]")
    page.run(
        "(weight => { weight.value = '0.4'; weight.dispatchEvent(new Event('input')); })"
        "(document.querySelector('[data-lora=oil]'))"
    )
    assert not page.run("document.getElementById('quality-row').checkVisibility()"), "a PNG keeps every pixel"
    values = {"prompt": "a cube", "refine": "0.2", "refine_steps": "6", "output_format": "webp", "num_images": "1"}
    values |= {"compression": "small", "quality": "80"}
    for field, value in values.items():
        page.fill(field, value)
    params, _ = send(visit)
    assert isinstance(params, GenerateParams) and params.refine is not None
    assert [(each.name, each.weight) for each in params.loras] == [("ink", 1.0), ("oil", 0.4)]
    assert (params.refine.strength, params.refine.steps, params.output_format) == (0.2, 6, "webp")
    assert params.file == FileOptions("small", 80)
    link = page.run("document.querySelector('a.link').href")
    page.send("Page.reload")
    page.open(link)
    page.until("document.getElementById('prompt').value === 'a cube'")
    again, _ = send(visit)
    assert again == params
    page.open(link.replace("ink", "gone"))
    page.until(f"{ERROR}.startsWith('loras: gone')")


def test_an_image_is_drawn_from_or_edited_where_a_mask_was_painted(visit: Visit) -> None:
    page = visit.page
    drop(page, to_file(PIXELS), "start.png")
    assert page.run(USES) == ["enlarge", "start", "edit"], "FLUX.1 takes no references"
    page.fill("use", "edit")
    page.fill("prompt", "a cube")
    page.until("document.querySelector('canvas.mask')?.width === 64")
    assert not page.run("document.getElementById('refine-row').checkVisibility()")
    page.run("document.querySelector('canvas.mask').scrollIntoView({block: 'center'})")
    box = page.run("(({x, y, width}) => [x, y, width])(document.querySelector('canvas.mask').getBoundingClientRect())")
    at = {"x": box[0] + box[2] / 4, "y": box[1] + box[2] / 2, "button": "left", "buttons": 1, "clickCount": 1}
    for kind in ("mousePressed", "mouseReleased"):
        page.send("Input.dispatchMouseEvent", type=kind, **at)
    params, body = send(visit)
    assert isinstance(params, GenerateParams) and params.strength == 1.0 and body is not None
    images = read_input(body, params)
    assert images.init_image is not None and images.mask is not None
    height, width = images.mask.shape
    assert images.mask[height // 2, width // 4] and not images.mask[:, width // 2 :].any(), "painted at the left only"
    page.fill("use", "start")
    page.fill("strength", "0.5")
    params, _ = send(visit)
    assert isinstance(params, GenerateParams) and (params.strength, params.mask) == (0.5, False)
    link = page.run("document.querySelector('a.link').href")
    page.open(link)
    page.until("document.querySelector('#drop.wanted #drop-hint')?.textContent.includes('a link does not hold')")
    assert page.run(ERROR) == "" and page.run("document.getElementById('strength').value") == "0.5"
    page.click("#submit")
    assert page.run(ERROR).startswith("file: "), "never drawn without its image"
    drop(page, to_file(PIXELS), "start.png")
    assert page.run("document.getElementById('use').value") == "start"
    again, _ = send(visit)
    assert again == params


def test_previews_are_shown_while_it_draws(visit: Visit) -> None:
    page, gate = visit.page, threading.Event()

    def end(consumer: JobConsumer, claim: Claim) -> None:
        assert isinstance(claim.job.params, GenerateParams) and claim.job.params.previews > 0
        consumer.emit(claim, "preview", {"index": 0, "step": 1}, to_file(PIXELS, "jpeg"))
        gate.wait(120)
        draw(consumer, claim)

    page.fill("prompt", "a cube")
    page.click("#previews")
    with visit.worker(end):
        page.click("#submit")
        page.until(f"{PREVIEW} === 64")
        gate.set()
        page.until(RESULT)
    assert page.run(PREVIEW) is None


def test_a_dropped_image_is_enlarged_and_refined_after_a_prompt(visit: Visit) -> None:
    page = visit.page
    drop(page, to_file(PIXELS), "small.png")
    for field, value in {"refine": "0.3", "prompt": "a cube", "output_format": "jpeg", "quality": "80"}.items():
        page.fill(field, value)
    params, _ = send(visit)
    assert isinstance(params, UpscaleParams) and params.refine is not None
    assert (params.output_format, params.file) == ("jpeg", FileOptions("fast", 80))
    assert (params.refine.strength, params.prompt) == (0.3, "a cube")
