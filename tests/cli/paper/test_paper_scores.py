"""The scores of images: sets against a reference, captions, and what is left of the base image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from giantleap.cli.paper.scores import TO_BASE, CellScores, ScorePlan, Scorer, at_base
from giantleap.training.evaluation.cases import EvaluationError
from giantleap.training.evaluation.metrics import Networks, fid, kid, psnr_db
from giantleap.training.evaluation.picture_sets import Value
from tests.training.evaluation.random_networks import RandomFeatures, write_random_inception, write_tiny_clip

SETS = ("fid", "kid", "kid_std", "patch_fid", "patch_kid", "patch_kid_std")
COUNT = 4


def pixels(number: int, side_px: int = 64) -> Tensor:
    """A random image [side_px, side_px, 3]."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (side_px, side_px, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    for number in range(COUNT):
        Image.fromarray(pixels(100 + number, 80).numpy()).save(folder / f"{number}.png")
    return folder


def score(plan: ScorePlan, networks: Networks, base: Tensor | None = None, side_px: int = 64) -> dict[str, Value]:
    scores = CellScores(Scorer(plan, networks, seed=3))
    for number in range(COUNT):
        scores.add(number, pixels(number, side_px), "a red ball", base)
    return scores.result()


def test_sets_are_compared_with_the_reference(reference: Path) -> None:
    plan = ScorePlan(reference=reference, patch_px=32, kid_subset_size=COUNT)
    row = score(plan, Networks(features=RandomFeatures()))
    features = RandomFeatures()
    found = features(torch.stack([pixels(number) for number in range(COUNT)]).permute(0, 3, 1, 2))
    true = features(torch.stack([pixels(100 + number, 80) for number in range(COUNT)]).permute(0, 3, 1, 2))
    assert row["fid"] == pytest.approx(fid(found, true), rel=1e-3)
    assert row["kid"] == pytest.approx(kid(found, true, subset_size=COUNT, seed=3).mean, rel=1e-3, abs=1e-6)
    assert all(isinstance(row[name], float) for name in SETS) and row["patch_fid"] != row["fid"]
    same = score(
        ScorePlan(reference=reference, patch_px=32, kid_subset_size=COUNT), Networks(features=RandomFeatures())
    )
    assert {name: same[name] for name in SETS} == {name: row[name] for name in SETS}


def test_what_cannot_be_compared_says_why(reference: Path, tmp_path: Path) -> None:
    bare = score(ScorePlan(reference=reference), Networks())
    assert {bare[name] for name in SETS} == {"not available: no weights were given (--inception)"}
    assert bare["clip_score"] == "not available: no weights were given (--clip)"
    alone = score(ScorePlan(), Networks(features=RandomFeatures()))
    assert {alone[name] for name in SETS} == {"not available: no pictures to compare with were given (--reference)"}
    small = score(ScorePlan(reference=reference, patch_px=72), Networks(features=RandomFeatures()))
    assert "patches of 72 px do not fit" in str(small["patch_fid"]) and isinstance(small["fid"], float)
    assert "KID over subsets of 1000 needs 1000 samples" in str(small["kid"])
    assert all("--scale 1" in str(bare[name]) for name in TO_BASE)
    with pytest.raises(EvaluationError, match="no picture"):
        Scorer(ScorePlan(reference=tmp_path), Networks(features=RandomFeatures()), seed=0)


def test_the_clip_score_is_that_of_the_caption(tmp_path: Path) -> None:
    plan = ScorePlan(clip=write_tiny_clip(tmp_path / "clip"))
    networks = plan.open_networks()
    assert not isinstance(networks.text, str)
    row = score(plan, networks)
    each = [float(networks.text(pixels(number).permute(2, 0, 1)[None], ["a red ball"])[0]) for number in range(COUNT)]
    assert row["clip_score"] == pytest.approx(np.mean(each))
    assert plan.summary()["clip"] == "clip", "no path in the results"


@pytest.mark.slow
def test_sets_are_compared_by_inception(reference: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity", exc_type=ImportError)
    path = write_random_inception(tmp_path / "inception.pth")
    plan = ScorePlan(reference=reference, patch_px=32, kid_subset_size=COUNT, inception=path)
    row = score(plan, plan.open_networks())
    assert all(isinstance(row[name], float) for name in SETS)


def test_an_enlarged_base_image_keeps_all_of_it() -> None:
    base = torch.from_numpy(np.array(Image.fromarray(pixels(1, 12).numpy()).resize((96, 96), Image.Resampling.BICUBIC)))
    large = torch.from_numpy(np.array(Image.fromarray(base.numpy()).resize((384, 384), Image.Resampling.BICUBIC)))
    seen, expected = at_base(large.permute(2, 0, 1)[None], base.permute(2, 0, 1)[None])
    assert seen.shape == expected.shape == (1, 3, 192, 192) and seen.dtype == torch.uint8
    assert psnr_db(seen, expected, 0) > 40
    scores = CellScores(Scorer(ScorePlan(), Networks(), seed=0))
    scores.add(0, large, "", base)
    scores.add(1, base, "", base)
    row = scores.result()
    assert float(row["base_psnr_db"]) > 60 and float(row["base_ms_ssim"]) > 0.99 and float(row["base_flip"]) < 0.02
    other = score(ScorePlan(), Networks(), base=base, side_px=384)
    assert float(other["base_psnr_db"]) < 20 and float(other["base_flip"]) > float(row["base_flip"])
