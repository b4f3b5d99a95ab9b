"""The shapes that the compatible fronts give an error in, made from its problem document.

`giantleap.service.api.problems.problem_response` asks for every error, so that also those raised before a route was
found, such as a body over the limit, speak the protocol of the path. Status and headers stay those of the problem.
"""

from collections.abc import Mapping
from typing import Any

OPENAI_PATH = "/v1"
KSERVE_PATH = "/v2"
REMOTE_VAE_PATH = "/remote_vae"


def front_error(path: str, problem: Mapping[str, Any]) -> dict[str, Any] | None:
    """The error as the protocol of `path` writes it; None where that is the problem document itself.

    Args:
        path: Of the request, without a root path.
        problem: As `giantleap.service.api.problems.problem_body` makes it.
    """
    if _below(path, OPENAI_PATH):
        fields = problem.get("errors") or [{"field": None}]
        return {
            "error": {
                "message": problem["detail"],
                "type": _openai_type(problem["status"]),
                "param": fields[0]["field"],
                "code": problem["code"],
            }
        }
    if _below(path, KSERVE_PATH):
        return {"error": problem["detail"]}
    if _below(path, REMOTE_VAE_PATH):
        return {"error": problem["detail"], "code": problem["code"]}
    return None


def _below(path: str, front: str) -> bool:
    return path == front or path.startswith(front + "/")


def _openai_type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error"
    )
