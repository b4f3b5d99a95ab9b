"""A process that is killed while it writes, without one: what it left is what a test then goes on from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from giantleap.models.atomic_file import replace_file
from giantleap.training.data import pairs_store
from giantleap.training.data import prepare as prepare_module


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` stops it."""


@contextmanager
def killed_at_write(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the block does with pairs ends in the middle of the file with this number, the first being 0."""
    written = 0

    def write_or_die(path: Path, content: bytes) -> None:
        nonlocal written
        if written == number:
            path.with_name(f".{path.name}.1.partial").write_bytes(content[: len(content) // 2])
            raise Killed
        written += 1
        replace_file(path, content)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pairs_store, "replace_file", write_or_die)
        patch.setattr(prepare_module, "replace_file", write_or_die)
        yield
