"""/metrics: accepted by a parser and by promtool, right over several processes, and bounded in its labels."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from giantleap.service.jobs.job import Priority, QueueStats
from giantleap.service.telemetry.metrics import (
    SECONDS_BUCKETS,
    Metrics,
    RestartCollector,
    remove_dead_gauges,
    write_restarts,
)

ROOT = Path(__file__).resolve().parents[3]
STATS = QueueStats(
    queued={("pocket", Priority.HIGH): 3, ("pocket", Priority.LOW): 0},
    processing=2,
    delayed=1,
    dead_lettered=4,
    oldest_age_s=2.5,
    limit=256,
    live_workers=2,
    recent_job_median_s=None,
    blob_bytes=1000,
    blob_budget_bytes=4000,
)

# A process of its own: counts what the parent knows, says so, and lives until its standard input ends.
CHILD = """
import sys
from giantleap.service.telemetry.metrics import Metrics
metrics = Metrics()
metrics.count_images("pocket", 2, int(sys.argv[1]), 100)
metrics.observe_job("generate", "pocket", "lua", 2, "succeeded", 0.3)
metrics.set_peak_memory("cpu", "process_rss", int(sys.argv[2]))
print("counted", flush=True)
sys.stdin.read()
"""


def fill(metrics: Metrics) -> None:
    """Touch every metric once."""
    metrics.count_rejection("queue_full")
    metrics.count_work("generate", "pocket", 1_500_000)
    metrics.observe_http("/generate", "POST", 200, 0.3)
    metrics.observe_wait("high", 0.1)
    metrics.observe_job("generate", "pocket", "lua", 2, "succeeded", 1.5)
    metrics.observe_stages(
        "pocket", "lua", 2, "torch", {"generate": 0.4, "upscale": 0.1, "decode": 0.2, "encode": 0.01}
    )
    metrics.observe_stages("pocket", "lua", 2, "torch", {"generate": 3.0}, warmup=True)
    metrics.observe_batch("generate", 3)
    metrics.count_images("pocket", 2, 3, 300)
    metrics.count_decoded("pocket", "compiled", 2)
    metrics.count_busy("cpu", 0.4)
    metrics.count_fenced()
    metrics.count_webhook("delivered")
    metrics.count_filtered("flat", "refused")
    metrics.count_retry("pocket")
    metrics.set_peak_memory("cpu", "process_rss", 12345)
    metrics.set_bundle_size("pocket", 1000)
    metrics.observe_load("pocket", 2.0)
    metrics.count_load_failure("pocket")
    metrics.count_eviction("pocket")
    metrics.set_protocol("pocket", "lua", 2, "256x256", "total", "median", 0.5)
    metrics.set_engine("pocket", "torch", "plain", "cpu", "float32")
    metrics.set_started("worker")
    metrics.open_http(1)
    metrics.count_failure("pocket", "engine_error")
    metrics.set_device_memory("cpu", 20000)


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float | None:
    return samples(text).get((name, tuple(sorted(labels.items()))))


def check_exposition(text: str) -> None:
    """What promtool checks, and more: help, type, units, buckets that rise, no family twice."""
    names: list[str] = []
    for family in text_string_to_metric_families(text):
        names.append(family.name)
        assert family.name.startswith("giantleap_") and family.documentation
        assert family.type in ("counter", "gauge", "histogram"), family.name
        if family.type == "histogram":
            rows = [s for s in family.samples if s.name.endswith("_bucket")]
            for labels in {tuple(sorted((k, v) for k, v in s.labels.items() if k != "le")) for s in rows}:
                series = [s for s in rows if set(labels) <= set(s.labels.items())]
                ordered = [s.value for s in sorted(series, key=lambda s: float(s.labels["le"]))]
                assert ordered == sorted(ordered) and float(series[-1].labels["le"]) == float("inf")
        if "duration" in family.name or "wait" in family.name or "age" in family.name.split("_"):
            assert family.name.endswith("_seconds"), family.name
    assert len(names) == len(set(names))


def render_all() -> str:
    """Every metric that any process exposes, those of a supervisor's host too."""
    metrics, host = Metrics(CollectorRegistry()), CollectorRegistry()
    fill(metrics)
    with tempfile.TemporaryDirectory() as shared_dir:
        write_restarts(Path(shared_dir), {"worker": {"crashed": 2}, "api": {"killed": 1}})
        host.register(RestartCollector(Path(shared_dir)))
        return (metrics.render(STATS) + generate_latest(host)).decode()


@pytest.fixture
def full() -> str:
    return render_all()


def test_the_exposition_is_well_formed(full: str) -> None:
    check_exposition(full)


@pytest.mark.deploy
def test_promtool_accepts_the_exposition(full: str) -> None:
    promtool = shutil.which("promtool")
    assert promtool is not None, "promtool is missing: apt-get install prometheus"
    check = subprocess.run(
        [promtool, "check", "metrics"], input=full, capture_output=True, text=True, timeout=60, check=False
    )
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")


