"""Runs small jobs, and checks their results: an image, its marks, an enlarged latent, the time of each stage."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.numpy import load

from giantleap.service.doctor.findings import Finding, fail, ok, skipped, warn
from giantleap.service.doctor.probe import Answer, Service
from giantleap.service.doctor.requests import LatentRequest
from giantleap.service.errors import GiantleapError
from giantleap.service.jobs.media_types import NPY_TYPE, SAFETENSORS_TYPE
from giantleap.service.jobs.verification import ImageMarks, verify_image
from giantleap.service.settings import Settings

_POLL_S: Final = 0.1
_FINAL: Final = ("succeeded", "failed", "canceled")
_LOG: Final = "see the log of the workers for this job"
_LONG_WAIT_S: Final = 10.0


def submit(service: Service, body: dict[str, Any], **further: Any) -> Answer:
    """Enqueue a job and do not wait for it; status 202 where it was taken."""
    return service.send("POST", "/generate", json=body | further, headers={"Prefer": "respond-async"})


def get_job(service: Service, job_id: str) -> Answer:
    """The job now."""
    return service.send("GET", f"/jobs/{job_id}")


def is_over(job: Answer) -> bool:
    """Whether a job is in a final state."""
    return job.status == 200 and job.fields.get("status") in _FINAL


def wait_for_end(service: Service, job_id: str, timeout_s: float) -> Answer:
    """The job once it has ended, or as it is when the time is over; it is then canceled."""
    deadline_s = time.monotonic() + timeout_s
    while not is_over(job := get_job(service, job_id)):
        if time.monotonic() > deadline_s:
            cancel(service, job_id)
            break
        time.sleep(_POLL_S)
    return job


def cancel(service: Service, job_id: str) -> None:
    """Cancel a job that the doctor needs no more."""
    service.send("POST", f"/jobs/{job_id}/cancel")


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """A job that ended, and the file that it made."""

    job: Answer
    file: Answer
    width_px: int
    height_px: int


def check_submitted(answer: Answer) -> Finding | None:
    """Why a job was not taken; None: it was."""
    if answer.status == 202:
        return None
    return fail("image", f"a test image is refused: {answer.explain()}", "correct what the answer names")


def check_ended(job: Answer, timeout_s: float) -> Finding | None:
    """Why there is no image; None: there is one."""
    status = job.fields.get("status")
    if status == "succeeded":
        return None
    if status == "queued":
        return fail("image", f"no worker took the test image within {timeout_s:.0f} s", _LOG)
    if status == "failed":
        detail = (job.fields.get("error") or {}).get("detail", "without a reason")
        return fail("image", f"the test image failed: {detail}", _LOG)
    return fail("image", f"the test image did not end within {timeout_s:.0f} s: {job.explain()}", "give more --timeout")


def check_image(facts: ImageFacts, settings: Settings) -> Iterator[Finding]:
    """Whether the file is the image that was asked for, with its marks."""
    if facts.file.status != 200:
        yield fail("image", f"the result cannot be read: {facts.file.explain()}", "let the proxy pass /jobs/*/result")
        return
    try:
        marks = verify_image(facts.file.body, facts.file.headers.get("content-type"), settings.max_image_px)
    except GiantleapError as error:
        yield fail("image", f"the result is no image: {error.detail}", "let the proxy pass results unchanged")
        return
    result = facts.job.fields["results"][0]
    size = (result["width"], result["height"])
    if size != (facts.width_px, facts.height_px):
        yield fail("image", f"the image has {size[0]}x{size[1]} px, not {facts.width_px}x{facts.height_px}", _LOG)
    else:
        yield ok("image", f"an image of {size[0]}x{size[1]} px was generated and read")
    yield from check_marks(marks, settings)


def check_marks(marks: ImageMarks, settings: Settings) -> Iterator[Finding]:
    """Whether the image still has its provenance marks, including those that the settings here require."""
    restore = "let the proxy pass results unchanged: an image optimizer strips marks"
    if marks.xmp.digital_source_type is None:
        yield fail("marks", "the image has no XMP that says how it was made", restore)
    else:
        yield ok("marks", "the image says in XMP that it is generated")
    state = marks.manifest.state
    if state in ("valid", "trusted"):
        yield ok("signature", f"the image has a C2PA manifest, {state}")
    elif state == "invalid":
        yield fail("signature", f"the C2PA manifest is invalid: {', '.join(marks.manifest.problems)}", restore)
    elif state == "not_checked":
        yield skipped("signature", "c2pa-python is not installed here", "pip install '.[provenance]'")
    elif settings.c2pa_cert is not None:
        yield fail(
            "signature", "GIANTLEAP_C2PA_CERT is set and the image has no manifest", "set it for the workers too"
        )
    else:
        yield skipped("signature", "no C2PA certificate is set here", "set GIANTLEAP_C2PA_CERT (docs/provenance.md)")


def check_stages(job: Answer) -> Finding:
    """Where the time of the test image went."""
    stages: dict[str, float] = job.fields.get("stages", {})
    times = ", ".join(f"{name} {duration_s:.2f} s" for name, duration_s in stages.items())
    if stages.get("queue", 0.0) > _LONG_WAIT_S:
        return warn("stages", f"the test image waited for a worker: {times}", "add workers (docs/operations.md#sizing)")
    return ok("stages", times)


def upscale_latent(service: Service, request: LatentRequest, timeout_s: float) -> Answer:
    """Enlarge a latent."""
    headers = {"Content-Type": NPY_TYPE, "Accept": SAFETENSORS_TYPE, "Prefer": f"wait={timeout_s:.0f}"}
    return service.send(
        "POST", "/upscale", params=request.query, content=request.body, headers=headers, timeout=timeout_s + 30
    )


def check_latent(answer: Answer, shape: tuple[int, int, int]) -> Finding:
    """Whether the enlarged latent came whole."""
    if answer.status == 202:
        return fail("latent", "no worker enlarged the test latent in time", "give more --timeout, or add workers")
    if answer.status != 200:
        return fail("latent", f"a test latent is refused: {answer.explain()}", "correct what the answer names")
    try:
        tensors = list(load(answer.body).values())
    except SafetensorError:
        return fail("latent", "the enlarged latent is no safetensors file", "let the proxy pass bodies unchanged")
    if len(tensors) != 1 or tuple(tensors[0].shape[-3:]) != shape:
        return fail("latent", f"the enlarged latent is not of shape {shape}", _LOG)
    return ok("latent", f"a latent was enlarged to {shape[2]}x{shape[1]}")
