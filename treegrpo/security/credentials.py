"""Credentials of a process of one role: certificate, password, tokens. Read and checked when it starts.

    access = Credentials.from_config(config.security, Role.SAMPLER)
    access.check_listen("sampler.metrics", address)      # refused beyond this machine without TLS
    context = access.client_context()                    # None: in plain text

Secrets stay in SecretStr: they print as asterisks wherever they end up.
"""

from __future__ import annotations

import hmac
import ssl
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from pydantic import SecretStr

from treegrpo.config.security import Role, SecurityConfig, check_address, check_url
from treegrpo.errors import ConfigError, describe
from treegrpo.net.address import is_local, split_address
from treegrpo.security.server_role import certificate_role, is_signed_by, role_checking_context
from treegrpo.security.tls_reload import reloading_context

WORLD = 0o007
"""Permission bits of other users."""
NONE = SecretStr("")


class PemBundle(NamedTuple):
    """Certificates and key as PEM, the arguments of gRPC's credentials."""

    ca: bytes
    certificate: bytes
    key: bytes


class CertificateFiles(NamedTuple):
    """The files of one role's certificate."""

    ca: Path
    certificate: Path
    key: Path

    @property
    def pem(self) -> PemBundle:
        """Read the files, which may have been renewed. Raises ConfigError."""
        ca = read_credential_file(self.ca, "the authorities to trust")
        certificate = read_credential_file(self.certificate, "the certificate")
        return PemBundle(ca, certificate, read_secret_file(self.key, "the private key"))

    def check(self, role: Role) -> None:
        """Raise ConfigError unless the certificate fits key, CA and role, and is valid now."""
        pem = self.pem
        try:
            certificate = x509.load_pem_x509_certificate(pem.certificate)
            authorities = x509.load_pem_x509_certificates(pem.ca)
            key = load_pem_private_key(pem.key, None)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"One of {self.ca}, {self.certificate} and {self.key} is not a valid PEM file ({describe(error)})."
            ) from error
        if key.public_key() != certificate.public_key():
            raise ConfigError(f"{self.key} is not the key of {self.certificate}; make both again with `treegrpo certs`.")
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not begins <= datetime.now(UTC) <= ends:
            raise ConfigError(
                f"{self.certificate} is valid from {begins:%Y-%m-%d} to {ends:%Y-%m-%d}, not now; renew it with `treegrpo certs`."
            )
        if not any(is_signed_by(certificate, authority) for authority in authorities):
            raise ConfigError(f"{self.certificate} is not signed by an authority in {self.ca}; the two must belong together.")
        found = certificate_role(certificate)
        if found is None or found[0] is not role:
            says = f"the role {found[0].value}" if found else "no role"
            raise ConfigError(f"{self.certificate} has {says}; this process needs one for the role {role.value}.")

    def server_context(self, *, ask: bool) -> ssl.SSLContext:
        """TLS context of a server that reloads renewed files at each handshake; ``ask``: for client certificates."""
        return reloading_context(self, ask=ask)

    def client_context(self, server: Role) -> ssl.SSLContext:
        """TLS context of a client that checks the role ``server``, and the name or address it connects to."""
        context = role_checking_context(server, self.ca)
        context.load_cert_chain(self.certificate, self.key)
        return context


