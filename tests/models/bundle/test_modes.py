"""The modes of a descriptor: what excludes what, what a setting replaces, and what a class or method refuses."""

import json
from pathlib import Path

import pytest

from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.bundle.descriptor import REDIFFUSION, Descriptor, from_toml, to_toml
from giantleap.models.bundle.errors import BundleError
from giantleap.models.bundle.modes import PLAIN, Modes, read_misfit
from giantleap.service.jobs.bundles import read_in_modes
from tests.tiny_bundle import write_tiny_bundle

ALL = {
    "quantize": {"text_encoder": "bnb8"},
    "storage": "fp8",
    "offload": "model",
    "attention": "flash",
    "compile": "blocks",
    "compile_vae": True,
    "cache": "first_block",
    "cache_threshold": 0.1,
}
FLUX = {
    "_class_name": "FluxPipeline",
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "image_encoder": [None, None],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("modes") / "tiny"
    write_tiny_bundle(path)
    return path


def descriptor_with(directory: Path, modes: object) -> Descriptor:
    values = read_bundle(directory).descriptor.model_dump(exclude_unset=True)
    return Descriptor.model_validate(values | {"modes": modes})


def test_a_bundle_without_modes_has_none(directory: Path) -> None:
    assert read_bundle(directory).modes == PLAIN
    assert PLAIN.named == {}


def test_every_mode_survives_the_way_through_toml(directory: Path) -> None:
    written = to_toml(descriptor_with(directory, ALL))
    read = from_toml(written.encode()).modes
    assert read == Modes.model_validate(ALL)
    assert 'quantize = {text_encoder = "bnb8"}' in written
    assert read.named == {
        "quantize.text_encoder": "bnb8",
        "storage": "fp8",
        "offload": "model",
        "attention": "flash",
        "compile": "blocks",
        "compile_vae": "true",
        "cache": "first_block",
        "cache_threshold": "0.1",
    }


@pytest.mark.parametrize(
    ("modes", "reason"),
    [
        ({"storage": "fp8", "quantize": {"transformer": "int8"}}, "storage fp8 excludes quantize.transformer"),
        ({"compile": "blocks", "offload": "group"}, "choose offload model"),
        ({"compile": "full", "offload": "model"}, "choose compile blocks"),
        ({"compile": "full", "cache": "first_block"}, "choose compile blocks"),
        ({"cache_threshold": 0.0}, "cache_threshold"),
        ({"quantize": {"transformer": "int3"}}, "quantize.transformer"),
        ({"speed": "all"}, "speed"),
    ],
)
def test_modes_that_exclude_each_other_are_named_when_the_descriptor_is_read(
    directory: Path, modes: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        descriptor_with(directory, modes)


def test_a_setting_replaces_one_mode_and_leaves_the_others() -> None:
    modes = Modes(offload="model", quantize={"transformer": "bnb4", "text_encoder_2": "bnb8"})
    given = {"offload": "none", "quantize.transformer": "none", "compile_vae": "true", "cache_threshold": "0.2"}
    changed = modes.with_values(given)
    assert changed.named == {"quantize.text_encoder_2": "bnb8", "compile_vae": "true"}
    assert (changed.offload, changed.cache_threshold) == ("none", 0.2)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"offload": "disk"}, "offload must be 'none', 'model' or 'group'"),
        ({"ofload": "model"}, "a name is not that of a mode; there are quantize, "),
        ({"quantize": "bnb4"}, "quantize must be an object"),
        ({"compile": "full", "offload": "model"}, "compile full excludes offload"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_expected(given: dict[str, str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PLAIN.with_values(given)


@pytest.mark.parametrize(
    ("modes", "reason"),
    [
        (Modes(quantize={"unet": "bnb4"}), "quantize.unet: FluxPipeline has no such network"),
        (Modes(quantize={"image_encoder": "bnb4"}), "no such network"),
        (Modes(quantize={"text_encoder_2": "gguf"}), "for a transformer only"),
        (Modes(compile_vae=True), "compile_vae: a compiled AutoencoderKLQwenImage is slower"),
    ],
)
def test_a_pipeline_that_cannot_have_a_mode_says_which_and_why(modes: Modes, reason: str) -> None:
    assert reason in modes.misfit(FLUX, "AutoencoderKLQwenImage")


def test_what_a_class_has_is_not_refused() -> None:
    modes = Modes.model_validate(ALL | {"quantize": {"text_encoder_2": "bnb8"}})
    assert modes.misfit(FLUX, "AutoencoderKL") == ""


def test_a_bundle_whose_class_lacks_a_mode_is_refused_when_it_is_read(directory: Path) -> None:
    with pytest.raises(BundleError, match=r"bundle tiny: modes\.cache first_block: diffusers has it for FluxPipeline"):
        read_in_modes(directory, {"cache": "first_block"})
    with pytest.raises(BundleError, match="bundle tiny: its modes and those of the settings: compile must be"):
        read_in_modes(directory, {"compile": "everything"})
    assert read_in_modes(directory, {"compile": "blocks"}).modes.compile == "blocks"


@pytest.mark.parametrize(
    ("compiled", "refused"), [("none", set()), ("blocks", {"hidiffusion"}), ("full", {"hidiffusion", "scalecrafter"})]
)
def test_methods_that_hook_into_what_is_compiled_are_unavailable(
    directory: Path, compiled: str, refused: set[str]
) -> None:
    plain, bundle = read_bundle(directory), read_in_modes(directory, {"compile": compiled})
    assert set(plain.methods) - set(bundle.methods) == refused
    assert all(
        "set modes.compile to none" in bundle.unavailable_reason(method) for method in REDIFFUSION if method in refused
    )


def test_a_pipeline_that_was_not_pulled_is_not_judged() -> None:
    assert read_misfit(Modes(cache="first_block"), "owner/model", None) == ""


def test_the_index_on_disk_is_what_is_judged(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(FLUX))
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    assert "AutoencoderKLWan" in read_misfit(Modes(compile_vae=True), tmp_path, tmp_path / "vae")
    assert read_misfit(Modes(compile="blocks"), tmp_path, tmp_path / "vae") == ""
