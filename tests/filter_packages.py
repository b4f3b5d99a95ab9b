"""Packages with image filters, installed as pip leaves them: modules beside a dist-info directory on the path."""

import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "flat_image_filter"


def install(
    site: Path, name: str, entry_points: Mapping[str, str], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Install a package of one module for the rest of a test.

    Args:
        site: A directory that is not on the path yet.
        name: Of the distribution and its module.
        entry_points: Objects of the group "giantleap.filters" by name.
        source: Text of the module.
    """
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[giantleap.filters]", *lines, ""]))
    monkeypatch.syspath_prepend(str(site))


def install_example(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the example package, whose filter is `flat`."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    (module,) = project["tool"]["setuptools"]["py-modules"]
    points = project["project"]["entry-points"]["giantleap.filters"]
    install(site, module, points, (EXAMPLE / f"{module}.py").read_text(), monkeypatch)
