"""The tables that `python -m benchmarks.batching` writes into `docs/operations.md`. Nothing here imports torch."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.machine import describe_cpu


def to_row(stage: str, rounds: Sequence[Mapping[int, float]]) -> dict[str, Any]:
    """The row of a stage: images per second, and over those of size 1 the median of the rounds' ratios.

    Args:
        stage: Name of the stage.
        rounds: Per round, seconds of a batch by its size; holds size 1.
    """
    single_s = statistics.median(each[1] for each in rounds)
    ratios = {size: statistics.median(size * each[1] / each[size] for each in rounds) for size in rounds[0]}
    return {
        "stage": stage,
        "single_s": round(single_s, 5),
        "ratios": {str(size): round(ratio, 3) for size, ratio in ratios.items()},
        "images_per_s": {str(size): round(ratio / single_s, 3) for size, ratio in ratios.items()},
    }


def to_batch_seconds(row: Mapping[str, Any]) -> dict[int, float]:
    """Seconds of a batch by its size, from a row."""
    return {int(size): int(size) * row["single_s"] / ratio for size, ratio in row["ratios"].items()}


def to_markdown(record: Mapping[str, Any]) -> str:
    """Return the tables from the JSON record."""
    about, sizes = record["machine"], list(record["rows"][0]["ratios"])
    lines = [
        f"{describe_cpu(about)}, {about['threads']} threads, load {about['load_1min']:.1f}, "
        f"{about['measured_at'][:10]}.",
        "",
        f"| images/s by batch size (over size 1) | {' | '.join(sizes)} |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for row in record["rows"]:
        cells = [f"{row['images_per_s'][size]:.2f} ({row['ratios'][size]:.2f})" for size in sizes]
        lines.append(f"| {row['stage']} | {' | '.join(cells)} |")
    for row in record["policy"]:
        lines += [
            "",
            f"Simulated, x{row['scale']}, up to {row['batch_items']} images, wait 0 ms: at full load "
            f"{100 * row['throughput_over_best']:.0f} % of the best fixed size ({row['best_fixed_size']}); "
            f"at {100 * row['low_load']:.0f} % load mean latency {row['latency_over_single']:.2f} times that without "
            "batching.",
        ]
    return "\n".join(lines) + "\n"
