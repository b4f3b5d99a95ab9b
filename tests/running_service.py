"""A whole service as `giantleap serve` runs it, over a Redis of the test, with settings of the test."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from giantleap.cli.demo import running_service


@contextmanager
def serving(*bundles: Path, **values: object) -> Iterator[str]:
    """Serve bundles on the CPU until the block ends, with these values of settings; yields the URL."""
    settings = {"bundle": ",".join(map(str, bundles)), "device": "cpu"} | values
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as environment:  # for the start alone: other tests run in this process
            for name, value in settings.items():
                environment.setenv(f"GIANTLEAP_{name.upper()}", str(value))
            url = stack.enter_context(running_service())
        yield url
