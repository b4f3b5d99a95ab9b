"""A claim, which is a job that a worker holds, and the leases that keep the claims of a worker from other workers."""

import dataclasses
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.faults import REDIS_UNAVAILABLE, name_fault
from giantleap.service.jobqueue.keys import FINISH
from giantleap.service.jobqueue.replies import ClaimedJob
from giantleap.service.jobqueue.runner import ScriptRunner
from giantleap.service.jobs.job import GenerateParams, Job

_RETRY_S = 0.5
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseLatents:
    """The work of another worker on a job before its transfer; the body of the claim holds the latents.

    Args:
        stages_s: Seconds by stage.
        warnings: For the caller of the job.
    """

    stages_s: Mapping[str, float]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Claim:
    """A job that this worker holds. `delivery` counts its starts, this one included, and fences late writes.

    The count restarts when the job is transferred. `body` is the input blob, or, with `base_latents`, the raw latents;
    `input_key` names it in the result store, if it lies there.
    `waited_s` is the time from the acceptance of the job to the claim, by the clock of Redis, and `idle_s` that from
    the claim to its batch.
    """

    job: Job
    body: bytes | None
    lane: str
    message_id: str
    delivery: int
    base_latents: BaseLatents | None = None
    waited_s: float = 0.0
    input_key: str | None = None
    idle_s: float = 0.0
    claimed_s: float = field(default_factory=time.monotonic, compare=False)

    def age_s(self) -> float:
        """Seconds since the job was accepted, whatever the clocks of the hosts say."""
        return self.waited_s + self.held_s()

    def held_s(self) -> float:
        """Seconds since the claim."""
        return time.monotonic() - self.claimed_s

    @property
    def key(self) -> tuple[str, str]:
        """Identifies the message."""
        return self.lane, self.message_id

    def to_arguments(self) -> dict[str, object]:
        """The arguments by which `claim_fence.lua` and `renew.lua` know the claim."""
        return {"lane": self.lane, "message": self.message_id, "id": self.job.id, "delivery": self.delivery}


@dataclass(frozen=True, slots=True)
class LoadedBundles:
    """The bundles that a worker of more of them has in memory; whether their jobs `go_first`, before older ones."""

    names: tuple[str, ...]
    go_first: bool


def to_claim(claimed: ClaimedJob) -> Claim | None:
    """The claim, without its body; None if an API process of another version made the job."""
    try:
        job = Job.from_json(claimed.job)
    except ValueError as error:
        _LOG.error("a job of another version is left to other workers: %s", error)
        return None
    claim = Claim(job, None, claimed.lane, claimed.message, claimed.delivery, None, claimed.waited_s, claimed.input_key)
    if isinstance(job.params, GenerateParams) and f"{FINISH}:" in claimed.lane:
        return dataclasses.replace(claim, base_latents=BaseLatents(claimed.stages or {}, claimed.warnings))
    return claim


class Leases:
    """The claims of a worker and the thread that renews them. Its methods may be called from several threads.

    Args:
        runner: How scripts reach Redis.
        worker: The arguments `consumer`, `device` and `role` of the scripts: each renewal is also a heartbeat.
        visibility_timeout_s: After this time without renewal another worker takes a claim.
    """

    def __init__(self, runner: ScriptRunner, worker: Mapping[str, object], visibility_timeout_s: float) -> None:
        self._runner = runner
        self._worker = worker
        self._period_s = visibility_timeout_s / 4
        self._held: dict[tuple[str, str], Claim] = {}
        self._settling: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Starts the thread."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._renew_until_closed, name="lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops the thread. Held claims become stale."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def held(self) -> list[Claim]:
        """The claims that are renewed."""
        with self._lock:
            return list(self._held.values())

    def holds(self, claim: Claim) -> bool:
        """Whether a claim is renewed: neither lost nor ended."""
        with self._lock:
            held = self._held.get(claim.key)
        return held is not None and held.delivery == claim.delivery

    def hold(self, claims: Sequence[Claim]) -> None:
        """Starts renewing claims."""
        with self._lock:
            self._held.update({claim.key: claim for claim in claims})

    def drop(self, claim: Claim) -> None:
        """Stops renewing a claim."""
        with self._lock:
            self._held.pop(claim.key, None)

    @contextmanager
    def settling(self, claim: Claim) -> Iterator[None]:
        """While a script settles a claim, the claim may look lost; the reply of the script has the outcome."""
        with self._lock:
            self._settling.add(claim.key)
        try:
            yield
        finally:
            with self._lock:
                self._settling.discard(claim.key)

    def _renew_until_closed(self) -> None:
        """Renews all claims each quarter of the visibility timeout, sooner after a failure."""
        pause_s = self._period_s
        while not self._stop.wait(pause_s):
            held = self.held()
            try:
                claims = [claim.to_arguments() for claim in held]
                lost = self._runner.run(scripts.RENEW, {**self._worker, "claims": claims}).ids
            except REDIS_UNAVAILABLE as error:
                _LOG.warning("leases not renewed (%s)", name_fault(error))
                pause_s = min(self._period_s, _RETRY_S)
                continue
            pause_s = self._period_s
            for claim in held:
                if claim.job.id in lost:
                    self._drop_lost(claim)

    def _drop_lost(self, claim: Claim) -> None:
        with self._lock:
            lost = claim.key not in self._settling and self._held.pop(claim.key, None) is not None
        if lost:
            _LOG.warning("the lease of job %s was lost", claim.job.id)
