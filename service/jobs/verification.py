"""Says what an image carries of how it was made: its XMP packet, its C2PA manifest with a check, its watermark."""

import io
import warnings
from dataclasses import dataclass

from PIL import Image

from giantleap.models.pixels.image_formats import ImageFormat
from giantleap.models.pixels.rgb import DAMAGE
from giantleap.models.provenance.manifest import ManifestReport, read_manifest
from giantleap.models.provenance.watermark import Watermark, find_watermark
from giantleap.models.provenance.xmp import SOURCE_TYPES, XmpError, XmpMarks, read_xmp
from giantleap.service.errors import MalformedRequest
from giantleap.service.jobs.images import check_image

_GENERATED_TYPES = frozenset(
    SOURCE_TYPES + name
    for name in ("trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia", "compositeSynthetic")
)


@dataclass(frozen=True, slots=True)
class ImageMarks:
    """What one image carries."""

    xmp: XmpMarks
    manifest: ManifestReport
    watermark: Watermark | None = None

    @property
    def generated(self) -> bool:
        """Whether a mark says that a model made the image or a part of it. Without marks nothing is known."""
        types = {self.xmp.digital_source_type}
        if self.manifest.state in ("valid", "trusted"):
            types.add(self.manifest.digital_source_type)
        return self.watermark is not None or not _GENERATED_TYPES.isdisjoint(types)


def verify_image(body: bytes, content_type: str | None, max_px: int) -> ImageMarks:
    """Read the marks of a PNG, JPEG or WebP file.

    Raises:
        GiantleapError: As `giantleap.service.jobs.images.check_image`.
        MalformedRequest: The metadata are damaged or too large.
    """
    check_image(body, content_type, max_px)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(body), formats=("PNG", "JPEG", "WEBP")) as image:
                image.load()  # a PNG may have its packet after its pixels
                packet, name = image.info.get("xmp"), image.format
                watermark = find_watermark(image)
    except DAMAGE as error:
        raise MalformedRequest("the image's metadata are damaged or over 1 MiB; write the file again") from error
    image_format: ImageFormat = "png" if name == "PNG" else "webp" if name == "WEBP" else "jpeg"
    try:
        marks = XmpMarks() if packet is None else read_xmp(packet)
    except XmpError as error:
        raise MalformedRequest(str(error)) from error
    return ImageMarks(marks, read_manifest(body, image_format), watermark)
