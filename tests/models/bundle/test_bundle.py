"""Bundles: what a descriptor must say, what must lie beside it, and which image sizes it reaches."""

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from giantleap.models.bundle.bundle import Bundle, BundleError, SizeError, check_files, read_bundle, write_bundle
from giantleap.models.bundle.descriptor import Descriptor
from giantleap.models.bundle.digests import file_hashes
from giantleap.models.latent_space import LATENT_SPACES
from giantleap.models.lua.checkpoints import write_lua
from giantleap.models.lua.network import Lua, LuaSpec

Values = dict[str, dict[str, Any]]
LUA = LuaSpec(4, 4, (1,), 1, window=2, num_feat=1)


def values_of(directory: Path) -> Values:
    files = file_hashes(directory)
    return {
        "bundle": {"name": "tiny", "title": 'A "tiny" one\nwith ü', "license": "Apache-2.0", "provenance": "random"},
        "pipeline": {"path": "."},
        "latent_space": {"name": "own", "channels": 4, "stride_px": 8, "scale": 0.5},
        "lua": {"file": "lua.safetensors", "scales": (2, 4), "sha256": files["lua.safetensors"]},
        "defaults": {"steps": 8, "guidance_scale": 2.5, "base_width_px": 64, "base_height_px": 96},
        "limits": {"min_base_px": 32, "max_base_px": 128, "multiple_px": 16, "max_steps": 20},
        "vocabulary": {"closed": True},
        "files": files,
    }


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without a descriptor: an empty pipeline, the configuration of a VAE, two weight files."""
    directory = tmp_path_factory.mktemp("template")
    (directory / "vae").mkdir()
    (directory / "model_index.json").write_text("{}")
    config = {"latent_channels": 4, "scaling_factor": 0.5, "shift_factor": None}
    (directory / "vae" / "config.json").write_text(json.dumps(config))
    (directory / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights of a VAE")
    torch.manual_seed(0)
    write_lua(directory / "lua.safetensors", Lua(LUA))
    return directory


@pytest.fixture
def directory(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "tiny")


def write(directory: Path, change: Callable[[Values], object] = lambda values: None) -> Path:
    """Writes the descriptor, changed; past the model's own checks where the change breaks its rules."""
    values = values_of(directory)
    write_bundle(directory, Descriptor.model_validate(values))
    change(values)
    lines = []
    for section, content in values.items():
        lines += [f"[{section}]", *(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in content.items())]
    (directory / "bundle.toml").write_text("\n".join(lines), encoding="utf-8")
    return directory


def test_what_is_written_is_read(directory: Path) -> None:
    descriptor = Descriptor.model_validate(values_of(directory))
    write_bundle(directory, descriptor)
    bundle = read_bundle(directory)
    assert bundle.descriptor == descriptor
    assert (bundle.name, bundle.pipeline, bundle.revision) == ("tiny", directory / ".", None)
    assert (bundle.latent_space.channels, bundle.latent_space.scale) == (4, 0.5)
    assert bundle.lua == directory / "lua.safetensors"
    assert bundle.scales == (1, 2, 4)
    assert bundle.closed_vocabulary
    assert bundle.about.title == 'A "tiny" one\nwith ü'
    check_files(bundle)


def test_a_known_latent_space_is_written_by_its_name_alone(directory: Path) -> None:
    values = values_of(directory) | {"latent_space": {"name": "pocket24"}}
    write_bundle(directory, Descriptor.model_validate(values))
    assert tomllib.loads((directory / "bundle.toml").read_text(encoding="utf-8"))["latent_space"] == {
        "name": "pocket24"
    }


