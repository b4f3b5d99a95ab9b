"""Bundles: which methods they have and why not, what each reaches, and the descriptors that are shipped."""

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from giantleap.models.bundle.bundle import (
    Bundle,
    BundleError,
    MethodError,
    ModelSource,
    SizeError,
    check_files,
    read_bundle,
    write_bundle,
)
from giantleap.models.bundle.descriptor import METHODS, REDIFFUSION, Descriptor, Method, smallest_steps, to_toml
from giantleap.models.bundle.digests import file_hash

BUNDLES = Path(__file__).parents[3] / "bundles"
SHIPPED = sorted(path.parent for path in BUNDLES.glob("*/bundle.toml"))
SHA = "0" * 64
Values = dict[str, Any]


def values(**change: Any) -> Values:
    """A descriptor with all methods; a section that is None is left out."""
    whole: Values = {
        "bundle": {"name": "some", "title": "t", "license": "l", "provenance": "p"},
        "pipeline": {"hub_id": "maker/model", "revision": "main"},
        "latent_space": {"name": "sdxl"},
        "lua": {"file": "lua.safetensors", "scales": (2,), "sha256": SHA},
        "swinir": {"x4": "up/x4.pth"},
        "defaults": {"steps": 8, "guidance_scale": 2.5, "base_width_px": 64, "base_height_px": 96},
        "limits": {"min_base_px": 32, "max_base_px": 128, "multiple_px": 16, "max_steps": 20, "max_direct_px": 300},
        "vocabulary": {"closed": False},
        "files": {"up/x4.pth": SHA},
    }
    return {section: content for section, content in (whole | change).items() if content is not None}


def defaults(**change: Any) -> Values:
    content: Values = values()["defaults"] | change
    return content


def limits(**change: Any) -> Values:
    content: Values = values()["limits"] | change
    return {key: value for key, value in content.items() if value is not None}


def bundle(**change: Any) -> Bundle:
    return Bundle(Path("nowhere"), Descriptor.model_validate(values(**change)))


def test_each_method_has_its_scales() -> None:
    whole = bundle()
    own: tuple[Method, ...] = ("lua", "direct", "bicubic", "swinir")
    assert whole.methods == own and (*own, *REDIFFUSION) == METHODS
    assert [whole.scales_of(method) for method in own] == [(1, 2), (1, 2, 4), (1, 2, 4), (1, 4)]
    assert whole.scales == (1, 2, 4)
    assert whole.swinir == {4: Path("nowhere/up/x4.pth")} and whole.lua == Path("nowhere/lua.safetensors")
    assert not any(whole.unavailable_reason(method) for method in own)
    assert {whole.unavailable_reason(method).split()[-1] for method in REDIFFUSION} == {"pulled"}


@pytest.mark.parametrize(
    ("pipeline_class", "refused"),
    [
        ("StableDiffusionPipeline", {}),
        ("StableDiffusionXLPipeline", {}),
        ("SanaPipeline", dict.fromkeys(("hidiffusion", "scalecrafter"), "works inside a UNet, for .*; this is a Sana")),
        ("FluxPipeline", dict.fromkeys(REDIFFUSION, "this is a FluxPipeline")),
    ],
)
def test_the_class_of_the_pipeline_decides_who_draws_again(
    tmp_path: Path, pipeline_class: str, refused: dict[Method, str]
) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": pipeline_class}))
    lua = {"file": "lua.safetensors", "scales": (1.5, 2, 4), "sha256": SHA}
    served = Bundle(tmp_path, Descriptor.model_validate(values(lua=lua, pipeline={"path": "pipeline"})))
    for method in REDIFFUSION:
        assert served.scales_of(method) == (() if method in refused else (1, 2, 4))
        assert re.search(refused.get(method, "^$"), served.unavailable_reason(method))
    without = bundle(lua=None, defaults=defaults(method="direct"))
    assert "no LUA weights" in without.unavailable_reason("lsrna")
    if not refused:
        assert served.base_size(256, 128, 2, "hidiffusion") == (128, 64)


