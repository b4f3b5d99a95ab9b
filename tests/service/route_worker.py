"""A worker process with a route that computes nothing, for tests of its life.

`python route_worker.py <url> <prefix> <step timeout s> <grace s>`; `hang` in a prompt never ends a step, `patient`
draws only after SIGTERM; each step takes 50 ms.
"""

import signal
import sys
import threading
import time
from collections.abc import Sequence

from torch import Tensor

from giantleap.models.bundle.descriptor import Method
from giantleap.models.device import PartCallback
from giantleap.models.generation.items import CancelCheck, GenerationItem, StepCallback
from giantleap.models.generation.previews import PreviewCallback
from giantleap.service.jobqueue.client import open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.settings import read_settings
from giantleap.service.telemetry.logs import configure_logging
from giantleap.service.worker.watchdog import Watchdog
from tests.service.fakes import FakeRoute, open_worker


class Route(FakeRoute):
    stop = threading.Event()

    def generate(
        self,
        items: Sequence[GenerationItem],
        method: Method,
        scale: float,
        *,
        on_step: StepCallback,
        is_canceled: CancelCheck,
        on_part: PartCallback,
        on_preview: PreviewCallback,
    ) -> list[Tensor | None]:
        if any("hang" in item.prompt for item in items):
            time.sleep(3600)
        if any("patient" in item.prompt for item in items):
            on_step(0, items[0].steps)  # says that the draw has begun
            self.stop.wait(600)
        return super().generate(
            items, method, scale, on_step=on_step, is_canceled=is_canceled, on_part=on_part, on_preview=on_preview
        )


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
    settings = settings.model_copy(update={"drain_grace_s": grace_s})
    worker, _ = open_worker(route, consumer, settings, name="pocket", stop=stop, watchdog=watchdog)
    worker.run()
    consumer.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
