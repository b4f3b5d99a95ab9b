"""Every method on small random pipelines of the real classes: sizes, seeds, batches, cancellation, and what stays."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.models.adapters.files import read_file
from giantleap.models.bundle.descriptor import HAS_UNET, NO_NEGATIVE_PROMPT, REDIFFUSION, SAMPLES_AGAIN, Rediffusion
from giantleap.models.bundle.modes import Modes
from giantleap.models.generation.generator import Generator
from giantleap.models.generation.items import GenerationItem
from giantleap.models.generation.previews import preview_steps
from giantleap.models.methods.passes import network_pixel_steps
from giantleap.models.methods.sampling import Tools, count_steps, sample_items
from giantleap.models.vae.autoencoder import Vae
from tests.lora_files import write_lora
from tests.models.methods.tiny_unets import ITEM, PIPELINES, WIDE, open_generator

LOOPS: tuple[Rediffusion, ...] = ("rectifiedhr", "demofusion", "lsrna")
CASES = [(name, method) for name in PIPELINES for method in REDIFFUSION if name != "sana" or method in LOOPS]
EVERY = pytest.mark.parametrize(("name", "method"), CASES)
HOOKED = pytest.mark.parametrize("method", ["hidiffusion", "scalecrafter"])


@pytest.fixture(scope="module")
def generators() -> dict[str, Generator]:
    return {name: open_generator(name) for name in PIPELINES}


def tools_of(generator: Generator) -> Tools:
    vae = Vae(generator.pipeline.vae, generator.latent_space)
    return Tools(vae, lambda raw, scale: F.interpolate(raw, scale_factor=scale, mode="bicubic"))


def draw(generator: Generator, method: Rediffusion, *items: GenerationItem, scale: int = 2, **calls: Any) -> Any:
    return sample_items(generator, tools_of(generator), items, method, scale, **calls)


def weights(generator: Generator) -> list[Tensor]:
    network = getattr(generator.pipeline, "unet", None) or generator.pipeline.transformer
    return [each.clone() for each in network.state_dict().values()]


@EVERY
@pytest.mark.parametrize(("item", "scale"), [(ITEM, 4), (WIDE, 2)], ids=["square x4", "wide x2"])
def test_a_method_draws_the_final_size_and_leaves_the_pipeline_as_it_was(
    generators: dict[str, Generator], name: str, method: Rediffusion, item: GenerationItem, scale: int
) -> None:
    generator = generators[name]
    stride_px, channels = generator.latent_space.stride_px, generator.latent_space.channels
    plain, before, state = generator.generate([item]), weights(generator), torch.get_rng_state()
    steps: list[tuple[int, int]] = []
    (drawn,) = draw(generator, method, item, scale=scale, on_step=lambda *step: steps.append(step))
    size = (scale * item.height_px // stride_px, scale * item.width_px // stride_px)
    assert drawn.shape == (channels, *size) and drawn.dtype == torch.float32 and bool(drawn.isfinite().all())
    total = count_steps(method, scale, item.steps)
    assert steps == [(step, total) for step in range(1, total + 1)]
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn from the global generator"
    after = generator.generate([item])
    assert plain[0] is not None and after[0] is not None and torch.equal(plain[0], after[0])
    assert all(torch.equal(one, other) for one, other in zip(before, weights(generator), strict=True))


@pytest.mark.parametrize("scale", [2, 4])
@EVERY
def test_the_work_of_a_method_is_what_the_network_sees(
    generators: dict[str, Generator], name: str, method: Rediffusion, scale: int
) -> None:
    generator = generators[name]
    network = getattr(generator.pipeline, "unet", None) or generator.pipeline.transformer
    side = network.config.sample_size  # windows are as large as the base image where that is the model's own size
    side_px = side * generator.latent_space.stride_px
    item = replace(ITEM, width_px=side_px, height_px=side_px, steps=3)
    seen = 0

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen
        x = args[0] if args else kwargs["hidden_states"]
        seen += x.shape[0] * x.shape[-2] * x.shape[-1]

    hook = network.register_forward_pre_hook(count, with_kwargs=True)
    draw(generator, method, item, scale=scale)
    hook.remove()
    stride_px = generator.latent_space.stride_px
    guided = 2  # each step runs with and without the prompt
    assert network_pixel_steps(method, scale, item.steps, (scale * side_px) ** 2) == seen * stride_px**2 / guided


@EVERY
def test_previews_of_a_method_change_nothing(generators: dict[str, Generator], name: str, method: Rediffusion) -> None:
    items, seen = [replace(ITEM, previews=3), replace(ITEM, seed=9, previews=1)], []
    plain = draw(generators[name], method, *(replace(item, previews=0) for item in items))

    def show(index: int, step: int, raw: Tensor) -> None:
        assert raw.ndim == 3 and bool(raw.isfinite().all())
        seen.append((index, step))

    drawn = draw(generators[name], method, *items, on_preview=show)
    assert all(torch.equal(one, other) for one, other in zip(drawn, plain, strict=True))
    total = count_steps(method, 2, ITEM.steps)
    assert seen == [(0, step) for step in preview_steps(3, total)] + [(1, step) for step in preview_steps(1, total)]


@EVERY
def test_a_batch_gives_what_each_seed_gives_alone(
    generators: dict[str, Generator], name: str, method: Rediffusion
) -> None:
    generator, other = generators[name], replace(ITEM, prompt="a green cone", seed=9)
    (first,), (second,) = draw(generator, method, ITEM), draw(generator, method, other)
    torch.rand(5)
    together = draw(generator, method, other, ITEM)
    assert torch.equal(together[0], second) and torch.equal(together[1], first) and not torch.equal(first, second)


@EVERY
def test_a_canceled_run_stops_at_its_step_and_leaves_nothing_behind(
    generators: dict[str, Generator], name: str, method: Rediffusion
) -> None:
    generator = generators[name]
    steps: list[int] = []
    plain = generator.generate([ITEM])

    def is_canceled(index: int) -> bool:
        return index == 0 and len(steps) >= 2

    whole = draw(generator, method, ITEM)
    first, second = draw(
        generator, method, ITEM, ITEM, on_step=lambda step, total: steps.append(step), is_canceled=is_canceled
    )
    total = count_steps(method, 2, ITEM.steps)
    assert first is None and torch.equal(second, whole[0])
    assert steps == [1, 2, *range(total + 1, 2 * total + 1)]
    after = generator.generate([ITEM])
    assert plain[0] is not None and after[0] is not None and torch.equal(plain[0], after[0])


@EVERY
def test_a_method_draws_with_the_adapters_of_its_item_alone(name: str, method: Rediffusion, tmp_path: Path) -> None:
    generator = open_generator(name)
    path = write_lora(tmp_path / "a.safetensors", generator.pipeline, seed=1)
    generator.adapters.offer({"a": path}, 1 << 30)
    adapted = replace(ITEM, loras=(read_file(path).use(1.0),))
    (plain,) = draw(generator, method, ITEM)
    (with_adapter,) = draw(generator, method, adapted)
    assert not torch.equal(plain, with_adapter)
    generator.generate([adapted])
    assert torch.equal(draw(generator, method, ITEM)[0], plain)
    generator.generate([ITEM])
    assert torch.equal(draw(generator, method, adapted)[0], with_adapter)


class StopError(Exception):
    pass


@HOOKED
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_an_error_in_a_step_leaves_nothing_behind(
    generators: dict[str, Generator], name: str, method: Rediffusion
) -> None:
    generator = generators[name]
    plain = generator.generate([ITEM])

    def fail(step: int, steps: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        draw(generator, method, ITEM, on_step=fail)
    after = generator.generate([ITEM])
    assert plain[0] is not None and after[0] is not None and torch.equal(plain[0], after[0])


@pytest.mark.parametrize("method", ["demofusion", "lsrna", "rectifiedhr"])
def test_long_steps_report_their_parts(generators: dict[str, Generator], method: Rediffusion) -> None:
    parts: list[float | None] = []
    draw(generators["sdxl"], method, ITEM, on_part=parts.append)
    assert parts and set(parts) == {None}


def test_what_a_method_cannot_do_is_refused(generators: dict[str, Generator]) -> None:
    generator = generators["sd15"]
    start = replace(ITEM, init_image=torch.zeros(3, 64, 64), strength=0.5)
    with pytest.raises(ValueError, match="starts from noise"):
        draw(generator, "demofusion", start)
    with pytest.raises(ValueError, match="items of one batch must share"):
        draw(generator, "demofusion", ITEM, WIDE)
    with pytest.raises(ValueError, match="not a re-diffusion method"):
        draw(generator, "lua", ITEM)  # type: ignore[arg-type]


def test_the_classes_that_draw_again_take_negative_prompts() -> None:
    assert {type(open_generator(name).pipeline).__name__ for name in PIPELINES} == SAMPLES_AGAIN
    assert HAS_UNET < SAMPLES_AGAIN and not NO_NEGATIVE_PROMPT & SAMPLES_AGAIN


def test_blocks_that_are_compiled_ignore_hidiffusion_and_no_other_method() -> None:
    """Why a bundle with `compile = "blocks"` does not have it; the backend does not matter."""
    plain, compiled = open_generator("sd15"), open_generator("sd15")
    compiled.pipeline.unet.compile_repeated_blocks(backend="eager")
    (expected,), (base,) = plain.generate([ITEM]), compiled.generate([ITEM])
    assert base is not None and expected is not None
    torch.testing.assert_close(base, expected)
    same = {
        method: torch.allclose(draw(compiled, method, ITEM)[0], draw(plain, method, ITEM)[0], atol=1e-5)
        for method in REDIFFUSION
        if not Modes(compile="blocks").method_misfit(method) and method in ("scalecrafter", "rectifiedhr")
    }
    assert same == {"scalecrafter": True, "rectifiedhr": True}
    assert not torch.allclose(draw(compiled, "hidiffusion", ITEM)[0], draw(plain, "hidiffusion", ITEM)[0], atol=1e-3)
