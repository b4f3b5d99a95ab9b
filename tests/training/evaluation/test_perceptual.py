"""The measures that need no weights know the better picture, and say why they are missing."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.training.evaluation.metrics import NotAvailableError
from giantleap.training.evaluation.perceptual import Jod, flip, ms_ssim


@pytest.fixture(scope="module")
def photo() -> Tensor:
    noise = torch.rand(1, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(noise, 9, stride=1, padding=4)
    return ((((smooth - 0.5) * 4.0).clamp(-1.0, 1.0) + 1) * 127.5).round().to(torch.uint8)


@pytest.fixture(scope="module")
def blurred(photo: Tensor) -> list[Tensor]:
    return [F.avg_pool2d(photo.float(), size, stride=1, padding=size // 2).round().to(torch.uint8) for size in (3, 9)]


def test_structure_and_flip_know_the_better_picture(photo: Tensor, blurred: list[Tensor]) -> None:
    assert ms_ssim(photo, photo) == pytest.approx(1.0, abs=1e-5) and flip(photo, photo) == pytest.approx(0.0, abs=1e-6)
    assert 1.0 > ms_ssim(blurred[0], photo) > ms_ssim(blurred[1], photo)
    assert 0.0 < flip(blurred[0], photo) < flip(blurred[1], photo)


def test_jod_knows_the_better_picture(photo: Tensor, blurred: list[Tensor]) -> None:
    pytest.importorskip("pycvvdp", exc_type=ImportError)
    jod = Jod()
    assert jod(photo, photo) == pytest.approx(10.0)
    assert 10.0 > jod(blurred[0], photo) > jod(blurred[1], photo)


def test_small_pictures_have_no_ms_ssim(photo: Tensor) -> None:
    small = photo[..., :175, :]
    with pytest.raises(NotAvailableError, match=r"sides of 176 px; found \[175, 384\]"):
        ms_ssim(small, small)
    assert ms_ssim(photo[..., :176, :176], photo[..., :176, :176]) == pytest.approx(1.0, abs=1e-5)


def test_a_package_that_is_missing_is_named(photo: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pycvvdp", "flip_evaluator"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NotAvailableError, match="pip install cvvdp"):
        Jod()
    with pytest.raises(NotAvailableError, match="pip install flip-evaluator"):
        flip(photo, photo)


def test_a_torchvision_of_another_build_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pycvvdp.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    monkeypatch.delitem(sys.modules, "pycvvdp", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NotAvailableError, match="torchvision::nms"):
        Jod()
