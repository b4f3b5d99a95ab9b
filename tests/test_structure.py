"""The structure holds: imports go one way through the layers, and folders, modules and functions stay small."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (
    "benchmarks", "clients/python/giantleap_client", "export", "giantleap/batch", "giantleap/cli", "models", "service",
    "training",
)  # fmt: skip
MAX_MODULES_PER_FOLDER = 15
MAX_MODULE_LINES = 450
MAX_FUNCTION_LINES = 60

# From the bottom to the top. A part imports its own modules and the parts of the lines below its own, no others.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "models.atomic_file",
        "models.constraints",
        "models.pixels.image_formats",
        "models.messages",
        "models.safetensors_header",
    ),
    (
        "models.allocator",
        "models.device",
        "models.live_storage",
        "models.pixels",
        "models.worker_role",
    ),
    ("models.provenance", "models.adapters", "models.filters"),
    ("models.lua",),
    ("models.latent_space",),
    ("models.bundle",),
    ("models.engines", "models.vae"),
    ("models.generation", "models.upscaler"),
    ("models.methods",),
    ("models.route",),
    ("models.load", "models.runs"),
    ("export", "training.data"),
    ("training.evaluation",),
    ("training",),
    ("training.pocket",),
    ("service.errors",),
    ("service.settings",),
    ("service.settings_page",),
    ("service.auth",),
    ("service.links",),
    ("service.jobs",),
    ("service.results",),
    ("service.jobqueue",),
    ("service.telemetry",),
    ("service.webhooks",),
    ("service.api", "service.doctor", "service.supervisor", "service.worker"),
    ("batch",),
    ("cli",),
)
LEVELS = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def _modules() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def _name_of(path: Path) -> str:
    """The module's dotted name without `giantleap.`: `service.api.app`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("giantleap.").removesuffix(".__init__")


def part_of(module: str) -> str | None:
    """The most specific part of `LAYERS` that holds the module, such as `training.data`."""
    names = module.split(".")
    return next((part for end in range(len(names), 0, -1) if (part := ".".join(names[:end])) in LEVELS), None)


def imports_of(source: str) -> Iterator[str]:
    """Every module of giantleap that a source imports, at the top, in a function or for type checks only."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("giantleap.") for alias in node.names if "giantleap." in alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "giantleap":
            base = node.module.removeprefix("giantleap").removeprefix(".")
            yield from (f"{base}.{alias.name}".removeprefix(".") for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    """The imports of `source` that do not go down the layers."""
    part = part_of(module)
    wrong = []
    for imported in imports_of(source):
        assert part is not None, f"{module} is in no layer: add its folder to LAYERS"
        target = part_of(imported)
        assert target is not None, f"{module} imports {imported}, which is in no layer"
        if target != part and LEVELS[target] >= LEVELS[part]:
            wrong.append(f"{module} ({part}) imports {imported} ({target})")
    return wrong


@pytest.mark.parametrize("path", [path for path in _modules() if path.parts[-2] != "peers"], ids=_name_of)
def test_imports_go_down_the_layers(path: Path) -> None:
    if not path.is_relative_to(ROOT / "benchmarks"):
        assert violations(_name_of(path), path.read_text()) == []


def test_an_import_that_is_turned_round_is_found() -> None:
    assert violations("service.jobs.planning", "from giantleap.service.worker.batching import plan_batch")
    assert violations("service.api.app", "def f():\n    from giantleap.service.worker import loop")
    assert violations("models.lua.network", "import giantleap.models.route")
    assert violations("training.data.prepare", "from giantleap.training import run")
    assert violations("service.worker.loop", "from giantleap.service.jobs.job import Job") == []
    assert violations("clients.python.giantleap_client.flows", "from giantleap_client.errors import Timeout") == []


def test_every_layer_is_a_place_in_the_tree() -> None:
    for part in LEVELS:
        place = ROOT / "giantleap" / part.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").is_file(), part


def test_no_folder_holds_too_many_modules() -> None:
    counts = Counter(path.parent for path in _modules() if path.name != "__init__.py")
    assert {str(folder): n for folder, n in counts.items() if n > MAX_MODULES_PER_FOLDER} == {}


@pytest.mark.parametrize("path", _modules(), ids=_name_of)
def test_modules_stay_small(path: Path) -> None:
    assert path.read_text().count("\n") <= MAX_MODULE_LINES


@pytest.mark.parametrize("path", [*_modules(), *sorted((ROOT / "tests").rglob("*.py"))], ids=_name_of)
def test_functions_stay_small(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, node.name
