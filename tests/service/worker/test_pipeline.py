"""While the device works the next batch is claimed and the last one is encoded and stored; nothing else changes."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from giantleap.models.pixels.image_formats import DEFAULT_FILE, FileOptions, ImageFormat
from giantleap.models.provenance.marker import ImageMarker
from giantleap.models.provenance.xmp import Origin
from giantleap.service.jobqueue.claims import Claim, LoadedBundles
from giantleap.service.settings import read_settings
from giantleap.service.worker.loop import MAX_FINISHING
from tests.service.fakes import GENERATE, FakeConsumer, FakeRoute, make_claim, open_worker

WITHIN_S = 60.0


def wait_for(event: threading.Event) -> None:
    assert event.wait(WITHIN_S)


@dataclass
class Gate:
    """A place in a thread's way: `reached` says that it came, and it goes on once `opened` is set."""

    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def pass_through(self) -> None:
        self.reached.set()
        wait_for(self.opened)


@dataclass
class WatchedConsumer(FakeConsumer):
    """Says what it claimed ahead, and calls `on_complete` with each job that is stored."""

    on_empty: Callable[[], None] = lambda: time.sleep(0.01)
    claimed_ahead: list[Sequence[str]] = field(default_factory=list)
    has_claimed_ahead: threading.Event = field(default_factory=threading.Event)
    on_complete: Callable[[str], None] = lambda name: None

    def claim_ahead(self, max_jobs: int, loaded: LoadedBundles | None = None) -> list[Claim]:
        taken = super().claim_ahead(max_jobs, loaded)
        self.claimed_ahead.append([claim.job.id for claim in taken])
        self.has_claimed_ahead.set()
        return taken

    def complete(self, claim: Claim, *ended: Any) -> Any:
        self.on_complete(claim.job.id)
        return super().complete(claim, *ended)


class GatedMarker(ImageMarker):
    """Calls `on_encode` with the seed of each image."""

    def __init__(self, on_encode: Callable[[int], None]) -> None:
        super().__init__()
        self._on_encode = on_encode

    def to_file(
        self, pixels: Tensor, output_format: ImageFormat, origin: Origin, options: FileOptions = DEFAULT_FILE
    ) -> bytes:
        self._on_encode(int(pixels[0, 0, 0]))
        return super().to_file(pixels, output_format, origin, options)


def claims_of(*seeds: int) -> list[Claim]:
    return [make_claim(f"job-{seed}", replace(GENERATE, seed=seed)) for seed in seeds]


@contextmanager
def running(
    consumer: WatchedConsumer, route: FakeRoute, on_encode: Callable[[int], None] = lambda seed: None, **changes: Any
) -> Iterator[threading.Event]:
    """A worker in a thread, of batches of one job, until the block ends or the event that it gives is set."""
    stop, errors = threading.Event(), list[BaseException]()
    settings = read_settings(**{"batch_items": 1, **changes})
    worker, _ = open_worker(route, consumer, settings, stop=stop, marker=GatedMarker(on_encode))

    def run() -> None:
        try:
            worker.run()
        except BaseException as error:  # noqa: BLE001 - for the test's own thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(WITHIN_S)
    assert not thread.is_alive() and not errors


def test_the_device_goes_on_while_an_image_is_encoded() -> None:
    """The image of the first job is not encoded until the device has begun the second."""
    second = threading.Event()
    route, consumer = FakeRoute(), WatchedConsumer(claims_of(1, 2))
    route.on_step = lambda step: second.set() if len(route.batches) == 2 else None
    done = threading.Event()
    consumer.on_complete = lambda name: done.set() if name == "job-2" else None
    with running(consumer, route, lambda seed: wait_for(second)):
        wait_for(done)
    assert set(consumer.finished) == {"job-1", "job-2"}


def test_without_a_pipeline_all_happens_in_turn_and_nothing_is_claimed_ahead() -> None:
    consumer, stop, order = WatchedConsumer(claims_of(1, 2)), threading.Event(), list[str]()
    consumer.on_empty, consumer.on_complete = stop.set, order.append
    route = FakeRoute(on_step=lambda step: order.append(f"step {step}"))
    open_worker(route, consumer, read_settings(batch_items=1), stop=stop, max_finishing=0)[0].run()
    steps = ["step 1", "step 2", "step 3"]
    assert order == [*steps, "job-1", *steps, "job-2"] and not consumer.claimed_ahead


def test_one_claim_is_taken_ahead_and_no_more_while_the_device_works() -> None:
    gate, consumer = Gate(), WatchedConsumer(claims_of(1, 2, 3, 4))
    with running(consumer, FakeRoute(on_step=lambda step: gate.pass_through())):
        wait_for(gate.reached)
        wait_for(consumer.has_claimed_ahead)
        assert consumer.claimed_ahead == [["job-2"]]
        assert [claim.job.id for claim in consumer.waiting] == ["job-3", "job-4"]
        gate.opened.set()


def test_the_device_waits_once_two_batches_are_not_stored() -> None:
    third, fifth, waiting = threading.Event(), threading.Event(), list[int]()
    route, consumer = FakeRoute(), WatchedConsumer(claims_of(1, 2, 3, 4, 5))

    def note(step: int) -> None:
        waiting.append(len(route.batches) - 1 - len(consumer.finished))
        if len(route.batches) == 3:
            third.set()

    route.on_step = note
    consumer.on_complete = lambda name: fifth.set() if name == "job-5" else None
    with running(consumer, route, lambda seed: wait_for(third)):
        wait_for(fifth)
    assert max(waiting) == MAX_FINISHING == 2 and len(consumer.finished) == 5


