"""Ten times the jobs that the workers can do: what a refusal costs, and how late accepted jobs are."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import psutil
import uvloop

from benchmarks.load.client import Load, median_of, run_closed, run_open
from benchmarks.load.service import SPREAD, run_service, used_cpu_s

WORKERS, WORK_MS, QUEUE_LIMIT, OVERLOAD = 4, 100.0, 6, 10
CAPACITY_PER_S = WORKERS * 1000 / WORK_MS
FULL = (1, 1000.0, 1)
"""One worker, the milliseconds of a job, and the queue limit, of a queue that is always full."""
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
    with run_service(WORKERS, WORK_MS, queue_limit=QUEUE_LIMIT) as port:
        pairs = [measure_pair(port, request, seconds, seed) for seed in range(repetitions)]
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
        "capacity_per_s": CAPACITY_PER_S,
        "offered_per_s": round(offered / (repetitions * seconds), 1),
        "accepted_per_s": median_of([crowd.per_s for _, crowd in pairs]),
        "refused_share": round(refused / offered, 4),
        "refusals_with_retry_after": refused,
        "client_ms": round(1000 * sum(crowd.cpu_s for _, crowd in pairs) / offered, 4),
        "unloaded_p50_ms": median_of([calm.median_ms for calm, _ in pairs]),
        "unloaded_p99_ms": median_of([calm.quantile_ms(0.99) for calm, _ in pairs]),
        "accepted_p50_ms": median_of([crowd.median_ms for _, crowd in pairs]),
        "accepted_p99_ms": median_of([crowd.quantile_ms(0.99) for _, crowd in pairs]),
        "p99_ratio": median_of(ratios),
        "p99_ratios": [round(ratio, 3) for ratio in ratios],
    }


def measure_pair(port: int, request: bytes, seconds: float, seed: int) -> tuple[Load, Load]:
    """Measure jobs one at a time, then at `OVERLOAD` times the capacity.

    Raises:
        RuntimeError: A refusal is not 429 with an integer Retry-After.
    """
    calm = uvloop.run(run_closed(port, request, 1, 5, seconds))
    crowd = run_open(port, request, OVERLOAD * CAPACITY_PER_S, seconds, seed)
    _check_refusals(crowd)
    return calm, crowd


def _check_refusals(load: Load) -> None:
    for response in load.refused:
        if response.status != 429 or not response.headers.get("retry-after", "").isdigit():
            raise RuntimeError(
                f"expected 429 with Retry-After, got status {response.status} and headers {sorted(response.headers)}"
            )


def measure_refusals(request: bytes, seconds: float) -> dict[str, float]:
    """Measure the processor time of the API process for an accepted and for a refused job, with as many clients."""
    with run_service() as port:
        accepted = measure_cpu(port, request, seconds)
    with run_service(*FULL[:2], queue_limit=FULL[2]) as port:
        crowd = measure_cpu(port, request, seconds)
    return to_refusals(accepted, crowd)


def to_refusals(idle: tuple[Load, float], full: tuple[Load, float]) -> dict[str, float]:
    """Return the figures of what `measure_cpu` found with an idle and with a full queue."""
    (accepted, accepted_s), (crowd, crowd_s) = idle, full
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


def measure_cpu(port: int, request: bytes, seconds: float, root: psutil.Process | None = None) -> tuple[Load, float]:
    """Measure a closed loop of `_CLIENTS`, and the processor seconds of the API below `root` meanwhile."""
    uvloop.run(run_closed(port, request, _CLIENTS, 0, 0.5, allowed=(200, 429)))
    before_s = used_cpu_s(root)["api"]
    load = uvloop.run(run_closed(port, request, _CLIENTS, 0, seconds, allowed=(200, 429)))
    return load, used_cpu_s(root)["api"] - before_s
