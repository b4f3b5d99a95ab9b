"""Runs the checks in order against an installation: gathers facts, passes them to the checks, yields the findings.

What depends on something that failed is skipped, with the reason. `giantleap.service.doctor.findings` has the form.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final
from urllib.parse import quote, urlsplit

import httpx

from giantleap.service.auth import is_loopback
from giantleap.service.doctor import access, address, hooks, host, images, publishing, redis_server, scrape, workers
from giantleap.service.doctor.findings import Finding, Level, skipped
from giantleap.service.doctor.probe import Answer, Service
from giantleap.service.doctor.requests import are_models, to_latent_request, to_long_body, to_openai_body, to_small_body
from giantleap.service.settings import Settings

_POLL_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Options:
    """Options of an examination.

    Args:
        url: Address of the service.
        settings: Key, Redis and what else the service and this command share.
        webhook_url: A receiver of the operator; None: one on this machine.
        timeout_s: How long a test job may take.
    """

    url: str
    settings: Settings
    webhook_url: str | None = None
    timeout_s: float = 120.0

    @property
    def key(self) -> str | None:
        """The API key."""
        secret = self.settings.api_key
        return None if secret is None else secret.get_secret_value()

    def secrets(self) -> tuple[str, ...]:
        """What no line may hold: the key, and what a URL has before its host."""
        userinfos = (urlsplit(url).netloc.rpartition("@")[0] for url in (self.url, self.settings.redis_url or ""))
        parts = {part for each in userinfos for part in (each, each.partition(":")[2])}
        return tuple(sorted({self.key or "", *parts} - {""}, key=len, reverse=True))


def examine(options: Options) -> Iterator[Finding]:
    """Every finding, as it is made; none holds a secret."""
    secrets = options.secrets()
    with httpx.Client() as client:
        service = Service(client, options.url, options.key)
        for finding in _Examination(service, options).run():
            yield finding.without(secrets)


class _Examination:
    """Runs the checks in order and keeps results that later ones need."""

    def __init__(self, service: Service, options: Options) -> None:
        self._service = service
        self._options = options
        self._version: str | None = None
        self._sums: scrape.Sums = {}
        self._models: list[dict[str, Any]] = []
        self._lacking: tuple[str, ...] = ()
        self._live_workers = 0

    def run(self) -> Iterator[Finding]:
        """All checks."""
        settings = self._options.settings
        live = self._service.send("GET", "/livez", with_key=False)
        reached = address.check_address(self._options.url, live)
        yield reached
        ready = Answer(0)
        if reached.level is Level.OK:
            ready = self._service.send("GET", "/readyz", with_key=False)
            yield from self._check_front(live, ready)
        else:
            yield skipped("service", "nothing else is asked of the service", "correct what is above")
        facts = None
        if settings.redis_url is None:
            yield from address.check_storage_warnings(ready)
        else:
            facts = redis_server.read_redis(settings.redis_url, settings)
            yield from self._check_redis(facts)
        if self._models:
            yield from self._check_workers(facts)
            yield from self._check_jobs()
            yield from self._check_webhook()
        local = is_loopback(urlsplit(self._options.url).hostname or "")
        yield host.check_disk(settings.data_dir, local)
        yield host.check_results(settings, local)

    def _check_front(self, live: Answer, ready: Answer) -> Iterator[Finding]:
        service = self._service
        yield address.check_transport(self._options.url)
        about = service.send("GET", "/version", with_key=False)
        own = version("giantleap")
        yield address.check_version(about, own)
        self._version = about.fields.get("version")
        yield address.check_clock(live)
        yield from address.check_readiness(ready)
        with_key = service.send("GET", "/models")
        yield access.check_key(service.has_key, service.send("GET", "/models", with_key=False), with_key)
        if with_key.status != 200 or not are_models(with_key.document):
            yield skipped("jobs", "metrics, workers, images and webhooks need /models", "correct what is above")
            return
        self._models = with_key.document
        answers = {
            "generate": service.send("POST", "/generate", json={}),
            "upscale": service.send("POST", "/upscale"),
            "metrics": service.send("GET", "/metrics"),
        }
        self._lacking = access.lacking_scopes(answers)
        if service.has_key:
            yield access.check_scopes(answers)
        if "metrics" in self._lacking:
            yield access.skip_for_scope("metrics", "metrics")
        else:
            self._sums = scrape.read_sums(answers["metrics"])
            yield scrape.check_metrics(answers["metrics"], self._sums)

    def _check_redis(self, facts: redis_server.RedisFacts | Finding) -> Iterator[Finding]:
        if isinstance(facts, Finding):
            yield facts
            return
        budget_bytes = self._sums.get("blob_budget_bytes", self._options.settings.blob_budget_bytes)
        yield from redis_server.check_redis(facts, int(budget_bytes))

    def _check_workers(self, facts: redis_server.RedisFacts | Finding | None) -> Iterator[Finding]:
        """From Redis if it was read, else from the metrics."""
        if isinstance(facts, redis_server.RedisFacts):
            queue = workers.to_queue_facts(facts.stats)
            self._live_workers = queue.live_workers
            yield from workers.check_queue(queue)
            yield from workers.check_devices(facts.devices, [each["name"] for each in self._models], self._version)
            return
        seen = list(scrape.to_queue_facts(self._sums))
        if not seen:
            yield skipped("workers", "workers and queue are not seen", "give --redis-url, or a key of scope metrics")
            self._live_workers = 1  # a test job shows whether there is one
        for queue in seen:
            self._live_workers = queue.live_workers
            yield from workers.check_queue(queue)
        yield workers.skip_devices()

    def _check_jobs(self) -> Iterator[Finding]:
        if "upscale" in self._lacking:
            yield access.skip_for_scope("body size", "upscale")
            yield access.skip_for_scope("latent", "upscale")
        else:
            yield from self._check_latent()
        if "generate" in self._lacking:
            yield access.skip_for_scope("image", "generate")
            return
        small = to_small_body(self._models[0])
        submitted = images.submit(self._service, small)
        refused = images.check_submitted(submitted)
        if refused is not None:
            yield refused
            return
        yield from self._check_events(submitted)
        if self._live_workers:
            yield from self._check_image(submitted, small)
        else:
            images.cancel(self._service, submitted.fields["id"])
            yield skipped(
                "image", "no worker would generate it: image, marks, URLs and times are not known", "start a worker"
            )

    def _check_events(self, submitted: Answer) -> Iterator[Finding]:
        stream = publishing.read_stream(self._service, submitted.fields)
        if stream.ended and not stream.reason:
            long_job = images.submit(self._service, to_long_body(self._models[0]))
            stream = publishing.watch_long_job(self._service, long_job)
        yield publishing.check_stream(stream)

    def _check_image(self, submitted: Answer, small: dict[str, Any]) -> Iterator[Finding]:
        service, job_id = self._service, submitted.fields["id"]
        job = images.wait_for_end(service, job_id, self._options.timeout_s)
        failed = images.check_ended(job, self._options.timeout_s)
        if failed is not None:
            yield failed
            return
        published = service.get_published(job.fields["result_url"])
        reached = publishing.check_result_url(job.fields["result_url"], published)
        yield reached
        file = published if reached.level is Level.OK else service.send("GET", f"/jobs/{quote(job_id)}/result")
        facts = images.ImageFacts(job, file, small["width"], small["height"])
        yield from images.check_image(facts, self._options.settings)
        yield images.check_stages(job)
        body, timeout_s = to_openai_body(self._models[0]), self._options.timeout_s
        answer = service.send("POST", "/v1/images/generations", json=body, timeout=timeout_s)
        yield publishing.check_absolute_url(self._options.url, answer)

    def _check_latent(self) -> Iterator[Finding]:
        size_bytes = self._options.settings.max_body_bytes
        yield publishing.check_body_limit(publishing.send_largest_body(self._service, size_bytes), size_bytes)
        request = to_latent_request(self._models[0])
        if request is None:
            yield skipped("latent", "the first bundle enlarges no latents", "serve one that does first")
        elif not self._live_workers:
            yield skipped("latent", "no worker would enlarge it", "start a worker")
        else:
            answer = images.upscale_latent(self._service, request, self._options.timeout_s)
            yield images.check_latent(answer, request.shape)

    def _check_webhook(self) -> Iterator[Finding]:
        """A job that is canceled at once needs no worker, and its end is delivered all the same."""
        if "generate" in self._lacking:
            yield access.skip_for_scope("webhook", "generate")
        elif self._options.webhook_url is not None:
            yield self._send_webhook(self._options.webhook_url)
        elif not is_loopback(urlsplit(self._options.url).hostname or ""):
            yield skipped("webhook", "the service is on another machine", "give --webhook-url with a receiver")
        else:
            secret = self._options.settings.webhook_secret
            with hooks.open_receiver() as receiver:
                refused = self._end_job(receiver.url, given=False)
                if refused is None:
                    receiver.arrived.wait(hooks.WITHIN_S)
                    refused = hooks.check_received(receiver, None if secret is None else secret.get_secret_value())
            yield refused

    def _send_webhook(self, url: str) -> Finding:
        refused = self._end_job(url, given=True)
        if refused is not None:
            return refused
        before = after = self._sums
        deadline_s = time.monotonic() + hooks.WITHIN_S
        while before and time.monotonic() < deadline_s and not hooks.has_counted(before, after):
            time.sleep(_POLL_S)
            after = scrape.read_sums(self._service.send("GET", "/metrics")) or after
        return hooks.check_counted(url, before, after)

    def _end_job(self, webhook_url: str, *, given: bool) -> Finding | None:
        answer = images.submit(self._service, to_small_body(self._models[0]), webhook=webhook_url)
        refused = hooks.check_accepted(answer, given)
        if refused is None:
            images.cancel(self._service, answer.fields["id"])
        return refused
