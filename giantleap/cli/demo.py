"""Run by `make demo`: start the service, post one prompt at x2 and at x4, write the images, stop the service.

It uses the service over HTTP, through the Python client.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import typer

from giantleap.cli.errors import EXIT_INTERRUPTED, to_line
from giantleap.cli.files import check_output_directory
from giantleap.cli.progress import working
from giantleap.service.supervisor.embedded_redis import free_port
from giantleap_client import Client, GiantleapError

PROMPT = "a large yellow cone on the left and a large white sphere on the right, on a green floor under a blue sky"
_START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 60.0


@contextlib.contextmanager
def running_service(*options: str) -> Iterator[str]:
    """Run `giantleap serve` with an embedded Redis in a temporary directory; yield the base URL once it is ready.

    Raises:
        RuntimeError: the service ended, or was not ready in time.
    """
    with tempfile.TemporaryDirectory(prefix="giantleap-demo-") as data_dir:
        url = f"http://127.0.0.1:{free_port()}"
        argv = [sys.executable, "-m", "giantleap", "serve", "--port", url.rsplit(":", 1)[1], "--data-dir", data_dir]
        process = subprocess.Popen([*argv, *options])
        try:
            wait_until_ready(url, process)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()  # its children end with it
                process.wait()


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Poll `/readyz` until it answers 200, and show the reason for the wait.

    Raises:
        RuntimeError: the service ended, or was not ready in time.
    """
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    with working("waiting for the API") as work, Client(url, timeout_s=5, retry=False) as client:
        while time.monotonic() < deadline_s:
            if process.poll() is not None:
                raise RuntimeError(f"the service ended with code {process.returncode}; see its log above")
            try:
                client.send("GET", "readyz")
                return
            except GiantleapError as error:
                if error.status is not None:
                    work.name = f"not ready yet: {error.detail}"
            time.sleep(0.25)
    raise RuntimeError(f"the service was not ready within {_START_TIMEOUT_S:.0f} s")


def generate(url: str, prompt: str, scale: int, seed: int) -> tuple[bytes, dict[str, float]]:
    """One PNG from a running service, and its stage times in seconds."""
    with Client(url) as client:
        result = client.generate(prompt, scale=scale, seed=seed)
    return result.files[0], dict(result.job["stages"])


def main() -> None:
    """Write `out/demo_x2.png` and `out/demo_x4.png` and print the stage times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="directory of the images")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    try:
        check_output_directory(options.out)
        options.out.mkdir(parents=True, exist_ok=True)
        _generate_both(options.out, options.prompt, options.seed)
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    except (OSError, RuntimeError, GiantleapError) as error:
        sys.exit(f"giantleap: {to_line(error)}")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _generate_both(out: Path, prompt: str, seed: int) -> None:
    os.environ.setdefault("GIANTLEAP_LOG_LEVEL", "warning")  # or the service's log hides the lines below
    print("starting Redis, the API and a worker that loads bundle pocket ...", flush=True)
    with running_service() as url:
        for scale in (2, 4):
            path = out / f"demo_x{scale}.png"
            print(f"generating {path} over HTTP ...", flush=True)
            with working(f"{path}: generate, upscale, decode"):
                image, stages = generate(url, prompt, scale, seed)
            path.write_bytes(image)
            times = "  ".join(f"{name} {duration_s:.3f} s" for name, duration_s in stages.items())
            print(f"{path}  x{scale}  {times}", flush=True)
        print("stopping the service ...", flush=True)


if __name__ == "__main__":
    main()
