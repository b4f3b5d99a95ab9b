"""What the tests of this folder share."""

from collections.abc import Iterator

import pytest
from diffusers.utils import logging as diffusers_logging


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    yield
    diffusers_logging.set_verbosity(before)
