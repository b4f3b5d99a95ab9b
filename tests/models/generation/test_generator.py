"""Drawing with a real, tiny pipeline: seeds, batches, steps, cancel, and what the latents mean."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.bundle.errors import BundleError
from giantleap.models.generation.generator import Generator
from giantleap.models.generation.items import GenerationItem
from tests.tiny_bundle import SCALING_FACTOR

ITEM = GenerationItem("a red sphere", "", seed=1, width_px=64, height_px=48, steps=4, guidance_scale=3.0)
OTHERS = [replace(ITEM, prompt="a blue cube on the left", seed=2), replace(ITEM, negative_prompt="green", seed=3)]


@pytest.fixture(scope="module")
def generator(tiny_bundle_dir: Path) -> Generator:
    return Generator.open(read_bundle(tiny_bundle_dir), torch.device("cpu"), torch.float32)


def draw(generator: Generator, *items: GenerationItem) -> list[Tensor]:
    latents = generator.generate(items)
    assert all(latent is not None for latent in latents)
    return [latent for latent in latents if latent is not None]


def test_a_seed_draws_the_same_latent_alone_and_in_a_batch(generator: Generator) -> None:
    (alone,) = draw(generator, ITEM)
    batched = draw(generator, OTHERS[0], ITEM, OTHERS[1])
    assert alone.shape == (16, 6, 8) and alone.dtype == torch.float32
    torch.testing.assert_close(batched[1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [{"seed": 2}, {"prompt": "a blue cube"}, {"negative_prompt": "red"}, {"steps": 5}])
def test_every_parameter_changes_the_latent(generator: Generator, change: dict[str, Any]) -> None:
    (plain,), (changed,) = draw(generator, ITEM), draw(generator, replace(ITEM, **change))
    assert (plain - changed).abs().max() > 1e-3


def test_latents_are_raw(generator: Generator) -> None:
    scaled = generator.pipeline(
        prompt=[ITEM.prompt],
        negative_prompt=[""],
        width=64,
        height=48,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    torch.testing.assert_close(draw(generator, ITEM)[0], scaled[0] / SCALING_FACTOR)


def test_every_step_is_reported_with_the_number_of_steps(generator: Generator) -> None:
    reported: list[tuple[int, int]] = []
    generator.generate([ITEM, OTHERS[0]], on_step=lambda step, steps: reported.append((step, steps)))
    assert reported == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_drawing_stops_once_every_item_is_canceled(generator: Generator) -> None:
    reported: list[int] = []
    latents = generator.generate(
        [ITEM, OTHERS[0]],
        on_step=lambda step, steps: reported.append(step),
        is_canceled=lambda index: index == 0 or len(reported) > 1,
    )
    assert reported == [1, 2] and latents == [None, None]


def test_a_canceled_batch_leaves_nothing_behind(generator: Generator) -> None:
    (before,) = draw(generator, ITEM)
    generator.generate([ITEM], is_canceled=lambda index: index == 0)
    torch.testing.assert_close(draw(generator, ITEM)[0], before, rtol=0, atol=0)


def test_a_batch_that_raised_leaves_nothing_behind(generator: Generator) -> None:
    def fail(step: int, steps: int) -> None:
        raise RuntimeError("on purpose")

    (before,) = draw(generator, ITEM)
    with pytest.raises(RuntimeError, match="on purpose"):
        generator.generate([ITEM], on_step=fail)
    torch.testing.assert_close(draw(generator, ITEM)[0], before, rtol=0, atol=0)


def test_a_canceled_item_leaves_its_neighbor_unchanged(generator: Generator) -> None:
    both = draw(generator, ITEM, OTHERS[0])
    gone, stays = generator.generate([ITEM, OTHERS[0]], is_canceled=lambda index: index == 0)
    assert gone is None and stays is not None
    torch.testing.assert_close(stays, both[1], rtol=0, atol=0)


@pytest.mark.parametrize("change", [{"width_px": 32}, {"height_px": 32}, {"steps": 2}, {"guidance_scale": 1.0}])
def test_items_that_cannot_share_a_batch_are_refused(generator: Generator, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="share"):
        draw(generator, ITEM, replace(ITEM, **change))


def test_drawing_does_not_touch_the_global_generator(generator: Generator) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    draw(generator, ITEM)
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_beyond_the_text_encoder_are_counted(generator: Generator) -> None:
    assert generator.truncated_tokens("a red sphere") == 0
    assert generator.truncated_tokens("red " * 30) == 0, "32 tokens with start and end"
    assert generator.truncated_tokens("red " * 35) == 5


def test_a_prompt_that_is_cut_off_is_drawn_and_not_printed(
    generator: Generator, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    draw(generator, replace(ITEM, prompt="purple " * 40 + "zeppelin"))
    printed = capfd.readouterr()
    assert printed.out + printed.err + caplog.text == ""


def test_a_pipeline_whose_weights_are_not_safetensors_is_refused(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "pickled"
    shutil.copytree(tiny_bundle_dir, directory)
    unet = directory / "pipeline" / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), unet / "diffusion_pytorch_model.bin")
    weights.unlink()
    bundle = replace(read_bundle(tiny_bundle_dir), directory=directory)
    with pytest.raises(BundleError, match="safetensors"):
        Generator.open(bundle, torch.device("cpu"), torch.float32)
