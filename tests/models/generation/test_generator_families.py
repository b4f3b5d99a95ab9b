"""Drawing with the stock pipeline of every family: what comes out raw, what a batch changes, how it is stopped."""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    TCDScheduler,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from giantleap.models.bundle.bundle import Bundle, BundleError
from giantleap.models.bundle.descriptor import (
    IMAGE_TO_IMAGE,
    NO_NEGATIVE_PROMPT,
    About,
    Defaults,
    Descriptor,
    LatentSpaceSource,
    Limits,
    PipelineSource,
    VaeSource,
    Vocabulary,
)
from giantleap.models.generation.families import FAMILIES
from giantleap.models.generation.generator import Generator
from giantleap.models.generation.items import GenerationItem
from giantleap.models.latent_space import LATENT_SPACES, LatentSpace
from tests.tiny_pipelines import (
    save_pipeline,
    tiny_flux1,
    tiny_flux1_kontext,
    tiny_flux2,
    tiny_flux2_klein,
    tiny_prx,
    tiny_qwen_image,
    tiny_qwen_image_21,
    tiny_sana,
    tiny_sana_sprint,
    tiny_sd3,
    tiny_sd15,
    tiny_sdxl,
    tiny_z_image,
)

WIDTH_PX, HEIGHT_PX, STEPS = 64, 96, 3
# Two prompts of different lengths: padding and masks must not let one change the other.
SHORT, LONG = "a red sphere", "a blue cube on the left side of a green cone that stands in tall grass"
# As in the configuration of Playground 2.5, a variant of SDXL.
MEAN, STD = (-1.6574, 1.886, -1.383, 2.5155), (8.4927, 5.9022, 6.5498, 5.2299)


@dataclass(frozen=True)
class Case:
    """A family under test.

    Args:
        build: Its pipeline.
        space: Of its latents.
        guidance_scale: One at which guidance acts, where the model has any.
        guidance: The pipeline's name for it.
        overflow: A prompt, and how many of its tokens are too many.
        arguments: Of a stock call for an image of any size and in any number of steps.
    """

    build: Callable[[], Any]
    space: LatentSpace
    overflow: tuple[str, int]
    guidance_scale: float = 3.0
    guidance: str = "guidance_scale"
    arguments: dict[str, Any] = field(default_factory=dict)


# Letters are tokens. CLIP brackets a prompt with two of its own, T5 sets a space before it and an end after it. The
# others put a conversation around it, of 19 tokens in Z-Image, with an empty thought of 19 more in FLUX.2 Klein, with
# instructions of 168 in FLUX.2 and of 133 in Qwen-Image, which drops the first 34 of all.
CLIP_LOSS = ("a" * 80, 80 + 2 - 77)
T5_LOSS = ("a" * 600, 600 + 2 - 512)
# Of Sana's limit the instruction takes two tokens more than it has itself.
PRX_LOSS = ("a" * 300, 300 - 256)
SANA_LOSS = ("a" * 400, 400 + 2 - 300)
ANY_SIZE: dict[str, Any] = {"use_resolution_binning": False}
OWN_AREA: dict[str, Any] = {"max_area": WIDTH_PX * HEIGHT_PX}

