"""How API and worker processes start and stop while Redis refuses them or is away."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from giantleap.cli.main import app
from giantleap.service.errors import EXIT_BAD_CONFIGURATION, BadConfiguration
from giantleap.service.settings import read_settings
from giantleap.service.worker.process import run_worker
from tests.ports import free_ports
from tests.service.redis_groups import Server
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def wrong_login(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server with a password that is not its own."""
    server = Server(tmp_path_factory.mktemp("login") / "server", free_ports(1)[0])
    server.start()
    server.client.config_set("requirepass", "right")
    yield f"redis://:wrong@127.0.0.1:{server.port}/0"
    server.kill()


def test_an_api_process_with_a_wrong_login_ends_with_one_line(wrong_login: str) -> None:
    ended = CliRunner().invoke(app, ["api", "--listen-fd", "99", "--redis-url", wrong_login])
    assert ended.exit_code == EXIT_BAD_CONFIGURATION
    assert ended.output.startswith("giantleap: Redis refuses the login") and ended.output.count("\n") == 1
    assert "wrong" not in ended.output


def test_a_worker_with_a_wrong_login_ends_before_it_loads_anything(wrong_login: str, tiny_bundle_dir: Path) -> None:
    settings = read_settings(redis_url=wrong_login, bundle=(tiny_bundle_dir,), device="cpu")
    with pytest.raises(BadConfiguration, match="refuses the login"):
        run_worker(settings, threading.Event())


def test_a_stop_ends_a_worker_that_waits_for_redis(tiny_bundle_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    settings = read_settings(redis_url="redis://127.0.0.1:1/0", bundle=(tiny_bundle_dir,), device="cpu")
    stop = threading.Event()
    worker = threading.Thread(target=run_worker, args=(settings, stop))
    worker.start()
    wait_until(lambda: "lost Redis" in caplog.text, "the worker waits", within_s=300.0)
    stop.set()
    worker.join(60)
    assert not worker.is_alive() and "stopped while it waited for Redis" in caplog.text
