"""LitServe's no-op server: `python litserve_noop.py PORT`. /noop takes JSON, /blob a file of a form, which it returns.

Runs in an environment of its own (`benchmarks/peers/install.py`), from where nothing of ours is imported.
"""

import sys

import litserve as ls
from fastapi import Request, Response


class Noop(ls.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        pass

    def decode_request(self, request: dict[str, str]) -> str:
        return request["prompt"]

    def predict(self, prompt: str) -> str:
        return "succeeded"

    def encode_response(self, output: str) -> dict[str, str]:
        return {"status": output}


class Blob(ls.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        pass

    def decode_request(self, request: Request) -> bytes:
        # The annotation makes LitServe read the body itself: what comes is the form.
        return bytes(request["file"].file.read())

    def predict(self, content: bytes) -> bytes:
        return content

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="application/octet-stream")


if __name__ == "__main__":
    server = ls.LitServer([Noop(api_path="/noop"), Blob(api_path="/blob")], accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="error")
