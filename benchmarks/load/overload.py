"""Ten times the jobs that the workers can do: what a refusal costs, and how late accepted jobs are."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import uvloop

from benchmarks.load.client import Load, median_of, run_closed, run_open
from benchmarks.load.service import SPREAD, run_service, used_cpu_s

WORKERS, WORK_MS, QUEUE_LIMIT, OVERLOAD = 4, 100.0, 6, 10
_CLIENTS = 8


@contextlib.contextmanager
def pinned_to_one_core() -> Iterator[None]:
    """Pin this process, and all that it starts meanwhile, to one core: client, API, workers and Redis share it."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def measure_overload(request: bytes, seconds: float, repetitions: int) -> dict[str, Any]:
    """Measure jobs of `WORK_MS` one at a time, then at `OVERLOAD` times the capacity of the workers, in turns.

    One p99 is noisy: figures are medians of the repetitions, and so is the ratio.

    Raises:
        RuntimeError: A refusal is not 429 with an integer Retry-After.
    """
    capacity_per_s = WORKERS * 1000 / WORK_MS
    pairs: list[tuple[Load, Load]] = []
    with run_service(WORKERS, WORK_MS, queue_limit=QUEUE_LIMIT) as port:
        for seed in range(repetitions):
            calm = uvloop.run(run_closed(port, request, 1, 5, seconds))
            crowd = uvloop.run(run_open(port, request, OVERLOAD * capacity_per_s, seconds, seed))
            _check_refusals(crowd)
            pairs.append((calm, crowd))
    ratios = [crowd.quantile_ms(0.99) / calm.quantile_ms(0.99) for calm, crowd in pairs]
    offered = sum(crowd.offered for _, crowd in pairs)
    refused = sum(len(crowd.refused) for _, crowd in pairs)
    return {
        "workers": WORKERS,
        "work_ms": WORK_MS,
        "work_spread": SPREAD,
        "queue_limit": QUEUE_LIMIT,
        "repetitions": repetitions,
        "seconds": seconds,
        "capacity_per_s": capacity_per_s,
        "offered_per_s": round(offered / (repetitions * seconds), 1),
        "accepted_per_s": median_of([crowd.per_s for _, crowd in pairs]),
        "refused_share": round(refused / offered, 4),
        "refusals_with_retry_after": refused,
        "unloaded_p50_ms": median_of([calm.median_ms for calm, _ in pairs]),
        "unloaded_p99_ms": median_of([calm.quantile_ms(0.99) for calm, _ in pairs]),
        "accepted_p50_ms": median_of([crowd.median_ms for _, crowd in pairs]),
        "accepted_p99_ms": median_of([crowd.quantile_ms(0.99) for _, crowd in pairs]),
        "p99_ratio": median_of(ratios),
        "p99_ratios": [round(ratio, 3) for ratio in ratios],
    }


def _check_refusals(load: Load) -> None:
    for response in load.refused:
        if response.status != 429 or not response.headers.get("retry-after", "").isdigit():
            raise RuntimeError(
                f"expected 429 with Retry-After, got status {response.status} and headers {sorted(response.headers)}"
            )


def measure_refusals(request: bytes, seconds: float) -> dict[str, float]:
    """Measure the processor time of the API process for an accepted and for a refused job, with as many clients."""
    with run_service() as port:
        accepted, accepted_s = _measure_cpu(port, request, seconds)
    with run_service(1, 1000.0, queue_limit=1) as port:
        crowd, crowd_s = _measure_cpu(port, request, seconds)
    accepted_ms = 1000 * accepted_s / len(accepted.times_ms)
    refused_ms = 1000 * crowd_s / len(crowd.refused)  # with the few jobs that were accepted meanwhile
    return {
        "clients": _CLIENTS,
        "accepted": len(accepted.times_ms),
        "refused": len(crowd.refused),
        "accepted_api_ms": round(accepted_ms, 4),
        "refused_api_ms": round(refused_ms, 4),
        "ratio": round(refused_ms / accepted_ms, 4),
    }


def _measure_cpu(port: int, request: bytes, seconds: float) -> tuple[Load, float]:
    uvloop.run(run_closed(port, request, _CLIENTS, 0, 0.5, allowed=(200, 429)))
    before_s = used_cpu_s()["api"]
    load = uvloop.run(run_closed(port, request, _CLIENTS, 0, seconds, allowed=(200, 429)))
    return load, used_cpu_s()["api"] - before_s
