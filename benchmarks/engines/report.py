"""The cases, variants and targets of `python -m benchmarks.engines`, and the table that it writes.

Nothing here imports torch. `benchmarks/engines/run.py` measures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import describe_cpu

RESULTS = Path("benchmarks/results/engines.json")
PAGE = Path("docs/engines.md")
MARKS = {  # of the block of the page that each report fills
    RESULTS: "<!-- benchmarks.engines -->\n",
    RESULTS.with_name("engines_avx2.json"): "<!-- benchmarks.engines avx2 -->\n",
}
END = "<!-- end -->\n"
MAX_ERROR = 1e-4  # of float32 variants, absolute; the published forward's deviation is printed beside it
MIN_PSNR_DB = 45.0
TARGETS = {  # minimum speed-up over the published forward in float32, by case and variant
    ("latent 64", "torch float32"): 2.3,
    ("latent 128", "torch float32"): 2.0,
    ("latent 64", "torch bfloat16"): 3.5,
    ("latent 128", "torch bfloat16"): 3.5,
    ("latent 64", "onnx float32"): 1.9,
    ("latent 128", "onnx float32"): 1.9,
}
PRECISIONS = ("float32", "bfloat16")
VARIANTS = (
    "published float32", "published bfloat16", "module float32", "torch float32", "torch bfloat16", "onnx float32",
)  # fmt: skip


class Case(NamedTuple):
    """A square latent or image, and the number of threads of torch and onnxruntime."""

    channels: int
    side: int
    threads: int = 1


CASES = {
    "latent 64": Case(4, 64),
    "latent 64, 2 threads": Case(4, 64, threads=2),
    "latent 128": Case(16, 128),
    "pixels 64": Case(3, 64),
}


def choose_variants(precisions: Sequence[str], has_graph: bool) -> list[str]:
    """The variants in these precisions; the baseline, the published form in float32, always comes first."""
    variants = VARIANTS if has_graph else VARIANTS[:-1]
    return [name for name in variants if name == VARIANTS[0] or name.split()[-1] in precisions]


@dataclass(frozen=True)
class Row:
    """One variant in one case. `ratio` is `cpu_ratio` on one thread and `wall_ratio` on several.

    Errors are to the published forward in float32, whose output has the standard deviation `std`.
    """

    case: str
    variant: str
    runs: int
    median_ms: float
    median_cpu_ms: float
    page_faults: int
    ratio: float
    cpu_ratio: float
    wall_ratio: float
    max_error: float
    std: float
    target: float | None
    met: bool | None


def line(row: Row) -> str:
    """Format one row for the terminal."""
    target = "" if row.target is None else f"  target {row.target:.1f}: {'met' if row.met else 'MISSED'}"
    return (
        f"{row.case:<21}{row.variant:<20}{row.median_ms:>9.1f} ms{row.median_cpu_ms:>9.1f} ms cpu{row.ratio:>7.2f}x"
        f" ({row.cpu_ratio:.2f} cpu, {row.wall_ratio:.2f} wall)  error {row.max_error:.1e}"
        f"  {row.page_faults} faults{target}"
    )


def to_markdown(record: Mapping[str, Any]) -> str:
    """Return the table of `docs/engines.md` from the JSON record."""
    about = record["machine"]
    lines = [
        f"{describe_cpu(about)}, {about['cores']} cores, load {about['load_1min']:.1f}, "
        f"torch {about['versions']['torch']}, "
        f"onnxruntime {about['versions']['onnxruntime']}, {about['measured_at'][:10]}.",
        "",
        "| case | variant | ms, median | ratio | target | largest error |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        target = "" if row["target"] is None else f"{row['target']:.1f}, {'met' if row['met'] else 'missed'}"
        shown_ms = row["median_cpu_ms" if CASES[row["case"]].threads == 1 else "median_ms"]
        cells = (f"{shown_ms:.0f}", f"{row['ratio']:.2f}", target, f"{row['max_error']:.0e}")
        lines.append(f"| {row['case']} | {row['variant']} | {' | '.join(cells)} |")
    if record["pocket"]:
        lines += ["", "Images of the pocket bundle, against LUA in float32 (target: 45 dB):", ""]
    lines += [f"- x{each['scale']}, {each['variant']}: {each['psnr_db']:.1f} dB" for each in record["pocket"]]
    return "\n".join(lines) + "\n"


def write_page(record: Mapping[str, Any], page: Path, mark: str) -> None:
    """Replace the table between a mark of the page and the next end."""
    before, rest = page.read_text().split(mark)
    page.write_text(before + mark + to_markdown(record) + END + rest.split(END, 1)[1])
