"""Contributors and CI run one thing: hooks, workflow and `make lint` agree, and so do the versions of Python."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def recipe(target: str) -> list[str]:
    """The commands of a target."""
    match = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert match is not None, target
    return [line.strip() for line in match[1].splitlines()]


def test_the_hooks_run_what_lint_runs() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["entry"].removesuffix(" --force-exclude") for hook in repo["hooks"]}
    python_tools = {command.replace("$(BIN)", ".venv/bin") for command in recipe("lint")}
    assert hooks <= python_tools and {tool.split()[0] for tool in hooks} >= {".venv/bin/ruff", ".venv/bin/codespell"}


def test_the_workflow_runs_ours_on_the_oldest_and_the_newest_python() -> None:
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["check"]
    assert job["steps"][-1]["run"] == ".ci/run"
    runs = {(each["python"], each["dependencies"]) for each in job["strategy"]["matrix"]["include"]}
    supported = sorted(
        (line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)),
        key=lambda text: int(text.split(".")[1]),
    )
    assert PROJECT["requires-python"] == f">={supported[0]}"
    assert runs == {(supported[0], "newest"), (supported[-1], "newest"), (supported[0], "oldest")}


def test_no_dependency_is_bound_to_one_platform_or_python() -> None:
    assert not [requirement for requirement in PROJECT["dependencies"] if ";" in requirement]


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
