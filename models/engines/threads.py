"""Number of threads for torch on a CPU: the processors of this process that are idle at start.

Threads of one operator wait for each other at its end. Where another process holds a processor, each operator waits
until the scheduler takes that processor from it: two threads beside two busy loops took 3 to 12 times as long as one.
`benchmarks/threads.py` measures it.
"""

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

log = logging.getLogger(__name__)

SAMPLE_S = 0.2
SPARE = 0.3  # of a processor: an idle machine is never wholly idle


@dataclass(frozen=True, slots=True)
class Processors:
    """The processors that this process may use, and how many of them others used during a sample.

    Args:
        allowed: By its affinity.
        busy: Of the allowed ones.
        quota: Of the control group, in processors; None for no quota.
        quota_used: Of the quota.
    """

    allowed: int
    busy: float = 0.0
    quota: float | None = None
    quota_used: float = 0.0


@dataclass(frozen=True, slots=True)
class CpuQuota:
    """The quota of one control group, in processors, and the file that counts its processor time."""

    processors: float
    usage: Path


def choose_threads(most: int, found: Processors, processes: int = 1) -> int:
    """The number of threads: at least 1, and no more than there are free processors for.

    Args:
        most: Torch's own choice, which is `OMP_NUM_THREADS` where that is set.
        found: From `read_processors`.
        processes: Processes of this machine that compute at the same time and share what is free.
    """
    free = found.allowed - found.busy
    if found.quota is not None:
        free = min(free, found.quota - found.quota_used)
    share = min(found.allowed, found.quota or found.allowed) / processes
    return max(1, min(most, int(free + SPARE), int(share)))


def set_threads(setting: int, processes: int = 1) -> int:
    """Set and return the number of threads of this process, before its first operator.

    Args:
        setting: `GIANTLEAP_TORCH_THREADS`; 0 to choose by `choose_threads`.
        processes: See `choose_threads`.
    """
    most = torch.get_num_threads()
    chosen = setting or (1 if most == 1 else choose_threads(most, read_processors(), processes))
    torch.set_num_threads(chosen)
    if not setting and chosen < most:
        log.info("torch uses %d of %d threads: the rest is in use; GIANTLEAP_TORCH_THREADS sets it", chosen, most)
    return chosen


def read_processors(sample_s: float = SAMPLE_S) -> Processors:
    """Sample the processor use of the machine and of this process' control group; sleeps for `sample_s`."""
    quota = min(read_quotas(), key=lambda each: each.processors, default=None)
    before, used_before_s = _processor_times(), _used_s(quota)
    started_s = time.monotonic()
    time.sleep(sample_s)
    took_s = time.monotonic() - started_s
    after, used_after_s = _processor_times(), _used_s(quota)
    busy = sum(map(_busy_share, before, after))
    if quota is None:
        return Processors(len(before), busy)
    return Processors(len(before), busy, quota.processors, (used_after_s - used_before_s) / took_s)


def read_quotas(proc: Path = Path("/proc/self")) -> Iterator[CpuQuota]:
    """The quotas of this process' control group and of those around it, in version 1 and 2; none where there are none.

    A container sees its own group as the root of the mount, whatever `/proc/self/cgroup` calls it.

    Args:
        proc: The directory with `cgroup` and `mounts`; it does not exist outside Linux.
    """
    if not (proc / "cgroup").is_file():
        return
    paths = {names: path for _, names, path in (line.split(":", 2) for line in _lines(proc / "cgroup"))}
    mounts = [line.split() for line in _lines(proc / "mounts")]
    for mount in mounts:
        place, kind, controllers = Path(mount[1]), mount[2], mount[3].split(",")
        if kind == "cgroup2":
            yield from _quotas_v2(place, paths.get("", "/"))
        elif kind == "cgroup" and "cpu" in controllers:
            path = next((path for names, path in paths.items() if "cpu" in names.split(",")), "/")
            usage = next((Path(m[1]) for m in mounts if m[2] == "cgroup" and "cpuacct" in m[3].split(",")), place)
            yield from _quotas_v1(place, usage, path)


def _quotas_v2(mount: Path, path: str) -> Iterator[CpuQuota]:
    for group in _groups(path):
        words = _words(mount / group / "cpu.max")
        if len(words) == 2 and words[0] != "max":
            yield CpuQuota(int(words[0]) / int(words[1]), mount / group / "cpu.stat")


def _quotas_v1(mount: Path, usage_mount: Path, path: str) -> Iterator[CpuQuota]:
    for group in _groups(path):
        quota, period = _words(mount / group / "cpu.cfs_quota_us"), _words(mount / group / "cpu.cfs_period_us")
        if quota and period and int(quota[0]) > 0:
            yield CpuQuota(int(quota[0]) / int(period[0]), usage_mount / group / "cpuacct.usage")


def _groups(path: str) -> list[str]:
    """A group and those around it, up to the root, relative to the mount."""
    own = Path(path.lstrip("/"))
    return [str(own), *map(str, own.parents)]


def _used_s(quota: CpuQuota | None) -> float:
    """Processor time of a group, in seconds; 0 where it is not counted."""
    if quota is None:
        return 0.0
    if quota.usage.name == "cpuacct.usage":
        return sum(int(word) for word in _words(quota.usage)[:1]) / 1e9
    counts = dict(line.split() for line in _lines(quota.usage))
    return int(counts.get("usage_usec", 0)) / 1e6


def _processor_times() -> list[tuple[float, float]]:
    """Seconds since the start of the machine, in all and idle, of each processor that this process may use."""
    times: list[Any] = psutil.cpu_times(percpu=True)
    if hasattr(os, "sched_getaffinity"):
        own = os.sched_getaffinity(0)
        times = [each for number, each in enumerate(times) if number in own] or times
    # What a guest uses is in `user` as well.
    return [(sum(t) - getattr(t, "guest", 0.0) - getattr(t, "guest_nice", 0.0), _idle_s(t)) for t in times]


def _idle_s(times: Any) -> float:
    return float(times.idle + getattr(times, "iowait", 0.0))


def _busy_share(before: tuple[float, float], after: tuple[float, float]) -> float:
    passed_s, idle_s = after[0] - before[0], after[1] - before[1]
    return min(1.0, max(0.0, 1.0 - idle_s / passed_s)) if passed_s > 0.0 else 0.0


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _words(path: Path) -> list[str]:
    return path.read_text().split() if path.is_file() else []
