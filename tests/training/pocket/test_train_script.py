"""The script that trains the pocket bundle: its commands exist, and each reads what an earlier one wrote."""

import os
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from giantleap.cli.main import app
from giantleap.training.pocket.__main__ import app as pocket_app

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "training" / "pocket"
STUB = '#!/bin/sh\nprintf "%s\\t" "${0##*/}" "$@" >> "$COMMANDS"; echo >> "$COMMANDS"\n'


@pytest.fixture
def commands(tmp_path: Path) -> list[list[str]]:
    """The command lines that the script runs."""
    for name in ("python", "giantleap"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "COMMANDS": str(tmp_path / "commands")}
    subprocess.run([FOLDER / "train.sh"], env=environment, check=True)
    return [line.split("\t")[:-1] for line in (tmp_path / "commands").read_text().splitlines()]


def parse(words: list[str]) -> Any:
    """Parse a command line as the program does, and return its parameters."""
    is_pocket = words[:3] == ["python", "-m", "giantleap.training.pocket"]
    group: Any = typer.main.get_command(pocket_app if is_pocket else app)
    rest = words[3 if is_pocket else 1 :]
    while commands := getattr(group, "commands", None):
        group, rest = commands[rest[0]], rest[1:]
    return group.make_context(group.name, rest).params


def inputs_of(params: dict[str, Any]) -> Iterator[Path]:
    for name, value in params.items():
        for each in value if isinstance(value, list | tuple) else [value]:
            if name not in ("out", "pool") and str(each).startswith("runs/"):
                yield Path(each)
    if config := params.get("config"):
        run = tomllib.loads((ROOT / config).read_text())
        named = [run["bundle"], run["pairs"], *([run["lua"]["start"]] if "start" in run["lua"] else [])]
        yield from ((FOLDER / each).resolve().relative_to(ROOT) for each in named)


def test_each_step_reads_what_an_earlier_one_wrote(commands: list[list[str]]) -> None:
    written: list[Path] = []
    for words in commands:
        params = parse(words)
        for path in inputs_of(params):
            assert any(path.is_relative_to(out) for out in written), f"{path} is not there yet: {words}"
        written += [Path(params["out"])] if "out" in params else []
    assert len(written) == len(set(written)) == len(commands) - 1, "only the last one, pack, writes into the bundle"


def test_every_run_file_is_used(commands: list[list[str]]) -> None:
    used = {word for words in commands for word in words if word.endswith(".toml")}
    assert used == {str(path.relative_to(ROOT)) for path in FOLDER.glob("*.toml")}
