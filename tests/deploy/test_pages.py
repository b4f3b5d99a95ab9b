"""The pages of deployment and the systemd units: what they name exists, and systemd reads the units."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("docker", "kubernetes", "bare-metal")]
UNITS = sorted((ROOT / "deploy" / "systemd").iterdir())
MAX_WORDS = 350
NEEDS_SYSTEMD = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on the PATH")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_a_page_is_short_says_what_has_not_run_and_ends_with_the_doctor(page: Path) -> None:
    text = page.read_text()
    assert len(text.split()) < MAX_WORDS and "**Not run here:**" in text
    assert "giantleap doctor --url" in text.rstrip().removesuffix("```").rstrip().splitlines()[-1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_files_containers_and_values_of_the_pages_exist(page: Path) -> None:
    text = page.read_text()
    files = re.findall(r"(?: -f | cp |\()((?:deploy/|docker-)[\w./@-]+)", text)
    assert [name for name in files if not (ROOT / name).exists() and name != "docker-compose.override.yml"] == []
    containers = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert set(re.findall(r"docker compose exec (?:-e \w+ )?(\w+)", text)) <= set(containers)
    values: Any = yaml.safe_load((ROOT / "deploy" / "helm" / "giantleap" / "values.yaml").read_text())
    for name in re.findall(r"--set ([\w.]+)=", text):
        found = values
        for part in name.split("."):
            assert part in found, name
            found = found[part]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: str(unit.name))
def test_a_unit_runs_a_command_of_ours_and_is_named_in_the_page(unit: Path) -> None:
    text = unit.read_text()
    command = re.search(r"^ExecStart=/opt/giantleap/bin/giantleap (\w+)( --device %i)?$", text, re.MULTILINE)
    assert command is not None and command[1] in ("api", "worker")
    assert f"deploy/systemd/{unit.name}" in (ROOT / "docs" / "bare-metal.md").read_text()
    assert "RestartPreventExitStatus=2\n" in text and "User=giantleap\n" in text


@pytest.mark.deploy
@NEEDS_SYSTEMD
def test_systemd_reads_the_units(tmp_path: Path) -> None:
    assert verify(tmp_path, "") == ""


@pytest.mark.deploy
@NEEDS_SYSTEMD
def test_systemd_finds_a_wrong_unit(tmp_path: Path) -> None:
    assert "sometimes" in verify(tmp_path, "[Service]\nRestart=sometimes\n")


def verify(directory: Path, further: str) -> str:
    """What `systemd-analyze verify` says of the units with a program that exists, and with further lines."""
    paths = []
    for unit in UNITS:
        path = directory / unit.name.replace("@.", "@cpu.")
        path.write_text(unit.read_text().replace("/opt/giantleap/bin/giantleap", "/bin/true") + further)
        paths.append(path)
    environment = {"XDG_RUNTIME_DIR": str(directory), "HOME": str(directory), "PATH": "/usr/bin:/bin"}
    argv = ["systemd-analyze", "verify", "--user", "--man=no", *map(str, paths)]  # --user needs no running systemd
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, env=environment, check=False).stderr