def test_hashes_are_of_weight_files_only_and_skip_unfinished_ones(directory: Path) -> None:
    (directory / ".lua.safetensors.x1.safetensors").write_bytes(b"half")
    (directory / "readme.md").write_text("words")
    assert list(file_hashes(directory)) == ["lua.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    # of the sixteen bytes, as sha256sum prints it
    known = "f034ed2c1219de7ba6b6a54ff40b87bc487829450db508ed5deec638decc527a"
    assert file_hashes(directory)["vae/diffusion_pytorch_model.safetensors"] == known


def drop(section: str, key: str) -> Callable[[Values], object]:
    return lambda values: values[section].pop(key)


def put(section: str, **content: Any) -> Callable[[Values], object]:
    return lambda values: values[section].update(content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("defaults", "steps"), r"defaults\.steps: is required"),
        (put("defaults", stepz=3), r"defaults\.stepz: is not a known field; found 3"),
        (lambda values: values.pop("limits"), "limits: is required"),
        (lambda values: values.update(extra={}), "extra: is not a known field"),
        (put("defaults", steps=True), r"defaults\.steps: must be a whole number; found True"),
        (put("defaults", steps=30), "defaults.steps 30 exceeds limits.max_steps 20"),
        (put("defaults", scale=3), r"defaults\.scale 3"),
        (put("defaults", base_width_px=72), "base side of 72 px"),
        (put("defaults", base_width_px=256), "base side of 256 px"),
        (put("limits", multiple_px=12), "limits.multiple_px 12 is no multiple of 8"),
        (put("limits", min_base_px=120, max_base_px=127), "no multiple of 16 from 120 to 127"),
        (put("bundle", name="No Name"), r"bundle\.name"),
        (put("bundle", license=""), r"bundle\.license"),
        (put("pipeline", hub_id="a/b"), "either path or hub_id"),
        (lambda values: values.update(pipeline={"hub_id": "a/b"}), "revision is required with hub_id"),
        (put("pipeline", path="../elsewhere"), r"pipeline\.path: '\.\./elsewhere' leaves the bundle"),
        (put("pipeline", path="vae"), "model_index.json is missing"),
        (put("lua", file="/etc/passwd"), r"lua\.file: '/etc/passwd' leaves the bundle"),
        (put("lua", file="other.safetensors"), r"lua\.file: other\.safetensors is missing"),
        (put("lua", sha256="0" * 64), "lua.sha256 and the entry of lua.safetensors in files differ"),
        (put("lua", sha256="abc"), r"lua\.sha256"),
        (put("lua", scales=["2"]), r"lua\.scales\.0"),
        (put("lua", scales=[]), r"lua\.scales"),
        (put("lua", scales=[2]), r"found heads for scales \(2, 4\); bundle.toml says \(2,\)"),
        (put("latent_space", channels=5), "4 channels do not fit bundle .*: latent space own has 5"),
        (put("latent_space", scale=0.6), "scaling_factor is 0.5; latent space own of bundle.toml has 0.6"),
        (put("latent_space", shift=0.1), "shift_factor is 0; latent space own of bundle.toml has 0.1"),
        (put("latent_space", name="sdxl"), "sdxl is a known family: leave its numbers out"),
        (drop("latent_space", "stride_px"), "none of the known families .*give channels, stride_px and scale"),
        (put("latent_space", mean=[0.0]), "mean and std come together"),
        (put("files", **{"gone.safetensors": "0" * 64}), "files: gone.safetensors is missing"),
        (put("files", **{"../x.bin": "0" * 64}), r"files: '\.\./x\.bin' leaves the bundle"),
    ],
)  # fmt: skip
def test_a_descriptor_that_does_not_hold_is_refused(
    directory: Path, change: Callable[[Values], object], words: str
) -> None:
    with pytest.raises(BundleError, match=words):
        read_bundle(write(directory, change))


def test_a_known_family_is_given_by_its_name_alone(directory: Path) -> None:
    config = {"latent_channels": 4, "scaling_factor": 0.13025}
    (directory / "vae" / "config.json").write_text(json.dumps(config))
    bundle = read_bundle(write(directory, lambda values: values.update(latent_space={"name": "sdxl"})))
    assert bundle.latent_space is LATENT_SPACES["sdxl"]


def test_a_hub_pipeline_is_named_with_its_revision(directory: Path) -> None:
    source = {"hub_id": "someone/some-model", "revision": "0a1b2c"}
    bundle = read_bundle(write(directory, lambda values: values.update(pipeline=source)))
    assert (bundle.pipeline, bundle.revision) == ("someone/some-model", "0a1b2c")


