"""The bundle of stride 4 holds what a server needs, with digests."""

from pathlib import Path

import numpy as np
import torch
from diffusers import SanaPipeline

from giantleap.models.bundle.bundle import check_files, read_bundle
from giantleap.models.generation.generator import GenerationItem
from giantleap.models.lua.checkpoints import write_lua
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec
from giantleap.models.route import Route
from giantleap.training.pocket.stride4.bundle import write_pocket_bundle
from giantleap.training.pocket.stride4.network import make_autoencoder
from giantleap.training.pocket.stride4.text import SCALING_FACTOR, Recipe, TextToLatent, write_pipeline
from giantleap.training.pocket.swinir import swinir_spec, write_swinir
from giantleap.training.pocket.tokenizer import open_sana_tokenizer

TRAINED = Path(__file__).parents[4] / "training" / "pocket" / "stride4" / "checkpoints" / "pocket2"


def test_a_whole_bundle_is_read_and_its_digests_hold(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = open_sana_tokenizer()
    write_pipeline(
        tmp_path / "pipeline", TextToLatent(len(tokenizer), Recipe(width=64, depth=1)), make_autoencoder(), tokenizer
    )
    adapter = Lua(LuaSpec(24, 12, (2,), 2, window=4, num_feat=8, scales=(2, 4)))
    write_lua(tmp_path / "lua.safetensors", adapter, {"license": "Apache-2.0"})
    write_swinir(tmp_path / "x2.safetensors", Lua(swinir_spec(2)))
    write_pocket_bundle(
        tmp_path / "small", tmp_path / "pipeline", tmp_path / "lua.safetensors", {2: tmp_path / "x2.safetensors"}
    )
    bundle = read_bundle(tmp_path / "small")
    check_files(bundle)
    space = bundle.latent_space
    assert (space.name, space.channels, space.stride_px, space.scale) == ("pocket24", 24, 4, SCALING_FACTOR)
    assert {"lua", "bicubic", "swinir"} <= set(bundle.methods)
    assert bundle.pipeline_class == "SanaPipeline"


def test_a_bundle_replaces_what_the_directory_held(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = open_sana_tokenizer()
    network = TextToLatent(len(tokenizer), Recipe(width=64, depth=1))
    write_pipeline(tmp_path / "pipeline", network, make_autoencoder(), tokenizer)
    write_lua(tmp_path / "lua.safetensors", Lua(LuaSpec(24, 12, (2,), 2, window=4, num_feat=8, scales=(2, 4))), {})
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "stray.safetensors").write_bytes(b"")
    write_pocket_bundle(tmp_path / "small", tmp_path / "pipeline", tmp_path / "lua.safetensors", {})
    bundle = read_bundle(tmp_path / "small")
    assert "swinir" not in bundle.methods
    assert not (tmp_path / "small" / "stray.safetensors").exists()


def test_the_service_draws_what_the_stock_pipeline_draws(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = open_sana_tokenizer()
    network = TextToLatent(len(tokenizer), Recipe(width=64, depth=1))
    torch.nn.init.normal_(network.transformer.get_parameter("proj_out.weight"))
    write_pipeline(tmp_path / "pipeline", network, make_autoencoder(), tokenizer)
    write_lua(tmp_path / "lua.safetensors", Lua(LuaSpec(24, 12, (2,), 2, window=4, num_feat=8, scales=(2, 4))), {})
    write_pocket_bundle(tmp_path / "small", tmp_path / "pipeline", tmp_path / "lua.safetensors", {})
    route = Route.open(read_bundle(tmp_path / "small"), torch.device("cpu"), torch.float32)
    shown = []
    for prompt in ("a red sphere on a green floor", "a blue cube"):
        (latent,) = route.generate([GenerationItem(prompt, "", 7, 128, 96, 3, 3.0)])
        assert latent is not None
        _, (image,) = route.upscale_and_decode([latent], 1)
        assert image is not None
        stock = SanaPipeline.from_pretrained(tmp_path / "small")
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


def test_the_trained_bundle_draws_the_colors_of_a_prompt() -> None:
    bundle = read_bundle(TRAINED)
    check_files(bundle)
    route = Route.open(bundle, torch.device("cpu"), torch.float32)
    item = GenerationItem("a large red sphere on a green floor under a blue sky, on the left", "", 7, 128, 128, 8, 1.5)
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
