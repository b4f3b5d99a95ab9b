"""The pages for browsers: static files that use the API as any other client does, and the way there from the root.

The files name each other and the API by relative URLs, so that they work below any path of a proxy.
"""

from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request, Response
from starlette.responses import RedirectResponse
from starlette.staticfiles import StaticFiles

from giantleap.service.auth import DOCS_PATH, UI_PATH
from giantleap.service.errors import NotFound

router = APIRouter(include_in_schema=False)
docs_router = APIRouter(include_in_schema=False)

_FOLDER: Final = Path(__file__).parent.parent
_FILES: Final = StaticFiles(directory=_FOLDER / "ui")
# Swagger UI itself comes from a package, since FastAPI's own page would load it from another host.
_DOCS_FILES: Final = StaticFiles(directory=_FOLDER / "swagger", packages=[("fastapi_offline", "static")])
# With the files' ETag: revalidated each time, sent again only after an update.
_CACHED: Final = {"Cache-Control": "no-cache"}


@router.get("/")
async def get_root(request: Request) -> Response:
    """Redirect browsers to the page."""
    if "text/html" not in request.headers.get("accept", ""):
        raise NotFound("there is nothing at /; /docs describes the API")
    return RedirectResponse(UI_PATH.removeprefix("/"), headers={"Vary": "Accept"})


@router.get(UI_PATH)
async def get_page(request: Request) -> Response:
    """The page itself."""
    return await _file(_FILES, "index.html", request)


@router.get(f"{UI_PATH}/operator")
async def get_operator_page(request: Request) -> Response:
    """The operator's view."""
    return await _file(_FILES, "operator.html", request)


@router.get(f"{UI_PATH}/{{name}}")
async def get_page_file(request: Request, name: str) -> Response:
    """A file that the page loads."""
    return await _file(_FILES, name, request)


@docs_router.get(DOCS_PATH)
async def get_docs(request: Request) -> Response:
    """The description of the API."""
    return await _file(_DOCS_FILES, "index.html", request)


@docs_router.get(f"{DOCS_PATH}/{{name}}")
async def get_docs_file(request: Request, name: str) -> Response:
    """A file that this description loads."""
    return await _file(_DOCS_FILES, name, request)


async def _file(files: StaticFiles, name: str, request: Request) -> Response:
    response = await files.get_response(name, request.scope)
    response.headers.update(_CACHED)
    return response