def test_the_files_of_a_pipeline_are_read_once(tmp_path: Path) -> None:
    """Every request asks for what they say."""
    index = tmp_path / "pipeline" / "model_index.json"
    index.parent.mkdir()
    index.write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]})
    )
    lua = {"file": "lua.safetensors", "scales": (1.5, 2, 4), "sha256": SHA}
    served = Bundle(tmp_path, Descriptor.model_validate(values(lua=lua, pipeline={"path": "pipeline"})))

    def read() -> tuple[object, ...]:
        return served.pipeline_class, served.methods, served.refine_unavailable, served.supports_init_image

    first = read()
    index.unlink()
    assert read() == first and first[0] == "StableDiffusionPipeline" and "hidiffusion" in served.methods


def test_a_method_says_how_many_steps_it_needs() -> None:
    assert [smallest_steps("rectifiedhr", scale) for scale in (1, 2, 4)] == [1, 2, 3]
    assert [smallest_steps(method, 4) for method in ("lsrna", "demofusion", "lua")] == [2, 1, 1]


def test_bicubic_is_always_there_and_the_others_say_why_not() -> None:
    bare = bundle(lua=None, swinir=None, limits=limits(max_direct_px=None), defaults=defaults(method="bicubic"))
    assert bare.methods == ("bicubic",) and bare.lua is None and bare.swinir == {}
    assert bare.scales == (1, 2, 4)
    reasons: tuple[tuple[Method, str], ...] = (
        ("lua", r"no LUA weights: .*\[lua\]"),
        ("direct", r"max_direct_px is not set"),
        ("swinir", r"no SwinIR weights: .*\[swinir\]"),
    )
    for method, words in reasons:
        assert re.search(words, bare.unavailable_reason(method)) and bare.scales_of(method) == ()
        with pytest.raises(
            MethodError, match=f"method {method}: bundle some|method {method}: the base model"
        ) as refusal:
            bare.base_size(128, 128, 2, method)
        assert str(refusal.value).endswith("it has bicubic")
    assert bare.base_size(128, 128, 2, "bicubic") == (64, 64)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"train": "`make lua`"}, "none are published for it; train your own: `make lua`"),
        (
            {"hub_id": "maker/lua", "revision": "main", "file": "lua.pth", "scales": (2, 4)},
            "`giantleap bundle pull some` fetches lua.pth of maker/lua",
        ),
    ],
)
def test_a_bundle_without_lua_says_where_one_comes_from(source: Values, words: str) -> None:
    assert words in bundle(lua=None, lua_source=source, defaults=defaults(method="direct")).unavailable_reason("lua")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lua": None}, "defaults.method is lua, but .* has no LUA weights.*; name another of direct, bicubic, swinir"),
        ({"swinir": None, "defaults": defaults(method="swinir")}, "defaults.method is swinir, but"),
        ({"defaults": defaults(method="nearest")}, "'lua', 'direct', 'bicubic', 'swinir', 'rectifiedhr', "),
        ({"defaults": defaults(scale=4)}, r"defaults.scale 4 is not among the scales \(1, 2\) of method lua"),
        ({"defaults": defaults(method="swinir")}, r"defaults.scale 2 is not among the scales \(1, 4\)"),
        ({"defaults": defaults(method="direct", scale=4)}, "384 px exceed limits.max_direct_px 300"),
        ({"limits": limits(max_direct_px=127)}, "max_direct_px 127 is less than max_base_px 128"),
        ({"swinir": {}}, "give x2, x4 or both"),
        ({"swinir": {"x2": "other.pth"}}, "swinir.x2: other.pth has no digest in files"),
        ({"swinir": {"x3": "up/x4.pth"}}, "swinir.x3"),
        ({"vae": {"path": "vae", "hub_id": "a/b"}}, "either path or hub_id"),
        ({"vae": {"hub_id": "a/b"}}, "revision is required"),
        ({"tiny_vae": {}}, "either path or hub_id"),
        ({"lua_source": {"train": "x", "file": "y"}}, "either train, or all of"),
        ({"lua_source": {"hub_id": "a/b", "file": "y"}}, "either train, or all of"),
        ({"pipeline": {"path": ".", "dtype": "float8"}}, "pipeline.dtype"),
        ({"pipeline": {"path": ".", "scheduler": "Euler()"}}, "pipeline.scheduler"),
        ({"pipeline": {"path": ".", "variant": "../fp16"}}, "pipeline.variant"),
    ],
)  # fmt: skip
def test_a_descriptor_that_contradicts_itself_is_refused(tmp_path: Path, change: Values, words: str) -> None:
    lines = []
    for section, content in values(**change).items():
        lines += [f"[{section}]", *(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in content.items())]
    (tmp_path / "bundle.toml").write_text("\n".join(lines))
    with pytest.raises(BundleError, match=words):
        read_bundle(tmp_path)


