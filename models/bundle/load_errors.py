"""Turns errors of libraries while a part of a bundle is loaded into one line that names the bundle."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from giantleap.models.bundle.bundle import Bundle, BundleError

# What they raise on missing and damaged files, unknown classes, and weights that do not fit their configuration.
_FAULTS = (AttributeError, ImportError, LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)
_MAX_CHARS = 300
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def load_errors(bundle: Bundle, part: str) -> Iterator[None]:
    """Name the bundle and its part in the error of a library, in one line.

    Raises:
        BundleError: The block raised such an error.
    """
    try:
        yield
    except BundleError:
        raise
    except _FAULTS as error:
        raise BundleError(
            f"bundle {bundle.name}: its {part} cannot be loaded: {to_line(error)}; compare its files with their "
            f"source, or fetch them again"
        ) from error


def to_line(error: BaseException) -> str:
    """A library's error as one line without terminal codes, at most 300 characters."""
    text = " ".join(_TERMINAL_CODES.sub("", str(error)).split())
    return text[:_MAX_CHARS].rstrip(".") or type(error).__name__
