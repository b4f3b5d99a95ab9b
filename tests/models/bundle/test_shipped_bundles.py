"""Each shipped descriptor, pulled from a hub that has a tiny model of the same class under its ids, draws an image."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny

from giantleap.models.bundle.bundle import Bundle, check_files, read_bundle
from giantleap.models.bundle.hub import Hub
from giantleap.models.bundle.pull import pull_bundle
from giantleap.models.generation.items import GenerationItem
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec
from giantleap.models.route import Route
from tests.models.fake_hub import Repository, serve_hub
from tests.tiny_pipelines import (
    save_pipeline,
    tiny_flux1,
    tiny_flux2_klein,
    tiny_prx,
    tiny_qwen_image,
    tiny_sana,
    tiny_sana_sprint,
    tiny_sd3,
    tiny_sdxl,
    tiny_z_image,
)

BUNDLES = Path(__file__).parents[3] / "bundles"
BUILD: dict[str, Callable[[], Any]] = {
    "sdxl": tiny_sdxl,
    "sd3.5-medium": tiny_sd3,
    "flux1-dev": tiny_flux1,
    "flux1-krea": tiny_flux1,
    "flux1-schnell": lambda: tiny_flux1(guidance_embeds=False),
    "flux2-klein": lambda: tiny_flux2_klein(is_distilled=True),
    "qwen-image": tiny_qwen_image,
    "z-image-turbo": tiny_z_image,
    "prx-512": lambda: tiny_prx(flux_vae=True),
    "sana-1.6b": tiny_sana,
    "sana-sprint-1.6b": tiny_sana_sprint,
}
VAE_MARK = 0.125


def repository_of(model: Any, directory: Path, variant: str | None = None) -> Repository:
    save_pipeline(model, directory, variant)
    files = {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*")
             if path.is_file()}  # fmt: skip
    return {"README.md": b"a model card", "everything.safetensors": b"one large file"} | files


def repositories_of(bundle: Bundle, pipeline: Any, directory: Path) -> dict[str, Repository]:
    """What the hub has under the ids of a descriptor; the VAE that overrides is recognized by one of its weights."""
    descriptor = bundle.descriptor
    found = {
        str(descriptor.pipeline.hub_id): repository_of(pipeline, directory / "pipeline", descriptor.pipeline.variant)
    }
    if descriptor.tiny_vae is not None:
        narrow = (8, 8, 8, 8)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=narrow,
            decoder_block_out_channels=narrow,
            latent_channels=bundle.latent_space.channels,
        )
        found[str(descriptor.tiny_vae.hub_id)] = repository_of(tiny, directory / "tiny")
    if descriptor.vae is not None:
        torch.nn.init.constant_(pipeline.vae.decoder.conv_out.bias, VAE_MARK)
        found[str(descriptor.vae.hub_id)] = repository_of(pipeline.vae, directory / "vae")
    if descriptor.lua_source is not None and descriptor.lua_source.file is not None:
        released = io.BytesIO()
        torch.manual_seed(0)
        torch.save({"params_ema": Lua(LuaSpec(16, 12, (2,), 2, window=4, num_feat=8)).state_dict()}, released)
        found[str(descriptor.lua_source.hub_id)] = {descriptor.lua_source.file: released.getvalue()}
    return found


@pytest.mark.parametrize("name", BUILD)
def test_a_shipped_bundle_is_pulled_and_draws(name: str, tmp_path: Path) -> None:
    shipped = read_bundle(BUNDLES / name)
    repositories = repositories_of(shipped, BUILD[name](), tmp_path / "built")
    with serve_hub(repositories) as server:
        bundle = pull_bundle(shipped, tmp_path / name, Hub(server.endpoint), lambda line: None)
    check_files(bundle)
    assert not [path for path in bundle.directory.rglob("*") if path.suffix in (".bin", ".pth", ".part")]
    assert ("lua" in bundle.methods) == name.startswith("flux1")

    route = Route.open(bundle, torch.device("cpu"), torch.float32)
    defaults = bundle.defaults
    item = GenerationItem("a red sphere", "", 0, 64, 64, 1, defaults.guidance_scale)
    (latent,) = route.generate([item])
    side = 64 // bundle.latent_space.stride_px
    assert latent is not None and latent.shape == (bundle.latent_space.channels, side, side)
    for decode in bundle.decodes:
        clock = route.clock()
        _, (image,) = route.upscale_and_decode([latent], defaults.scale, defaults.method, decode, clock)
        assert image is not None and image.shape == (128, 128, 3), decode

    pipeline = route.generator.pipeline
    if bundle.scheduler is not None:
        assert type(pipeline.scheduler).__name__ == bundle.scheduler == "DDIMScheduler"
    if bundle.vae is not None:
        assert pipeline.vae.decoder.conv_out.bias.tolist() == [VAE_MARK] * 3, "the VAE of [vae], not the pipeline's"


def test_every_shipped_descriptor_of_a_hub_model_is_tried() -> None:
    shipped = {path.parent.name for path in BUNDLES.glob("*/bundle.toml")}
    assert set(BUILD) == shipped - {"pocket"}
