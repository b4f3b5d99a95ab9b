"""Dependencies of routes: the state of the process, the caller, and the job that a path names.

All are coroutines, since FastAPI runs a plain function in a thread.
"""

import asyncio
import re
import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Path, Request

from giantleap.models.pixels.image_formats import ImageFormat
from giantleap.service.auth import Caller
from giantleap.service.errors import NotFound, NotReady, StoreUnavailable
from giantleap.service.jobqueue.dead_letters import DeadLetters
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.bundles import ServedBundle, choose_loras, select_bundle
from giantleap.service.jobs.devices import Device, missing_roles
from giantleap.service.jobs.job import GenerateParams, JobRecord, UpscaleParams
from giantleap.service.jobs.planning import plan_generate, prepare_upscale
from giantleap.service.jobs.requests import GenerateRequest, UpscaleQuery
from giantleap.service.links import Links, UrlSigner
from giantleap.service.results.concurrent import AsyncResultStore
from giantleap.service.results.s3 import S3ResultStore
from giantleap.service.settings import Settings
from giantleap.service.telemetry.metrics import Metrics

JOB_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_PROBE_S = 2.0
UNKNOWN_JOB = "no such job: it never existed, or its time to live has passed"


@dataclass(frozen=True, slots=True)
class AppState:
    """One API process: its settings, bundles, queue, signer of URLs and result store, and whether it is stopping.

    Attributes:
        files: The result store; None: results lie in Redis.
    """

    settings: Settings
    bundles: dict[str, ServedBundle]
    producer: JobProducer
    metrics: Metrics
    stopping: asyncio.Event
    signer: UrlSigner | None
    files: AsyncResultStore | None = None

    @property
    def presigner(self) -> S3ResultStore | None:
        """Signs the URLs of results to which a GET redirects; None: it answers their bytes."""
        store = None if self.files is None else self.files.store
        return store if self.settings.result_urls == "presigned" and isinstance(store, S3ResultStore) else None

    @property
    def dead_letters(self) -> DeadLetters:
        """The jobs that failed for good."""
        return DeadLetters(self.producer)

    def devices(self, name: str) -> tuple[Device, ...]:
        """The known devices on which jobs of a bundle may run; costs no round trip."""
        return tuple(device for device in self.producer.devices if name in device.bundles)

    def select_bundle(self, name: str | None) -> ServedBundle:
        """The bundle of a name or an alias, or the default one where the name is None.

        Raises:
            InvalidFields: No bundle has the name.
        """
        return select_bundle(self.bundles, None if name is None else self.settings.model_aliases.get(name, name))

    def plan_generate(
        self, request: GenerateRequest, served: ServedBundle, seed: int, output_format: ImageFormat
    ) -> GenerateParams:
        """`giantleap.service.jobs.planning.plan_generate` with this process's settings and devices."""
        bundle, loras = served.bundle, choose_loras(request.loras, served)
        devices, others = self.devices(bundle.name), [each.bundle for each in self.bundles.values()]
        return plan_generate(request, bundle, self.settings, seed, output_format, devices, loras, others)

    def prepare_upscale(
        self,
        query: UpscaleQuery,
        body: bytes,
        content_type: str | None,
        served: ServedBundle,
        output_format: ImageFormat,
        seed: int = 0,
    ) -> tuple[UpscaleParams, bytes]:
        """`giantleap.service.jobs.planning.prepare_upscale` with this process's settings and devices."""
        bundle = served.bundle
        devices = self.devices(bundle.name)
        return prepare_upscale(query, body, content_type, bundle, self.settings, output_format, devices, seed)

    async def unready_reasons(self) -> list[str]:
        """Why no job should be sent to this process; empty when it is ready."""
        if self.stopping.is_set():
            return ["this process is stopping"]
        try:
            stats, _ = await asyncio.gather(self.producer.stats(), self.producer.read_devices())
        except NotReady as error:
            return [f"Redis cannot be reached: {error.detail}"]
        try:
            if self.files is not None:
                await self.files.ping(_PROBE_S)
        except StoreUnavailable as error:
            return [error.detail]
        return missing_roles(self.producer.devices) if stats.live_workers else ["no worker is ready"]


def state_of(request: Request) -> AppState:
    """The state of the app that a request came to. Dependencies call this: FastAPI resolves each nested one again."""
    state: AppState = request.app.state.giantleap
    return state


async def get_app_state(request: Request) -> AppState:
    """`state_of` for routes."""
    return state_of(request)


def links_of(request: Request) -> Links:
    """The links of a request's responses."""
    return Links(request.scope.get("root_path", ""), request.app.state.giantleap.signer, time.time())


async def get_caller(request: Request) -> Caller:
    """The caller that `giantleap.service.api.middleware.authentication` identified."""
    caller: Caller = request.state.caller
    return caller


AppStateDep = Annotated[AppState, Depends(get_app_state)]
CallerDep = Annotated[Caller, Depends(get_caller)]
JobId = Annotated[str, Path(description="The job's id, a UUID in lower case.")]


async def get_record(job_id: JobId, state: AppStateDep, caller: CallerDep) -> JobRecord:
    """The job that the path names.

    Raises:
        NotFound: There is none, the id is not a UUID, or the job belongs to another key.
    """
    record = await state.producer.get(job_id) if JOB_ID.fullmatch(job_id) else None
    if record is None or not caller.sees(record.job.owner):
        raise NotFound(UNKNOWN_JOB)
    return record


RecordDep = Annotated[JobRecord, Depends(get_record)]
