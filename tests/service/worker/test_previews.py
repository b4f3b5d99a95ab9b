"""What a worker sends on the way: JPEGs with marks, of each job its own, none that a filter holds back."""

import io
import threading
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from giantleap.models.filters.chain import FilterChain
from giantleap.models.filters.image_filter import ImageContext
from giantleap.models.latent_space import LATENT_SPACES
from giantleap.models.vae.preview import LinearMap, Previewer
from giantleap.service.jobs.verification import verify_image
from giantleap.service.settings import read_settings
from giantleap.service.worker.items import to_items
from giantleap.service.worker.outputs.previews import PreviewSender
from tests.service.fakes import GENERATE, FakeConsumer, FakeRoute, make_claim, open_worker

PREVIEWER = Previewer(LATENT_SPACES["sdxl"], LinearMap(torch.zeros(3, 4), torch.tensor([1.0, -1.0, -1.0])))
RAW = torch.zeros(4, 16, 24)


class NoPreviews:
    """Refuses every preview and no final image."""

    def refuses(self, pixels: NDArray[np.uint8], context: ImageContext) -> bool:
        assert (context.width_px, context.height_px) == (GENERATE.width_px, GENERATE.height_px)
        return context.is_preview


def test_a_preview_is_a_small_jpeg_that_says_that_it_is_generated() -> None:
    consumer = FakeConsumer()
    items = to_items([make_claim("a", GENERATE), make_claim("b", replace(GENERATE, num_images=2))])
    PreviewSender(items, PREVIEWER, FilterChain(), consumer).send(2, 3, RAW)
    assert consumer.events == [("b", "preview", {"index": 1, "step": 3, "width": 24, "height": 16})]
    ((job_id, content),) = consumer.previews
    image = Image.open(io.BytesIO(content))
    assert (job_id, image.format, image.size) == ("b", "JPEG", (24, 16))
    red = image.getpixel((5, 5))
    assert isinstance(red, tuple) and red[0] > 250 and max(red[1:]) < 5
    marks = verify_image(content, None, 1 << 20)
    assert marks.generated and marks.xmp.parameters is None


def test_a_preview_that_a_filter_holds_back_is_not_sent_and_its_job_goes_on() -> None:
    consumer, stop = FakeConsumer([make_claim("a")]), threading.Event()
    consumer.on_empty = stop.set
    filters = FilterChain({"strict": NoPreviews()})
    PreviewSender(to_items([make_claim("a")]), PREVIEWER, filters, consumer).send(0, 1, RAW)
    assert consumer.events == [] and consumer.previews == []
    worker, _ = open_worker(FakeRoute(), consumer, read_settings(), stop=stop, filters=filters)
    worker.run()
    assert list(consumer.finished) == ["a"]
