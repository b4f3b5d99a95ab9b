"""Measure the service overhead under load: durable no-op jobs, latents in and out, and a tenfold overload.

`python -m benchmarks.load` takes four minutes and runs the real API, queue and Redis (every write on disk before its
reply) on this machine, with workers that do no work; `--peers` also measures LitServe, BentoML and Ray Serve (`make
peers` installs them), which takes nine minutes. Rounds alternate between the systems; figures are medians of rounds.
`docs/load.md` is written from the stored report. Keep the machine idle meanwhile.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import redis
import uvloop
from safetensors.numpy import save
from tqdm import tqdm

from benchmarks.load.client import Load, median_of, run_closed, to_request
from benchmarks.load.overload import measure_overload, measure_refusals, pinned_to_one_core
from benchmarks.load.page import PAGE, to_markdown
from benchmarks.load.service import PARTS, PEER_NAMES, peer_python, run_peer, run_service, used_cpu_s
from giantleap.service.supervisor.embedded_redis import find_server

RESULTS = Path(__file__).resolve().parents[1] / "results" / "load.json"
OURS = "giantleap"
CLIENTS = (1, 8, 64)
WARM_UP = 200
# Sides of latents with 24 channels in float16, 32 bytes smaller than their names say.
LATENTS = {"128 KiB": (42, 65), "512 KiB": (86, 127), "2 MiB": (170, 257)}
PEER_BLOB = "512 KiB"
FIGURES = ("p50_ms", "p99_ms", "per_s", "cpu_ms", *(f"cpu_{part}_ms" for part in PARTS))
_JSON = {"Content-Type": "application/json"}
_EDGE = "3f1c9a"


@dataclass(frozen=True)
class System:
    """A measured system: how to start it, and its requests by run name."""

    name: str
    run: Callable[[], AbstractContextManager[int]]
    noop: bytes
    blobs: dict[str, bytes]


def to_latent(side: tuple[int, int]) -> bytes:
    """Return a safetensors file of one float16 noise latent [1, 24, h, w]."""
    return save({"latent": np.random.default_rng(0).standard_normal((1, 24, *side)).astype(np.float16)})


def to_form(content: bytes) -> tuple[bytes, dict[str, str]]:
    """Return a multipart form with one file called `file`, and its headers."""
    head = f'--{_EDGE}\r\nContent-Disposition: form-data; name="file"; filename="latent"\r\n'
    head += "Content-Type: application/octet-stream\r\n\r\n"
    body = head.encode() + content + f"\r\n--{_EDGE}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={_EDGE}"}


def our_system() -> System:
    """Describe the service."""
    tensor = {"Content-Type": "application/x-safetensors", "Accept": "application/x-safetensors"}
    path = "/upscale?output=latent&scale=2"
    blobs = {name: to_request(path, to_latent(side), tensor) for name, side in LATENTS.items()}
    noop = json.dumps({"prompt": "a red sphere", "seed": 1}).encode()
    return System(OURS, run_service, to_request("/generate", noop, _JSON), blobs)


def peer_system(name: str) -> System:
    """Describe a peer; it echoes the same latent, sent raw where it can, else as a form file."""
    latent = to_latent(LATENTS[PEER_BLOB])
    body, headers = (latent, {"Content-Type": "application/octet-stream"}) if name == "ray" else to_form(latent)
    noop = to_request("/noop", b'{"prompt": "a red sphere"}', _JSON)
    return System(name, lambda: run_peer(name), noop, {PEER_BLOB: to_request("/blob", body, headers)})


def measure_round(system: System, seconds: float) -> dict[str, dict[str, float]]:
    """Measure one round of one freshly started system, by run name."""
    with system.run() as port:
        runs = {f"no-op, {clients}": (system.noop, clients, WARM_UP) for clients in CLIENTS}
        runs |= {name: (request, 1, 20) for name, request in system.blobs.items()}
        return {name: measure_run(port, *run, seconds) for name, run in runs.items()}


def measure_run(
    port: int, request: bytes, clients: int, warm_up: int, seconds: float, root: psutil.Process | None = None
) -> dict[str, float]:
    """Measure one run.

    `cpu_ms` is the processor time per request of all processes below `root` (default: this process); `cpu_api_ms`,
    `cpu_worker_ms` and `cpu_redis_ms` are its parts. All of a peer counts as API.
    """
    before_s = used_cpu_s(root)
    load = uvloop.run(run_closed(port, request, clients, warm_up, seconds))
    after_s, requests = used_cpu_s(root), len(load.times_ms) + warm_up
    parts = {f"cpu_{part}_ms": round(1000 * (after_s[part] - before_s[part]) / requests, 3) for part in PARTS}
    cpu_ms = 1000 * (sum(after_s.values()) - sum(before_s.values())) / requests
    return to_figures(load) | {"cpu_ms": round(cpu_ms, 3)} | parts


def to_figures(load: Load) -> dict[str, float]:
    """Return the figures of a load run."""
    return {
        "p50_ms": round(load.median_ms, 3),
        "p99_ms": round(load.quantile_ms(0.99), 3),
        "per_s": round(load.per_s, 1),
        "requests": len(load.times_ms),
    }


def summarize(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the medians over the rounds."""
    return {run: {name: median_of([each[run][name] for each in rounds]) for name in FIGURES} for run in rounds[0]}


