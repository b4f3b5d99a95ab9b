"""One worker that serves equal jobs, as arithmetic: when its batches start and end, given what a batch takes.

The worker never waits for a batch to fill. Once its device is free it claims the jobs that wait, at most `batch_items`,
and `plan_batch` groups as many as `items_together` allows. The jobs of a batch end together. Claims that the worker
makes ahead change nothing here: it makes them only where a full claim waits.
"""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobs.devices import DeviceKind
from giantleap.service.jobs.grid import LatentGrid
from giantleap.service.jobs.job import GenerateParams, Job, Priority
from giantleap.service.worker.batching import items_together, plan_batch

LOW_LOAD = 0.3  # of what the worker serves without batching
JOBS = 1600


@dataclass(frozen=True, slots=True)
class Policy:
    """What fixes the batches of a worker: its device and two settings."""

    kind: DeviceKind
    batch_items: int
    batch_budget_latent_px: int


class Served(NamedTuple):
    """What a worker made of its jobs."""

    images_per_s: float
    mean_latency_s: float


def batch_seconds(measured_s: Mapping[int, float], size: int) -> float:
    """Seconds of a batch; between two measured sizes on the line through them.

    Raises:
        ValueError: The size is outside those measured.
    """
    if size in measured_s:
        return measured_s[size]
    for low, high in pairwise(sorted(measured_s)):
        if low < size < high:
            share = (size - low) / (high - low)
            return measured_s[low] + share * (measured_s[high] - measured_s[low])
    raise ValueError(
        f"batch size {size} was not measured; expected one between {min(measured_s)} and {max(measured_s)}"
    )


def simulate(
    arrivals_s: Sequence[float],
    measured_s: Mapping[int, float],
    policy: Policy,
    params: GenerateParams,
    grid: LatentGrid,
) -> Served:
    """Serve jobs of one kind, first come, first served.

    Args:
        arrivals_s: When each job arrives, ascending.
        measured_s: Seconds of a batch by its size; holds 1 and `policy.batch_items`.
        policy: The settings of the worker.
        params: Of every job.
        grid: Of their bundle.
    """
    now_s, first, latencies_s = 0.0, 0, []
    while first < len(arrivals_s):
        now_s = max(now_s, arrivals_s[first])
        end = min(first + policy.batch_items, len(arrivals_s))
        claims = [_claim(index, params) for index in range(first, end) if arrivals_s[index] <= now_s]
        items = items_together(policy.kind, len(claims), policy.batch_items)
        for batch in plan_batch(claims, {"": grid}, items, policy.batch_budget_latent_px):
            now_s += batch_seconds(measured_s, len(batch))
            latencies_s += [now_s - arrivals_s[int(claim.job.id)] for claim in batch]
        first += len(claims)
    return Served(len(arrivals_s) / (now_s - arrivals_s[0]), statistics.fmean(latencies_s))


def random_arrivals(rate_per_s: float, jobs: int = JOBS) -> list[float]:
    """Arrivals that are independent of each other, the same in each run."""
    source = random.Random(0)
    return list(accumulate(source.expovariate(rate_per_s) for _ in range(jobs)))


def evaluate(
    measured_s: Mapping[int, float], policy: Policy, params: GenerateParams, grid: LatentGrid
) -> dict[str, float]:
    """Compare a policy with every fixed size at full load, and with no batching at low load."""
    fixed_per_s = {size: size / seconds for size, seconds in measured_s.items()}
    best = max(fixed_per_s, key=fixed_per_s.__getitem__)
    single = replace(policy, batch_items=1)
    low = random_arrivals(LOW_LOAD * fixed_per_s[1])
    full = simulate([0.0] * JOBS, measured_s, policy, params, grid)
    batched, alone = (simulate(low, measured_s, each, params, grid) for each in (policy, single))
    return {
        "best_fixed_size": best,
        "throughput_over_best": round(full.images_per_s / fixed_per_s[best], 3),
        "latency_over_single": round(batched.mean_latency_s / alone.mean_latency_s, 3),
    }


def _claim(index: int, params: GenerateParams) -> Claim:
    job = Job(str(index), "", priority=Priority.HIGH, created_at_s=0.0, params=params)
    return Claim(job=job, body=None, lane="", message_id=str(index), delivery=1)
