"""Encodes images with the metadata that say how they were made: the one way from pixels to a file that leaves."""

import torch
from torch import Tensor

from giantleap.models.pixels.image_formats import DEFAULT_FILE, FileOptions, ImageFormat
from giantleap.models.pixels.images import to_image_bytes
from giantleap.models.provenance.manifest import ManifestSigner
from giantleap.models.provenance.watermark import add_watermark
from giantleap.models.provenance.xmp import Origin, to_xmp


class ImageMarker:
    """Encodes images with XMP and, where set, a mark in the pixels and a C2PA manifest.

    Args:
        signer: Signs manifests; None for none.
        watermark: Number of the mark in the pixels; None for none.
    """

    def __init__(self, signer: ManifestSigner | None = None, watermark: int | None = None) -> None:
        self._signer = signer
        self._watermark = watermark

    def to_file(
        self, pixels: Tensor, output_format: ImageFormat, origin: Origin, options: FileOptions = DEFAULT_FILE
    ) -> bytes:
        """Encode one image.

        Args:
            pixels: [height_px, width_px, 3], uint8, on the CPU.
            output_format: Of the file.
            origin: How it was made.
            options: How the file is compressed.
        """
        if self._watermark is not None:
            pixels = torch.from_numpy(add_watermark(pixels.numpy(), self._watermark))
        content = to_image_bytes(pixels, output_format, to_xmp(origin), options)
        return content if self._signer is None else self._signer.sign(content, output_format, origin)
