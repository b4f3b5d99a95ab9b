"""Bad rows are errors in the manifest, each with what to do; their neighbors are drawn."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from giantleap.batch.inputs import Source
from giantleap.batch.rows import BatchOptions, check_options, row_seed
from giantleap.batch.store import BatchError, Store
from tests.batch.conftest import Loaded, write_latents


def test_bad_files_fail_alone_and_say_why(loaded: Loaded, latents: Path, tmp_path: Path) -> None:
    (latents / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (latents / "empty.npy").write_bytes(b"")
    np.save(latents / "channels.npy", np.zeros((3, 4, 4), np.float32))
    np.save(latents / "pair.npy", np.zeros((2, 16, 4, 4), np.float32))
    np.save(latents / "nan.npy", np.full((16, 4, 4), np.nan, np.float32))
    entries = loaded.run(latents, tmp_path / "out")
    errors = {key: entry.error for key, entry in entries.items() if entry.error is not None}
    assert set(errors) == {"cut", "empty", "channels", "pair", "nan"} and len(entries) == 11
    assert "holds 2 latents" in str(errors["pair"]) and "found [3, 4, 4]" in str(errors["channels"])
    written = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert written == set(entries) - set(errors)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not a JSON object"),
        ("[1]", "is no JSON object"),
        ("{}", "has no prompt"),
        ('{"prompt": ""}', "prompt: "),
        ('{"prompt": "a cube", "key": "../up"}', "cannot be the name of a file"),
        ('{"prompt": "a cube", "key": "_batch/x"}', "cannot be the name of a file"),
        ('{"prompt": "a cube", "steps": 0}', "steps: "),
        ('{"prompt": "a cube", "width": 33}', "width: "),
        ('{"prompt": "a cube", "seed": "one"}', "seed: "),
        ('{"prompt": "a cube", "key": "same"}', "make the keys unique"),
    ],
)
def test_a_bad_line_is_an_error_and_no_output(loaded: Loaded, tmp_path: Path, line: str, reason: str) -> None:
    good = json.dumps({"prompt": "a cube", "key": "same", "steps": 1})
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{line}\n")
    options = BatchOptions(scale=1, width_px=32, height_px=32)
    entries = loaded.run(tmp_path / "rows.jsonl", tmp_path / "out", options)
    (error,) = [entry.error for entry in entries.values() if entry.error is not None]
    assert reason in error and "a cube" not in error, "a prompt is in no error"
    assert [path.name for path in tmp_path.rglob("*.png")] == ["same.png"]


def test_a_tar_that_is_cut_off_is_read_as_far_as_it_goes(loaded: Loaded, latents: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, "w") as archive:
        for path in sorted(latents.iterdir())[:2]:
            archive.add(path, path.name)
    with tarfile.open(whole) as archive:
        middle = archive.getmember("001.npy").offset_data + 100
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:middle])
    entries = loaded.run(tmp_path / "cut.tar", tmp_path / "out")
    assert entries["cut/000"].error is None and "make it again" in str(entries["cut/damaged"].error)


def test_a_parquet_file_without_a_known_column_fails_in_each_row(loaded: Loaded, tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a cube", "a cone"]}), tmp_path / "rows.parquet")
    entries = loaded.run(tmp_path / "rows.parquet", tmp_path / "out")
    assert [entry.error is None for entry in entries.values()] == [False, False]


def test_what_no_row_could_use_is_refused_before(loaded: Loaded, latents: Path, tmp_path: Path) -> None:
    for options in (BatchOptions(scale=3), BatchOptions(method="swinir", out="latents")):
        with pytest.raises(BatchError):
            check_options(options, loaded.bundle)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(BatchError, match="no parquet file"):
        Source(str(tmp_path / "bad.parquet")).list_shards(10)
    for url in (tmp_path / "none", f"{tmp_path}/*.tar", "nothing://there"):
        with pytest.raises(BatchError):
            Source(str(url))
    with pytest.raises(BatchError, match="share it safely"):
        Store("data://x")
    with pytest.raises(BatchError, match="outside of it"):
        Source(str(latents)).refuse_output(Store(str(latents / "out")))


def test_the_seed_of_a_row_depends_on_the_seed_of_the_job_and_its_key_alone() -> None:
    assert row_seed(0, "a") == row_seed(0, "a") < 2**63
    assert len({row_seed(seed, key) for seed in (0, 1) for key in ("a", "b")}) == 4


def test_shards_are_the_same_for_each_process_and_named_by_what_they_hold(latents: Path) -> None:
    first = Source(str(latents)).list_shards(4)
    assert [len(shard.keys) for shard in first] == [4, 2] and Source(str(latents)).list_shards(4) == first
    write_latents(latents, 7)
    second = Source(str(latents)).list_shards(4)
    assert second[0] == first[0] and second[1].name != first[1].name
