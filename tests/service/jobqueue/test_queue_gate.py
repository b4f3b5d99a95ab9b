"""The gate of a full queue: what it knows is at most 50 ms old, shared by a crowd, and follows the jobs that end."""

import asyncio
from dataclasses import dataclass, field

import pytest

from giantleap.service.errors import NotReady, QueueFull
from giantleap.service.jobqueue import backpressure
from giantleap.service.jobqueue.backpressure import STATE_S, QueueGate
from giantleap.service.jobqueue.client import open_async_redis
from giantleap.service.jobqueue.completions import CompletionListener
from giantleap.service.jobs.job import Priority, QueueStats

LIMIT = 6
FULL = QueueFull("full", retry_after_s=3)


@dataclass
class Queue:
    """A queue with a gate; `reads` counts how often its state was read."""

    jobs: int = LIMIT
    away: bool = False
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

    def gate(self, counts_s: float = 60.0, crowd_s: float = 600.0) -> QueueGate:
        """A gate that knows that the queue is full, and for how long that counts."""
        gate = QueueGate(self.stats, self.completions, LIMIT)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backpressure, "STATE_S", counts_s)
            patch.setattr(backpressure, "_CROWD_S", crowd_s)
            gate.close(FULL)
        return gate


@pytest.fixture(autouse=True)
def patient_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state counts for a minute, so that a stalled test does not see it age; `Queue.gate` may shorten that."""
    monkeypatch.setattr(backpressure, "STATE_S", 60.0)
    monkeypatch.setattr(backpressure, "_CROWD_S", 600.0)


def test_a_state_counts_for_fifty_milliseconds() -> None:
    assert STATE_S == 0.05
    assert Queue().gate().known_refusal() is FULL
    assert Queue().gate(counts_s=0).known_refusal() is None


async def test_a_state_of_half_its_age_is_read_again_while_it_refuses() -> None:
    queue = Queue()
    gate = queue.gate(counts_s=29)
    assert [gate.known_refusal() for _ in range(5)] == [FULL] * 5
    while gate.known_refusal() is FULL:
        await asyncio.sleep(0)
    assert queue.reads == 1 and gate.known_refusal() is not None


async def test_an_open_gate_reads_nothing() -> None:
    queue = Queue()
    gate = QueueGate(queue.stats, queue.completions, LIMIT)
    assert gate.known_refusal() is None and await gate.admit() is None and queue.reads == 0


async def test_a_crowd_shares_one_read_of_an_old_state() -> None:
    queue = Queue()
    gate = queue.gate(counts_s=0)
    refusals = await asyncio.gather(*(gate.admit() for _ in range(20)))
    assert queue.reads == 1 and all(refusals) and refusals[0] is not FULL
    assert refusals[0] is not None and refusals[0].retry_after_s == 3, "5 wait and 1 runs for 0.5 s each"
    assert gate.known_refusal() is refusals[0]


async def test_as_many_are_admitted_as_there_are_places() -> None:
    queue = Queue(jobs=LIMIT - 2)
    gate = queue.gate(counts_s=0)
    refusals = await asyncio.gather(*(gate.admit() for _ in range(5)))
    assert [refusal is None for refusal in refusals] == [True, True, False, False, False]
    assert gate.known_refusal() is refusals[-1] and "6 jobs are in the queue, 6" in str(refusals[-1])


async def test_a_job_that_ends_gives_its_place_to_one_request() -> None:
    queue = Queue()
    gate = queue.gate()
    queue.completions.on_completion("some-job {}")
    assert gate.known_refusal() is None and await gate.admit() is None
    assert gate.known_refusal() is FULL and await gate.admit() is FULL and queue.reads == 0


async def test_the_gate_opens_when_the_crowd_has_gone_or_redis_is_away() -> None:
    gone = Queue()
    assert await gone.gate(counts_s=0, crowd_s=0).admit() is None and gone.reads == 0
    away = Queue(away=True)
    gate = away.gate(counts_s=0)
    assert await gate.admit() is None and await gate.admit() is None and away.reads == 1
