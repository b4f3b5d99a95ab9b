"""A whole service as `giantleap serve` runs it, over a Redis of the test, with settings of the test."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from giantleap.cli.demo import running_service


@contextmanager
def serving(bundle_dir: Path, **values: object) -> Iterator[str]:
    """Serve a bundle on the CPU until the block ends, with these values of settings; yields the URL."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as environment:  # for the start alone: other tests run in this process
            for name, value in values.items():
                environment.setenv(f"GIANTLEAP_{name.upper()}", str(value))
            url = stack.enter_context(running_service("--bundle", str(bundle_dir), "--device", "cpu"))
        yield url
