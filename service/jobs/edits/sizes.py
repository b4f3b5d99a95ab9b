"""The size of a result that is to look like an image: as large as the bundle's default, in the shape of the image."""

import math

from giantleap.models.bundle.bundle import Bundle
from giantleap.models.bundle.descriptor import Method, nearest_sides
from giantleap.models.lua.spec import scaled_size
from giantleap.service.jobs.images import ImageSize


def size_like(image: ImageSize, bundle: Bundle, method: Method, scale: float) -> tuple[int, int]:
    """Width and height of the final image that comes nearest to the shape of `image` at the bundle's default area."""
    factor = 1 if method == "direct" else scale
    limits, defaults = bundle.limits_at(scale, method), bundle.defaults
    enlarged = scale / factor
    area_px = defaults.base_width_px * defaults.base_height_px * enlarged**2
    resize = math.sqrt(area_px / (image.width_px * image.height_px))

    def side(wanted_px: float) -> int:
        nearest = min(nearest_sides(wanted_px, limits, method), key=lambda side_px: abs(side_px - wanted_px))
        return scaled_size(nearest, factor)

    return side(resize * image.width_px), side(resize * image.height_px)
