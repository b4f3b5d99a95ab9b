"""Compare the service of this checkout with that of an older one: images per second of jobs that all wait.

`python -m benchmarks.pipeline --before DIR` starts both services in turns, each with its own code, on a copy of this
checkout's pocket bundle without its `[preview]`, which older code refuses and no job here uses. The jobs of a kind are
queued while another job runs, so that all wait when the worker is free; the time is that from the end of that job to
the end of the last one, by their records. It writes `benchmarks/results/pipeline_before.json`. Read the ratios: each
is the median over the rounds.
"""

import io
import json
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import skimage.data
import typer
from numpy.typing import NDArray
from PIL import Image

from benchmarks.load.service import await_answer, run_server
from benchmarks.machine import read_machine
from benchmarks.startup import Checkout
from giantleap.service.supervisor.embedded_redis import free_port

BUNDLE = Path("bundles/pocket")
PROMPT = "a large green cone on a purple floor under an orange sky, in the centre"
THREADS: Mapping[str, Mapping[str, str]] = {"1": {"OMP_NUM_THREADS": "1"}, "default": {}}
NAMES = ("before", "now")
_PREVIEW = re.compile(r"^\[preview\]\n(?:.+\n)*\n?|^\"preview\.safetensors\" = .*\n", re.MULTILINE)
_FINAL = ("succeeded", "failed", "canceled")
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Run:
    """Images per second of one run, and the seconds of each stage of its first job, which runs alone."""

    images_per_s: float
    stages_alone_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Kind:
    """Jobs of one kind: their route, and what `httpx` sends besides a seed. Each gives one PNG file."""

    image_px: int
    route: str
    request: Mapping[str, Any]


def kinds() -> dict[str, Kind]:
    """The kinds of jobs; encoding weighs most in uploads, which generate nothing."""
    photograph: Callable[[], NDArray[np.uint8]] = skimage.data.astronaut

    def upload(side_px: int) -> Kind:
        file = io.BytesIO()
        Image.fromarray(photograph()).resize((side_px, side_px), Image.Resampling.LANCZOS).save(file, "PNG")
        files = {"image": ("image.png", file.getvalue(), "image/png")}
        return Kind(4 * side_px, "/upscale", {"params": {"scale": 4}, "files": files})

    return {
        **{
            f"generate at {side_px // 4} px, x4 to {side_px} px": Kind(
                side_px, "/generate", {"json": {"prompt": PROMPT, "width": side_px, "height": side_px, "scale": 4}}
            )
            for side_px in (512, 768)
        },
        **{f"upload {side_px} px, x4 to {4 * side_px} px": upload(side_px) for side_px in (128, 256)},
    }