CASES = {
    "sd15": Case(tiny_sd15, LATENT_SPACES["sd15"], CLIP_LOSS),
    "sdxl": Case(tiny_sdxl, LATENT_SPACES["sdxl"], CLIP_LOSS),
    "sdxl-variant": Case(
        lambda: tiny_sdxl(scaling_factor=0.5, latents_mean=list(MEAN), latents_std=list(STD)),
        LatentSpace("variant", 4, 8, scale=0.5, mean=MEAN, std=STD),
        CLIP_LOSS,
    ),
    "sd3": Case(tiny_sd3, LATENT_SPACES["sd3"], ("a" * 300, 300 + 2 - 256)),
    "sd3-without-t5": Case(lambda: tiny_sd3(t5=False), LATENT_SPACES["sd3"], CLIP_LOSS),
    "flux1-dev": Case(tiny_flux1, LATENT_SPACES["flux1"], T5_LOSS),
    "flux1-schnell": Case(lambda: tiny_flux1(guidance_embeds=False), LATENT_SPACES["flux1"], T5_LOSS),
    "flux1-kontext": Case(tiny_flux1_kontext, LATENT_SPACES["flux1"], T5_LOSS, arguments=OWN_AREA),
    "flux2": Case(tiny_flux2, LATENT_SPACES["flux2"], ("a" * 600, 600 + 30 + 168 - 512)),
    "flux2-klein": Case(tiny_flux2_klein, LATENT_SPACES["flux2"], ("a" * 600, 600 + 19 + 19 - 512)),
    "flux2-klein-distilled": Case(
        lambda: tiny_flux2_klein(is_distilled=True), LATENT_SPACES["flux2"], ("a" * 600, 600 + 19 + 19 - 512), 1.0
    ),
    "qwen-image": Case(
        tiny_qwen_image,
        LATENT_SPACES["qwen-image"],
        ("a" * 600, 600 + 29 + 133 - 34 - 512),
        guidance="true_cfg_scale",
    ),
    "z-image": Case(tiny_z_image, LATENT_SPACES["z-image"], ("a" * 600, 600 + 19 - 512)),
    "z-image-turbo": Case(tiny_z_image, LATENT_SPACES["z-image"], ("a" * 600, 600 + 19 - 512), 0.0),
    "qwen-image-21": Case(
        tiny_qwen_image_21, LATENT_SPACES["qwen-image-21"], ("a" * 600, 0), guidance="true_cfg_scale"
    ),
    "prx": Case(tiny_prx, LatentSpace("stride4", 24, 4, scale=1.0, side_multiple=2), PRX_LOSS, arguments=ANY_SIZE),
    "prx-flux-vae": Case(lambda: tiny_prx(flux_vae=True), LATENT_SPACES["z-image"], PRX_LOSS, arguments=ANY_SIZE),
    "sana": Case(tiny_sana, LATENT_SPACES["sana"], SANA_LOSS, arguments=ANY_SIZE),
    "sana-short": Case(
        lambda: tiny_sana(max_tokens=90),
        LatentSpace("stride4", 24, 4, scale=0.5, side_multiple=8),
        ("a" * 100, 100 - 90),
        arguments=ANY_SIZE | {"max_sequence_length": 90, "complex_human_instruction": None},
    ),
    "sana-sprint": Case(
        tiny_sana_sprint, LATENT_SPACES["sana"], SANA_LOSS, arguments=ANY_SIZE | {"intermediate_timesteps": None}
    ),
}


@dataclass(frozen=True)
class Family:
    """A built case, and an item that its pipeline draws."""

    name: str
    case: Case
    generator: Generator
    item: GenerationItem

    @property
    def pipeline(self) -> Any:
        return self.generator.pipeline


def build(name: str) -> Family:
    case = CASES[name]
    pipeline = case.build()
    pipeline.set_progress_bar_config(disable=True)
    item = GenerationItem(SHORT, "", 1, WIDTH_PX, HEIGHT_PX, STEPS, case.guidance_scale)
    return Family(name, case, Generator(pipeline, case.space), item)


# Models that differ from another of the same class in a setting only, tested where it matters.
SETTINGS = {
    "sdxl-variant",
    "sd3-without-t5",
    "flux1-schnell",
    "flux2-klein-distilled",
    "z-image-turbo",
    "prx-flux-vae",
    "sana-short",
}
EVERY = pytest.mark.parametrize("family", CASES, indirect=True)


@pytest.fixture(scope="module", params=[name for name in CASES if name not in SETTINGS])
def family(request: pytest.FixtureRequest) -> Family:
    return build(request.param)


@pytest.fixture(scope="module", params=["sd15", "sdxl", "sd3", "flux1-dev", "qwen-image", "z-image", "sana-sprint"])
def image_family(request: pytest.FixtureRequest) -> Family:
    """Those that can start from an image, with an item that does: a bright one, without a negative value."""
    made = build(request.param)
    start = torch.rand(3, HEIGHT_PX, WIDTH_PX, generator=torch.Generator().manual_seed(7))
    return replace(made, item=replace(made.item, steps=4, init_image=start, strength=0.5))


