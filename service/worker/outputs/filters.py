"""The image filters of the settings, and what they learn of a job's image."""

from collections.abc import Callable, Sequence

from torch import Tensor

from giantleap.models.filters.chain import FilterChain
from giantleap.models.filters.image_filter import FilterOutcome, FilterSetupError, ImageContext
from giantleap.service.errors import BadConfiguration
from giantleap.service.jobs.job import JobParams


def open_filters(names: Sequence[str], on_outcome: Callable[[str, FilterOutcome], object]) -> FilterChain:
    """Open filters by name; see `FilterChain.open`.

    Raises:
        BadConfiguration: One is not installed or cannot be opened.
    """
    try:
        return FilterChain.open(names, on_outcome)
    except FilterSetupError as error:
        raise BadConfiguration(f"filters: {error}") from error


def to_context(params: JobParams, bundle: str, pixels: Tensor) -> ImageContext:
    """What a filter learns of the final image of a job."""
    height_px, width_px = pixels.shape[:2]
    return ImageContext(params.kind, bundle, width_px, height_px)
