"""LoRA on real pipelines with random weights: an image has what its own adapters give, to the bit, and nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from giantleap.models.adapters.cache import AdapterCache
from giantleap.models.adapters.files import NO_ADAPTERS, AdapterError, AdapterUse, misfit, read_denoiser, read_file
from giantleap.models.generation.families import FAMILIES
from giantleap.models.generation.generator import Generator
from giantleap.models.generation.items import GenerationItem
from giantleap.models.generation.refine import refine_latent
from giantleap.models.generation.refinement import Refinement
from giantleap.models.pixels.images import to_signed
from tests.lora_files import write_flux_in_both_layouts, write_kohya_lora, write_lora, write_sgm_copy
from tests.models.generation.test_generator_families import CASES, build
from tests.tiny_pipelines import save_pipeline, tiny_flux1, tiny_prx, tiny_sd3, tiny_sdxl

FAMILY_NAMES = (
    *(
        "sd15",
        "sdxl",
        "sd3",
        "flux1-dev",
        "flux1-kontext",
        "flux2",
        "flux2-klein",
        "qwen-image",
        "qwen-image-21",
        "z-image",
    ),
    *("sana", "sana-sprint"),
)
REFINE = Refinement(strength=0.25, steps=2)


def open_generator(family: str) -> Generator:
    return build(family).generator


def draw(generator: Generator, *loras: AdapterUse) -> Tensor:
    (latent,) = generator.generate([GenerationItem("a red sphere", "", 3, 64, 96, 2, 3.0, loras=loras)])
    assert latent is not None
    return latent


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.utils import logging

    logging.set_verbosity_error()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_two_adapters_in_turn_give_what_each_gives_alone_to_the_bit(family: str, tmp_path: Path, silent: None) -> None:
    pipeline = CASES[family].build()
    paths = {name: write_lora(tmp_path / f"{name}.safetensors", pipeline, seed) for seed, name in enumerate("ab")}
    first, second = read_file(paths["a"]).use(0.8), read_file(paths["b"]).use(1.0)
    alone = {}
    for use in (first, second):
        server = open_generator(family)
        server.adapters.offer(paths, 1 << 30)
        alone[use.name] = draw(server, use)
    shared = open_generator(family)
    shared.adapters.offer(paths, 1 << 30)
    plain = draw(shared)
    assert not torch.equal(plain, alone["a"]) and not torch.equal(alone["a"], alone["b"])
    for uses in ((first,), (second,), (first,), (), (second,), (), (first,)):
        assert torch.equal(draw(shared, *uses), alone[uses[0].name] if uses else plain)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_fits_by_its_header_loads_and_another_rank_or_family_is_refused(family: str, tmp_path: Path) -> None:
    pipeline = CASES[family].build()
    save_pipeline(pipeline, tmp_path / "pipeline")
    name, denoiser = type(pipeline).__name__, read_denoiser(tmp_path / "pipeline")
    own = read_file(write_lora(tmp_path / "own.safetensors", pipeline, 1, rank=2))
    assert denoiser and own.rank == 2 and misfit(own, name, denoiser) == ""
    other = tiny_sd3() if family != "sd3" else tiny_sdxl()
    foreign = read_file(write_lora(tmp_path / "other.safetensors", other, 1))
    assert misfit(foreign, name, denoiser)


def test_every_family_but_one_takes_adapters() -> None:
    tested = {type(CASES[name].build()).__name__ for name in FAMILY_NAMES}
    assert (
        {each.__name__ for each in FAMILIES} - tested
        == {type(tiny_prx()).__name__}
        == NO_ADAPTERS & {each.__name__ for each in FAMILIES}
    )


@pytest.mark.parametrize("kind", ["mask", "references"])
def test_an_adapter_acts_on_edits_too_and_leaves_the_next_one_alone(kind: str, tmp_path: Path, silent: None) -> None:
    generator = open_generator("flux2-klein")
    path = write_lora(tmp_path / "a.safetensors", generator.pipeline, 0)
    generator.adapters.offer({"a": path}, 1 << 30)
    photo = torch.randint(0, 256, (96, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images: dict[str, Any] = {"references": (photo,)}
    if kind == "mask":
        images = {"init_image": to_signed(photo), "mask": torch.ones(1, 96, 64)}
    plain = GenerationItem("a red sphere", "", 3, 64, 96, 2, 3.0, **images)
    before, changed, after = (
        generator.generate([replace(plain, loras=loras)])[0] for loras in ((), (read_file(path).use(1.0),), ())
    )
    assert before is not None and changed is not None and after is not None
    assert torch.equal(after, before) and not torch.equal(changed, before)


def test_adapters_of_one_image_add_up_and_their_weights_count(tmp_path: Path, silent: None) -> None:
    generator = open_generator("sd3")
    paths = {n: write_lora(tmp_path / f"{n}.safetensors", generator.pipeline, seed) for seed, n in enumerate("ab")}
    generator.adapters.offer(paths, 1 << 30)
    a, b = read_file(paths["a"]), read_file(paths["b"])
    plain = draw(generator)
    both = draw(generator, a.use(1.0), b.use(0.5))
    assert not torch.equal(both, draw(generator, a.use(1.0))) and not torch.equal(both, draw(generator, b.use(0.5)))
    assert not torch.equal(draw(generator, a.use(0.5)), draw(generator, a.use(1.0)))
    assert torch.equal(draw(generator, a.use(0.0)), plain)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux1-dev"])
def test_adapters_of_text_encoders_leave_no_trace(family: str, tmp_path: Path, silent: None) -> None:
    generator = open_generator(family)
    path = write_lora(tmp_path / "text.safetensors", generator.pipeline, 1, parts=("text_encoder",))
    generator.adapters.offer({"text": path}, 1 << 30)
    plain, use = draw(generator), read_file(path).use(1.0)
    with_text = draw(generator, use)
    assert set(generator.pipeline.get_list_adapters()) == {
        "text_encoder",
        "unet" if family[:3] in ("sd1", "sdx") else "transformer",
    }
    assert torch.equal(draw(generator), plain) and torch.equal(draw(generator, use), with_text)


def test_kohyas_names_are_checked_and_loaded(tmp_path: Path, silent: None) -> None:
    generator = open_generator("sd15")
    save_pipeline(generator.pipeline, tmp_path / "pipeline")
    path = write_kohya_lora(tmp_path / "kohya.safetensors", generator.pipeline, 1)
    file = read_file(path)
    assert misfit(file, "StableDiffusionPipeline", read_denoiser(tmp_path / "pipeline")) == ""
    generator.adapters.offer({"kohya": path}, 1 << 30)
    plain = draw(generator)
    assert not torch.equal(draw(generator, file.use(1.0)), plain) and torch.equal(draw(generator), plain)


def test_kohyas_names_of_sdxl_give_the_bits_of_diffusers_names(tmp_path: Path, silent: None) -> None:
    generator = open_generator("sdxl")
    plain_names = write_lora(tmp_path / "plain.safetensors", generator.pipeline, 1)
    paths = {"plain": plain_names, "sgm": write_sgm_copy(plain_names, tmp_path / "sgm.safetensors", layers_per_block=1)}
    save_pipeline(generator.pipeline, tmp_path / "pipeline")
    files = {name: read_file(path) for name, path in paths.items()}
    assert misfit(files["sgm"], "StableDiffusionXLPipeline", read_denoiser(tmp_path / "pipeline")) == ""
    assert files["sgm"].layers.keys().isdisjoint(files["plain"].layers)
    generator.adapters.offer(paths, 1 << 30)
    drawn = {name: draw(generator, file.use(0.8)) for name, file in files.items()}
    assert torch.equal(drawn["plain"], drawn["sgm"]) and not torch.equal(drawn["plain"], draw(generator))


def test_kohyas_names_of_flux_give_the_bits_of_diffusers_names(tmp_path: Path, silent: None) -> None:
    generator = open_generator("flux1-dev")
    paths = write_flux_in_both_layouts(tmp_path, generator.pipeline, 1)
    save_pipeline(generator.pipeline, tmp_path / "pipeline")
    files = {name: read_file(path) for name, path in paths.items()}
    assert misfit(files["kohya"], "FluxPipeline", read_denoiser(tmp_path / "pipeline")) == ""
    generator.adapters.offer(paths, 1 << 30)
    drawn = {name: draw(generator, file.use(0.8)) for name, file in files.items()}
    assert torch.equal(drawn["plain"], drawn["kohya"]) and not torch.equal(drawn["plain"], draw(generator))


def test_a_fused_layer_of_the_published_flux_alone_is_refused_and_leaves_no_trace(tmp_path: Path, silent: None) -> None:
    """diffusers splits `linear1` at the published sizes: a file for a smaller model cannot be distinguished."""
    generator = open_generator("flux1-dev")
    path = write_flux_in_both_layouts(tmp_path, generator.pipeline, 1, fused_single=True)["kohya"]
    generator.adapters.offer({"kohya": path}, 1 << 30)
    plain = draw(generator)
    with pytest.raises(AdapterError, match="LoRA kohya does not fit this pipeline"):
        draw(generator, read_file(path).use(1.0))
    assert torch.equal(draw(generator), plain)


@pytest.mark.parametrize("family", ["sdxl", "flux1-dev", "sana"])
def test_a_refine_pass_has_the_adapters_of_its_image_alone(family: str, tmp_path: Path, silent: None) -> None:
    generator = open_generator(family)
    paths = {n: write_lora(tmp_path / f"{n}.safetensors", generator.pipeline, seed) for seed, n in enumerate("ab")}
    uses = {name: (read_file(path).use(1.0),) for name, path in paths.items()} | {"none": ()}
    latent = draw(generator)

    def refine(on: Generator, name: str) -> Tensor:
        item = GenerationItem("a red sphere", "", 3, 64, 96, 2, 3.0, refine=REFINE, loras=uses[name])
        return refine_latent(on, latent, item)

    alone = {}
    for name in uses:
        server = open_generator(family)
        server.adapters.offer(paths, 1 << 30)
        alone[name] = refine(server, name)
    assert not torch.equal(alone["a"], alone["b"]) and not torch.equal(alone["a"], alone["none"])
    generator.adapters.offer(paths, 1 << 30)
    for drawn, refined in (("a", "b"), ("b", "none"), ("none", "a"), ("a", "a")):
        draw(generator, *uses[drawn])
        assert torch.equal(refine(generator, refined), alone[refined])


def test_the_least_recently_used_leave_when_the_budget_is_spent(tmp_path: Path, silent: None) -> None:
    generator = open_generator("sana")
    paths = {n: write_lora(tmp_path / f"{n}.safetensors", generator.pipeline, seed) for seed, n in enumerate("abc")}
    size_bytes = paths["a"].stat().st_size
    generator.adapters.offer(paths, 2 * size_bytes)
    uses = {name: read_file(path).use(1.0) for name, path in paths.items()}
    plain, first = draw(generator), draw(generator, uses["a"])
    for names, kept in (("b", "ab"), ("a", "ba"), ("c", "ac"), ("", "ac"), ("abc", "abc"), ("b", "cb")):
        draw(generator, *(uses[name] for name in names))
        assert generator.adapters.loaded == tuple(kept)
    assert torch.equal(draw(generator, uses["a"]), first), "it was dropped and loaded again"
    assert torch.equal(draw(generator), plain)
    generator.adapters.offer(paths, 0)
    assert torch.equal(draw(generator), plain) and generator.adapters.loaded == ()


def test_a_file_that_cannot_be_loaded_fails_and_leaves_no_trace(tmp_path: Path, silent: None) -> None:
    generator = open_generator("sd3")
    good = write_lora(tmp_path / "good.safetensors", generator.pipeline, 1)
    bad = write_lora(tmp_path / "bad.safetensors", tiny_flux1(), 2)
    generator.adapters.offer({"good": good, "bad": bad}, 1 << 30)
    plain, use = draw(generator), read_file(good).use(1.0)
    expected = draw(generator, use)
    with pytest.raises(AdapterError, match="LoRA bad does not fit"):
        draw(generator, read_file(bad).use(1.0))
    with pytest.raises(AdapterError, match="was not in GIANTLEAP_LORA_DIR"):
        draw(generator, AdapterUse("missing", 1.0, use.sha256))
    assert torch.equal(draw(generator), plain) and torch.equal(draw(generator, use), expected)


def test_a_file_that_changed_after_the_api_read_it_is_not_used(tmp_path: Path) -> None:
    generator = open_generator("sd15")
    path = write_lora(tmp_path / "a.safetensors", generator.pipeline, 1)
    planned = read_file(path).use(1.0)
    write_lora(path, generator.pipeline, 2)
    generator.adapters.offer({"a": path}, 1 << 30)
    with pytest.raises(AdapterError, match="has changed"):
        draw(generator, planned)


def test_items_of_different_adapters_share_no_batch() -> None:
    generator = open_generator("sd15")
    items = [
        GenerationItem("a", "", 1, 64, 64, 2, 3.0),
        GenerationItem("a", "", 1, 64, 64, 2, 3.0, loras=(AdapterUse("a", 1.0, "0" * 64),)),
    ]
    with pytest.raises(ValueError, match="LoRAs"):
        generator.generate(items)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def places(family: str) -> Generator:
    """As for a compiled network: adapters are exchanged in place."""
    generator = open_generator(family)
    generator.adapters = AdapterCache(generator.pipeline, hotswap=True)
    return generator


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_adapters_exchanged_in_place_draw_as_those_that_are_loaded_each(
    family: str, tmp_path: Path, silent: None
) -> None:
    loaded, exchanged = open_generator(family), places(family)
    ranks = {"a": 4, "b": 2}
    paths = {
        name: write_lora(tmp_path / f"{name}.safetensors", loaded.pipeline, rank, rank) for name, rank in ranks.items()
    }
    a, b = read_file(paths["a"]).use(0.8), read_file(paths["b"]).use(0.5)
    for generator in (loaded, exchanged):
        generator.adapters.offer(paths, 1 << 30)
    for uses in ((), (b,), (a,), (a, b), (), (b,)):  # the smaller rank comes first, and is padded
        assert distance(draw(exchanged, *uses), draw(loaded, *uses)) < 1e-4


def test_an_exchange_leaves_nothing_of_an_adapter_with_other_layers(tmp_path: Path, silent: None) -> None:
    loaded, exchanged = open_generator("sd15"), places("sd15")
    paths = {"all": write_lora(tmp_path / "all.safetensors", loaded.pipeline, 1)}
    paths["text"] = write_lora(tmp_path / "text.safetensors", loaded.pipeline, 2, parts=("text_encoder",))
    for part in ("to_q", "to_k"):
        paths[part] = tmp_path / f"{part}.safetensors"
        save_file({name: each for name, each in load_file(paths["all"]).items() if part in name}, paths[part])
    use = {name: read_file(path).use(0.7) for name, path in paths.items()}
    for generator in (loaded, exchanged):
        generator.adapters.offer(paths, 1 << 30)
    for names in (
        ["all"],
        ["text"],
        ["all"],
        [],
        ["to_q"],
        ["to_k"],
        ["to_q", "text"],
        ["text", "all"],
        ["to_q", "to_k"],
    ):
        uses = [use[name] for name in names]
        assert distance(draw(exchanged, *uses), draw(loaded, *uses)) < 1e-4
