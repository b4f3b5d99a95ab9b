"""A whole service with keys, webhooks and signed images, and APIs over the same Redis without its worker."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from giantleap.models.provenance.dev_certificate import make_dev_certificate
from giantleap.service.api.app import create_app
from giantleap.service.auth import Scope, new_key
from giantleap.service.settings import Settings, read_settings
from tests.chaos.stores import OneServer
from tests.running_service import serving
from tests.service.live_server import live_server

OpenApi = Callable[..., AbstractContextManager[str]]


@dataclass(frozen=True)
class Installation:
    """A service that runs, and the settings with which its operator runs the doctor."""

    url: str
    settings: Settings


def write_key(path: Path, *scopes: Scope) -> str:
    """A file with one new key of these scopes; returns the key."""
    key, digest = new_key()
    path.write_text(f'[[key]]\nname = "doctor"\nsha256 = "{digest}"\nscopes = {[str(scope) for scope in scopes]}\n')
    path.chmod(0o600)
    return key


@pytest.fixture(scope="package")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneServer]:
    server = OneServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="package")
def installation(
    store: OneServer, tiny_bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    directory = tmp_path_factory.mktemp("installation")
    key = write_key(directory / "keys.toml", Scope.GENERATE, Scope.UPSCALE, Scope.METRICS)
    certificate, secret = make_dev_certificate(2)
    (directory / "cert.pem").write_bytes(certificate)
    (directory / "key.pem").write_bytes(secret)
    values: dict[str, Any] = {
        "redis_url": store.url,
        "api_keys_file": directory / "keys.toml",
        "result_store": (directory / "results").as_uri(),
        "webhook_secret": "a secret of webhooks",
        "webhook_allow_private": True,
        "c2pa_cert": directory / "cert.pem",
        "c2pa_key": directory / "key.pem",
    }
    with serving(tiny_bundle_dir, **values) as url:
        yield Installation(url, read_settings(**values, api_key=key, data_dir=directory))


@pytest.fixture
def lonely(store: OneServer, key_prefix: str, tiny_bundle_dir: Path, tmp_path: Path) -> Settings:
    """Settings of an API without workers: keys of Redis of its own, no API keys."""
    return read_settings(
        redis_url=store.url, key_prefix=key_prefix, bundle=(tiny_bundle_dir,), data_dir=tmp_path, max_body_bytes=1 << 20
    )


@pytest.fixture
def open_api() -> OpenApi:
    """Runs the API of some settings; keywords replace settings."""

    @contextlib.contextmanager
    def opened(settings: Settings, **changes: Any) -> Iterator[str]:
        with live_server(create_app(settings.model_copy(update=changes))) as url:
            yield url

    return opened
