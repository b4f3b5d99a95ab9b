"""The logic of both clients without I/O: a flow yields the next step and receives its outcome.

A driver performs the steps: open a response, read a chunk of it, pause. Everything that is decided (retries,
deadlines, resuming) is here, once for the synchronous and the asynchronous client.
"""

import itertools
import json
import random
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeAlias, TypeVar

from giantleap_client.calls import (
    Call,
    Request,
    cancel_call,
    delete_call,
    events_call,
    get_call,
    put_call,
    result_call,
    send_call,
)
from giantleap_client.errors import GiantleapError, JobFailed, Timeout, from_problem, to_error
from giantleap_client.events import Event, EventParser
from giantleap_client.payloads import Result
from giantleap_client.retries import Cut, choose_delay_s

T = TypeVar("T")

_REQUEST_S = 60.0  # longest silence of one response
_HEARTBEATS_S = 30.0  # two heartbeats of the service's event stream
_MIN_SILENCE_S = 0.25
_WAIT_S = 20.0  # of one PUT; proxies cut what is silent for longer, often at 30 or 60 s
_FINAL = frozenset({"succeeded", "failed", "canceled"})

JobBody: TypeAlias = dict[str, Any]
"""A job as `GET /jobs/{id}` describes it."""


@dataclass(frozen=True, slots=True)
class Open:
    """Send a call; the outcome is a `Head`. Nothing of it may be silent for longer than `timeout_s`."""

    call: Call
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Read:
    """Read the next chunk of the response; empty at its end."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Do nothing for a while."""

    seconds_s: float


@dataclass(frozen=True, slots=True)
class Head:
    """Status and headers of a response, names in lower case."""

    status: int
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """The end of a flow."""

    value: T


Step: TypeAlias = Open | Read | Pause | Event
Outcome: TypeAlias = Head | bytes | Cut | None
Flow: TypeAlias = Generator[Step, Outcome, T]


class Machine(Generic[T]):
    """Runs a flow for a driver."""

    def __init__(self, flow: Flow[T]) -> None:
        self._flow = flow

    def next(self, outcome: Outcome = None) -> Step | Done[T]:
        """The step that follows the outcome of the one before."""
        try:
            return self._flow.throw(outcome) if isinstance(outcome, Cut) else self._flow.send(outcome)
        except StopIteration as end:
            return Done(end.value)


@dataclass(frozen=True, slots=True)
class Deadline:
    """When the caller's time is up, by the monotonic clock, and whether requests are repeated until then."""

    ends_at_s: float
    retry: bool = True

    @classmethod
    def after(cls, timeout_s: float, *, retry: bool = True) -> "Deadline":
        """The deadline of a wait that starts now.

        Raises:
            ValueError: The time is not a positive number.
        """
        if not 0 < timeout_s < float("inf"):
            raise ValueError(f"timeout_s is {timeout_s}; give a finite number of seconds above 0")
        return cls(time.monotonic() + timeout_s, retry)

    def left_s(self) -> float:
        """Seconds until then."""
        return self.ends_at_s - time.monotonic()


def make(request: Request, job_id: str, deadline: Deadline, cancel_after_s: float | None) -> Flow[JobBody]:
    """Make a job, and return it as it is accepted."""
    return _get_json(put_call(request, job_id, cancel_after_s=cancel_after_s), deadline)


def run(request: Request, job_id: str, timeout_s: float, *, retry: bool = True) -> Flow[Result]:
    """Make a job that ends within the time, and return its files."""
    deadline = Deadline.after(timeout_s, retry=retry)
    wait_s = min(_WAIT_S, timeout_s)
    try:
        body = yield from _get_json(put_call(request, job_id, wait_s=wait_s, cancel_after_s=timeout_s), deadline)
    except GiantleapError as error:
        if error.code != "conflict":
            raise
        body = yield from show(job_id, deadline)  # it was canceled
    if body["status"] not in _FINAL:
        body = yield from wait(job_id, deadline)
    return (yield from _download(body, deadline))


def show(job_id: str, deadline: Deadline) -> Flow[JobBody]:
    """Read a job."""
    return _get_json(get_call(job_id), deadline)


def cancel(job_id: str, deadline: Deadline) -> Flow[JobBody]:
    """Cancel a job."""
    return _get_json(cancel_call(job_id), deadline)


def delete(job_id: str, deadline: Deadline) -> Flow[bool]:
    """Delete a job that has ended, or cancel it; whether it is deleted."""
    content = yield from _send(delete_call(job_id), deadline)
    return not content


def send(method: str, path: str, params: Mapping[str, Any], deadline: Deadline) -> Flow[bytes]:
    """The body of the response of any route. A POST is never repeated: it might be done twice."""
    return _send(send_call(method, path, params), replace(deadline, retry=deadline.retry and method != "POST"))