def test_a_directory_without_descriptor_or_with_broken_toml_is_no_bundle(directory: Path) -> None:
    with pytest.raises(BundleError, match=r"bundle\.toml is missing"):
        read_bundle(directory)
    (directory / "bundle.toml").write_text("[bundle\n")
    with pytest.raises(BundleError, match=r"not (TOML|UTF-8) at"):
        read_bundle(directory)
    (directory / "bundle.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match=r"not (TOML|UTF-8) at"):
        read_bundle(directory)


def test_a_link_out_of_the_bundle_is_refused(directory: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (directory / "lua.safetensors").rename(outside)
    (directory / "lua.safetensors").symlink_to(outside)
    with pytest.raises(BundleError, match="leaves the bundle"):
        read_bundle(write(directory))


def test_damaged_lua_weights_are_refused(directory: Path) -> None:
    write(directory)
    (directory / "lua.safetensors").write_bytes(b"no weights")
    with pytest.raises(BundleError, match="damaged"):
        read_bundle(directory)


def test_a_pipeline_without_a_readable_vae_configuration_is_refused(directory: Path) -> None:
    write(directory)
    (directory / "vae" / "config.json").write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        read_bundle(directory)
    (directory / "vae" / "config.json").unlink()
    with pytest.raises(BundleError, match=r"config\.json is missing"):
        read_bundle(directory)


def test_one_changed_byte_is_found(directory: Path) -> None:
    bundle = read_bundle(write(directory))
    weights = directory / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"Weights of a VAE")
    with pytest.raises(BundleError, match=r"vae/diffusion_pytorch_model\.safetensors has sha256 .* says"):
        check_files(bundle)


def test_a_weight_file_that_nobody_listed_is_found(directory: Path) -> None:
    bundle = read_bundle(write(directory))
    (directory / "vae" / "other.bin").write_bytes(b"?")
    with pytest.raises(BundleError, match=r"vae/other\.bin is not listed"):
        check_files(bundle)


def test_lua_of_another_shape_is_refused_when_it_is_known_only_after_reading(directory: Path) -> None:
    bundle = read_bundle(write(directory))
    bundle.check_lua(LUA)
    for spec, words in (
        (LuaSpec(4, 4, (1,), 1, window=2, scales=(4,)), r"heads for scales \(4,\)"),
        (LuaSpec(16, 4, (1,), 1, window=2), "16 channels"),
    ):
        with pytest.raises(BundleError, match=words):
            bundle.check_lua(spec)


def tiny_bundle() -> Bundle:
    values = {
        "bundle": {"name": "tiny", "title": "t", "license": "l", "provenance": "p"},
        "pipeline": {"path": "."},
        "latent_space": {"name": "sdxl"},
        "lua": {"file": "lua.safetensors", "scales": (2, 4), "sha256": "0" * 64},
        "defaults": {"steps": 8, "guidance_scale": 2.5, "base_width_px": 64, "base_height_px": 96},
        "limits": {"min_base_px": 30, "max_base_px": 130, "multiple_px": 16, "max_steps": 20},
        "vocabulary": {"closed": False},
        "files": {},
    }
    return Bundle(Path("nowhere"), Descriptor.model_validate(values))


@settings(deadline=None)
@given(st.integers(1, 800), st.integers(1, 800), st.sampled_from([1, 2, 4]))
def test_a_size_is_reached_exactly_or_the_nearest_ones_are_named(width: int, height: int, scale: int) -> None:
    bundle = tiny_bundle()
    sides = [side * scale for side in range(32, 129, 16)]
    if width in sides and height in sides:
        base = bundle.base_size(width, height, scale)
        assert (base[0] * scale, base[1] * scale) == (width, height)
        return
    with pytest.raises(SizeError) as refusal:
        bundle.base_size(width, height, scale)
    for text in str(refusal.value).rpartition("nearest: ")[2].split(" and "):
        reached = [int(side) for side in text.split("x")]
        bundle.base_size(reached[0], reached[1], scale)
        for got, requested in zip(reached, (width, height), strict=True):
            assert abs(got - min(max(requested, sides[0]), sides[-1])) < 16 * scale, "one step away at most"


def test_the_refusal_of_a_size_says_what_is_reached() -> None:
    with pytest.raises(SizeError, match="sides from 64 to 256 px in steps of 32; nearest: 96x128 and 128x128"):
        tiny_bundle().base_size(100, 128, 2)
    with pytest.raises(SizeError, match=r"nearest: 256x64$"):
        tiny_bundle().base_size(4096, 8, 2)


def test_an_unknown_scale_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SizeError, match="scale 3: bundle tiny has 1, 2, 4"):
        tiny_bundle().base_size(96, 96, 3)


