"""A worker without a route in a thread, for tests of what is between a client and a worker."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.client import open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.devices import Device
from giantleap.service.results.jobs import open_files
from giantleap.service.settings import Settings


@contextlib.contextmanager
def thread_worker(
    settings: Settings, bundle: str, end: Callable[[JobConsumer, Claim], None], device: Device | None = None
) -> Iterator[None]:
    """Takes jobs of a bundle one after the other until the block ends; `end` is to finish or to fail each."""
    assert settings.redis_url is not None
    redis = open_redis(settings.redis_url)
    consumer = JobConsumer(redis, settings, (bundle,), "thread-worker", device, files=open_files(settings))
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            for claim in consumer.claim(1, 0.1):
                end(consumer, claim)

    consumer.open()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)
        consumer.close()
        redis.close()
