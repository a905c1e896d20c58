"""Credentials of all roles, and of peers that must be refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from services.certs.authority import CertificateWithKey, create_authority, issue_certificate
from services.certs.issue import write_certificate_file
from treegrpo.config.security import Role, SecurityConfig
from treegrpo.security.credentials import CertificateFiles, Credentials


def access(folder: Path, role: Role) -> Credentials:
    """What a process of ``role`` has with ``security.dir = folder``."""
    return Credentials.from_config(SecurityConfig(dir=folder), role)


def authority(folder: Path) -> CertificateWithKey:
    return CertificateWithKey.from_pem((folder / "ca.pem").read_bytes(), (folder / "ca.key").read_bytes())


def save(folder: Path, pair: CertificateWithKey, ca: bytes) -> CertificateFiles:
    """``pair`` as files of somebody who trusts ``ca``."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = CertificateFiles(folder / "ca.pem", folder / "own.pem", folder / "own.key")
    write_certificate_file(keys.ca, ca, secret=False)
    write_certificate_file(keys.certificate, pair.pem, secret=False)
    write_certificate_file(keys.key, pair.key_pem, secret=True)
    return keys


def impostor(folder: Path, made: Path, who: str, role: Role = Role.SAMPLER) -> Credentials:
    """Somebody with a certificate that is ``expired``, of a ``stranger``'s authority, or without a ``roleless`` one's role."""
    ours = authority(made)
    match who:
        case "expired":
            pair = issue_certificate(
                ours, role, hosts=["127.0.0.1"], now=datetime.now(UTC) - timedelta(days=9), lifetime=timedelta(days=2)
            )
        case "stranger":
            pair = issue_certificate(create_authority(), role, hosts=["127.0.0.1"])
        case "named":
            pair = issue_certificate(ours, role, name="s7")
        case _:
            raise ValueError(who)
    return replace(access(made, role), keys=save(folder / who, pair, ours.pem))
