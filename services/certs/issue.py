"""`treegrpo certs DIR`: makes a private CA, a certificate for each role, passwords and tokens; a second call renews them.

    DIR/ca.pem ca.key            the authority; ca.pem may hold an old one too, while one is being replaced
    DIR/ROLE.pem ROLE.key        learner, sampler, broker, retriever, operator
    DIR/ROLE.password            of learner, sampler and operator, for the broker
    DIR/mosquitto.passwd         the same passwords, hashed, for Mosquitto
    DIR/metrics.token retriever.token

A process needs ca.pem and what bears its role's name, and the tokens. ca.key is needed by this command alone.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from services.certs.authority import CertificateWithKey, create_authority, issue_certificate
from treegrpo.config.security import USERS, Role, host_of
from treegrpo.errors import ConfigError, describe
from treegrpo.security.credentials import read_credential_file, read_secret_file
from treegrpo.storage.atomic import OWNER_ONLY, remove_partial_files, write_atomically

LOCAL = ("localhost", "127.0.0.1", "::1")
SERVERS = (Role.LEARNER, Role.BROKER, Role.RETRIEVER)
"""Roles whose certificates carry host names. Samplers serve /metrics only: clients ask for `host_of(Role.SAMPLER)`."""
TOKENS = ("metrics.token", "retriever.token")
WRITTEN = ("ca.*", "sampler-*.*", "mosquitto.passwd", *TOKENS, *(f"{role.value}.*" for role in Role))
"""Patterns of all files that `make_certificates` writes."""
NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
SECRET_BYTES = 32
PBKDF2_ROUNDS = 10_000
"""The passwords are 256 random bits, so hashing them need not be slow."""


def make_certificates(
    directory: Path, names: Sequence[str], samplers: Sequence[str], *, new_ca: bool = False, drop_old_ca: bool = False
) -> list[str]:
    """Make or renew everything in ``directory``; returns a line for each thing done.

    Args:
        directory: made if it is not there.
        names: host names and addresses at which learner, broker and retriever are reached, besides this machine's
            loopback; none: those of the certificates that are renewed.
        samplers: names of samplers that get a certificate good for them alone.
        new_ca: only add a new authority beside the old one; the next call without it signs with the new.
        drop_old_ca: only forget the old one.

    Raises:
        ConfigError: ``directory`` holds other files, which are not overwritten.
    """
    if wrong := [name for name in (*names, *samplers) if not NAME.fullmatch(name)]:
        raise ConfigError(f"{wrong[0]!r} is not a name; write letters, digits and .-_: with commas between names.")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if new_ca or drop_old_ca:
        return [_add_authority(directory) if new_ca else _drop_authority(directory)]
    authority, lines = _authority(directory)
    remove_partial_files(directory, WRITTEN)  # which may hold a private key
    for role in Role:
        hosts = _host_names(directory / f"{role.value}.pem", names) if role in SERVERS else []
        lines.append(_issue_role(directory, authority, role, role.value, hosts))
    known = {path.stem.removeprefix("sampler-") for path in directory.glob("sampler-*.pem")}
    lines += [
        _issue_role(directory, authority, Role.SAMPLER, f"sampler-{name}", [], name) for name in sorted({*samplers, *known})
    ]
    lines += [_create_secret(directory / file) for file in (*(f"{role.value}.password" for role in USERS), *TOKENS)]
    users = [
        (role.value, read_secret_file(directory / f"{role.value}.password", "a password").decode().strip()) for role in USERS
    ]
    write_certificate_file(
        directory / "mosquitto.passwd", "".join(f"{user}:{_hashed(word)}\n" for user, word in users).encode(), secret=True
    )
    return [*lines, f"{directory / 'mosquitto.passwd'}: the passwords, for Mosquitto"]


def write_certificate_file(path: Path, data: bytes, *, secret: bool) -> None:
    """Replace ``path`` atomically by ``data``; a ``secret`` is readable for its owner only."""
    write_atomically(path, data, OWNER_ONLY if secret else 0o644)


def _authority(directory: Path) -> tuple[CertificateWithKey, list[str]]:
    """The signing authority, created if there is none. Raises ConfigError."""
    certificate, key = directory / "ca.pem", directory / "ca.key"
    if certificate.exists():
        if not key.exists():
            raise ConfigError(f"{certificate} has no ca.key beside it; copy the key there to renew, or name another directory.")
        return _load(certificate, key), []
    if taken := [path.name for path in directory.glob("*") if path.suffix in {".pem", ".key"}]:
        raise ConfigError(f"{directory} holds {taken[0]} but no ca.pem; name an empty directory, nothing is written over.")
    made = create_authority()
    write_certificate_file(key, made.key_pem, secret=True)
    write_certificate_file(certificate, made.pem, secret=False)
    return made, [f"{certificate}: a new authority, {_until(made.certificate)}; keep {key} apart from the machines of the run"]


def _load(certificate: Path, key: Path) -> CertificateWithKey:
    try:
        return CertificateWithKey.from_pem(
            read_credential_file(certificate, "the authority"), read_secret_file(key, "the authority's key")
        )
    except ValueError as error:
        raise ConfigError(
            f"{certificate} or {key} is not a PEM file of `treegrpo certs` ({describe(error)}); restore it."
        ) from error


def _add_authority(directory: Path) -> str:
    before, _ = _authority(directory)
    made = create_authority()
    write_certificate_file(directory / "ca.key", made.key_pem, secret=True)
    write_certificate_file(directory / "ca.pem", made.pem + before.pem, secret=False)
    return (
        f"{directory / 'ca.pem'}: a new authority beside the old one; copy the file to every machine and restart, "
        f"then run `treegrpo certs {directory}` to sign with the new one"
    )


def _drop_authority(directory: Path) -> str:
    authority, _ = _authority(directory)
    for role in Role:
        path = directory / f"{role.value}.pem"
        if path.exists() and x509.load_pem_x509_certificate(path.read_bytes()).issuer != authority.certificate.subject:
            raise ConfigError(
                f"{path} is still of the old authority; run `treegrpo certs {directory}` first, then copy the file out."
            )
    write_certificate_file(directory / "ca.pem", authority.pem, secret=False)
    return f"{directory / 'ca.pem'}: the old authority is gone; copy the file to every machine and restart"


def _issue_role(
    directory: Path, authority: CertificateWithKey, role: Role, stem: str, hosts: Sequence[str], name: str = ""
) -> str:
    path, made = directory / f"{stem}.pem", issue_certificate(authority, role, name=name, hosts=hosts)
    renewed = f", renewed (the old one was {_until(x509.load_pem_x509_certificate(path.read_bytes()))})" if path.exists() else ""
    write_certificate_file(directory / f"{stem}.key", made.key_pem, secret=True)
    write_certificate_file(path, made.pem, secret=False)
    at = f" at {', '.join(hosts)}" if hosts else ""
    return f"{path}: {role.value} {name}".rstrip() + f"{at}, {_until(made.certificate)}{renewed}"


def _host_names(path: Path, names: Sequence[str]) -> list[str]:
    """Loopback and ``names``, or, without names, those in the certificate at ``path``."""
    if not names and path.exists():
        extensions = x509.load_pem_x509_certificate(path.read_bytes()).extensions
        known = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = [*known.get_values_for_type(x509.DNSName), *map(str, known.get_values_for_type(x509.IPAddress))]
    return list(dict.fromkeys([*LOCAL, *(name for name in names if name not in {host_of(role) for role in Role})]))


def _until(certificate: x509.Certificate) -> str:
    ends = certificate.not_valid_after_utc
    return f"valid until {ends:%Y-%m-%d}" + (" and so has expired" if ends < datetime.now(UTC) else "")


def _create_secret(path: Path) -> str:
    if path.exists():
        return f"{path}: kept"
    write_certificate_file(path, f"{secrets.token_hex(SECRET_BYTES)}\n".encode(), secret=True)
    return f"{path}: new"


def _hashed(password: str) -> str:
    """The password hash of Mosquitto 2: PBKDF2 with SHA-512."""
    salt = secrets.token_bytes(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, PBKDF2_ROUNDS)
    return f"$7${PBKDF2_ROUNDS}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"
