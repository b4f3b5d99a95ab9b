"""XMP packets: what is written is read back by other programs, and what others write is read here."""

import io
import json

import pytest
import torch
from PIL import Image

from giantleap.models.pixels.image_formats import CONTENT_TYPES, ImageFormat
from giantleap.models.provenance.marker import ImageMarker
from giantleap.models.provenance.xmp import COMPOSITE, GENERATED, MAX_XMP_BYTES, Origin, XmpError, read_xmp, to_xmp

PIXELS = torch.arange(24 * 40 * 3).reshape(24, 40, 3).remainder(251).to(torch.uint8)
ODD_PROMPT = 'a "red" <sphere> & 光\u0007\ufffe\n\U0001f600'

ELEMENTS = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:e="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:xap="http://ns.adobe.com/xap/1.0/">
<e:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture</e:DigitalSourceType>
<xap:CreatorTool>Camera 1.0</xap:CreatorTool></rdf:Description></rdf:RDF></x:xmpmeta>"""
BOMB = b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><x>&b;</x>'


def described(content: bytes) -> dict[str, str]:
    """The properties of an image as Pillow's own reader of XMP finds them."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        found: dict[str, str] = image.getxmp()["xmpmeta"]["RDF"]["Description"]
    return found


@pytest.mark.parametrize("output_format", list(CONTENT_TYPES))
@pytest.mark.parametrize(("from_image", "expected"), [(False, GENERATED), (True, COMPOSITE)])
def test_another_reader_finds_the_source_type_and_the_generator(
    output_format: ImageFormat, from_image: bool, expected: str
) -> None:
    found = described(ImageMarker().to_file(PIXELS, output_format, Origin(from_image)))
    assert found["DigitalSourceType"] == expected
    assert found["CreatorTool"].startswith("Giantleap ")
    assert "AIPromptInformation" not in found


@pytest.mark.parametrize("output_format", list(CONTENT_TYPES))
def test_parameters_come_back_whatever_the_prompt_holds(output_format: ImageFormat) -> None:
    parameters = json.dumps({"prompt": ODD_PROMPT, "seed": 7})
    content = ImageMarker().to_file(PIXELS, output_format, Origin(parameters=parameters))
    assert json.loads(described(content)["AIPromptInformation"]) == {"prompt": ODD_PROMPT, "seed": 7}


def test_equal_images_of_one_origin_are_equal_files() -> None:
    for output_format in CONTENT_TYPES:
        first, second = (ImageMarker().to_file(PIXELS.clone(), output_format, Origin()) for _ in range(2))
        assert first == second


def test_what_is_written_is_read_back() -> None:
    marks = read_xmp(to_xmp(Origin(from_image=True, parameters='{"seed": 7}')))
    assert marks.digital_source_type == COMPOSITE and marks.parameters == '{"seed": 7}'


def test_properties_of_other_programs_may_be_elements() -> None:
    marks = read_xmp(ELEMENTS + b"\0\0")
    assert marks.digital_source_type == GENERATED.replace("trainedAlgorithmicMedia", "digitalCapture")
    assert marks.creator_tool == "Camera 1.0" and marks.parameters is None


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"<x" + b" " * MAX_XMP_BYTES, "at most"),
        (ELEMENTS[:-20], "not XML"),
        (b"", "not XML"),
        (b"\xff\xfe\x00", "not XML"),
        (BOMB, "not XML"),
    ],
    ids=["huge", "cut off", "empty", "bytes", "entities"],
)
def test_a_packet_that_cannot_be_read_is_refused(packet: bytes, reason: str) -> None:
    with pytest.raises(XmpError, match=reason):
        read_xmp(packet)


def test_deep_nesting_is_read_without_recursion() -> None:
    depth = 100_000
    assert read_xmp(b"<x>" * depth + b"</x>" * depth).digital_source_type is None
