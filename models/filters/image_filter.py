"""What a filter is: a package offers it as an entry point of the group "giantleap.filters", and the settings name it.

The entry point is a callable without arguments, usually a class, that returns an `ImageFilter`. This module imports no
torch; `giantleap.models.filters.chain` opens and runs the filters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Final, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GROUP: Final = "giantleap.filters"

FilterOutcome = Literal["passed", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class ImageContext:
    """What a filter learns of an image besides its pixels. The prompt is not part of it: a filter judges images.

    Attributes:
        kind: Of the job.
        bundle: Name of the bundle that made the image.
        width_px: Of the final image.
        height_px: Of the final image.
        is_preview: Whether the pixels are a small view of an image that is not finished.
    """

    kind: Literal["generate", "upscale"]
    bundle: str
    width_px: int
    height_px: int
    is_preview: bool = False


class ImageFilter(Protocol):
    """What an entry point of the group returns."""

    def refuses(self, pixels: "NDArray[np.uint8]", context: ImageContext) -> bool:
        """Whether the image must not leave. It is [height_px, width_px, 3], uint8, RGB, and a copy."""
        ...


class FilterSetupError(ValueError):
    """A filter of the settings is not installed, or cannot be opened."""


def find_filters(names: Sequence[str]) -> dict[str, EntryPoint]:
    """The entry points of the named filters; nothing is imported.

    Raises:
        FilterSetupError: One is not installed, or is offered by two packages.
    """
    points = entry_points(group=GROUP)
    found = {}
    for name in names:
        offers = {point.value: point for point in points if point.name == name}
        if not offers:
            known = ", ".join(sorted(points.names)) or "none"
            raise FilterSetupError(f"filter {name} is not installed; installed filters: {known}")
        if len(offers) > 1:
            raise FilterSetupError(f"filter {name} is offered by {' and '.join(sorted(offers))}; uninstall one")
        (found[name],) = offers.values()
    return found
