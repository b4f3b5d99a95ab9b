"""Reads an entry of a job's event stream; the image of a preview is stored beside the stream, for a short time."""

import base64
import json
from collections.abc import Mapping
from typing import Any

from giantleap.service.jobqueue.client import AsyncRedis, await_reply
from giantleap.service.jobs.job import JobEvent


async def read_event(
    redis: AsyncRedis, preview_key: str, entry_id: bytes, fields: Mapping[bytes, bytes]
) -> JobEvent | None:
    """The event of an entry; None for a preview whose image is gone.

    Raises:
        NotReady: Redis does not answer.
    """
    data = json.loads(fields[b"data"])
    if fields[b"name"] == b"preview":
        image: Any = await await_reply(redis.execute_command("HGET", preview_key, entry_id))
        if image is None:
            return None
        data["image"] = base64.b64encode(image).decode()
    return JobEvent(entry_id.decode(), fields[b"name"].decode(), data)
