"""Real Redis servers for the service's tests: one per session and binary, a key prefix of its own for each test."""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis

from giantleap.models.worker_role import WorkerRole
from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.client import open_async_redis, open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobqueue.runner import ScriptRunner, upload_input
from giantleap.service.jobs.job import GenerateParams, Job, Priority
from giantleap.service.results.concurrent import AsyncResultStore
from giantleap.service.results.jobs import open_files
from giantleap.service.results.store import open_store
from giantleap.service.settings import Settings, read_settings
from giantleap.service.supervisor.embedded_redis import EmbeddedRedis, find_server, find_system_server

if TYPE_CHECKING:
    from tests.service.compat_fakes import FileProducer

# Of the two kinds of server, `make deploy-check` alone needs one that pip does not install.
SERVERS = ["bundled", pytest.param("system", marks=pytest.mark.deploy)]

ServerStarter = Callable[[str], str]
JobMaker = Callable[..., Job]
ProducerOpener = Callable[..., AbstractAsyncContextManager[JobProducer]]
ConsumerOpener = Callable[..., JobConsumer]
Put = Callable[..., Job]


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerStarter]:
    """Starts each kind of server of `SERVERS` once, on its first use; all stop at the end."""
    servers: dict[str, EmbeddedRedis] = {}

    def start(kind: str) -> str:
        if kind not in servers:
            servers[kind] = EmbeddedRedis(server_binary(kind), appendfsync="everysec")
            servers[kind].start(tmp_path_factory.mktemp(f"redis-{kind}"))
        url = servers[kind].url
        assert url is not None
        return url

    yield start
    for server in servers.values():
        server.stop()


def server_binary(kind: str) -> Path:
    """The server of one kind of `SERVERS`."""
    binary = find_server() if kind == "bundled" else find_system_server()
    assert binary is not None, "no redis-server or valkey-server on the PATH: apt-get install redis-server"
    return binary


@pytest.fixture
def redis_url(start_server: ServerStarter) -> str:
    """URL of the session's server, which came with pip."""
    return start_server("bundled")


@pytest.fixture
def key_prefix() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def settings(redis_url: str, key_prefix: str) -> Settings:
    """Settings of one test: its own keys, and short times, though a lease longer than a busy machine stalls."""
    return read_settings(
        redis_url=redis_url, key_prefix=key_prefix, visibility_timeout_s=5.0, retry_backoff_s=0.1, job_ttl_s=60
    )


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def make_job() -> JobMaker:
    """Makes a small job with an id of its own; keywords replace its parameters."""

    def make(priority: Priority = Priority.HIGH, bundle: str = "pocket", **params: Any) -> Job:
        values: dict[str, Any] = {
            "prompt": "a red ball",
            "negative_prompt": "",
            "scale": 2,
            "width_px": 64,
            "height_px": 64,
            "steps": 4,
            "guidance_scale": 1.0,
            "seed": 7,
            "num_images": 1,
            "output_format": "png",
        }
        return Job(
            str(uuid.uuid4()),
            bundle,
            priority=priority,
            created_at_s=time.time(),
            params=GenerateParams(**(values | params)),
        )

    return make


def enqueue_arguments(job: Job, **changes: object) -> dict[str, object]:
    """The arguments of `enqueue.lua` for a test that runs the script itself."""
    arguments: dict[str, object] = {"id": job.id, "bundle": job.bundle, "priority": job.priority, "owner": job.owner}
    return arguments | {"digest": "", "latent_px": 0, "input_bytes": 0, "upload": "", "finish": False} | changes


@pytest.fixture
def put(settings: Settings, redis_client: redis.Redis, make_job: Any) -> Put:
    """Enqueues a job through the script that the producer uses, without an event loop."""
    keys, runner = Keys(settings.key_prefix), ScriptRunner(redis_client, settings)

    def enqueue(priority: Priority = Priority.HIGH, body: bytes | None = None, **rest: Any) -> Job:
        job: Job = make_job(priority, **rest)
        before = upload_input(keys.upload(job.id), body) if body else []
        arguments = enqueue_arguments(job, upload=job.id if body else "", input_bytes=len(body or b""))
        reply = runner.run(scripts.ENQUEUE, arguments, before=before, value=job.to_json())
        assert reply.status == "created"
        return job

    return enqueue


@pytest.fixture
def open_producer(settings: Settings) -> ProducerOpener:
    """An async context manager that gives an open producer; keywords replace settings."""

    @asynccontextmanager
    async def opened(**changes: Any) -> Any:
        changed = settings.model_copy(update=changes)
        assert changed.redis_url is not None
        async with open_async_redis(changed.redis_url) as client:
            store = open_store(changed)
            files = None if store is None else AsyncResultStore(store, changed.max_body_bytes)
            producer = JobProducer(client, changed, files)
            await producer.open()
            try:
                yield producer
            finally:
                await producer.close()
                if files is not None:
                    files.close()

    return opened


@pytest.fixture
def open_consumer(settings: Settings) -> Iterator[ConsumerOpener]:
    """Opens consumers, closed after the test. `lease=False` starts no lease thread: a worker that hangs."""
    opened: list[JobConsumer] = []

    def make(
        bundles: tuple[str, ...] = ("pocket",),
        lease: bool = True,
        consumer: str = "w",
        role: WorkerRole = WorkerRole.ALL,
        **changes: Any,
    ) -> JobConsumer:
        changed = settings.model_copy(update=changes)
        assert changed.redis_url is not None
        worker = JobConsumer(
            open_redis(changed.redis_url), changed, bundles, consumer, role=role, files=open_files(changed)
        )
        if lease:
            worker.open()
            opened.append(worker)
        return worker

    yield make
    for worker in opened:
        worker.close()


@pytest.fixture(scope="session")
def bundle_dirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """The bundles of `write_compat_bundles`, for tests of the API over a producer in memory; read-only."""
    from tests.service.compat_fakes import write_compat_bundles  # which imports the API

    return write_compat_bundles(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def live(bundle_dirs: tuple[Path, ...]) -> "Iterator[tuple[FileProducer, str]]":
    """A producer in memory, and the URL of the API over it; `FileProducer.reset` makes it new for each test."""
    from tests.service.compat_fakes import FileProducer, build_app
    from tests.service.live_server import live_server

    producer = FileProducer()
    with live_server(build_app(producer, bundle_dirs)) as url:
        yield producer, url


@pytest.fixture(scope="module")
def document(bundle_dirs: tuple[Path, ...]) -> dict[str, Any]:
    """The OpenAPI document as a client reads it."""
    from tests.service.compat_fakes import FileProducer, build_app

    found: dict[str, Any] = json.loads(json.dumps(build_app(FileProducer(), bundle_dirs).openapi()))
    return found


@pytest.fixture
def make_stale(redis_client: redis.Redis, settings: Settings) -> Callable[[Claim], None]:
    """Ages a claim past any visibility timeout, as if its worker had been silent for a minute."""

    def age(claim: Claim) -> None:
        stream = Keys(settings.key_prefix).stream(claim.lane)
        pending: list[Any] = redis_client.xpending_range(stream, "workers", claim.message_id, claim.message_id, 1)
        owner, message = pending[0]["consumer"], claim.message_id
        redis_client.xclaim(stream, "workers", owner, 0, [message], idle=60_000, justid=True)

    return age
