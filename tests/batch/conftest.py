"""A loaded bundle of random weights, and a job on it without the command."""

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from giantleap.batch.engine import RowEngine
from giantleap.batch.inputs import Source
from giantleap.batch.manifest import Entry, read_entries
from giantleap.batch.rows import BatchOptions
from giantleap.batch.runner import Runner
from giantleap.batch.store import Store
from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.route import Route
from giantleap.service.settings import Settings, read_settings
from giantleap.service.worker.engines import open_local_route

DEFAULTS = BatchOptions()


@dataclass(frozen=True)
class Loaded:
    """A bundle in memory."""

    route: Route
    bundle: Bundle
    settings: Settings

    def runner(
        self, source: str | Path, output: str | Path, options: BatchOptions, lease_s: float = 60.0
    ) -> tuple[Runner, threading.Event]:
        """One process of a job, and what stops it."""
        stop, store = threading.Event(), Store(str(output))
        engine = RowEngine(self.route, self.bundle, self.settings, options, store, stop)
        return Runner(Source(str(source)), store, engine, options, lease_s, stop), stop

    def run(self, source: str | Path, output: str | Path, options: BatchOptions = DEFAULTS) -> dict[str, Entry]:
        """Run a job to its end; its entries by key."""
        for _ in self.runner(source, output, options)[0].run():
            pass
        return read_entries(Store(str(output)))


@pytest.fixture(scope="session")
def loaded(tiny_bundle_dir: Path) -> Loaded:
    """The bundle of random weights on the CPU."""
    settings = read_settings(bundle=str(tiny_bundle_dir), device="cpu")
    bundle = read_bundle(tiny_bundle_dir)
    return Loaded(open_local_route(bundle, settings), bundle, settings)


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """A folder of six latents of two sizes."""
    folder = tmp_path / "latents"
    folder.mkdir()
    write_latents(folder, 6)
    return folder


def write_latents(folder: Path, count: int) -> None:
    """Random latents of the tiny bundle's space, of two sizes in turn."""
    drawn = np.random.default_rng(0)
    for index in range(count):
        np.save(folder / f"{index:03d}.npy", drawn.standard_normal((16, 4, 4 + 4 * (index % 2))).astype(np.float32))