def draw(generator: Generator, *items: GenerationItem) -> list[Tensor]:
    latents = generator.generate(items)
    assert all(latent is not None for latent in latents)
    return [latent for latent in latents if latent is not None]


def check_close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for rounding, which goes with the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-5 * float(expected.abs().max()))


def decode(pipeline: Any, raw: Tensor) -> Tensor:
    """A raw latent through the pipeline's VAE as it stands; [height_px, width_px, channels] in [0, 1]."""
    video = type(pipeline.vae).__name__.startswith("AutoencoderKLQwen")
    with torch.no_grad():
        image = pipeline.vae.decode(raw[None, :, None] if video else raw[None], return_dict=False)[0]
    image = image[:, :, 0] if video else image
    shown: Tensor = (image[0] / 2 + 0.5).clamp(0, 1)
    return shown.permute(1, 2, 0)


def stock_image(family: Family, **arguments: Any) -> Tensor:
    """What the pipeline makes of the family's item on its own, as its users call it."""
    made = family.pipeline(
        prompt=SHORT,
        width=WIDTH_PX,
        height=HEIGHT_PX,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
        **{family.case.guidance: family.case.guidance_scale} | family.case.arguments | arguments,
    )
    return torch.from_numpy(np.asarray(made.images[0]))


def denoiser_calls(pipeline: Any, work: Callable[[], Any]) -> int:
    """How often the pipeline's network ran."""
    calls = []
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    hook = network.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    try:
        work()
    finally:
        hook.remove()
    return len(calls)


def test_every_known_pipeline_class_is_under_test() -> None:
    assert {type(case.build()) for case in CASES.values()} == set(FAMILIES)


def test_an_unknown_pipeline_class_is_refused() -> None:
    with pytest.raises(ValueError, match="AutoencoderKL: only StableDiffusionPipeline, "):
        Generator(AutoencoderKL(), LATENT_SPACES["sd15"])


