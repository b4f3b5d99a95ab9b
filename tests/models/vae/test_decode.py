"""The exact decode is the plain one at any size, in less memory, and refuses what it does not know."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor, nn

from giantleap.models.latent_space import LATENT_SPACES
from giantleap.models.live_storage import LiveStorage
from giantleap.models.vae.decode import decode_exact, decode_plain, decode_tiled, decode_tiny
from giantleap.models.vae.decoder_check import UnknownDecoderError
from giantleap.models.vae.strip_plan import (
    MAX_ELEMENTS,
    DecodeBudgetError,
    DecoderShape,
    plain_decode_bytes,
    plan_decode,
)
from giantleap.models.vae.strips import StripMap, phase_kernels
from tests.tensors import largest_difference

TOLERANCE = 1e-4


def make_vae(channels: tuple[int, ...] = (16, 24, 32), groups: int = 8, seed: int = 0, **changes: Any) -> AutoencoderKL:
    """A small decoder whose norms and biases are not trivial."""
    torch.manual_seed(seed)
    vae: AutoencoderKL = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        norm_num_groups=groups,
        sample_size=64,
        **changes,
    )
    vae.eval()
    for module in vae.decoder.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return vae


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return make_vae()


def latents_of(vae: AutoencoderKL, height: int, width: int, batch: int = 1, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, vae.config["latent_channels"], height, width, generator=generator)


def decode_in_strips(vae: AutoencoderKL, latents: Tensor, strip_bytes: int) -> Tensor:
    height, width = latents.shape[2:]
    plan = plan_decode(DecoderShape.from_config(vae.config), height, width, "float32", strip_bytes=strip_bytes)
    return decode_exact(vae, latents, plan=plan)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (17, 33)])
@pytest.mark.parametrize("strip_bytes", [0, 20_000, 2**40])
def test_exact_is_plain_at_any_size_and_with_any_strips(
    vae: AutoencoderKL, size: tuple[int, int], strip_bytes: int
) -> None:
    latents = latents_of(vae, *size)
    assert largest_difference(decode_in_strips(vae, latents, strip_bytes), decode_plain(vae, latents)) <= TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"mid_block_add_attention": False},
        {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
        {"layers_per_block": 2},
        {"channels": (32,)},
        {"channels": (32, 16, 16, 24)},
    ],
    ids=str,
)
def test_exact_is_plain_for_the_other_decoders_of_the_class(changes: dict[str, Any]) -> None:
    vae = make_vae(**changes)
    latents = latents_of(vae, 7, 12)
    assert largest_difference(decode_in_strips(vae, latents, 8_000), decode_plain(vae, latents)) <= TOLERANCE


def test_a_batch_equals_its_images_one_by_one(vae: AutoencoderKL) -> None:
    latents = latents_of(vae, 6, 5, batch=3)
    singles = torch.cat([decode_exact(vae, latent) for latent in latents.split(1)])
    assert torch.equal(decode_exact(vae, latents), singles)
    assert largest_difference(singles, decode_plain(vae, latents)) <= TOLERANCE


def test_the_latents_are_left_as_they_were(vae: AutoencoderKL) -> None:
    latents = latents_of(vae, 8, 8)
    before = latents.clone()
    decode_exact(vae, latents)
    assert torch.equal(latents, before)


def test_statistics_hold_when_a_mean_is_far_above_the_deviation() -> None:
    vae = make_vae(seed=3)
    nn.init.constant_(vae.decoder.get_parameter("conv_in.bias"), 300.0)
    latents = latents_of(vae, 20, 20)
    plain, exact = decode_plain(vae, latents), decode_in_strips(vae, latents, 4_000)
    truth = decode_plain(vae.double(), latents.double())
    assert largest_difference(exact, truth) <= max(2 * largest_difference(plain, truth), TOLERANCE)


def test_moments_of_strips_are_those_of_the_whole_map() -> None:
    whole = torch.randn(1, 12, 11, 7, generator=torch.Generator().manual_seed(5)) * 0.1 + 50
    cut = StripMap(11, 4)
    for strip in whole.split(4, dim=2):
        cut.append(strip)
    mean, variance = cut.moments(groups=3)
    grouped = whole.double().view(3, -1)
    torch.testing.assert_close(mean.double(), grouped.mean(1).repeat_interleave(4), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), grouped.var(1, correction=0).repeat_interleave(4), rtol=1e-4, atol=0)


def test_phase_kernels_keep_the_sum_of_the_kernel() -> None:
    weight = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(2))
    for across in phase_kernels(weight):
        for kernel in across:
            torch.testing.assert_close(kernel.sum((2, 3)), weight.sum((2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types_err_no_more_than_plain_does(dtype: torch.dtype) -> None:
    vae = make_vae(seed=4)
    latents = latents_of(vae, 12, 12)
    truth = decode_plain(vae, latents)
    nn.Module.to(vae, dtype)
    plain, exact = (decode(vae, latents.to(dtype)) for decode in (decode_plain, decode_exact))
    assert exact.dtype == dtype
    assert (exact - truth).float().std() <= 1.2 * (plain - truth).float().std()


def test_switches_of_the_vae_are_ignored_and_left_alone(vae: AutoencoderKL) -> None:
    latents = latents_of(vae, 24, 24)  # the tile is 16
    plain = decode_plain(vae, latents)
    vae.enable_tiling()
    try:
        assert torch.equal(decode_plain(vae, latents), plain)
        assert largest_difference(decode_exact(vae, latents), plain) <= TOLERANCE
        assert vae.use_tiling
    finally:
        vae.disable_tiling()
    tiled = decode_tiled(vae, latents)
    assert not vae.use_tiling
    assert largest_difference(tiled, plain) > TOLERANCE


def test_tiny_gets_scaled_unpacked_latents() -> None:
    torch.manual_seed(0)
    tiny = AutoencoderTiny(latent_channels=16).eval()
    space = LATENT_SPACES["flux1"]
    raw = torch.randn(1, 16, 5, 3)
    with torch.inference_mode():
        expected = tiny.decode((raw - space.shift) * space.scale).sample
    assert torch.equal(decode_tiny(tiny, raw, space), expected)


@pytest.mark.parametrize("size", [(16, 16), (24, 17)])
def test_the_estimates_are_within_a_quarter_of_the_measured_peak(size: tuple[int, int]) -> None:
    vae = make_vae((16, 32, 32))
    latents, shape = latents_of(vae, *size), DecoderShape.from_config(vae.config)
    with LiveStorage() as plain:
        decode_plain(vae, latents)
    with LiveStorage() as exact:
        decode_exact(vae, latents)
    assert plain_decode_bytes(shape, *size, "float32") == pytest.approx(plain.peak_bytes, rel=0.25)
    assert plan_decode(shape, *size, "float32").peak_bytes == pytest.approx(exact.peak_bytes, rel=0.25)


def full_size_on_meta() -> AutoencoderKL:
    with torch.device("meta"):
        return make_vae((128, 256, 512, 512), 32, layers_per_block=2)


def test_the_full_size_decoder_needs_less_than_half_and_what_the_plan_says() -> None:
    vae = full_size_on_meta()
    latents = torch.randn(1, 4, 64, 64, device="meta")
    plan = plan_decode(DecoderShape.from_config(vae.config), 64, 64, "float32", strip_bytes=2**24)
    with LiveStorage() as plain:
        decode_plain(vae, latents)
    with LiveStorage() as exact:
        decode_exact(vae, latents, plan=plan)
    assert exact.peak_bytes < 0.5 * plain.peak_bytes
    assert plan.peak_bytes == pytest.approx(exact.peak_bytes, rel=0.25)


def test_no_tensor_of_a_4096_px_decode_reaches_two_to_the_31_elements() -> None:
    vae = full_size_on_meta()
    nn.Module.to(vae, torch.bfloat16)
    latents = torch.randn(1, 4, 512, 512, device="meta", dtype=torch.bfloat16)
    plan = plan_decode(DecoderShape.from_config(vae.config), 512, 512, "bfloat16", strip_bytes=2**29)
    with LiveStorage() as live:
        decode_exact(vae, latents, plan=plan)
    assert live.largest_elements < MAX_ELEMENTS
    assert live.peak_bytes < 23 * 2**30


def test_a_budget_is_kept_by_the_decode(vae: AutoencoderKL) -> None:
    latents = latents_of(vae, 32, 32)
    loose = plan_decode(DecoderShape.from_config(vae.config), 32, 32, "float32").peak_bytes
    with LiveStorage() as live:
        exact = decode_exact(vae, latents, budget_bytes=int(0.85 * loose))
    assert live.peak_bytes <= 0.85 * loose * 1.25
    assert largest_difference(exact, decode_plain(vae, latents)) <= TOLERANCE
    with pytest.raises(DecodeBudgetError):
        decode_exact(vae, latents, budget_bytes=loose // 3)


class OwnConvolution(nn.Conv2d):
    """Computes who knows what."""


class OwnProcessor(AttnProcessor2_0):
    """As above."""


def resnet_of(vae: AutoencoderKL) -> Any:
    return vae.decoder.get_submodule("up_blocks.0.resnets.0")


def change_convolution(vae: AutoencoderKL) -> None:
    resnet_of(vae).conv1 = OwnConvolution(32, 32, 3, padding=1)


def change_stride(vae: AutoencoderKL) -> None:
    resnet_of(vae).conv1 = nn.Conv2d(32, 32, 3, padding=2, dilation=2)


def change_kernel(vae: AutoencoderKL) -> None:
    resnet_of(vae).conv1 = nn.Conv2d(32, 32, 1)


def change_forward(vae: AutoencoderKL) -> None:
    setattr(vae.decoder.conv_out, "forward", lambda rows: rows[:, :3])  # noqa: B010


def change_processor(vae: AutoencoderKL) -> None:
    attention: Any = vae.decoder.get_submodule("mid_block.attentions.0")
    attention.set_processor(OwnProcessor())


def add_hook(vae: AutoencoderKL) -> None:
    vae.decoder.conv_out.register_forward_hook(lambda module, given, result: result * 2)


def change_output_scale(vae: AutoencoderKL) -> None:
    resnet: Any = vae.decoder.get_submodule("mid_block.resnets.0")
    resnet.output_scale_factor = 2.0


def change_activation(vae: AutoencoderKL) -> None:
    resnet: Any = vae.decoder.get_submodule("mid_block.resnets.0")
    resnet.nonlinearity = nn.GELU()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_convolution, "up_blocks.0.resnets.0.conv1 is a OwnConvolution"),
        (change_stride, "up_blocks.0.resnets.0.conv1 is Conv2d"),
        (change_kernel, "up_blocks.0.resnets.0 has kernels"),
        (change_forward, "conv_out has a hook"),
        (change_processor, "mid_block.attentions.0 has the processor OwnProcessor"),
        (add_hook, "conv_out has a hook"),
        (change_output_scale, "mid_block.resnets.0 divides its output by 2.0"),
        (change_activation, "mid_block.resnets.0 has the activation GELU"),
    ],
)
def test_a_decoder_with_another_part_is_refused_by_name(change: Callable[[AutoencoderKL], None], said: str) -> None:
    vae = make_vae()
    change(vae)
    with pytest.raises(UnknownDecoderError, match=said):
        decode_exact(vae, latents_of(vae, 4, 4))


def test_another_autoencoder_is_refused() -> None:
    with pytest.raises(UnknownDecoderError, match="AutoencoderKLFlux2; found AutoencoderTiny"):
        decode_exact(AutoencoderTiny(), torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize(
    "latents", [torch.zeros(1, 5, 4, 4), torch.zeros(4, 4, 4), torch.zeros(1, 4, 4, 4, dtype=torch.float16)], ids=str
)
def test_latents_of_another_shape_or_type_are_refused(vae: AutoencoderKL, latents: Tensor) -> None:
    with pytest.raises(ValueError, match="latents"):
        decode_exact(vae, latents)
