"""The photographs: licenses that let weights be shipped, a package that is checked, messages that say what to do."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from giantleap.training.pocket.drawing.photographs import (
    HELD_OUT,
    PACKAGE,
    PHOTOGRAPHS,
    VERSION,
    PhotographsError,
    fetch_photographs,
    read_crops,
    read_photograph,
)


def test_no_photograph_is_share_alike_and_none_is_trained_on_and_held_out() -> None:
    assert {photograph.license for photograph in (*PHOTOGRAPHS, *HELD_OUT)} == {"CC0-1.0", "CC-BY-4.0"}
    assert not set(PHOTOGRAPHS) & set(HELD_OUT)


def test_a_changed_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"{PACKAGE}_{VERSION}_all.deb").write_bytes(b"no package")
    with pytest.raises(PhotographsError, match=r"has SHA-256 .*, expected .*; delete it and try again"):
        fetch_photographs(tmp_path)


def test_a_machine_without_apt_gets_the_place_to_fetch_them_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PhotographsError, match="apt-get is not installed"):
        fetch_photographs(tmp_path)


def test_a_failed_download_names_the_command_and_the_way_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 100, "", "Unable to locate package\n")

    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("subprocess.run", fail)
    with pytest.raises(PhotographsError, match=r"apt-get download .* failed with status 100: Unable to locate"):
        fetch_photographs(tmp_path)


def test_crops_are_cut_once_and_kept(tmp_path: Path) -> None:
    (tmp_path / "photographs").mkdir()
    rng = np.random.default_rng(0)
    for photograph in (*PHOTOGRAPHS, *HELD_OUT):
        pixels = rng.integers(0, 255, (80, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photographs" / photograph.file)
    crops = read_crops(tmp_path, PHOTOGRAPHS, 4, 32, 0, "photographs")
    assert crops.shape == (4, 32, 32, 3)
    again = read_crops(tmp_path, PHOTOGRAPHS, 4, 32, 0, "photographs")
    assert np.array_equal(crops, again)


def test_photographs_are_shrunk_at_least_by_two(tmp_path: Path) -> None:
    for side, expected in ((400, 200), (3600, 900)):
        Image.new("RGB", (side, side)).save(tmp_path / "picture.png")
        assert read_photograph(tmp_path / "picture.png").shape == (expected, expected, 3)


def test_the_notice_names_every_photograph_its_author_and_its_license() -> None:
    notice = Path("NOTICE").read_text(encoding="utf-8")
    for photograph in (*PHOTOGRAPHS, *HELD_OUT):
        line = next(line for line in notice.splitlines() if photograph.file in line)
        assert photograph.license in line and photograph.author in line
