"""LitServe's no-op server: `python litserve_noop.py PORT`. /noop takes JSON, /blob a file of a form, which it returns.

Runs in a separate environment (`benchmarks/peers/install.py`), where `giantleap` is not installed.
"""

import sys

import litserve as ls
from fastapi import Request, Response


class Noop(ls.LitAPI):  # type: ignore[misc]
    """The no-op endpoint."""

    def setup(self, device: str) -> None:
        """Do nothing."""

    def decode_request(self, request: dict[str, str]) -> str:
        """Return the prompt."""
        return request["prompt"]

    def predict(self, prompt: str) -> str:
        """Return at once."""
        return "succeeded"

    def encode_response(self, output: str) -> dict[str, str]:
        """Return JSON."""
        return {"status": output}


class Blob(ls.LitAPI):  # type: ignore[misc]
    """The echo endpoint."""

    def setup(self, device: str) -> None:
        """Do nothing."""

    def decode_request(self, request: Request) -> bytes:
        # The annotation makes LitServe parse the form.
        """Return the bytes of the file."""
        return bytes(request["file"].file.read())

    def predict(self, content: bytes) -> bytes:
        """Return the bytes."""
        return content

    def encode_response(self, output: bytes) -> Response:
        """Return the bytes as the body."""
        return Response(output, media_type="application/octet-stream")


if __name__ == "__main__":
    server = ls.LitServer([Noop(api_path="/noop"), Blob(api_path="/blob")], accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="error")
