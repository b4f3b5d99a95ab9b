"""A compiled decoder: one compilation for all sizes, compared when it is loaded, used where the whole image fits.

The backend "eager" follows a decoder as the compiler does, so that all but the marked tests need no C++ compiler.
"""

import gc
import logging
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from giantleap.models.latent_space import LATENT_SPACES, LatentSpace
from giantleap.models.vae.autoencoder import DecodeWay, Vae, VaeError
from giantleap.models.vae.compiled import CompiledDecoder, check_parity, choose_examples, compile_decoder
from giantleap.models.vae.dc_strips import STRIPS_FAST_PX
from giantleap.models.vae.decode import decode_plain
from giantleap.models.vae.strip_plan import STRIPS_FASTER_PX
from tests.tiny_pipelines import tiny_dc_vae, tiny_sd15


def open_kl() -> Vae:
    pipeline: Any = tiny_sd15()
    return Vae(pipeline.vae, LATENT_SPACES["sd15"])


def open_dc(dtype: torch.dtype = torch.float32, **config: Any) -> Vae:
    torch.manual_seed(0)
    model = tiny_dc_vae(latent_channels=8, channels=(8, 16, 8), attention=0, **config)
    return Vae(model.to(dtype), LatentSpace("tiny", 8, 4, scale=1.0))


SIZES = ((6, 7), (16, 24))
OPENERS = pytest.mark.parametrize("open_vae", [open_kl, open_dc], ids=["kl", "dc"])


def latents_of(vae: Vae, height: int, width: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, vae.latent_space.channels, height, width, generator=generator)


