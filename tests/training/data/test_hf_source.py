"""Pairs from a Hugging Face data set: the rows in their order, their bytes as stored, the same however it is stored."""

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from typer.testing import CliRunner

from giantleap.cli.main import app
from giantleap.training.data.hf_source import HubSource, list_rows, row_sizes
from giantleap.training.data.pairs_store import PairsError, PairsStore, read_index
from giantleap.training.data.prepare import PrepareConfig, prepare
from tests.training.killed import killed_at_write
from tests.training.pictures import write_pictures

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a test stays in the user's cache, and no network is used."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def pictures(tmp_path: Path) -> list[bytes]:
    """Eight pictures of 2 x 1 tiles of 64 px, encoded."""
    write_pictures(tmp_path / "pictures", 8, 128, 64)
    return [(tmp_path / "pictures" / f"picture-{number}.png").read_bytes() for number in range(8)]


def rows_of(cells: list[Any]) -> Dataset:
    features = Features({"image": Image(), "label": Value("int64")})
    return Dataset.from_dict({"image": cells, "label": list(range(len(cells)))}, features=features)


def in_bytes(pictures: list[bytes]) -> list[Any]:
    return [{"bytes": content, "path": None} for content in pictures]


def write_cells(folder: Path, cells: list[Any]) -> None:
    """A parquet file of exactly these cells; `datasets` itself would put the files that they name inside."""
    folder.mkdir()
    schema = Features({"image": Image(decode=False)}).arrow_schema
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}, schema=schema), folder / "train.parquet")


def config_of(source: Path | HubSource, bundle: Path, out: Path) -> PrepareConfig:
    return PrepareConfig(source, bundle, out, min_side_px=64, tile_px=64, pictures_per_shard=3)


def test_each_form_of_a_data_set_gives_the_pairs_of_the_folder(
    pictures: list[bytes], tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    rows = rows_of(in_bytes(pictures))
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet")
    prepare(config_of(tmp_path / "pictures", tiny_bundle_dir, tmp_path / "folder"), CPU)
    expected = [(line["source_sha256"], line["tile"], line["sha256"]) for line in read_index(tmp_path / "folder")]
    assert len(expected) == 8 * 2 * 3
    for name in ("saved", "parquet", "pictures"):  # the last one is a folder that `datasets` reads
        source = HubSource(str(tmp_path / name))
        report = prepare(config_of(source, tiny_bundle_dir, tmp_path / f"of_{name}"), CPU)
        assert (report.tiles, report.skipped, report.is_finished) == (16, (), True)
        index = read_index(tmp_path / f"of_{name}")
        assert [(line["source_sha256"], line["tile"], line["sha256"]) for line in index] == expected
        assert [line["source"] for line in index[::6]] == [f"{name}/train/{row}" for row in range(8)]


def test_digests_are_those_of_the_stored_bytes_and_sizes_are_known_before(
    pictures: list[bytes], tmp_path: Path
) -> None:
    rows_of(in_bytes(pictures)).select([3, 1]).save_to_disk(tmp_path / "saved")
    found = list_rows(HubSource(str(tmp_path / "saved")))
    assert [row.size_bytes for row in found] == [len(pictures[3]), len(pictures[1])]
    assert [hashlib.sha256(row.read()).digest() for row in found] == [
        hashlib.sha256(pictures[n]).digest() for n in (3, 1)
    ]


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_kill_changes_nothing_in_the_end(
    at: int, pictures: list[bytes], tiny_bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_of(in_bytes(pictures)).save_to_disk(tmp_path / "saved")
    config = config_of(HubSource(str(tmp_path / "saved")), tiny_bundle_dir, tmp_path / "out")
    with killed_at_write(at, monkeypatch):
        prepare(config, CPU)
    assert prepare(config, CPU, rank=1, world_size=2).is_finished is False
    assert prepare(config, CPU, rank=0, world_size=2).is_finished
    whole = config_of(HubSource(str(tmp_path / "saved")), tiny_bundle_dir, tmp_path / "whole")
    prepare(whole, CPU)
    for name in ("index.jsonl", "summary.json"):
        assert (config.out / name).read_text() == (whole.out / name).read_text()
    PairsStore.open(config.out).check()


def test_rows_without_a_readable_picture_are_skipped_with_their_number(
    pictures: list[bytes], tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    cells = in_bytes(pictures)
    cells[1], cells[4] = {"bytes": pictures[1][:200], "path": None}, None
    cells[5] = {"bytes": None, "path": None}
    cells[6] = {"bytes": None, "path": str(tmp_path / "absent.png")}
    cells[7] = {"bytes": None, "path": str(tmp_path / "pictures" / "picture-7.png")}
    write_cells(tmp_path / "rows", cells)
    report = prepare(config_of(HubSource(str(tmp_path / "rows")), tiny_bundle_dir, tmp_path / "out"), CPU)
    assert report.tiles == 8
    assert {line["source"] for line in report.skipped} == {f"rows/train/{row}" for row in (1, 4, 5, 6)}
    assert all(line["skipped"] == "corrupt" and line["why"] for line in report.skipped)


def test_other_rows_are_not_mixed(pictures: list[bytes], tiny_bundle_dir: Path, tmp_path: Path) -> None:
    rows_of(in_bytes(pictures)).save_to_disk(tmp_path / "one" / "saved")
    rows_of(in_bytes(pictures[::-1])).save_to_disk(tmp_path / "two" / "saved")
    prepare(config_of(HubSource(str(tmp_path / "one" / "saved")), tiny_bundle_dir, tmp_path / "out"), CPU)
    with pytest.raises(PairsError, match="sources_sha256"):
        prepare(config_of(HubSource(str(tmp_path / "two" / "saved")), tiny_bundle_dir, tmp_path / "out"), CPU)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"column": "photo"}, "no column photo; it has image, label"),
        ({"column": "label"}, "holds .*int64.*no pictures"),
        ({"split": "test"}, "no such split; it has train"),
        ({"revision": "main"}, "neither configurations nor revisions"),
        ({"name": "absent"}, "absent"),
    ],
)
def test_what_is_not_there_is_refused(changes: dict[str, str], why: str, pictures: list[bytes], tmp_path: Path) -> None:
    rows_of(in_bytes(pictures)).save_to_disk(tmp_path / "saved")
    values = {"name": str(tmp_path / "saved"), **changes}
    if "name" in changes:
        values["name"] = str(tmp_path / changes["name"])
    with pytest.raises(PairsError, match=why):
        list_rows(HubSource(**values))


