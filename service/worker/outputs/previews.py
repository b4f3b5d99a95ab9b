"""Sends previews of the images of a batch: made, filtered, encoded as JPEG, and stored for a minute."""

from collections.abc import Sequence

from torch import Tensor

from giantleap.models.filters.chain import FilterChain, FilterFailed, ImageRefused
from giantleap.models.filters.image_filter import ImageContext
from giantleap.models.pixels.images import to_image_bytes
from giantleap.models.provenance.xmp import to_xmp
from giantleap.models.vae.preview import Previewer
from giantleap.service.jobs.job import GenerateParams
from giantleap.service.jobs.marking import to_origin
from giantleap.service.worker.items import Item
from giantleap.service.worker.progress import Reports


class PreviewSender:
    """Sends previews of items that run together.

    Args:
        items: The items.
        previewer: Makes the previews; None in a bundle without, whose jobs ask for none.
        filters: See the previews too; one that they hold back is not sent.
        consumer: Where they go.
    """

    def __init__(
        self, items: Sequence[Item], previewer: Previewer | None, filters: FilterChain, consumer: Reports
    ) -> None:
        self._items = items
        self._previewer = previewer
        self._filters = filters
        self._consumer = consumer

    def send(self, index: int, step: int, raw: Tensor) -> None:
        """Send the preview of item `index` after a step; `raw` is its clean latent [channels, h, w]."""
        if self._previewer is None:
            return
        item, pixels = self._items[index], self._previewer.show(raw)
        params, bundle = item.claim.job.params, item.claim.job.bundle
        assert isinstance(params, GenerateParams), "other jobs generate nothing"
        context = ImageContext(params.kind, bundle, params.width_px, params.height_px, is_preview=True)
        try:
            self._filters.check(pixels, context)
        except (ImageRefused, FilterFailed):
            return
        content = to_image_bytes(pixels, "jpeg", to_xmp(to_origin(params, bundle, None)))
        height_px, width_px = pixels.shape[:2]
        data = {"index": item.index, "step": step, "width": width_px, "height": height_px}
        self._consumer.emit(item.claim, "preview", data, content)
