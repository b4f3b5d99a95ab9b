"""The wheels, built from copies of the tree: `giantleap` with its data and its client, the client alone."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CLIENT = ROOT / "clients" / "python"
LINKS = [path.name for path in (ROOT / "giantleap").iterdir() if path.is_symlink()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel. A build writes into its source tree, hence the copy."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for name in ("giantleap", *LINKS, "benchmarks", "tests"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CLIENT / "giantleap_client", source / "giantleap_client")  # as the Dockerfile copies it
    return build(source, out)


def build(source: Path, out: Path) -> Path:
    """The wheel of a source tree, built without the network."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    built = subprocess.run([*command, "--wheel-dir", out, source], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_giantleap_its_client_and_its_metadata_only(names: set[str]) -> None:
    top = {name.split("/")[0] for name in names}
    packages = {"giantleap", "giantleap_client"}
    assert {name for name in top if not name.endswith(".dist-info")} == packages and len(top) == 3
    assert {name.split("/")[1] for name in names if name.count("/") > 1 and name.startswith("giantleap/")} == {
        "batch",
        "cli",
        *LINKS,
    }
    assert any(name.endswith(".dist-info/licenses/NOTICE") for name in names), "authors of photographs it trained on"


def test_every_module_script_and_bundle_is_in_the_wheel(names: set[str]) -> None:
    missing = []
    for folder in LINKS:
        for path in (ROOT / folder).rglob("*"):
            data = path.suffix in (".py", ".lua", ".html", ".js", ".css", ".svg") or (
                folder == "bundles" and path.is_file()
            )
            if data and "__pycache__" not in path.parts and f"giantleap/{path.relative_to(ROOT)}" not in names:
                missing.append(str(path))
    assert not missing
    assert "giantleap/py.typed" in names
    client = {f"giantleap_client/{path.name}" for path in (CLIENT / "giantleap_client").iterdir() if path.is_file()}
    assert client == {name for name in names if name.startswith("giantleap_client/")}


def test_the_client_has_one_version_and_one_bound_of_httpx_in_both_distributions() -> None:
    own, client = (tomllib.loads((each / "pyproject.toml").read_text())["project"] for each in (ROOT, CLIENT))
    assert own["version"] == client["version"] and set(client["dependencies"]) <= set(own["dependencies"])
    assert (ROOT / "giantleap_client").resolve() == CLIENT / "giantleap_client"


def test_the_installed_command_and_package_run_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = "import giantleap; print(giantleap.__file__)"
    for arguments, expected in (
        (("-m", "giantleap", "models"), str(tmp_path / "giantleap" / "bundles" / "pocket")),
        (("-c", code), str(tmp_path / "giantleap" / "__init__.py")),
        (("-m", "giantleap.cli.demo", "--help"), "--prompt PROMPT"),
    ):
        ran = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
        )
        assert ran.returncode == 0 and expected in ran.stdout, ran.stderr


def test_the_client_is_a_wheel_of_its_own_that_needs_httpx_alone(tmp_path: Path) -> None:
    source = shutil.copytree(CLIENT, tmp_path / "source")
    with zipfile.ZipFile(build(source, tmp_path / "out")) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    package = source / "giantleap_client"
    assert names == {f"giantleap_client/{path.name}" for path in package.iterdir() if path.is_file()}
    assert "giantleap_client/py.typed" in names
    assert [line for line in metadata.splitlines() if line.startswith("Requires-Dist")] == [
        "Requires-Dist: httpx<1,>=0.28"
    ]


def test_the_client_imports_the_standard_library_and_httpx_at_first() -> None:
    code = "import sys, giantleap_client; print({'numpy', 'torch', 'PIL', 'safetensors', 'giantleap'} & {*sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(CLIENT)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert ran.stdout == "set()\n", ran.stderr
