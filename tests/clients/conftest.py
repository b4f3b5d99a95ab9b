"""A running service with the bundle of random weights, over a Redis that a test may kill and start again."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.stores import OneServer
from tests.running_service import serving


@dataclass(frozen=True)
class Service:
    url: str
    store: OneServer


@pytest.fixture(scope="package")
def service(tiny_bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    store = OneServer(tmp_path_factory.mktemp("redis"))
    try:
        with serving(tiny_bundle_dir, redis_url=store.url) as url:
            yield Service(url, store)
    finally:
        store.stop()
