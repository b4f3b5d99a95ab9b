"""`Vae` against the real classes of diffusers, small, with random weights: each image is that of the class itself."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
    AutoencoderTiny,
)
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from giantleap.models.bundle.bundle import ModelSource
from giantleap.models.latent_space import LATENT_SPACES, LatentSpaceError
from giantleap.models.vae.autoencoder import Vae, VaeError, choose_vae_dtype, read_tiny
from giantleap.models.vae.strip_plan import (
    DecodeBudgetError,
    DecoderShape,
    plain_decode_bytes,
    plan_decode,
    prefers_strips,
)
from tests.tensors import largest_difference
from tests.tiny_pipelines import tiny_dc_vae

CPU = torch.device("cpu")
TOLERANCE = 1e-4
KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 16, 16),
    "norm_num_groups": 4,
    "sample_size": 64,
}
FLOW = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


@dataclass(frozen=True)
class Family:
    """A latent space, how its VAE is built small, and what its pipeline does around `encode` and `decode`."""

    space: str
    build: Callable[[], Any]
    frames: bool = False
    strips: bool = False


FAMILIES = [
    Family("sd15", lambda: AutoencoderKL(**KL), strips=True),
    Family("sdxl", lambda: AutoencoderKL(**KL), strips=True),
    Family("sd3", lambda: AutoencoderKL(**KL, **FLOW), strips=True),
    Family("flux1", lambda: AutoencoderKL(**KL, **FLOW), strips=True),
    Family("z-image", lambda: AutoencoderKL(**KL, **FLOW), strips=True),
    Family("flux2", lambda: AutoencoderKLFlux2(**KL), strips=True),
    Family("qwen-image", lambda: AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1), True),
    Family("wan21", lambda: AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1), True),
    Family("sana", lambda: tiny_dc_vae(32, (8, 8, 8, 8, 8, 32), attention=3), strips=True),
    Family(
        "qwen-image-21",
        lambda: AutoencoderKLQwenImage21(
            base_dim=4, decoder_base_dim=4, dim_mult=[1, 1, 1, 2, 2], num_res_blocks=1
        ),
        True,
    ),
]  # fmt: skip
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.space)


def build(family: Family) -> Any:
    """The model with norms and biases that are not trivial."""
    torch.manual_seed(3)
    model = family.build().eval()
    for module in model.modules():
        if isinstance(module, nn.GroupNorm | RMSNorm):
            nn.init.normal_(module.get_parameter("weight"), 1.0, 0.3)
            nn.init.normal_(module.get_parameter("bias"), 0.0, 0.3)
    return model


def vae_of(family: Family, **options: Any) -> Vae:
    return Vae(build(family), LATENT_SPACES[family.space], **options)


def latents_of(family: Family, height: int, width: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, LATENT_SPACES[family.space].channels, height, width, generator=generator)


def images_of(height_px: int, width_px: int, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, height_px, width_px, generator=torch.Generator().manual_seed(2)) * 2 - 1


@torch.inference_mode()
def own_decode(family: Family, model: Any, raw: Tensor) -> Tensor:
    """As the family's pipeline calls the class."""
    image: Tensor = model.decode(raw[:, :, None] if family.frames else raw, return_dict=False)[0]
    return image[:, :, 0] if family.frames else image


@every_family
@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3)])
def test_exact_is_the_image_of_the_class(family: Family, height: int, width: int) -> None:
    raw, stride_px = latents_of(family, height, width, batch=2), LATENT_SPACES[family.space].stride_px
    found = vae_of(family).decode(raw)
    assert found.shape == (2, 3, height * stride_px, width * stride_px) and found.dtype == torch.float32
    expected = own_decode(family, build(family), raw)
    assert largest_difference(found, expected[:, :3]) <= TOLERANCE
    assert expected.std() > 0.01, "the weights take part"


