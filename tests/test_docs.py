"""The documentation is true: links, commands, names and figures exist, in the pages and in the docstrings."""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks.readme_figures import (
    ADAPTER_LOG,
    ENCODE_LOG,
    METHODS_PAGE,
    OPERATIONS,
    README,
    RESULTS,
    put_blocks,
    to_blocks,
    to_encode_blocks,
    to_method_blocks,
    to_operations_blocks,
    to_paper_blocks,
)
from giantleap.cli.main import app
from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.bundle.descriptor import from_toml
from giantleap.models.latent_space import LATENT_SPACES
from giantleap.service.errors import InvalidFields
from giantleap.service.jobs.planning import plan_generate
from giantleap.service.jobs.requests import GenerateRequest
from giantleap.service.settings import POCKET_BUNDLE, read_settings
from giantleap.training.pocket.drawing.captions import known_words
from giantleap.training.run_config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "clients").rglob("*.md"), *(ROOT / "docs").rglob("*.md")])
CODE = sorted(
    path
    for folder in (
        "benchmarks",
        "clients",
        "export",
        "giantleap/batch",
        "giantleap/cli",
        "models",
        "service",
        "tests",
        "training",
    )
    for path in (ROOT / folder).rglob("*.py")
)
ALL = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_DOTTED = re.compile(r"`(giantleap(?:\.[A-Za-z_]\w*)+)[`(]")
_FILE = re.compile(
    r"`((?:\.ci|benchmarks|bundles|deploy|docs|export|giantleap|models|service|tests|training)/[\w./-]*\w\.\w+)`"
)
_TEST = re.compile(r"`(test_\w+\.py)`")
MAX_WORDS = 28_000  # of all pages but the lab logs
_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\$? ?(?:[A-Z_]+=\S+ )*(?:torchrun \S+ \S+ -m giantleap\.cli\.main|giantleap) (.*)$")


def _is_defined(name: str) -> bool:
    """Whether a dotted name is a package, a module, or a name that a module or a class of it defines."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
            source = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
            body: list[ast.stmt] = ast.parse(source.read_text()).body
            for part in parts[length:]:
                found = [node for node in body if part in _names(node)]
                if not found:
                    return False
                body = found[0].body if isinstance(found[0], ast.ClassDef) else []
            return True
    return False


def _names(node: ast.stmt) -> list[str]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.Assign():
            return [target.id for target in node.targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Import() | ast.ImportFrom():
            return [alias.asname or alias.name for alias in node.names]
    return []


def _blocks(text: str) -> Iterator[str]:
    """Yield the content of fenced blocks, with continued lines joined."""
    for block in _FENCE.findall(text):
        yield block.replace("\\\n", " ")


def _anchor(heading: str) -> str:
    """Return the anchor that GitHub makes from a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", ""))
    return text.replace(" ", "-")


def _anchors(page: Path) -> set[str]:
    return {_anchor(line.lstrip("#")) for line in _FENCE.sub("", page.read_text()).splitlines() if line.startswith("#")}


@ALL
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for target in _LINK.findall(_FENCE.sub("", page.read_text())):
        if not target.startswith(("http://", "https://")):
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.exists(), target
            assert not anchor or anchor in _anchors(file), target


@ALL
def test_files_and_tests_named_in_the_pages_exist(page: Path) -> None:
    text = page.read_text()
    assert [name for name in _FILE.findall(text) if not (ROOT / name).exists()] == []
    assert [name for name in _TEST.findall(text) if not list((ROOT / "tests").rglob(name))] == []


@ALL
def test_names_of_code_in_the_pages_exist(page: Path) -> None:
    assert [name for name in _DOTTED.findall(page.read_text()) if not _is_defined(name)] == []


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_docstrings_exist(path: Path) -> None:
    text = " ".join(" ".join(_docstrings(path)).split())
    missing = [name for name in _DOTTED.findall(text) if not _is_defined(name)]
    files = [name for name in _FILE.findall(text) if not name.startswith("benchmarks/results/")]  # written by running
    assert missing + [name for name in files if not (ROOT / name).exists()] == []


def test_the_pages_are_short_enough_to_be_read() -> None:
    pages = [page for page in PAGES if not {"clients", "lab"} & set(page.relative_to(ROOT).parts)]
    words = {str(page.relative_to(ROOT)): len(page.read_text().split()) for page in pages}
    assert sum(words.values()) <= MAX_WORDS, sorted(words.items(), key=lambda item: -item[1])


