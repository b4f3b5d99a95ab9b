"""Runs the image filters of a process: each sees a decoded image, and may refuse it before a file is made of it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Self

import numpy as np
import torch
from torch import Tensor

from giantleap.models.filters.image_filter import (
    FilterOutcome,
    FilterSetupError,
    ImageContext,
    ImageFilter,
    find_filters,
)

log = logging.getLogger(__name__)


class ImageRefused(Exception):
    """A filter refused an image."""


class FilterFailed(Exception):
    """A filter could not judge an image, which therefore must not leave."""


class FilterChain:
    """The filters of a process, in the order of the settings.

    Args:
        filters: By name.
        on_outcome: Called with the name of a filter and what came of a final image.
    """

    def __init__(
        self,
        filters: Mapping[str, ImageFilter] | None = None,
        on_outcome: Callable[[str, FilterOutcome], object] = lambda name, outcome: None,
    ) -> None:
        self._filters = dict(filters or {})
        self._on_outcome = on_outcome

    @classmethod
    def open(
        cls,
        names: Sequence[str],
        on_outcome: Callable[[str, FilterOutcome], object] = lambda name, outcome: None,
    ) -> Self:
        """Open the named filters.

        Raises:
            FilterSetupError: One is not installed, is offered by two packages, or cannot be opened.
        """
        return cls({name: _open(point) for name, point in find_filters(names).items()}, on_outcome)

    def check(self, pixels: Tensor, context: ImageContext) -> None:
        """Show an image to each filter.

        Args:
            pixels: [height_px, width_px, 3], uint8, on the CPU.
            context: What it is.

        Raises:
            ImageRefused: A filter refused it.
            FilterFailed: A filter raised an error, or returned something else than a bool.
        """
        for name, each in self._filters.items():
            refused = self._run(name, each, pixels, context)
            self._count(name, "refused" if refused else "passed", context)
            if refused:
                raise ImageRefused(f"filter {name} refused the image; change the request, or ask the operator")

    def _run(self, name: str, each: ImageFilter, pixels: Tensor, context: ImageContext) -> bool:
        try:
            refused = each.refuses(pixels.numpy().copy(), context)
        except torch.AcceleratorError:
            raise  # the process has lost its device
        except Exception as error:  # code of another package: whatever it raises, the image must not leave
            log.warning("filter %s failed", name, exc_info=error)
            self._count(name, "failed", context)
            raise FilterFailed(f"filter {name} raised {type(error).__name__}; the worker's log has more") from None
        if not isinstance(refused, bool | np.bool_):
            self._count(name, "failed", context)
            raise FilterFailed(f"filter {name} returned {type(refused).__name__}; its `refuses` must return a bool")
        return bool(refused)

    def _count(self, name: str, outcome: FilterOutcome, context: ImageContext) -> None:
        if not context.is_preview:
            self._on_outcome(name, outcome)


def _open(point: EntryPoint) -> ImageFilter:
    try:
        opened: ImageFilter = point.load()()
    except Exception as error:  # code of another package
        log.debug("filter %s not opened", point.name, exc_info=error)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise FilterSetupError(f"filter {point.name} ({point.value}) cannot be opened: {reason}") from error
    if not callable(getattr(opened, "refuses", None)):
        raise FilterSetupError(f"filter {point.name} ({point.value}) has no method `refuses`")
    return opened
