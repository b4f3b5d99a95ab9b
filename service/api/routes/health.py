"""Routes about the service itself: its bundles, whether it lives, whether it is ready, its metrics."""

from fastapi import APIRouter, Request, Response

from giantleap.service.api.dependencies import AppStateDep
from giantleap.service.api.openapi import describe_responses
from giantleap.service.api.problems import problem_response
from giantleap.service.api.schemas import ModelBody, Ready, to_model_body
from giantleap.service.errors import NotReady
from giantleap.service.jobs.devices import missing_roles
from giantleap.service.telemetry.metrics import CONTENT_TYPE

router = APIRouter(tags=["service"])


@router.get("/models")
async def get_models(serving: AppStateDep) -> list[ModelBody]:
    """The bundles that jobs may name, the default first."""
    return [to_model_body(served.bundle, serving.settings) for served in serving.bundles.values()]


@router.get("/livez")
async def get_live() -> dict[str, bool]:
    """This process answers."""
    return {"live": True}


@router.get("/readyz", response_model=Ready, responses=describe_responses({}, 503))
async def get_ready(request: Request, serving: AppStateDep) -> Ready | Response:
    """Jobs are accepted and run: Redis answers, workers for every stage live, this process is not stopping."""
    reasons = await find_reasons(serving)
    if not reasons:
        return Ready(ready=True, reasons=[])
    return problem_response(NotReady("; ".join(reasons)), request, reasons=reasons)


async def find_reasons(serving: AppStateDep) -> list[str]:
    """Why no job should be sent here; empty when ready."""
    if serving.stopping.is_set():
        return ["this process is stopping"]
    try:
        stats = await serving.producer.stats()
        await serving.producer.read_devices()
    except NotReady:
        return ["Redis cannot be reached"]
    return missing_roles(serving.producer.devices) if stats.live_workers else ["no worker is ready"]


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def get_metrics(serving: AppStateDep) -> Response:
    """Prometheus metrics of all processes of this host, and the queue as it is now."""
    try:
        stats = await serving.producer.stats()
    except NotReady:
        stats = None
    return Response(serving.metrics.render(stats), media_type=CONTENT_TYPE)
