"""The arguments of the enqueue script that come from a job."""

import asyncio
import dataclasses
import hashlib
import json
from typing import Any

from giantleap.service.jobs.grid import Charge
from giantleap.service.jobs.job import Job, UpscaleParams

SMALL_BODY_BYTES = 1 << 20
"""Bodies up to this size are handled in the event loop; a thread would cost more."""


async def body_sha256(body: bytes | None) -> str:
    """Digest of a body, computed in a thread if it is large."""
    if body is None:
        return ""
    if len(body) <= SMALL_BODY_BYTES:
        return hashlib.sha256(body).hexdigest()
    return (await asyncio.to_thread(hashlib.sha256, body)).hexdigest()


def enqueue_arguments(job: Job, input_bytes: int, max_live: int | None, charge: Charge | None) -> dict[str, Any]:
    """The arguments of `enqueue.lua` that depend on the job and its owner's limits."""
    return {
        "id": job.id,
        "bundle": job.bundle,
        "priority": job.priority,
        "owner": job.owner,
        "latent_px": job.latent_px,
        "max_live": max_live,
        "cost_us": None if charge is None else charge.cost_us,
        "input_bytes": input_bytes,
        "finish": isinstance(job.params, UpscaleParams),
        "cancel_after_s": job.cancel_after_s,
        "webhook": None if job.webhook is None else json.dumps(dataclasses.asdict(job.webhook)),
    }
