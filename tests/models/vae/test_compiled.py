"""A compiled decoder: compared when it is loaded, refused where it differs, and its progress reported at the end."""

from typing import Any

import pytest
import torch

from giantleap.models.latent_space import LATENT_SPACES
from giantleap.models.vae.autoencoder import Vae, VaeError
from giantleap.models.vae.compiled import check_parity, compile_decoder
from giantleap.models.vae.decode import decode_plain
from tests.tiny_pipelines import tiny_sd15


def open_vae() -> Vae:
    pipeline: Any = tiny_sd15()
    return Vae(pipeline.vae, LATENT_SPACES["sd15"])


def test_an_image_that_differs_by_more_than_rounding_stops_the_load() -> None:
    image = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4)
    check_parity(image, image + 1e-5, torch.float32, "AutoencoderKL")
    check_parity(image, image + 5e-3, torch.bfloat16, "AutoencoderKL")
    for other, dtype in ((image + 1e-3, torch.float32), (image.flip(3), torch.bfloat16), (image / 0, torch.float16)):
        with pytest.raises(VaeError, match=r"compiled decoder of AutoencoderKL differs by .*; leave it out"):
            check_parity(image, other, dtype, "AutoencoderKL")


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_found() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none_found)
    vae = open_vae()
    with pytest.raises(VaeError, match=r"modes\.compile_vae on a CPU needs a C\+\+ compiler: no compiler"):
        compile_decoder(vae)


def test_a_compiled_decoder_reports_once_and_runs_no_hook_of_its_layers() -> None:
    vae = open_vae()
    raw = torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(1))
    plain = decode_plain(vae.model, raw)
    vae.model.decoder.compile(backend="eager")
    parts: list[float | None] = []
    assert torch.equal(decode_plain(vae.model, raw, parts.append), plain)
    assert parts == [1.0]


@pytest.mark.compiler
def test_a_compiled_decoder_gives_the_image_of_the_plain_one() -> None:
    vae = open_vae()
    raw = torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(1))
    plain = decode_plain(vae.model, raw)
    compile_decoder(vae)
    torch.testing.assert_close(decode_plain(vae.model, raw), plain, rtol=1e-3, atol=1e-4)