def copy_bundle(source: Path, target: Path) -> Path:
    """Copy a bundle without its `[preview]`."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("preview.safetensors"))
    description = target / "bundle.toml"
    description.write_text(_PREVIEW.sub("", description.read_text()))
    return target


@contextmanager
def serve(checkout: Checkout, bundle: Path, threads: Mapping[str, str]) -> Iterator[httpx.Client]:
    """Run `giantleap serve` of a checkout with its default settings; yields a client of it."""
    with tempfile.TemporaryDirectory(prefix="giantleap-before-") as data_dir:
        port = free_port()
        settings = {"GIANTLEAP_DATA_DIR": data_dir, "GIANTLEAP_PORT": str(port), "GIANTLEAP_BUNDLE": str(bundle)}
        environment = {**checkout.environment(""), **settings, **threads}
        del environment["GIANTLEAP_REDIS_URL"]
        if not threads:
            environment.pop("OMP_NUM_THREADS", None)
        with run_server(checkout.command("serve"), environment, checkout.directory) as process:
            await_answer([process], port, "/readyz")
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                yield client


def run_jobs(client: httpx.Client, kind: Kind, jobs: int) -> list[dict[str, Any]]:
    """Queue jobs at once and wait for all of them; returns their records in the order of the queue.

    Raises:
        RuntimeError: A job failed.
        httpx.HTTPStatusError: A job was refused.
    """
    urls: list[str] = []
    for seed in range(jobs):
        request = dict(kind.request)
        if "json" in request:
            request["json"] = request["json"] | {"seed": seed}
        response = client.post(kind.route, headers={"Prefer": "respond-async"}, **request)
        response.raise_for_status()
        urls.append(f"/jobs/{response.json()['id']}")
    records = []
    for url in urls:
        while (record := client.get(url).raise_for_status().json())["status"] not in _FINAL:
            time.sleep(_POLL_S)
        if record["status"] != "succeeded":
            raise RuntimeError(f"a job of {kind.route} ended as {record['status']}: {record['error']}")
        records.append(record)
    return records


def to_rate(records: Sequence[Mapping[str, Any]]) -> float:
    """Images per second from the end of the first job, which is not counted, to the last end."""
    first, *ends = (datetime.fromisoformat(each["finished_at"]) for each in records)
    return len(ends) / (max(ends) - first).total_seconds()


def to_run(records: Sequence[Mapping[str, Any]]) -> Run:
    """The rate and the stage times of a run."""
    stages_s: Mapping[str, float] = records[0]["stages"]
    return Run(to_rate(records), {name: seconds for name, seconds in stages_s.items() if name != "queue"})


def summarize(rounds: Sequence[Mapping[str, Run]]) -> dict[str, Any]:
    """The rates of all rounds, the median of now over before round by round, and the stages of a job alone."""
    return {
        "images_per_s": {name: [round(each[name].images_per_s, 3) for each in rounds] for name in NAMES},
        "ratio": round(statistics.median(each["now"].images_per_s / each["before"].images_per_s for each in rounds), 3),
        "stages_alone_s": {
            name: {
                stage: round(statistics.median(each[name].stages_alone_s[stage] for each in rounds), 4)
                for stage in rounds[0][name].stages_alone_s
            }
            for name in NAMES
        },
    }


def measure(
    checkouts: Sequence[Checkout], bundle: Path, threads: Mapping[str, str], jobs: int, rounds: int
) -> dict[str, list[dict[str, Run]]]:
    """The runs of each checkout, by kind and round; their services run in turns."""
    runs: dict[str, list[dict[str, Run]]] = {name: [{} for _ in range(rounds)] for name in kinds()}
    for number in range(rounds):
        for checkout in checkouts if number % 2 == 0 else checkouts[::-1]:
            with serve(checkout, bundle, threads) as client:
                for name, kind in kinds().items():
                    run_jobs(client, kind, 1)  # the first of a size takes longer
                    run = runs[name][number][checkout.name] = to_run(run_jobs(client, kind, jobs + 1))
                    typer.echo(f"round {number + 1}, {name}, {checkout.name}: {run.images_per_s:.3f} images/s")
    return runs


def commit_of(directory: Path) -> str:
    """The commit of a checkout.

    Raises:
        subprocess.CalledProcessError: It is none.
    """
    command = ("git", "-C", str(directory), "rev-parse", "--short=7", "HEAD")
    printed: str = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return printed.strip()


def run_before(before: Path, jobs: int, rounds: int, out: Path) -> None:
    """Measure both services, print, write the JSON."""
    directories = zip(NAMES, (before.resolve(), Path.cwd()), strict=True)
    checkouts = [Checkout(name, directory, "giantleap") for name, directory in directories]
    report: dict[str, Any] = {
        "machine": read_machine(("torch", "diffusers", "isal")),
        "before": commit_of(before),
        "jobs": jobs,
        "rounds": rounds,
        "results": [],
    }
    with tempfile.TemporaryDirectory(prefix="giantleap-bundle-") as directory:
        bundle = copy_bundle(BUNDLE, Path(directory) / "pocket")
        for threads, environment in THREADS.items():
            for name, runs in measure(checkouts, bundle, environment, jobs, rounds).items():
                row = {"jobs": name, "threads": threads, **summarize(runs)}
                report["results"].append(row)
                typer.echo(f"{name}, threads {threads}: {row['ratio']:.3f} times the images per second of before")
    out.write_text(json.dumps(report, indent=1) + "\n")
