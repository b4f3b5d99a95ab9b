"""Modes on the real classes of diffusers with random weights: what each changes, and what none may change."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor

from giantleap.models.adapters.files import read_file
from giantleap.models.bundle.bundle import Bundle, BundleError, read_bundle
from giantleap.models.bundle.descriptor import PipelineSource
from giantleap.models.bundle.modes import CHOOSES_ATTENTION, HAS_BLOCKS, PLAIN, STEP_CACHED, Modes
from giantleap.models.bundle.names import SHIPPED
from giantleap.models.generation.generator import Generator
from giantleap.models.generation.items import GenerationItem
from giantleap.models.generation.modes import apply_modes, denoiser_of, machine_fault, place
from tests.lora_files import write_lora
from tests.models.adapters.test_cache import FAMILY_NAMES, distance
from tests.models.generation.test_generator_families import CASES, Case
from tests.tiny_pipelines import save_pipeline

CPU = torch.device("cpu")
GPU = torch.device("cuda:0")
FAMILIES: dict[str, Case] = {name: CASES[name] for name in (*FAMILY_NAMES, "prx-flux-vae")}
EVERY = pytest.mark.parametrize("family", FAMILIES)
CACHED = pytest.mark.parametrize("family", ["flux1-dev", "qwen-image"])
QUICK = GenerationItem("a red ball", "", 3, 64, 64, 2, 3.0)
BALL = GenerationItem("a red ball", "", 3, 64, 96, 6, 3.0)
CAT = GenerationItem("a cat on a mat", "", 8, 64, 64, 5, 3.0)


def open_generator(family: str, modes: Modes = PLAIN) -> Generator:
    case = FAMILIES[family]
    pipeline = case.build()
    pipeline.set_progress_bar_config(disable=True)
    apply_modes(pipeline, modes, torch.float32)
    return Generator(place(pipeline, modes, CPU), case.space, modes=modes)


def draw(generator: Generator, item: GenerationItem = BALL, **calls: Any) -> Tensor:
    (latent,) = generator.generate([item], **calls)
    assert latent is not None
    return latent


@EVERY
def test_fp8_stores_most_weights_in_8_bits_and_changes_the_latent_a_little(family: str) -> None:
    plain, stored = draw(open_generator(family), QUICK), open_generator(family, Modes(storage="fp8"))
    weights = list(denoiser_of(stored.pipeline).parameters())
    in_8_bits = sum(each.numel() for each in weights if each.dtype == torch.float8_e4m3fn)
    assert in_8_bits > 0.15 * sum(each.numel() for each in weights)  # some tiny networks are mostly embeddings
    latent = draw(stored, QUICK)
    assert 0 < distance(latent, plain) < 0.1
    assert torch.equal(draw(stored, QUICK), latent)


@EVERY
@pytest.mark.parametrize("how", ["model", "group"])
def test_offload_gives_the_same_latent_and_never_moves_the_vae(family: str, how: Any) -> None:
    """On a CPU, where the moves go nowhere; the hooks and their order are those of a GPU."""
    generator = open_generator(family, Modes(offload=how))
    vae = generator.pipeline.vae
    assert not hasattr(vae, "_hf_hook") and not any(hasattr(each, "_diffusers_hook") for each in vae.modules())
    hook = "_hf_hook" if how == "model" else "_diffusers_hook"
    assert any(hasattr(each, hook) for each in denoiser_of(generator.pipeline).modules())
    plain = draw(open_generator(family), QUICK)
    for _ in range(2):
        assert torch.equal(draw(generator, QUICK), plain)


@EVERY
def test_a_lora_acts_under_group_offload_as_without_it(family: str, tmp_path: Path) -> None:
    if family == "prx-flux-vae":
        pytest.skip("diffusers loads no LoRA into PRX")
    plain, moved = open_generator(family), open_generator(family, Modes(offload="group"))
    path = write_lora(tmp_path / "ink.safetensors", plain.pipeline, 1)
    item = GenerationItem("a red ball", "", 3, 64, 96, 2, 3.0, loras=(read_file(path).use(0.8),))
    for generator in (plain, moved):
        generator.adapters.offer({"ink": path}, 1 << 30)
    assert torch.equal(draw(moved, item), draw(plain, item))


@EVERY
def test_the_lists_of_classes_are_those_of_diffusers(family: str) -> None:
    pipeline = FAMILIES[family].build()
    name, network = type(pipeline).__name__, denoiser_of(pipeline)
    choosing = [hasattr(getattr(each, "processor", None), "_attention_backend") for each in network.modules()]
    assert (name in CHOOSES_ATTENTION) == any(choosing)
    assert (name in HAS_BLOCKS) == bool(network._repeated_blocks)
    assert name not in STEP_CACHED or hasattr(network, "enable_cache")


def test_an_attention_backend_is_that_of_its_own_pipeline_alone() -> None:
    default, _ = _AttentionBackendRegistry.get_active_backend()
    generator = open_generator("flux1-dev", Modes(attention="_native_math"))
    assert _AttentionBackendRegistry.get_active_backend()[0] == default
    network: Any = denoiser_of(generator.pipeline)
    chosen = {each.processor._attention_backend for each in network.modules() if hasattr(each, "processor")}
    assert [each.value for each in chosen] == ["_native_math"]
    assert distance(draw(generator), draw(open_generator("flux1-dev"))) < 1e-5


@CACHED
def test_a_step_cache_changes_the_latent_by_its_threshold(family: str) -> None:
    plain = draw(open_generator(family))
    tiny = draw(open_generator(family, Modes(cache="first_block", cache_threshold=1e-9)))
    large = draw(open_generator(family, Modes(cache="first_block", cache_threshold=0.99)))
    assert torch.equal(tiny, plain) and not torch.equal(large, plain)


@CACHED
def test_jobs_in_turn_draw_what_each_draws_on_a_fresh_pipeline(family: str) -> None:
    modes = Modes(cache="first_block", cache_threshold=0.99)
    fresh = {item: draw(open_generator(family, modes), item) for item in (BALL, CAT)}
    shared = open_generator(family, modes)
    for item in (BALL, CAT, CAT, BALL):
        assert torch.equal(draw(shared, item), fresh[item])


@CACHED
def test_a_canceled_job_leaves_no_step_to_the_next(family: str) -> None:
    modes = Modes(cache="first_block", cache_threshold=0.99)
    fresh, shared = draw(open_generator(family, modes), CAT), open_generator(family, modes)
    steps: list[int] = []
    canceled = shared.generate(
        [BALL], on_step=lambda step, total: steps.append(step), is_canceled=lambda _: len(steps) > 2
    )
    assert canceled == [None] and len(steps) == 3
    assert torch.equal(draw(shared, CAT), fresh)


@CACHED
def test_images_of_a_batch_do_not_decide_for_each_other(family: str) -> None:
    shared = open_generator(family, Modes(cache="first_block", cache_threshold=0.99))
    other = GenerationItem("a cat on a mat", "", 8, BALL.width_px, BALL.height_px, BALL.steps, BALL.guidance_scale)
    latents = shared.generate([BALL, other])
    for latent, item in zip(latents, (BALL, other), strict=True):
        assert latent is not None and torch.equal(latent, draw(shared, item))


@CACHED
def test_a_cache_takes_an_init_image_and_a_lora(family: str, tmp_path: Path) -> None:
    plain = open_generator(family)
    cached = open_generator(family, Modes(cache="first_block", cache_threshold=1e-9))
    path = write_lora(tmp_path / "ink.safetensors", plain.pipeline, 1)
    start = torch.linspace(-1, 1, 3 * 96 * 64).reshape(3, 96, 64)
    loras = (read_file(path).use(0.8),)
    item = GenerationItem("a red ball", "", 3, 64, 96, 4, 3.0, init_image=start, strength=0.8, loras=loras)
    for generator in (plain, cached):
        generator.adapters.offer({"ink": path}, 1 << 30)
    assert torch.equal(draw(cached, item), draw(plain, item))


@pytest.mark.parametrize(
    ("modes", "device", "reason"),
    [
        (Modes(offload="model"), CPU, "offload model needs a GPU; the device is cpu"),
        (Modes(offload="group"), CPU, "offload group needs a GPU"),
        (Modes(quantize={"transformer": "bnb4"}), CPU, "quantize.transformer bnb4 needs a GPU"),
        (Modes(attention="flash"), CPU, "attention flash needs a GPU"),
        (Modes(attention="_native_math"), CPU, ""),
        (Modes(storage="fp8"), CPU, ""),
        (Modes(cache="first_block"), CPU, ""),
        (Modes(offload="group"), GPU, ""),
    ],
)
def test_a_device_that_cannot_run_a_mode_is_named(modes: Modes, device: torch.device, reason: str) -> None:
    fault = machine_fault(modes, device)
    assert reason in fault and bool(reason) == bool(fault)


@pytest.mark.parametrize(
    ("modes", "package"),
    [
        (Modes(quantize={"transformer": "bnb8"}), "bitsandbytes"),
        (Modes(quantize={"transformer": "int8"}), "torchao"),
        (Modes(quantize={"transformer": "gguf"}), "gguf"),
        (Modes(attention="sage"), "sageattention"),
        (Modes(attention="xformers"), "xformers"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_install_it(modes: Modes, package: str) -> None:
    fault = machine_fault(modes, GPU)
    if find_spec(package) is not None:
        assert fault == ""
    else:
        assert f"needs the package {package}; " in fault and "install" in fault


def test_diffusers_is_the_version_that_the_lists_are_for() -> None:
    assert diffusers.__version__.startswith("0.42.")


def write_bundle_of(family: str, directory: Path, modes: Modes) -> Bundle:
    """The descriptor of the shipped bundle of a family, around a tiny pipeline on disk."""
    shipped = read_bundle(SHIPPED / family).descriptor
    save_pipeline(FAMILIES[family].build(), directory / "pipeline")
    source = PipelineSource(path="pipeline")
    changed = {"pipeline": source, "tiny_vae": None, "lua_source": None, "modes": modes}
    return Bundle(directory, shipped.model_copy(update=changed))


def load(bundle: Bundle) -> Generator:
    return Generator.open(bundle, CPU, torch.float32)


def test_a_bundle_whose_mode_this_machine_cannot_do_is_refused_in_one_line(tmp_path: Path) -> None:
    bundle = write_bundle_of("flux1-dev", tmp_path, Modes(offload="group"))
    with pytest.raises(
        BundleError, match=r"^bundle flux1-dev: modes\.offload group needs a GPU; .*: leave it out there$"
    ):
        load(bundle)


def test_a_bundle_is_loaded_in_its_modes(tmp_path: Path) -> None:
    modes = Modes(storage="fp8", attention="_native_math", cache="first_block")
    generator = load(write_bundle_of("flux1-dev", tmp_path, modes))
    assert generator.modes == modes and generator.pipeline.transformer.is_cache_enabled
    assert distance(draw(generator, QUICK), draw(open_generator("flux1-dev", modes), QUICK)) < 1e-3


@pytest.mark.parametrize(("how", "part"), [("int8", "text_encoder_2"), ("fp8", "transformer"), ("int8", "transformer")])
def test_torchao_quantizes_the_named_component_and_takes_a_lora(how: Any, part: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    generator = load(write_bundle_of("flux1-dev", tmp_path, Modes(quantize={part: how})))
    plain = open_generator("flux1-dev")
    weights = {type(each).__name__ for each in getattr(generator.pipeline, part).parameters()}
    assert any(name in ("Int8Tensor", "Float8Tensor") for name in weights)
    assert 0 < distance(draw(generator, QUICK), draw(plain, QUICK)) < 0.05
    check_lora(generator, plain, tmp_path)


def check_lora(generator: Generator, plain: Generator, directory: Path) -> None:
    """A LoRA acts on it as on the plain pipeline, up to what the mode changes, and leaves no trace."""
    path = write_lora(directory / "ink.safetensors", plain.pipeline, 1)
    before, item = draw(generator, QUICK), replace(QUICK, loras=(read_file(path).use(0.8),))
    for each in (generator, plain):
        each.adapters.offer({"ink": path}, 1 << 30)
    assert distance(draw(generator, item), draw(plain, item)) < 0.05
    assert torch.equal(draw(generator, QUICK), before)


def test_a_gguf_file_replaces_the_weights_of_the_transformer(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    bundle = write_bundle_of("qwen-image", tmp_path, Modes(quantize={"transformer": "gguf"}))
    with pytest.raises(BundleError, match=r"needs one \.gguf file there; found 0"):
        load(bundle)
    plain = open_generator("qwen-image")
    writer = gguf.GGUFWriter(tmp_path / "pipeline" / "transformer" / "weights-Q8_0.gguf", "qwen_image")
    for name, weight in denoiser_of(plain.pipeline).state_dict().items():
        values = weight.numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for path in (tmp_path / "pipeline" / "transformer").glob("*.safetensors"):
        path.unlink()
    generator = load(bundle)
    assert 0 < distance(draw(generator, QUICK), draw(plain, QUICK)) < 0.05
    check_lora(generator, plain, tmp_path)
