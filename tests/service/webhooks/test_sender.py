"""Webhooks from the end of a job to a receiver on a real socket, with a real Redis between."""

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import json
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.client import open_async_redis
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobqueue.replies import Delivery
from giantleap.service.jobqueue.runner import AsyncScriptRunner
from giantleap.service.jobs.job import FINAL_STATES, FinalState, Job, JobError, JobState, ResultFile, Webhook
from giantleap.service.settings import Settings, read_settings
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.webhooks import sender as webhooks
from giantleap.service.webhooks.sender import WebhookSender, retry_delay_s, sign, to_body
from tests.service.webhook_receiver import Receiver, webhook_receiver

SECRET = "a secret of the operator"
PNG = ResultFile("image/png", 3)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with webhook_receiver() as opened:
        yield opened


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "_POLL_S", 0.05)


@contextlib.asynccontextmanager
async def senders(settings: Settings, metrics: Metrics, number: int = 1, **changes: Any) -> AsyncIterator[None]:
    changed = settings.model_copy(
        update={"webhook_secret": SecretStr(SECRET), "webhook_allow_private": True, **changes}
    )
    assert changed.redis_url is not None
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(number):
            client: Any = await stack.enter_async_context(open_async_redis(changed.redis_url))
            sender = WebhookSender(client, changed, metrics, first_delay_s=0.01)
            sender.open()
            stack.push_async_callback(sender.close)
        yield


def with_webhook(job: Job, receiver: Receiver, events: tuple[FinalState, ...] = FINAL_STATES) -> Job:
    return dataclasses.replace(job, webhook=Webhook(receiver.url, events))


async def end_one(producer: Any, job: Job) -> Job:
    """The shortest life of a job: accepted and canceled, which writes its webhook."""
    await producer.enqueue(job)
    await producer.cancel(job.id)
    return job


async def wait_for_retries(metrics: Metrics, number: int) -> None:
    async with asyncio.timeout(60):
        while outcomes(metrics).get("retried", 0) < number:
            await asyncio.sleep(0.02)


def outcomes(metrics: Metrics) -> dict[str, float]:
    text = metrics.registry.collect()
    return {
        sample.labels["outcome"]: sample.value
        for family in text
        for sample in family.samples
        if sample.name == "giantleap_webhooks_total"
    }


def waiting(client: redis.Redis, settings: Settings) -> int:
    return int(client.zcard(f"{Keys(settings.key_prefix).tag}:webhooks"))


def verify(secret: str, headers: dict[str, str], body: bytes) -> None:
    """As docs/api.md shows it."""
    parts = dict(part.split("=", 1) for part in headers["x-giantleap-signature"].split(","))
    signed = parts["t"].encode() + b"." + body
    assert hmac.compare_digest(parts["v1"], hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest())


async def test_each_end_of_a_job_is_delivered_signed_and_once(
    open_producer: Any,
    open_consumer: Any,
    make_job: Any,
    receiver: Receiver,
    settings: Settings,
    metrics: Metrics,
    redis_client: redis.Redis,
) -> None:
    async with open_producer() as producer:
        jobs = [with_webhook(make_job(), receiver) for _ in range(3)]
        for job in jobs:
            await producer.enqueue(job)
        await producer.cancel(jobs[2].id)
        worker = open_consumer()
        first, second = worker.claim(2, 1.0)
        worker.complete(first, [(PNG, b"png")], {}, [])
        worker.fail(second, JobError("engine_fault", "NaN"))
        async with senders(settings, metrics, 3):
            await asyncio.to_thread(receiver.wait_for, 3, lambda: waiting(redis_client, settings) == 0)
        states = {}
        for path, headers, body in receiver.got:
            verify(SECRET, headers, body)
            note = json.loads(body)
            states[note["job"]["id"]] = note["job"]["status"]
            assert path == "/hook?a=1" and headers["content-type"] == "application/json"
            assert headers["host"] == receiver.url.split("/")[2]
            assert note["type"] == headers["x-giantleap-event"] == f"job.{note['job']['status']}"
            assert note["delivery"] == headers["x-giantleap-delivery"]
            assert (note["job"]["error"] is not None) == (note["job"]["status"] == "failed")
            urls = [result["url"] for result in note["job"]["results"]]
            assert urls == [f"{note['job']['status_url']}/result?index=0"] * (note["job"]["status"] == "succeeded")
            assert note["job"]["finished_at"].endswith("Z") and "a red ball" not in body.decode()
        assert states == {first.job.id: "succeeded", second.job.id: "failed", jobs[2].id: "canceled"}
        assert len(receiver.got) == 3 and outcomes(metrics) == {"delivered": 3}


async def test_only_the_requested_states_are_delivered(
    open_producer: Any,
    open_consumer: Any,
    make_job: Any,
    receiver: Receiver,
    settings: Settings,
    redis_client: redis.Redis,
) -> None:
    async with open_producer() as producer:
        quiet, plain = with_webhook(make_job(), receiver, ("failed",)), make_job()
        loud = with_webhook(make_job(), receiver, ("failed", "canceled"))
        for job in (quiet, plain, loud):
            await end_one(producer, job)
        waiting: list[Any] = redis_client.zrange(f"{Keys(settings.key_prefix).tag}:webhooks", 0, -1)
        [delivery] = waiting
        assert delivery.decode().startswith(loud.id)
        assert redis_client.pttl(f"{Keys(settings.key_prefix).tag}:webhook:{delivery.decode()}") > 0


