"""Names of the Redis keys of the queue, all under one hash tag, so that one script may use them together in a Cluster.

A lane is one stream, `<queue>:<priority>`. A bundle has two queues: `<bundle>`, and `<bundle>+finish` for jobs whose
latent exists and that only need upscaling and decoding (`docs/decisions/0010-split-pools.md`).

The Lua scripts (`giantleap.service.jobqueue.scripts`) build the same names from the tag. What each key holds:

| key                             | type   | holds                                             | bounded by            |
|---------------------------------|--------|---------------------------------------------------|-----------------------|
| {tag}:lanes                     | set    | every lane                                        | four per bundle       |
| {tag}:stream:<lane>             | stream | one message per job, the job id                   | queue limit           |
| {tag}:queued:<lane>             | zset   | waiting jobs, by time of entry                    | queue limit           |
| {tag}:running                   | set    | jobs that a worker runs                           | queue limit           |
| {tag}:delayed                   | zset   | jobs delayed for a retry, by due time             | queue limit           |
| {tag}:job:<id>                  | hash   | the record                                        | live, then TTL        |
| {tag}:events:<id>               | stream | progress                                          | event limit, then TTL |
| {tag}:input:<id>                | string | input blob                                        | live, byte budget     |
| {tag}:result:<id>               | hash   | result blobs by index                             | TTL, byte budget      |
| {tag}:upload:<name>             | string, hash | a blob that no script has taken over yet    | a minute              |
| {tag}:blob_bytes                | string | bytes of all blobs                                | one number            |
| {tag}:blob_results, :blob_sizes | zset, hash | expiry and bytes of each job's results        | live results          |
| {tag}:idempotency:<sha256>      | string | payload digest and job id                         | TTL                   |
| {tag}:live:<owner>              | set    | jobs of one API key that have not ended           | queue limit           |
| {tag}:rate:<owner>              | string | GCRA: time up to which requests are paid, us      | TTL                   |
| {tag}:work:<owner>              | string | the same for the work of its jobs                 | TTL                   |
| {tag}:sweeper                   | string | whose turn it is to sweep the result store        | its turn              |
| {tag}:workers                   | zset   | live workers, by last heartbeat                   | swept by heartbeats   |
| {tag}:workers:<role>            | zset   | live workers of one role                          | swept by heartbeats   |
| {tag}:devices                   | hash   | device of each live worker, JSON                  | swept by heartbeats   |
| {tag}:durations, :durations:<queue> | list | seconds of recent jobs (in that queue)          | 100, 31 entries       |
| {tag}:seen_ms, :resumed_ms      | string | when Redis last served, and again after an outage | one number, TTL       |
| {tag}:queued_px                 | string | latent pixels of live jobs                        | one number            |
| {tag}:deadlines                 | zset   | jobs with a deadline, by deadline                 | live                  |
| {tag}:jobs:<owner>              | zset   | jobs of an owner, by time of entry                | 1,000, TTL            |
| {tag}:webhooks                  | zset   | deliveries, by time of the next attempt           | 10,000                |
| {tag}:webhook:<delivery>        | hash   | body and target of a delivery                     | TTL                   |
| {tag}:webhooks_dead             | stream | abandoned deliveries with the reason              | about 1,000 entries   |
| {tag}:dead                      | stream | jobs that failed finally, with their last error   | about 1,000 entries   |
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from giantleap.models.worker_role import WorkerRole
from giantleap.service.jobs.job import Priority

FINISH = "+finish"
"""Suffix of the name of a finish queue; no bundle has a plus sign in its name."""
LOW_FIRST_EVERY = 8
"""Every eighth claim takes low priority first, so that a steady flow of high priority does not starve it."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names under `prefix`."""

    prefix: str

    @property
    def tag(self) -> str:
        """The hash tag."""
        return f"{{{self.prefix}}}"

    @property
    def done_channel(self) -> str:
        """Pub/sub channel of the jobs that ended: id, space, outcome as JSON."""
        return f"{self.tag}:done"

    @property
    def dead(self) -> str:
        """Stream of the jobs that failed finally."""
        return f"{self.tag}:dead"

    def stream(self, lane: str) -> str:
        """Stream of a lane."""
        return f"{self.tag}:stream:{lane}"

    def job(self, job_id: str) -> str:
        """Hash of a job."""
        return f"{self.tag}:job:{job_id}"

    def events(self, job_id: str) -> str:
        """Stream of the events of a job."""
        return f"{self.tag}:events:{job_id}"

    def preview(self, job_id: str) -> str:
        """Hash of the previews of a job, by the ids of their events."""
        return f"{self.tag}:preview:{job_id}"

    def input(self, job_id: str) -> str:
        """Input blob of a job."""
        return f"{self.tag}:input:{job_id}"

    def result(self, job_id: str) -> str:
        """Hash of the result blobs of a job."""
        return f"{self.tag}:result:{job_id}"

    def upload(self, name: str) -> str:
        """Blob that the next script takes over."""
        return f"{self.tag}:upload:{name}"


def idempotency_digest(caller_key: str, owner: str = "") -> str:
    """The identity of an idempotency key of an owner. Neither may hold a space, so the pair is unique."""
    pair = f"{owner} {caller_key}" if owner else caller_key
    return hashlib.sha256(pair.encode()).hexdigest()


def lane(queue: str, priority: Priority) -> str:
    """The name of a lane."""
    return f"{queue}:{priority.value}"


def to_bundle(queue: str) -> str:
    """The bundle of a queue."""
    return queue.removesuffix(FINISH)


def queues_of(bundle: str, role: WorkerRole) -> list[str]:
    """The queues of a bundle from which a worker of this role takes."""
    return [f"{bundle}{FINISH}"] * role.loads_decoder + [bundle] * role.loads_pipeline


def claim_order(bundles: Sequence[str], turn: int, role: WorkerRole) -> list[str]:
    """The lanes in the order in which claim number `turn` of a worker takes from them.

    High priority comes before low, except in each `LOW_FIRST_EVERY`-th claim. The order of the bundles rotates, and for
    a worker of role all so does the order of the two queues of a bundle: no lane starves another.
    """
    round_ = turn + turn // LOW_FIRST_EVERY  # else the same bundle would be first at every low turn
    shift = round_ % len(bundles)
    pairs = [queues_of(bundle, role) for bundle in (*bundles[shift:], *bundles[:shift])]
    if round_ // len(bundles) % 2:
        pairs = [pair[::-1] for pair in pairs]
    priorities = [Priority.HIGH, Priority.LOW]
    if turn % LOW_FIRST_EVERY == LOW_FIRST_EVERY - 1:
        priorities.reverse()
    return [lane(queue, priority) for priority in priorities for pair in pairs for queue in pair]