def test_scale_one_belongs_to_every_method() -> None:
    whole = bundle()
    assert {whole.base_size(128, 64, 1, method) for method in whole.methods} == {(128, 64)}


def test_direct_draws_the_final_size_itself_whatever_the_scale() -> None:
    whole = bundle()
    assert {whole.base_size(288, 48, scale, "direct") for scale in (1, 2, 4)} == {(288, 48)}
    with pytest.raises(SizeError, match="scale 3: bundle some has 1, 2, 4 by method direct"):
        whole.base_size(288, 48, 3, "direct")
    with pytest.raises(
        SizeError,
        match=r"289x48 px generated directly: .* sides from 32 to 288 px in steps of 16; nearest: 288x48",
    ):
        whole.base_size(289, 48, 2, "direct")


@settings(deadline=None)
@given(st.integers(1, 800), st.integers(1, 800), st.sampled_from([1, 2, 4]), st.sampled_from(METHODS))
def test_the_sizes_that_a_refusal_names_are_reached(width: int, height: int, scale: int, method: Method) -> None:
    whole = bundle(lua={"file": "lua.safetensors", "scales": (2, 4), "sha256": SHA})
    if scale not in whole.scales_of(method):
        return
    try:
        base = whole.base_size(width, height, scale, method)
    except SizeError as refusal:
        for text in str(refusal).rpartition("nearest: ")[2].split(" and "):
            reached = [int(side) for side in text.split("x")]
            whole.base_size(reached[0], reached[1], scale, method)
    else:
        factor = 1 if method == "direct" else scale
        assert (base[0] * factor, base[1] * factor) == (width, height)
        assert max(base) <= (300 if method == "direct" else 128)


def test_what_is_written_is_read_again_with_every_section(tmp_path: Path) -> None:
    written = Descriptor.model_validate(
        values(
            bundle=values()["bundle"] | {"license_notes": "ask first"},
            pipeline=values()["pipeline"] | {"dtype": "bfloat16", "scheduler": "DDIMScheduler", "variant": "fp16"},
            vae={"hub_id": "maker/vae", "revision": "1"},
            tiny_vae={"hub_id": "maker/tiny", "revision": "2"},
            lua=None,
            lua_source={"train": "x"},
            defaults=defaults(method="swinir", scale=4),
            origin={"pipeline": "maker/model@1"},
        )
    )
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "x4.pth").write_bytes(b"")
    write_bundle(tmp_path, written)
    read = read_bundle(tmp_path)
    assert read.descriptor == written
    assert (read.dtype, read.scheduler, read.variant) == ("bfloat16", "DDIMScheduler", "fp16")
    assert read.vae == ModelSource("maker/vae", "1") and read.tiny_vae == ModelSource("maker/tiny", "2")
    assert read.decodes == ("exact", "tiled", "tiny") and bundle().decodes == ("exact", "tiled")


def local_vae(directory: Path, **config: Any) -> None:
    (directory / "vae").mkdir(parents=True)
    (directory / "vae" / "config.json").write_text(json.dumps(config))
    (directory / "vae" / "weights.safetensors").write_bytes(b"vae")


def test_a_vae_of_its_own_lies_in_the_bundle_and_is_the_one_that_must_fit(tmp_path: Path) -> None:
    local_vae(tmp_path, latent_channels=4, scaling_factor=0.13025)
    change: Values = {
        "lua": None, "swinir": None, "vae": {"path": "vae"}, "defaults": defaults(method="bicubic"),
        "files": {"vae/weights.safetensors": file_hash(tmp_path / "vae" / "weights.safetensors")},
    }  # fmt: skip
    write_bundle(tmp_path, Descriptor.model_validate(values(**change)))
    read = read_bundle(tmp_path)
    assert read.vae == ModelSource(tmp_path / "vae")
    check_files(read)
    (tmp_path / "vae" / "config.json").write_text('{"latent_channels": 4, "scaling_factor": 0.18215}')
    with pytest.raises(BundleError, match=r"scaling_factor is 0\.18215; latent space sdxl"):
        read_bundle(tmp_path)
    shutil.rmtree(tmp_path / "vae")
    with pytest.raises(BundleError, match=r"no VAE directory: config\.json is missing"):
        read_bundle(tmp_path)


