"""Traces: W3C ids in and out, one trace from the request to the last stage, and what an OTLP receiver gets."""

import http.server
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import redis
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from giantleap.service.api.app import create_app
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.job import Job
from giantleap.service.settings import Settings, read_settings
from giantleap.service.telemetry.logs import JsonFormatter, log_fields
from giantleap.service.telemetry.tracing import (
    Tracing,
    current_traceparent,
    open_tracing,
    read_traceparent,
    trace_id_of,
)
from tests.service.fakes import GENERATE, FakeConsumer, FakeRoute, make_claim, open_worker
from tests.service.live_server import live_server
from tests.service.paper_bundle import write_paper_bundle

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
PROMPT = "a red sphere on green floor"


def open_memory() -> tuple[Tracing, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider), exporter


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (SENT, SENT),
        (f" {SENT} ", SENT),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01-what-comes-later", SENT),
        (None, None),
        ("", None),
        (f"00-{TRACE_ID}-{SPAN_ID}-01-more", None),
        (f"ff-{TRACE_ID}-{SPAN_ID}-01", None),
        (f"00-{'0' * 32}-{SPAN_ID}-01", None),
        (f"00-{TRACE_ID}-{'0' * 16}-01", None),
        (SENT.upper(), None),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01-" + "x" * 600, None),
    ],
)
def test_traceparent_is_read_as_the_standard_says(sent: str | None, read: str | None) -> None:
    assert read_traceparent(sent) == read


def test_without_an_endpoint_ids_are_handed_on_and_nothing_is_recorded() -> None:
    tracing = open_tracing(None, "api")
    with tracing.request("GET", SENT) as trace:
        assert trace.traceparent == SENT == current_traceparent(), "nobody adds a span: the client's is the parent"
        assert not trace.span.is_recording()
    assert current_traceparent() is None
    with tracing.request("GET", "nonsense") as first, tracing.request("GET", None) as second:
        assert read_traceparent(first.traceparent) and trace_id_of(first.traceparent) != trace_id_of(second.traceparent)
        assert first.traceparent.endswith("-00"), "not sampled"
    tracing.close()


def test_a_request_continues_the_trace_of_its_client() -> None:
    tracing, exporter = open_memory()
    with tracing.request("POST", SENT) as trace:
        trace.end("POST", "/generate", 503, "a-job")
    (span,) = exporter.get_finished_spans()
    assert trace_of(span) == TRACE_ID == trace_id_of(trace.traceparent)
    assert span.parent is not None and f"{span.parent.span_id:016x}" == SPAN_ID
    assert span.name == "POST /generate" and span.status.status_code is StatusCode.ERROR
    assert trace.traceparent != SENT, "the job's parent is the request, not the client"


@contextmanager
def fake_worker(settings: Settings, tracing: Tracing) -> Iterator[None]:
    """The real loop on the real queue with a route of our own, in a thread."""
    assert settings.redis_url is not None
    client, stop = redis.Redis.from_url(settings.redis_url, socket_timeout=10), threading.Event()
    consumer = JobConsumer(client, settings, ("paper",), "traced-worker")
    consumer.open()
    route = FakeRoute(name="paper")
    worker, _ = open_worker(route, consumer, settings, name="paper", stop=stop, tracing=tracing)
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
        consumer.close()
        client.close()
    assert not thread.is_alive(), "the worker did not stop"


