"""What every test shares: one thread for torch, and a bundle of random weights for the session."""

import os

# Before torch and the tokenizers are imported: two cores are shared with whatever else runs there.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ("tests.redis_fixtures",)


@pytest.fixture(autouse=True)
def root_log_handlers() -> Iterator[None]:
    """A command that runs within a test, or a fixture, sends the process' logs to a stream that is gone after it."""
    root = logging.getLogger()
    level = root.level
    root.handlers[:] = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]
    before = list(root.handlers)
    yield
    root.handlers[:] = before
    root.setLevel(level)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """What runs the tests marked `anyio`: the loop that the service runs on, and no other that is installed."""
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_bundle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle called `tiny` of random weights: base size 64 px, 16 latent channels, scales 1, 2 and 4.

    Read-only: a test that changes it copies it first.
    """
    from tests.tiny_bundle import write_tiny_bundle  # diffusers takes seconds to import

    directory = tmp_path_factory.mktemp("bundles") / "tiny"
    write_tiny_bundle(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_onnx_dir(tiny_bundle_dir: Path) -> Path:
    """The LUA of `tiny_bundle_dir` as ONNX, both scales; read-only. Takes seconds of a processor."""
    from giantleap.export.build import Request, export_bundle
    from giantleap.models.bundle.bundle import read_bundle

    directory = tiny_bundle_dir.parent / "tiny-onnx"
    export_bundle(Request(read_bundle(tiny_bundle_dir), "onnx", "fp32", directory))
    return directory
