"""Helm for the tests of the chart: its own code in Python where that is published, else the `helm` program.

`helm-python-sdk` has no wheel for Linux on ARM (see `dev` in pyproject.toml). Where neither is there the tests fail and
say so: a chart that nobody rendered has not been tested.
"""

import importlib.util
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

Values = dict[str, Any]
MISSING = (
    "neither helm-python-sdk nor a program `helm` is here, so the chart cannot be tested: pip install helm-python-sdk "
    "(x86_64, macOS, Windows), or put Helm 4 on PATH (https://helm.sh/docs/intro/install/)"
)


class HelmRefused(Exception):
    """Helm did not take the chart or the values; the text is Helm's."""


class HelmMissing(Exception):
    """There is no Helm to test with."""


class HelmSdk:
    """Helm 4's own code, in this process."""

    def render(self, chart: Path, values: Values) -> list[Any]:
        import helm_python

        try:
            with helm_python.Chart.load(chart) as loaded:
                loaded.validate_schema(values)
                files = loaded.render(values, name="prod", namespace="images")
        except helm_python.HelmError as error:
            raise HelmRefused(str(error)) from error
        return [
            each
            for name, text in sorted(files.items())
            if not name.endswith("NOTES.txt")
            for each in yaml.safe_load_all(text)
            if each
        ]

    def lint(self, chart: Path, values: Values) -> None:
        import helm_python

        report = helm_python.lint(chart, values, strict=True)
        if report["errors"] or any(message["severity"] > 1 for message in report["messages"]):
            raise HelmRefused(str(report))


class HelmProgram:
    """The program at `path`."""

    def __init__(self, path: str) -> None:
        self._path = path

    def render(self, chart: Path, values: Values) -> list[Any]:
        text = self._run(values, "template", "prod", str(chart), "--namespace", "images")
        return [each for each in yaml.safe_load_all(text) if each]

    def lint(self, chart: Path, values: Values) -> None:
        self._run(values, "lint", str(chart), "--strict")

    def _run(self, values: Values, *arguments: str) -> str:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(values, file)
            file.flush()
            command = [self._path, *arguments, "--values", file.name]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if ended.returncode:
            raise HelmRefused(ended.stdout + ended.stderr)
        return ended.stdout


def find_helm(sdk: str = "helm_python") -> HelmSdk | HelmProgram:
    """What charts are rendered with here.

    Args:
        sdk: The package that is looked for first.

    Raises:
        HelmMissing: there is neither.
    """
    if importlib.util.find_spec(sdk) is not None:
        return HelmSdk()
    path = shutil.which("helm")
    if path is None:
        raise HelmMissing(MISSING)
    return HelmProgram(path)
