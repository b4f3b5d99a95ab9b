"""Pairs from photographs: the same index however often it was killed, nothing lost in silence."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from PIL import Image
from typer.testing import CliRunner

from giantleap.cli.main import app
from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.bundle.names import SHIPPED
from giantleap.training.data.frozen_vae import read_vae
from giantleap.training.data.pairs_store import PairsError, PairsStore, read_index, tensor_hash
from giantleap.training.data.prepare import PrepareConfig, cut_tiles, list_sources, prepare, shrink_tiles
from tests.training.killed import killed_at_write
from tests.training.pictures import write_pictures

CPU = torch.device("cpu")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eight pictures of 2 x 1 tiles of 64 px, with a rest at the right."""
    write_pictures(tmp_path / "pictures", 8, 136, 64)
    return tmp_path / "pictures"


def config_of(source: Path, bundle: Path, out: Path, **changes: Any) -> PrepareConfig:
    values: dict[str, Any] = {"min_side_px": 64, "tile_px": 64, "pictures_per_shard": 3, **changes}
    return PrepareConfig(source, bundle, out, **values)


def test_every_tile_is_in_the_index_once_with_its_digests(
    pictures: Path, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    report = prepare(config_of(pictures, tiny_bundle_dir, tmp_path / "out"), CPU)
    assert (report.pictures, report.tiles, report.is_finished) == (8, 16, True) and report.tiles_per_s > 0
    index = read_index(tmp_path / "out")
    found = [(line["source"], tuple(line["tile"]), line["scale"]) for line in index]
    expected = [(f"picture-{n}.png", (0, c), s) for n in range(8) for c in range(2) for s in (1, 2, 4)]
    assert found == expected
    assert len({line["sha256"] for line in index}) == len(index)
    assert {line["shard"] for line in index} == {f"shard-{n:06d}.safetensors" for n in range(3)}
    store = PairsStore.open(tmp_path / "out")
    store.check()
    assert len(store) == 16
    assert {level: tuple(x.shape) for level, x in store.read([15, 0]).items()} == {
        1: (2, 16, 8, 8),
        2: (2, 16, 4, 4),
        4: (2, 16, 2, 2),
    }


def test_latents_are_the_posterior_means_of_the_tile_and_of_the_shrunk_one(
    pictures: Path, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    prepare(config_of(pictures, tiny_bundle_dir, tmp_path / "out"), CPU)
    vae = read_vae(read_bundle(tiny_bundle_dir), CPU, torch.float32)
    pixels = np.asarray(Image.open(pictures / "picture-3.png"))[:, 64:128]
    tile = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1.0
    latents = PairsStore.open(tmp_path / "out").read([7])
    for level in (1, 2, 4):
        assert torch.allclose(latents[level], vae.encode(shrink_tiles(tile, level)), atol=1e-5)


def test_pictures_take_mixed_filters_in_turn(pictures: Path, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    prepare(config_of(pictures, tiny_bundle_dir, tmp_path / "out", filter="mixed"), CPU)
    vae = read_vae(read_bundle(tiny_bundle_dir), CPU, torch.float32)
    for number in range(8):  # in shards of three
        pixels = np.asarray(Image.open(pictures / f"picture-{number}.png"))[:, 64:128]
        tile = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1.0
        means = tile.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4)).mean(dim=(-1, -3))
        small = means if number % 2 else shrink_tiles(tile, 4)
        assert torch.allclose(PairsStore.open(tmp_path / "out").read([2 * number + 1])[4], vae.encode(small), atol=1e-5)


def test_pairs_of_another_filter_are_not_continued(pictures: Path, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    prepare(config_of(pictures, tiny_bundle_dir, tmp_path / "out"), CPU)
    with pytest.raises(PairsError, match="other filter"):
        prepare(config_of(pictures, tiny_bundle_dir, tmp_path / "out", filter="area"), CPU)


def test_an_autoencoder_without_a_posterior_gives_its_codes(pictures: Path, tmp_path: Path) -> None:
    prepare(config_of(pictures, SHIPPED / "pocket", tmp_path / "out"), CPU)
    model: Any = AutoencoderDC.from_pretrained(SHIPPED / "pocket" / "vae")
    pixels = np.asarray(Image.open(pictures / "picture-3.png"))[:, 64:128]
    tile = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1.0
    latents = PairsStore.open(tmp_path / "out").read([7])
    assert latents[1].shape == (1, 24, 16, 16)
    with torch.no_grad():
        for level in (1, 2, 4):
            assert torch.allclose(latents[level], model.float().encode(shrink_tiles(tile, level)).latent, atol=1e-5)


@pytest.mark.parametrize("at", range(6))
def test_a_kill_before_any_file_is_finished_changes_nothing_in_the_end(
    at: int, pictures: Path, tiny_bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are written in the order plan, lines and tensors of each shard: each in turn is cut off half-way."""
    config = config_of(pictures, tiny_bundle_dir, tmp_path / "out")
    with killed_at_write(at, monkeypatch):
        prepare(config, CPU)
    with pytest.raises(PairsError, match="no finished pairs"):
        PairsStore.open(config.out)
    assert prepare(config, CPU).is_finished
    prepare(config_of(pictures, tiny_bundle_dir, tmp_path / "whole"), CPU)
    for name in ("index.jsonl", "summary.json", "plan.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()
    PairsStore.open(config.out).check()


def test_several_processes_share_the_shards(pictures: Path, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    config = config_of(pictures, tiny_bundle_dir, tmp_path / "out")
    first = prepare(config, CPU, rank=0, world_size=2)
    assert (first.pictures, first.is_finished) == (5, False)
    second = prepare(config, CPU, rank=1, world_size=2)
    assert (second.pictures, second.is_finished) == (3, True)
    prepare(config_of(pictures, tiny_bundle_dir, tmp_path / "whole"), CPU)
    assert (tmp_path / "out" / "index.jsonl").read_text() == (tmp_path / "whole" / "index.jsonl").read_text()
    assert prepare(config, CPU).pictures == 0


def test_corrupt_and_small_pictures_are_skipped_with_their_names(
    pictures: Path, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    content = (pictures / "picture-1.png").read_bytes()
    (pictures / "picture-1.png").write_bytes(content[: len(content) // 2])
    (pictures / "empty.jpg").write_bytes(b"")
    (pictures / "words.webp").write_text("no picture")
    write_pictures(tmp_path / "small", 1, 128, 56)
    (tmp_path / "small" / "picture-0.png").rename(pictures / "small.png")
    (pictures / "notes.txt").write_text("not counted")
    report = prepare(config_of(pictures, tiny_bundle_dir, tmp_path / "out"), CPU)
    assert {(line["source"], line["skipped"]) for line in report.skipped} == {
        ("picture-1.png", "corrupt"),
        ("empty.jpg", "corrupt"),
        ("words.webp", "corrupt"),
        ("small.png", "small"),
    }
    assert report.tiles == 14
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["skipped"]) == 4 and all(line["why"] for line in summary["skipped"])


@pytest.mark.parametrize(
    ("sides", "advice"),
    [((512, 512), "--min-side-px 56 --tile-px 32"), ((512, 32), "--min-side-px 56"), ((64, 64), "--tile-px 32")],
)
def test_where_no_picture_gives_a_tile_the_error_says_which_sides_would(
    sides: tuple[int, int], advice: str, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    write_pictures(tmp_path / "small", 4, 128, 56)
    (tmp_path / "small" / "words.png").write_text("no picture")
    config = config_of(tmp_path / "small", tiny_bundle_dir, tmp_path / "out", min_side_px=sides[0], tile_px=sides[1])
    with pytest.raises(PairsError, match=rf"4 have a side below {sides[0]} px, 1 are damaged; .* or .*{advice}"):
        prepare(config, CPU)
    assert not (tmp_path / "out" / "summary.json").exists()
    other = config_of(tmp_path / "small", tiny_bundle_dir, tmp_path / "out", min_side_px=56, tile_px=32)
    report = prepare(other, CPU)
    assert report.tiles == 4 * 4 and report.is_finished, "the directory takes the other sides"


def test_pictures_too_small_for_any_tile_get_no_advice_of_sides(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "small", 1, 40, 16)
    with pytest.raises(PairsError, match=r"give larger ones$"):
        prepare(config_of(tmp_path / "small", tiny_bundle_dir, tmp_path / "out"), CPU)


def test_reasons_are_the_same_in_every_run(pictures: Path, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    (pictures / "picture-1.png").write_bytes(b"no picture")
    for name in ("first", "second"):
        prepare(config_of(pictures, tiny_bundle_dir, tmp_path / name), CPU)
    first, second = ((tmp_path / name / "summary.json").read_text() for name in ("first", "second"))
    assert first == second and "0x" not in json.dumps(json.loads(first)["skipped"][0]["why"])


def test_hidden_files_are_left_out_and_names_of_any_bytes_are_listed(
    pictures: Path, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    content = (pictures / "picture-1.png").read_bytes()
    (pictures / "._picture-1.png").write_bytes(b"resource fork of macOS")
    (pictures / ".cache").mkdir()
    (pictures / ".cache" / "copy.png").write_bytes(content)
    (pictures / os.fsdecode(b"caf\xe9.png")).write_bytes(content)
    with tarfile.open(pictures / "more.tar", "w") as tar:
        for name in (b"._in.png", b"__MACOSX/._in.png", b"in-\xe9.png"):
            member = tarfile.TarInfo(os.fsdecode(name))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    report = prepare(config_of(pictures, tiny_bundle_dir, tmp_path / "out"), CPU)
    assert report.pictures == 10 and not report.skipped
    names = {line["source"] for line in read_index(tmp_path / "out")}
    assert {r"caf\xe9.png", r"more.tar/in-\xe9.png"} <= names


def test_a_shard_without_a_tile_is_a_shard(pictures: Path, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    for number in (3, 4, 5):
        (pictures / f"picture-{number}.png").write_bytes(b"no picture")
    prepare(config_of(pictures, tiny_bundle_dir, tmp_path / "out"), CPU)
    store = PairsStore.open(tmp_path / "out")
    store.check()
    assert [shard["tiles"] for shard in store.summary["shards"]] == [6, 0, 4]
    (first,) = (
        line
        for line in read_index(tmp_path / "out")
        if (line["source"], line["tile"], line["scale"]) == ("picture-6.png", [0, 0], 1)
    )
    assert tensor_hash(store.read([6])[1][0]) == first["sha256"]
    with pytest.raises(IndexError):
        store.read([10])
    for picture in pictures.iterdir():
        picture.write_bytes(b"no picture")
    with pytest.raises(PairsError, match="8 are damaged; give other pictures"):
        prepare(config_of(pictures, tiny_bundle_dir, tmp_path / "none"), CPU)
    with pytest.raises(PairsError, match="no finished pairs"):
        PairsStore.open(tmp_path / "none")


def test_tar_shards_are_read_in_place_and_a_broken_one_is_named(
    pictures: Path, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "tars"
    source.mkdir()
    for number, names in enumerate((range(4), range(4, 8))):
        with tarfile.open(source / f"part-{number}.tar", "w") as tar:
            for name in names:
                tar.add(pictures / f"picture-{name}.png", f"{name}.png")
                note = tarfile.TarInfo(f"{name}.txt")
                note.size = 5
                tar.addfile(note, io.BytesIO(b"words"))
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    (source / "broken.tar").write_bytes(b"\1" * 2048)
    assert [each.name for each in list_sources(source)[0]] == [f"part-{n // 4}.tar/{n}.png" for n in range(8)]
    report = prepare(config_of(source, tiny_bundle_dir, tmp_path / "tar"), CPU)
    assert (report.tiles, report.skipped) == (16, ())
    prepare(config_of(pictures, tiny_bundle_dir, tmp_path / "folder"), CPU)
    hashes = [[line["sha256"] for line in read_index(tmp_path / name)] for name in ("tar", "folder")]
    assert hashes[0] == hashes[1]
    assert json.loads((tmp_path / "tar" / "summary.json").read_text())["broken_tars"] == ["broken.tar"]


def test_pairs_of_other_pictures_or_settings_are_not_mixed(
    pictures: Path, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    config = config_of(pictures, tiny_bundle_dir, tmp_path / "out")
    prepare(config, CPU)
    with pytest.raises(PairsError, match="dtype"):
        prepare(config_of(pictures, tiny_bundle_dir, tmp_path / "out", dtype="float16"), CPU)
    (pictures / "picture-7.png").unlink()
    with pytest.raises(PairsError, match="sources_sha256"):
        prepare(config, CPU)
    with pytest.raises(PairsError, match="a multiple of 32 px"):
        prepare(config_of(pictures, tiny_bundle_dir, tmp_path / "new", tile_px=40), CPU)
    with pytest.raises(PairsError, match="no folder"):
        prepare(config_of(tmp_path / "absent", tiny_bundle_dir, tmp_path / "new"), CPU)


def test_a_damaged_shard_is_found(pictures: Path, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    prepare(config_of(pictures, tiny_bundle_dir, tmp_path / "out"), CPU)
    path = tmp_path / "out" / "shard-000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(PairsError, match="damaged"):
        PairsStore.open(tmp_path / "out").check()


def test_tiles_do_not_overlap_and_cover_what_fits() -> None:
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    tiles = cut_tiles(Image.fromarray(pixels), 2)
    assert set(tiles) == {(row, column) for row in range(2) for column in range(3)}
    for (row, column), tile in tiles.items():
        cut = pixels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(((tile + 1) * 127.5).round().byte(), torch.from_numpy(cut.copy()).permute(2, 0, 1))


def test_a_picture_is_turned_upright_before_it_is_cut(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("L", (64, 128), 40).save(tmp_path / "pictures" / "turned.jpg", exif=exif)
    prepare(config_of(tmp_path / "pictures", tiny_bundle_dir, tmp_path / "out"), CPU)
    assert {tuple(line["tile"]) for line in read_index(tmp_path / "out")} == {(0, 0), (0, 1)}


def test_deep_and_transparent_pictures_are_trained_on_as_a_viewer_shows_them(
    tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    gray = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    clear = Image.new("RGBA", (64, 64), (200, 10, 10, 0))
    for name, image, plain in (
        ("a", Image.fromarray(gray), Image.fromarray((gray >> 8).astype(np.uint8))),
        ("b", clear, Image.new("RGB", (64, 64), "white")),
    ):
        image.save(folder / f"{name}-as-given.png")
        plain.save(folder / f"{name}-plain.png")
    prepare(config_of(folder, tiny_bundle_dir, tmp_path / "out"), CPU)
    digests = {line["source"]: line["sha256"] for line in read_index(tmp_path / "out") if line["scale"] == 1}
    assert digests["a-as-given.png"] == digests["a-plain.png"] != digests["b-plain.png"] == digests["b-as-given.png"]


def test_the_commands_prepare_and_train(pictures: Path, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    (pictures / "bad.png").write_bytes(b"no picture")
    sizes = ["--min-side-px", "64", "--tile-px", "64", "--device", "cpu"]
    place = ["--bundle", str(tiny_bundle_dir), "--out", str(tmp_path / "pairs")]
    made = CliRunner().invoke(app, ["train", "prepare", str(pictures), *place, *sizes])
    assert made.exit_code == 0, made.output
    assert "9 pictures, 16 tiles" in made.output and "tiles/s" in made.output and "skipped bad.png" in made.output
    (tmp_path / "run.toml").write_text(
        f'bundle = "{tiny_bundle_dir}"\npairs = "pairs"\nprecision = "float32"\nheld_out_tiles = 1\n'
        "[lua.spec]\nembed_dim = 12\ndepths = [2]\nnum_heads = 2\nwindow = 4\nnum_feat = 8\n"
        '[[stages]]\nname = "III"\nsteps = 2\neffective_batch = 1\nmicro_batch = 1\n'
    )
    run = ["train", "run", "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    stopped = CliRunner().invoke(app, [*run, "--stop-after", "1"])
    assert stopped.exit_code == 0 and "step-000000001" in stopped.output and "--resume" in stopped.output
    again = CliRunner().invoke(app, run)
    assert again.exit_code == 2 and "--resume" in again.output
    done = CliRunner().invoke(app, [*run, "--resume"])
    weights = tmp_path / "run" / "lua.safetensors"
    assert done.exit_code == 0 and f"wrote {weights}" in done.output
    for scale in (2, 4):
        assert re.search(rf"x{scale}: \d+\.\d\d dB on held-out tiles, [+-]\d+\.\d\d dB over", done.output)
    (next_command,) = re.findall(r"serve it: giantleap (.*)", done.output)
    made = CliRunner().invoke(app, [*next_command.replace("NAME", "mine").split(), "--to", str(tmp_path / "mine")])
    assert made.exit_code == 0 and read_bundle(tmp_path / "mine").defaults.method == "lua", made.output


@pytest.mark.parametrize("arguments", [["prepare", "absent", "--bundle", "absent", "--out", "out"], ["run"]])
def test_a_command_that_cannot_start_says_why(arguments: list[str], tmp_path: Path) -> None:
    if arguments == ["run"]:
        arguments = ["run", "--config", str(tmp_path / "absent.toml"), "--out", str(tmp_path / "out")]
    answer = CliRunner().invoke(app, ["train", *arguments])
    assert answer.exit_code == 2 and "absent" in answer.output


def test_help_does_not_import_torch() -> None:
    code = "import sys; import giantleap.cli.main; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=120).returncode == 0
