"""Settings of the tests that run commands."""

from pathlib import Path

import pytest


@pytest.fixture
def tiny_settings(tiny_bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle of random weights, on the CPU."""
    monkeypatch.setenv("GIANTLEAP_BUNDLE", str(tiny_bundle_dir))
    monkeypatch.setenv("GIANTLEAP_DEVICE", "cpu")
    monkeypatch.setenv("GIANTLEAP_LOG_LEVEL", "error")
