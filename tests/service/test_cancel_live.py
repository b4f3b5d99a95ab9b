"""A hundred cancels at random moments on the running service: none that was acknowledged ends as succeeded."""

import io
import random
import time
from collections import Counter

import httpx
import numpy as np
import pytest
from PIL import Image

from giantleap.cli.demo import PROMPT, running_service

CANCELS = 100
_ASYNC = {"Prefer": "respond-async"}


def photo(side_px: int) -> bytes:
    """A picture with some detail."""
    rows = np.random.default_rng(side_px).integers(0, 255, (side_px // 8, side_px // 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rows).resize((side_px, side_px), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def create(client: httpx.Client, kind: int) -> httpx.Response:
    """One of four kinds of job: both routes, each at two sizes."""
    if kind < 2:
        return client.post("/generate", json={"prompt": PROMPT, "scale": (2, 4)[kind]}, headers=_ASYNC)
    side_px, scale = ((96, 4), (256, 4))[kind - 2]
    headers = _ASYNC | {"Content-Type": "image/png"}
    return client.post(f"/upscale?scale={scale}", content=photo(side_px), headers=headers)


def await_end(client: httpx.Client, path: str) -> dict[str, object]:
    """The job once it is final."""
    while True:
        body: dict[str, object] = client.get(path).raise_for_status().json()
        if body["status"] in ("succeeded", "failed", "canceled"):
            return body
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_acknowledged_cancel_of_a_hundred_ends_as_succeeded() -> None:
    dice = random.Random(20)
    ends: Counter[tuple[int, bool, object]] = Counter()
    with running_service() as url, httpx.Client(base_url=url, timeout=120) as client:
        spans_s = []
        for kind in range(4):
            started_s = time.monotonic()
            assert await_end(client, create(client, kind).json()["status_url"])["status"] == "succeeded"
            spans_s.append(time.monotonic() - started_s)
        for number in range(CANCELS):
            kind = number % 4
            path = create(client, kind).raise_for_status().json()["status_url"]
            time.sleep(dice.uniform(0, spans_s[kind]))
            answer = client.post(f"{path}/cancel")
            acknowledged = answer.status_code == 200 and answer.json()["cancel_requested"]
            ends[kind, acknowledged, await_end(client, path)["status"]] += 1
    print(f"\nseconds of each kind: {spans_s}; (kind, acknowledged, end): {dict(ends)}")
    assert sum(number for (_, acknowledged, _), number in ends.items() if acknowledged) > CANCELS // 2
    assert {end for _, acknowledged, end in ends if acknowledged} == {"canceled"}
