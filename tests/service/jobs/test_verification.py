"""Verifying images: what they carry is found, and hostile files are refused with a reason."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from giantleap.models.pixels.image_formats import CONTENT_TYPES, ImageFormat
from giantleap.models.pixels.images import to_image_bytes
from giantleap.models.provenance.dev_certificate import make_dev_certificate
from giantleap.models.provenance.manifest import ManifestSigner
from giantleap.models.provenance.marker import ImageMarker
from giantleap.models.provenance.xmp import GENERATED, MAX_XMP_BYTES, Origin, to_xmp
from giantleap.service.errors import GiantleapError, MalformedRequest, PayloadTooLarge, UnsupportedMediaType
from giantleap.service.jobs.verification import verify_image

PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
MAX_PX = 512 * 512
PACKET = b"XML:com.adobe.xmp\0\0\0\0\0" + to_xmp(Origin())


def saved(output_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS.numpy()).save(buffer, format=output_format, **options)
    return buffer.getvalue()


def in_png(packet: str, *, zip_text: bool = False) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("XML:com.adobe.xmp", packet, zip=zip_text)
    return saved("PNG", pnginfo=chunks)


def with_text(content: bytes, name: bytes, data: bytes) -> bytes:
    """The PNG file with one more chunk between its pixels and its end, where some programs write their text."""
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return content[:-12] + chunk + content[-12:]


@pytest.mark.parametrize("output_format", list(CONTENT_TYPES))
def test_an_image_of_ours_is_known_as_generated(output_format: ImageFormat) -> None:
    marks = verify_image(ImageMarker().to_file(PIXELS, output_format, Origin()), None, MAX_PX)
    assert marks.generated and marks.xmp.digital_source_type == GENERATED and marks.manifest.state == "none"


def test_a_packet_after_the_pixels_is_found() -> None:
    assert verify_image(with_text(to_image_bytes(PIXELS, "png"), b"iTXt", PACKET), None, MAX_PX).generated


@pytest.mark.parametrize("output_format", list(CONTENT_TYPES))
def test_of_an_image_without_marks_nothing_is_known(output_format: ImageFormat) -> None:
    marks = verify_image(to_image_bytes(PIXELS, output_format), None, MAX_PX)
    assert not marks.generated and marks.xmp.digital_source_type is None and marks.manifest.state == "none"


def test_only_a_manifest_that_fits_the_file_counts(tmp_path: Path) -> None:
    paths = tmp_path / "cert.pem", tmp_path / "key.pem"
    for path, content in zip(paths, make_dev_certificate(days=1), strict=True):
        path.write_bytes(content)
    signed = ManifestSigner.open(*paths).sign(to_image_bytes(PIXELS, "png"), "png", Origin())  # without XMP
    assert verify_image(signed, None, MAX_PX).generated
    marks = verify_image(with_text(signed, b"tEXt", b"Comment\0altered"), None, MAX_PX)
    assert marks.manifest.state == "invalid" and not marks.generated


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", MalformedRequest),
        (b"no image at all", UnsupportedMediaType),
        (ImageMarker().to_file(PIXELS, "png", Origin())[:-300], MalformedRequest),
        (ImageMarker().to_file(PIXELS, "jpeg", Origin())[:900], MalformedRequest),
        (in_png("<x>" + "a" * MAX_XMP_BYTES + "</x>"), MalformedRequest),
        (in_png("<x>" + "a" * (64 * MAX_XMP_BYTES) + "</x>", zip_text=True), MalformedRequest),
        (saved("WEBP", xmp=b"<x>" + b"a" * (MAX_XMP_BYTES + 1) + b"</x>"), MalformedRequest),
        (saved("JPEG", xmp=b'<!DOCTYPE x [<!ENTITY a "aaaa">]><x>&a;</x>'), MalformedRequest),
        (saved("JPEG", xmp=b"<x"), MalformedRequest),
        (to_image_bytes(torch.zeros(600, 600, 3, dtype=torch.uint8), "png"), PayloadTooLarge),
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "huge", "bomb", "huge webp", "entities", "no xml", "pixels"],
)
def test_hostile_files_are_refused_with_a_reason(content: bytes, error: type[GiantleapError]) -> None:
    with pytest.raises(error) as refused:
        verify_image(content, None, MAX_PX)
    assert 400 <= refused.value.status < 500 and 10 < len(refused.value.detail) < 200
