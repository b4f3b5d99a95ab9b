"""Tells clients that their job has ended: takes deliveries from Redis, signs and posts them, tries again where it must.

The script that ends a job writes the delivery (`giantleap.service.jobqueue.scripts`), so none is lost. Any number of
processes may send: a delivery that one has taken is out of the others' sight for `_LEASE_S`. It arrives at least once;
receivers that must not act twice keep `X-Giantleap-Delivery`. Where a delivery may go is checked in
`giantleap.service.webhooks.targets`.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import random
import time
from dataclasses import dataclass
from importlib.metadata import version

import httpcore
import httpx
import redis

from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.client import REDIS_UNAVAILABLE, AsyncRedis
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobs.job import to_rfc3339
from giantleap.service.settings import Settings
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.webhooks.targets import CheckedBackend, TargetRefused, read_target

MAX_ATTEMPTS = 10
_ATTEMPT_S = 15.0
_LEASE_S = 60.0
_POLL_S = 1.0
_AT_ONCE = 64
_FIRST_DELAY_S = 5.0
_DELAY_CAP_S = 600.0
_LOG = logging.getLogger(__name__)

# ARGV: limits, most, lease (ms), most attempts. Replies {delivery, attempt, url, job, state, bundle, finished_at_s,
# error} of each that is due, and puts it out of sight until the lease ends.
TAKE = """
local taken = {}
local function drop(delivery, reason)
  redis.call('ZREM', P .. ':webhooks', delivery)
  redis.call('UNLINK', P .. ':webhook:' .. delivery)
  redis.call('XADD', P .. ':webhooks_dead', 'MAXLEN', '~', 1000, '*', 'delivery', delivery, 'reason', reason)
