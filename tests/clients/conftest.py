"""A running service with the bundle of random weights, over a Redis that a test may kill and start again."""

from collections.abc import Iterator
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
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GIANTLEAP_REDIS_URL", store.url)
        with running_service("--bundle", str(tiny_bundle_dir), "--device", "cpu") as url:
            yield Service(url, store)
    store.stop()
