"""What every route of an API process works with, built once by `giantleap.service.api.app` and handed to the routes by
FastAPI."""

import asyncio
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.bundles import ServedBundle
from giantleap.service.jobs.devices import Device
from giantleap.service.settings import Settings
from giantleap.service.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True)
class AppState:
    """One API process: its settings, the bundles it accepts jobs for, the queue, and whether it is stopping."""

    settings: Settings
    bundles: dict[str, ServedBundle]
    producer: JobProducer
    metrics: Metrics
    stopping: asyncio.Event

    def places(self, name: str) -> tuple[Device, ...]:
        """Devices on which jobs of a bundle may run, as far as they are known; costs no round trip."""
        return tuple(device for device in self.producer.devices if name in device.bundles)


async def get_app_state(request: Request) -> AppState:
    """The `AppState` of the app that the request came to. A coroutine: a plain function would cost a thread."""
    serving: AppState = request.app.state.serving
    return serving


AppStateDep = Annotated[AppState, Depends(get_app_state)]
