"""Checks of the workers and the queue, from Redis or, with less detail, from the metrics of the API."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from giantleap.service.doctor.findings import Finding, fail, ok, skipped, warn
from giantleap.service.jobqueue.replies import StatsReply
from giantleap.service.jobs.devices import Device, missing_roles

_STUCK_S: Final = 30.0
_START: Final = "start `giantleap worker` with this Redis URL, key prefix and GIANTLEAP_BUNDLE"


@dataclass(frozen=True, slots=True)
class QueueFacts:
    """The queue at one moment."""

    live_workers: int
    waiting: int
    processing: int
    oldest_age_s: float
    dead_lettered: int


def to_queue_facts(stats: StatsReply) -> QueueFacts:
    """The queue as Redis has it."""
    waiting = sum(lane.queued for lane in stats.lanes)
    return QueueFacts(
        stats.live_workers,
        waiting,
        stats.processing,
        stats.oldest_age_us / 1e6 if waiting else 0.0,
        stats.dead_lettered,
    )


def check_queue(queue: QueueFacts) -> Iterator[Finding]:
    """Check that workers are alive and that jobs make progress."""
    if queue.live_workers == 0:
        yield fail("workers", f"no worker is alive; {queue.waiting} jobs wait", _START)
    else:
        yield ok("workers", f"{queue.live_workers} alive")
    if queue.waiting and not queue.processing and queue.oldest_age_s > _STUCK_S:
        found = f"{queue.waiting} jobs wait, the first for {queue.oldest_age_s:.0f} s, and none runs"
        yield fail("queue", found, "see the log of the workers; each must serve the bundle of these jobs")
    else:
        yield ok("queue", f"{queue.waiting} jobs wait, {queue.processing} run")
    if queue.dead_lettered:
        yield warn("queue", f"{queue.dead_lettered} jobs failed for good", "`giantleap jobs dead list` names them")


def check_devices(texts: Sequence[str], bundles: Collection[str], version: str | None) -> Iterator[Finding]:
    """Whether the live workers are of one version, run every stage of every bundle, and none in a type that is slow.

    Args:
        texts: Their devices as JSON.
        bundles: Names that the API serves.
        version: Of the API; None: not known.
    """
    devices, unreadable = [], 0
    for text in texts:
        try:
            devices.append(Device.from_json(text))
        except ValueError:
            unreadable += 1
    versions = sorted({device.version or "unknown" for device in devices})
    if unreadable:
        yield warn("versions", f"{unreadable} workers register in another version's form", "update the workers")
    if any(each != version for each in versions) and version is not None:
        others = ", ".join(each for each in versions if each != version)
        yield warn("versions", f"the API is {version}, and workers are {others}", "finish the update of the workers")
    elif devices:
        yield ok("versions", f"{len(devices)} workers are {', '.join(versions)}")
    if not devices:
        return
    served = {name for device in devices for name in device.bundles}
    missing = [f"no worker serves bundle {name}" for name in sorted(set(bundles) - served)]
    missing += missing_roles(devices)
    for reason in missing:
        yield fail("roles", f"{reason}: its jobs wait for ever", _START.replace("worker`", "worker` of that role"))
    if not missing:
        yield ok("roles", f"every stage of {', '.join(sorted(bundles))} has a worker")
    emulated = [device.emulated_dtype for device in devices if device.emulated_dtype is not None]
    if emulated:
        found = f"{len(emulated)} workers compute in {emulated[0]}, which their processors only emulate"
        yield warn("dtype", found, "set GIANTLEAP_DTYPE=float32 for them: it is far faster there")


def skip_devices() -> Finding:
    """The versions of workers on other hosts are in Redis only."""
    return skipped("versions", "versions of the workers are not seen from here", "give --redis-url")
