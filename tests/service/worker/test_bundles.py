"""Bundles on demand with routes that compute nothing: what is loaded when, and what becomes of jobs meanwhile."""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from giantleap.models.bundle.bundle import Bundle, BundleError, read_bundle
from giantleap.service.errors import BadConfiguration
from giantleap.service.jobqueue.claims import Claim, LoadedBundles
from giantleap.service.jobs.grid import LatentGrid
from giantleap.service.settings import POCKET_BUNDLE, read_settings
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.worker.bundles import BundleCache
from giantleap.service.worker.watchdog import Watchdog
from tests.service.fakes import FakeConsumer, FakeRoute, make_claim, open_worker
from tests.waiting import wait_until

SIZE_BYTES = 10
CPU = torch.device("cpu")


@dataclass
class Opener:
    """Opens routes; `on_open` is called with the name of the bundle meanwhile, and may raise."""

    on_open: Callable[[str], object] = lambda name: None
    opened: list[str] = field(default_factory=list)
    routes: list["weakref.ref[FakeRoute]"] = field(default_factory=list)

    def __call__(self, bundle: Any) -> Any:
        self.opened.append(bundle.name)
        route = FakeRoute(name=bundle.name)
        self.routes.append(weakref.ref(route))
        self.on_open(bundle.name)
        return route


def rename(bundle: Bundle, name: str) -> Bundle:
    about = bundle.about.model_copy(update={"name": name})
    return replace(bundle, descriptor=bundle.descriptor.model_copy(update={"bundle": about}))


def make_cache(opener: Opener, names: str = "abcd", budget: int | None = 2) -> BundleCache:
    """Bundles of one size on a budget of so many; none is loaded."""
    pocket = read_bundle(POCKET_BUNDLE)
    bundles = {name: rename(pocket, name) for name in names}
    budget_bytes = None if budget is None else budget * SIZE_BYTES
    cache = BundleCache(bundles, opener, CPU, budget_bytes, Metrics(CollectorRegistry()))
    cache.grids = {name: LatentGrid(8, 4) for name in names}
    cache.sizes_bytes = dict.fromkeys(names, SIZE_BYTES)
    return cache


def claims_of(bundles: str) -> list[Claim]:
    return [make_claim(f"{number}-{name}", bundle=name) for number, name in enumerate(bundles)]


def run(consumer: FakeConsumer, cache: BundleCache, stop: threading.Event, **rest: Any) -> Metrics:
    """Run a worker until its claims have ended."""
    consumer.on_empty = stop.set
    worker, metrics = open_worker(None, consumer, read_settings(), bundles=cache, stop=stop, **rest)
    worker.run()
    return metrics


def use(cache: BundleCache, name: str) -> None:
    if name not in cache.loaded:
        cache.make_room(name)
        cache.load(name)
    cache.use(name)


@pytest.mark.parametrize(
    ("used", "loaded"),
    [("a", "a"), ("ab", "ab"), ("abc", "bc"), ("abac", "ac"), ("abcabc", "bc"), ("abcd", "cd"), ("abbac", "ac")],
)
def test_the_bundles_used_last_stay(used: str, loaded: str) -> None:
    cache = make_cache(Opener())
    for name in used:
        use(cache, name)
    assert "".join(cache.loaded) == loaded


def test_the_budget_holds_at_every_moment_and_what_went_is_freed() -> None:
    opener, alive = Opener(), []
    opener.on_open = lambda name: alive.append(sum(route() is not None for route in opener.routes))
    cache = make_cache(opener)
    for name in "abcdabcd":
        use(cache, name)
    assert alive == [1, 2, 2, 2, 2, 2, 2, 2], "room was made before each load"


def test_a_bundle_of_another_size_displaces_as_many_as_it_needs_to() -> None:
    cache = make_cache(Opener(), budget=3)
    cache.sizes_bytes["d"] = 2 * SIZE_BYTES
    for name in "abcd":
        use(cache, name)
    assert cache.loaded == ("c", "d")


def test_without_a_budget_nothing_goes() -> None:
    cache = make_cache(Opener(), budget=None)
    for name in "abcd":
        use(cache, name)
    assert cache.holds_all and cache.reserved_bytes == 4 * SIZE_BYTES