def machine() -> dict[str, Any]:
    """Describe the machine and the versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    server = subprocess.run([str(find_server()), "--version"], capture_output=True, text=True, check=True)
    return {
        "machine": f"{cpu or platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "redis_server": server.stdout.split("v=")[1].split()[0],
        "redis_py": redis.__version__,
        "fastapi": version("fastapi"),
        "uvicorn": version("uvicorn"),
    }


def peer_versions() -> dict[str, str]:
    """Return the installed version of every peer.

    Raises:
        FileNotFoundError: A peer is not installed.
    """
    code = "import sys, importlib.metadata; print(importlib.metadata.version(sys.argv[1]))"
    commands = {name: [str(peer_python(name)), "-c", code, name] for name in PEER_NAMES}
    return {
        name: subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        for name, command in commands.items()
    }


def measure(with_peers: bool, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure everything and return the report."""
    versions = peer_versions() if with_peers else {}
    systems = [our_system(), *map(peer_system, versions)]
    load_before = os.getloadavg()
    rounds_by_system: dict[str, list[dict[str, dict[str, float]]]] = {system.name: [] for system in systems}
    with progress(rounds * len(systems) + 3) as step:
        for number in range(rounds):
            for system in systems:
                step(f"round {number + 1}, {system.name}")
                rounds_by_system[system.name].append(measure_round(system, seconds))
        noop, repetitions = our_system().noop, 2 * rounds - 1
        step("refusals")
        refusals = measure_refusals(noop, seconds)
        step("overload")
        overload = measure_overload(noop, 2 * seconds, repetitions)
        step("overload on one core")
        with pinned_to_one_core():
            overload_pinned = measure_overload(noop, 2 * seconds, repetitions)
    medians = {name: summarize(each) for name, each in rounds_by_system.items()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine(),
        "peers": versions,
        "load_average_before": load_before,
        "load_average_after": os.getloadavg(),
        "rounds": rounds,
        "seconds": seconds,
        "warm_up": WARM_UP,
        "result_store": "file",
        "medians": medians,
        "refusals": refusals,
        "overload": overload,
        "overload_pinned": overload_pinned,
        "by_round": rounds_by_system,
    }


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar; yields a function that advances it."""
    with tqdm(total=steps, bar_format="{n_fmt}/{total_fmt} {desc} {elapsed}") as bar:

        def step(what: str) -> None:
            bar.set_description_str(what)
            bar.update()

        yield step


def main() -> None:
    """Measure, write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON report to write, or to read with --docs-only")
    parser.add_argument("--peers", action="store_true", help="measure LitServe, BentoML and Ray Serve as well")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--docs-only", action="store_true", help="write docs/load.md from the JSON; measure nothing")
    options = parser.parse_args()
    if not options.docs_only:
        report = measure(options.peers, options.rounds, options.seconds)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    page = to_markdown(json.loads(options.out.read_text()))
    print(page)
    if options.docs_only or options.out.resolve() == RESULTS.resolve():  # the page describes the stored report only
        PAGE.write_text(page)
