"""Paths that more than one module of the API knows: the prefixes of the compatible protocols, and a request's own."""

from typing import Final

from starlette.types import Scope

from giantleap.service.auth import DOCS_PATH, UI_PATH

OPENAI_PATH: Final = "/v1"
KSERVE_PATH: Final = "/v2"
REMOTE_VAE_PATH: Final = "/remote_vae"


def is_page_file(path: str) -> bool:
    """Whether a path is that of a file of a page: the same for everybody, so that none needs a key."""
    folder, _, name = path.rpartition("/")
    return folder in (UI_PATH, DOCS_PATH) and bool(name)


def route_path(scope: Scope) -> str:
    """The path of a request as routes declare it: without the root path of a reverse proxy."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] or "/" if path == root or path.startswith(f"{root}/") else path
