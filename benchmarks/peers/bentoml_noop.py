"""BentoML's no-op service: `python bentoml_noop.py PORT`. /noop takes JSON, /blob a file of a form, which it returns.

Runs in an environment of its own (`benchmarks/peers/install.py`), from where nothing of ours is imported.
"""

import os
import sys
from pathlib import Path

import bentoml


@bentoml.service(workers=1)
class Noop:
    @bentoml.api(route="/noop")  # type: ignore[untyped-decorator]
    def noop(self, prompt: str) -> dict[str, str]:
        return {"status": "succeeded"}

    @bentoml.api(route="/blob")  # type: ignore[untyped-decorator]
    def blob(self, file: Path) -> Path:
        return file


if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    command = ["-m", "bentoml", "serve", "bentoml_noop:Noop", "--host", "127.0.0.1", "--port", sys.argv[1]]
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    os.execv(sys.executable, [sys.executable, *command])