async def test_a_delivery_that_fails_is_retried_with_the_same_body(
    open_producer: Any,
    make_job: Any,
    receiver: Receiver,
    settings: Settings,
    metrics: Metrics,
    redis_client: redis.Redis,
) -> None:
    receiver.answers = [500, 302, 404]
    async with open_producer() as producer:
        await end_one(producer, with_webhook(make_job(), receiver))
        async with senders(settings, metrics):
            await asyncio.to_thread(receiver.wait_for, 4, lambda: waiting(redis_client, settings) == 0)
        assert len({body for _, _, body in receiver.got}) == 1
        assert {path for path, _, _ in receiver.got} == {"/hook?a=1"}, "a redirect is not followed"
        assert outcomes(metrics) == {"retried": 3, "delivered": 1}


async def test_a_delivery_is_given_up_after_so_many_attempts_and_kept_in_the_dead_list(
    open_producer: Any,
    make_job: Any,
    settings: Settings,
    metrics: Metrics,
    redis_client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(webhooks, "MAX_ATTEMPTS", 3)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    dead = f"{Keys(settings.key_prefix).tag}:webhooks_dead"
    async with open_producer() as producer:
        webhook = Webhook(f"http://127.0.0.1:{port}/", FINAL_STATES)
        job = await end_one(producer, dataclasses.replace(make_job(), webhook=webhook))
        async with senders(settings, metrics), asyncio.timeout(60):
            while not redis_client.xlen(dead):
                await asyncio.sleep(0.02)
        letters: Any = redis_client.xrange(dead)
        [(_, fields)] = letters
        assert fields[b"delivery"].decode().startswith(job.id) and fields[b"reason"] == b"ConnectError"
        assert waiting(redis_client, settings) == 0
        assert list(redis_client.scan_iter(match=f"{Keys(settings.key_prefix).tag}:webhook:*")) == []
        assert outcomes(metrics) == {"retried": 2, "dropped": 1}


@pytest.mark.parametrize(
    "changes",
    [{"webhook_allow_private": False}, {"webhook_hosts": ("hooks.example.org",)}],
    ids=["it became private", "it was taken off the list"],
)
async def test_a_target_that_is_not_allowed_any_more_is_never_connected_to(
    open_producer: Any,
    make_job: Any,
    receiver: Receiver,
    settings: Settings,
    metrics: Metrics,
    changes: dict[str, Any],
) -> None:
    async with open_producer() as producer:
        await end_one(producer, with_webhook(make_job(), receiver))
        async with senders(settings, metrics, **changes):
            await wait_for_retries(metrics, 2)
        assert receiver.got == []


async def test_a_receiver_that_never_answers_costs_one_bounded_attempt(
    open_producer: Any, make_job: Any, settings: Settings, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "_ATTEMPT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with open_producer() as producer:
            webhook = Webhook(f"http://127.0.0.1:{silent.getsockname()[1]}/", FINAL_STATES)
            await end_one(producer, dataclasses.replace(make_job(), webhook=webhook))
            async with senders(settings, metrics):
                await wait_for_retries(metrics, 1)
            assert outcomes(metrics).keys() == {"retried"}


async def test_what_a_lost_sender_had_taken_is_sent_by_another_when_its_lease_ends(
    open_producer: Any,
    make_job: Any,
    receiver: Receiver,
    settings: Settings,
    metrics: Metrics,
    redis_client: redis.Redis,
) -> None:
    async with open_producer() as producer:
        await end_one(producer, with_webhook(make_job(), receiver))
        assert settings.redis_url is not None
        async with open_async_redis(settings.redis_url) as client:
            lost = AsyncScriptRunner(client, settings)
            limits = {"max_deliveries": 16, "lease_ms": 60_000, "max_attempts": 10}
            [delivery] = (await lost.run(scripts.TAKE_WEBHOOKS, limits)).deliveries
            assert (await lost.run(scripts.TAKE_WEBHOOKS, limits)).deliveries == (), "hidden"
            redis_client.zadd(f"{Keys(settings.key_prefix).tag}:webhooks", {delivery.id: 0})  # the lease ends
            async with senders(settings, metrics):
                await asyncio.to_thread(receiver.wait_for, 1, lambda: waiting(redis_client, settings) == 0)
            late = {"id": delivery.id, "attempt": delivery.attempt, "outcome": "retried", "delay_ms": 0}
            await lost.run(scripts.SETTLE_WEBHOOK, late)
            assert waiting(redis_client, settings) == 0, "the attempt had expired"


def test_signature_and_delays_are_as_documented() -> None:
    digest = hmac.new(b"key", b'1700000000.{"a": 1}', hashlib.sha256).hexdigest()
    assert sign("key", 1_700_000_000, b'{"a": 1}') == f"t=1700000000,v1={digest}"
    for attempt, longest_s in ((1, 5), (2, 10), (5, 80), (9, 600), (30, 600)):
        delays_s = [retry_delay_s(attempt) for _ in range(50)]
        assert longest_s / 2 <= min(delays_s) < max(delays_s) <= longest_s


def test_the_body_is_the_same_at_each_attempt() -> None:
    first = Delivery("d", 1, "http://a", "id", JobState.SUCCEEDED, "pocket", 1.7e9)
    first = dataclasses.replace(first, results=(ResultFile("image/png", 3, 7, 8, 8),))
    for settings in (read_settings(), read_settings(root_path="/gl", url_secret="a-secret-of-some-length")):
        body = to_body(first, settings)
        assert body == to_body(dataclasses.replace(first, attempt=2), settings)
        job = json.loads(body)["job"]
        assert job["finished_at"] == "2023-11-14T22:13:20.000Z"
        assert job["status_url"] == f"{settings.root_path}/jobs/{first.job_id}"
        signed = "" if settings.url_secret is None else "&expires=1700003600&signature="
        assert job["results"][0]["url"].startswith(f"{job['status_url']}/result?index=0{signed}")
