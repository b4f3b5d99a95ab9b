"""Ray Serve's no-op deployment: `python ray_noop.py PORT`. /noop takes JSON, /blob raw bytes, which it returns.

Runs in a separate environment (`benchmarks/peers/install.py`), where `giantleap` is not installed.
"""

import signal
import sys
import threading

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.1})
class Noop:
    """The no-op deployment."""

    async def __call__(self, request: Request) -> Response:
        """Return at once; /blob returns the body."""
        if request.url.path == "/blob":
            return Response(await request.body(), media_type="application/octet-stream")
        await request.json()
        return JSONResponse({"status": "succeeded"})


if __name__ == "__main__":
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False, object_store_memory=200 << 20)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Noop.bind(), route_prefix="/")  # type: ignore[attr-defined]
    stop.wait()
    serve.shutdown()
    ray.shutdown()