@every_family
def test_encode_and_decode_are_the_forward_of_the_class(family: Family) -> None:
    images, model = images_of(64, 96), build(family)
    given = images
    if family.space == "qwen-image-21":
        given = torch.cat([images, torch.ones(1, 1, 64, 96)], dim=1)
    given = given[:, :, None] if family.frames else given
    with torch.inference_mode():
        if family.space == "sana":
            mean, whole = model.encode(given).latent, model(given).sample
        else:
            mean, whole = model.encode(given).latent_dist.mode(), model(given, sample_posterior=False).sample
    vae = vae_of(family)
    raw = vae.encode(images)
    LATENT_SPACES[family.space].check_raw(tuple(raw.shape))
    assert largest_difference(raw, mean[:, :, 0] if family.frames else mean) <= TOLERANCE
    assert largest_difference(vae.decode(raw), (whole[:, :, 0] if family.frames else whole)[:, :3]) <= TOLERANCE


@pytest.mark.parametrize("name", ["sdxl", "flux1", "flux2"])
@pytest.mark.parametrize("size", [(17, 11), (9, 23), (16, 16)])
def test_strips_under_a_budget_give_the_image_of_the_class(name: str, size: tuple[int, int]) -> None:
    family = next(family for family in FAMILIES if family.space == name)
    model, raw = build(family), latents_of(family, *size)
    shape = DecoderShape.from_config(model.config)
    budget_bytes = int(1.1 * plan_decode(shape, *size, "float32", strip_bytes=2**12).peak_bytes)
    assert budget_bytes < plain_decode_bytes(shape, *size, "float32")
    vae = Vae(model, LATENT_SPACES[name], budget_bytes=budget_bytes)
    assert vae.works_in_strips(tuple(raw.shape), budget_bytes)
    assert largest_difference(vae.decode(raw), own_decode(family, build(family), raw)) <= TOLERANCE


def test_a_decoder_of_flux2_with_widths_of_its_own_works_in_strips() -> None:
    config = {**KL, "decoder_block_out_channels": (4, 8, 8, 32)}
    family = Family("flux2", lambda: AutoencoderKLFlux2(**config))
    raw = latents_of(family, 32, 35)
    vae = vae_of(family)
    assert DecoderShape.from_config(vae.model.config).channels == (32, 8, 8, 4)
    assert vae.works_in_strips(tuple(raw.shape))
    assert largest_difference(vae.decode(raw), own_decode(family, build(family), raw)) <= TOLERANCE


@every_family
def test_only_a_decoder_that_is_known_part_by_part_works_in_strips(family: Family) -> None:
    raw = latents_of(family, 4, 4)
    vae = vae_of(family, budget_bytes=1000)  # nothing fits into this
    assert vae.works_in_strips(tuple(raw.shape), 1000) == family.strips
    if family.strips:
        with pytest.raises(DecodeBudgetError, match="1000 are allowed"):
            vae.decode(raw)
    else:
        assert largest_difference(vae.decode(raw), own_decode(family, build(family), raw)[:, :3]) <= TOLERANCE


SDXL_SHAPE = DecoderShape(4, 3, (512, 512, 256, 128))


@pytest.mark.parametrize(
    ("side", "dtype", "device", "batch", "budget_bytes", "strips"),
    [
        (16, "float32", "cpu", 1, None, False),  # small: strips cost more than they save
        (32, "float32", "cpu", 1, None, True),
        (128, "bfloat16", "cpu", 1, None, False),
        (128, "float32", "cuda", 1, None, False),
        (128, "float32", "cuda", 1, 4 * 2**30, False),  # 3 GiB
        (128, "float32", "cuda", 1, 2 * 2**30, True),
        (128, "bfloat16", "cuda", 1, 2 * 2**30, False),
        (128, "bfloat16", "cuda", 2, 2 * 2**30, True),
        (256, "bfloat16", "cuda", 1, None, False),
        (256, "bfloat16", "cuda", 2, None, True),  # 2^31 elements
        (512, "bfloat16", "cuda", 1, None, True),
    ],
)
def test_strips_are_taken_for_memory_and_where_they_are_faster(
    side: int, dtype: str, device: str, batch: int, budget_bytes: int | None, strips: bool
) -> None:
    found = prefers_strips(SDXL_SHAPE, side, side, dtype, batch=batch, device=device, budget_bytes=budget_bytes)
    assert found == strips


