"""Strip heights from budgets and the estimates of peak memory, as arithmetic; held to real decodes in test_decode."""

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from giantleap.models.vae.strip_plan import (
    MAX_ELEMENTS,
    DecodeBudgetError,
    DecoderShape,
    plain_decode_bytes,
    plan_decode,
)

SDXL = DecoderShape(latent_channels=4, image_channels=3, channels=(512, 512, 256, 128))
SDXL_CONFIG: dict[str, Any] = {
    "latent_channels": 4,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "sample_size": 1024,
}
GIB = 2**30


def plain_bytes(image_px: int, dtype: str, batch: int = 1) -> int:
    return plain_decode_bytes(SDXL, image_px // 8, image_px // 8, dtype, batch)


def exact_bytes(image_px: int, dtype: str, batch: int = 1) -> int:
    return plan_decode(SDXL, image_px // 8, image_px // 8, dtype, batch=batch).peak_bytes


def test_the_shape_is_read_from_a_configuration() -> None:
    assert DecoderShape.from_config(SDXL_CONFIG) == SDXL
    assert SDXL.stride_px == 8


def test_a_configuration_with_other_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="AttnUpDecoderBlock2D"):
        DecoderShape.from_config({**SDXL_CONFIG, "up_block_types": ["AttnUpDecoderBlock2D"] * 4})


def test_exact_needs_less_than_half_of_plain_from_512_px_on() -> None:
    for image_px in (512, 1024, 2048, 4096):
        for dtype in ("float32", "bfloat16"):
            assert exact_bytes(image_px, dtype) < 0.5 * plain_bytes(image_px, dtype)


def test_a_4096_px_image_fits_a_24_gb_card_only_with_the_exact_decode() -> None:
    card_bytes = 23 * GIB
    assert plain_bytes(4096, "float32") > card_bytes
    assert exact_bytes(4096, "float32") < card_bytes
    assert exact_bytes(4096, "bfloat16") < card_bytes / 2


def test_no_strip_and_no_chunk_of_scores_reaches_two_to_the_31_elements() -> None:
    for image_px in (1024, 4096, 8192):
        side = image_px // 8
        plan = plan_decode(SDXL, side, side, "bfloat16")
        for stage, rows in enumerate(plan.strip_rows):
            assert (rows + 2) * (side << stage) * 512 < MAX_ELEMENTS
        assert plan.attention_queries * side * side <= MAX_ELEMENTS
        assert 512 * side * side <= MAX_ELEMENTS  # keys and values are whole


def test_a_batch_costs_only_its_images_when_it_is_decoded_one_by_one() -> None:
    images_bytes = 7 * 3 * 1024**2 * 4
    assert exact_bytes(1024, "float32", batch=8) == exact_bytes(1024, "float32") + images_bytes
    assert plain_bytes(1024, "float32", batch=8) == 8 * plain_bytes(1024, "float32")


def test_a_smaller_budget_gives_thinner_strips_and_is_kept() -> None:
    free = plan_decode(SDXL, 128, 128, "float32")
    tight_bytes = free.peak_bytes - 20 * 2**20
    tight = plan_decode(SDXL, 128, 128, "float32", budget_bytes=tight_bytes)
    assert tight.peak_bytes <= tight_bytes
    assert tight.strip_rows < free.strip_rows


def test_a_budget_below_the_thinnest_strips_is_refused_with_both_figures() -> None:
    with pytest.raises(DecodeBudgetError, match=rf"needs \d+ bytes.*{GIB // 2} are allowed"):
        plan_decode(SDXL, 128, 128, "float32", budget_bytes=GIB // 2)


@pytest.mark.parametrize(("size", "dtype"), [((0, 8), "float32"), ((8, -1), "float32"), ((8, 8), "float64")])
def test_sizes_and_dtypes_that_do_not_exist_are_refused(size: tuple[int, int], dtype: str) -> None:
    with pytest.raises(ValueError):
        plan_decode(SDXL, *size, dtype)
    with pytest.raises(ValueError):
        plain_decode_bytes(SDXL, *size, dtype)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["float32", "bfloat16"]), st.integers(0, 2**26))
def test_strips_are_even_after_the_first_stage_and_never_empty(
    height: int, width: int, dtype: str, strip_bytes: int
) -> None:
    plan = plan_decode(SDXL, height, width, dtype, strip_bytes=strip_bytes)
    assert 1 <= plan.strip_rows[0] <= height
    assert all(rows >= 2 and rows % 2 == 0 for rows in plan.strip_rows[1:])
    assert 1 <= plan.attention_queries <= height * width


def test_the_estimate_needs_no_torch() -> None:
    code = "import sys, giantleap.models.vae.strip_plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
