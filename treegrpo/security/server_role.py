"""TLS client contexts that check the role in the server's certificate, before anything is sent.

A certificate of the run is good for its role alone. The name or address that a client verifies is not enough: all parts of one
machine have the same. gRPC clients ask for the learner's own host name instead (`treegrpo.config.security.host_of`).
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from treegrpo.config.security import Role, role_of


class RoleContext(ssl.SSLContext):
    """A client's context that ends a handshake whose server has another role than ``role``."""

    role: Role
    authorities: Sequence[x509.Certificate] = ()
    """Whoever is signed by none of them, and says no role, is a server of the outside world; empty: there is no such server."""

    def check_server(self, der: bytes | None) -> None:
        """Raise ssl.SSLCertVerificationError unless ``der``, the verified certificate of the server, says the role."""
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
    """A client's context that trusts ``ca``, and with ``public`` the authorities that everybody trusts.

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
    """The role that a certificate says, with the name it is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    return role_of_uris(names.get_values_for_type(x509.UniformResourceIdentifier))


def role_of_uris(uris: Sequence[str]) -> tuple[Role, str] | None:
    """The first role among the URIs of a certificate, with the name it is for."""
    return next((found for uri in uris if (found := role_of(uri))), None)


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether ``authority`` has signed ``certificate``."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
