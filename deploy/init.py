"""Runs before everything else: certificates, passwords and tokens for each service's own volume; GeoHop where no data is.

    /secrets/authority   what `treegrpo certs` keeps; no service sees it
    /secrets/ROLE        of it what a service of that role needs, readable for its group alone
    /data                configuration, model, questions and corpus

Run again it changes nothing, but for certificates that end within RENEW_DAYS, or that a service under a new name lacks.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from services.certs.issue import certs, write
from treegrpo.errors import ConfigError, TreeGrpoError
from treegrpo.observability.log_setup import log_to_stderr
from treegrpo.runtime.entrypoint import report_error

log = logging.getLogger("init")
SECRETS, DATA, EXAMPLE = Path("/secrets"), Path("/data"), Path("/opt/treegrpo/geohop")
SERVICES = ("learner", "mosquitto", "retriever")
"""Names in docker-compose.yml and deploy/kubernetes; CERTIFICATE_NAMES has further ones, with commas."""
RENEW_DAYS = 60
GROUP_READABLE = 0o640
TLS = ("ca.pem", "{role}.pem", "{role}.key")
SHARES = {
    "learner": (*TLS, "learner.password", "metrics.token"),
    "sampler": (*TLS, "sampler.password", "metrics.token", "retriever.token"),
    "retriever": (*TLS, "metrics.token", "retriever.token"),
    "broker": (*TLS, "mosquitto.passwd"),
    "operator": (*TLS, "operator.password", "metrics.token", "retriever.token"),
    "prometheus": ("ca.pem", "metrics.token"),
    "grafana": ("grafana.password",),
}
"""By volume, the files in it."""
CERTS = "/mosquitto/certs"
SELF_TEST = (
    f"-h localhost\n-p 8883\n--cafile {CERTS}/ca.pem\n--cert {CERTS}/broker.pem\n--key {CERTS}/broker.key\n"
    "-u sampler\n-P {password}\n"
)
"""What the broker's own health check connects with; the name of the least of its users."""


def main() -> int:
    """Returns the exit code."""
    log_to_stderr()
    try:
        hand_out(SECRETS / "authority", [*SERVICES, *filter(None, os.environ["CERTIFICATE_NAMES"].split(","))])
        fill(DATA, Path(os.environ["CONFIG"]))
    except TreeGrpoError as error:
        return report_error(error)
    return 0


def hand_out(authority: Path, names: list[str]) -> None:
    """Make or renew what is missing or ends soon, and give each volume its share. Raises ConfigError."""
    if not good_for(authority, names):
        for line in certs(authority, names, [], new_ca=False, drop_old_ca=False):
            log.info("%s", line)
    if not (password := authority / "grafana.password").exists():
        write(password, os.urandom(16).hex().encode(), secret=True)
    for role, files in SHARES.items():
        for file in (name.format(role=role) for name in files):
            give(SECRETS / role / file, (authority / file).read_bytes())
    password = (authority / "sampler.password").read_text(encoding="utf-8").strip()
    give(SECRETS / "broker" / "mosquitto_pub", SELF_TEST.format(password=password).encode())


def good_for(authority: Path, names: list[str]) -> bool:
    """Whether the broker's certificate, as old as all, holds for ``names`` and for RENEW_DAYS."""
    if not (path := authority / "broker.pem").exists():
        return False
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    known = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
    return set(names) <= set(known) and certificate.not_valid_after_utc > datetime.now(UTC) + timedelta(days=RENEW_DAYS)


def give(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` for its group to read, unless it is there."""
    if not path.exists() or path.read_bytes() != data:
        write(path, data, secret=True)
        path.chmod(GROUP_READABLE)


def fill(data: Path, config: Path) -> None:
    """Copy GeoHop to an empty ``data``. Raises ConfigError if ``config`` is not there then."""
    try:
        if not any(data.iterdir()):
            shutil.copytree(EXAMPLE, data, dirs_exist_ok=True)
            log.info("GeoHop is in the empty volume /data")
    except OSError as error:
        raise ConfigError(
            f"DATA cannot be read or filled ({error}); let user 10001 read the folder, or leave DATA out of .env for GeoHop."
        ) from error
    if not (data / config).is_file():
        raise ConfigError(f"DATA holds no file {config}; set CONFIG in .env to the name of the configuration file in it.")


if __name__ == "__main__":
    sys.exit(main())