class Ways:
    """Notes how images were decoded."""

    def __init__(self, vae: Vae) -> None:
        self.seen: list[tuple[DecodeWay, int]] = []
        vae.on_decode = lambda way, images: self.seen.append((way, images))


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the module logged; diffusers warns of types."""
    return [record.getMessage() for record in caplog.records if record.name == compile_decoder.__module__]


def test_an_image_that_differs_by_more_than_rounding_stops_the_load() -> None:
    image = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4)
    assert check_parity(image, image + 1e-5, torch.float32, "AutoencoderKL") == pytest.approx(1e-5, rel=0.1)
    check_parity(image, image + 5e-3, torch.bfloat16, "AutoencoderKL")
    for other, dtype in ((image + 1e-3, torch.float32), (image.flip(3), torch.bfloat16), (image / 0, torch.float16)):
        with pytest.raises(VaeError, match=r"compiled decoder of AutoencoderKL differs by .*; leave it out"):
            check_parity(image, other, dtype, "AutoencoderKL")


def test_a_machine_without_a_compiler_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_found() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none_found)
    vae = open_kl()
    with pytest.raises(VaeError, match=r"modes\.compile_vae on a CPU needs a C\+\+ compiler: no compiler; install one"):
        compile_decoder(vae, SIZES)
    assert vae.compiled is None


def test_a_decoder_that_the_compiler_cannot_follow_stops_the_load() -> None:
    class Branch(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values if values.sum() > 0 else values / 2

    vae = open_kl()
    vae.model.decoder.conv_act = Branch()
    with pytest.raises(
        VaeError, match=r"the decoder of AutoencoderKL does not compile \(.+\); leave it out"
    ) as stopped:
        compile_decoder(vae, SIZES, "eager")
    assert "\n" not in str(stopped.value) and vae.compiled is None


def test_sizes_with_many_values_are_of_one_kind() -> None:
    assert choose_examples(4, [(32, 32), (128, 128), (512, 512)]) == [(32, 32), (72, 73)]
    assert choose_examples(24, [(32, 32), (64, 64), (128, 128)]) == [(30, 31)]
    assert all(
        channels * math.prod(choose_examples(channels, [(999, 999)])[0]) > 20_480 for channels in (4, 16, 24, 32)
    )


@OPENERS
def test_one_load_serves_every_size_and_batch(open_vae: Any, caplog: pytest.LogCaptureFixture) -> None:
    vae = open_vae()
    with caplog.at_level(logging.INFO):
        compile_decoder(vae, SIZES, "eager")
    assert messages(caplog) == ["decoder compiled"]
    ways = Ways(vae)
    for height, width, batch in ((6, 10, 1), (9, 9, 2), (16, 7, 3), (24, 16, 1)):
        raw = latents_of(vae, height, width, batch)
        torch.testing.assert_close(vae.decode(raw), decode_plain(vae.model, raw), rtol=1e-4, atol=1e-5)
    assert ways.seen == [("compiled", 1), ("compiled", 2), ("compiled", 3), ("compiled", 1)]
    assert messages(caplog) == ["decoder compiled"]


@OPENERS
def test_a_size_that_is_not_covered_is_compiled_and_says_so(open_vae: Any, caplog: pytest.LogCaptureFixture) -> None:
    vae = open_vae()
    compile_decoder(vae, SIZES, "eager")
    ways, raw = Ways(vae), latents_of(vae, 1, 5)  # the compiler takes a size of 1 for a constant
    torch.testing.assert_close(vae.decode(raw), decode_plain(vae.model, raw), rtol=1e-4, atol=1e-5)
    assert vae.decode(raw).shape[2] == vae.latent_space.stride_px
    assert ways.seen == [("recompiled", 1), ("compiled", 1)]
    assert messages(caplog) == ["decoder compiled again"] and caplog.records[-1].levelno == logging.WARNING


@OPENERS
def test_without_the_memory_of_the_whole_image_it_is_decoded_in_strips(open_vae: Any) -> None:
    vae = open_vae()
    compile_decoder(vae, SIZES, "eager")
    ways, raw, budget_bytes = Ways(vae), latents_of(vae, 48, 20), 1 << 26
    while vae.works_compiled(tuple(raw.shape), budget_bytes):
        budget_bytes = budget_bytes * 9 // 10
    vae.budget_bytes = budget_bytes
    torch.testing.assert_close(vae.decode(raw), decode_plain(vae.model, raw), rtol=1e-4, atol=1e-5)
    vae.budget_bytes = None
    vae.decode(raw, "tiled")
    assert ways.seen == [("strips", 1), ("tiled", 1)]


def test_strips_that_are_only_faster_give_way_where_that_was_measured() -> None:
    kl, dc = open_kl(), open_dc()
    large = (1, 8, 256, 256)  # 2048 px of one, 1024 px of the other
    assert STRIPS_FASTER_PX <= 256 * 8 * 256 * 8 and STRIPS_FAST_PX <= (256 * 4) ** 2
    for vae in (kl, dc):
        assert vae.works_in_strips(large) and not vae.works_compiled(large)
        vae.compiled = CompiledDecoder(vae.model, "eager")
    assert dc.works_compiled(large, 1 << 40) and not dc.works_compiled(large, 1000)
    assert not dc.works_compiled(large), "nobody says how much memory there is"
    assert not kl.works_compiled(large, 1 << 40) and kl.works_compiled((1, 4, 8, 8))
    fits_one = int(1.5 * 8 * 8 * 2**10 * 64)
    assert kl.works_compiled((4, 4, 8, 8), fits_one) == kl.works_compiled((1, 4, 8, 8), fits_one), "one at a time"


def test_progress_is_reported_after_each_image() -> None:
    vae = open_dc()
    compile_decoder(vae, SIZES, "eager")
    parts: list[float | None] = []
    vae.decode(latents_of(vae, 6, 10, 2), on_part=parts.append)
    assert parts == [0.5, 1.0]


def test_a_type_that_a_pipeline_changed_comes_back_without_another_compilation() -> None:
    vae = open_kl()
    compile_decoder(vae, SIZES, "eager")
    ways, raw = Ways(vae), latents_of(vae, 6, 10)
    before = vae.decode(raw)
    vae.model.to(torch.float64).to(torch.bfloat16)
    assert torch.allclose(vae.decode(raw), before, atol=0.1)
    assert ways.seen == [("compiled", 1), ("compiled", 1)]


@OPENERS
def test_an_evicted_decoder_is_freed_and_compiled_again_when_it_returns(open_vae: Any) -> None:
    vae = open_vae()
    compile_decoder(vae, SIZES, "eager")
    expected = vae.decode(latents_of(vae, 6, 10))
    watched = [weakref.ref(vae.model), *map(weakref.ref, vae.model.decoder.parameters())]
    del vae
    gc.collect()
    assert not any(each() is not None for each in watched)
    returned = open_vae()
    compile_decoder(returned, SIZES, "eager")
    ways = Ways(returned)
    assert torch.equal(returned.decode(latents_of(returned, 6, 10)), expected)
    assert ways.seen == [("compiled", 1)]


@pytest.mark.compiler
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("open_vae", "dtype"),
    [(open_kl, torch.float32), (open_dc, torch.float32), (open_dc, torch.bfloat16)],
    ids=["kl", "dc", "dc bfloat16"],
)
def test_compiled_code_gives_the_image_of_the_plain_decoder(
    open_vae: Any, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    vae = open_vae() if dtype == torch.float32 else open_vae(dtype)
    compile_decoder(vae, SIZES)
    ways, tolerance = Ways(vae), 1e-4 if dtype == torch.float32 else 3e-2
    for height, width, batch in ((6, 10, 1), (9, 9, 2), (16, 7, 1)):
        raw = latents_of(vae, height, width, batch)
        plain = decode_plain(vae.model, raw.to(dtype)).float()
        torch.testing.assert_close(vae.decode(raw), plain, rtol=1e-3, atol=tolerance)
    watched = weakref.ref(vae.model)
    assert {way for way, _ in ways.seen} == {"compiled"} and "decoder compiled again" not in messages(caplog)
    del vae, ways
    gc.collect()
    assert watched() is None
