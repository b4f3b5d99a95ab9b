"""Sends webhooks: takes the deliveries that are due from Redis, signs and posts them, retries those that fail.

The script that ends a job writes its delivery (`close_job.lua`), so none is lost. Any number of processes may send: a
delivery that one has taken is hidden from the others for `_LEASE_S`. Delivery is at least once; receivers deduplicate
by `X-Giantleap-Delivery`. `giantleap.service.webhooks.targets` checks where a delivery may go.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import random
import time
from importlib.metadata import version

import httpcore
import httpx

from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.client import AsyncRedis, cancel_tasks
from giantleap.service.jobqueue.faults import REDIS_UNAVAILABLE, name_fault
from giantleap.service.jobqueue.replies import Delivery
from giantleap.service.jobqueue.runner import AsyncScriptRunner
from giantleap.service.jobs.job import JobState, to_rfc3339
from giantleap.service.links import Links, open_signer
from giantleap.service.settings import Settings
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.webhooks.targets import CheckedBackend, TargetRefused, read_target

MAX_ATTEMPTS = 10
_ATTEMPT_S = 15.0
_LEASE_S = 60.0
_POLL_S = 1.0
_MAX_SENDING = 64
_FIRST_DELAY_S = 5.0
_DELAY_CAP_S = 600.0
_LOG = logging.getLogger(__name__)


def to_body(delivery: Delivery, settings: Settings) -> bytes:
    """The body to post, the same bytes at each attempt: signed URLs are valid from the end of the job."""
    links = Links(settings.root_path, open_signer(settings), delivery.finished_at_s)
    error = delivery.error if delivery.state is JobState.FAILED else None
    job = {
        "id": delivery.job_id,
        "status": delivery.state,
        "bundle": delivery.bundle,
        "finished_at": to_rfc3339(delivery.finished_at_s),
        "status_url": links.job(delivery.job_id),
        "error": error and {"code": error.code, "detail": error.detail},
        "results": [
            {
                "url": links.result(delivery.job_id, index),
                "content_type": result.content_type,
                "size_bytes": result.size_bytes,
                "seed": result.seed,
                "width": result.width_px,
                "height": result.height_px,
            }
            for index, result in enumerate(delivery.results)
        ],
    }
    return json.dumps({"type": f"job.{delivery.state}", "delivery": delivery.id, "job": job}).encode()


def sign(secret: str, timestamp_s: int, body: bytes) -> str:
    """The value of X-Giantleap-Signature: HMAC-SHA256 (RFC 2104) over `<timestamp>.<body>`."""
    digest = hmac.new(secret.encode(), f"{timestamp_s}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={timestamp_s},v1={digest}"


def retry_delay_s(attempt: int, first_s: float = _FIRST_DELAY_S) -> float:
    """Seconds after a failed attempt: doubles to a cap; jitter keeps what failed together apart."""
    return float(min(_DELAY_CAP_S, first_s * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0))


class WebhookSender:
    """One task that posts what is due. Safe to run in every API process.

    Args:
        redis: The client of the producer; it stays open.
        settings: The secret must be set.
        metrics: Where attempts are counted.
        backend: How to connect; none: to checked addresses, as the settings allow.
        first_delay_s: Before the second attempt.
    """

    def __init__(
        self,
        redis: AsyncRedis,
        settings: Settings,
        metrics: Metrics,
        backend: httpcore.AsyncNetworkBackend | None = None,
        first_delay_s: float = _FIRST_DELAY_S,
    ) -> None:
        if settings.webhook_secret is None:
            raise ValueError("webhook_secret is not set, so deliveries cannot be signed; set it")
        self._secret = settings.webhook_secret
        self._settings = settings
        self._metrics = metrics
        self._first_delay_s = first_delay_s
        self._scripts = AsyncScriptRunner(redis, settings)
        checked = CheckedBackend(settings.webhook_allow_private, hosts=settings.webhook_hosts)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(),
            max_connections=_MAX_SENDING,
            max_keepalive_connections=0,  # each delivery checks its address anew
            network_backend=checked if backend is None else backend,
        )
        self._sending: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Starts the task that sends."""
        self._task = asyncio.create_task(self._send_forever(), name="webhook-sender")

    async def close(self) -> None:
        """Stops the task. Another process sends unfinished deliveries when their leases end."""
        await cancel_tasks([task for task in (self._task, *self._sending) if task is not None])
        self._task = None
        await self._pool.aclose()

    async def _send_forever(self) -> None:
        while True:
            taken = 0
            try:
                taken = await self._start_due()
            except REDIS_UNAVAILABLE as error:
                _LOG.warning("webhooks not read (%s)", name_fault(error))
            if taken == 0:
                await asyncio.sleep(_POLL_S)

    async def _start_due(self) -> int:
        """Takes deliveries that are due, up to the limit of concurrent ones; waits while that many are being sent."""
        while len(self._sending) >= _MAX_SENDING:
            await asyncio.wait(self._sending, return_when=asyncio.FIRST_COMPLETED)
        limits = {
            "max_deliveries": _MAX_SENDING - len(self._sending),
            "lease_ms": int(_LEASE_S * 1000),
            "max_attempts": MAX_ATTEMPTS,
        }
        reply = await self._scripts.run(scripts.TAKE_WEBHOOKS, limits)
        for delivery in reply.deliveries:
            task = asyncio.create_task(self._deliver(delivery))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return len(reply.deliveries)

    async def _deliver(self, delivery: Delivery) -> None:
        """One attempt.

        Effects: the delivery is deleted, dead, or due again later. If Redis is unavailable its lease runs out instead.
        """
        reason = await self._post(delivery)
        delay_ms, outcome = 0, "delivered"
        if reason is not None and delivery.attempt >= MAX_ATTEMPTS:
            outcome = "dropped"
        elif reason is not None:
            delay_ms, outcome = int(1000 * retry_delay_s(delivery.attempt, self._first_delay_s)), "retried"
        self._metrics.count_webhook(outcome)
        if reason is not None:
            fields = {"job_id": delivery.job_id, "attempt": delivery.attempt, "reason": reason, "outcome": outcome}
            _LOG.warning("webhook not taken", extra={"fields": fields})
        with contextlib.suppress(*REDIS_UNAVAILABLE):
            await self._scripts.run(
                scripts.SETTLE_WEBHOOK,
                {
                    "id": delivery.id,
                    "attempt": delivery.attempt,
                    "outcome": outcome,
                    "delay_ms": delay_ms,
                    "reason": reason,
                },
            )

    async def _post(self, delivery: Delivery) -> str | None:
        """Posts a delivery once: None if the receiver accepted it (2xx), else the reason. Reads no response body."""
        body, timestamp_s = to_body(delivery, self._settings), int(time.time())
        try:
            target = read_target(delivery.url)
            headers: dict[bytes | str, bytes | str] = {
                "Host": target.authority,
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                "User-Agent": f"giantleap/{version('giantleap')}",
                "X-Giantleap-Event": f"job.{delivery.state}",
                "X-Giantleap-Delivery": delivery.id,
                "X-Giantleap-Signature": sign(self._secret.get_secret_value(), timestamp_s, body),
            }
            url = httpcore.URL(
                scheme=target.scheme.encode(), host=target.host, port=target.port, target=target.path.encode()
            )
            async with (
                asyncio.timeout(_ATTEMPT_S),
                self._pool.stream("POST", url, headers=headers, content=body) as response,
            ):
                return None if 200 <= response.status < 300 else f"status {response.status}"
        except TargetRefused as error:
            return str(error)
        except (
            TimeoutError,
            OSError,
            httpcore.NetworkError,
            httpcore.TimeoutException,
            httpcore.ProtocolError,
        ) as error:
            return type(error).__name__
