"""A private certificate authority, and the certificates that it issues for roles.

ECDSA on P-256. A certificate carries the role twice: as URI ``treegrpo://role/ROLE`` (or ``…/ROLE/NAME`` for one sampler
only), which a server reads, and as host name ``ROLE.treegrpo.internal``, which a client can ask for.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from treegrpo.config.security import Role, host_of, uri_of

AUTHORITY_DAYS = 3650
LEAF_DAYS = 365
CLOCK_SKEW = timedelta(hours=1)
"""How far a peer's clock may be behind."""
KEY_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


@dataclass(frozen=True, slots=True)
class CertificateWithKey:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        encoding, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        return self.key.private_bytes(encoding, kind, serialization.NoEncryption())

    @classmethod
    def from_pem(cls, certificate: bytes, key: bytes) -> CertificateWithKey:
        """Read PEM files; the first of several certificates counts. Raises ValueError unless key and certificate fit."""
        private = serialization.load_pem_private_key(key, None)
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise ValueError("the key is not on an elliptic curve")  # noqa: TRY004 - as the library says of a bad key
        made = cls(x509.load_pem_x509_certificate(certificate), private)
        if private.public_key() != made.certificate.public_key():
            raise ValueError("the key is not the certificate's")
        return made


def create_authority(now: datetime | None = None) -> CertificateWithKey:
    """Create a CA that can sign end-entity certificates only, valid for ten years."""
    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    name = _name(f"treegrpo private CA {serial >> 128:08x}")
    builder = _builder(name, name, key, serial, now or datetime.now(UTC), timedelta(days=AUTHORITY_DAYS))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
    return CertificateWithKey(builder.sign(key, hashes.SHA256()), key)


def issue_certificate(
    authority: CertificateWithKey,
    role: Role,
    *,
    name: str = "",
    hosts: Sequence[str] = (),
    now: datetime | None = None,
    lifetime: timedelta = timedelta(days=LEAF_DAYS),
) -> CertificateWithKey:
    """Issue a certificate for ``role``, for one sampler alone if ``name`` is given, valid at ``hosts`` (names or IPs)."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(f"{role.value} {name}".strip())
    issuer = authority.certificate.subject
    builder = _builder(subject, issuer, key, x509.random_serial_number(), now or datetime.now(UTC), lifetime)
    alternatives = [x509.DNSName(host_of(role)), x509.UniformResourceIdentifier(uri_of(role, name)), *map(_host, hosts)]
    both_usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])  # all serve /metrics
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage("digital_signature"), True),
        (both_usages, False),
        (x509.SubjectAlternativeName(alternatives), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), False),
    ):
        builder = builder.add_extension(extension, critical=critical)
    return CertificateWithKey(builder.sign(authority.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, serial: int, now: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), serial, now - CLOCK_SKEW, now + lifetime)
    return builder.add_extension(identifier, critical=False)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _usage(*allowed: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in allowed for usage in KEY_USAGES})


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
