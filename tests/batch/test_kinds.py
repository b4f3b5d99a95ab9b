"""Every kind of input and output of a batch job, on a bundle of random weights."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.numpy import load, save_file
from safetensors.torch import load as load_torch

from giantleap.batch.rows import BatchOptions, row_seed
from tests.batch.conftest import Loaded, write_latents

PROMPT = "a red sphere on a green floor"


def _latent(side: int = 4) -> np.ndarray:
    return np.random.default_rng(side).standard_normal((16, side, side)).astype(np.float32)


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, _latent())
    return buffer.getvalue()


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 40), "teal").save(buffer, "png")
    return buffer.getvalue()


def _write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _files(folder: Path) -> None:
    (folder / "a").mkdir()
    np.save(folder / "a" / "one.npy", _latent())
    save_file({"latent": _latent()}, folder / "two.safetensors")
    (folder / "three.png").write_bytes(_png())
    (folder / "notes.md").write_text("no row")
    (folder / ".hidden.npy").write_bytes(b"no row")


def _same_stems(folder: Path) -> None:
    (folder / "x.npy").write_bytes(_npy())
    (folder / "x.png").write_bytes(_png())


def _tar(folder: Path) -> None:
    files = {"0.npy": _npy(), "0.json": b'{"caption": "left alone"}', "d/1.seg.png": _png(), "d/1.png": _png()}
    _write_tar(folder / "part-0.tar", files)


def _parquet_files(folder: Path) -> None:
    image = {"bytes": _png(), "path": "x.png"}
    table = pa.table({"key": ["p", "q"], "latent": [_npy(), None], "image": [None, image], "other": [1, 2]})
    parquet.write_table(table, folder / "rows.parquet")


@pytest.mark.parametrize(
    ("write", "keys"),
    [
        (_files, {"a/one", "two", "three"}),
        (_same_stems, {"x.npy", "x.png"}),
        (_tar, {"part-0/0", "part-0/d/1"}),
        (_parquet_files, {"p", "q"}),
    ],
)
def test_latents_and_images_become_large_images(
    loaded: Loaded, tmp_path: Path, write: Callable[[Path], None], keys: set[str]
) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    entries = loaded.run(tmp_path / "in", tmp_path / "out")
    assert set(entries) == keys
    for key, entry in entries.items():
        assert entry.error is None and entry.output == f"{key}.png"
        with Image.open(tmp_path / "out" / entry.output) as image:
            assert image.size in {(64, 64), (64, 80)}, "twice the size"


def _text(folder: Path) -> None:
    (folder / "rows.txt").write_text(f"{PROMPT}\n\n{PROMPT}\n")


def _json_lines(folder: Path) -> None:
    rows = [{"prompt": PROMPT}, {"prompt": PROMPT, "key": "mine", "seed": 7, "steps": 1, "other": []}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _parquet_prompts(folder: Path) -> None:
    table = pa.table({"prompt": [PROMPT] * 5, "seed": [1, 2, 3, 4, 5]})
    parquet.write_table(table, folder / "rows.parquet", row_group_size=2)


def _tar_prompts(folder: Path) -> None:
    _write_tar(folder / "rows.tar", {"a.txt": PROMPT.encode(), "b.json": json.dumps({"prompt": PROMPT}).encode()})


def _derived(*keys: str) -> dict[str, int]:
    return {key: row_seed(0, key) for key in keys}


@pytest.mark.parametrize(
    ("write", "seeds"),
    [
        (_text, _derived("rows-000000", "rows-000002")),
        (_json_lines, {**_derived("rows-000000"), "mine": 7}),
        (_parquet_prompts, {f"rows-{index:06d}": index + 1 for index in range(5)}),
        (_tar_prompts, _derived("rows/a", "rows/b")),
    ],
)
def test_prompts_become_images_of_their_own_seeds(
    loaded: Loaded, tmp_path: Path, write: Callable[[Path], None], seeds: Mapping[str, int]
) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    options = BatchOptions(scale=1, width_px=32, height_px=32, format="webp", shard_rows=3)
    entries = loaded.run(tmp_path / "in", tmp_path / "out", options)
    assert {key: entry.seed for key, entry in entries.items()} == seeds
    for entry in entries.values():
        assert entry.error is None and entry.output is not None
        with Image.open(tmp_path / "out" / entry.output) as image:
            assert (image.format, image.size) == ("WEBP", (32, 32))


def test_latents_come_out_as_the_route_alone_enlarges_them(loaded: Loaded, latents: Path, tmp_path: Path) -> None:
    entries = loaded.run(latents, tmp_path / "out", BatchOptions(scale=2, out="latents", batch_size=3))
    for path in latents.iterdir():
        entry = entries[path.stem]
        assert entry.output == f"{path.stem}.safetensors" and entry.seed is None
        written = load_torch((tmp_path / "out" / entry.output).read_bytes())["latent"]
        (alone,), _ = loaded.route.upscale_and_decode([torch.from_numpy(np.load(path))], 2, decode=None)
        assert torch.equal(written, alone), "batches change no bit"


def test_prompts_become_latents_of_the_final_size(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(PROMPT)
    options = BatchOptions(scale=2, width_px=64, height_px=64, out="latents")
    entry = loaded.run(tmp_path / "p.txt", tmp_path / "out", options)["p-000000"]
    assert entry.output is not None
    assert load((tmp_path / "out" / entry.output).read_bytes())["latent"].shape == (16, 8, 8)


def test_a_pattern_and_a_url_of_another_store_are_read_and_written(loaded: Loaded, tmp_path: Path) -> None:
    write_latents(tmp_path, 2)
    (tmp_path / "other.npy").write_bytes(b"not of the pattern")
    entries = loaded.run(tmp_path / "0*.npy", "memory://batch-out", BatchOptions(format="jpeg"))
    assert {entry.output for entry in entries.values()} == {"000.jpg", "001.jpg"}
    again = loaded.run("memory://batch-out", tmp_path / "out")
    assert set(again) == {"000", "001"} and all(entry.error is None for entry in again.values())


def test_scaled_latents_are_brought_to_raw_space(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "scaled").mkdir()
    np.save(tmp_path / "raw" / "a.npy", _latent())
    np.save(tmp_path / "scaled" / "a.npy", _latent() * np.float32(0.5))  # the tiny bundle's scaling factor
    raw = loaded.run(tmp_path / "raw", tmp_path / "x", BatchOptions(out="latents"))
    scaled = loaded.run(tmp_path / "scaled", tmp_path / "y", BatchOptions(out="latents", scaled=True))
    assert raw["a"].sha256 == scaled["a"].sha256