@EVERY
def test_the_decoded_latent_is_the_image_of_the_stock_pipeline(family: Family) -> None:
    latent = draw(family.generator, family.item)[0]
    stride_px = family.case.space.stride_px
    assert latent.shape == (family.case.space.channels, HEIGHT_PX // stride_px, WIDTH_PX // stride_px)
    # Without a negative prompt Qwen-Image takes no guidance; its model card gives a space for none.
    nothing = {"negative_prompt": " "} if family.case.guidance == "true_cfg_scale" else {}
    torch.testing.assert_close(decode(family.pipeline, latent), stock_image(family, **nothing), rtol=0, atol=1e-4)


def test_a_negative_prompt_draws_as_in_the_stock_pipeline_or_is_refused(family: Family) -> None:
    item = replace(family.item, negative_prompt="gray")
    if not family.generator.takes_negative_prompt:
        with pytest.raises(ValueError, match="Pipeline takes no negative prompt"):
            draw(family.generator, item)
        return
    image = decode(family.pipeline, draw(family.generator, item)[0])
    torch.testing.assert_close(image, stock_image(family, negative_prompt="gray"), rtol=0, atol=1e-4)


def test_a_batch_of_two_equals_two_singles(family: Family) -> None:
    away = "a long list of what nobody wants to see" if family.generator.takes_negative_prompt else ""
    items = [family.item, replace(family.item, prompt=LONG, negative_prompt=away, seed=2)]
    singles = [draw(family.generator, item)[0] for item in items]
    swapped = draw(family.generator, replace(items[0], prompt=LONG))[0]
    prompt_effect = (swapped - singles[0]).abs().max() / singles[0].abs().max()
    assert prompt_effect > 1e-3, "the prompt must matter, or what follows proves nothing"
    for single, batched in zip(singles, draw(family.generator, *items), strict=True):
        check_close(batched, single)


def test_guidance_reaches_the_model(family: Family) -> None:
    plain, guided = (draw(family.generator, replace(family.item, guidance_scale=scale))[0] for scale in (1.5, 4.5))
    assert (plain - guided).abs().max() > 1e-3


def test_steps_are_reported_from_one_to_all(family: Family) -> None:
    reported: list[tuple[int, int]] = []
    family.generator.generate(
        [family.item, replace(family.item, seed=2)], on_step=lambda step, steps: reported.append((step, steps))
    )
    steps = STEPS * (1 if family.generator.family.batches else 2)
    assert reported == [(step, steps) for step in range(1, steps + 1)]


def test_a_canceled_batch_stops_at_the_next_step(family: Family) -> None:
    items = [family.item, replace(family.item, seed=2)]
    results: list[list[Tensor | None]] = []
    one_step = denoiser_calls(family.pipeline, lambda: draw(family.generator, replace(family.item, steps=1)))
    canceled = denoiser_calls(
        family.pipeline, lambda: results.append(family.generator.generate(items, is_canceled=lambda index: True))
    )
    assert results == [[None, None]] and canceled == one_step


def test_a_canceled_item_leaves_the_other_as_it_is(family: Family) -> None:
    items = [family.item, replace(family.item, prompt=LONG, seed=2)]
    both = draw(family.generator, *items)
    gone, kept = family.generator.generate(items, is_canceled=lambda index: index == 0)
    assert gone is None and kept is not None
    torch.testing.assert_close(kept, both[1], rtol=0, atol=0)


@EVERY
def test_previews_show_clean_raw_latents_and_change_nothing(family: Family) -> None:
    plain = replace(family.item, steps=4)
    items, seen = [replace(plain, previews=3), replace(plain, seed=2), replace(plain, previews=1, seed=3)], []

    def show(index: int, step: int, raw: Tensor) -> None:
        seen.append((index, step))
        assert raw.shape == latents[0].shape and bool(raw.isfinite().all())
        distances[index, step] = float((raw - latents[index]).square().mean())

    latents = draw(family.generator, *(replace(item, previews=0) for item in items))
    distances: dict[tuple[int, int], float] = {}
    again = family.generator.generate(items, on_preview=show)
    assert all(one is not None and torch.equal(one, other) for one, other in zip(again, latents, strict=True))
    assert sorted(seen) == [(0, 1), (0, 2), (0, 3), (2, 2)]
    noise = float(latents[0].square().mean())
    assert distances[0, 3] < min(distances[0, 1] + 1e-6, 4 * noise), "it comes closer to the image"
    seen.clear()
    family.generator.generate([items[0]], is_canceled=lambda index: bool(seen), on_preview=show)
    assert seen == [(0, 1)], "none after a cancel"


@EVERY
def test_tokens_that_are_cut_off_are_counted(family: Family) -> None:
    prompt, lost = family.case.overflow
    assert family.generator.truncated_tokens(prompt) == lost
    assert family.generator.truncated_tokens(SHORT) == 0
    if lost:
        assert family.generator.truncated_tokens(prompt[lost:]) == 0
        assert family.generator.truncated_tokens(prompt[lost - 1 :]) == 1


def test_what_is_counted_as_cut_off_is_not_drawn(family: Family) -> None:
    prompt, lost = family.case.overflow
    full = prompt + 40 * "a"  # more than any template sets behind a prompt
    ends = [draw(family.generator, replace(family.item, prompt=full + end, steps=1))[0] for end in "bc"]
    assert (ends[0] - ends[1]).abs().max() == 0 or not lost


def test_sizes_are_multiples_of_what_the_family_draws(family: Family) -> None:
    multiple_px = family.case.space.multiple_px
    item = replace(family.item, width_px=3 * multiple_px, height_px=2 * multiple_px, steps=1)
    sides = [side_px // family.case.space.stride_px for side_px in (item.height_px, item.width_px)]
    assert draw(family.generator, item)[0].shape == (family.case.space.channels, *sides)
    with pytest.raises(ValueError, match=f"multiples of {multiple_px}"):
        draw(family.generator, replace(item, width_px=3 * multiple_px + 4))


def test_drawing_does_not_touch_the_global_generator(family: Family) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    draw(family.generator, replace(family.item, steps=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_negative_prompt_in_the_batch_does_not_change_the_item_without() -> None:
    """SDXL embeds no negative prompt as zeros, and stock pipelines decide that for a whole batch."""
    made = build("sdxl")
    alone = draw(made.generator, made.item)[0]
    empty = made.pipeline(
        prompt=SHORT,
        negative_prompt="",
        width=WIDTH_PX,
        height=HEIGHT_PX,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    assert (made.case.space.to_raw(empty)[0] - alone).abs().max() > 1, "an empty text is not the same as none"
    batched = draw(made.generator, made.item, replace(made.item, negative_prompt="gray"))[0]
    check_close(batched, alone)


@pytest.mark.parametrize(
    "image_family",
    ["sd15", "sdxl", "sdxl-variant", "sd3", "flux1-dev", "qwen-image", "z-image", "sana-sprint"],
    indirect=True,
)
def test_an_image_to_start_from_draws_as_in_the_stock_pipeline(
    image_family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the sample of the posterior, in whose place we take its mean."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    item, pipeline = image_family.item, image_family.pipeline
    image_class = image_family.generator.family.image_pipeline
    assert image_class is not None and item.init_image is not None
    stock = image_class(**pipeline.components)
    stock.set_progress_bar_config(disable=True)
    nothing = {"negative_prompt": " "} if image_family.case.guidance == "true_cfg_scale" else {}
    # The first has no negative value, which must not make it one of [0, 1], as tensors are to the stock pipelines.
    for start in (item.init_image, 2 * item.init_image - 1):
        made = stock(
            prompt=SHORT,
            image=start[None] / 2 + 0.5,
            strength=item.strength,
            width=WIDTH_PX,
            height=HEIGHT_PX,
            num_inference_steps=item.steps,
            generator=torch.Generator().manual_seed(1),
            output_type="np",
            **{image_family.case.guidance: item.guidance_scale} | image_family.case.arguments | nothing,
        )
        image = decode(pipeline, draw(image_family.generator, replace(item, init_image=start))[0])
        torch.testing.assert_close(image, torch.from_numpy(made.images[0]), rtol=0, atol=1e-4)


def test_strength_says_how_much_of_the_image_stays(image_family: Family) -> None:
    item, generator = image_family.item, image_family.generator
    reported: list[tuple[int, int]] = []
    results = {}
    for strength in (0.25, 0.5, 1.0):
        (results[strength],) = generator.generate(
            [replace(item, strength=strength)], on_step=lambda step, steps: reported.append((step, steps))
        )
    assert reported == [(1, 1), (1, 2), (2, 2), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert item.init_image is not None
    start = encode(image_family.pipeline, item.init_image)
    distances = [float((latent - start).abs().mean()) for latent in results.values() if latent is not None]
    assert distances == sorted(distances) and distances[2] > 1.2 * distances[0]


def test_the_image_matters_and_the_seed_repeats(image_family: Family) -> None:
    item, generator = image_family.item, image_family.generator
    assert item.init_image is not None
    before = draw(generator, replace(item, init_image=None))[0]
    first, again = draw(generator, item)[0], draw(generator, item)[0]
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    for other in (replace(item, seed=2), replace(item, init_image=-item.init_image)):
        assert (draw(generator, other)[0] - first).abs().max() > 1e-2
    torch.testing.assert_close(draw(generator, replace(item, init_image=None))[0], before, rtol=0, atol=0)


def test_two_images_in_a_batch_do_not_mix(image_family: Family) -> None:
    item, generator = image_family.item, image_family.generator
    assert item.init_image is not None
    items = [item, replace(item, prompt=LONG, seed=2, init_image=-item.init_image)]
    for single, batched in zip([draw(generator, item)[0] for item in items], draw(generator, *items), strict=True):
        check_close(batched, single)


def test_a_batch_that_starts_from_images_stops_when_canceled(image_family: Family) -> None:
    reported: list[int] = []
    latents = image_family.generator.generate(
        [image_family.item], on_step=lambda step, steps: reported.append(step), is_canceled=lambda index: bool(reported)
    )
    assert reported == [1] and latents == [None]


def draw_in_bfloat16(family: Family) -> Tensor:
    """The latent of networks in bfloat16 beside a VAE in float32, which the run must leave as it is."""
    lower: Any = family.case.build()
    weights = {name: weight.clone() for name, weight in lower.vae.state_dict().items()}
    lower.to(torch.bfloat16)
    lower.vae.to(torch.float32).load_state_dict(weights)
    lower.set_progress_bar_config(disable=True)
    latent = draw(Generator(lower, family.case.space), family.item)[0]
    assert latent is not None and latent.dtype == torch.float32 and latent.isfinite().all()
    floats = [weight for weight in lower.vae.state_dict().values() if weight.is_floating_point()]
    assert {weight.dtype for weight in floats} == {torch.float32}
    assert all(torch.equal(weight, weights[name]) for name, weight in lower.vae.state_dict().items())
    return latent


def test_the_vae_keeps_its_type_when_an_image_is_encoded(image_family: Family) -> None:
    """A decoder that overflows in float16 is in another type than the rest, and must be so afterwards."""
    latent = draw_in_bfloat16(image_family)
    full = draw(image_family.generator, image_family.item)[0]
    assert float((latent - full).abs().mean() / full.abs().mean()) < 0.2


def test_what_cannot_start_from_an_image_says_so(family: Family) -> None:
    item = replace(family.item, init_image=torch.zeros(3, HEIGHT_PX, WIDTH_PX), strength=0.5)
    if family.generator.supports_init_image:
        assert draw(family.generator, replace(item, steps=2))
        return
    with pytest.raises(ValueError, match="cannot start from an image"):
        draw(family.generator, item)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": 0.0}, "strength 0.0"),
        ({"strength": 1.01}, "strength 1.01"),
        ({"strength": 0.2}, "leave a step"),
        ({"init_image": torch.zeros(3, WIDTH_PX, HEIGHT_PX)}, r"must be \[3, 96, 64\]; found \[3, 64, 96\]"),
        ({"init_image": torch.zeros(1, 3, HEIGHT_PX, WIDTH_PX)}, "init_image must be"),
    ],
)
def test_an_image_or_strength_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    made = build("sd15")
    item = replace(made.item, init_image=torch.zeros(3, HEIGHT_PX, WIDTH_PX), strength=0.5)
    with pytest.raises(ValueError, match=message):
        draw(made.generator, replace(item, **change))


@pytest.mark.parametrize("change", [{"strength": 0.75}, {"init_image": None}])
def test_items_of_a_batch_share_whether_and_how_they_start_from_an_image(change: dict[str, Any]) -> None:
    made = build("sd15")
    item = replace(made.item, init_image=torch.zeros(3, HEIGHT_PX, WIDTH_PX), strength=0.5)
    with pytest.raises(ValueError, match="must share"):
        draw(made.generator, item, replace(item, **change))


def encode(pipeline: Any, image: Tensor) -> Tensor:
    """The mean of the posterior of an image in [-1, 1]: its raw latent."""
    video = type(pipeline.vae).__name__.startswith("AutoencoderKLQwen")
    with torch.no_grad():
        codes = pipeline.vae.encode(image[None, :, None] if video else image[None])
    mean: Tensor = codes.latent if isinstance(pipeline.vae, AutoencoderDC) else codes.latent_dist.mode()
    return mean[0, :, 0] if video else mean[0]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """No connection to anywhere; whoever tries is noted."""
    tried: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        tried.append(address)
        raise OSError("no network in this test")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield tried
    assert tried == []


def saved(directory: Path, stock: Any, space: LatentSpace, **sections: Any) -> Bundle:
    """A bundle around a pipeline, which is written to the directory as its authors would."""
    save_pipeline(stock, directory / "pipeline")
    side_px = 2 * space.multiple_px
    numbers: dict[str, Any] = {
        "channels": space.channels,
        "stride_px": space.stride_px,
        "scale": space.scale,
        "mean": space.mean,
        "std": space.std,
        "side_multiple": space.side_multiple,
    }
    descriptor = Descriptor(
        **{
            "bundle": About(name="tiny", title="Tiny", license="Apache-2.0", provenance="Random weights."),
            "pipeline": PipelineSource(path="pipeline"),
            "latent_space": LatentSpaceSource(
                **{"name": space.name} | ({} if space.name in LATENT_SPACES else numbers)
            ),
            "defaults": Defaults(
                steps=STEPS, guidance_scale=1.0, base_width_px=side_px, base_height_px=side_px, method="bicubic"
            ),
            "limits": Limits(min_base_px=side_px, max_base_px=256, multiple_px=space.multiple_px, max_steps=50),
            "vocabulary": Vocabulary(closed=False),
        }
        | sections
    )
    return Bundle(directory, descriptor)


# Left out: the stand-in for the processor of Qwen-Image 2.1 cannot be saved.
@pytest.mark.parametrize("family", sorted(CASES.keys() - SETTINGS - {"qwen-image-21"}), indirect=True)
def test_a_saved_pipeline_draws_the_same_without_a_network(family: Family, tmp_path: Path, offline: list[Any]) -> None:
    expected = draw(family.generator, family.item)[0]
    bundle = saved(tmp_path, family.pipeline, family.case.space)
    opened = Generator.open(bundle, torch.device("cpu"), torch.float32)
    assert type(opened.pipeline) is type(family.pipeline)
    check_close(draw(opened, family.item)[0], expected)
    assert opened.truncated_tokens(family.case.overflow[0]) == family.case.overflow[1]


def test_a_bundle_may_name_another_scheduler_and_another_vae(tmp_path: Path, offline: list[Any]) -> None:
    made = build("sd15")
    pipeline: Any = tiny_sd15()
    other = pipeline.vae
    torch.nn.init.normal_(other.decoder.conv_out.weight)
    other.save_pretrained(tmp_path / "vae", safe_serialization=True)
    bundle = saved(
        tmp_path,
        made.pipeline,
        made.case.space,
        pipeline=PipelineSource(path="pipeline", scheduler="EulerDiscreteScheduler"),
        vae=VaeSource(path="vae"),
    )
    opened = Generator.open(bundle, torch.device("cpu"), torch.float32)
    scheduler: Any = opened.pipeline.scheduler
    assert isinstance(scheduler, EulerDiscreteScheduler)
    assert opened.pipeline.scheduler.config.beta_end == made.pipeline.scheduler.config.beta_end
    torch.testing.assert_close(opened.pipeline.vae.decoder.conv_out.weight, other.decoder.conv_out.weight)
    scheduler = EulerDiscreteScheduler.from_pretrained(tmp_path / "pipeline" / "scheduler")
    made.pipeline.register_modules(scheduler=scheduler)
    check_close(draw(opened, made.item)[0], draw(made.generator, made.item)[0])


def test_a_bundle_may_name_a_variant_of_the_weights(tmp_path: Path, offline: list[Any]) -> None:
    made = build("sd15")
    bundle = saved(tmp_path, made.pipeline, made.case.space, pipeline=PipelineSource(path="pipeline", variant="fp16"))
    half: Any = tiny_sd15()
    half.to(torch.float16).save_pretrained(tmp_path / "pipeline", safe_serialization=True, variant="fp16")
    opened = Generator.open(bundle, torch.device("cpu"), torch.float32)
    weight = made.pipeline.unet.conv_in.weight
    torch.testing.assert_close(opened.pipeline.unet.conv_in.weight, weight.half().float(), rtol=0, atol=0)
    assert not torch.equal(opened.pipeline.unet.conv_in.weight, weight)


def test_the_statistics_of_flux2_come_from_its_vae() -> None:
    made = build("flux2")
    norm = made.pipeline.vae.bn
    assert made.case.space.mean is None and made.generator.latent_space.mean == tuple(norm.running_mean.tolist())
    std = made.generator.latent_space.std
    assert std is not None
    torch.testing.assert_close(torch.tensor(std), (norm.running_var + 1e-4).sqrt())


@pytest.mark.parametrize(
    "name", ["sdxl", "sd3", "flux1-dev", "flux2", "flux2-klein", "qwen-image", "z-image", "prx", "sana", "sana-sprint"]
)
def test_a_pipeline_in_bfloat16_gives_float32_latents(name: str) -> None:
    made = build(name)
    full = draw(made.generator, made.item)[0]
    made.pipeline.to(torch.bfloat16)
    latent = draw(made.generator, made.item)[0]
    assert latent.dtype == torch.float32 and latent.shape == full.shape
    assert float((latent - full).abs().mean() / full.abs().mean()) < 0.2


def test_what_the_api_knows_of_a_class_without_loading_it_is_what_the_generator_does() -> None:
    by_name = {cls.__name__: family for cls, family in FAMILIES.items()}
    assert {name for name, family in by_name.items() if family.image_pipeline is not None} == IMAGE_TO_IMAGE
    assert {name for name, family in by_name.items() if family.no_negative is None} == NO_NEGATIVE_PROMPT


STEP_NOISE: dict[str, Callable[[Any], Any]] = {
    "flow Euler": lambda config: FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True),
    "flow LCM": FlowMatchLCMScheduler.from_config,
}


@pytest.mark.parametrize("noise", STEP_NOISE)
@pytest.mark.parametrize(
    "name", ["sd3", "flux1-schnell", "flux2", "flux2-klein", "qwen-image", "qwen-image-21", "z-image"]
)
def test_a_seed_repeats_where_the_scheduler_draws_noise_in_each_step(name: str, noise: str) -> None:
    family = build(name)
    family.pipeline.scheduler = STEP_NOISE[noise](family.pipeline.scheduler.config)
    first, second = replace(family.item, seed=1), replace(family.item, prompt=LONG, seed=2)
    torch.manual_seed(0)
    (once,) = draw(family.generator, first)
    torch.manual_seed(9)
    (again,) = draw(family.generator, first)
    assert torch.equal(once, again)
    check_close(draw(family.generator, second, first)[1], once)


@pytest.mark.parametrize(
    "scheduler",
    [EulerAncestralDiscreteScheduler, DDPMScheduler, LCMScheduler, TCDScheduler],
)
def test_a_seed_repeats_with_the_schedulers_of_stable_diffusion_that_draw_noise(scheduler: Any) -> None:
    family = build("sd15")
    family.pipeline.scheduler = scheduler.from_config(family.pipeline.scheduler.config)
    first, second = replace(family.item, seed=1), replace(family.item, prompt=LONG, seed=2)
    torch.manual_seed(0)
    (once,) = draw(family.generator, first)
    torch.manual_seed(9)
    check_close(draw(family.generator, second, first)[1], once)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [("EulerDiscreetScheduler", "did you mean EulerDiscreteScheduler"), ("NoSuchScheduler", "has no class NoSuch")],
)
def test_a_scheduler_that_diffusers_does_not_have_is_named(tmp_path: Path, scheduler: str, words: str) -> None:
    source = PipelineSource(path="pipeline", scheduler=scheduler)
    bundle = saved(tmp_path, tiny_sd15(), LATENT_SPACES["sd15"], pipeline=source)
    with pytest.raises(BundleError, match=words):
        Generator.open(bundle, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("unet/config.json", "{"),
        ("unet/config.json", None),
        ("scheduler/scheduler_config.json", None),
        ("unet/diffusion_pytorch_model.safetensors", "version https://git-lfs.github.com/spec/v1"),
        ("unet/diffusion_pytorch_model.safetensors", None),
        ("text_encoder/model.safetensors", None),
        ("tokenizer/tokenizer.json", "{"),
        ("vae/diffusion_pytorch_model.safetensors", "nothing"),
        ("model_index.json", '{"_class_name": "NoSuchPipeline"}'),
        ("model_index.json", '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "NoSuchModel"]}'),
    ],
    ids=str,
)
def test_a_part_that_cannot_be_loaded_is_one_line_with_the_name_of_the_bundle(
    tmp_path: Path, name: str, content: str | None
) -> None:
    bundle = saved(tmp_path, tiny_sd15(), LATENT_SPACES["sd15"])
    path = tmp_path / "pipeline" / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(BundleError, match=f"bundle {bundle.name}: its pipeline cannot be loaded: ") as refusal:
        Generator.open(bundle, torch.device("cpu"), torch.float32)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500
