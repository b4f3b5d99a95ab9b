"""An evaluation from end to end on a tiny bundle: what is measured, what is not, and what is written."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from giantleap.cli.train import app
from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.lua.checkpoints import read_lua, write_lua
from giantleap.models.lua.network import Lua, LuaSpec
from giantleap.training.data.frozen_vae import read_vae
from giantleap.training.data.prepare import PrepareConfig, prepare
from giantleap.training.evaluation.cases import EvaluationError, list_pictures, read_picture, shrink
from giantleap.training.evaluation.evaluate import EvaluateConfig, evaluate
from giantleap.training.evaluation.metrics import Networks, fid, kid, psnr_db, ssim, to_levels
from tests.tiny_bundle import write_tiny_lua
from tests.training.evaluation.random_networks import RandomFeatures
from tests.training.pictures import write_pictures

CPU = torch.device("cpu")
METRICS = {"psnr_db", "ssim", "lpips", "clip_score", "fid", "kid", "kid_std", "patch_fid", "patch_kid", "patch_kid_std"}


class MeanDifference:
    name = "mean difference"

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        return (images.float() - targets.float()).abs().mean(dim=(1, 2, 3))


class WordCount:
    name = "words"

    def __call__(self, images: Tensor, texts: Any) -> Tensor:
        return torch.tensor([float(len(text.split())) for text in texts])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "pictures"
    write_pictures(folder, 3, 100, 70)
    for number in range(3):
        (folder / f"picture-{number}.txt").write_text("three words here\n")
    return folder


@pytest.fixture(scope="module")
def report(pictures: Path, tiny_bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """With every network, and two sets of weights."""
    out = tmp_path_factory.mktemp("evaluate") / "report"
    write_tiny_lua(out.parent / "other.safetensors", seed=5)
    config = EvaluateConfig(
        tiny_bundle_dir,
        out,
        images=pictures,
        lua=(tiny_bundle_dir / "lua.safetensors", out.parent / "other.safetensors"),
        patch_px=32,
        patches=2,
        kid_subsets=4,
        kid_subset_size=3,
    )
    return evaluate(config, CPU, Networks(RandomFeatures(), MeanDifference(), WordCount())) | {"out": out}


def test_every_method_is_measured_at_every_scale(report: dict[str, Any]) -> None:
    scores = report["scores"]
    assert list(scores) == ["x1", "x2", "x4"]
    assert list(scores["x1"]) == ["VAE round trip"]
    for scale in ("x2", "x4"):
        assert set(scores[scale]) == {"bicubic pixels", "bicubic latent", "lua", "other"}
        for row in scores[scale].values():
            assert set(row) == METRICS and all(isinstance(value, float) for value in row.values())
            assert row["clip_score"] == 3.0
        assert scores[scale]["lua"] != scores[scale]["other"]
    assert report["cases"] == 3 and set(report["weights"]) == {"lua", "other"}


def test_figures_are_those_of_the_pictures(report: dict[str, Any], pictures: Path, tiny_bundle_dir: Path) -> None:
    """The whole path once more, by hand, for one method."""
    vae = read_vae(read_bundle(tiny_bundle_dir), CPU, torch.float32)
    net = read_lua(tiny_bundle_dir / "lua.safetensors")
    targets, found = [], []
    with torch.inference_mode():
        for path in sorted(pictures.glob("*.png")):
            target = read_picture(path, None, 32)
            assert target.shape == (1, 3, 64, 96)
            targets.append(to_levels(target))
            found.append(to_levels(vae.decode(net(vae.encode(shrink(target, 2)), 2))))
    row = report["scores"]["x2"]["lua"]
    assert row["psnr_db"] == pytest.approx(np.mean([psnr_db(x, y) for x, y in zip(found, targets, strict=True)]))
    assert row["ssim"] == pytest.approx(np.mean([ssim(x, y) for x, y in zip(found, targets, strict=True)]))
    features = RandomFeatures()
    assert row["fid"] == pytest.approx(fid(features(torch.cat(found)), features(torch.cat(targets))), rel=1e-3)
    expected = kid(features(torch.cat(found)), features(torch.cat(targets)), 4, 3)
    assert row["kid"] == pytest.approx(expected.mean, rel=1e-3, abs=1e-6)


def test_latents_and_pixels_are_compared_with_the_true_ones(report: dict[str, Any]) -> None:
    kinds = {f"x{scale} {kind}" for scale in (2, 4) for kind in ("bicubic latent", "lua", "other")}
    assert set(report["latent_statistics"]) == kinds | {"x2 small", "x4 small"}
    assert set(report["pixel_statistics"]) == kinds | {"x2 bicubic pixels", "x4 bicubic pixels"}
    for gap in (*report["latent_statistics"].values(), *report["pixel_statistics"].values()):
        assert all(np.isfinite(value) for value in gap.values())
        assert 0.0 <= gap["jsd"] <= 1.0 and gap["wasserstein"] >= 0.0


def test_report_sheet_and_plots_are_written(report: dict[str, Any]) -> None:
    out: Path = report["out"]
    written = json.loads((out / "evaluation.json").read_text())
    assert written == {key: value for key, value in report.items() if key != "out"}
    assert {"torch", "torchmetrics"} <= written["machine"]["versions"].keys()
    text = (out / "evaluation.md").read_text()
    assert "| x2 | lua |" in text and "Wasserstein-1" in text and "not available" not in text
    columns = 1 + 2 * 3 + 0  # target, and for each scale bicubic pixels and two sets of weights
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.size == (columns * 256, 3 * (256 + 18))
    for scale in (2, 4):
        plot = np.array(Image.open(out / f"distributions_x{scale}.png"))
        assert plot.shape == (560, 920, 3)
        assert bool((plot == np.array([44, 160, 44])).all(axis=2).any()), "LUA's curve, in green"


def test_without_networks_no_figure_stands_in(pictures: Path, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    arguments = ["--bundle", str(tiny_bundle_dir), "--images", str(pictures), "--out", str(tmp_path), "--limit", "1"]
    answer = CliRunner().invoke(app, ["evaluate", *arguments, "--lpips", "none.pth", "--device", "cpu"])
    assert answer.exit_code == 2 and "none.pth: there is no such file" in answer.output
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"no weights")
    answer = CliRunner().invoke(app, ["evaluate", *arguments, "--lpips", str(damaged), "--device", "cpu"])
    assert answer.exit_code == 0, answer.output
    row = json.loads((tmp_path / "evaluation.json").read_text())["scores"]["x2"]["lua"]
    assert {name for name, value in row.items() if isinstance(value, float)} == {"psnr_db", "ssim"}
    assert row["fid"] == row["patch_kid"] == "not available: no weights were given (--inception)"
    assert row["lpips"] == f"not available: {damaged}: damaged, or holds more than tensors"
    assert "not available: no weights were given (--clip)" in answer.output


def test_what_a_set_is_too_small_for_is_not_available(pictures: Path, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "pictures")
    (tmp_path / "pictures" / "picture-1.txt").unlink()
    config = EvaluateConfig(tiny_bundle_dir, tmp_path / "out", images=tmp_path / "pictures", crop_px=64)
    row = evaluate(config, CPU, Networks(features=RandomFeatures(), text=WordCount()))["scores"]["x4"]["lua"]
    assert isinstance(row["fid"], float)
    assert row["kid"] == "not available: KID over subsets of 1000 needs 1000 samples a set; there are 3"
    assert row["patch_fid"] == "not available: patches of 1024 px do not fit into a picture of 64x64 px"
    assert row["clip_score"].startswith("not available: picture-1.png has no caption")


def test_pairs_are_measured_against_the_decoded_large_latent(
    pictures: Path, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    prepare(PrepareConfig(pictures, tiny_bundle_dir, tmp_path / "pairs", 64, 64), CPU)
    config = EvaluateConfig(tiny_bundle_dir, tmp_path / "out", pairs=tmp_path / "pairs", limit=2)
    found = evaluate(config, CPU)
    assert found["cases"] == 2 and found["source"] == "pairs"
    assert list(found["scores"]) == ["x2", "x4"], "no photograph, no round trip"
    summary = json.loads((tmp_path / "pairs" / "summary.json").read_text())
    (tmp_path / "pairs" / "summary.json").write_text(json.dumps(summary | {"vae_sha256": "0" * 64}))
    with pytest.raises(EvaluationError, match="another VAE"):
        evaluate(config, CPU)


def test_targets_are_pictures_as_a_viewer_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gray = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(gray).save(tmp_path / "deep.png")
    found = to_levels(read_picture(tmp_path / "deep.png", None, 32))
    assert torch.equal(found, torch.from_numpy((gray >> 8).astype(np.uint8)).expand(1, 3, 64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    with pytest.raises(EvaluationError, match=r"deep\.png: more pixels"):
        read_picture(tmp_path / "deep.png", None, 32)


def test_hidden_files_are_no_cases_and_names_of_any_bytes_are_shown(
    pictures: Path, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    pictures = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    (pictures / "._picture-0.png").write_bytes(b"resource fork of macOS")
    (pictures / os.fsdecode(b"caf\xe9.png")).write_bytes((pictures / "picture-0.png").read_bytes())
    assert len(list_pictures(pictures)) == 4
    found = evaluate(EvaluateConfig(tiny_bundle_dir, tmp_path / "out", images=pictures), CPU)
    assert found["cases"] == 4
    (pictures / "picture-1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(EvaluationError, match=r"picture-1\.txt: the caption is not UTF-8"):
        evaluate(EvaluateConfig(tiny_bundle_dir, tmp_path / "out", images=pictures), CPU)


def test_what_cannot_be_measured_is_refused(pictures: Path, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="either"):
        evaluate(EvaluateConfig(tiny_bundle_dir, tmp_path / "out"), CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match=r"no picture \("):
        evaluate(EvaluateConfig(tiny_bundle_dir, tmp_path / "out", images=tmp_path / "empty"), CPU)
    (tmp_path / "empty" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(EvaluationError, match=r"bad\.png: not a picture of a known format; remove or replace it"):
        evaluate(EvaluateConfig(tiny_bundle_dir, tmp_path / "out", images=tmp_path / "empty"), CPU)
    with pytest.raises(EvaluationError, match="less than"):
        evaluate(EvaluateConfig(tiny_bundle_dir, tmp_path / "out", images=pictures, crop_px=31), CPU)
    write_lua(tmp_path / "four.safetensors", Lua(LuaSpec(4, 12, (1,), 2, window=4, num_feat=8)))
    for weights, words in (
        ((tmp_path / "four.safetensors",), "4 channels"),
        ((tiny_bundle_dir / "lua.safetensors",) * 2, "twice"),
    ):
        with pytest.raises(EvaluationError, match=words):
            evaluate(EvaluateConfig(tiny_bundle_dir, tmp_path / "out", images=pictures, lua=weights), CPU)
    net = read_lua(tiny_bundle_dir / "lua.safetensors")
    for head in net.heads.values():
        torch.nn.init.constant_(head.get_parameter("conv_last.weight"), 3e38)  # finite weights, infinite latents
    write_lua(tmp_path / "far.safetensors", net)
    with pytest.raises(EvaluationError, match=r"far x2, picture-0\.png: .* not finite"):
        evaluate(
            EvaluateConfig(tiny_bundle_dir, tmp_path / "out", images=pictures, lua=(tmp_path / "far.safetensors",)), CPU
        )
    assert not (tmp_path / "out").exists(), "nothing is written before all is measured"


def test_missing_metrics_are_reported_before_pictures_are_encoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("giantleap.cli.train.find_spec", lambda name: None)
    answer = CliRunner().invoke(app, ["evaluate", "--bundle", "none", "--images", "none", "--out", str(tmp_path)])
    assert answer.exit_code == 2 and "pip install '.[train]'" in answer.output
