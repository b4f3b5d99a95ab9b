"""HEAD on every route that has GET: the same status and headers without the body (RFC 9110, 9.3.2).

The response ends with its headers. The server then reports a disconnect to the route, which ends a stream of events.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadMiddleware:
    """Runs HEAD as GET and drops the body. The scope of the GET has `is_head`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_start(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b""})

        run_as = {**scope, "method": "GET", "is_head": True}
        try:
            await self.app(run_as, receive, send_start)
        finally:
            scope["route"] = run_as.get("route")  # for the log and the metrics
