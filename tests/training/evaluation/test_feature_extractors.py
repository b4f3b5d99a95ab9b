"""The networks of perceptual metrics: what they compute from given weights, and that bad weights are named."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.training.evaluation.feature_extractors import ClipScore, Inception, Lpips, open_networks
from giantleap.training.evaluation.metrics import NotAvailableError
from tests.training.evaluation.random_networks import write_random_inception, write_tiny_clip

CPU = torch.device("cpu")
ALEXNET = ((0, 64, 3, 11), (3, 192, 64, 5), (6, 384, 192, 3), (8, 256, 384, 3), (10, 256, 256, 3))


def levels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in torchvision's layout, those of the classifier among them."""
    generator = torch.Generator().manual_seed(0)
    state = {"classifier.6.bias": torch.zeros(1000)}
    for index, rows, columns, side in ALEXNET:
        weight = torch.randn(rows, columns, side, side, generator=generator)
        state[f"features.{index}.weight"] = weight / (columns * side**2) ** 0.5
        state[f"features.{index}.bias"] = 0.1 * torch.randn(rows, generator=generator)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(state, path)
    return path


def test_lpips_is_a_distance_that_follows_its_formula(alexnet: Path) -> None:
    lpips = Lpips(alexnet, CPU)
    one, two = levels(2, 3, 64, 64), levels(2, 3, 64, 64, seed=1)
    assert lpips(one, one).tolist() == [0.0, 0.0]
    assert torch.equal(lpips(one, two), lpips(two, one))
    near = one.int().add(8).clamp(0, 255).to(torch.uint8)
    assert bool((lpips(near, one) > 0).all() and (lpips(near, one) < lpips(two, one)).all())

    state, total = torch.load(alexnet, weights_only=True), torch.zeros(2)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    maps = [((x.float() / 127.5 - 1 - shift) / scale) for x in (one, two)]
    weights = torch.load(lpips_weights(), "cpu", weights_only=True)
    for tap, (index, _, _, side) in enumerate(ALEXNET):
        stride, padding = (4, 2) if index == 0 else (1, side // 2)
        if index in (3, 6):
            maps = [F.max_pool2d(x, 3, 2) for x in maps]
        bias = state[f"features.{index}.bias"]
        maps = [F.relu(F.conv2d(x, state[f"features.{index}.weight"], bias, stride, padding)) for x in maps]
        unit = [x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-5) for x in maps]
        linear = weights[f"lin{tap}.model.1.weight"].view(1, -1, 1, 1)
        total += (linear * (unit[0] - unit[1]).square()).sum(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(lpips(one, two), total, rtol=1e-4, atol=1e-6)


def lpips_weights() -> Path:
    import torchmetrics

    return Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "alex.pth"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


def test_clip_score_is_a_hundred_cosines_of_one_picture_and_its_words(clip: Path) -> None:
    score = ClipScore(str(clip), CPU)
    pictures, words = levels(2, 3, 48, 40), ["a red ball", "sky"]
    found = score(pictures, words)
    assert found.shape == (2,) and bool(((found >= 0) & (found <= 100)).all())
    for index in range(2):
        alone = score(pictures[index : index + 1], [words[index]])
        torch.testing.assert_close(alone[0], found[index], rtol=1e-3, atol=1e-3)
    inputs = score._processor(text=words, images=list(pictures), return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = score._model(**inputs).logits_per_image
        cosines = logits.diagonal() / score._model.logit_scale.exp()
    torch.testing.assert_close(found, (100 * cosines).clamp(min=0), rtol=1e-4, atol=1e-4)


def test_weights_that_cannot_be_used_are_named_and_never_unpickled(tmp_path: Path, alexnet: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(alexnet.read_bytes()[:1000])
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save({"call": Path("x")}, tmp_path / "objects.pth")
    for opener in (Lpips, Inception):
        with pytest.raises(NotAvailableError, match="no weights at"):
            opener(tmp_path / "none.pth", CPU)
        for name in ("cut.pth", "objects.pth"):
            with pytest.raises(NotAvailableError, match="damaged"):
                opener(tmp_path / name, CPU)
    with pytest.raises(NotAvailableError, match="AlexNet"):
        Lpips(tmp_path / "other.pth", CPU)
    with pytest.raises(NotAvailableError, match="CLIP"):
        ClipScore(str(tmp_path / "none"), CPU)


def test_networks_that_were_not_named_or_cannot_be_read_leave_a_reason(tmp_path: Path, alexnet: Path) -> None:
    networks = open_networks(tmp_path / "none.pth", alexnet, None, CPU)
    assert isinstance(networks.features, str) and "none.pth" in networks.features
    assert networks.text == "no weights were given (--clip)"
    assert networks.names() == {"features": None, "distance": "lpips alex 0.1 (alexnet.pth)", "text": None}


def test_inception_of_random_weights_gives_its_features(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity", exc_type=ImportError)
    inception = Inception(write_random_inception(tmp_path / "inception.pth"), CPU)
    features = inception(levels(2, 3, 64, 48))
    assert features.shape == (2, 2048) and bool(features.isfinite().all()) and not torch.equal(*features)