@every_family
def test_tiled_is_that_of_the_class_and_leaves_no_switch_behind(family: Family) -> None:
    # Larger than a tile: 64 px for the small image VAEs, 256 px for the video VAEs, 512 px for Sana's.
    side = 18 if family.space in ("qwen-image-21", "sana") else 34 if family.frames else 12
    raw, vae = latents_of(family, side, 4), vae_of(family)
    exact = vae.decode(raw)
    tiled = vae.decode(raw, "tiled")
    assert vae.model.use_tiling is False
    model = build(family)
    model.enable_tiling()
    assert largest_difference(tiled, own_decode(family, model, raw)[:, :3]) <= TOLERANCE
    assert largest_difference(tiled, exact) > TOLERANCE
    vae.model.enable_tiling()  # by somebody else
    assert largest_difference(vae.decode(raw), exact) <= TOLERANCE
    assert vae.model.use_tiling is True


def test_an_image_is_encoded_whole_whatever_the_switches_say() -> None:
    vae = vae_of(FAMILIES[1])
    images = images_of(96, 128)
    whole = vae.encode(images)
    vae.model.enable_tiling()
    assert torch.equal(vae.encode(images), whole)
    assert vae.model.use_tiling is True


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux1", "z-image"])
def test_tiny_gets_scaled_latents_that_are_not_packed(name: str) -> None:
    family = next(family for family in FAMILIES if family.space == name)
    space = LATENT_SPACES[name]
    torch.manual_seed(0)
    tiny: Any = AutoencoderTiny(latent_channels=space.channels)
    raw = latents_of(family, 5, 3)
    with torch.inference_mode():
        expected = tiny.decode((raw - space.shift) * space.scale).sample
    vae = vae_of(family, tiny=tiny)
    assert vae.decodes == ("exact", "tiled", "tiny")
    assert torch.equal(vae.decode(raw, "tiny"), expected)
    assert expected.shape == (1, 3, 40, 24)


def test_a_tiny_vae_is_read_from_safetensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved: Any = AutoencoderTiny(num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1))
    saved.save_pretrained(tmp_path)
    tiny = read_tiny(ModelSource(tmp_path), CPU, torch.bfloat16)
    family = FAMILIES[1]
    preview = vae_of(family, tiny=tiny).decode(latents_of(family, 3, 4), "tiny")
    assert preview.shape == (1, 3, 24, 32) and preview.dtype == torch.float32
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "away")
    with pytest.raises(OSError, match="safetensors"):
        read_tiny(ModelSource(tmp_path), CPU, torch.float32)


