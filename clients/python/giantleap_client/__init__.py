"""Python client of the Giantleap service. Start with `Client` or `AsyncClient`."""

from giantleap_client.async_client import AsyncClient, AsyncJob
from giantleap_client.calls import Request, generate_request, upscale_request
from giantleap_client.client import Client, Job
from giantleap_client.errors import GiantleapError, InvalidRequest, JobFailed, RateLimited, Timeout
from giantleap_client.events import Event
from giantleap_client.payloads import Result

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "Client",
    "Event",
    "GiantleapError",
    "InvalidRequest",
    "Job",
    "JobFailed",
    "RateLimited",
    "Request",
    "Result",
    "Timeout",
    "generate_request",
    "upscale_request",
]
