"""OpenTelemetry traces: one trace from an HTTP request through the queue to the last stage.

An API process opens a span per request and stores its W3C `traceparent` in the job; the worker that claims the job adds
the wait, the run and each stage to the same trace. Without an endpoint no span is recorded, but the ids are still
propagated, so that one trace id finds the log lines of a request and of its job. No attribute holds a prompt, a latent
or the caller. This module needs `opentelemetry-api` only; the extra `otel` installs the exporter.
"""

import os
import platform
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import version
from types import TracebackType
from typing import TYPE_CHECKING, Self

from opentelemetry.context import Context
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    NoOpTracer,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from giantleap.models.messages import install_hint
from giantleap.service.errors import BadConfiguration
from giantleap.service.jobs.job import Job

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

Attributes = Mapping[str, str | int | float | bool]

_PROPAGATOR = TraceContextTextMapPropagator()
_CURRENT: ContextVar[str | None] = ContextVar("traceparent", default=None)
_EXPORT_TIMEOUT_S = 5


def read_traceparent(header: str | None) -> str | None:
    """The header in version 00; None if it is missing or not valid."""
    return _to_traceparent(_to_context(header))


def trace_id_of(traceparent: str | None) -> str | None:
    """The 32 hexadecimal digits of the trace id."""
    return None if traceparent is None else traceparent.split("-")[1]


def current_traceparent() -> str | None:
    """The `traceparent` of the current request, for the job that it creates; None outside of a request."""
    return _CURRENT.get()


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """The span of a request and its `traceparent`."""

    traceparent: str
    span: Span

    def end(self, method: str, route: str, status: int, job_id: str | None) -> None:
        """Records the response; `route` is the template of the path, never the path itself."""
        self.span.update_name(f"{method} {route}")
        self.span.set_attributes(
            {"http.request.method": method, "http.route": route, "http.response.status_code": status}
        )
        if job_id is not None:
            self.span.set_attribute("giantleap.job_id", job_id)
        if status >= 500:
            self.span.set_status(Status(StatusCode.ERROR))


class Tracing:
    """The spans of one process, as `open_tracing` opens it.

    Args:
        provider: Where spans go; without one nothing is recorded.
    """

    def __init__(self, provider: "TracerProvider | None" = None) -> None:
        self._provider = provider
        self._tracer: Tracer = NoOpTracer() if provider is None else provider.get_tracer("giantleap")

    @contextmanager
    def request(self, name: str, header: str | None, record: bool = True) -> Iterator[RequestTrace]:
        """The span of an HTTP request. It continues the trace of the client if `header`, a `traceparent`, is valid.

        Inside the context, `current_traceparent` is that of this request.
        """
        span: Span = INVALID_SPAN
        if self._provider is not None and record:
            span = self._tracer.start_span(name, _to_context(header), SpanKind.SERVER)
            traceparent = _to_traceparent(set_span_in_context(span, Context()))
        else:
            traceparent = None if header is None else read_traceparent(header)
        traceparent = traceparent or _new_traceparent()
        token = _CURRENT.set(traceparent)
        try:
            yield RequestTrace(traceparent, span)
        finally:
            _CURRENT.reset(token)
            span.end()

    def waited(self, job: Job, claimed_at_s: float, waited_s: float) -> None:
        """The span of a job's wait in the queue, from its acceptance to its claim, by the clock of this host."""
        if self._provider is not None:
            attributes = {"giantleap.bundle": job.bundle, "giantleap.priority": str(job.priority)}
            start_ns = _to_ns(claimed_at_s - waited_s)
            span = self._tracer.start_span(
                "queue", _to_context(job.traceparent), SpanKind.CONSUMER, attributes, start_time=start_ns
            )
            span.end(_to_ns(claimed_at_s))

    def batch(self, jobs: Sequence[Job], attributes: Attributes) -> "BatchTrace":
        """The run of a batch: a span in the trace of each job, linked to the spans of the others."""
        return BatchTrace(self._tracer if self._provider is not None else None, jobs, attributes)

    def close(self) -> None:
        """Sends the remaining spans, for some seconds at most."""
        if self._provider is not None:
            self._provider.force_flush(1000 * _EXPORT_TIMEOUT_S)
            self._provider.shutdown()


class BatchTrace:
    """The spans of one batch: each stage appears in the trace of every job that it ran for.

    So each trace is complete, although the stage spans of a batch cover the same time in several traces.
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def stage(self, name: str, job_ids: Sequence[str]) -> Iterator[None]:
        """The spans of the stage that runs inside the context, for these jobs."""
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
        """Marks the run of a job as failed if there is an `error_code`."""
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
    """Tracing of a process of the service `giantleap-<role>`; off without an endpoint.

    Headers and sampling come from the standard variables (OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER).

    Effects: starts a thread that exports. If the receiver does not answer, spans are lost, never requests.

    Args:
        endpoint: Base URL of an OTLP/HTTP receiver; spans go to its `/v1/traces`.
        role: Of the process: api or worker.

    Raises:
        BadConfiguration: The extra `otel` is not installed.
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
            f"otlp_endpoint is set, but the OpenTelemetry exporter is not installed: {install_hint('otel')}"
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
    """The context of a `traceparent`; an empty one, which starts a new trace, if it is missing or not valid."""
    return _PROPAGATOR.extract({} if traceparent is None else {"traceparent": traceparent}, Context())


def _to_traceparent(context: Context) -> str | None:
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context)
    return carrier.get("traceparent")


def _to_link(traceparent: str | None) -> Link | None:
    span_context = get_current_span(_to_context(traceparent)).get_span_context()
    return Link(span_context) if span_context.is_valid else None


def _new_traceparent() -> str:
    """A trace that is not sampled, for the log lines of an untraced request."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"


def _to_ns(time_s: float) -> int:
    return int(time_s * 1e9)
