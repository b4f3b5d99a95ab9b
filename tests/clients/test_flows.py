"""What the client does step by step when answers are lost, late, refused or strange: flows without I/O."""

import json
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from giantleap_client import Event, GiantleapError, JobFailed, RateLimited, Result, Timeout, generate_request
from giantleap_client.calls import Call
from giantleap_client.flows import (
    Deadline,
    Done,
    Flow,
    Head,
    Machine,
    Open,
    Outcome,
    Pause,
    Read,
    follow,
    result,
    run,
    send,
)
from giantleap_client.retries import MAX_ATTEMPTS, Cut

T = TypeVar("T")
Answer = tuple[int, bytes | dict[str, Any], dict[str, str]] | Cut

JOB = str(uuid.uuid4())
REQUEST = generate_request("a red sphere")
RESULTS = [{"seed": 7, "content_type": "image/png"}]


def job(status: str, **members: Any) -> Answer:
    return 200, {"id": JOB, "status": status, "results": RESULTS, "error": None} | members, {}


def problem(status: int, code: str, **headers: str) -> Answer:
    return status, {"code": code, "detail": "what was wrong", "job_id": JOB}, headers


class Script:
    """Answers the calls of a flow in turn, and notes what it did. A Cut in place of an answer loses it."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = deque(answers)
        self._chunks: deque[bytes | Cut] = deque()
        self.calls: list[Call] = []
        self.pauses_s: list[float] = []
        self.events: list[Event] = []

    def run(self, flow: Flow[T]) -> T:
        machine = Machine(flow)
        step = machine.next()
        while not isinstance(step, Done):
            step = machine.next(self._perform(step))
        assert not self._answers, "the flow used fewer answers"
        return step.value

    def _perform(self, step: Open | Read | Pause | Event) -> Outcome:
        match step:
            case Open():
                self.calls.append(step.call)
                answer = self._answers.popleft()
                if isinstance(answer, Cut):
                    return answer
                status, body, headers = answer
                self._chunks = deque([body if isinstance(body, bytes) else json.dumps(body).encode()])
                return Head(status, headers)
            case Read():
                return self._chunks.popleft() if self._chunks else b""
            case Pause():
                self.pauses_s.append(step.seconds_s)
            case Event():
                self.events.append(step)
        return None


def test_a_lost_answer_repeats_the_same_call_and_a_refusal_waits_as_long_as_it_says() -> None:
    script = Script(
        Cut("ReadError"), problem(429, "queue_full", **{"retry-after": "3"}), (502, b"<html>", {}),
        job("succeeded"), Cut("ReadError"), (200, b"a file", {}),
    )  # fmt: skip
    made = script.run(run(REQUEST, JOB, 60.0))
    assert isinstance(made, Result) and made.files == (b"a file",) and made.seed() == 7
    assert len(set(map(repr, script.calls[:4]))) == 1 and script.calls[0].headers["Cancel-After"] == "60"
    assert [call.path for call in script.calls[3:]] == [f"jobs/{JOB}", f"jobs/{JOB}/result", f"jobs/{JOB}/result"]
    assert 3.0 <= script.pauses_s[1] <= 3.25 and len(script.pauses_s) == 4


@pytest.mark.parametrize(
    ("answers", "kind", "code"),
    [
        ([problem(429, "queue_full", **{"retry-after": "600"})], RateLimited, "queue_full"),
        ([problem(401, "unauthorized")], GiantleapError, "unauthorized"),
        ([problem(500, "engine_fault")], JobFailed, "engine_fault"),
        ([problem(409, "conflict"), job("canceled")], JobFailed, "canceled"),
        ([job("failed")], JobFailed, "job_failed"),
        ([job("failed", error={"code": "not_ready", "status": 503, "detail": "lost"})], JobFailed, "not_ready"),
        ([problem(504, "deadline_passed")], Timeout, "deadline_passed"),
        ([(200, b"<html>", {})], GiantleapError, "unexpected_response"),
        ([(200, b"[]", {})], GiantleapError, "unexpected_response"),
        ([(200, {"id": str(uuid.uuid4()), "status": "succeeded"}, {})], GiantleapError, "unexpected_response"),
        ([(302, b"", {})], GiantleapError, "http_302"),
        ([Cut("ConnectError")] * MAX_ATTEMPTS, GiantleapError, "unreachable"),
    ],
)
def test_what_no_repeat_helps_ends_as_an_error_that_names_the_job(
    answers: list[Answer], kind: type[GiantleapError], code: str
) -> None:
    script = Script(*answers)
    with pytest.raises(GiantleapError) as ended:
        script.run(run(REQUEST, JOB, 60.0))
    assert (type(ended.value), ended.value.code, ended.value.job_id) == (kind, code, JOB)
    assert len(script.calls) == len(answers)


@pytest.mark.parametrize(
    ("flow", "calls"),
    [
        (lambda: run(REQUEST, JOB, 60.0, retry=False), 1),
        (lambda: send("POST", f"dead-letters/{JOB}/retry", {}, Deadline.after(60)), 1),
        (lambda: send("GET", "models", {}, Deadline.after(60)), MAX_ATTEMPTS),
    ],
)
def test_only_what_may_be_sent_twice_is_repeated_and_only_where_the_caller_wants_it(
    flow: Callable[[], Flow[Any]], calls: int
) -> None:
    script = Script(*[Cut("ReadError")] * calls)
    with pytest.raises(GiantleapError, match="does not answer") as ended:
        script.run(flow())
    assert ended.value.code == "unreachable" and len(script.calls) == calls


@pytest.mark.parametrize("path", ["http://elsewhere/models", "//elsewhere/models", "https:models"])
def test_a_route_is_one_of_the_service_that_has_the_key(path: str) -> None:
    with pytest.raises(ValueError, match="path of the service"):
        send("GET", path, {}, Deadline.after(60))


def test_the_result_of_a_job_that_has_ended_needs_no_events() -> None:
    script = Script(job("succeeded"), (200, b"a file", {}))
    assert script.run(result(JOB, Deadline.after(60))).files == (b"a file",)


def test_events_resume_after_the_last_one_that_was_whole() -> None:
    script = Script(
        (200, b'id: 1-0\nevent: queued\ndata: {}\n\nid: 2-0\nevent: started\ndata: {"del', {}),
        Cut("ConnectError"),
        problem(503, "not_ready", **{"retry-after": "1"}),
        (200, b"id: 2-0\nevent: started\ndata: {}\n\n", {}),
        (200, b": not_ready; reconnect to resume\n\n", {}),
        (200, b"id: 3-0\nevent: done\ndata: {}\n\n", {}),
    )
    script.run(follow(JOB, Deadline.after(60)))
    assert [event.name for event in script.events] == ["queued", "started", "done"]
    assert [call.headers.get("Last-Event-ID") for call in script.calls] == [None, "1-0", "1-0", "1-0", "2-0", "2-0"]


def test_a_job_without_events_left_has_ended() -> None:
    script = Script((204, b"", {}))
    script.run(follow(JOB, Deadline.after(60)))
    assert script.events == []