def test_the_reserve_is_the_budget_or_what_all_bundles_take() -> None:
    assert [make_cache(Opener(), budget=n).reserved_bytes // SIZE_BYTES for n in (2, 4, 9)] == [2, 4, 4]


def test_a_bundle_over_the_budget_stops_the_start() -> None:
    class Heavy(FakeRoute):
        weights = torch.zeros(0)

    cache = BundleCache({"a": read_bundle(POCKET_BUNDLE)}, lambda _: Heavy(), CPU, 1000, Metrics(CollectorRegistry()))  # type: ignore[arg-type, return-value]

    def warm(route: Any) -> None:
        route.weights = torch.zeros(300)

    with pytest.raises(BadConfiguration, match=r"bundle a takes 1200 bytes once loaded, .* 1000: raise it"):
        cache.measure("a", warm)


def test_jobs_of_loaded_bundles_run_first_then_one_other_is_loaded_and_the_rest_goes_back() -> None:
    opener, stop = Opener(), threading.Event()
    cache = make_cache(opener)
    use(cache, "a")
    consumer = FakeConsumer(claims_of("bacba"))
    metrics = run(consumer, cache, stop)
    assert list(consumer.finished) == ["1-a", "4-a", "0-b", "3-b"] and consumer.released_ids == ["2-c"]
    assert "load" not in consumer.stages["1-a"] and consumer.stages["0-b"]["load"] > 0
    loading = [(job, data) for job, name, data in consumer.events if name == "loading"]
    assert loading == [("0-b", {"bundle": "b"}), ("3-b", {"bundle": "b"})]
    assert consumer.announced == [("a",), ("a", "b")]
    assert metrics.registry.get_sample_value("giantleap_jobs_total", {
        "kind": "generate", "bundle": "b", "status": "succeeded"}) == 2  # fmt: skip


def test_for_a_time_after_a_load_jobs_of_loaded_bundles_go_first() -> None:
    cache, stop = make_cache(Opener()), threading.Event()
    consumer = FakeConsumer(claims_of("b"))
    run(consumer, cache, stop)
    assert consumer.preferences == [LoadedBundles((), True), LoadedBundles(("b",), True)]
    late = FakeConsumer()
    settings = read_settings(loaded_first_s=0)
    worker, _ = open_worker(None, late, settings, bundles=cache, stop=(stop := threading.Event()))
    late.on_empty = stop.set
    worker.run()
    assert late.preferences == [LoadedBundles(("b",), False)]


def test_a_load_that_fails_is_a_retryable_error_and_the_others_are_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    opener, stop = Opener(), threading.Event()

    def fail(name: str) -> None:
        if name == "c":
            raise BundleError("secret.safetensors differs from its digest")

    opener.on_open = fail
    cache = make_cache(opener, budget=3)
    use(cache, "a")
    consumer = FakeConsumer(claims_of("ccab"))
    run(consumer, cache, stop)
    assert set(consumer.finished) == {"2-a"}, "the claim of b went back"
    assert set(consumer.failed) == {"0-c", "1-c"} and consumer.released_ids == ["3-b"]
    error = consumer.failed["0-c"]
    assert (error.code, error.retryable) == ("bundle_not_loaded", True)
    assert error.detail.startswith("bundle c could not be loaded (BundleError") and "secret" not in error.detail
    assert "differs from its digest" in caplog.text and cache.loaded == ("a",)


def test_a_load_that_fails_leaves_nothing_in_memory(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", "giantleap.service.worker.loading")  # a record would hold the traceback

    def fail(name: str) -> None:
        raise BundleError("its digest differs")

    opener, alive = Opener(fail), list[object]()
    consumer = FakeConsumer(claims_of("a"))
    consumer.on_fail = lambda: alive.extend(route() for route in opener.routes)
    run(consumer, make_cache(opener), threading.Event())
    assert alive == [None], "it is gone before its job fails"


@pytest.mark.parametrize("ended", ["canceled", "released"])
def test_a_job_is_canceled_or_given_back_while_its_bundle_loads(ended: str) -> None:
    """The load goes on until the watch has ended the jobs: a cancel and a drain need not wait for it."""
    consumer, stop = FakeConsumer(claims_of("cc")), threading.Event()
    ids = consumer.canceled_ids if ended == "canceled" else consumer.released_ids

    def wait(name: str) -> None:
        if ended == "canceled":
            consumer.cancel_after_polls = {"0-c": consumer.polls, "1-c": consumer.polls}
        else:
            stop.set()
        wait_until(lambda: len(ids) == 2, "the jobs ended during the load")

    cache = make_cache(Opener(wait))
    run(consumer, cache, stop)
    assert ids == ["0-c", "1-c"] and not consumer.finished
    assert cache.loaded == ("c",), "the load itself ends well"


def test_one_job_of_two_is_canceled_during_the_load_and_the_other_runs() -> None:
    consumer, stop = FakeConsumer(claims_of("cc")), threading.Event()

    def wait(name: str) -> None:
        consumer.cancel_after_polls = {"0-c": consumer.polls}
        wait_until(lambda: consumer.canceled_ids, "the job ended during the load")

    run(consumer, make_cache(Opener(wait)), stop)
    assert consumer.canceled_ids == ["0-c"] and set(consumer.finished) == {"1-c"}


def test_a_load_that_hangs_ends_the_process() -> None:
    ended: list[int] = []
    now_s = [0.0]
    watchdog = Watchdog(60.0, end=ended.append, clock=lambda: now_s[0])

    def hang(name: str) -> None:
        assert not watchdog.check()
        now_s[0] += 61.0
        assert watchdog.check()

    stop = threading.Event()
    run(FakeConsumer(claims_of("a")), make_cache(Opener(hang)), stop, watchdog=watchdog)
    assert ended == [75]
    now_s[0] += 1000.0
    assert not watchdog.check(), "nothing runs any more"


def test_a_lost_device_ends_the_worker() -> None:
    def lose(name: str) -> None:
        raise torch.AcceleratorError("the context is gone")

    with pytest.raises(torch.AcceleratorError):
        run(FakeConsumer(claims_of("a")), make_cache(Opener(lose)), threading.Event())


def test_the_names_of_loaded_bundles_are_bounded_metrics() -> None:
    cache = make_cache(Opener())
    for name in "abc":
        use(cache, name)
    registry = cache._metrics.registry

    def values(metric: str, names: Sequence[str] = "abc") -> list[float | None]:
        return [registry.get_sample_value(f"giantleap_bundle_{metric}", {"bundle": name}) for name in names]

    assert values("loaded") == [0, 1, 1] and values("evictions_total", "a") == [1]
    assert values("load_seconds_count") == [1, 1, 1]
