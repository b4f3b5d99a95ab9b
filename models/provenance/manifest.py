"""C2PA manifests, by the `c2pa-python` of the extra `provenance`: signs images, and reads signed ones.

Nothing is fetched: no time stamp, no revocation list, and no manifest that a file names by its address.
"""

import io
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from giantleap.models.messages import install_hint
from giantleap.models.pixels.image_formats import CONTENT_TYPES, ImageFormat
from giantleap.models.provenance.xmp import GENERATOR, Origin, generator_version

if TYPE_CHECKING:
    from c2pa import Context, Signer

ManifestState = Literal["none", "valid", "trusted", "invalid", "remote", "not_checked"]
_OFFLINE: Final = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "builder": {"thumbnail": {"enabled": False}},
}
_UNTRUSTED: Final = "signingCredential.untrusted"  # of every certificate that is on no list here: the state says it


class ProvenanceError(ValueError):
    """A certificate or key that cannot sign; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class ManifestReport:
    """What a file's active manifest says.

    Args:
        state: `valid`: its signature and hashes match; `invalid`: they do not, or it cannot be read; `remote`: it is
            elsewhere and was not fetched; `not_checked`: `c2pa-python` is not installed here.
        signed_by: Names of the certificate's owner and issuer.
        digital_source_type: Of its first action.
        problems: Codes of what does not match.
    """

    state: ManifestState
    signed_by: str | None = None
    generator: str | None = None
    digital_source_type: str | None = None
    problems: tuple[str, ...] = ()


class ManifestSigner:
    """Adds signed manifests to images; it has signed one and read it back.

    Args:
        signer: Holds the certificate chain and the key.
        context: Settings of the library.
    """

    def __init__(self, signer: "Signer", context: "Context") -> None:
        self._signer = signer
        self._context = context
        self._signing = threading.Lock()  # c2pa does not promise that threads may share a signer

    @classmethod
    def open(cls, certificate: Path, key: Path) -> Self:
        """Read a certificate chain and its key, and sign a small image for a trial.

        Args:
            certificate: PEM file, the signing certificate first.
            key: PEM file of its private key, PKCS #8 without a password.

        Raises:
            ProvenanceError: The extra is not installed, a file cannot be read, or their signature is not valid.
        """
        try:
            import c2pa
            import cryptography  # noqa: F401  # of the same extra
        except ImportError as error:
            raise ProvenanceError(
                f"c2pa_cert is set, but c2pa-python is not installed: {install_hint('provenance')}"
            ) from error
        chain, secret = (_read(path) for path in (certificate, key))
        try:
            info = c2pa.C2paSignerInfo(_algorithm(chain, certificate), chain, secret, None)
            opened = cls(c2pa.Signer.from_info(info), c2pa.Context.from_dict(_OFFLINE))
            trial = opened.sign(_small_image(), "png", Origin())
        except c2pa.C2paError:  # without its text, which may quote the key's file
            raise ProvenanceError(
                f"{certificate} and {key}: not a certificate and its key for C2PA; {_ADVICE}"
            ) from None
        report = read_manifest(trial, "png")
        if report.state not in ("valid", "trusted"):
            raise ProvenanceError(
                f"{certificate}: its signature is not valid ({', '.join(report.problems)}); {_ADVICE}"
            )
        return opened

    def sign(self, content: bytes, output_format: ImageFormat, origin: Origin) -> bytes:
        """The image with a manifest that names the generator and the digital source type; its pixels are the same."""
        import c2pa

        signed = io.BytesIO()
        with self._signing, c2pa.Builder(_to_manifest(origin), context=self._context) as builder:
            builder.sign(self._signer, CONTENT_TYPES[output_format], io.BytesIO(content), signed)
        return signed.getvalue()


_ADVICE: Final = "docs/provenance.md says what one needs, and `giantleap provenance dev-cert` makes one for trying"


def read_manifest(content: bytes, image_format: ImageFormat) -> ManifestReport:
    """Read and check the manifest of an image, without the network."""
    try:
        import c2pa
    except ImportError:
        return ManifestReport("not_checked")
    context = c2pa.Context.from_dict(_OFFLINE)
    try:
        reader = c2pa.Reader.try_create(CONTENT_TYPES[image_format], io.BytesIO(content), context=context)
        if reader is None:
            return ManifestReport("none")
        with reader:
            return _to_report(json.loads(reader.json()))
    except c2pa.C2paError as error:
        if str(error).startswith("Remote"):
            return ManifestReport("remote")
        return ManifestReport("invalid", problems=("manifest.unreadable",))


def _to_report(store: dict[str, Any]) -> ManifestReport:
    manifest = store["manifests"][store["active_manifest"]]
    signature = manifest.get("signature_info", {})
    generators = [each.get("name", "") for each in manifest.get("claim_generator_info", ())]
    codes = dict.fromkeys(each["code"] for each in store.get("validation_status", ()))
    return ManifestReport(
        state=_STATES[store["validation_state"]],
        signed_by=", ".join(filter(None, (signature.get("common_name"), signature.get("issuer")))) or None,
        generator=next(filter(None, generators), None),
        digital_source_type=next(_source_types(manifest), None),
        problems=tuple(code for code in codes if code != _UNTRUSTED),
    )


_STATES: Final[dict[str, ManifestState]] = {"Valid": "valid", "Trusted": "trusted", "Invalid": "invalid"}


def _source_types(manifest: dict[str, Any]) -> Any:
    for assertion in manifest.get("assertions", ()):
        if assertion["label"].startswith("c2pa.actions"):
            for action in assertion["data"].get("actions", ()):
                if "digitalSourceType" in action:
                    yield action["digitalSourceType"]


def _to_manifest(origin: Origin) -> dict[str, Any]:
    generator = {"name": GENERATOR, "version": generator_version()}
    created = {"action": "c2pa.created", "digitalSourceType": origin.source_type, "softwareAgent": generator}
    return {
        "claim_generator_info": [generator],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ProvenanceError(f"{path}: {error.strerror}; name a PEM file that this process may read") from None


def _algorithm(chain: bytes, path: Path) -> str:
    """The signature's algorithm, which follows from the certificate's key."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    try:
        key = x509.load_pem_x509_certificate(chain).public_key()
    except ValueError:
        raise ProvenanceError(f"{path}: no PEM file of certificates; {_ADVICE}") from None
    match key:
        case ec.EllipticCurvePublicKey(key_size=256):
            return "es256"
        case ec.EllipticCurvePublicKey(key_size=384):
            return "es384"
        case ec.EllipticCurvePublicKey(key_size=521):
            return "es512"
        case ed25519.Ed25519PublicKey():
            return "ed25519"
        case rsa.RSAPublicKey():
            return "ps256"
    raise ProvenanceError(f"{path}: a key of another kind; C2PA takes P-256, P-384, P-521, Ed25519 and RSA")


def _small_image() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="PNG")
    return buffer.getvalue()
