"""Bad input of each kind to every command: one line with what to do, a documented exit code, no library's text."""

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from giantleap.cli.errors import EXIT_CODES
from giantleap.cli.main import app

# What a library, Python or the operating system says itself.
_FOREIGN = re.compile(
    r"Traceback|Errno|\[Err|No such file|Permission denied|Is a directory|Input should|pydantic|validation error"
    r"|torch\.|object at 0x|\x1b|Usage:|╭|Try '"
)
# Values that fill what else a command needs; none of them lets it begin its work.
_FILL = {
    "bundle": "pocket",
    "to_bundle": "pocket",
    "name": "mine",
    "scope": "generate",
    "prompt": "a cube",
    "base": "pocket",
}
_KINDS = ("unknown option", "extra argument", "missing value", "no number", "out of range", "no choice", "no such file")


@dataclass(frozen=True)
class Command:
    """A command with its parameters."""

    words: tuple[str, ...]
    parameters: tuple[Any, ...]
    hints: Mapping[str, Any]

    def fill(self, place: Path, left_out: str = "") -> list[str]:
        """Arguments for everything that is required, but one."""
        arguments: list[str] = []
        for each in self.parameters:
            if each.required and each.name != left_out:
                value = _FILL.get(each.name, str(place / "none" / f"{each.name}.png"))
                arguments += [value] if each.param_type_name == "argument" else [each.opts[-1], value]
        return arguments

    def of_kind(self, kind: str, place: Path) -> Iterator[list[str]]:
        """Command lines with one mistake of a kind."""
        options = [each for each in self.parameters if each.param_type_name == "option" and not each.hidden]
        if kind == "unknown option":
            yield [*self.fill(place), "--no-such-option"]
        elif kind == "extra argument" and not any(each.nargs == -1 for each in self.parameters):
            yield [*self.fill(place), "one", "two", "three"]
        elif kind == "missing value":
            yield from (self.fill(place, each.name) for each in self.parameters if each.required)
            yield from ([*self.fill(place), each.opts[-1]] for each in options if not each.is_flag)
        for each in options:
            annotation, *extras = get_args(self.hints[each.name]) if each.name in self.hints else (str,)
            wrong = {
                "no number": "three" if {int, float} & _types(annotation) else None,
                "out of range": "-7" if any(getattr(extra, "min", None) is not None for extra in extras) else None,
                "no choice": "no-such-choice" if _is_choice(annotation) else None,
            }.get(kind)
            if wrong is not None:
                yield [*self.fill(place, each.name), each.opts[-1], wrong]
        if kind == "no such file":
            yield from ([*self.fill(place, n), f"--{n}", str(place / "none")] for n in ("bundle",) if self.has(n))
            yield from ([*self.fill(place, n), f"--{n}", "no-such-bundle"] for n in ("bundle",) if self.has(n))
            yield from ([*self.fill(place, "device"), "--device", "gpu"] for n in ("device",) if self.has(n))
            yield self.fill(place)

    def has(self, name: str) -> bool:
        """Whether the command has an option of this name."""
        return any(f"--{name}" in each.opts for each in self.parameters)


def _types(hint: Any) -> set[Any]:
    """The types in a hint such as `list[float] | None`."""
    return {hint}.union(*(_types(each) for each in get_args(hint)))


def _is_choice(hint: Any) -> bool:
    return "Literal" in str(hint) or any(isinstance(each, type) and issubclass(each, Enum) for each in _types(hint))


def _commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[Command]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*words, name))
        else:
            hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
            yield Command((*words, name), tuple(each for each in command.params if each.name != "help"), hints)


COMMANDS = list(_commands(typer.main.get_command(app)))
# With all that they need these do their work: print, list, or serve.
_RUNS = {("serve",), ("api",), ("worker",), ("models",), ("settings",), ("bundle", "list"), ("bundle", "show"),
         ("bundle", "check"), ("bench", "protocol"), ("bench", "engines"), ("bench", "paper"),
         ("keys", "new"), ("keys", "list"), ("doctor",),
         ("generate",), ("status",), ("jobs", "list"), ("jobs", "show"), ("jobs", "cancel"), ("jobs", "delete"),
         ("jobs", "dead", "list"), ("jobs", "dead", "retry"), ("jobs", "dead", "drop"),
         ("provenance", "dev-cert")}  # fmt: skip


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIANTLEAP_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("COLUMNS", "40")  # nothing wraps an error
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("command", "kind"),
    list(itertools.product(COMMANDS, _KINDS)),
    ids=lambda each: " ".join(getattr(each, "words", (each,))),
)
def test_a_mistake_is_one_line_with_what_to_do(command: Command, kind: str, tmp_path: Path) -> None:
    for arguments in command.of_kind(kind, tmp_path):
        if kind == "no such file" and command.words in _RUNS and arguments == command.fill(tmp_path):
            continue
        ended = CliRunner().invoke(app, [*command.words, *arguments])
        shown = f"giantleap {' '.join((*command.words, *arguments))}: {ended.output}"
        assert ended.exit_code == 2 and isinstance(ended.exception, SystemExit), shown
        assert ended.stdout == "" and ended.stderr.startswith("giantleap: "), shown
        assert len(ended.stderr.splitlines()) == 1 and not _FOREIGN.search(ended.stderr), shown
        assert re.search(r"; |--help|: |^give ", ended.stderr.removeprefix("giantleap: ")), f"what to do? {shown}"


def test_the_commands_and_kinds_are_all_walked(tmp_path: Path) -> None:
    assert len(COMMANDS) > 20
    for kind in _KINDS:
        assert any(list(command.of_kind(kind, tmp_path)) for command in COMMANDS), kind


@pytest.mark.parametrize("words", [(), ("bundle",), ("train",), ("keys",), ("bench",)], ids=str)
def test_a_group_of_commands_alone_shows_its_help(words: tuple[str, ...]) -> None:
    ended = CliRunner().invoke(app, list(words))
    assert ended.exit_code == 2 and "--help" in ended.output and "giantleap: " not in ended.output


def test_exit_codes_are_in_the_help_and_in_the_pages() -> None:
    helped = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    codes = next(line for line in page.splitlines() if line.startswith("- **Exit codes**"))
    for code in ("0", "1", "2", "3", "4", "75", "130"):
        assert re.search(rf"\b{code} [a-z]", EXIT_CODES) and re.search(rf"\b{code} [a-z]", codes), code
    assert EXIT_CODES in " ".join(helped.split())
