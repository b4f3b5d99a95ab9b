"""The queue in plain Python, for the state machine of `test_queue_model.py`: what each script must do, and no more."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import redis

from giantleap.service.jobqueue.keys import Keys

BUNDLE = "pocket"
QUEUE_LIMIT, LIMIT_LATENT_PX, BUDGET_BYTES, MAX_DELIVERIES = 8, 70, 60, 3
State = Literal["queued", "delayed", "processing", "succeeded", "failed", "canceled"]
FINAL: tuple[State, ...] = ("succeeded", "failed", "canceled")


@dataclass
class ModelJob:
    """One accepted job.

    Attributes:
        state: Where it is; `delayed`: it waits for a retry.
        worker: Who runs it.
        is_due: The time of its retry has come.
        is_stale: Its lease has run out: another worker may take it.
        has_message: Whether a stream still names it. That of a job that ended while it waited stays until a worker
            meets it.
        has_stages: Another worker generated its input.
        result_bytes: Of its results; with `keeps_input`, of the input of a job that failed for good.
        is_dead: It is among the dead letters.
        is_expired: Its record's time to live is over.
    """

    id: str
    owner: str
    digest: str
    latent_px: int
    input_bytes: int
    state: State = "queued"
    deliveries: int = 0
    worker: str = ""
    is_canceled: bool = False
    is_overdue: bool = False
    has_deadline: bool = False
    is_due: bool = False
    is_stale: bool = False
    is_foreign: bool = False
    has_message: bool = True
    has_stages: bool = False
    result_bytes: int = 0
    keeps_input: bool = False
    is_dead: bool = False
    is_deleted: bool = False
    is_expired: bool = False

    @property
    def is_live(self) -> bool:
        return self.state not in FINAL

    def end(self, state: State, has_message: bool = False) -> None:
        self.state, self.input_bytes, self.has_message = state, 0, has_message
        self.is_overdue = False

    def fail(self) -> None:
        """It fails for good; its own input stays for another attempt."""
        if self.input_bytes and not self.has_stages:
            self.keeps_input, self.result_bytes = True, self.input_bytes
        self.end("failed")
        self.is_dead = True


@dataclass
class ModelWorker:
    """One worker: what it knows to hold, by job id with the claim, what it cannot read, and if its heartbeat is old."""

    consumer: str
    role: str
    reads_foreign: bool
    held: dict[str, dict[str, object]] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    is_silent: bool = False


class Model:
    """Every job that was accepted, and the sums that the limits compare."""

    def __init__(self) -> None:
        self.jobs: dict[str, ModelJob] = {}
        self.idempotency: dict[str, str] = {}

    def known(self) -> Iterator[ModelJob]:
        return (job for job in self.jobs.values() if not job.is_expired)

    def live(self) -> list[ModelJob]:
        return [job for job in self.known() if job.is_live]

    def depth(self) -> int:
        return sum(job.has_message or job.state == "delayed" for job in self.jobs.values())

    def evict(self, input_bytes: int, oldest_results: Iterable[str]) -> None:
        """The oldest results make room for so many bytes of inputs."""
        for job_id in oldest_results:
            if input_bytes + self.result_bytes() > BUDGET_BYTES:
                self.jobs[job_id].result_bytes = 0

    def latent_px(self) -> int:
        return sum(job.latent_px for job in self.live())

    def input_bytes(self) -> int:
        return sum(job.input_bytes for job in self.live())

    def result_bytes(self) -> int:
        return sum(job.result_bytes for job in self.jobs.values())

    def refusal(self, latent_px: int, input_bytes: int, owner: str, max_live: int | None) -> str | None:
        """Why a new job is refused; None: it is accepted."""
        if self.depth() >= QUEUE_LIMIT:
            return "full"
        if self.latent_px() and self.latent_px() + latent_px > LIMIT_LATENT_PX:
            return "full_px"
        if max_live is not None and owner and sum(job.owner == owner for job in self.live()) >= max_live:
            return "busy"
        return "storage" if input_bytes and self.input_bytes() + input_bytes > BUDGET_BYTES else None

    def owns(self, worker: ModelWorker, job: ModelJob, claim: dict[str, object]) -> bool:
        return (job.worker, job.deliveries) == (worker.consumer, claim["delivery"])


_DUMP = """
local dump = {}
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. ':*')) do
  local kind, value = redis.call('TYPE', key).ok, nil
  if kind == 'string' then value = redis.call('GET', key) end
  if kind == 'hash' then value = redis.call('HGETALL', key) end
  if kind == 'set' then value = redis.call('SMEMBERS', key) end
  if kind == 'zset' then value = redis.call('ZRANGE', key, 0, -1) end
  if kind == 'stream' then
    value = {}
    for i, entry in ipairs(redis.call('XRANGE', key, '-', '+')) do value[i] = entry[2][2] end
  end
  dump[string.sub(key, #ARGV[1] + 2)] = value
end
return cjson.encode(dump)
"""


class Snapshot:
    """Everything that the server holds of one queue, read at one moment."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        text: Any = client.eval(_DUMP, 0, keys.tag)
        self.keys: dict[str, Any] = json.loads(text)
        self.messages = [job for name in self._of("stream:") for job in self.keys[name]]
        self.waiting = [job for name in self._of("queued:") for job in self.keys[name]]
        self.delayed = list(self.keys.get("delayed", ()))
        self.deadlines = set(self.keys.get("deadlines", ()))
        self.running = set(self.keys.get("running", ()))
        self.live = {name.removeprefix("live:"): set(self.keys[name]) for name in self._of("live:")}
        self.queued_px, self.blob_bytes = (int(self.keys.get(name, 0)) for name in ("queued_px", "blob_bytes"))
        self.input_bytes = {name.removeprefix("input:"): len(self.keys[name]) for name in self._of("input:")}
        self.result_bytes = {
            name.removeprefix("result:"): sum(map(len, self.keys[name][1::2])) for name in self._of("result:")
        }
        records = {name.removeprefix("job:"): self.keys[name] for name in self._of("job:")}
        fields = {job: dict(zip(flat[::2], flat[1::2], strict=True)) for job, flat in records.items()}
        self.states = {job: each["state"] for job, each in fields.items()}
        self.lanes = {job: f"{each['bundle']}{each.get('part', '')}:{each['priority']}" for job, each in fields.items()}
        self.ends = {job: self.keys.get(f"events:{job}", []).count("done") for job in records}

    def _of(self, start: str) -> list[str]:
        return [name for name in self.keys if name.startswith(start)]

    def check(self, model: Model) -> None:
        """Every accepted job has one place or one end, every sum is exact, and there is no key of anything else."""
        known = {job.id: job for job in model.known()}
        assert self.states == {job.id: "queued" if job.state == "delayed" else job.state for job in known.values()}
        assert self.ends == {job.id: int(not job.is_live and not job.is_deleted) for job in known.values()}
        assert sorted(self.keys.get("dead", ())) == sorted(job.id for job in model.jobs.values() if job.is_dead)
        assert sorted(self.messages) == sorted(job.id for job in model.jobs.values() if job.has_message)
        assert sorted(self.delayed) == sorted(job.id for job in known.values() if job.state == "delayed")
        assert sorted(self.waiting) == sorted(job.id for job in known.values() if job.state == "queued")
        assert self.running == {job.id for job in known.values() if job.state == "processing"}
        assert self.deadlines == {job.id for job in model.live() if job.has_deadline}
        owners = {job.owner for job in model.live() if job.owner}
        assert self.live == {owner: {job.id for job in model.live() if job.owner == owner} for owner in owners}
        assert self.queued_px == model.latent_px()
        ended = [job for job in model.jobs.values() if job.result_bytes]
        inputs = {job.id: job.input_bytes for job in model.live() if job.input_bytes}
        assert self.input_bytes == inputs | {job.id: job.result_bytes for job in ended if job.keeps_input}
        assert self.result_bytes == {job.id: job.result_bytes for job in ended if not job.keeps_input}
        assert self.blob_bytes == model.input_bytes() + model.result_bytes()
        assert {name for name in self.keys if name.startswith("upload:")} == set()
        traces = {name.partition(":")[2] for name in self.keys if name.startswith(("job:", "events:"))}
        assert traces == set(known)
