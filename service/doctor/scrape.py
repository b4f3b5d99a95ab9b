"""Reads /metrics, and checks that it has the metrics of the alert rules."""

from collections.abc import Iterator
from typing import Final

from giantleap.service.doctor.findings import Finding, fail, ok, warn
from giantleap.service.doctor.probe import Answer
from giantleap.service.doctor.workers import QueueFacts

_EXPECTED: Final = ("build_info", "http_requests", "queue_depth", "queue_limit", "queue_processing", "workers_live")
Sums = dict[str, float]


def read_sums(answer: Answer) -> Sums:
    """The sum of each metric over its labels, by name without prefix; webhooks by outcome too. Empty: none."""
    from prometheus_client.parser import text_string_to_metric_families

    sums: Sums = {}
    if answer.status != 200:
        return sums
    try:
        for family in text_string_to_metric_families(answer.body.decode()):
            name = family.name.removeprefix("giantleap_")
            sums[name] = sum(sample.value for sample in family.samples)
            for sample in family.samples:
                if "outcome" in sample.labels:
                    sums[f"{name} {sample.labels['outcome']}"] = sample.value
    except ValueError:
        return {}
    return sums


def check_metrics(answer: Answer, sums: Sums) -> Finding:
    """Whether the metrics can be scraped and are those of Giantleap."""
    if answer.status != 200 or not sums:
        return warn(
            "metrics",
            f"/metrics: {answer.explain()}",
            "let the proxy pass /metrics, or give --url the API's own address if it is closed on purpose",
        )
    missing = [name for name in _EXPECTED if name not in sums]
    if missing and not sums.get("queue_reachable"):
        return warn("metrics", "the API does not reach Redis, so the metrics of the queue are absent", "start Redis")
    if missing:
        names = ", ".join(f"giantleap_{name}" for name in missing)
        return fail("metrics", f"/metrics lacks {names}", "let the proxy pass /metrics of the API itself")
    return ok("metrics", f"/metrics has {len(sums)} names")


def to_queue_facts(sums: Sums) -> Iterator[QueueFacts]:
    """The queue as the metrics have it; nothing where they do not."""
    if "workers_live" in sums:
        yield QueueFacts(
            live_workers=int(sums["workers_live"]),
            waiting=int(sums.get("queue_depth", 0)),
            processing=int(sums["queue_processing"]),
            oldest_age_s=sums["queue_oldest_age_seconds"],
            dead_lettered=int(sums["queue_dead_lettered"]),
        )
