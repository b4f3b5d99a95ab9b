"""Images with a mask and reference images with the stock pipelines: what stays, what changes, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

from giantleap.models.bundle.descriptor import INPAINTING, REFERENCES
from giantleap.models.generation.families import FAMILIES
from giantleap.models.generation.items import GenerationItem
from giantleap.models.pixels.images import to_signed
from tests.models.generation.test_generator_families import (
    HEIGHT_PX,
    LONG,
    SHORT,
    WIDTH_PX,
    Family,
    build,
    check_close,
    decode,
    draw,
    draw_in_bfloat16,
    encode,
)

MASKED = ["sd15", "sdxl", "sd3", "flux1-dev", "flux2-klein", "qwen-image", "z-image"]
REFERRING = ["flux1-kontext", "flux2", "flux2-klein"]
PIXELS = torch.randint(0, 256, (HEIGHT_PX, WIDTH_PX, 3), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
RIGHT = (torch.arange(WIDTH_PX) >= WIDTH_PX // 2).float().expand(1, HEIGHT_PX, WIDTH_PX).contiguous()


@pytest.fixture(scope="module", params=MASKED)
def masked(request: pytest.FixtureRequest) -> Family:
    """A family with an item whose right half is generated again."""
    made = build(request.param)
    return replace(made, item=replace(made.item, steps=4, init_image=to_signed(PIXELS), mask=RIGHT))


@pytest.fixture(scope="module", params=REFERRING)
def referring(request: pytest.FixtureRequest) -> Family:
    """A family with an item that has one reference image, of another size and shape than the result."""
    made = build(request.param)
    return replace(made, item=replace(made.item, references=(reference(1),)))


def reference(seed: int, side_px: int = 80) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (64, side_px, 3), generator=random, dtype=torch.uint8)


def start_of(item: GenerationItem) -> Tensor:
    assert item.init_image is not None
    return item.init_image


def halves(latent: Tensor) -> tuple[Tensor, Tensor]:
    middle = latent.shape[-1] // 2
    return latent[..., :middle], latent[..., middle:]


def test_the_families_under_test_are_those_that_the_api_knows() -> None:
    by_name = {cls.__name__: family for cls, family in FAMILIES.items()}
    assert {name: each.max_mask_px for name, each in by_name.items() if each.inpaint_pipeline} == INPAINTING
    assert {name: each.max_references for name, each in by_name.items() if each.max_references} == REFERENCES
    assert {type(build(name).pipeline).__name__ for name in MASKED} == INPAINTING.keys()
    assert {type(build(name).pipeline).__name__ for name in REFERRING} == REFERENCES.keys()


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_unmasked_part_keeps_the_latent_of_the_image(masked: Family, strength: float) -> None:
    start = encode(masked.pipeline, start_of(masked.item))
    latent = draw(masked.generator, replace(masked.item, strength=strength))[0]
    (stays, changes), (before, replaced) = halves(latent), halves(start)
    check_close(stays, before)
    assert (changes - replaced).abs().max() > 0.1


def test_a_mask_draws_as_in_the_stock_pipeline(masked: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """In latents: StableDiffusion3InpaintPipeline of diffusers 0.42 decodes its own without the shift of its VAE."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    item, pipeline, stock_class = masked.item, masked.pipeline, masked.generator.family.inpaint_pipeline
    assert stock_class is not None
    stock = stock_class(**pipeline.components)
    stock.set_progress_bar_config(disable=True)
    nothing = {"negative_prompt": " "} if masked.case.guidance == "true_cfg_scale" else {}
    made = stock(
        prompt=SHORT,
        image=Image.fromarray(PIXELS.numpy()),
        mask_image=Image.fromarray((RIGHT[0] * 255).byte().numpy()),
        strength=0.5,
        width=WIDTH_PX,
        height=HEIGHT_PX,
        num_inference_steps=item.steps,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **{masked.case.guidance: item.guidance_scale} | nothing,
    ).images
    expected = made if masked.generator.family.returns_raw else masked.case.space.to_raw(made, HEIGHT_PX, WIDTH_PX)
    check_close(draw(masked.generator, replace(item, strength=0.5))[0], expected[0])


