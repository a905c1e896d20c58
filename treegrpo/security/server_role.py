"""TLS client contexts that check the role in the server's certificate, before anything is sent.

The name or address in the certificate is not enough: all parts on one machine have the same. gRPC
clients ask for the learner's own host name instead (`treegrpo.config.security.host_of`).
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from treegrpo.config.security import Role, role_of


class RoleContext(ssl.SSLContext):
    """A client's TLS context that aborts the handshake if the server's certificate has another role than ``role``."""

    role: Role
    authorities: Sequence[x509.Certificate] = ()
    """A certificate without a role is accepted if none of these has signed it (a public server); empty: never accepted."""

    def check_server(self, der: bytes | None) -> None:
        """Raise ssl.SSLCertVerificationError unless ``der``, the server's verified certificate, has the role."""
        if der is None:  # unverified: the handshake has failed already
            return
        certificate = x509.load_der_x509_certificate(der)
        found = certificate_role(certificate)
        if found is None and self.authorities and not any(is_signed_by(certificate, one) for one in self.authorities):
            return
        if found is None or found[0] is not self.role:
            says = f"the role {found[0].value}" if found else "no role"
            raise ssl.SSLCertVerificationError(1, f"its certificate has {says}; a {self.role.value} has to show its own")


class _Socket(ssl.SSLSocket):
    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        if isinstance(self.context, RoleContext):
            self.context.check_server(self.getpeercert(binary_form=True))


class _Object(ssl.SSLObject):
    def do_handshake(self) -> None:
        super().do_handshake()
        if isinstance(self.context, RoleContext):
            self.context.check_server(self.getpeercert(binary_form=True))


RoleContext.sslsocket_class = _Socket
RoleContext.sslobject_class = _Object


def role_checking_context(role: Role, ca: Path, *, public: bool = False) -> RoleContext:
    """A client's TLS context that trusts ``ca``, and with ``public`` the system's authorities.

    Raises:
        OSError, ssl.SSLError, ValueError: ``ca`` is no file of certificates.
    """
    context = RoleContext(ssl.PROTOCOL_TLS_CLIENT)
    context.role = role
    context.load_verify_locations(ca)
    if public:
        context.authorities = x509.load_pem_x509_certificates(ca.read_bytes())
        context.load_default_certs()
    return context


def certificate_role(certificate: x509.Certificate) -> tuple[Role, str] | None:
    """The role in a certificate, and the name it is limited to."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    return role_of_uris(names.get_values_for_type(x509.UniformResourceIdentifier))


def role_of_uris(uris: Sequence[str]) -> tuple[Role, str] | None:
    """The first role among the URIs of a certificate, and the name it is limited to."""
    return next((found for uri in uris if (found := role_of(uri))), None)


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether ``authority`` has signed ``certificate``."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
