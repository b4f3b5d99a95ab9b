"""`pack` makes the bundle of a trained pipeline, LUA and SwinIR, with digests; the shipped one draws its prompts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from typer.testing import CliRunner

from giantleap.models.bundle.bundle import check_files, read_bundle
from giantleap.models.bundle.names import SHIPPED
from giantleap.models.generation.items import GenerationItem
from giantleap.models.lua.checkpoints import read_lua, write_lua
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec
from giantleap.models.route import Route
from giantleap.training.pocket.__main__ import app
from giantleap.training.pocket.network import SCALING_FACTOR, make_autoencoder
from giantleap.training.pocket.swinir import swinir_spec, write_swinir
from giantleap.training.pocket.text import Recipe, TextToLatent, write_pipeline
from giantleap.training.pocket.tokenizer import open_sana_tokenizer
from giantleap.training.run_config import check_config, read_toml

RUN_FILES = sorted(Path("training/pocket").glob("*.toml"))
SPEC = LuaSpec(24, 12, (2,), 2, window=4, num_feat=8, scales=(2, 4))


def pack(directory: Path, *options: str | Path) -> None:
    ended = CliRunner().invoke(app, ["pack", "--bundle", str(directory), *map(str, options)])
    assert ended.exit_code == 0, ended.output


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A bundle of random weights without SwinIR."""
    torch.manual_seed(0)
    tokenizer = open_sana_tokenizer()
    network = TextToLatent(len(tokenizer), Recipe(width=64, depth=1))
    torch.nn.init.normal_(network.transformer.get_parameter("proj_out.weight"))
    write_pipeline(tmp_path / "pipeline", network, make_autoencoder(), tokenizer)
    write_lua(tmp_path / "trained.safetensors", Lua(SPEC))
    pack(tmp_path / "small", "--text-dir", tmp_path / "pipeline", "--lua-file", tmp_path / "trained.safetensors")
    return tmp_path / "small"


def test_a_whole_bundle_is_read_and_its_digests_hold(small: Path) -> None:
    bundle = read_bundle(small)
    check_files(bundle)
    space = bundle.latent_space
    assert (space.name, space.channels, space.stride_px, space.scale) == ("pocket24", 24, 4, SCALING_FACTOR)
    assert bundle.pipeline_class == "SanaPipeline" and bundle.lua is not None
    assert "lua" in bundle.methods and "swinir" not in bundle.methods


def test_a_part_is_replaced_and_the_others_stay(small: Path, tmp_path: Path) -> None:
    (small / "unet").mkdir()
    write_swinir(tmp_path / "swinir_x2.safetensors", Lua(swinir_spec(2)))
    before = (small / "lua.safetensors").read_bytes()
    pack(small, "--swinir", tmp_path / "swinir_x2.safetensors")
    assert (small / "lua.safetensors").read_bytes() == before and (small / "unet").is_dir()
    torch.manual_seed(1)
    network = Lua(SPEC)
    write_lua(tmp_path / "other.safetensors", network)
    pack(small, "--text-dir", tmp_path / "pipeline", "--lua-file", tmp_path / "other.safetensors")
    bundle = read_bundle(small)
    check_files(bundle)
    assert not (small / "unet").exists(), "a part of another pipeline"
    assert "swinir" in bundle.methods and bundle.lua is not None
    for name, weight in read_lua(bundle.lua).state_dict().items():
        torch.testing.assert_close(weight.float(), network.state_dict()[name].float(), rtol=1e-3, atol=1e-4)


def test_the_service_draws_what_the_stock_pipeline_draws(small: Path) -> None:
    route = Route.open(read_bundle(small), torch.device("cpu"), torch.float32)
    shown = []
    for prompt in ("a red sphere on a green floor", "a blue cube"):
        (latent,) = route.generate([GenerationItem(prompt, "", 7, 128, 96, 3, 3.0)])
        assert latent is not None
        _, (image,) = route.upscale_and_decode([latent], 1)
        assert image is not None
        stock = SanaPipeline.from_pretrained(small)
        stock.set_progress_bar_config(disable=True)
        picture = stock(
            prompt,
            width=128,
            height=96,
            num_inference_steps=3,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(7),
            use_resolution_binning=False,
            output_type="pil",
        ).images[0]
        assert np.abs(image.numpy().astype(int) - np.asarray(picture).astype(int)).max() <= 1
        shown.append(image.float())
    assert (shown[0] - shown[1]).abs().max() > 8, "the prompt takes part"


def test_the_shipped_bundle_draws_the_colors_of_a_prompt() -> None:
    bundle = read_bundle(SHIPPED / "pocket")
    check_files(bundle)
    route = Route.open(bundle, torch.device("cpu"), torch.float32)
    item = GenerationItem("a large red sphere on a green floor under a blue sky, on the left", "", 7, 128, 128, 8, 1.0)
    latents = [latent for latent in route.generate([item]) if latent is not None]
    _, (image,) = route.upscale_and_decode(latents, 2)
    assert image is not None
    assert image.shape == (256, 256, 3)
    sky, ground, thing = (
        image[rows, columns].float().mean(dim=(0, 1))
        for rows, columns in (
            (slice(8, 30), slice(0, 256)),
            (slice(232, 250), slice(0, 256)),
            (slice(110, 150), slice(50, 80)),
        )
    )
    assert [int(color.argmax()) for color in (thing, ground, sky)] == [0, 1, 2]


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_the_run_files_of_the_adapter_are_valid(path: Path) -> None:
    assert check_config(read_toml(path), str(path)).held_out_tiles == 28