@ALL
def test_settings_metrics_and_alerts_named_in_the_pages_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # names what was removed
        return
    text, rules = page.read_text(), (ROOT / "deploy" / "prometheus" / "rules.yml").read_text()
    settings = set(re.findall(r"^\| `(GIANTLEAP_\w+)`", (ROOT / "docs" / "settings.md").read_text(), re.MULTILINE))
    metrics = set(re.findall(r"^\| `(giantleap_\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    assert set(re.findall(r"GIANTLEAP_[A-Z_]+[A-Z]", text)) <= settings
    assert {
        re.sub(r"_(sum|count|bucket)$", "", name) for name in re.findall(r"`(giantleap_\w+[a-z])[`{]", text)
    } <= metrics
    assert set(re.findall(r"`(Giantleap[A-Z]\w+)`", text)) <= set(re.findall(r"alert: (\w+)", rules))


def _check_options(words: list[str]) -> None:
    """Assert that every option of a command line belongs to its command."""
    command: Any = typer.main.get_command(app)
    for word in words:
        if word.startswith("-"):
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            assert word.partition("=")[0] in known, f"{command.name} has no {word}"
        else:
            command = getattr(command, "commands", {}).get(word, command)


@ALL
def test_command_lines_name_commands_and_options_that_exist(page: Path) -> None:
    for block in _blocks(page.read_text()):
        for line in block.splitlines():
            if match := _COMMAND.match(line):
                words = shlex.split(match[1].partition(" 2>")[0], comments=True)
                _check_options([word for word in words if word != "..."])


@ALL
def test_modules_and_targets_that_are_run_exist(page: Path) -> None:
    text = page.read_text()
    for module in re.findall(r"python -m ((?:benchmarks|giantleap)[\w.]*)", text):
        assert importlib.util.find_spec(module), module
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets


def test_a_name_that_does_not_exist_is_detected() -> None:
    assert _is_defined("giantleap.models.route.Route.decode") and _is_defined("giantleap.service.api")
    assert not _is_defined("giantleap.models.route.Route.decod") and not _is_defined("giantleap.service.apis")


def test_an_option_that_does_not_exist_is_detected() -> None:
    _check_options(["export", "--bundle", "x", "check", "--device"])
    with pytest.raises(AssertionError, match="has no --engin"):
        _check_options(["export", "--engin", "onnx"])


@pytest.mark.parametrize("name", ["README.md", "docs/api.md"])
def test_bodies_of_generate_are_accepted_by_the_pocket_bundle(name: str) -> None:
    bundle, settings, accepted = read_bundle(POCKET_BUNDLE), read_settings(), 0
    for block in _blocks((ROOT / name).read_text()):
        for body in re.findall(r"/(?:generate|jobs/\$ID) .*?(?:--json|-d) '(\{.*?\})'", block, re.DOTALL):
            request = GenerateRequest.model_validate_json(body)
            if request.width == 300:  # the README shows how this one is refused
                with pytest.raises(InvalidFields) as refused:
                    plan_generate(request, bundle, settings, 7, "png")
                shown = " ".join(block.split())
                assert refused.value.detail in shown
            else:
                plan_generate(request, bundle, settings, 7, "png")
            accepted += 1
    assert accepted >= 3


def test_the_pocket_bundle_knows_the_words_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    prompts = re.findall(r'"prompt": "(.*?)"|giantleap generate "(.*?)"|`(a [a-z, ]+ sky)`', text)
    words = {word for groups in prompts for word in re.findall(r"[a-z]+", "".join(groups))}
    assert len(prompts) >= 5 and words - set(known_words()) == {"zebra"}, "the README shows the warning about it"


def test_the_bundle_of_the_guide_is_one() -> None:
    page = (ROOT / "docs" / "bundles" / "README.md").read_text()
    (descriptor,) = (block for block in _blocks(page) if "[pipeline]" in block)
    assert from_toml(descriptor.encode()).bundle.name == "mine"
    families = re.search(r"Known families: ([\w\s,.-]+?)\. ", page)
    assert families is not None and set(re.split(r",\s+", families[1])) == set(LATENT_SPACES)


def test_the_run_files_of_the_training_guide_are_valid_and_its_keys_are_all() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    runs = [tomllib.loads(block) for block in _FENCE.findall(page) if re.search(r"^pairs = ", block, re.MULTILINE)]
    assert len(runs) == 2
    for run in runs:
        RunConfig.model_validate(run)
    rows = re.findall(r"^\| (`[a-z_\[].*?) \|.*\|.*\|$", page.partition("## 2. The run")[2], re.MULTILINE)
    keys = {key for row in rows for key in re.findall(r"`\[?([a-z_]+)\]?`", row)}
    assert set(RunConfig.model_fields) - {"bundle", "pairs", "lua", "stages"} <= keys


def test_the_table_of_bundles_is_that_of_the_descriptors() -> None:
    page = (ROOT / "docs" / "bundles" / "README.md").read_text()
    rows = re.findall(r"^\| ([\w.-]+) \| (?:`(\S+)`|in the repository) \| (.*?) \| ([\w-]+), (\d+).*$", page, re.M)
    descriptors = {path.parent.name: read_bundle(path.parent) for path in (ROOT / "bundles").glob("*/bundle.toml")}
    assert {row[0] for row in rows} == set(descriptors)
    for name, hub_id, license_name, space, channels in rows:
        bundle = descriptors[name]
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        limits, defaults = bundle.limits, bundle.defaults
        assert (license_name, space) == (bundle.about.license, bundle.latent_space.name)
        assert int(channels) == bundle.latent_space.channels and (not hub_id or hub_id == bundle.pipeline)
        assert f"| {defaults.steps}, {defaults.guidance_scale} | {defaults.base_width_px}; " in line
        assert f"{limits.min_base_px} to {limits.max_base_px} by {limits.multiple_px} |" in line


@pytest.mark.parametrize(
    ("page", "blocks"),
    [
        (README, to_blocks),
        (OPERATIONS, to_operations_blocks),
        (ADAPTER_LOG, to_method_blocks),
        (METHODS_PAGE, to_paper_blocks),
        (ENCODE_LOG, to_encode_blocks),
    ],
)
def test_a_page_has_the_figures_of_the_reports(page: Path, blocks: Callable[[Path], dict[str, str]]) -> None:
    text = page.read_text()
    assert text == put_blocks(text, blocks(RESULTS)), "run `python -m benchmarks.readme_figures`"


def _report(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return report


def _operations_figures() -> Iterator[str]:
    (lua,) = (row for row in _report("methods")["results"] if (row["method"], row["scale"]) == ("lua", 2))
    total_s = round(lua["stages"]["total"]["median_s"], 3)
    yield f"takes a median of {total_s:.3f} s"
    yield f"5 jobs/s: 5 * {total_s:.3f} / 0.7 = {5 * total_s / 0.7:.1f}"
    yield f"30 s: 30 * 3 / {total_s:.3f} = {30 * 3 / total_s:.0f} jobs"
    drained = _report("queue_latency")["measured"]["redis 7.0.15, appendfsync always"]["drain_jobs_per_s"]
    yield f"it drained {drained:.0f} jobs/s of 64 KiB results"


def _queue_rows() -> Iterator[str]:
    for server, row in _report("queue_latency")["measured"].items():
        yield (
            f"| {server.removeprefix('redis ')} | {row['enqueue_to_result_p50_ms']:.1f} ms "
            f"| {row['enqueue_to_result_p99_ms']:.1f} ms | {row['enqueue_jobs_per_s']:,.0f} jobs/s "
            f"| {row['drain_jobs_per_s']:,.0f} jobs/s |"
        )


def _decode_rows() -> Iterator[str]:
    rows = {(row["method"], row["image_px"]): row for row in _report("decode")["rows"]}
    for px in (512, 1024):
        row = rows["plain", px]
        sizes = [f"{row[name] / 2**20:.0f}" for name in ("rss_bytes", "live_bytes", "estimated_bytes")]
        yield f"| {px} | plain | {row['cpu_s']:.1f} | {' | '.join(sizes)} | {row['largest_elements'] / 2**31:.3f} | - |"
    exact, plain = rows["exact", 1024], rows["plain", 1024]
    shares = [exact[name] / plain[name] for name in ("cpu_s", "rss_bytes", "live_bytes")]
    yield "exact takes {:.2f} of plain's CPU time, {:.2f} of its resident and {:.2f} of its live memory".format(*shares)


def _provenance_figures() -> Iterator[str]:
    rows = {row["format"]: row for row in _report("provenance")["rows"] if row["image_px"] == 1024}
    shares = [rows[name][f"{mark}_s"] / rows[name]["plain_s"] for mark in ("xmp", "signed") for name in rows]
    xmp = "XMP {:.2f} times for PNG, {:.2f} for JPEG, {:.2f} for WebP; with a manifest {:.2f}, {:.2f} and {:.2f}"
    yield xmp.format(*shares)


def _watermark_figures() -> Iterator[str]:
    report = _report("watermark")
    shares: dict[str, list[float]] = {}
    for row in report["marked"]:
        name = row["kind"] if row["image_px"] == 256 else "larger"
        shares.setdefault(name, []).extend(100 * share for share in row["found"].values())
    spans = {
        name: f"{min(found):.0f} %" if min(found) == max(found) else f"{min(found):.0f} to {max(found):.0f} %"
        for name, found in shares.items()
    }
    yield "at 256 px of flat drawings {flat}, of scenes {scenes}, of dead leaves {leaves}".format(**spans)
    yield f"at 512 and 1024 px {spans['larger']}"
    psnrs = [row["psnr_db"] for row in report["marked"]]
    add_ms = max(1000 * row["add_s"] for row in report["marked"])
    yield f"{min(psnrs):.0f} to {max(psnrs):.0f} dB, and up to {add_ms:.0f} ms of CPU time at 1024 px"
    without = report["unmarked"]
    yield f"{without['false_alarms']} false alarms in {without['images']:,} pictures"
    yield f"{without['highest_score']:.1f} standard deviations, the threshold is {without['threshold']:.1f}"


@pytest.mark.parametrize(
    ("page", "figures"),
    [
        ("operations.md", _operations_figures),
        ("provenance.md", _provenance_figures),
        ("provenance.md", _watermark_figures),
        ("decisions/0003-own-queue-on-streams.md", _queue_rows),
        ("decisions/0008-exact-bounded-decode.md", _decode_rows),
    ],
)
def test_figures_are_those_of_the_reports(page: str, figures: Any) -> None:
    text = " ".join((ROOT / "docs" / page).read_text().split())
    for figure in figures():
        assert " ".join(figure.split()) in text, figure