def test_one_trace_from_the_request_to_the_last_stage(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings.model_copy(
        update={"bundle": (write_paper_bundle(tmp_path / "paper"),), "visibility_timeout_s": 30.0}
    )
    (api, api_spans), (worker, worker_spans) = open_memory(), open_memory()
    caplog.handler.setFormatter(JsonFormatter())
    with (
        caplog.at_level(logging.INFO, "giantleap.service"),
        live_server(create_app(settings, tracing=api)) as url,
        fake_worker(settings, worker),
    ):
        headers = {"traceparent": SENT, "x-request-id": "request-7", "accept": "image/png"}
        answer = httpx.post(f"{url}/generate", json={"prompt": PROMPT, "seed": 3}, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        httpx.get(f"{url}/metrics")
    job_id = answer.headers["x-job-id"]

    (server,) = api_spans.get_finished_spans()
    assert server.name == "POST /generate" and server.kind.name == "SERVER"
    ended = {span.name: span for span in worker_spans.get_finished_spans()}
    assert set(ended) == {"queue", "run", "generate", "upscale", "decode", "encode"}
    assert {trace_of(span) for span in (server, *ended.values())} == {TRACE_ID}

    assert server.parent is not None and f"{server.parent.span_id:016x}" == SPAN_ID
    for name in ("queue", "run"):
        parent = ended[name].parent
        assert parent is not None and parent.span_id == id_of(server)
    stages = [ended[name] for name in ("generate", "upscale", "decode", "encode")]
    assert all(span.parent is not None and span.parent.span_id == id_of(ended["run"]) for span in stages)
    times = [(span.start_time or 0, span.end_time or 0) for span in (ended["queue"], *stages)]
    assert all(start <= end for start, end in times) and times[1:] == sorted(times[1:]), "one stage after the other"
    assert (ended["run"].end_time or 0) >= times[-1][1]

    attributes = dict(ended["decode"].attributes or {})
    assert attributes == {
        "giantleap.kind": "generate",
        "giantleap.bundle": "paper",
        "giantleap.method": "lua",
        "giantleap.scale": 2,
        "giantleap.engine": "fake",
        "giantleap.batch.items": 1,
    }
    assert dict(ended["run"].attributes or {})["giantleap.job_id"] == job_id

    lines = [json.loads(line) for line in caplog.text.splitlines() if line.startswith("{")]
    request = next(line for line in lines if line["message"] == "request ended")
    assert (request["request_id"], request["trace_id"], request["job_id"]) == ("request-7", TRACE_ID, job_id)
    assert request["route"] == "/generate" and request["status"] == 200
    run = next(line for line in lines if line["message"] == "job ended")
    assert (run["trace_id"], run["job_id"]) == (TRACE_ID, job_id)
    assert not [line for line in lines if line.get("route") == "/metrics"], "scrapes are no news"
    output = caplog.text + "".join(span.to_json() for span in (server, *ended.values()))
    assert PROMPT not in output and "sphere" not in output


def run_batch(consumer: FakeConsumer) -> list[ReadableSpan]:
    tracing, exporter = open_memory()
    stop = threading.Event()
    consumer.on_empty = stop.set
    worker, _ = open_worker(FakeRoute(), consumer, read_settings(), stop=stop, tracing=tracing)
    worker.run()
    return list(exporter.get_finished_spans())


def test_a_batch_is_in_the_trace_of_each_of_its_jobs_and_links_the_others() -> None:
    parents = [f"00-{number:032x}-{number:016x}-01" for number in (1, 2, 3)]
    waiting = [make_claim(f"job-{number}", traceparent=parent) for number, parent in enumerate(parents)]
    spans = run_batch(FakeConsumer(waiting))
    for number in (1, 2, 3):
        own = [span for span in spans if trace_of(span) == f"{number:032x}"]
        assert sorted(span.name for span in own) == ["decode", "encode", "generate", "queue", "run", "upscale"]
        for span in own:
            linked = {link.context.trace_id for link in span.links}
            assert linked == (set() if span.name == "queue" else {1, 2, 3} - {number})


def test_a_job_that_fails_says_so_in_its_own_trace_only() -> None:
    good, bad = f"00-{1:032x}-{1:016x}-01", f"00-{2:032x}-{2:016x}-01"
    crash = make_claim("bad", replace(GENERATE, prompt="crash"), traceparent=bad)
    spans = run_batch(FakeConsumer([make_claim("good", traceparent=good), crash]))
    runs = {span.context.trace_id: span for span in spans if span.name == "run" and span.context is not None}
    assert runs[1].status.status_code is StatusCode.UNSET
    assert runs[2].status.status_code is StatusCode.ERROR
    assert dict(runs[2].attributes or {})["error.type"] == "engine_error"


def test_a_trace_that_its_client_does_not_sample_is_not_sent() -> None:
    spans = run_batch(FakeConsumer([make_claim("job", traceparent=SENT[:-2] + "00")]))
    assert spans == []


def test_the_trace_is_no_part_of_the_request() -> None:
    plain = make_claim("job").job
    traced = replace(plain, traceparent=SENT)
    assert plain.payload_sha256() == traced.payload_sha256(), "a repeat in another trace is the same request"
    assert Job.from_json(traced.to_json()) == traced
    old = {name: value for name, value in json.loads(plain.to_json()).items() if name != "traceparent"}
    assert Job.from_json(json.dumps(old)) == plain, "a job of the version before"


class Receiver(http.server.BaseHTTPRequestHandler):
    """An OTLP/HTTP receiver that keeps what it gets."""

    got: list[tuple[str, ExportTraceServiceRequest]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert self.headers["content-type"] == "application/x-protobuf"
        self.got.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None: ...


def test_spans_reach_an_otlp_receiver() -> None:
    Receiver.got = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        tracing = open_tracing(f"http://127.0.0.1:{server.server_port}/", "worker")
        job = make_claim("job", traceparent=SENT).job
        tracing.waited(job, 1002.5, 2.5)
        with tracing.batch([job], {"giantleap.scale": 2}) as trace, trace.stage("decode", ["job"]):
            pass
        tracing.close()
    finally:
        server.shutdown()
        server.server_close()
    assert {path for path, _ in Receiver.got} == {"/v1/traces"}
    resources = [each for _, request in Receiver.got for each in request.resource_spans]
    names = {a.key: a.value.string_value for each in resources for a in each.resource.attributes}
    assert names["service.name"] == "giantleap-worker" and names["service.version"]
    spans = {span.name: span for each in resources for scope in each.scope_spans for span in scope.spans}
    assert set(spans) == {"queue", "run", "decode"}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE_ID}
    assert spans["queue"].end_time_unix_nano - spans["queue"].start_time_unix_nano == 2_500_000_000
    assert spans["decode"].parent_span_id == spans["run"].span_id


def test_a_receiver_that_is_away_costs_no_request(caplog: pytest.LogCaptureFixture) -> None:
    tracing = open_tracing("http://127.0.0.1:9", "api")
    traces = set()
    for _ in range(100):
        with tracing.request("GET", None):
            traces.add(trace_id_of(current_traceparent()))
    tracing.close()
    assert len(traces) == 100 and None not in traces
    assert "127.0.0.1" in caplog.text, "the exporter met the closed port"


def test_an_endpoint_without_what_sends_stops_the_start() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from giantleap.service.errors import BadConfiguration\n"
        "from giantleap.service.telemetry.tracing import open_tracing\n"
        "open_tracing(None, 'api').close()\n"
        "try:\n    open_tracing('http://127.0.0.1:9', 'api')\n"
        "except BadConfiguration as error:\n    print(error.detail)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "pip install '.[otel]'" in ended.stdout


def test_an_endpoint_must_be_a_base_url() -> None:
    for wrong in ("collector:4318", "file:///etc/passwd", "http://collector:4318/v1/traces", "http://a b"):
        with pytest.raises(ValueError, match="otlp_endpoint"):
            read_settings(otlp_endpoint=wrong)
    assert read_settings(otlp_endpoint="https://collector:4318").otlp_endpoint


def test_log_fields_hold_within_and_a_lines_own_win() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "hello", None, None)
    record.fields = {"job_id": "own"}
    with log_fields(request_id="r", job_id="outer"), log_fields(trace_id="t"):
        inside = json.loads(JsonFormatter().format(record))
    outside = json.loads(JsonFormatter().format(record))
    assert (inside["request_id"], inside["trace_id"], inside["job_id"]) == ("r", "t", "own")
    assert "request_id" not in outside
