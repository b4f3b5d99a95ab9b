"""BentoML's no-op service: `python bentoml_noop.py PORT`. /noop takes JSON, /blob a file of a form, which it returns.

Runs in a separate environment (`benchmarks/peers/install.py`), where `giantleap` is not installed.
"""

import os
import sys
from pathlib import Path

import bentoml


@bentoml.service(workers=1)
class Noop:
    """The no-op service."""

    @bentoml.api(route="/noop")  # type: ignore[untyped-decorator]
    def noop(self, prompt: str) -> dict[str, str]:
        """Return at once."""
        return {"status": "succeeded"}

    @bentoml.api(route="/blob")  # type: ignore[untyped-decorator]
    def blob(self, file: Path) -> Path:
        """Return the file."""
        return file


if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    command = ["-m", "bentoml", "serve", "bentoml_noop:Noop", "--host", "127.0.0.1", "--port", sys.argv[1]]
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    os.execv(sys.executable, [sys.executable, *command])
