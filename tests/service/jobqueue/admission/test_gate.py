"""The gate of a full queue: one state, at most 50 ms old, decides on all requests, and no permit is lost."""

import asyncio
from dataclasses import dataclass, field

from giantleap.service.errors import NotReady, QueueFull
from giantleap.service.jobqueue.admission.gate import Permit, QueueGate
from giantleap.service.jobqueue.admission.slots import CONTENTION_S, STATE_S
from giantleap.service.jobqueue.client import open_async_redis
from giantleap.service.jobqueue.completions import CompletionListener
from giantleap.service.jobs.job import Priority, QueueStats

LIMIT = 6
FULL = QueueFull("full", retry_after_s=3)


@dataclass
class Queue:
    """A queue and the time; `reads` counts how often its state was read."""

    jobs: int = LIMIT
    away: bool = False
    now_s: float = 1000.0
    reads: int = 0
    completions: CompletionListener = field(
        default_factory=lambda: CompletionListener(open_async_redis("redis://localhost"), "done")
    )

    async def stats(self) -> QueueStats:
        self.reads += 1
        await asyncio.sleep(0)
        if self.away:
            raise NotReady("away")
        return QueueStats({("tiny", Priority.HIGH): self.jobs - 1}, 1, 0, 0, 0.0, LIMIT, 1, 0.5, 0, 1)

    def open_gate(self) -> QueueGate:
        return QueueGate(self.stats, self.completions, LIMIT, lambda: self.now_s)

    def gate(self) -> QueueGate:
        """A gate that knows now that the queue is full."""
        gate = self.open_gate()
        gate.record_full(FULL)
        return gate

    def old_gate(self) -> QueueGate:
        """A gate that knew that the queue was full."""
        gate = self.gate()
        self.now_s += STATE_S
        return gate


def take(gate: QueueGate) -> Permit:
    permit = gate.try_admit()
    assert isinstance(permit, Permit)
    return permit


async def test_an_open_gate_reads_nothing() -> None:
    queue = Queue()
    gate = queue.open_gate()
    assert isinstance(await gate.admit(), Permit) and queue.reads == 0


async def test_a_full_queue_is_read_again_while_it_refuses_before_its_state_is_old() -> None:
    queue = Queue()
    gate = queue.gate()
    assert [gate.try_admit() for _ in range(5)] == [FULL] * 5
    queue.now_s += 0.6 * STATE_S
    assert [gate.try_admit() for _ in range(5)] == [FULL] * 5
    while gate.try_admit() is FULL:
        await asyncio.sleep(0)
    assert queue.reads == 1 and isinstance(gate.try_admit(), QueueFull)


async def test_waiting_requests_share_one_refresh() -> None:
    queue = Queue()
    gate = queue.old_gate()
    assert gate.must_wait() and gate.try_admit() is None
    refusals = await asyncio.gather(*(gate.admit() for _ in range(20)))
    assert queue.reads == 1 and len({id(refusal) for refusal in refusals}) == 1
    refusal = refusals[0]
    assert isinstance(refusal, QueueFull) and refusal is not FULL
    assert refusal.retry_after_s == 3, "5 wait and 1 runs for 0.5 s each"
    assert "6 jobs are in the queue, 6" in str(refusal) and gate.try_admit() is refusal


async def test_an_equal_refusal_keeps_its_identity() -> None:
    queue = Queue()
    gate = queue.old_gate()
    first = await gate.admit()
    queue.now_s += STATE_S
    assert await gate.admit() is first and queue.reads == 2


async def test_free_slots_are_filled_and_further_requests_wait() -> None:
    queue = Queue(jobs=LIMIT - 2)
    gate = queue.old_gate()
    waits = [gate.wait() for _ in range(5)]
    await asyncio.wait(waits[:2])
    assert [wait.done() for wait in waits] == [True, True, False, False, False]
    assert gate.permits == 2 and gate.must_wait()
    permits = [wait.result() for wait in waits[:2]]
    for permit, jobs in zip(permits, (LIMIT - 1, LIMIT), strict=True):
        assert isinstance(permit, Permit)
        gate.record_jobs(jobs)
        permit.release()
    assert all(isinstance(wait.result(), QueueFull) for wait in waits[2:]) and gate.permits == 0


async def test_beyond_the_limit_the_newest_are_admitted() -> None:
    gate = Queue(jobs=LIMIT - 1).old_gate()
    waits = [gate.wait() for _ in range(LIMIT + 1)]
    await waits[-1]
    assert [wait.done() for wait in waits] == [False] * LIMIT + [True]


async def test_a_failed_request_frees_its_slot() -> None:
    queue = Queue(jobs=LIMIT - 1)
    gate = queue.old_gate()
    permit = await gate.admit()
    following = gate.wait()
    assert isinstance(permit, Permit) and not following.done()
    permit.release()
    permit.release()
    assert isinstance(following.result(), Permit) and gate.permits == 1


async def test_a_canceled_request_gets_no_permit() -> None:
    gate = Queue(jobs=LIMIT - 1).old_gate()
    staying, leaving = gate.wait(), gate.wait()
    leaving.cancel()
    assert isinstance(await staying, Permit) and gate.permits == 1


async def test_a_burst_waits_for_permits_and_then_for_the_state_of_the_queue() -> None:
    queue = Queue(jobs=2)
    gate = queue.open_gate()
    permits = [take(gate) for _ in range(LIMIT)]
    first, second = gate.wait(), gate.wait()
    for permit in permits[:3]:
        assert queue.reads == 0
        permit.release()
    assert isinstance(await first, Permit) and not second.done() and queue.reads == 1, "2 jobs and 4 permits"


async def test_a_permit_counts_for_a_limited_time() -> None:
    gate = Queue(jobs=1).open_gate()
    permits = [take(gate) for _ in range(LIMIT)]
    following = gate.wait()
    assert not following.done()
    await following  # no permit is released
    assert isinstance(following.result(), Permit) and permits
    assert gate.permits <= LIMIT


async def test_a_finished_job_admits_one_request() -> None:
    queue = Queue()
    gate = queue.gate()
    queue.completions.on_completion("some-job {}")
    permit = take(gate)
    assert gate.must_wait()
    gate.record_jobs(LIMIT)
    permit.release()
    assert gate.try_admit() is FULL and queue.reads == 0


async def test_the_gate_opens_after_the_contention_or_without_redis() -> None:
    gone = Queue()
    gate = gone.gate()
    gone.now_s += CONTENTION_S
    assert isinstance(gate.try_admit(), Permit) and gone.reads == 0
    away = Queue(away=True)
    gate = away.old_gate()
    assert isinstance(await gate.admit(), Permit) and isinstance(gate.try_admit(), Permit) and away.reads == 1
