"""The Prometheus metrics of the service: one `Metrics` per process, created once and passed down.

The processes of a host may share `PROMETHEUS_MULTIPROC_DIR` (set before Python starts); then `Metrics.render` of any
process renders the metrics of all. No process counts the state of the queue: it is read from Redis at each scrape and
passed to `render`. Label values are bounded: never a prompt, a job id or a caller.
"""

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from giantleap.models.filters.image_filter import FilterOutcome
from giantleap.service.jobqueue.keys import FINISH, to_bundle
from giantleap.service.jobs.job import QueueStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_RESTARTS_FILE = "restarts.json"
_ENDS = ("crashed", "hung", "killed", "stopped")
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Every metric of one process.

    Args:
        registry: Of the metrics; by default a new one.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        disable_created_metrics()  # a timestamp per series, which multiprocess mode does not support anyway
        self.registry = registry if registry is not None else CollectorRegistry()
        self._rejections = self._counter("rejections", "Requests refused, by reason.", "reason")
        self._work = self._counter(
            "megapixel_steps",
            "Work of accepted jobs in megapixel-steps, the unit of the keys' budgets.",
            "kind",
            "bundle",
        )
        self._http_requests = self._counter("http_requests", "HTTP responses sent.", "route", "method", "code")
        self._http_seconds = self._histogram("http_request_duration_seconds", "Time to respond.", "route", "method")
        self._http_open = self._gauge("http_requests_open", "HTTP requests in progress.", "livesum")

        self._jobs = self._counter("jobs", "Jobs that reached a final state.", "kind", "bundle", "status")
        self._job_seconds = self._histogram(
            "job_duration_seconds", "Time from acceptance to the final state.",
            "kind", "bundle", "method", "scale", "status",
        )  # fmt: skip
        self._wait_seconds = self._histogram(
            "queue_wait_seconds", "Time from acceptance to the first claim.", "priority"
        )
        self._stage_seconds = self._histogram(
            "stage_duration_seconds", "Time of one stage of one batch, device synchronized at both ends.",
            "stage", "bundle", "method", "scale", "engine", "warmup",
        )  # fmt: skip
        self._images = self._counter("images", "Images produced.", "bundle", "scale")
        self._pixels = self._counter("pixels", "Pixels of the images produced.", "bundle", "scale")
        self._batch_items = self._histogram("batch_items", "Images in one batch.", "kind", buckets=BATCH_BUCKETS)
        self._fenced = self._counter("fenced", "Finished jobs whose result was dropped because the lease was lost.")
        self._retries = self._counter("retries", "Jobs handed back for another attempt.", "bundle")
        self._failures = self._counter("job_failures", "Failed attempts, by error code.", "bundle", "code")
        self._filtered = self._counter(
            "filtered_images", "Final images that a filter checked, by outcome.", "filter", "outcome"
        )
        self._webhooks = self._counter("webhooks", "Attempts to deliver a webhook, by outcome.", "outcome")

        self._make_bundle_metrics()
        self._make_device_metrics()
        self._protocol = self._gauge(
            "protocol_seconds", "Timing protocol of the paper at start: batch 1, after warm-ups; not from traffic.",
            "livemostrecent", "bundle", "method", "scale", "image_px", "stage", "statistic",
        )  # fmt: skip
        self._make_process_metrics()

    def _make_process_metrics(self) -> None:
        self._build = self._gauge(
            "build_info", "Versions of Giantleap and Python; always 1.", "livemax", "version", "python"
        )
        self._engine = self._gauge(
            "engine_info",
            "Engine, decoder, device and data type of a bundle; always 1.",
            "livemax",
            "bundle",
            "engine",
            "decoder",
            "device",
            "dtype",
            "torch",
        )
        self._started = self._gauge(
            "process_start_time_seconds",
            "Start of the newest process of a role, Unix time.",
            "livemostrecent",
            "role",
        )
        self._build.labels(version("giantleap"), platform.python_version()).set(1)

    def _make_bundle_metrics(self) -> None:
        self._decoded = self._counter("decoded_images", "Images decoded, by way, warm-ups included.", "bundle", "way")
        self._load_seconds = self._histogram("bundle_load_seconds", "Time to load a bundle.", "bundle")
        self._load_failures = self._counter("bundle_load_failures", "Failed loads of a bundle.", "bundle")
        self._evictions = self._counter("bundle_evictions", "Bundles dropped from memory to load another.", "bundle")
        self._loaded = self._gauge(
            "bundle_loaded", "Workers of this host that have the bundle in memory.", "livesum", "bundle"
        )
        self._bundle_bytes = self._gauge("bundle_bytes", "Measured memory of a loaded bundle.", "livemax", "bundle")

    def _make_device_metrics(self) -> None:
        self._busy_seconds = self._counter(
            "device_busy_seconds", "Time in which the device ran stages (all but load and encode).", "device"
        )
        self._peak_bytes = self._gauge(
            "peak_memory_bytes",
            "Peak memory of the last batch; `source` is what was measured.",
            "livemax",
            "device",
            "source",
        )
        self._device_bytes = self._gauge("device_memory_bytes", "Device memory that jobs may use.", "livemax", "device")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"giantleap_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS_BUCKETS) -> Histogram:
        return Histogram(f"giantleap_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _gauge(self, name: str, text: str, mode: str, *labels: str) -> Gauge:
        return Gauge(f"giantleap_{name}", text, labels, multiprocess_mode=mode, registry=self.registry)  # type: ignore[arg-type]

    def set_started(self, role: str) -> None:
        """Records the start of this process, `api` or `worker`."""
        self._started.labels(role).set(time.time())

    def open_http(self, change: int) -> None:
        """Adds `change` to the number of open HTTP requests."""
        self._http_open.inc(change)

    def count_rejection(self, reason: str) -> None:
        """Counts a refused request; `reason` is the code of a `GiantleapError`."""
        self._rejections.labels(reason).inc()

    def count_work(self, kind: str, bundle: str, pixel_steps: int) -> None:
        """Counts the work of a job that was accepted."""
        self._work.labels(kind, bundle).inc(pixel_steps / 1e6)

    def observe_http(self, route: str, method: str, code: int, duration_s: float) -> None:
        """Records a response; `route` is the path template, never the path."""
        self._http_requests.labels(route, method, str(code)).inc()
        self._http_seconds.labels(route, method).observe(duration_s)

    def observe_wait(self, priority: str, wait_s: float) -> None:
        """Records the first claim of a job."""
        self._wait_seconds.labels(priority).observe(wait_s)

    def observe_job(self, kind: str, bundle: str, method: str, scale: float, status: str, duration_s: float) -> None:
        """Records a job that reached a final state `duration_s` after it was accepted."""
        self._jobs.labels(kind, bundle, status).inc()
        self._job_seconds.labels(kind, bundle, method, str(scale), status).observe(duration_s)

    def observe_stages(
        self,
        bundle: str,
        method: str,
        scale: float,
        engine: str,
        stages_s: Mapping[str, float],
        *,
        warmup: bool = False,
    ) -> None:
        """Records a batch that ran; `stages_s` maps each stage that ran to its seconds."""
        for stage, duration_s in stages_s.items():
            labels = (stage, bundle, method, str(scale), engine, str(warmup).lower())
            self._stage_seconds.labels(*labels).observe(duration_s)

    def count_busy(self, device: str, busy_s: float) -> None:
        """Counts time in which stages ran on a device."""
        self._busy_seconds.labels(device).inc(busy_s)

    def observe_batch(self, kind: str, items: int) -> None:
        """Records a batch of `items` images that is about to run."""
        self._batch_items.labels(kind).observe(items)

    def count_images(self, bundle: str, scale: float, images: int, pixels: int) -> None:
        """Counts stored images; `pixels` is their sum."""
        self._images.labels(bundle, str(scale)).inc(images)
        self._pixels.labels(bundle, str(scale)).inc(pixels)

    def count_decoded(self, bundle: str, way: str, images: int) -> None:
        """Counts decoded images; `way` is a `giantleap.models.vae.autoencoder.DecodeWay`."""
        self._decoded.labels(bundle, way).inc(images)

    def count_fenced(self) -> None:
        """Counts a finished job that was dropped because its lease was lost."""
        self._fenced.inc()

    def count_retry(self, bundle: str) -> None:
        """Counts a job that failed with a retryable error."""
        self._retries.labels(bundle).inc()

    def count_failure(self, bundle: str, code: str) -> None:
        """Counts a failed attempt; `code` is that of a `GiantleapError` or `engine_error`."""
        self._failures.labels(bundle, code).inc()

    def count_filtered(self, name: str, outcome: FilterOutcome) -> None:
        """Counts a final image that a filter of the settings saw."""
        self._filtered.labels(name, outcome).inc()

    def observe_load(self, bundle: str, load_s: float) -> None:
        """Records a bundle that was loaded."""
        self._load_seconds.labels(bundle).observe(load_s)
        self._loaded.labels(bundle).set(1)

    def count_load_failure(self, bundle: str) -> None:
        """Counts a load that failed."""
        self._load_failures.labels(bundle).inc()

    def count_eviction(self, bundle: str) -> None:
        """Counts a bundle that was dropped from memory."""
        self._evictions.labels(bundle).inc()
        self._loaded.labels(bundle).set(0)

    def set_bundle_size(self, bundle: str, size_bytes: int) -> None:
        """Sets what a loaded bundle takes."""
        self._bundle_bytes.labels(bundle).set(size_bytes)
        self._load_failures.labels(bundle).inc(0)  # an increase needs the value before the first failure

    def set_device_memory(self, device: str, memory_bytes: int) -> None:
        """Sets the memory that jobs may use on the device of this worker."""
        self._device_bytes.labels(device).set(memory_bytes)

    def count_webhook(self, outcome: str) -> None:
        """Counts an attempt to post a webhook; `outcome` is delivered, retried (later) or dropped."""
        self._webhooks.labels(outcome).inc()

    def set_peak_memory(self, device: str, source: str, peak_bytes: int) -> None:
        """Sets the peak memory of the last batch; `source` is `cuda_allocated` or `process_rss`."""
        self._peak_bytes.labels(device, source).set(peak_bytes)

    def set_protocol(
        self, bundle: str, method: str, scale: float, image_px: str, stage: str, statistic: str, value_s: float
    ) -> None:
        """Sets one figure of the paper's timing protocol; `image_px` is the final size, as in `1024x1024`."""
        self._protocol.labels(bundle, method, str(scale), image_px, stage, statistic).set(value_s)

    def set_engine(self, bundle: str, engine: str, decoder: str, device: str, dtype: str) -> None:
        """Records the engine and the decoder (`plain` or `compiled`) that run a bundle in this process."""
        self._engine.labels(bundle, engine, decoder, device, dtype, version("torch")).set(1)

    def render(self, stats: QueueStats | None) -> bytes:
        """All metrics of this host in the text exposition format (`CONTENT_TYPE`).

        Effects: with `PROMETHEUS_MULTIPROC_DIR`, removes the live gauges of processes that have ended.

        Args:
            stats: The queue now; None if Redis is unavailable, which a metric then shows.
        """
        shared_dir = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if shared_dir is None:
            own = generate_latest(self.registry)
        else:
            remove_dead_gauges(Path(shared_dir))
            shared = CollectorRegistry()
            MultiProcessCollector(shared, path=shared_dir)
            own = generate_latest(shared)
        queue = CollectorRegistry()
        queue.register(QueueCollector(stats))
        if shared_dir is not None:
            queue.register(RestartCollector(Path(shared_dir)))
        return own + generate_latest(queue)


class QueueCollector(Collector):
    """The state of the queue, as read from Redis for one scrape."""

    def __init__(self, stats: QueueStats | None) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """The metrics of the queue."""
        stats = self._stats
        yield _family("queue_reachable", "1 when Redis answered this scrape.", 0 if stats is None else 1)
        if stats is None:
            return
        yield from _depths(stats)
        yield _family("queue_oldest_age_seconds", "Age of the oldest waiting job.", stats.oldest_age_s)
        yield _family("queue_limit", "Maximum jobs queued and running at once.", stats.limit)
        yield _family("queue_processing", "Jobs claimed by a worker.", stats.processing)
        yield _family("queue_delayed", "Jobs waiting for a retry.", stats.delayed)
        yield _family("queue_dead_lettered", "Jobs in the dead-letter stream.", stats.dead_lettered)
        yield _family("workers_live", "Workers that are ready and alive.", stats.live_workers)
        by_stage = GaugeMetricFamily(
            "giantleap_stage_workers_live", "Live workers that run a stage.", labels=("stage",)
        )
        for stage in ("generate", "upscale", "decode"):
            others = stats.decode_workers if stage == "generate" else stats.generate_workers
            by_stage.add_metric((stage,), stats.live_workers - others)
        yield by_stage
        yield _family("blob_bytes", "Bytes of inputs and results in Redis.", stats.blob_bytes)
        yield _family("blob_budget_bytes", "Maximum bytes of inputs and results in Redis.", stats.blob_budget_bytes)


def _depths(stats: QueueStats) -> Iterator[Metric]:
    """Waiting jobs by bundle and priority: all of them, and those in the finish queues."""
    labels = ("bundle", "priority")
    depth = GaugeMetricFamily("giantleap_queue_depth", "Jobs waiting to be claimed.", labels=labels)
    finish = GaugeMetricFamily(
        "giantleap_finish_queue_depth",
        "Jobs in `giantleap_queue_depth` that wait only for upscale and decode.",
        labels=labels,
    )
    for bundle, priority in sorted({(to_bundle(queue), priority) for queue, priority in stats.queued}):
        left = stats.queued.get((f"{bundle}{FINISH}", priority), 0)
        depth.add_metric((bundle, str(priority)), stats.queued.get((bundle, priority), 0) + left)
        finish.add_metric((bundle, str(priority)), left)
    yield depth
    yield finish


class RestartCollector(Collector):
    """How often the supervisor of this host restarted its processes; nothing without a supervisor."""

    def __init__(self, shared_dir: Path) -> None:
        self._path = shared_dir / _RESTARTS_FILE

    def collect(self) -> Iterator[Metric]:
        """The counters of restarts."""
        if not self._path.exists():
            return
        restarts: dict[str, dict[str, int]] = json.loads(self._path.read_text())
        for role, text in (("worker", "Workers"), ("api", "API processes")):
            family = CounterMetricFamily(
                f"giantleap_{role}_restarts",
                f"{text} of this host that exited unexpectedly, by reason.",
                labels=("reason",),
            )
            for reason in _ENDS:  # also zeros: a rate needs the value before the first increase
                family.add_metric((reason,), restarts[role].get(reason, 0))
            yield family


def write_restarts(shared_dir: Path, restarts: Mapping[str, Mapping[str, int]]) -> None:
    """Writes the restarts by role and reason, for every process of this host to read."""
    written = shared_dir / f"{_RESTARTS_FILE}.new"
    written.write_text(json.dumps(restarts))
    written.replace(shared_dir / _RESTARTS_FILE)


def _family(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"giantleap_{name}", text, value=value)


def remove_dead_gauges(shared_dir: Path) -> None:
    """Removes the live gauges of processes that have ended; counters and histograms stay, so that sums stay right.

    Effects: unlinks `gauge_live*_<pid>.db`; safe to repeat and to run in several processes at once.
    """
    for path in shared_dir.glob("gauge_live*_*.db"):
        if not _is_running(int(path.stem.rpartition("_")[2])):
            with suppress(FileNotFoundError):  # another process was quicker
                path.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
