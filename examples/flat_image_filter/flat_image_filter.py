"""An image filter for Giantleap that refuses images of one color, such as those of a failed generation."""

import numpy as np
from numpy.typing import NDArray

from giantleap.models.filters.image_filter import ImageContext

MIN_DEVIATION = 2.0  # of 255, in the channel that varies most


class FlatImageFilter:
    """Opened once in each process, so that a filter with a model loads it here."""

    def __init__(self) -> None:
        self._min_deviation = MIN_DEVIATION

    def refuses(self, pixels: NDArray[np.uint8], context: ImageContext) -> bool:
        """Whether the image is of one color; first previews are flat by nature."""
        return not context.is_preview and float(pixels.std(axis=(0, 1)).max()) < self._min_deviation