@pytest.mark.parametrize(
    ("force_upcast", "latent_channels", "dtype", "expected"),
    [
        (True, 4, torch.float16, torch.float32),  # SDXL
        (False, 4, torch.float16, torch.float16),  # its fp16-fix
        (True, 16, torch.float16, torch.bfloat16),  # FLUX.1, SD3, Z-Image
        (None, 32, torch.float16, torch.bfloat16),  # FLUX.2, and the video VAEs
        (None, 4, torch.float16, torch.float32),
        (True, 4, torch.bfloat16, torch.bfloat16),
        (True, 4, torch.float32, torch.float32),
        (False, 16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_float16_is_for_vaes_that_say_that_they_stand_it(
    force_upcast: bool | None, latent_channels: int, dtype: torch.dtype, expected: torch.dtype
) -> None:
    assert choose_vae_dtype(force_upcast, latent_channels, dtype) == expected


@pytest.mark.parametrize(
    ("space", "changes", "expected"),
    [
        ("sdxl", {}, torch.float32),
        ("sdxl", {"force_upcast": False}, torch.float16),
        ("flux1", FLOW, torch.bfloat16),
    ],
)
def test_the_model_is_in_the_type_of_its_family(space: str, changes: dict[str, Any], expected: torch.dtype) -> None:
    half: Any = AutoencoderKL(**KL, **changes)
    vae = Vae(half.half(), LATENT_SPACES[space])
    assert vae.dtype == vae.model.dtype == expected
    vae = Vae(AutoencoderKL(**KL, **changes), LATENT_SPACES[space], dtype=torch.float16)
    assert vae.dtype == vae.model.dtype == expected


def test_a_pipeline_that_moved_the_model_to_another_type_does_no_harm() -> None:
    vae, raw = vae_of(FAMILIES[1]), latents_of(FAMILIES[1], 4, 4)
    before = vae.decode(raw)
    vae.model.to(torch.bfloat16)  # as StableDiffusionXLImg2ImgPipeline does after encoding
    again = vae.decode(raw)
    assert vae.model.dtype == torch.float32
    assert largest_difference(again, before) < 0.1, "only the weights were rounded"
    vae.model.to(torch.bfloat16)
    assert vae.encode(images_of(16, 16)).dtype == torch.float32


def test_bfloat16_gives_nearly_the_image_of_float32() -> None:
    family = FAMILIES[3]
    raw = latents_of(family, 6, 6).to(torch.float64)
    exact, half = vae_of(family).decode(raw), vae_of(family, dtype=torch.bfloat16).decode(raw)
    assert half.dtype == torch.float32
    assert 0 < (exact - half).abs().mean() < 0.05 * exact.std()


def test_a_value_that_is_not_finite_can_be_seen() -> None:
    for family in FAMILIES[1], FAMILIES[6]:
        raw = latents_of(family, 4, 4)
        raw[0, 1, 2, 2] = float("nan")
        assert not vae_of(family).decode(raw).isfinite().all()


def test_transparency_is_dropped() -> None:
    family = FAMILIES[-1]
    raw = latents_of(family, 2, 3)
    rgba = own_decode(family, build(family), raw)
    assert rgba.shape[1] == 4
    assert largest_difference(vae_of(family).decode(raw), rgba[:, :3]) <= TOLERANCE


@pytest.mark.parametrize(
    ("space", "model", "said"),
    [
        ("sdxl", lambda: AutoencoderKL(**KL, **FLOW), "has 16 latent channels and a stride of 8 px; latent space sdxl"),
        ("flux2", lambda: AutoencoderKL(**KL, **FLOW), "AutoencoderKL has 16 latent channels.*latent space flux2"),
        ("sdxl", lambda: AutoencoderKL(), "a stride of 1 px; latent space sdxl has 4 and 8"),
        ("qwen-image", FAMILIES[-1].build, "has 64 latent channels and a stride of 16 px"),
        ("sdxl", lambda: AutoencoderTiny(), "a VAE is one of AutoencoderKL, .*; found AutoencoderTiny"),
        ("sdxl", lambda: nn.Identity(), "found Identity"),
    ],
)
def test_a_vae_of_another_family_is_refused(space: str, model: Callable[[], Any], said: str) -> None:
    with pytest.raises(VaeError, match=said):
        Vae(model(), LATENT_SPACES[space])


@pytest.mark.parametrize(
    ("space", "tiny", "said"),
    [
        ("sdxl", lambda: AutoencoderTiny(latent_channels=16), "16 latent channels; latent space sdxl has 4"),
        ("flux2", lambda: AutoencoderTiny(latent_channels=32), "no AutoencoderTiny is known"),
        ("sdxl", lambda: AutoencoderKL(**KL), "a tiny VAE is an AutoencoderTiny; found AutoencoderKL"),
    ],
)
def test_a_tiny_vae_of_another_family_is_refused(space: str, tiny: Callable[[], Any], said: str) -> None:
    family = next(family for family in FAMILIES if family.space == space)
    with pytest.raises(VaeError, match=said):
        vae_of(family, tiny=tiny())


def test_what_is_no_latent_or_no_image_is_refused() -> None:
    vae = vae_of(FAMILIES[1])
    assert vae.decodes == ("exact", "tiled")
    with pytest.raises(LatentSpaceError, match=r"sdxl takes raw latents .* looks like sd3"):
        vae.decode(torch.zeros(1, 16, 4, 4))
    with pytest.raises(VaeError, match="decode 'tiny': this VAE has exact, tiled; tiny needs a tiny VAE"):
        vae.decode(torch.zeros(1, 4, 4, 4), "tiny")
    with pytest.raises(VaeError, match=r"\[batch, 3, height, width\]; found \[3, 16, 16\]"):
        vae.encode(torch.zeros(3, 16, 16))
    with pytest.raises(VaeError, match="multiples of 8 px in latent space sdxl; found 17x16"):
        vae.encode(torch.zeros(1, 3, 16, 17))


def test_classes_without_a_latent_space_here_stay_unknown() -> None:
    with torch.device("meta"):
        other = AsymmetricAutoencoderKL()
    with pytest.raises(VaeError, match="found AsymmetricAutoencoderKL"):
        Vae(other, LATENT_SPACES["sdxl"])
