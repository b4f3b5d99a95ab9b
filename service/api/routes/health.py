"""Routes about the service itself: its bundles, workers, liveness, readiness and metrics."""

from importlib.metadata import version

from fastapi import APIRouter, Request, Response

from giantleap.service.api.dependencies import AppStateDep
from giantleap.service.api.openapi import describe_responses
from giantleap.service.api.problems import problem_response
from giantleap.service.api.schemas import ModelBody, Ready, Version, WorkerBody, to_model_body, to_worker_body
from giantleap.service.errors import NotReady
from giantleap.service.telemetry.metrics import CONTENT_TYPE

router = APIRouter(tags=["service"])


@router.get("/models")
async def get_models(state: AppStateDep) -> list[ModelBody]:
    """List bundles with defaults and limits, the default first."""
    loaded = {name for device in state.producer.devices for name in device.loaded}
    return [to_model_body(served, state.settings, name in loaded) for name, served in state.bundles.items()]


@router.get("/workers", responses=describe_responses({}, 503))
async def get_workers(state: AppStateDep) -> list[WorkerBody]:
    """List the live workers of all hosts."""
    await state.producer.read_devices()
    return [to_worker_body(device) for device in state.producer.devices]


@router.get("/livez")
async def get_live() -> dict[str, bool]:
    """Liveness: this process responds."""
    return {"live": True}


@router.get("/version")
async def get_version() -> Version:
    """Get the running version."""
    return Version(version=version("giantleap"))


@router.get("/health", response_model=Ready, responses=describe_responses({}, 503), name="get_health")
@router.get("/readyz", response_model=Ready, responses=describe_responses({}, 503))
async def get_ready(request: Request, state: AppStateDep) -> Ready | Response:
    """Readiness: Redis responds, every stage has a live worker, this process is not stopping."""
    reasons, warnings = await state.unready_reasons(), list(state.producer.warnings)
    if not reasons:
        return Ready(ready=True, reasons=[], warnings=warnings)
    return problem_response(NotReady("; ".join(reasons)), request, reasons=reasons, warnings=warnings)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def get_metrics(state: AppStateDep) -> Response:
    """Get Prometheus metrics of all processes of this host and of the queue."""
    try:
        stats = await state.producer.stats()
    except NotReady:
        stats = None
    return Response(state.metrics.render(stats), media_type=CONTENT_TYPE)
