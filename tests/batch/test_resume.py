"""A job that ends early goes on where it stopped, to the same bits, and tries again only what failed."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from giantleap.batch.manifest import read_entries
from giantleap.batch.rows import BatchOptions
from giantleap.batch.runner import open_job
from giantleap.batch.store import BatchError, Store
from tests.batch.conftest import Loaded, write_latents

TWO = BatchOptions(batch_size=2, shard_rows=4)


def _contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.png")}


def test_a_stopped_job_draws_only_the_rest(loaded: Loaded, latents: Path, tmp_path: Path) -> None:
    whole = loaded.run(latents, tmp_path / "whole", TWO)
    runner, stop = loaded.runner(latents, tmp_path / "out", TWO)
    first = []
    for entries in runner.run():
        first += entries
        stop.set()
    assert len(first) == 2
    second, _ = loaded.runner(latents, tmp_path / "out", TWO)
    assert second.count_rows() == 4
    rest = [entry.key for entries in second.run() for entry in entries]
    assert sorted([*rest, *(entry.key for entry in first)]) == sorted(whole)
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")
    third, _ = loaded.runner(latents, tmp_path / "out", TWO)
    assert list(third.run()) == [] and not third.has_failed()


def test_an_output_without_its_entry_is_written_again_to_the_same_bits(
    loaded: Loaded, latents: Path, tmp_path: Path
) -> None:
    loaded.run(latents, tmp_path / "out", TWO)
    before = _contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "_batch")
    loaded.run(latents, tmp_path / "out", TWO)
    assert _contents(tmp_path / "out") == before


def test_failed_rows_are_tried_again_by_the_next_run_and_others_are_not(
    loaded: Loaded, latents: Path, tmp_path: Path
) -> None:
    good = (latents / "003.npy").read_bytes()
    (latents / "003.npy").write_bytes(b"damaged")
    runner, _ = loaded.runner(latents, tmp_path / "out", TWO)
    assert len([entry for entries in runner.run() for entry in entries]) == 6 and runner.has_failed()
    assert list(runner.run()) == [], "not by the same run"
    (latents / "003.npy").write_bytes(good)
    again, _ = loaded.runner(latents, tmp_path / "out", TWO)
    assert [[entry.key for entry in entries] for entries in again.run()] == [["003"]]
    assert not again.has_failed()
    assert read_entries(Store(str(tmp_path / "out")))["003"].error is None


def test_files_that_were_added_are_all_that_the_next_run_draws(loaded: Loaded, latents: Path, tmp_path: Path) -> None:
    loaded.run(latents, tmp_path / "out", TWO)
    write_latents(latents, 8)
    runner, _ = loaded.runner(latents, tmp_path / "out", TWO)
    assert sorted(entry.key for entries in runner.run() for entry in entries) == ["006", "007"]


def test_rows_of_different_sizes_run_by_size_in_batches(loaded: Loaded, latents: Path, tmp_path: Path) -> None:
    runner, _ = loaded.runner(latents, tmp_path / "out", BatchOptions(batch_size=3))
    batches = [[entry.key for entry in entries] for entries in runner.run()]
    assert batches == [["001", "003", "005"], ["000", "002", "004"]], "the large ones first"


def test_an_output_of_other_options_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    open_job(store, TWO.to_job(loaded.bundle))
    open_job(store, TWO.to_job(loaded.bundle))
    with pytest.raises(BatchError, match="seed 0; give the same, or another output"):
        open_job(store, BatchOptions(batch_size=2, shard_rows=4, seed=1).to_job(loaded.bundle))


def test_an_output_holds_no_temporary_file(loaded: Loaded, latents: Path, tmp_path: Path) -> None:
    np.save(latents / "bad.npy", np.zeros((1,), np.float32))
    loaded.run(latents, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".tmp", ".clock")]
