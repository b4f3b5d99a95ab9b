"""What `giantleap worker` hands to the worker process."""

import os
import signal
from collections.abc import Callable, Iterator
from threading import Event

import pytest
from typer.testing import CliRunner

from giantleap.cli.main import app
from giantleap.service.settings import POCKET_BUNDLE, Settings
from giantleap.service.worker import process


@pytest.fixture
def signals() -> Iterator[None]:
    """The command takes the signals for itself."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_a_worker_keeps_the_number_that_its_supervisor_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []

    def run(settings: Settings, stop: Event, number: int, on_ready: Callable[[], None]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append((number, stop.wait(30.0)))

    monkeypatch.setattr(process, "run_worker", run)
    ended = CliRunner().invoke(app, ["worker", "--redis-url", "redis://127.0.0.1:1/0", "--number", "3"])
    assert ended.exit_code == 0
    assert seen == [(3, True)]


@pytest.mark.usefixtures("signals")
def test_a_worker_downloads_no_bundle_by_itself() -> None:
    bundle = str(POCKET_BUNDLE.parent / "sdxl")
    ended = CliRunner().invoke(app, ["worker", "--redis-url", "redis://127.0.0.1:1/0", "--bundle", bundle])
    assert ended.exit_code == 2
    assert ended.output == "giantleap: bundle sdxl is on the hub: fetch it with `giantleap bundle pull sdxl` first\n"
