"""A worker process with a route that computes nothing, for tests of its life.

`python route_worker.py <url> <prefix> <step timeout s> <grace s>`; `hang` in a prompt never ends a step, `patient`
draws only after SIGTERM; each step takes 50 ms.
"""

import signal
import sys
import threading
import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry
from torch import Tensor

from giantleap.models.generator import CancelCheck, GenerationItem, StepCallback
from giantleap.service.jobqueue.client import open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.grid import LatentGrid
from giantleap.service.settings import read_settings
from giantleap.service.telemetry.logs import configure_logging
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.worker.batch_runner import Drain
from giantleap.service.worker.loop import Worker
from giantleap.service.worker.watchdog import Watchdog
from tests.service.fakes import STRIDE_PX, FakeRoute


class Route(FakeRoute):
    stop = threading.Event()

    def generate(
        self, items: Sequence[GenerationItem], *, on_step: StepCallback, is_canceled: CancelCheck
    ) -> list[Tensor | None]:
        if any("hang" in item.prompt for item in items):
            time.sleep(3600)
        if any("patient" in item.prompt for item in items):
            on_step(0, items[0].steps)  # says that the draw has begun
            self.stop.wait(600)
        return super().generate(items, on_step=on_step, is_canceled=is_canceled)


def main(url: str, prefix: str, limit_s: float, grace_s: float) -> None:
    configure_logging("info")
    settings = read_settings(key_prefix=prefix, visibility_timeout_s=2.0, job_ttl_s=600, batch_items=1)
    stop = Route.stop
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    route = Route(on_step=lambda step: time.sleep(0.05), name="pocket")
    consumer = JobConsumer(open_redis(url), settings, ["pocket"], "route")
    watchdog = Watchdog(limit_s)
    consumer.open()
    watchdog.open()
    metrics, grids = Metrics(CollectorRegistry()), {"pocket": LatentGrid(STRIDE_PX, 1)}
    Worker({"pocket": route}, grids, consumer, metrics, settings, Drain(stop, grace_s), watchdog=watchdog).run()  # type: ignore[dict-item]
    consumer.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
