"""An AutoencoderDC decoded in strips: the image of the class itself, in less memory, or no strips at all."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from diffusers.models.autoencoders.autoencoder_dc import ResBlock
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.bundle.names import SHIPPED
from giantleap.models.latent_space import LatentSpace
from giantleap.models.live_storage import LiveStorage
from giantleap.models.vae.autoencoder import Vae, read_vae_model
from giantleap.models.vae.dc_strips import DcStrips
from giantleap.models.vae.decode import decode_plain
from giantleap.models.vae.decoder_check import UnknownDecoderError
from giantleap.models.vae.strip_plan import DecodeBudgetError
from tests.tensors import largest_difference
from tests.tiny_pipelines import tiny_dc_vae

TOLERANCE = 1e-5
SHUFFLES: dict[str, Any] = {"latent_channels": 8, "channels": (8, 16, 8), "attention": 0}
SANA: dict[str, Any] = {
    "latent_channels": 8,
    "channels": (8, 8, 8, 8, 16),
    "attention": 2,
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
}


def make_vae(**config: Any) -> Any:
    """Norms and biases that are not trivial."""
    torch.manual_seed(0)
    vae = tiny_dc_vae(**config)
    for norm in (part for part in vae.modules() if isinstance(part, RMSNorm)):
        nn.init.normal_(norm.get_parameter("weight"), 1.0, 0.3)
        nn.init.normal_(norm.get_parameter("bias"), 0.0, 0.3)
    return vae


def cut_of(vae: Any, dtype: torch.dtype = torch.float32) -> DcStrips:
    cut = DcStrips.of(vae, dtype)
    assert cut is not None
    return cut


def latents_of(vae: Any, height: int, width: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, vae.config.latent_channels, height, width, generator=generator)


@pytest.mark.parametrize("config", [SHUFFLES, SANA], ids=["shuffles", "sana"])
@pytest.mark.parametrize(("height", "width", "rows"), [(37, 5, 1), (37, 5, 4), (23, 3, 100), (1, 1, 1), (2, 9, 1)])
def test_strips_give_the_image_of_the_class(config: dict[str, Any], height: int, width: int, rows: int) -> None:
    vae = make_vae(**config)
    latents = latents_of(vae, height, width, batch=2)
    assert largest_difference(cut_of(vae).decode(vae, latents, rows), decode_plain(vae, latents)) <= TOLERANCE


def test_stages_up_to_the_last_attention_run_on_the_whole_latent() -> None:
    assert cut_of(make_vae(**SHUFFLES)).whole_steps == 0
    cut = cut_of(make_vae(**SANA))
    assert (cut.whole_steps, cut.map_scale, cut.row_px) == (3, 2, 8), "the first convolution and two stages"


@pytest.mark.parametrize("config", [SHUFFLES, SANA], ids=["shuffles", "sana"])
def test_a_strip_needs_its_overlap(config: dict[str, Any]) -> None:
    vae = make_vae(**config)
    latents, cut = latents_of(vae, 24, 3), cut_of(vae)
    short = replace(cut, halo_rows=cut.halo_rows - 2)
    assert largest_difference(short.decode(vae, latents, 4), decode_plain(vae, latents)) > 10 * TOLERANCE


def test_the_published_decoder_of_sana_is_cut_behind_its_attention() -> None:
    with torch.device("meta"):
        vae: Any = AutoencoderDC(
            encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            upsample_block_type="interpolate",
            downsample_block_type="Conv",
        )
    cut = cut_of(vae, torch.bfloat16)
    assert (cut.whole_steps, cut.map_scale, cut.row_px, cut.halo_rows) == (4, 4, 8, 8)
    side, gib = 128, 2**30  # 4096 px
    assert cut.whole_decode.bytes_per_px * side * side > 26 * gib
    assert cut.first_steps.bytes_per_px * side * side < 10 * gib
    assert cut.prefers_strips(side, side, device="cuda", budget_bytes=12 * gib)
    assert 1 < cut.choose_rows(side, side, budget_bytes=12 * gib) < 4 * side


def test_without_a_budget_strips_are_for_large_images_on_a_cpu_in_float32_and_for_tensors_beyond_an_index() -> None:
    full, half = (cut_of(make_vae(**SHUFFLES).to(dtype), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert full.prefers_strips(256, 256) and not full.prefers_strips(256, 255)
    assert not full.prefers_strips(256, 256, device="cuda") and not half.prefers_strips(256, 256)
    side = int((2**31 / full.whole_decode.elements_per_px) ** 0.5)
    assert full.prefers_strips(side + 1, side + 1, device="cuda")
    assert not full.prefers_strips(side - 1, side - 1, device="cuda")
    assert full.prefers_strips(side - 1, side - 1, batch=2, device="cuda")


@pytest.mark.parametrize("config", [SHUFFLES, SANA], ids=["shuffles", "sana"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_what_was_measured_on_shapes_alone(config: dict[str, Any], dtype: torch.dtype) -> None:
    vae = make_vae(**config).to(dtype)
    latents, cut = latents_of(vae, 48, 20).to(dtype), cut_of(vae, dtype)
    with LiveStorage() as whole:
        decode_plain(vae, latents)
    assert cut.whole_decode.bytes_per_px * 48 * 20 == pytest.approx(whole.peak_bytes, rel=0.1)
    budget_bytes = int(0.7 * whole.peak_bytes)
    assert cut.prefers_strips(48, 20, device="cuda", budget_bytes=budget_bytes)
    rows = cut.choose_rows(48, 20, budget_bytes=budget_bytes)
    with LiveStorage() as strips:
        decoded = cut.decode(vae, latents, rows)
    assert 0.5 * budget_bytes < strips.peak_bytes <= 1.05 * budget_bytes
    assert decoded.dtype == dtype


def test_each_strip_is_reported_with_the_fraction_that_is_done() -> None:
    vae = make_vae(**SHUFFLES)
    done: list[float | None] = []
    cut_of(vae).decode(vae, latents_of(vae, 10, 4, batch=2), 4, done.append)
    assert done == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])


def test_a_budget_below_the_thinnest_strips_is_refused() -> None:
    vae = make_vae(**SHUFFLES)
    with pytest.raises(DecodeBudgetError, match=r"48x20 latent needs \d+ bytes with the thinnest strips; 9000 are"):
        cut_of(vae).choose_rows(48, 20, budget_bytes=9000)
    with pytest.raises(DecodeBudgetError, match="9000 are allowed"):
        Vae(vae, LatentSpace("any", 8, 4, scale=1.0), budget_bytes=9000).decode(latents_of(vae, 48, 20))


def use_batch_norm(vae: Any) -> None:
    vae.decoder.up_blocks[0][-1].norm_type = "batch_norm"
    vae.decoder.up_blocks[0][-1].norm = nn.BatchNorm2d(8)


def use_attention(vae: Any) -> None:
    vae.decoder.up_blocks[0] = make_vae(latent_channels=8, channels=(8, 16, 8), attention=3).decoder.up_blocks[0]


def add_hook(vae: Any) -> None:
    vae.decoder.conv_out.register_forward_hook(lambda module, given, result: result - result.mean())


def use_own_block(vae: Any) -> None:
    class OwnBlock(ResBlock):
        """Computes who knows what."""

    vae.decoder.up_blocks[0][-1] = OwnBlock(8, 8, "rms_norm", "silu")


def use_dilation(vae: Any) -> None:
    vae.decoder.up_blocks[0][-1].conv1 = nn.Conv2d(8, 8, 3, padding=2, dilation=2)


@pytest.mark.parametrize("change", [use_batch_norm, use_attention, add_hook, use_own_block, use_dilation])
def test_a_last_stage_that_may_see_the_whole_map_is_decoded_whole(change: Callable[[Any], None]) -> None:
    vae = make_vae(**SHUFFLES)
    loaded, latents = cut_of(vae), latents_of(vae, 24, 6)
    change(vae)
    assert DcStrips.of(vae, torch.float32) is None
    changed = Vae(vae, LatentSpace("any", 8, 4, scale=1.0), budget_bytes=9000)
    assert not changed.works_in_strips(tuple(latents.shape), 9000)
    assert torch.equal(changed.decode(latents), decode_plain(vae, latents))
    assert torch.equal(changed.decode_in_strips(latents), decode_plain(vae, latents))
    with pytest.raises(UnknownDecoderError, match="since it was loaded"):
        loaded.decode(vae, latents, 4)


def test_other_classes_have_strips_of_their_own() -> None:
    assert DcStrips.of(AutoencoderKL(), torch.float32) is None


def test_bfloat16_errs_no_more_than_the_whole_decode_does() -> None:
    vae = make_vae(**SHUFFLES)
    latents = latents_of(vae, 24, 12)
    truth = decode_plain(vae, latents)
    vae.to(torch.bfloat16)
    strips = cut_of(vae, torch.bfloat16).decode(vae, latents.bfloat16(), 4)
    whole = decode_plain(vae, latents.bfloat16())
    assert (strips - truth).float().std() <= 1.2 * (whole - truth).float().std()


def test_the_trained_autoencoder_of_stride_4_keeps_an_image_in_strips_as_well() -> None:
    bundle = read_bundle(SHIPPED / "pocket")
    model = read_vae_model(bundle, torch.device("cpu"), torch.float32)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 160), torch.linspace(-1, 1, 96), indexing="ij")
    image = torch.stack([rows, columns, torch.sin(20 * rows * columns)])[None]
    vae = Vae(model, bundle.latent_space)
    latent = vae.encode(image)
    assert latent.shape == (1, 24, 40, 24)
    whole = decode_plain(model, latent)
    budget_bytes = int(0.8 * cut_of(model).whole_decode.bytes_per_px * 40 * 24)
    small = Vae(model, bundle.latent_space, budget_bytes=budget_bytes)
    assert small.works_in_strips(tuple(latent.shape), budget_bytes)
    for decoded in (small.decode(latent), vae.decode_in_strips(latent)):
        assert largest_difference(decoded, whole) <= TOLERANCE
    assert float((whole - image).square().mean()) < 4 * 10 ** (-38 / 10), "38 dB"
