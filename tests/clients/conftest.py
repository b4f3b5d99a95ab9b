"""A running service with the bundle of random weights, over a Redis that a test may kill and start again."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from giantleap.cli.demo import running_service
from tests.chaos.stores import OneServer


@dataclass(frozen=True)
class Service:
    url: str
    store: OneServer


@pytest.fixture(scope="package")
def service(tiny_bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    store = OneServer(tmp_path_factory.mktemp("redis"))
    with ExitStack() as stack:
        stack.callback(store.stop)
        with pytest.MonkeyPatch.context() as environment:  # for the start alone: other tests run in this process
            environment.setenv("GIANTLEAP_REDIS_URL", store.url)
            url = stack.enter_context(running_service("--bundle", str(tiny_bundle_dir), "--device", "cpu"))
        yield Service(url, store)