def test_the_page_lists_every_metric_with_its_type_and_labels(full: str) -> None:
    """docs/metrics.md is what dashboards and alerts are written from: nothing more, nothing less."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(giantleap_\w+)` \| (\w+) \| ([^|]*) \| ([^|]+) \|$", page, re.MULTILINE)
    listed = {name: (kind, frozenset(re.findall(r"`(\w+)`", labels)), text) for name, kind, labels, text in rows}
    assert len(rows) == len(listed), "a metric stands twice on the page"
    found = {}
    for family in text_string_to_metric_families(full):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = frozenset(label for sample in family.samples for label in sample.labels) - {"le"}
        found[name] = (family.type, labels, family.documentation)
    assert listed == found


def test_the_queue_comes_from_the_stats_of_the_scrape(full: str) -> None:
    assert value(full, "giantleap_queue_depth", bundle="pocket", priority="high") == 3
    assert value(full, "giantleap_queue_depth", bundle="pocket", priority="low") == 0
    split = replace(STATS, queued=STATS.queued | {("pocket+finish", Priority.HIGH): 5}, generate_workers=1)
    text = Metrics(CollectorRegistry()).render(split).decode()
    assert value(text, "giantleap_queue_depth", bundle="pocket", priority="high") == 8, "all that wait"
    assert value(text, "giantleap_finish_queue_depth", bundle="pocket", priority="high") == 5
    workers = {stage: value(text, "giantleap_stage_workers_live", stage=stage) for stage in ("generate", "decode")}
    assert workers == {"generate": 2, "decode": 1}
    assert value(full, "giantleap_queue_oldest_age_seconds") == 2.5
    assert value(full, "giantleap_queue_limit") == 256
    assert value(full, "giantleap_queue_reachable") == 1


def test_a_queue_that_cannot_be_reached_is_reported_and_not_guessed() -> None:
    text = Metrics(CollectorRegistry()).render(None).decode()
    assert value(text, "giantleap_queue_reachable") == 0
    assert "giantleap_queue_depth" not in text and "giantleap_workers_live" not in text
    check_exposition(text)


def test_restarts_are_counted_by_the_supervisor(full: str) -> None:
    assert value(full, "giantleap_worker_restarts_total", reason="crashed") == 2
    assert value(full, "giantleap_api_restarts_total", reason="killed") == 1
    assert value(full, "giantleap_api_restarts_total", reason="crashed") == 0, "a rate needs the value before the first"


def test_without_a_supervisor_its_metrics_are_absent(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    registry.register(RestartCollector(tmp_path))
    assert generate_latest(registry) == b""


def test_buckets_reach_from_5_ms_to_600_s() -> None:
    assert (SECONDS_BUCKETS[0], SECONDS_BUCKETS[-1]) == (0.005, 600)


def test_warm_up_and_protocol_are_never_mixed_with_traffic(full: str) -> None:
    stage = {"stage": "generate", "bundle": "pocket", "method": "lua", "scale": "2", "engine": "torch"}
    assert value(full, "giantleap_stage_duration_seconds_sum", **stage, warmup="false") == 0.4
    assert value(full, "giantleap_stage_duration_seconds_sum", **stage, warmup="true") == 3.0
    protocol = {
        "bundle": "pocket",
        "method": "lua",
        "scale": "2",
        "image_px": "256x256",
        "stage": "total",
        "statistic": "median",
    }
    assert value(full, "giantleap_protocol_seconds", **protocol) == 0.5


def test_two_metrics_objects_do_not_share_values() -> None:
    first, second = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    first.count_fenced()
    assert value(second.render(None).decode(), "giantleap_fenced_total") == 0


@pytest.fixture
def start_child(tmp_path: Path) -> Iterator[object]:
    children: list[subprocess.Popen[str]] = []

    def start(images: int, peak_bytes: int) -> subprocess.Popen[str]:
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
        argv = [sys.executable, "-c", CHILD, str(images), str(peak_bytes)]
        child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        children.append(child)
        assert child.stdout is not None and child.stdout.readline() == "counted\n"
        return child

    yield start
    for child in children:
        child.communicate(timeout=60)


def scrape(shared_dir: Path) -> str:
    """What a process of the same host, one that has counted nothing itself, answers."""
    code = (
        "import sys; from giantleap.service.telemetry.metrics import Metrics;"
        "sys.stdout.buffer.write(Metrics().render(None))"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(shared_dir)}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120, check=True)
    return answer.stdout.decode()


def test_processes_of_one_host_add_up_and_dead_ones_leave_no_gauge(start_child: Any, tmp_path: Path) -> None:
    large, _ = start_child(3, 9000), start_child(4, 5000)
    peak = {"device": "cpu", "source": "process_rss"}
    job = {"kind": "generate", "bundle": "pocket", "method": "lua", "scale": "2", "status": "succeeded"}

    text = scrape(tmp_path)
    check_exposition(text)
    assert value(text, "giantleap_images_total", bundle="pocket", scale="2") == 7
    assert value(text, "giantleap_job_duration_seconds_count", **job) == 2
    assert value(text, "giantleap_job_duration_seconds_bucket", **job, le="0.5") == 2
    assert value(text, "giantleap_peak_memory_bytes", **peak) == 9000

    large.communicate(timeout=60)
    text = scrape(tmp_path)
    assert value(text, "giantleap_peak_memory_bytes", **peak) == 5000, "the gauge of a process that has ended is gone"
    assert value(text, "giantleap_images_total", bundle="pocket", scale="2") == 7, "what it counted is not"


def test_live_gauges_of_running_processes_are_kept(tmp_path: Path) -> None:
    mine, other = tmp_path / f"gauge_livemax_{os.getpid()}.db", tmp_path / "counter_999999999.db"
    for path in (mine, other):
        path.touch()
    threads = [threading.Thread(target=remove_dead_gauges, args=(tmp_path,)) for _ in range(4)]
    dead = tmp_path / "gauge_livemostrecent_999999999.db"
    dead.touch()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mine.exists() and other.exists() and not dead.exists()