def test_pictures_that_lie_elsewhere_are_refused() -> None:
    cells: list[Any] = [None, {"bytes": b"12345", "path": "https://example.com/0.png"}]
    features = Features({"image": Image(decode=False)})
    assert list(row_sizes(Dataset.from_dict({"image": cells}, features=features), HubSource("far"))) == [0, 5]
    cells.append({"bytes": None, "path": "https://example.com/1.png"})
    with pytest.raises(PairsError, match=r"https://example.com/1.png is not a file of this machine"):
        list(row_sizes(Dataset.from_dict({"image": cells}, features=features), HubSource("far")))


def test_the_command_takes_a_folder_or_a_data_set(pictures: list[bytes], tiny_bundle_dir: Path, tmp_path: Path) -> None:
    rows_of(in_bytes(pictures)).rename_column("image", "photo").save_to_disk(tmp_path / "saved")
    place = ["--bundle", str(tiny_bundle_dir), "--out", str(tmp_path / "pairs"), "--device", "cpu"]
    sizes = ["--min-side-px", "64", "--tile-px", "64"]
    named = ["--hf-dataset", str(tmp_path / "saved")]
    for wrong in ([], [str(tmp_path / "pictures"), *named]):
        refused = CliRunner().invoke(app, ["train", "prepare", *wrong, *place, *sizes])
        assert refused.exit_code == 2 and "not both" in refused.output
    refused = CliRunner().invoke(app, ["train", "prepare", *named, *place, *sizes])
    assert refused.exit_code == 2 and "no column image" in refused.output
    made = CliRunner().invoke(app, ["train", "prepare", *named, "--image-column", "photo", *place, *sizes])
    assert made.exit_code == 0 and "8 pictures, 16 tiles" in made.output
    assert json.loads((tmp_path / "pairs" / "summary.json").read_text())["tiles"] == 16
