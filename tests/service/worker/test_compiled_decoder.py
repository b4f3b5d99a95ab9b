"""A worker with `compile_vae`: ready once the decoder is compiled, which a bundle that returns is again."""

import threading
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from giantleap.service.errors import BadConfiguration
from giantleap.service.settings import Settings, read_settings
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.worker.bundles import BundleCache
from giantleap.service.worker.process import open_bundles
from tests.service.fakes import FakeConsumer, make_claim, open_worker


@pytest.fixture
def compiled(tiny_bundle_dir: Path) -> Settings:
    return read_settings(bundle=(tiny_bundle_dir,), device="cpu", modes="compile_vae=true", batch_items=1)


def test_a_start_without_a_compiler_says_what_to_do(compiled: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_found() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none_found)
    expected = r"^bundle tiny: modes\.compile_vae on a CPU needs a C\+\+ compiler: no compiler; install one .*$"
    with pytest.raises(BadConfiguration, match=expected):
        open_bundles(compiled, Metrics(CollectorRegistry()), threading.Event())


def draw(settings: Settings, cache: BundleCache, name: str) -> bytes:
    consumer, stop = FakeConsumer([make_claim(name)]), threading.Event()
    consumer.on_empty = stop.set
    open_worker(None, consumer, settings, bundles=cache, stop=stop)[0].run()
    return consumer.finished[name][0][1]


@pytest.mark.compiler
@pytest.mark.timeout(1800)
def test_a_worker_starts_compiled_and_a_bundle_that_returns_is_compiled_again(compiled: Settings) -> None:
    metrics = Metrics(CollectorRegistry())
    cache, _ = open_bundles(compiled, metrics, threading.Event())

    def count(way: str) -> float:
        found = metrics.registry.get_sample_value("giantleap_decoded_images_total", {"bundle": "tiny", "way": way})
        return found or 0.0

    assert 'decoder="compiled"' in generate_latest(metrics.registry).decode()
    warmed = count("compiled")
    first = draw(compiled, cache, "first")
    cache._evict_until(0)
    assert cache.loaded == ()
    cache.load("tiny")
    assert draw(compiled, cache, "second") == first
    assert count("compiled") == warmed + 2 and count("recompiled") == count("whole") == 0
