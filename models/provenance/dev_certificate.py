"""A certificate for trying out C2PA signatures, issued by a generated authority that no verifier trusts."""

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_ORGANIZATION = "Giantleap development, not trusted"


def make_dev_certificate(days: int) -> tuple[bytes, bytes]:
    """A certificate chain, the signing certificate first, and its private key; both PEM.

    A certificate that signs itself is not valid for C2PA, so that there are two: an authority, whose key is thrown
    away, and what it certifies, for signatures only (C2PA 2.2, section 14.5.1).
    """
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority_name, name = _to_name("Giantleap development authority"), _to_name("Giantleap development")
    authority = _to_builder(authority_name, authority_name, authority_key, authority_key, days, is_authority=True)
    signing = _to_builder(name, authority_name, key, authority_key, days, is_authority=False).add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
    )
    chain = [builder.sign(authority_key, hashes.SHA256()) for builder in (signing, authority)]
    return (
        b"".join(each.public_bytes(serialization.Encoding.PEM) for each in chain),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def _to_name(common_name: str) -> x509.Name:
    names = {NameOID.COMMON_NAME: common_name, NameOID.ORGANIZATION_NAME: _ORGANIZATION}
    return x509.Name([x509.NameAttribute(each, text) for each, text in names.items()])


def _to_builder(
    name: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    days: int,
    *,
    is_authority: bool,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    usage = x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        x509.CertificateBuilder(issuer, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer_id, critical=False)
    )