def test_an_image_that_cannot_be_encoded_fails_its_job_alone_and_nothing_is_drawn_again() -> None:
    def fail(seed: int) -> None:
        if seed == 2:
            raise RuntimeError("the encoder has a fault")

    consumer, route, stop = WatchedConsumer(claims_of(1, 2, 3)), FakeRoute(), threading.Event()
    consumer.on_empty = stop.set
    open_worker(route, consumer, read_settings(), stop=stop, marker=GatedMarker(fail))[0].run()
    assert route.batches == [3]
    assert set(consumer.finished) == {"job-1", "job-3"}
    assert consumer.failed["job-2"].code == "engine_error" and "fault" not in consumer.failed["job-2"].detail


def test_a_job_that_is_canceled_while_it_waits_ahead_ends_before_the_device_is_free() -> None:
    gate, canceled = Gate(), threading.Event()

    @dataclass
    class Canceling(WatchedConsumer):
        def find_canceled(self, claims: Sequence[Claim]) -> set[str]:
            return {claim.job.id for claim in claims} & {"job-2"}

        def cancel(self, claim: Claim, stages: Mapping[str, float]) -> bool:
            canceled.set()
            return super().cancel(claim, stages)

    consumer = Canceling(claims_of(1, 2))
    with running(consumer, FakeRoute(on_step=lambda step: gate.pass_through())):
        wait_for(gate.reached)
        wait_for(canceled)
        assert consumer.canceled_ids == ["job-2"] and not consumer.finished
        gate.opened.set()
    assert set(consumer.finished) == {"job-1"}


def test_a_stop_returns_what_waits_ahead_while_the_device_ends_its_batch() -> None:
    gate, released = Gate(), threading.Event()

    @dataclass
    class Releasing(WatchedConsumer):
        def release(self, claims: Sequence[Claim]) -> None:
            super().release(claims)
            if claims:
                released.set()

    consumer = Releasing(claims_of(1, 2))
    with running(consumer, FakeRoute(on_step=lambda step: gate.pass_through())) as stop:
        wait_for(gate.reached)
        wait_for(consumer.has_claimed_ahead)
        stop.set()
        wait_for(released)
        assert consumer.released_ids == ["job-2"] and not consumer.finished
        gate.opened.set()
    assert set(consumer.finished) == {"job-1"}


def test_a_stop_waits_for_what_is_being_encoded() -> None:
    gate, consumer = Gate(), WatchedConsumer(claims_of(1))
    with running(consumer, FakeRoute(), lambda seed: gate.pass_through(), drain_grace_s=0) as stop:
        wait_for(gate.reached)
        stop.set()
        gate.opened.set()
    assert set(consumer.finished) == {"job-1"} and not consumer.released_ids


def test_a_job_whose_lease_was_lost_while_it_waited_does_not_run() -> None:
    consumer, route, stop = WatchedConsumer(claims_of(1, 2), stale_ids={"job-1"}), FakeRoute(), threading.Event()
    consumer.on_empty = stop.set
    open_worker(route, consumer, read_settings(), stop=stop)[0].run()
    assert route.batches == [1] and set(consumer.finished) == {"job-2"}


def test_a_job_that_was_started_before_runs_with_nothing_in_flight_beside_it() -> None:
    """It may end its worker, and what is lost with it would be counted as started once more."""

    @dataclass
    class Alone(WatchedConsumer):
        def claim_ahead(self, max_jobs: int, loaded: LoadedBundles | None = None) -> list[Claim]:
            self.claimed_ahead.append([])
            return []

    def note(step: int) -> None:
        if len(route.batches) == 2:
            beside.append((set(consumer.finished), len(consumer.claimed_ahead)))

    first, again, last = claims_of(1, 2, 3)
    stop, beside = threading.Event(), list[tuple[set[str], int]]()
    consumer = Alone([first, replace(again, delivery=2), last], on_empty=stop.set)
    route = FakeRoute(on_step=note)
    open_worker(route, consumer, read_settings(batch_items=1), stop=stop)[0].run()
    assert beside == [({"job-1"}, 1)] * GENERATE.steps, "the first has ended, and nothing was claimed with the second"
    assert set(consumer.finished) == {"job-1", "job-2", "job-3"}


def test_a_fault_that_no_job_can_hold_ends_the_worker_from_the_background_too() -> None:
    def lose(name: str) -> None:
        raise AssertionError("a fault of the queue")

    consumer = WatchedConsumer(claims_of(1), on_complete=lose)
    with pytest.raises(AssertionError, match="a fault of the queue"):
        open_worker(FakeRoute(), consumer, read_settings(batch_items=1))[0].run()


def test_a_lost_device_returns_what_waits_ahead_and_ends_what_is_encoded() -> None:
    def lose(step: int) -> None:
        if len(route.batches) == 2:
            raise torch.AcceleratorError("CUDA error: an illegal memory access", 700)

    route, consumer = FakeRoute(on_step=lose), WatchedConsumer(claims_of(1, 2, 3))
    with pytest.raises(torch.AcceleratorError):
        open_worker(route, consumer, read_settings(batch_items=1))[0].run()
    assert set(consumer.finished) == {"job-1"} and consumer.released_ids == ["job-3"]


def test_the_time_in_stages_of_the_device_is_counted_and_encoding_is_not() -> None:
    consumer, stop = WatchedConsumer(claims_of(1)), threading.Event()
    consumer.on_empty = stop.set
    worker, metrics = open_worker(FakeRoute(), consumer, read_settings(), stop=stop)
    worker.run()
    stages_s = consumer.stages["job-1"]
    expected_s = sum(seconds for stage, seconds in stages_s.items() if stage != "encode")
    busy_s = metrics.registry.get_sample_value("giantleap_device_busy_seconds_total", {"device": "cpu"})
    assert busy_s == pytest.approx(expected_s) and "encode" in stages_s
