"""`--help` of a benchmark answers at once: nothing that it imports at the top loads torch, and it starts no work."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLOW = frozenset({"accelerate", "diffusers", "onnx", "peft", "skimage", "torch", "torchmetrics", "transformers"})
SERVERS = frozenset({f"benchmarks.peers.{name}_noop" for name in ("bentoml", "litserve", "ray")})  # have no options
OURS = ("benchmarks", "giantleap")


def _is_run(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


def _runnable() -> list[str]:
    return sorted(
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
        for path in (ROOT / "benchmarks").rglob("*.py")
        if any(map(_is_run, ast.parse(path.read_text()).body))
    )


RUNNABLE = _runnable()


def _path_of(name: str) -> Path | None:
    """The file of a module of ours; None for an attribute of a module."""
    places = [ROOT.joinpath(*name.split("."))]
    places += [ROOT.joinpath(*name.split(".")[1:])] if name.startswith("giantleap.") else []
    files = (file for place in places for file in (place.with_suffix(".py"), place / "__init__.py"))
    return next((file for file in files if file.exists()), None)


def _path_of_run(name: str) -> Path:
    """The file that `python -m` runs."""
    path = _path_of(f"{name}.__main__") or _path_of(name)
    assert path is not None
    return path


def _top_imports(statements: list[ast.stmt]) -> Iterator[str]:
    """What the import of a module imports in turn, with the parents; a name may be a module or an attribute."""
    for each in statements:
        if isinstance(each, ast.Import):
            yield from (alias.name for alias in each.names)
        elif isinstance(each, ast.ImportFrom) and each.module and not each.level:
            yield each.module
            yield from (f"{each.module}.{alias.name}" for alias in each.names if each.module.startswith(OURS))
        elif isinstance(each, ast.If) and ast.unparse(each.test) != "TYPE_CHECKING":
            yield from _top_imports(each.body + each.orelse)
        elif isinstance(each, ast.Try):
            yield from _top_imports(each.body)


def slow_imports(name: str) -> list[str]:
    """How a module that is run reaches a slow package: the modules from it to there; empty if it does not."""
    chains = [([name], _path_of_run(name))]
    done: set[str] = set()
    while chains:
        chain, path = chains.pop()
        for imported in _top_imports(ast.parse(path.read_text()).body):
            parts = imported.split(".")
            if parts[0] in SLOW or imported == "safetensors.torch":
                return [*chain, imported]
            parents = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}  # they are imported, too
            for parent in parents - done if parts[0] in OURS else ():
                done.add(parent)
                found = _path_of(parent)
                chains += [([*chain, parent], found)] if found else []
    return []


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_help_of_a_benchmark_loads_no_torch(name: str) -> None:
    assert slow_imports(name) == []


@pytest.mark.parametrize("name", sorted(set(RUNNABLE) - SERVERS))
def test_a_benchmark_reads_its_options_before_it_works(name: str) -> None:
    source = _path_of_run(name).read_text()
    assert any(parser in source for parser in ("typer.run(", "parse_args(", "app()", "import main"))


def test_a_slow_import_is_found() -> None:
    assert slow_imports("benchmarks.images.decode.pocket")[-1] == "torch"


@pytest.mark.parametrize(
    "name", ["benchmarks.batching", "benchmarks.engines", "benchmarks.gpu_check", "benchmarks.images.decode"]
)
def test_help_is_printed_without_torch(name: str) -> None:
    code = (
        f"import runpy, sys; sys.argv = [{name!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_module({name!r}, run_name='__main__')\n"
        "except SystemExit as error:\n"
        "    assert not error.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--help" in done.stdout, done.stderr
