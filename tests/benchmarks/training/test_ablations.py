"""The ablations: equal updates whatever the stages, results kept one by one, a page that says what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.training.ablations import run as ablations
from benchmarks.training.ablations.run import (
    BATCH,
    HEADS,
    NET,
    STAGES,
    VARIANTS,
    Photo,
    config_of,
    run_one,
    score,
    spread,
)
from giantleap.models.bundle.bundle import read_bundle
from giantleap.training.data.frozen_vae import read_vae
from giantleap.training.data.prepare import PrepareConfig, prepare
from tests.training.pictures import write_pictures

CPU = torch.device("cpu")


def test_every_variant_has_the_same_number_of_updates() -> None:
    for variant in VARIANTS:
        config = config_of(variant, 300, 0, Path("bundle"), Path("pairs"))
        assert config.total_steps == 300
        assert {stage.steps for stage in config.stages} == {300 // len(variant.stages)}
        expected = [variant.batch or BATCH[stage.name] for stage in config.stages]
        assert [stage.effective_batch for stage in config.stages] == expected


def test_the_variants_differ_in_what_they_are_named_for_only() -> None:
    configs = {v.key: config_of(v, 300, 1, Path("bundle"), Path("pairs")) for v in VARIANTS}
    full = configs["full"]
    assert [stage.name for stage in full.stages] == ["I", "II", "III"]
    assert configs["latent_l1"].stages[0].weights.model_dump(exclude_defaults=True) == {"latent_l1": 1.0}
    for key, config in configs.items():
        assert (config.optimizer, config.seed, config.held_out_tiles) == (full.optimizer, 1, 0)
        spec, shared = dict(config.lua.spec or {}), dict(full.lua.spec or {})
        differing = {name for name in spec if spec[name] != shared[name]}
        assert differing == {"liif": {"head"}, "only_x2": {"scales"}, "only_x4": {"scales"}}.get(key, set())
    assert {key for keys in (STAGES, HEADS) for key in keys} == set(configs)


def test_one_run_is_trained_and_measured(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 4, 128, 64)
    (tmp_path / "bundle").symlink_to(tiny_bundle_dir)
    prepare(PrepareConfig(tmp_path / "pictures", tiny_bundle_dir, tmp_path / "pairs", 64, 64), CPU)
    vae = read_vae(read_bundle(tiny_bundle_dir), CPU, torch.float32)
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    small = {scale: torch.randn(1, 16, 8 // scale, 8 // scale) for scale in (2, 4)}
    (liif,) = (variant for variant in VARIANTS if variant.head == "liif")
    found = run_one(liif, 6, 0, tmp_path, vae, {"one": Photo(picture, small, picture)})
    assert (found["variant"], found["seed"]) == ("liif", 0) and found["cpu_s"] > 0
    for scale in ("x2", "x4"):
        assert 0 < found[scale]["psnr_db"] < 60 and -1 <= found[scale]["ssim"] <= 1
    again = run_one(liif, 6, 0, tmp_path, vae, {"one": Photo(picture, small, picture)})
    assert again["x2"] == found["x2"], "the seed fixes the result, whatever an earlier run left behind"


def test_a_picture_scores_best_against_itself() -> None:
    picture = torch.rand(1, 3, 32, 32) * 2 - 1
    photo = Photo(picture, {}, picture)
    worse = score((picture + 0.1 * torch.randn(picture.shape)).clamp(-1, 1), photo)
    assert score(picture, photo)["ssim"] == pytest.approx(1.0)
    assert 15 < worse["psnr_db"] < 35 and worse["ssim"] < 1


def completed_record(runs: list[dict[str, Any]]) -> dict[str, Any]:
    scores = {"psnr_db": 20.0, "ssim": 0.5, "round_trip_psnr_db": 20.0}
    pair = {"decode_then_bicubic": scores, "bicubic_latent": scores}
    return {
        "machine": {"processor": "x", "cores": 2, "versions": {"torch": "2"}},
        "settings": {"updates": 300, "net": NET, "batch": BATCH, "tiles": 9, "tile_px": 256},
        "untrained": {"round_trip": scores, "x2": pair, "x4": pair},
        "runs": runs,
    }


def run_of(variant: str, seed: int, psnr_db: float) -> dict[str, Any]:
    figures = {"psnr_db": psnr_db, "ssim": 0.5, "round_trip_psnr_db": psnr_db}
    return {"variant": variant, "seed": seed, "cpu_s": 10.0, "wall_s": 11.0, "parameters": 5, "x2": figures}


def test_the_page_has_means_and_spreads() -> None:
    runs = [run_of("full", 0, 24.0), run_of("full", 1, 25.0), run_of("liif", 0, 30.0)]
    page = ablations.to_markdown(completed_record(runs))
    assert "| I + II + III, both heads (joint) | 24.50 ± 0.71 | 32.54 | - | 27.94 |" in page
    assert "LPIPS is not measured" in page


def test_a_spread_needs_two_values() -> None:
    assert (spread([], 2), spread([1.0], 2), spread([1.0, 3.0], 1)) == ("-", "1.00", "2.0 ± 1.4")


def test_results_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "ablations.json"
    assert ablations.read_results(path, {"updates": 6})["runs"] == []
    path.write_text(json.dumps({"settings": {"updates": 12}, "runs": []}))
    with pytest.raises(ValueError, match="other settings"):
        ablations.read_results(path, {"updates": 6})
