"""The path of a request below a reverse proxy, which may publish the API as `/giantleap/` (`GIANTLEAP_ROOT_PATH`).

Some proxies strip that prefix and some pass it on. After this middleware the path always has it, as ASGI wants it:
routes then match, and redirects lead back below the prefix.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from giantleap.service.api.paths import route_path


class RootPathMiddleware:
    """Sets the root path of each request, and puts it before a path that lacks it.

    Args:
        app: The next ASGI application.
        root_path: The prefix (`Settings.root_path`); empty: there is none.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app = app
        self.root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if self.root_path and scope["type"] == "http":
            scope = {**scope, "root_path": self.root_path}
            if route_path(scope) == scope["path"]:
                scope["path"] = self.root_path + scope["path"]
                scope["raw_path"] = self.root_path.encode() + (scope.get("raw_path") or b"")
        await self.app(scope, receive, send)
