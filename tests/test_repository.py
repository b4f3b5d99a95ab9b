"""The repository keeps its own promises: import arrows, the settings page, the README's commands, no pickle."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from giantleap.service.settings_page import to_markdown

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (
    "benchmarks", "clients/python/giantleap_client", "export", "giantleap/batch", "giantleap/cli", "models", "service",
    "training",
)  # fmt: skip
MAY_IMPORT = {
    "models": {"models"},
    "service": {"export", "models", "service"},
    "export": {"export", "models"},
    "training": {"models", "training"},
    "clients": set(),  # a distribution of its own
    "batch": {"batch", "models", "service"},
    "cli": {"batch", "cli", "export", "models", "service", "training"},
    "benchmarks": {"batch", "cli", "export", "models", "service", "training"},
}


def _modules() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def _imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    package = parts[1] if parts[0] == "giantleap" else parts[0]
    imported = {name.split(".")[1] for name in _imported_modules(path) if name.startswith("giantleap.")}
    assert imported <= MAY_IMPORT[package]


TOP_LEVEL_FOLDERS = {"bundles", "export", "models", "service", "training"}


@pytest.mark.parametrize("path", [*_modules(), *sorted((ROOT / "tests").rglob("*.py"))], ids=str)
def test_the_bare_folder_names_are_never_imported(path: Path) -> None:
    # A module that is reached by two names is loaded twice: `isinstance` and caches then disagree.
    assert not {name.split(".")[0] for name in _imported_modules(path)} & TOP_LEVEL_FOLDERS


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles(path: Path) -> None:
    assert not _imported_modules(path) & {"cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr == "UnpicklingError", "only the error of torch.load may be caught"
        if isinstance(node, ast.ImportFrom):
            assert node.module != "pickle"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert {kw.arg: ast.unparse(kw.value) for kw in node.keywords}.get("weights_only") == "True"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False"


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *(need for extra in project["optional-dependencies"].values() for need in extra)]
    declared = {re.split(r"[^A-Za-z0-9._-]", need)[0].lower().replace("_", "-") for need in needs}
    declared |= {"anyio", "httptools", "pyarrow", "starlette", "tokenizers", "uvloop"}  # of those that are declared
    declared |= {"torch-fidelity", "cvvdp", "pycvvdp"}  # for one metric each, which is else not available
    names = {
        name.split(".")[0]
        for path in _modules()
        for name in _imported_modules(path)
        if path.parent.name != "peers"  # other servers, which `make peers` installs apart
    }
    sources = packages_distributions()
    undeclared = []
    for name in sorted(names - set(sys.stdlib_module_names) - {"benchmarks", "giantleap", "giantleap_client", "tests"}):
        distributions = {source.lower().replace("_", "-") for source in sources.get(name, [name])}
        if not distributions & declared:
            undeclared.append(name)
    assert undeclared == []


def test_settings_page_is_what_the_code_says() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == to_markdown()


def test_make_targets_named_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test", "serve"} <= named <= targets


def test_ci_runs_what_the_readme_calls() -> None:
    assert "make check" in (ROOT / ".ci" / "run").read_text()
    check = re.search(r"^check: ([a-z ]+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert check is not None and "test" in check[1].split()


def test_torch_bounds_and_the_extras_that_exclude_each_other() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "torch>=2.11,<2.14" in project["dependencies"]
    extras = {name: " ".join(needs) for name, needs in project["optional-dependencies"].items()}
    assert "onnxruntime-gpu" not in extras["cpu"] and "onnxruntime-gpu" in extras["gpu"]
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        assert "<" in requirement or requirement.startswith("giantleap["), f"{requirement} has no upper bound"


def test_nothing_installs_the_project_from_an_index_which_has_none() -> None:
    texts = [*_modules(), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile", ROOT / "Dockerfile"]
    wrong = re.compile(r"""pip3? install [^\n]*["' ]giantleap(\[|[ "'`]|$)""")
    assert [str(path) for path in texts if wrong.search(path.read_text())] == []
    assert wrong.search("pip install 'giantleap[cpu]'") and not wrong.search("pip install '.[cpu]'")
