"""The names of every Redis key of the queue, all under one hash tag so that one script may touch them together.

A lane is one stream, `<queue>:<priority>`. A bundle has two queues, `<bundle>` and `<bundle>+finish`: in the second
wait jobs whose latent is there, for workers that only upscale and decode (`docs/decisions/0010-split-pools.md`).

The Lua scripts in `giantleap.service.jobqueue.scripts` build the same names from the tag; what each key holds:

| key                             | type   | holds                                             | bounded by            |
|---------------------------------|--------|---------------------------------------------------|-----------------------|
| {tag}:lanes                     | set    | every lane                                        | four per bundle       |
| {tag}:stream:<lane>             | stream | one message per job, the job id                   | queue limit           |
| {tag}:queued:<lane>             | zset   | jobs that wait, by time of entry                  | queue limit           |
| {tag}:running                   | set    | jobs that a worker has begun                      | queue limit           |
| {tag}:delayed                   | zset   | jobs that wait for a retry, by due time           | queue limit           |
| {tag}:job:<id>                  | hash   | the record                                        | live, then TTL        |
| {tag}:events:<id>               | stream | progress                                          | event limit, then TTL |
| {tag}:input:<id>                | string | input blob                                        | live, byte budget     |
| {tag}:result:<id>               | hash   | result blobs by index                             | TTL, byte budget      |
| {tag}:upload:<name>             | string, hash | a blob on its way to one of these           | a minute              |
| {tag}:blob_bytes                | string | bytes of all blobs                                | one number            |
| {tag}:blob_results, :blob_sizes | zset, hash | expiry and bytes of each job's results        | results that live     |
| {tag}:idempotency:<sha256>      | string | payload digest and job id                         | TTL                   |
| {tag}:live:<owner>              | set    | jobs of one API key that have not ended           | queue limit           |
| {tag}:rate:<owner>              | string | when the key's requests are paid for (GCRA), us   | TTL                   |
| {tag}:workers                   | zset   | live workers, by last heartbeat                   | swept by each beat    |
| {tag}:workers:<role>            | zset   | those of them that run only one half of the route | swept by each beat    |
| {tag}:devices                   | hash   | what each live worker's device holds, JSON        | swept by each beat    |
| {tag}:durations, :durations:<queue> | list | seconds of the last jobs (of their part there)  | 100, 31 entries       |
| {tag}:queued_px                 | string | latent pixels of the jobs that live               | one number            |
| {tag}:deadlines                 | zset   | jobs with a deadline, by it                       | live                  |
| {tag}:jobs:<owner>              | zset   | an owner's jobs by time of entry                  | 1,000, TTL            |
| {tag}:webhooks                  | zset   | deliveries by the time of the next attempt        | 10,000                |
| {tag}:webhook:<delivery>        | hash   | what to send where                                | TTL                   |
| {tag}:webhooks_dead             | stream | deliveries given up, job and reason               | about 1,000 entries   |
| {tag}:dead                      | stream | jobs that failed for good, with their last error  | about 1,000 entries   |
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from giantleap.models.worker_role import WorkerRole
from giantleap.service.jobs.job import Priority

GROUP = "workers"
FINISH = "+finish"
"""What the name of a finish queue ends with; no bundle's name has a plus sign."""
LOW_FIRST_EVERY = 8
"""Low priority is promised an eighth of the claims: its queue moves, and high loses no more than that."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names under `prefix`, which becomes the hash tag."""

    prefix: str

    @property
    def tag(self) -> str:
        return f"{{{self.prefix}}}"

    @property
    def done_channel(self) -> str:
        """Pub/sub channel on which each job that reached a final state is published: its id, a space, its outcome."""
        return f"{self.tag}:done"

    @property
    def dead(self) -> str:
        return f"{self.tag}:dead"

    def stream(self, lane: str) -> str:
        return f"{self.tag}:stream:{lane}"

    def job(self, job_id: str) -> str:
        return f"{self.tag}:job:{job_id}"

    def events(self, job_id: str) -> str:
        return f"{self.tag}:events:{job_id}"

    def input(self, job_id: str) -> str:
        return f"{self.tag}:input:{job_id}"

    def result(self, job_id: str) -> str:
        return f"{self.tag}:result:{job_id}"

    def upload(self, name: str) -> str:
        return f"{self.tag}:upload:{name}"


def idempotency_digest(caller_key: str, owner: str = "") -> str:
    """What identifies an idempotency key of an owner. Neither may hold a space, so the pair is unique."""
    pair = f"{owner} {caller_key}" if owner else caller_key
    return hashlib.sha256(pair.encode()).hexdigest()


def lane(queue: str, priority: Priority) -> str:
    """The part of a stream's name that says whose jobs it carries."""
    return f"{queue}:{priority.value}"


def to_bundle(queue: str) -> str:
    """Whose queue it is."""
    return queue.removesuffix(FINISH)


def queues_of(bundle: str, role: WorkerRole) -> list[str]:
    """The queues of a bundle from which a worker of this role takes."""
    return [f"{bundle}{FINISH}"] * role.loads_decoder + [bundle] * role.loads_pipeline


def claim_order(bundles: Sequence[str], turn: int, role: WorkerRole) -> list[str]:
    """The lanes in the order in which claim number `turn` of a worker takes from them.

    High priority comes before low, but in each `LOW_FIRST_EVERY`-th claim after it. The bundle that is first rotates,
    and so does, for a worker of role all, the queue of a bundle that is first: neither can starve the other.
    """
    round_ = turn + turn // LOW_FIRST_EVERY  # else what is first at one low turn would be first at every other
    shift = round_ % len(bundles)
    queues = [queues_of(bundle, role) for bundle in (*bundles[shift:], *bundles[:shift])]
    if round_ // len(bundles) % 2:
        queues = [list(reversed(each)) for each in queues]
    priorities = [Priority.HIGH, Priority.LOW]
    if turn % LOW_FIRST_EVERY == LOW_FIRST_EVERY - 1:
        priorities.reverse()
    return [lane(queue, priority) for priority in priorities for each in queues for queue in each]
