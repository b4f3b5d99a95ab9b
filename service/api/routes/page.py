"""The page for browsers: static files that use the API as any other client does, and the way there from the root.

The files name each other and the API by relative URLs, so that they work below any path of a proxy.
"""

from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request, Response
from starlette.responses import RedirectResponse
from starlette.staticfiles import StaticFiles

from giantleap.service.auth import UI_PATH
from giantleap.service.errors import NotFound

router = APIRouter(include_in_schema=False)

_FILES: Final = StaticFiles(directory=Path(__file__).parent.parent / "ui")
# With the files' ETag: revalidated each time, sent again only after an update.
_CACHED: Final = {"Cache-Control": "no-cache"}


@router.get("/")
async def get_root(request: Request) -> Response:
    """Lead browsers to the page."""
    if "text/html" not in request.headers.get("accept", ""):
        raise NotFound("there is nothing at /; /docs describes the API")
    return RedirectResponse(UI_PATH.removeprefix("/"), headers={"Vary": "Accept"})


@router.get(UI_PATH)
async def get_page(request: Request) -> Response:
    """The page itself."""
    return await get_page_file(request, "index.html")


@router.get(f"{UI_PATH}/{{name}}")
async def get_page_file(request: Request, name: str) -> Response:
    """A file that the page loads."""
    response = await _FILES.get_response(name, request.scope)
    response.headers.update(_CACHED)
    return response