def test_statistics_that_are_weights_of_the_vae_become_part_of_the_space(directory: Path) -> None:
    """The API can take scaled FLUX.2 latents only if it knows them, and it has no torch to load a VAE with."""
    config = {"latent_channels": 32, "batch_norm_eps": 1e-4}
    (directory / "vae" / "config.json").write_text(json.dumps(config))
    weights = directory / "vae" / "diffusion_pytorch_model.safetensors"
    mean, variance = np.linspace(-1, 1, 128, dtype=np.float32), np.linspace(0.5, 2, 128, dtype=np.float32)
    save_file({"bn.running_mean": mean, "bn.running_var": variance}, weights)
    write_lua(directory / "lua.safetensors", Lua(LuaSpec(32, 4, (1,), 1, window=2, num_feat=1)))
    write(directory, lambda values: values.update(latent_space={"name": "flux2"}))
    space = read_bundle(directory).latent_space
    packed = np.random.default_rng(0).standard_normal((1, 6, 128)).astype(np.float32)
    raw = space.to_raw(packed, 32, 48)
    assert raw.shape == (1, 32, 4, 6)
    tokens = packed * np.sqrt(variance + 1e-4) + mean
    assert raw[0, :, 0, 0] == pytest.approx(tokens[0, 0].reshape(32, 2, 2)[:, 0, 0], rel=1e-5)
    save_file({"other": mean}, weights)
    with pytest.raises(BundleError, match="statistics"):
        read_bundle(directory)


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_weights_may_be_links_into_the_cache_of_the_hub(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "elsewhere"
    monkeypatch.setenv(variable, str(root))
    cache = root / {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}.get(variable, "")
    blob = cache / "models--maker--lua" / "blobs" / "0123"
    write(directory)
    replace_by_link(directory / "lua.safetensors", blob)
    replace_by_link(directory / "vae", cache / "models--maker--base" / "snapshots" / "0123")
    check_files(read_bundle(directory))


def replace_by_link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize("name", ["lua.safetensors", "vae/diffusion_pytorch_model.safetensors"])
def test_a_link_to_anywhere_else_is_refused(directory: Path, tmp_path: Path, name: str) -> None:
    write(directory)
    replace_by_link(directory / name, tmp_path / "other" / name)
    with pytest.raises(BundleError, match="leaves the bundle directory"):
        read_bundle(directory)


def test_a_name_that_leads_into_the_cache_without_a_link_is_refused(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    write(directory, put("lua", file="../lua.safetensors"))
    (directory / "lua.safetensors").rename(tmp_path / "lua.safetensors")
    with pytest.raises(BundleError, match="leaves the bundle directory"):
        read_bundle(directory)


def test_a_byte_order_mark_is_no_part_of_the_descriptor(directory: Path) -> None:
    path = write(directory) / "bundle.toml"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_bundle(directory).name == "tiny"


def test_a_pointer_of_git_lfs_is_named(directory: Path) -> None:
    write(directory)
    (directory / "lua.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(BundleError, match=r"lua\.safetensors is a pointer of Git LFS.*git lfs pull"):
        read_bundle(directory)


@pytest.mark.parametrize(("content", "words"), [("{", "not valid JSON"), ("[]", "found a list")])
def test_an_index_of_the_pipeline_that_cannot_be_read_is_named(directory: Path, content: str, words: str) -> None:
    write(directory)
    (directory / "model_index.json").write_text(content)
    with pytest.raises(BundleError, match=rf"model_index\.json: {words}"):
        read_bundle(directory)
