"""The memory plan against live tensors: every stage and method, and every kind of network at its real width.

Networks of real width run on shapes alone (device "meta"), which costs no arithmetic; that shapes alone give the same
figure as numbers is shown below.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from benchmarks.memory import TRANSFORMERS, UNETS, build, config_of, measure_peak, measure_stages, run_unet
from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.bundle.descriptor import LuaFile, Method, PipelineSource, VaeSource
from giantleap.models.engines import swinir as pixel_upscale
from giantleap.models.engines.eager import TorchEngine
from giantleap.models.engines.packed_lua import TOKENS_AT_ONCE, PackedLua, PreparedBlock
from giantleap.models.engines.swinir import PixelUpscaler
from giantleap.models.lua.checkpoints import read_lua, write_lua
from giantleap.models.lua.network import Lua
from giantleap.models.lua.released_layouts import RGB_MEAN
from giantleap.models.lua.spec import PRESETS, LuaSpec
from giantleap.models.memory import activations as activation_bytes
from giantleap.models.memory.activations import (
    UnknownNetworkError,
    denoiser_elements,
    encoder_elements,
    guided_batch,
    lua_bytes,
    lua_kept_bytes,
    prepared_lua_bytes,
    text_encoder_elements,
    video_decoder_elements,
    video_tiled_elements,
)
from giantleap.models.memory.from_bundle import choose_vae_dtype, read_header, read_memory_plan
from giantleap.models.memory.plan import TILE_PX, MemoryPlan, UnknownMemoryError, Workload, largest_fit
from giantleap.models.route import Route
from giantleap.models.vae import autoencoder as vae
from giantleap.service.settings import POCKET_BUNDLE

QUARTER = 0.25  # what is promised of every estimate
CLOSE = 0.06  # what the formulas reach on the networks that they were read off
CPU = torch.device("cpu")
MIB = 2**20


def live_bytes(run: Callable[[], object]) -> int:
    return measure_peak(run, "cpu")


def on_meta(make: Callable[[], Any]) -> Any:
    return build(make, "meta", torch.float32)


# Generators


@pytest.mark.parametrize("size", [(2, 96, 128), (1, 33, 50)])
@pytest.mark.parametrize("name", UNETS)
def test_a_unet_needs_what_the_plan_says(name: str, size: tuple[int, int, int]) -> None:
    model = on_meta(UNETS[name])
    expected_bytes = live_bytes(run_unet(model, *size))
    assert 4 * denoiser_elements(config_of(model), *size, "float32") == pytest.approx(expected_bytes, rel=CLOSE)


def test_shapes_alone_give_the_figure_of_numbers() -> None:
    size = (2, 16, 24)
    on_shapes = live_bytes(run_unet(on_meta(UNETS["narrow"]), *size))
    assert live_bytes(run_unet(build(UNETS["narrow"], "cpu", torch.float32), *size)) == pytest.approx(
        on_shapes, rel=0.02
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_needs_what_the_plan_says(name: str, dtype: str) -> None:
    make, arguments = TRANSFORMERS[name]
    kind = getattr(torch, dtype)
    model = build(make, "meta", kind)
    for height, width in ((64, 64), (128, 160)):
        given = arguments({"device": "meta", "dtype": kind}, height, width)
        expected_bytes = live_bytes(lambda given=given: model(**given, return_dict=False))  # type: ignore[misc]
        found_bytes = denoiser_elements(config_of(model), 1, height, width, dtype) * kind.itemsize
        # The plan takes the longest prompt; at 512 px that is a third of the tokens.
        assert found_bytes == pytest.approx(expected_bytes, rel=QUARTER if height == 64 else 0.15)
        assert found_bytes > 0.95 * expected_bytes


def test_guidance_doubles_the_batch_where_it_runs_in_the_same_call() -> None:
    unet, flux, z_image = ({"_class_name": f"{name}Transformer2DModel"} for name in ("SD3", "Flux", "ZImage"))
    assert guided_batch({"_class_name": "UNet2DConditionModel"}, 3, 7.5) == 6
    assert guided_batch({"_class_name": "UNet2DConditionModel"}, 3, 1.0) == 3
    assert [guided_batch(config, 2, 3.5) for config in (unet, flux, z_image)] == [4, 2, 4]
    assert [guided_batch(config, 2, 0.5) for config in (unet, flux, z_image)] == [2, 2, 4]


def test_what_has_no_formula_is_refused_by_name() -> None:
    with pytest.raises(UnknownNetworkError, match="PixArtTransformer2DModel"):
        denoiser_elements({"_class_name": "PixArtTransformer2DModel"}, 1, 64, 64, "float32")
    config = config_of(on_meta(UNETS["narrow"]))
    with pytest.raises(UnknownNetworkError, match="AttnDownBlock2D"):
        denoiser_elements({**config, "down_block_types": ["AttnDownBlock2D"] * 2}, 1, 8, 8, "float32")
    with pytest.raises(UnknownNetworkError, match="AutoencoderOobleck"):
        video_decoder_elements({"_class_name": "AutoencoderOobleck"}, 8, 8, 8)
    with pytest.raises(UnknownNetworkError, match="gru"):
        text_encoder_elements({"model_type": "gru"}, 1, 77)


def test_text_encoders_need_what_the_plan_says() -> None:
    clip = on_meta(
        lambda: CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=3, num_attention_heads=12)
        )
    )
    t5 = on_meta(
        lambda: T5EncoderModel(
            T5Config(
                d_model=4096,
                d_ff=10240,
                num_heads=64,
                num_layers=2,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
            )
        )
    )
    for model, prompts, tokens in ((clip, 2, 77), (t5, 1, 512), (t5, 2, 256)):
        ids = torch.zeros(prompts, tokens, dtype=torch.int64, device="meta")
        expected_bytes = live_bytes(lambda ids=ids, model=model: model(ids, output_hidden_states=model is clip))  # type: ignore[misc]
        found_bytes = 4 * text_encoder_elements(model.config.to_dict(), prompts, tokens)
        assert found_bytes == pytest.approx(expected_bytes, rel=QUARTER)


@pytest.mark.parametrize(("layers", "words"), [(2, 500), (6, 500), (2, 8000)])
def test_a_language_model_keeps_every_layer_and_scores_every_word(layers: int, words: int) -> None:
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=words,
    )
    model = Qwen3ForCausalLM(config).eval()
    ids = torch.zeros(1, 200, dtype=torch.int64)
    expected_bytes = live_bytes(lambda: model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True))
    said = {**config.to_dict(), "architectures": ["Qwen3ForCausalLM"]}
    assert 4 * text_encoder_elements(said, 1, 200) == pytest.approx(expected_bytes, rel=QUARTER)


# Upscalers

SMALL_LUA = LuaSpec(16, 12, (2,), 2, window=4, num_feat=8, bicubic_skip=True)
LUAS: Mapping[str, LuaSpec] = {
    "small": SMALL_LUA,
    "pocket": replace(PRESETS["pocket"], depths=(2,), num_heads=6),
    "medium": replace(PRESETS["medium"], depths=(2,), num_heads=6),
    "release": replace(PRESETS["release"], depths=(2,), num_heads=12),
}


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("name", LUAS)
def test_a_lua_needs_what_the_plan_says(name: str, scale: int) -> None:
    spec = LUAS[name]
    net = on_meta(lambda: Lua(spec))
    for batch, height, width in ((1, 64, 48), (2, 124, 128)):
        latent = torch.zeros(batch, 16, height, width, device="meta")
        expected_bytes = live_bytes(lambda latent=latent: net(latent, scale))  # type: ignore[misc]
        found_bytes = lua_bytes(spec, batch, height, width, scale, "float32", "cpu")
        assert found_bytes == pytest.approx(expected_bytes, rel=QUARTER)


@pytest.mark.parametrize("scale", [2, 4])
def test_a_lua_that_computes_in_bfloat16_needs_what_the_plan_says(scale: int) -> None:
    net = Lua(PRESETS["pocket"]).eval()
    latent = torch.zeros(2, 16, 16, 24)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            net(latent, scale)

    live_bytes(run)  # the biases stay
    assert lua_bytes(net.spec, 2, 16, 24, scale, "bfloat16", "cpu") == pytest.approx(live_bytes(run), rel=QUARTER)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("name", ["small", "pocket", "medium"])
def test_a_lua_prepared_for_a_cpu_needs_what_the_plan_says(
    name: str, scale: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    net = PackedLua(Lua(LUAS[name]).eval(), torch.float32)
    for batch, height, width in ((1, 24, 32), (2, 30, 16)):
        latent = torch.zeros(batch, 16, height, width)
        net(latent, scale)  # the indices of a size are kept
        expected_bytes = live_bytes(lambda latent=latent: net(latent, scale))  # type: ignore[misc]
        found_bytes = prepared_lua_bytes(LUAS[name], batch, height, width, scale, "float32", threads)
        assert found_bytes == pytest.approx(expected_bytes, rel=QUARTER)


@pytest.mark.parametrize("size", [(1, 16, 16), (1, 64, 64)])
def test_prepared_in_bfloat16_it_keeps_the_scores_of_some_windows(
    size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Plain layers: not every CPU has oneDNN's bfloat16. What attends is chosen by the block.
    net = PackedLua(Lua(LUAS["pocket"]).eval(), torch.bfloat16, packed=False)
    monkeypatch.setattr(PreparedBlock, "attends_plainly", lambda block: True)
    for blocks, _ in net.groups:
        for block in blocks:
            block.tokens_at_once = TOKENS_AT_ONCE[torch.bfloat16]
    latent = torch.zeros(size[0], 16, *size[1:])
    net(latent, 2)
    expected_bytes = live_bytes(lambda: net(latent, 2))
    found_bytes = prepared_lua_bytes(LUAS["pocket"], *size, 2, "bfloat16", torch.get_num_threads())
    assert found_bytes == pytest.approx(expected_bytes, rel=QUARTER)


def test_a_lua_keeps_the_bias_of_every_block() -> None:
    net = Lua(PRESETS["pocket"]).eval()
    with torch.inference_mode():
        net(torch.zeros(1, 16, 8, 8), 2)
    assert lua_kept_bytes(net.spec) == sum(bias.nbytes for bias in net.bias_cache._biases)


# VAEs


@pytest.mark.parametrize(
    ("name", "channels", "stride_px"),
    [("AutoencoderKLQwenImage", 16, 8), ("AutoencoderKLWan", 16, 8), ("AutoencoderKLQwenImage21", 64, 16)],
)
def test_a_video_vae_needs_what_the_plan_says(name: str, channels: int, stride_px: int) -> None:
    model = on_meta(getattr(diffusers, name))
    config = config_of(model)
    height_px, width_px = 320, 384
    height, width = height_px // stride_px, width_px // stride_px
    latent = torch.zeros(1, channels, 1, height, width, device="meta")
    for tiled, count in ((False, video_decoder_elements), (True, video_tiled_elements)):
        model.use_tiling = tiled
        expected_bytes = live_bytes(lambda: model.decode(latent))
        assert 4 * count(config, height, width, stride_px) == pytest.approx(expected_bytes, rel=CLOSE)
    model.use_tiling = False
    image = torch.zeros(1, 4 if channels == 64 else 3, 1, height_px, width_px, device="meta")
    expected_bytes = live_bytes(lambda: model.encode(image))
    assert 4 * encoder_elements(config, height_px, width_px) == pytest.approx(expected_bytes, rel=CLOSE)


@pytest.mark.parametrize(("channels", "layers"), [((128, 256, 512, 512), 2), ((32, 64, 96), 1)])
def test_an_encoder_needs_what_the_plan_says(channels: tuple[int, ...], layers: int) -> None:
    model = on_meta(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=channels,
            layers_per_block=layers,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
        )
    )
    image = torch.zeros(1, 3, 512, 256, device="meta")
    expected_bytes = live_bytes(lambda: model.encode(image))
    assert 4 * encoder_elements(config_of(model), 512, 256) == pytest.approx(expected_bytes, rel=CLOSE)


# A whole bundle


def swinir_file(directory: Path) -> Path:
    """A SwinIR of random weights in the published layout."""
    net = Lua(LuaSpec(3, 12, (2,), 2, window=4, num_feat=8, scales=(2,), image_mean=RGB_MEAN))
    names = {"heads.x2.conv_before.": "conv_before_upsample.", "heads.x2.": ""}
    weights = {}
    for key, value in net.state_dict().items():
        start = next((old for old in names if key.startswith(old)), "")
        weights[names.get(start, "") + key.removeprefix(start)] = value.contiguous()
    save_file(weights, directory / "swinir_x2.safetensors")
    return directory / "swinir_x2.safetensors"


@pytest.fixture(scope="module")
def pocket() -> Bundle:
    return read_bundle(POCKET_BUNDLE)


@pytest.fixture(scope="module")
def route(pocket: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Route:
    """Its upscalers as plain networks, since which form is faster differs between machines."""
    route = Route.open(pocket, CPU, torch.float32)
    assert pocket.lua is not None
    route.lua = TorchEngine(read_lua(pocket.lua), CPU, torch.float32)
    net = read_lua(swinir_file(tmp_path_factory.mktemp("swinir")))
    route.pixel = PixelUpscaler({2: net}, CPU, torch.float32)
    return route


@pytest.fixture(scope="module")
def plan(pocket: Bundle, route: Route) -> MemoryPlan:
    assert route.pixel is not None
    return replace(read_memory_plan(pocket, "cpu", "float32"), swinir={2: route.pixel.nets[2].spec})


@pytest.mark.parametrize(
    "work",
    [
        Workload(192, 192, 2),
        Workload(384, 256, 4, items=2),
        Workload(256, 192, 2, method="bicubic", items=2),
        Workload(256, 192, 2, method="direct", decode="tiled"),
        Workload(320, 256, 2, method="swinir"),
        Workload(128, 96, 1, guidance_scale=1.0),
    ],
    ids=lambda work: f"{work.method}-{work.width_px}x{work.height_px}-x{work.scale}",
)
def test_every_stage_of_a_job_is_within_a_quarter_of_what_was_measured(
    route: Route, plan: MemoryPlan, work: Workload
) -> None:
    estimate = plan.estimate(work)
    found, expected = dict(estimate.stages), measure_stages(route, work, "cpu")
    assert set(found) == set(expected)
    for stage, expected_bytes in expected.items():
        assert found[stage] == pytest.approx(expected_bytes, rel=QUARTER), stage  # type: ignore[index]
    assert estimate.peak_bytes == plan.weights_bytes + max(found.values())


def test_an_image_is_encoded_and_pixels_that_swinir_enlarges_are_not(route: Route, plan: MemoryPlan) -> None:
    image = torch.zeros(150, 200, 3, dtype=torch.uint8).numpy()
    found = plan.estimate(Workload(400, 300, 2, source="image")).stages
    assert found["encode"] == pytest.approx(live_bytes(lambda: route.encode_image(image)), rel=QUARTER)
    assert list(found) == ["encode", "upscale", "decode"]
    assert list(plan.estimate(Workload(400, 300, 2, source="image", method="swinir")).stages) == ["upscale"]
    assert list(plan.estimate(Workload(400, 300, 2, source="latent", decode=None)).stages) == ["upscale"]
    assert list(plan.estimate(Workload(256, 256, 2, source="prompt and image")).stages)[:2] == ["encode", "generate"]


def loaded_bytes(*models: Any) -> int:
    return sum(t.nbytes for model in models for t in (*model.parameters(), *model.buffers()))


def test_the_weights_are_those_that_are_loaded(pocket: Bundle, route: Route, plan: MemoryPlan) -> None:
    pipeline = route.generator.pipeline
    assert pocket.lua is not None
    upscalers = [read_lua(path) for path in (pocket.lua, *pocket.swinir.values())]
    model_bytes = loaded_bytes(pipeline.unet, pipeline.vae, pipeline.text_encoder)
    kept_bytes = sum(lua_kept_bytes(net.spec) for net in upscalers)
    expected_bytes = model_bytes + loaded_bytes(*upscalers) + kept_bytes
    assert plan.weights_bytes == pytest.approx(expected_bytes, rel=0.01)
    half = read_memory_plan(pocket, "cpu", "bfloat16")
    assert half.weights_bytes == pytest.approx(expected_bytes - model_bytes / 2, rel=0.01)  # upscalers stay float32


def test_a_pipeline_on_the_hub_has_no_estimate_and_says_what_to_do(pocket: Bundle) -> None:
    source = PipelineSource(hub_id="some/model", revision="main")
    away = Bundle(pocket.directory, pocket.descriptor.model_copy(update={"pipeline": source}))
    with pytest.raises(UnknownMemoryError, match=r"pipeline is some/model on the hub; `giantleap bundle pull`"):
        read_memory_plan(away, "cpu", "float32")
    vae_away = pocket.descriptor.model_copy(update={"vae": VaeSource(hub_id="some/vae", revision="main")})
    with pytest.raises(UnknownMemoryError, match="vae is some/vae on the hub"):
        read_memory_plan(Bundle(pocket.directory, vae_away), "cpu", "float32")


def test_a_damaged_or_missing_weight_file_has_no_estimate(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(UnknownMemoryError, match=r"model\.safetensors"):
        read_header(path)
    for content in (b"", b"\xff" * 64, (12).to_bytes(8, "little") + b'{"a": [1, 2]}', b"\x02" + b"\0" * 7 + b"[]"):
        path.write_bytes(content)
        with pytest.raises(UnknownMemoryError, match=r"model\.safetensors"):
            read_header(path)


def test_a_lua_file_that_does_not_tell_its_shape_leaves_the_other_methods(pocket: Bundle, tmp_path: Path) -> None:
    for name in ("model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (tmp_path / name).symlink_to(POCKET_BUNDLE / name)
    (tmp_path / "lua.pth").write_bytes(b"\0" * 1000)
    lua = LuaFile(file="lua.pth", scales=(2, 4), sha256="0" * 64)
    bundle = Bundle(tmp_path, pocket.descriptor.model_copy(update={"lua": lua, "swinir": None}))
    plan = read_memory_plan(bundle, "cpu", "float32")
    assert plan.estimate(Workload(256, 256, 2, method="bicubic")).peak_bytes > plan.weights_bytes
    with pytest.raises(UnknownMemoryError, match="does not tell its shape"):
        plan.estimate(Workload(256, 256, 2))
    told = read_memory_plan(bundle, "cpu", "float32", PRESETS["pocket"])
    assert told.estimate(Workload(256, 256, 2)).stages["upscale"] > 0


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_of_several_weight_files_those_that_are_loaded_count(
    pocket: Bundle, tmp_path: Path, variant: str | None
) -> None:
    for name in ("model_index.json", "vae", "text_encoder", "tokenizer", "scheduler", "lua.safetensors"):
        (tmp_path / name).symlink_to(POCKET_BUNDLE / name)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").symlink_to(POCKET_BUNDLE / "unet" / "config.json")
    stem, tensor = "unet/diffusion_pytorch_model", torch.zeros(MIB // 4)
    for number in (1, 2, 3):
        save_file({f"w{number}": tensor}, tmp_path / f"{stem}-{number:05d}-of-00003.safetensors")
    save_file({"w": tensor}, tmp_path / f"{stem}.fp16.safetensors")
    save_file({"w": tensor}, tmp_path / f"{stem}.non_ema.safetensors")
    pipeline = pocket.descriptor.pipeline.model_copy(update={"variant": variant})
    bundle = Bundle(tmp_path, pocket.descriptor.model_copy(update={"pipeline": pipeline, "swinir": None}))
    whole = Bundle(POCKET_BUNDLE, pocket.descriptor.model_copy(update={"swinir": None}))
    header, _ = read_header(POCKET_BUNDLE / f"{stem}.safetensors")
    unet_bytes = sum(weight.size_bytes("float32") for weight in header.values())
    others = read_memory_plan(whole, "cpu", "float32").weights_bytes - unet_bytes
    assert read_memory_plan(bundle, "cpu", "float32").weights_bytes == others + (3 if variant is None else 1) * MIB


def test_a_spec_is_read_off_our_own_file_and_off_a_published_layout(tmp_path: Path, pocket: Bundle) -> None:
    own = tmp_path / "own.safetensors"
    write_lua(own, Lua(SMALL_LUA))
    files = {"x2": swinir_file(tmp_path).name}
    swinir = type("Files", (), {"by_scale": lambda self: {2: str(tmp_path / files["x2"])}})()
    lua = LuaFile(file=str(own), scales=(2, 4), sha256="0" * 64)
    bundle = Bundle(POCKET_BUNDLE, pocket.descriptor.model_copy(update={"lua": lua, "swinir": swinir}))
    plan = read_memory_plan(bundle, "cpu", "float32")
    assert plan.lua == SMALL_LUA
    assert plan.swinir[2] == LuaSpec(3, 12, (2,), (2,), window=4, num_feat=8, scales=(2,), image_mean=RGB_MEAN)


# What fits


def to_grid(multiple_px: int, min_px: int) -> Callable[[int, int], tuple[int, int]]:
    def on_grid(width_px: int, height_px: int) -> tuple[int, int]:
        width_px, height_px = (max(side // multiple_px * multiple_px, min_px) for side in (width_px, height_px))
        return width_px, height_px

    return on_grid


METHODS: tuple[Method, ...] = ("lua", "direct", "bicubic", "swinir")


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_size_fits_and_the_next_on_the_grid_does_not(plan: MemoryPlan, method: Method) -> None:
    asked = Workload(8192, 4096, 2, method=method)
    memory_bytes = plan.weights_bytes + 600 * MIB

    def fits(work: Workload) -> bool:
        return plan.fits(work, memory_bytes)

    found = largest_fit(asked, to_grid(64, 128), fits)
    assert found is not None
    width_px, height_px = found
    assert width_px % 64 == 0 and height_px % 64 == 0 and abs(width_px - 2 * height_px) <= 64
    assert fits(replace(asked, width_px=width_px, height_px=height_px))
    assert not fits(replace(asked, width_px=width_px + 128, height_px=height_px + 64))
    assert largest_fit(replace(asked, width_px=width_px, height_px=height_px), to_grid(64, 128), fits) == found


def test_a_size_that_fits_is_given_back_and_nothing_where_the_weights_alone_do_not() -> None:
    asked = Workload(1024, 512, 2)
    assert largest_fit(asked, to_grid(64, 128), lambda work: True) == (1024, 512)
    assert largest_fit(asked, to_grid(64, 128), lambda work: False) is None
    assert largest_fit(replace(asked, height_px=128), to_grid(64, 128), lambda work: work.width_px <= 256) == (256, 128)


def test_a_smaller_device_decodes_in_strips_before_it_refuses(plan: MemoryPlan) -> None:
    plan, work = replace(plan, device="cuda"), Workload(512, 512, 2, method="bicubic")
    whole_bytes = plan.estimate(work).stages["decode"]
    assert plan.estimate(work, plan.weights_bytes + whole_bytes).stages["decode"] == whole_bytes
    memory_bytes = plan.weights_bytes + 3 * whole_bytes // 4
    assert plan.estimate(work, memory_bytes).stages["decode"] <= 3 * whole_bytes // 4
    assert plan.fits(work, memory_bytes)
    assert not plan.fits(work, plan.weights_bytes + whole_bytes // 4)


def test_so_many_items_run_at_once_as_fit(plan: MemoryPlan) -> None:
    work = Workload(512, 512, 1, decode=None, items=8)
    three_bytes = plan.estimate(replace(work, items=3)).peak_bytes
    assert plan.max_items(work, three_bytes) == 3
    assert plan.max_items(work, three_bytes - 1) == 2
    assert plan.max_items(work, 10**12) == 8
    assert plan.max_items(work, 1) == 1  # never none: whether one fits is asked before


def test_more_items_pixels_or_scale_never_need_less(plan: MemoryPlan) -> None:
    small = plan.estimate(Workload(256, 256, 2))
    for change in ({"items": 2}, {"width_px": 512}, {"guidance_scale": 9.0}):
        larger = plan.estimate(replace(Workload(256, 256, 2), **change))
        assert all(larger.stages[stage] >= small.stages[stage] for stage in small.stages)


def test_what_is_said_twice_is_the_same() -> None:
    assert TILE_PX == pixel_upscale.TILE_PX
    assert {f"torch.{name}": n for name, n in activation_bytes.PREPARED_TOKENS.items()} == {
        str(dtype): n for dtype, n in TOKENS_AT_ONCE.items()
    }
    for force in (None, False, True):
        for channels in (4, 16):
            for name in ("float32", "bfloat16", "float16"):
                kind = vae.choose_vae_dtype(force, channels, getattr(torch, name))
                assert choose_vae_dtype(force, channels, name) == str(kind).removeprefix("torch.")


def test_the_plan_needs_no_torch() -> None:
    code = "import sys, giantleap.models.memory.from_bundle; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
