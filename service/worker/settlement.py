"""Ends the jobs of a batch that ran: success, failure, cancel, release, or transfer to a worker that decodes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from giantleap.models.route import Route
from giantleap.service.errors import NotReady, StorageFull, StoreUnavailable
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.grid import count_items
from giantleap.service.jobs.job import JobError, JobState
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.telemetry.tracing import trace_id_of
from giantleap.service.worker.items import Latent, Outcome, Output, Stop, to_job_error, to_latents_blob

log = logging.getLogger(__name__)

Status = JobState | Literal["transferred"]


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """What all jobs of a batch share: its stage times, images and jobs."""

    stages_s: Mapping[str, float]
    items: int
    jobs: int


class JobSettler:
    """Writes the end of each job to the queue, the metrics and the log.

    Args:
        consumer: An open queue.
        metrics: Where work is counted.
    """

    def __init__(self, consumer: JobConsumer, metrics: Metrics) -> None:
        self._consumer = consumer
        self._metrics = metrics

    def settle(self, claim: Claim, outcomes: Sequence[Outcome], batch: BatchSummary, warnings: Sequence[str]) -> None:
        """End one job: the first error of an image fails it, a stop cancels or releases it."""
        stages_s = _total_stages_s(claim, batch.stages_s)
        status: Status | None
        if errors := [outcome for outcome in outcomes if isinstance(outcome, JobError)]:
            status = self._fail(claim, errors[0], stages_s)
        elif Stop.CANCELED in outcomes:
            status = JobState.CANCELED if self._consumer.cancel(claim, stages_s) else None
        elif Stop.RELEASED in outcomes:
            self._consumer.release([claim])
            return
        elif latents := [outcome for outcome in outcomes if isinstance(outcome, Latent)]:
            status = self._transfer(claim, latents, stages_s, warnings, batch.jobs)
        else:
            outputs = [outcome for outcome in outcomes if isinstance(outcome, Output)]
            status = self._complete(claim, outputs, stages_s, warnings, batch.jobs)
        if status is None:
            self._metrics.count_fenced()
        self._record(claim, status, stages_s, batch.items)

    def drop(self, claims: Sequence[Claim], error: NotReady) -> None:
        """Leave jobs to become stale: their work is lost, but the loaded worker need not be."""
        log.error("ends of jobs not written, they run again: %s", error.detail)
        self._consumer.drop(claims)

    def _transfer(
        self,
        claim: Claim,
        latents: Sequence[Latent],
        stages_s: Mapping[str, float],
        warnings: Sequence[str],
        batch_jobs: int,
    ) -> Status | None:
        try:
            state = self._consumer.transfer(claim, to_latents_blob(latents), stages_s, warnings, batch_jobs)
        except (StorageFull, StoreUnavailable) as error:
            return self._fail(claim, to_job_error(error), stages_s)
        return "transferred" if state is JobState.QUEUED else state

    def _complete(
        self,
        claim: Claim,
        outputs: Sequence[Output],
        stages_s: Mapping[str, float],
        warnings: Sequence[str],
        batch_jobs: int,
    ) -> JobState | None:
        files = [(output.file, output.content) for output in outputs]
        try:
            state = self._consumer.complete(claim, files, stages_s, warnings, batch_jobs)
        except (StorageFull, StoreUnavailable) as error:
            return self._fail(claim, to_job_error(error), stages_s)
        if state is JobState.SUCCEEDED:
            pixels = sum((file.width_px or 0) * (file.height_px or 0) for file, _ in files)
            images = sum(file.width_px is not None for file, _ in files)
            self._metrics.count_images(claim.job.bundle, claim.job.params.scale, images, pixels)
        return state

    def _fail(self, claim: Claim, error: JobError, stages_s: Mapping[str, float]) -> JobState | None:
        state = self._consumer.fail(claim, error, stages_s)
        self._metrics.count_failure(claim.job.bundle, error.code)
        if state is JobState.QUEUED:
            self._metrics.count_retry(claim.job.bundle)
        return state

    def _record(self, claim: Claim, status: Status | None, stages_s: Mapping[str, float], batch_items: int) -> None:
        """One log line and the metrics of a job that ended here; `status` is None if the lease was lost."""
        job, params = claim.job, claim.job.params
        duration_s = claim.age_s()
        if isinstance(status, JobState) and status.final:
            self._metrics.observe_job(params.kind, job.bundle, params.method, params.scale, status, duration_s)
        fields = {
            "job_id": job.id,
            "trace_id": trace_id_of(job.traceparent),
            "status": "fenced" if status is None else "retrying" if status is JobState.QUEUED else str(status),
            "kind": params.kind,
            "bundle": job.bundle,
            "method": params.method,
            "scale": params.scale,
            "images": count_items(params),
            "batch_items": batch_items,
            "delivery": claim.delivery,
            "duration_s": round(duration_s, 4),
            "stages_s": {stage: round(seconds, 4) for stage, seconds in stages_s.items()},
        }
        log.info("job transferred" if status == "transferred" else "job ended", extra={"fields": fields})


def find_warnings(claim: Claim, route: Route) -> list[str]:
    """Warnings for the client that the pipeline knows and the API process does not: cut prompts, a step cache."""
    params = claim.job.params
    if claim.base_latents is not None:
        return list(claim.base_latents.warnings)
    if (
        not params.prompt or not route.role.loads_pipeline
    ):  # upscales without a refine pass, or fails for the lack of it
        return []
    cache = [note] if (note := route.generator.modes.cache_note) else []
    return cache + [
        f"the {name} is {excess} tokens longer than the text encoder takes; its end was ignored"
        for name, text in (("prompt", params.prompt), ("negative prompt", params.negative_prompt))
        if (excess := route.generator.truncated_tokens(text)) > 0
    ]


def _total_stages_s(claim: Claim, stages_s: Mapping[str, float]) -> dict[str, float]:
    """The stage times of a job, with those of the worker that generated its base latents."""
    before_s = {} if claim.base_latents is None else claim.base_latents.stages_s
    return {stage: before_s.get(stage, 0.0) + stages_s.get(stage, 0.0) for stage in (*before_s, *stages_s)}
