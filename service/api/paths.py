"""Paths that more than one module of the API knows: the prefixes of the compatible protocols, and those of jobs."""

from typing import Final

from starlette.types import Scope

OPENAI_PATH: Final = "/v1"
KSERVE_PATH: Final = "/v2"
REMOTE_VAE_PATH: Final = "/remote_vae"


def route_path(scope: Scope) -> str:
    """The path of a request as routes declare it: without the root path of a reverse proxy."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def job_path(scope: Scope, job_id: str) -> str:
    """The path of a job as clients see it."""
    return f"{scope.get('root_path', '')}/jobs/{job_id}"
