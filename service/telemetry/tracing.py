"""Traces of W3C Trace Context and OpenTelemetry: one trace from an HTTP request through the queue to the last stage.

An API process opens a span per request and gives its `traceparent` to the job; the worker that claims the job adds the
wait, the run and each stage to the same trace. Without an endpoint no span is made, and ids are still handed on: the
log lines of a request and of its job are found by one trace id. No attribute holds a prompt, a latent or who called.
Needs `opentelemetry-api` only; the extra `otel` brings what sends.
"""

import os
import platform
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    NoOpTracer,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    set_span_in_context,
)

from giantleap.service.errors import BadConfiguration
from giantleap.service.jobs.job import Job

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

Attributes = Mapping[str, str | int | float | bool]

# W3C Trace Context, level 1, section 3.2: version 00; zero ids and version ff are invalid. Of a later version, the
# fields that this one knows are read (section 4.1).
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_CURRENT: ContextVar[str | None] = ContextVar("traceparent", default=None)
_EXPORT_TIMEOUT_S = 5


def read_traceparent(sent: str | None) -> str | None:
    """The header as version 00 writes it; None where it is missing or not valid, as the standard asks."""
    text = "" if sent is None else sent.strip()
    found = _TRACEPARENT.fullmatch(text) if len(text) <= 512 else None
    if found is None or (text.startswith("00-") and found[4]):
        return None
    return f"00-{found[1]}-{found[2]}-{found[3]}"


def trace_id_of(traceparent: str | None) -> str | None:
    """The 32 hex digits that a trace is found by."""
    return None if traceparent is None else traceparent.split("-")[1]


def current_traceparent() -> str | None:
    """The `traceparent` of the request that is being answered, for the job that it makes; None outside of one."""
    return _CURRENT.get()


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """A request's place in its trace."""

    traceparent: str
    span: Span

    def end(self, method: str, route: str, status: int, job_id: str | None) -> None:
        """What became of the request; `route` is the path's template, never the path."""
        self.span.update_name(f"{method} {route}")
        self.span.set_attributes(
            {"http.request.method": method, "http.route": route, "http.response.status_code": status}
        )
        if job_id is not None:
            self.span.set_attribute("giantleap.job_id", job_id)
        if status >= 500:
            self.span.set_status(Status(StatusCode.ERROR))


class Tracing:
    """The spans of one process. Made by `open_tracing`; tests give a provider of their own.

    Args:
        provider: Where spans go; none: nothing is recorded.
    """

    def __init__(self, provider: "TracerProvider | None" = None) -> None:
        self._provider = provider
        self._tracer: Tracer = NoOpTracer() if provider is None else provider.get_tracer("giantleap")

    @contextmanager
    def request(self, name: str, sent: str | None, record: bool = True) -> Iterator[RequestTrace]:
        """The span of an HTTP request: continues the client's trace where `sent`, its `traceparent`, is valid.

        Within, `current_traceparent` is this request's.
        """
        parent = read_traceparent(sent)
        tracer = self._tracer if record else NoOpTracer()
        span = tracer.start_span(name, _to_context(parent), SpanKind.SERVER)
        traceparent = _to_traceparent(span) or parent or _new_traceparent()
        token = _CURRENT.set(traceparent)
        try:
            yield RequestTrace(traceparent, span)
        finally:
            _CURRENT.reset(token)
            span.end()

    def waited(self, job: Job, claimed_at_s: float) -> None:
        """The span of a job's wait in the queue, from its acceptance to its claim."""
        if self._provider is not None:
            attributes = {"giantleap.bundle": job.bundle, "giantleap.priority": str(job.priority)}
            start_ns = _to_ns(min(job.created_at_s, claimed_at_s))
            span = self._tracer.start_span(
                "queue", _to_context(job.traceparent), SpanKind.CONSUMER, attributes, start_time=start_ns
            )
            span.end(_to_ns(claimed_at_s))

    @contextmanager
    def batch(self, jobs: Sequence[Job], attributes: Attributes) -> Iterator["BatchTrace"]:
        """The run of jobs together: a span in each job's own trace, linked to those of the others."""
        trace = BatchTrace(self._tracer if self._provider is not None else None, jobs, attributes)
        try:
            yield trace
        finally:
            trace.close()

    def close(self) -> None:
        """Sends what is left, for some seconds at most."""
        if self._provider is not None:
            self._provider.force_flush(1000 * _EXPORT_TIMEOUT_S)
            self._provider.shutdown()


