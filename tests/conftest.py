"""What every test shares: one thread for torch, and a bundle of random weights for the session."""

import os

# Before torch and the tokenizers are imported: two cores are shared with whatever else runs there.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest_plugins = ("tests.redis_fixtures", "tests.s3_server")


@pytest.fixture(autouse=True)
def root_log_handlers() -> Iterator[None]:
    """A command that runs within a test, or a fixture, sends the process' logs to a stream that is gone after it.

    It sets the level too. A fixture of the session does so before this one runs: so it is set here, and not restored.
    """
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    root.handlers[:] = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]
    before = list(root.handlers)
    yield
    root.handlers[:] = before


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """What runs the tests marked `anyio`: the loop that the service runs on, and no other that is installed."""
    return "asyncio"


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that all processes of a run under pytest-xdist share."""
    own = tmp_path_factory.getbasetemp()
    directory = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    directory.mkdir(exist_ok=True)
    return directory


@contextmanager
def first_process(done: Path) -> Iterator[bool]:
    """Whether this process is the first to need `done`, and so has to make it; the others wait until it has."""
    with done.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not done.exists()


@pytest.fixture(scope="session")
def tiny_bundle_dir(shared_dir: Path) -> Path:
    """A bundle called `tiny` of random weights: base size 64 px, 16 latent channels, scales 1, 2 and 4.

    Read-only: a test that changes it copies it first.
    """
    from tests.tiny_bundle import write_tiny_bundle  # diffusers takes seconds to import

    directory = shared_dir / "tiny"
    with first_process(directory) as is_first:
        if is_first:
            write_tiny_bundle(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_onnx_dir(tiny_bundle_dir: Path) -> Path:
    """LUA at both scales and the decoder of `tiny_bundle_dir` as ONNX, by `giantleap export`; read-only.

    The export takes 20 seconds of a processor, so that a run makes it once.
    """
    from typer.testing import CliRunner

    from giantleap.cli.main import app

    directory = tiny_bundle_dir.parent / "tiny-onnx"
    words = ["export", "--bundle", str(tiny_bundle_dir), "--device", "cpu", "--engine", "onnx", "--out", str(directory)]
    with first_process(directory) as is_first:
        if is_first:
            answer = CliRunner().invoke(app, [*words, "--part", "lua", "--part", "decoder"])
            assert answer.exit_code == 0, answer.output
            (tiny_bundle_dir.parent / "tiny-onnx.txt").write_text(answer.output)
    return directory
