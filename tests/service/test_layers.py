"""Imports between the parts of `service` go one way: down the layers, never up and never sideways."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVICE = Path(__file__).resolve().parents[2] / "service"
PACKAGE = "giantleap.service"
LAYERS = (
    {"errors"},
    {"settings"},
    {"auth"},
    {"jobs"},
    {"jobqueue"},
    {"telemetry"},
    {"webhooks"},
    {"api", "worker", "supervisor"},
)
LEVELS = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def _part(module: str) -> str:
    return module.removeprefix(PACKAGE + ".").partition(".")[0]


def _service_imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            names = [f"{PACKAGE}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module]
        else:
            continue
        yield from (name for name in names if name.startswith(PACKAGE + "."))


def forbidden_imports(part: str, source: str) -> list[str]:
    """The imports of a module of `part` that do not go down."""
    imported = {name: _part(name) for name in _service_imports(source)}
    return sorted(name for name, other in imported.items() if other != part and LEVELS[other] >= LEVELS[part])


def test_every_part_has_a_layer() -> None:
    parts = {path.stem for path in SERVICE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__"} == LEVELS.keys()


@pytest.mark.parametrize("path", sorted(SERVICE.rglob("*.py")), ids=lambda path: str(path.relative_to(SERVICE)))
def test_imports_go_down(path: Path) -> None:
    part = path.relative_to(SERVICE).parts[0].removesuffix(".py")
    source = path.read_text()
    assert "giantleap.cli" not in source, "the service does not know its command line"
    if part != "__init__":
        assert forbidden_imports(part, source) == []


@pytest.mark.parametrize(
    "source",
    (
        "from giantleap.service.api.problems import problem_body",
        "import giantleap.service.worker.loop",
        "from giantleap.service import webhooks",
        "def lazily():\n    from giantleap.service.jobqueue.keys import Keys",
    ),
)
def test_an_import_that_is_turned_round_is_seen(source: str) -> None:
    assert len(forbidden_imports("jobs", source)) == 1