def test_a_mask_of_one_pixel_changes_the_latent_pixel_that_it_is_in() -> None:
    made, mask = build("sd15"), torch.zeros(1, HEIGHT_PX, WIDTH_PX)
    mask[0, 21, 46] = 1
    item = replace(made.item, init_image=to_signed(PIXELS), mask=mask)
    changed = (draw(made.generator, item)[0] - encode(made.pipeline, start_of(item))).abs().amax(0) > 1e-3
    assert changed.nonzero().tolist() == [[21 // 8, 46 // 8]]


def test_two_masks_in_a_batch_do_not_mix(masked: Family) -> None:
    item = masked.item
    items = [item, replace(item, prompt=LONG, seed=2, init_image=-start_of(item), mask=RIGHT.flip(-1))]
    singles = [draw(masked.generator, each)[0] for each in items]
    for single, batched in zip(singles, draw(masked.generator, *items), strict=True):
        check_close(batched, single)


def test_the_seed_decides_what_is_drawn_and_the_pipeline_stays_as_it_was(masked: Family) -> None:
    plain = replace(masked.item, init_image=None, mask=None)
    before = draw(masked.generator, plain)[0]
    first, again = draw(masked.generator, masked.item)[0], draw(masked.generator, masked.item)[0]
    assert torch.equal(first, again)
    assert (draw(masked.generator, replace(masked.item, seed=2))[0] - first).abs().max() > 1e-2
    assert torch.equal(draw(masked.generator, plain)[0], before)


def test_a_masked_batch_reports_its_steps_and_stops_when_canceled(masked: Family) -> None:
    reported: list[tuple[int, int]] = []
    items = [replace(masked.item, strength=0.5)] * 2
    latents = masked.generator.generate(
        items, on_step=lambda *step: reported.append(step), is_canceled=lambda index: bool(reported)
    )
    assert reported == [(1, 2)] and latents == [None, None]


def test_a_mask_works_in_bfloat16_beside_a_vae_in_float32(masked: Family) -> None:
    latent = draw_in_bfloat16(masked)
    stays, before = halves(latent)[0], halves(encode(masked.pipeline, start_of(masked.item)))[0]
    assert float((stays - before).abs().mean() / before.abs().mean()) < 0.02


def test_references_change_the_image_each_of_them(referring: Family) -> None:
    max_references = referring.generator.family.max_references
    plain = draw(referring.generator, replace(referring.item, references=()))[0]
    one, again = draw(referring.generator, referring.item)[0], draw(referring.generator, referring.item)[0]
    assert one.shape == plain.shape and torch.equal(one, again)
    seen = [plain, one, draw(referring.generator, replace(referring.item, references=(reference(2),)))[0]]
    if max_references > 1:
        two = (reference(1), reference(2, side_px=96))
        seen.append(draw(referring.generator, replace(referring.item, references=two))[0])
    changes = [float((a - b).abs().max()) for index, a in enumerate(seen) for b in seen[:index]]
    assert min(changes) > 1e-4
    assert torch.equal(draw(referring.generator, replace(referring.item, references=()))[0], plain)


def test_a_reference_draws_as_in_the_stock_pipeline(referring: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    own_size = {"max_area": WIDTH_PX * HEIGHT_PX} if type(referring.pipeline) is FluxKontextPipeline else {}
    made = referring.pipeline(
        image=[Image.fromarray(reference(1).numpy())],
        prompt=SHORT,
        width=WIDTH_PX,
        height=HEIGHT_PX,
        num_inference_steps=referring.item.steps,
        guidance_scale=referring.item.guidance_scale,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
        **own_size,
    )
    image = decode(referring.pipeline, draw(referring.generator, referring.item)[0])
    torch.testing.assert_close(image, torch.from_numpy(made.images[0]), rtol=0, atol=1e-4)


def test_items_with_references_run_one_by_one_and_equal_singles(referring: Family) -> None:
    reported: list[tuple[int, int]] = []
    items = [referring.item, replace(referring.item, prompt=LONG, seed=2, references=(reference(2),))]
    singles = [draw(referring.generator, each)[0] for each in items]
    batch = referring.generator.generate(items, on_step=lambda *step: reported.append(step))
    assert all(
        latent is not None and torch.equal(latent, single) for latent, single in zip(batch, singles, strict=True)
    )
    assert reported == [(step, 6) for step in range(1, 7)]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sd15", {"references": (PIXELS,)}, "takes 0 reference images"),
        ("flux1-kontext", {"references": (PIXELS, PIXELS)}, "takes 1 reference images, not 2"),
        ("flux2", {"references": (PIXELS,), "init_image": to_signed(PIXELS)}, "exclude each other"),
        ("sd15", {"mask": RIGHT}, "needs the init_image"),
        ("sana", {"mask": RIGHT, "init_image": to_signed(PIXELS)}, "SanaPipeline takes no mask"),
        ("sd15", {"mask": RIGHT[0], "init_image": to_signed(PIXELS)}, r"mask must be \[1, 96, 64\]"),
        ("sd15", {"mask": RIGHT, "init_image": to_signed(PIXELS), "strength": 0.2}, "leave a step"),
    ],
)
def test_images_that_a_family_does_not_take_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    made = build(name)
    with pytest.raises(ValueError, match=message):
        draw(made.generator, replace(made.item, **change))


def test_a_mask_that_the_pipeline_would_resize_is_refused() -> None:
    made, side_px = build("flux2-klein"), 1040
    large = torch.zeros(1, side_px, side_px)
    item = replace(made.item, width_px=side_px, height_px=side_px, mask=large, init_image=large.expand(3, -1, -1))
    with pytest.raises(ValueError, match="up to 1048576 pixels; 1040x1040 are more"):
        draw(made.generator, item)


def test_items_with_and_without_a_mask_do_not_share_a_batch() -> None:
    made = build("sd15")
    item = replace(made.item, init_image=to_signed(PIXELS), mask=RIGHT)
    with pytest.raises(ValueError, match="must share"):
        draw(made.generator, item, replace(item, mask=None))