end
for _, delivery in ipairs(redis.call('ZRANGEBYSCORE', P .. ':webhooks', '-inf', now_ms, 'LIMIT', 0, ARGV[2])) do
  local key = P .. ':webhook:' .. delivery
  if redis.call('EXISTS', key) == 0 then
    drop(delivery, 'expired')
  elseif tonumber(redis.call('HGET', key, 'attempts')) >= tonumber(ARGV[4]) then
    drop(delivery, 'its sender was lost each time')
  else
    local attempt = redis.call('HINCRBY', key, 'attempts', 1)
    redis.call('ZADD', P .. ':webhooks', now_ms + tonumber(ARGV[3]), delivery)
    local fields = redis.call('HMGET', key, 'url', 'job', 'state', 'bundle', 'finished_at_s', 'error')
    taken[#taken + 1] = {delivery, attempt, unpack(fields)}
  end
end
return taken
"""

# ARGV: limits, delivery, attempt, ms until the next one, or -1: arrived, -2: given up, reason. Replies 1, or 0 where
# another process has taken it meanwhile: then nothing is written.
SETTLE = """
local delivery, key, delay_ms = ARGV[2], P .. ':webhook:' .. ARGV[2], tonumber(ARGV[4])
if redis.call('HGET', key, 'attempts') ~= ARGV[3] then return 0 end
if delay_ms >= 0 then
  redis.call('ZADD', P .. ':webhooks', now_ms + delay_ms, delivery)
  return 1
end
redis.call('ZREM', P .. ':webhooks', delivery)
redis.call('UNLINK', key)
if delay_ms == -2 then
  redis.call('XADD', P .. ':webhooks_dead', 'MAXLEN', '~', 1000, '*', 'delivery', delivery, 'reason', ARGV[5])
end
return 1
"""


@dataclass(frozen=True, slots=True)
class Delivery:
    """What to tell whom; `attempt` counts from 1."""

    id: str
    attempt: int
    url: str
    job_id: str
    state: str
    bundle: str
    finished_at_s: float
    error: str

    def to_body(self) -> bytes:
        """The body to post, the same bytes at each attempt."""
        error = json.loads(self.error) if self.error and self.state == "failed" else None
        job = {
            "id": self.job_id,
            "status": self.state,
            "bundle": self.bundle,
            "finished_at": to_rfc3339(self.finished_at_s),
            "status_url": f"/jobs/{self.job_id}",
            "error": error and {"code": error["code"], "detail": error["detail"]},
        }
        return json.dumps({"type": f"job.{self.state}", "delivery": self.id, "job": job}).encode()


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
            raise ValueError("webhook_secret is not set; nothing can be signed")
        self._secret = settings.webhook_secret
        self._metrics = metrics
        self._first_delay_s = first_delay_s
        self._tag = [Keys(settings.key_prefix).tag]
        self._limits = scripts.limits(settings)
        self._take = redis.register_script(scripts.PRELUDE + TAKE)
        self._settle = redis.register_script(scripts.PRELUDE + SETTLE)
        checked = CheckedBackend(settings.webhook_allow_private, hosts=settings.webhook_hosts)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(),
            max_connections=_AT_ONCE,
            max_keepalive_connections=0,  # each delivery checks its address anew
            network_backend=checked if backend is None else backend,
        )
        self._sending: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Starts the task."""
        self._task = asyncio.create_task(self._run(), name="webhook-sender")

    async def close(self) -> None:
        """Stops it; what was being sent is sent again by another process when its lease ends."""
        tasks = [task for task in (self._task, *self._sending) if task is not None]
        for task in tasks:
            # redis-py 8.1 swallows a cancel that meets it while it sets up a connection, so one may not be enough.
            while not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=0.1)
        self._task = None
        await self._pool.aclose()

    async def _run(self) -> None:
        while True:
            taken = 0
            try:
                taken = await self._start_due()
            except (redis.RedisError, *REDIS_UNAVAILABLE) as error:
                _LOG.warning("webhooks not read (%s)", type(error).__name__)
            if taken == 0:
                await asyncio.sleep(_POLL_S)

    async def _start_due(self) -> int:
        """Takes what is due, as many as may be sent at once; waits where that many are under way."""
        while len(self._sending) >= _AT_ONCE:
            await asyncio.wait(self._sending, return_when=asyncio.FIRST_COMPLETED)
        args: list[str | int] = [self._limits, _AT_ONCE - len(self._sending), int(_LEASE_S * 1000), MAX_ATTEMPTS]
        rows = await self._take(keys=self._tag, args=args)
        for name, attempt, *texts in rows:
            url, job_id, state, bundle, finished_at_s, error = (text.decode() for text in texts)
            delivery = Delivery(name.decode(), attempt, url, job_id, state, bundle, float(finished_at_s), error)
            task = asyncio.create_task(self._deliver(delivery))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return len(rows)

    async def _deliver(self, delivery: Delivery) -> None:
        """One attempt, and what follows from it.

        Effects: the delivery is gone, dead, or due again later. Where Redis is away its lease runs out instead.
        """
        reason = await self._post(delivery)
        delay_ms, outcome = -1, "delivered"
        if reason is not None and delivery.attempt >= MAX_ATTEMPTS:
            delay_ms, outcome = -2, "dropped"
        elif reason is not None:
            delay_ms, outcome = int(1000 * retry_delay_s(delivery.attempt, self._first_delay_s)), "retried"
        self._metrics.count_webhook(outcome)
        if reason is not None:
            fields = {"job_id": delivery.job_id, "attempt": delivery.attempt, "reason": reason, "outcome": outcome}
            _LOG.warning("webhook not taken", extra={"fields": fields})
        with contextlib.suppress(redis.RedisError, *REDIS_UNAVAILABLE):
            args: list[str | int] = [self._limits, delivery.id, delivery.attempt, delay_ms, reason or ""]
            await self._settle(keys=self._tag, args=args)

    async def _post(self, delivery: Delivery) -> str | None:
        """Posts it once: None where the receiver took it (2xx), else why not. Of the answer only the head is read."""
        body, timestamp_s = delivery.to_body(), int(time.time())
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
                self._pool.stream("POST", url, headers=headers, content=body) as answer,
            ):
                return None if 200 <= answer.status < 300 else f"status {answer.status}"
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
