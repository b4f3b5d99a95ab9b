"""C2PA manifests: ours are valid for c2pa's own reader, changed pixels are found out, and nothing is fetched."""

import io
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import c2pa
import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from PIL import Image

from giantleap.models.pixels.image_formats import CONTENT_TYPES, ImageFormat
from giantleap.models.pixels.images import to_image_bytes
from giantleap.models.provenance.dev_certificate import make_dev_certificate
from giantleap.models.provenance.manifest import ManifestSigner, ProvenanceError, read_manifest
from giantleap.models.provenance.marker import ImageMarker
from giantleap.models.provenance.xmp import COMPOSITE, GENERATED, Origin

PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write(tmp_path_factory.mktemp("c2pa"), *make_dev_certificate(days=1))


def write(folder: Path, chain: bytes, key: bytes) -> tuple[Path, Path]:
    paths = folder / "cert.pem", folder / "key.pem"
    for path, content in zip(paths, (chain, key), strict=True):
        path.write_bytes(content)
    return paths


def pixels_of(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.array(image)


@pytest.mark.parametrize("output_format", list(CONTENT_TYPES))
@pytest.mark.parametrize(("from_image", "expected"), [(False, GENERATED), (True, COMPOSITE)])
def test_a_signed_image_is_valid_and_says_how_it_was_made(
    files: tuple[Path, Path], output_format: ImageFormat, from_image: bool, expected: str
) -> None:
    origin = Origin(from_image)
    signed = ImageMarker(ManifestSigner.open(*files)).to_file(PIXELS, output_format, origin)
    with c2pa.Reader(CONTENT_TYPES[output_format], io.BytesIO(signed)) as reader:
        assert reader.get_validation_state() == "Valid"
    report = read_manifest(signed, output_format)
    assert (report.state, report.generator, report.digital_source_type) == ("valid", "Giantleap", expected)
    assert report.problems == () and "Giantleap development" in str(report.signed_by)
    assert np.array_equal(pixels_of(signed), pixels_of(ImageMarker().to_file(PIXELS, output_format, origin)))


@pytest.mark.parametrize("output_format", list(CONTENT_TYPES))
def test_one_changed_byte_of_the_pixels_is_found_out(files: tuple[Path, Path], output_format: ImageFormat) -> None:
    plain = ImageMarker().to_file(PIXELS, output_format, Origin())
    signed = bytearray(ManifestSigner.open(*files).sign(plain, output_format, Origin()))
    start = {"png": b"IDAT", "jpeg": b"\xff\xda", "webp": b"VP8 "}[output_format]
    signed[signed.rindex(start) + 200] ^= 1
    report = read_manifest(bytes(signed), output_format)
    assert report.state == "invalid" and "assertion.dataHash.mismatch" in report.problems


def test_the_xmp_is_signed_too(files: tuple[Path, Path]) -> None:
    signed = ImageMarker(ManifestSigner.open(*files)).to_file(PIXELS, "jpeg", Origin(from_image=True))
    altered = signed.replace(b"compositeWithTrainedAlgorithmicMedia", b"xompositeWithTrainedAlgorithmicMedia", 1)
    assert altered != signed and read_manifest(altered, "jpeg").state == "invalid"


@pytest.mark.parametrize("output_format", list(CONTENT_TYPES))
def test_an_image_without_a_manifest_has_none(output_format: ImageFormat) -> None:
    assert read_manifest(ImageMarker().to_file(PIXELS, output_format, Origin()), output_format).state == "none"


def test_a_changed_manifest_is_invalid(files: tuple[Path, Path]) -> None:
    signed = bytearray(ManifestSigner.open(*files).sign(to_image_bytes(PIXELS, "jpeg"), "jpeg", Origin()))
    signed[signed.index(b"trainedAlgorithmicMedia")] ^= 1  # of the assertion: this file has no XMP
    report = read_manifest(bytes(signed), "jpeg")
    assert report.state == "invalid" and report.problems


def test_a_manifest_that_cannot_be_parsed_is_invalid(files: tuple[Path, Path]) -> None:
    signed = ImageMarker(ManifestSigner.open(*files)).to_file(PIXELS, "jpeg", Origin())
    report = read_manifest(signed.replace(b"jumb", b"jumx"), "jpeg")
    assert report.state == "invalid" and report.problems == ("manifest.unreadable",)


def _expired(chain: bytes, key: bytes) -> tuple[bytes, bytes]:
    """The chain with a signing certificate of the day before yesterday, by an authority of its own."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    leaf, authority = x509.load_pem_x509_certificates(chain)
    issuer = ec.generate_private_key(ec.SECP256R1())
    now = leaf.not_valid_before_utc
    builder = x509.CertificateBuilder(
        leaf.issuer, leaf.subject, leaf.public_key(), leaf.serial_number, now - timedelta(2), now - timedelta(1)
    )
    for extension in leaf.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    old = builder.sign(issuer, hashes.SHA256())
    pem = serialization.Encoding.PEM
    return old.public_bytes(pem) + authority.public_bytes(pem), key


@pytest.mark.parametrize("fault", ["expired", "other key", "no certificate", "no key", "authority", "not there"])
def test_a_certificate_that_cannot_sign_is_refused_in_one_line_without_the_key(tmp_path: Path, fault: str) -> None:
    chain, key = make_dev_certificate(days=1)
    other = make_dev_certificate(days=1)[1]
    authority = chain[chain.index(b"-----BEGIN", 10) :]
    written = {
        "expired": _expired(chain, key),
        "other key": (chain, other),
        "no certificate": (b"certificate", key),
        "no key": (chain, b"c2VjcmV0IGtleQ=="),
        "authority": (authority, key),
        "not there": (chain, key),
    }[fault]
    paths = write(tmp_path, *written)
    if fault == "not there":
        paths[1].unlink()
    with pytest.raises(ProvenanceError, match=r"c(ert|2pa)") as refused:
        ManifestSigner.open(*paths)
    text = str(refused.value)
    assert "\n" not in text and str(tmp_path) in text
    assert not any(line.decode() in text for line in written[1].splitlines() if b"-----" not in line)


@pytest.fixture
def web() -> Iterator[tuple[str, list[str]]]:
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_error(404)

        def log_message(self, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/manifest.c2pa", seen
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_manifest_that_a_file_names_by_address_is_not_fetched(web: tuple[str, list[str]]) -> None:
    address, seen = web
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:dcterms="http://purl.org/dc/terms/" '
        f'dcterms:provenance="{address}"/>'
        "</rdf:RDF></x:xmpmeta>"
    )
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, format="JPEG", xmp=packet.encode())
    assert read_manifest(buffer.getvalue(), "jpeg").state == "remote" and seen == []