class BatchTrace:
    """The spans of one batch: each stage is written into the trace of every job that it ran for.

    Stage spans of one batch cover the same time in several traces, so that each trace is whole by itself.
    """

    def __init__(self, tracer: Tracer | None, jobs: Sequence[Job], attributes: Attributes) -> None:
        self._tracer = tracer
        self._attributes = attributes
        self._spans: dict[str, Span] = {}
        if tracer is not None:
            for job in jobs:
                parent, own = _to_context(job.traceparent), {**attributes, "giantleap.job_id": job.id}
                links = [link for other in jobs if other is not job and (link := _to_link(other.traceparent))]
                self._spans[job.id] = tracer.start_span("run", parent, SpanKind.CONSUMER, own, links)

    @contextmanager
    def stage(self, name: str, job_ids: Sequence[str]) -> Iterator[None]:
        """The spans of one stage that runs within, for the jobs named."""
        start_ns = time.time_ns()
        failed = True
        try:
            yield
            failed = False
        finally:
            end_ns = time.time_ns()
            for job_id in dict.fromkeys(job_ids):
                if self._tracer is not None and job_id in self._spans:
                    self._write_stage(self._tracer, name, job_id, start_ns, end_ns, failed)

    def end(self, job_id: str, error_code: str | None) -> None:
        """A job's run is over; `error_code` says why it failed."""
        span = self._spans.get(job_id)
        if span is not None and error_code is not None:
            span.set_attribute("error.type", error_code)
            span.set_status(Status(StatusCode.ERROR))

    def close(self) -> None:
        """Ends the spans of all runs."""
        for span in self._spans.values():
            span.end()

    def _write_stage(self, tracer: Tracer, name: str, job_id: str, start_ns: int, end_ns: int, failed: bool) -> None:
        run = self._spans[job_id]
        links = [Link(span.get_span_context()) for span in self._spans.values() if span is not run]
        context = set_span_in_context(run)
        span = tracer.start_span(name, context, SpanKind.INTERNAL, self._attributes, links, start_time=start_ns)
        if failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_ns)


def open_tracing(endpoint: str | None, role: str) -> Tracing:
    """Tracing of a process that is `giantleap-<role>`; off without an endpoint.

    Headers and sampling come from the standard variables (OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER).

    Args:
        endpoint: Base URL of an OTLP/HTTP receiver; spans go to its `/v1/traces`.

    Raises:
        BadConfiguration: the extra `otel` is not installed.

    Effects: starts a thread that sends; a receiver that does not answer costs spans, never a request.
    """
    if endpoint is None:
        return Tracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise BadConfiguration(
            "otlp_endpoint is set and what sends traces is not installed: pip install 'giantleap[otel]'"
        ) from error
    resource = Resource.create(
        {
            "service.name": f"giantleap-{role}",
            "service.version": version("giantleap"),
            "service.instance.id": f"{platform.node()}-{os.getpid()}",
        }
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint.rstrip("/") + "/v1/traces", timeout=_EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


def _to_context(traceparent: str | None) -> Context:
    """A context whose span is the one that `traceparent` names; an empty one starts a trace."""
    context = _to_span_context(traceparent)
    return Context() if context is None else set_span_in_context(NonRecordingSpan(context), Context())


def _to_link(traceparent: str | None) -> Link | None:
    context = _to_span_context(traceparent)
    return None if context is None else Link(context)


def _to_span_context(traceparent: str | None) -> SpanContext | None:
    if (valid := read_traceparent(traceparent)) is None:
        return None
    _, trace_id, span_id, flags = valid.split("-")
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))


def _to_traceparent(span: Span) -> str | None:
    context = span.get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _new_traceparent() -> str:
    """Ids for the log lines of a request that nobody traces: not sampled."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"


def _to_ns(time_s: float) -> int:
    return int(time_s * 1e9)
