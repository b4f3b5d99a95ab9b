"""The XMP packet of an image: IPTC's digital source type, the program and, on request, the parameters.

Nothing here imports torch: the API process reads packets.
"""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Final
from xml.sax.saxutils import quoteattr

import defusedxml.ElementTree
from defusedxml import DefusedXmlException

GENERATOR: Final = "Giantleap"
SOURCE_TYPES: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/"
GENERATED: Final = SOURCE_TYPES + "trainedAlgorithmicMedia"
COMPOSITE: Final = SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"
MAX_XMP_BYTES: Final = 1 << 20

_XMP: Final = "http://ns.adobe.com/xap/1.0/"
_IPTC: Final = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_RDF: Final = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"


class XmpError(ValueError):
    """A packet that cannot be read; the message says why."""


@dataclass(frozen=True, slots=True)
class Origin:
    """How an image was made.

    Args:
        from_image: Whether an image came in, which this one is made from.
        parameters: Prompt, seed and so on, as JSON; None: they stay out of the file.
    """

    from_image: bool = False
    parameters: str | None = None

    @property
    def source_type(self) -> str:
        """IPTC's digital source type, a URL."""
        return COMPOSITE if self.from_image else GENERATED


@dataclass(frozen=True, slots=True)
class XmpMarks:
    """What a packet says; None where it is silent."""

    digital_source_type: str | None = None
    creator_tool: str | None = None
    parameters: str | None = None


def generator_version() -> str:
    """Version of the generator, as files and manifests name it."""
    return version("giantleap")


def to_xmp(origin: Origin) -> bytes:
    """The packet of an image: the same origin gives the same bytes.

    The properties are those of the IPTC Photo Metadata Standard 2025.1 and of XMP (ISO 16684-1).
    """
    fields = {
        "xmp:CreatorTool": f"{GENERATOR} {generator_version()}",
        "Iptc4xmpExt:DigitalSourceType": origin.source_type,
    }
    if origin.parameters is not None:
        fields["Iptc4xmpExt:AIPromptInformation"] = origin.parameters
    attributes = "".join(f"\n   {name}={quoteattr(value)}" for name, value in fields.items())
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/">\n <rdf:RDF xmlns:rdf="{_RDF}">\n'
        f'  <rdf:Description rdf:about="" xmlns:xmp="{_XMP}" xmlns:Iptc4xmpExt="{_IPTC}"{attributes}/>\n'
        ' </rdf:RDF>\n</x:xmpmeta>\n<?xpacket end="r"?>'
    ).encode()


def read_xmp(packet: bytes) -> XmpMarks:
    """What a packet of any program says, whether its properties are attributes or elements.

    Raises:
        XmpError: The packet is too large, no XML, or XML that defines entities.
    """
    if len(packet) > MAX_XMP_BYTES:
        raise XmpError(f"the XMP packet has {len(packet)} bytes; at most {MAX_XMP_BYTES} are read")
    try:
        root = defusedxml.ElementTree.fromstring(packet.rstrip(b"\0"))
    except (DefusedXmlException, SyntaxError, ValueError) as error:  # ParseError is a SyntaxError
        raise XmpError("the XMP packet is not XML that can be read safely; write the metadata again") from error
    found: dict[str, str] = {}
    for element in root.iter():
        if element.text and element.text.strip():
            found.setdefault(element.tag, element.text.strip())
        for name, value in element.attrib.items():
            found.setdefault(element.tag if name == f"{{{_RDF}}}resource" else name, value)
    return XmpMarks(
        digital_source_type=found.get(f"{{{_IPTC}}}DigitalSourceType"),
        creator_tool=found.get(f"{{{_XMP}}}CreatorTool"),
        parameters=found.get(f"{{{_IPTC}}}AIPromptInformation"),
    )
