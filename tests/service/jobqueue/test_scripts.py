"""The Lua scripts as they are loaded: every file is used, every include is resolved once."""

import re
import subprocess
from pathlib import Path

import pytest

from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.replies import SettleReply

ROOT = Path(__file__).resolve().parents[3]
LUA = ROOT / "service" / "jobqueue" / "lua"
LOADED = {value.name: value for value in vars(scripts).values() if isinstance(value, scripts.LuaScript)}


def test_each_file_is_a_script_that_python_runs() -> None:
    assert {path.stem for path in LUA.glob("*.lua")} == set(LOADED)


def test_each_include_is_used() -> None:
    used = {name for path in LUA.rglob("*.lua") for name in re.findall(r"^-- @include (\w+)$", path.read_text(), re.M)}
    assert {path.stem for path in (LUA / "includes").glob("*.lua")} == used


@pytest.mark.parametrize("script", LOADED.values(), ids=lambda script: script.name)
def test_a_resolved_script_has_each_include_once(script: scripts.LuaScript[object]) -> None:
    functions = re.findall(r"^local function (\w+)", script.text, re.M)
    assert "@include" not in script.text and len(functions) == len(set(functions))


@pytest.mark.parametrize("script", LOADED.values(), ids=lambda script: script.name)
def test_a_resolved_script_calls_each_function_and_has_short_lines(script: scripts.LuaScript[object]) -> None:
    """Two of the rules of luacheck, which `make lint` can run only where it is installed."""
    functions = re.findall(r"^local function (\w+)", script.text, re.M)
    assert [name for name in functions if len(re.findall(rf"\b{name}\b", script.text)) == 1] == []
    assert [line for line in script.text.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("path", sorted(LUA.glob("*.lua")), ids=lambda path: path.stem)
def test_the_head_of_a_script_documents_its_arguments_and_reply(path: Path) -> None:
    text = path.read_text()
    head = text.partition("-- @include")[0]
    assert all(f"\n-- {part} " in head for part in ("KEYS[1]", "ARGV[1]", "Reply   "))
    assert all(f"-- ARGV[{n}]" in head for n in set(re.findall(r"ARGV\[(\d)\]", text)))


def test_a_reply_that_is_not_of_its_type_is_refused_without_its_values() -> None:
    assert scripts.COMPLETE.parse(b'{"status":"done"}') == SettleReply("done")
    with pytest.raises(ValueError, match=r"complete\.lua is not valid: status: literal_error") as refused:
        scripts.COMPLETE.parse(b'{"status":"a red ball"}')
    assert "red ball" not in str(refused.value)


@pytest.mark.deploy
def test_luacheck_refuses_a_function_that_no_script_calls(tmp_path: Path) -> None:
    (tmp_path / "emit.lua").write_text(scripts.EMIT.text + "local function unused() end\n")
    command = ["luacheck", "--config", str(ROOT / ".luacheckrc"), str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "unused function" in refused.stdout