@dataclass(frozen=True, slots=True)
class Credentials:
    """The credentials of a process; `OPEN` has none."""

    role: Role
    keys: CertificateFiles | None = None
    broker_user: str = ""
    broker_password: SecretStr = NONE
    metrics_token: SecretStr = NONE
    retriever_token: SecretStr = NONE
    insecure_network: bool = False

    @classmethod
    def from_config(cls, security: SecurityConfig, role: Role) -> Credentials:
        """Read the files of ``role``. Raises ConfigError that names the file and the remedy."""
        keys = _keys(security, role)
        if keys is not None:
            keys.check(role)
        password = _secret(security, "broker_password", f"{role.value}.password")
        return cls(
            role,
            keys,
            broker_user=security.broker_user or (role.value if password.get_secret_value() else ""),
            broker_password=password,
            metrics_token=_secret(security, "metrics_token", "metrics.token"),
            retriever_token=_secret(security, "retriever_token", "retriever.token"),
            insecure_network=security.insecure_network,
        )

    def check_listen(self, key: str, address: str) -> None:
        """Raise ConfigError when ``address`` is invalid, or other machines could reach it in plain text."""
        split_address(address, key)
        check_address(key, address, safe=self.keys is not None or self.insecure_network)

    def check_metrics(self, key: str, address: str) -> None:
        """`check_listen` for /metrics, which other machines may reach only with a token: its readers have no certificate."""
        self.check_listen(key, address)
        if not (self.metrics_token.get_secret_value() or self.insecure_network or is_local(address)):
            raise ConfigError(
                f"{key} = {address} would show the metrics to everybody who can connect; set security.metrics_token_file."
            )

    def check_reach(self, key: str, address: str) -> None:
        """Raise ConfigError when ``address`` is invalid, or on another machine and the connection would be plain text."""
        split_address(address, key)
        check_address(key, address, safe=self.keys is not None or self.insecure_network, verb="is on another machine")

    def check_url(self, key: str, url: str) -> None:
        """`check_reach` for a URL."""
        check_url(key, url, safe=self.insecure_network)

    def server_context(self, *, ask: bool = False) -> ssl.SSLContext | None:
        """TLS context of a server; None: plain text. With ``ask`` clients need a certificate."""
        return None if self.keys is None else self.keys.server_context(ask=ask)

    def client_context(self) -> ssl.SSLContext | None:
        """TLS context of an MQTT client; None: plain text."""
        return None if self.keys is None else self.keys.client_context(Role.BROKER)

    def web_context(self, server: Role) -> ssl.SSLContext | bool:
        """TLS context of an HTTPS client: public authorities, and the run's for servers of the role ``server``."""
        return True if self.keys is None else role_checking_context(server, self.keys.ca, public=True)


OPEN = Credentials(Role.OPERATOR)
"""Plain text, no password: what stays on this machine."""


def bearer_header(token: SecretStr) -> dict[str, str]:
    """The Authorization header with ``token``; none for an empty token."""
    return {"Authorization": f"Bearer {token.get_secret_value()}"} if token.get_secret_value() else {}


def has_token(header: str, token: SecretStr) -> bool:
    """Whether an Authorization ``header`` has ``token``, or no token is configured; compared in constant time."""
    expected = bearer_header(token)
    return not expected or hmac.compare_digest(header.encode(errors="replace"), expected["Authorization"].encode())


def _keys(security: SecurityConfig, role: Role) -> CertificateFiles | None:
    if security.dir is not None:
        return CertificateFiles(security.dir / "ca.pem", security.dir / f"{role.value}.pem", security.dir / f"{role.value}.key")
    if security.ca is not None and security.certificate is not None and security.key is not None:
        return CertificateFiles(security.ca, security.certificate, security.key)
    return None


def _secret(security: SecurityConfig, name: str, usual: str) -> SecretStr:
    """Read a secret from the environment, else from the configured file, else from the default file in `dir`."""
    given: SecretStr = getattr(security, name)
    path: Path | None = getattr(security, f"{name}_file")
    if given.get_secret_value():
        return given
    if path is None and (security.dir is None or not (security.dir / usual).exists()):
        return NONE
    path = path or (security.dir or Path()) / usual
    try:
        text = read_secret_file(path, f"security.{name}").decode().strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} (security.{name}) is not a text file; write the secret into it, in one line.") from error
    if not text or not text.isprintable():
        raise ConfigError(f"{path} (security.{name}) holds no secret; write one into it, in one line.")
    return SecretStr(text)


def read_credential_file(path: Path, what: str) -> bytes:
    """The bytes of a file. Raises ConfigError."""
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or describe(error)
        raise ConfigError(
            f"{path} ({what}) cannot be read ({reason}); make it with `treegrpo certs`, or let this user read it."
        ) from error


def read_secret_file(path: Path, what: str) -> bytes:
    """`read_credential_file` for a secret, which others must not be able to read. Raises ConfigError."""
    data = read_credential_file(path, what)
    if (mode := stat.S_IMODE(path.stat().st_mode)) & WORLD:
        raise ConfigError(f"{path} ({what}) is open to every user of this machine (mode {mode:04o}); run `chmod 600 {path}`.")
    return data
