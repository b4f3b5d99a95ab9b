"""The ways of a bundle's decoder give the same pixels, and a report keeps its other part."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.images.decode.__main__ import main
from benchmarks.images.decode.pocket import Decode, measure_size, open_exact, random_latents
from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.device import compiler_fault
from giantleap.models.vae.autoencoder import read_vae_model
from giantleap.models.vae.decode import decode_plain

CPU = torch.device("cpu")


def test_exact_strips_have_the_pixels_of_the_plain_decode(tiny_bundle_dir: Path) -> None:
    bundle = read_bundle(tiny_bundle_dir)
    vae = read_vae_model(bundle, CPU, torch.float32).eval()
    ways: dict[str, Decode] = {
        "plain": lambda latents: decode_plain(vae, latents),
        "exact": open_exact(vae, torch.float32),
        "wrong": lambda latents: decode_plain(vae, latents) + 0.5,
    }
    rows = {row.way: row for row in measure_size(ways, random_latents(bundle, 64), 2)}
    assert rows["plain"].ratio == 1.0 and rows["plain"].image_px == 64
    assert (rows["exact"].max_difference or 0.0) <= 1e-4
    assert rows["wrong"].max_difference == pytest.approx(0.5, abs=1e-5)


@pytest.mark.slow
def test_every_way_is_a_row_beside_what_the_report_has(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "decode.json"
    out.write_text('{"family": "sdxl", "rows": ["earlier"]}')
    main(["--pocket", str(tiny_bundle_dir), "--px", "64", "--runs", "1", "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["family"] == "sdxl" and record["rows"] == ["earlier"]
    rows = {row["way"]: row for row in record["pocket"]["rows"]}
    assert sorted(rows) == ["compiled", "exact", "onnxruntime", "plain"]
    if compiler_fault(CPU):
        assert rows.pop("compiled")["error"].startswith("not available")
    assert all(row["error"] is None and row["max_difference"] <= 1e-3 for row in rows.values())