def test_statistics_of_a_vae_must_be_those_of_the_latent_space(tmp_path: Path) -> None:
    """Some SDXL models have a mean and a standard deviation per channel; without them their colors are wrong."""
    local_vae(tmp_path, latent_channels=4, scaling_factor=0.13025, latents_mean=[0, 0, 0, 1], latents_std=[1, 1, 1, 2])
    own = {"name": "own", "channels": 4, "stride_px": 8, "scale": 0.13025}
    change: Values = {
        "lua": None, "swinir": None, "vae": {"path": "vae"}, "defaults": defaults(method="bicubic"), "files": {},
    }  # fmt: skip
    write_bundle(tmp_path, Descriptor.model_validate(values(**change)))
    with pytest.raises(BundleError, match=r"latents_mean is .*; latent space sdxl of bundle.toml has None"):
        read_bundle(tmp_path)
    statistics = {"mean": [0.0, 0.0, 0.0, 1.0], "std": [1.0, 1.0, 1.0, 2.0]}
    write_bundle(tmp_path, Descriptor.model_validate(values(**change, latent_space=own | statistics)))
    assert read_bundle(tmp_path).latent_space.std == (1, 1, 1, 2)


def test_a_changed_swinir_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "x4.pth").write_bytes(b"weights")
    write_bundle(tmp_path, Descriptor.model_validate(values(lua=None, defaults=defaults(method="swinir", scale=4))))
    with pytest.raises(BundleError, match=r"up/x4\.pth has sha256"):
        check_files(read_bundle(tmp_path))


@pytest.mark.parametrize("directory", SHIPPED, ids=lambda path: str(path.name))
def test_every_shipped_descriptor_is_read_without_its_pipeline(directory: Path) -> None:
    shipped = read_bundle(directory)
    assert shipped.name == directory.name
    assert shipped.about.license and "bicubic" in shipped.methods and "direct" in shipped.methods
    assert shipped.limits.multiple_px % shipped.latent_space.multiple_px == 0
    assert tomllib.loads(to_toml(shipped.descriptor)) == tomllib.loads((directory / "bundle.toml").read_text())
    if isinstance(shipped.pipeline, str):
        assert shipped.lua is None and shipped.unavailable_reason("lua")
        assert shipped.dtype in ("bfloat16", "float16") and shipped.revision == "main"
        page = (BUNDLES.parent / "docs" / "bundles" / "README.md").read_text()
        assert shipped.pipeline in page and shipped.about.license in page


def test_the_released_lua_is_named_for_flux1_only() -> None:
    sources = {path.name: read_bundle(path).descriptor.lua_source for path in SHIPPED}
    released = {name for name, source in sources.items() if source is not None and source.hub_id is not None}
    assert released == {"flux1-dev", "flux1-krea", "flux1-schnell"}
    assert all(sources[name].file == "lua_flux.pth" for name in released)  # type: ignore[union-attr]
    assert set(sources) == {
        "pocket", "sdxl", "sd3.5-medium", "flux1-dev", "flux1-krea", "flux1-schnell", "flux2-klein", "qwen-image",
        "z-image-turbo", "prx-512", "sana-1.6b", "sana-sprint-1.6b",
    }  # fmt: skip


def test_sdxl_in_float16_decodes_with_the_vae_that_does_not_overflow() -> None:
    sdxl = read_bundle(BUNDLES / "sdxl")
    assert sdxl.dtype == "float16" and sdxl.vae == ModelSource("madebyollin/sdxl-vae-fp16-fix", "main")


def test_the_pocket_bundle_draws_up_to_512_px_directly() -> None:
    pocket = read_bundle(BUNDLES / "pocket")
    assert pocket.base_size(512, 256, 4, "direct") == (512, 256)
    with pytest.raises(SizeError, match="nearest: 512x512"):
        pocket.base_size(544, 512, 4, "direct")