def wait(job_id: str, deadline: Deadline) -> Flow[JobBody]:
    """Wait until a job has ended. One that has is read at once, however short the time is."""
    body = yield from show(job_id, deadline)
    if body["status"] in _FINAL:
        return body
    yield from follow(job_id, deadline)
    return (yield from show(job_id, deadline))


def result(job_id: str, deadline: Deadline) -> Flow[Result]:
    """Wait until a job has ended, and return its files."""
    body = yield from wait(job_id, deadline)
    return (yield from _download(body, deadline))


def _download(body: JobBody, deadline: Deadline) -> Flow[Result]:
    job_id = str(body["id"])
    if body["status"] == "failed":
        unknown = {"code": "job_failed", "status": 500, "detail": "the job failed"}
        raise from_problem(body["error"] or unknown, job_id, ended=True)
    if body["status"] != "succeeded":
        raise JobFailed("the job was canceled", "canceled", job_id=job_id)
    files = []
    for index in range(len(body["results"])):
        content = yield from _send(result_call(job_id, index), deadline)
        files.append(content)
    return Result(tuple(files), body)


@dataclass(slots=True)
class _Cursor:
    """Where the events of a job are resumed."""

    last_id: str = ""
    ended: bool = field(default=False)


def follow(job_id: str, deadline: Deadline) -> Flow[None]:
    """Yield the events of a job until it has ended, over as many connections as that takes."""
    cursor = _Cursor()
    while True:
        yield from _repeat(lambda: _stream(job_id, cursor, deadline), job_id, deadline)
        if cursor.ended:
            return
        yield Pause(_MIN_SILENCE_S)


def _stream(job_id: str, cursor: _Cursor, deadline: Deadline) -> Flow[None]:
    """Yield the events of one connection.

    A read cannot be made shorter once the response is open: near the deadline, the connection is replaced by one whose
    reads are short enough.
    """
    silence_s = max(_MIN_SILENCE_S, min(_HEARTBEATS_S, deadline.left_s() / 2))
    head = yield from _open(events_call(job_id, cursor.last_id), deadline, silence_s)
    cursor.ended = head.status == 204
    parser = EventParser()
    try:
        while not cursor.ended and deadline.left_s() > silence_s:
            chunk = yield from _read(deadline)
            if not chunk:
                return
            for event in parser.feed(chunk):
                cursor.last_id = event.id or cursor.last_id
                yield event
                cursor.ended = cursor.ended or event.name == "done"
    except Cut:
        return  # the next connection resumes


def _get_json(call: Call, deadline: Deadline) -> Flow[JobBody]:
    content = yield from _send(call, deadline)
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    if not isinstance(body, dict) or body.get("id") != call.job_id:
        detail = "the response is not the job; check the url and what is between here and the service"
        raise GiantleapError(detail, "unexpected_response", job_id=call.job_id)
    return body


def _send(call: Call, deadline: Deadline) -> Flow[bytes]:
    """The body of the response to a call, repeated while that can help and fits the deadline."""
    return (yield from _repeat(lambda: _exchange(call, deadline), call.job_id, deadline))


def _repeat(attempt: Callable[[], Flow[T]], job_id: str | None, deadline: Deadline) -> Flow[T]:
    for number in itertools.count():
        try:
            return (yield from attempt())
        except (Cut, GiantleapError) as error:
            fault = error
        delay_s = choose_delay_s(fault, number, random.random()) if deadline.retry else None
        fits = delay_s is not None and delay_s < deadline.left_s()
        if isinstance(fault, Cut) and not fits:
            if delay_s is not None:
                raise Timeout(f"the time ended before an answer ({fault.kind})", "timeout", job_id=job_id)
            detail = f"the service does not answer ({fault.kind}); start it, or check its url"
            raise GiantleapError(detail, "unreachable", job_id=job_id) from fault
        if not fits:
            raise fault
        assert delay_s is not None
        yield Pause(delay_s)
    raise AssertionError("the count never ends")


def _exchange(call: Call, deadline: Deadline) -> Flow[bytes]:
    yield from _open(call, deadline, _REQUEST_S)
    return (yield from _read_all(deadline))


def _read_all(deadline: Deadline) -> Flow[bytes]:
    chunks = []
    while chunk := (yield from _read(deadline)):
        chunks.append(chunk)
    return b"".join(chunks)


def _open(call: Call, deadline: Deadline, silence_s: float) -> Flow[Head]:
    """The head of a response that is no error."""
    left_s = deadline.left_s()
    if left_s <= 0:
        raise Timeout("the time has ended", "timeout", job_id=call.job_id)
    head = yield Open(call, min(left_s, silence_s))
    assert isinstance(head, Head)
    if not 200 <= head.status < 300:
        body = yield from _read_all(deadline)
        raise to_error(head.status, head.headers, body, call.job_id)
    return head


def _read(deadline: Deadline) -> Flow[bytes]:
    if deadline.left_s() <= 0:
        raise Cut("too slow")
    chunk = yield Read()
    assert isinstance(chunk, bytes)
    return chunk
