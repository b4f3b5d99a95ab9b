"""The gate of a full queue: what it knows is at most 50 ms old, shared by a crowd, and no ticket is lost."""

import asyncio
from dataclasses import dataclass, field

from giantleap.service.errors import NotReady, QueueFull
from giantleap.service.jobqueue.admission.gate import QueueGate, Ticket
from giantleap.service.jobqueue.admission.places import CROWD_S, STATE_S
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
        gate.close(FULL)
        return gate

    def old_gate(self) -> QueueGate:
        """A gate that knew that the queue was full."""
        gate = self.gate()
        self.now_s += STATE_S
        return gate


def take(gate: QueueGate) -> Ticket:
    ticket = gate.ask()
    assert isinstance(ticket, Ticket)
    return ticket


async def test_an_open_gate_reads_nothing() -> None:
    queue = Queue()
    gate = queue.open_gate()
    assert isinstance(await gate.admit(), Ticket) and queue.reads == 0


async def test_a_full_queue_is_read_again_while_it_refuses_before_its_state_is_old() -> None:
    queue = Queue()
    gate = queue.gate()
    assert [gate.ask() for _ in range(5)] == [FULL] * 5
    queue.now_s += 0.6 * STATE_S
    assert [gate.ask() for _ in range(5)] == [FULL] * 5
    while gate.ask() is FULL:
        await asyncio.sleep(0)
    assert queue.reads == 1 and isinstance(gate.ask(), QueueFull)


async def test_a_crowd_shares_one_read_of_an_old_state() -> None:
    queue = Queue()
    gate = queue.old_gate()
    assert gate.must_wait() and gate.ask() is None
    refusals = await asyncio.gather(*(gate.admit() for _ in range(20)))
    assert queue.reads == 1 and len({id(refusal) for refusal in refusals}) == 1
    refusal = refusals[0]
    assert isinstance(refusal, QueueFull) and refusal is not FULL
    assert refusal.retry_after_s == 3, "5 wait and 1 runs for 0.5 s each"
    assert "6 jobs are in the queue, 6" in str(refusal) and gate.ask() is refusal


async def test_a_refusal_that_says_the_same_stays_the_same() -> None:
    queue = Queue()
    gate = queue.old_gate()
    first = await gate.admit()
    queue.now_s += STATE_S
    assert await gate.admit() is first and queue.reads == 2


async def test_as_many_pass_as_there_are_places_and_what_follows_waits_for_a_ticket() -> None:
    queue = Queue(jobs=LIMIT - 2)
    gate = queue.old_gate()
    waits = [gate.wait() for _ in range(5)]
    await asyncio.wait(waits[:2])
    assert [wait.done() for wait in waits] == [True, True, False, False, False]
    assert gate.tickets == 2 and gate.must_wait()
    tickets = [wait.result() for wait in waits[:2]]
    for ticket, jobs in zip(tickets, (LIMIT - 1, LIMIT), strict=True):
        assert isinstance(ticket, Ticket)
        gate.put_jobs(jobs)
        ticket.settle()
    assert all(isinstance(wait.result(), QueueFull) for wait in waits[2:]) and gate.tickets == 0


async def test_of_more_than_can_pass_the_newest_do() -> None:
    gate = Queue(jobs=LIMIT - 1).old_gate()
    waits = [gate.wait() for _ in range(LIMIT + 1)]
    await waits[-1]
    assert [wait.done() for wait in waits] == [False] * LIMIT + [True]


async def test_the_place_of_a_request_that_failed_is_for_the_next() -> None:
    queue = Queue(jobs=LIMIT - 1)
    gate = queue.old_gate()
    ticket = await gate.admit()
    following = gate.wait()
    assert isinstance(ticket, Ticket) and not following.done()
    ticket.settle()
    ticket.settle()
    assert isinstance(following.result(), Ticket) and gate.tickets == 1


async def test_who_has_left_gets_no_ticket() -> None:
    gate = Queue(jobs=LIMIT - 1).old_gate()
    staying, leaving = gate.wait(), gate.wait()
    leaving.cancel()
    assert isinstance(await staying, Ticket) and gate.tickets == 1


async def test_a_burst_on_an_open_gate_waits_for_tickets_and_then_for_the_state_of_the_queue() -> None:
    queue = Queue(jobs=2)
    gate = queue.open_gate()
    tickets = [take(gate) for _ in range(LIMIT)]
    first, second = gate.wait(), gate.wait()
    for ticket in tickets[:3]:
        assert queue.reads == 0
        ticket.settle()
    assert isinstance(await first, Ticket) and not second.done() and queue.reads == 1, "2 jobs and 4 tickets"


async def test_a_ticket_counts_for_a_limited_time() -> None:
    gate = Queue(jobs=1).open_gate()
    tickets = [take(gate) for _ in range(LIMIT)]
    following = gate.wait()
    assert not following.done()
    await following  # nobody settles anything
    assert isinstance(following.result(), Ticket) and tickets
    assert gate.tickets <= LIMIT


async def test_a_job_that_ends_gives_its_place_to_one_request() -> None:
    queue = Queue()
    gate = queue.gate()
    queue.completions.on_completion("some-job {}")
    ticket = take(gate)
    assert gate.must_wait()
    gate.put_jobs(LIMIT)
    ticket.settle()
    assert gate.ask() is FULL and queue.reads == 0


async def test_the_gate_opens_when_the_crowd_has_gone_or_redis_is_away() -> None:
    gone = Queue()
    gate = gone.gate()
    gone.now_s += CROWD_S
    assert isinstance(gate.ask(), Ticket) and gone.reads == 0
    away = Queue(away=True)
    gate = away.old_gate()
    assert isinstance(await gate.admit(), Ticket) and isinstance(gate.ask(), Ticket) and away.reads == 1
