"""A job's record from what Redis keeps of it: a hash of texts, written by the scripts of the queue."""

import json
from collections.abc import Mapping

from giantleap.service.jobs.job import Job, JobError, JobRecord, JobState, ResultFile


def read_record(reply: tuple[list[bytes], int]) -> JobRecord:
    """A job's record from the reply of the scripts READ, CANCEL and LIST."""
    flat, position = reply
    fields = {name.decode(): value.decode() for name, value in zip(flat[::2], flat[1::2], strict=True)}
    return to_record(fields, Job.from_json(fields["job"]), position if position >= 0 else None)


def to_record(fields: Mapping[str, str], job: Job, queue_position: int | None = None) -> JobRecord:
    """The record of a job from the fields of its hash; `job` itself need not be among them."""
    added = [text for text in json.loads(fields.get("warnings", "[]")) if text not in job.warnings]
    return JobRecord(
        job=job,
        state=JobState(fields["state"]),
        deliveries=int(fields["deliveries"]),
        started_at_s=float(fields["started_at_s"]) if "started_at_s" in fields else None,
        finished_at_s=float(fields["finished_at_s"]) if "finished_at_s" in fields else None,
        queue_position=queue_position,
        cancel_requested="cancel" in fields,
        stages=json.loads(fields.get("stages", "{}")),
        results=tuple(ResultFile(**file) for file in json.loads(fields.get("results", "[]"))),
        warnings=(*job.warnings, *added),
        error=JobError(**json.loads(fields["error"])) if "error" in fields else None,
        estimated_start_s=float(fields["start_s"]) if fields.get("start_s") else None,
        deadline_left_s=int(fields["left_ms"]) / 1000 if "left_ms" in fields else None,
    )
