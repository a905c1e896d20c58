"""Init container: puts certificates, passwords and tokens into each service's volume, and GeoHop into an empty data volume.

    /secrets/authority   the output of `treegrpo certs`; no service sees it
    /secrets/ROLE        the files that a service of that role needs, readable for its group only
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

from services.certs.issue import make_certificates, write_certificate_file
from treegrpo.errors import ConfigError, TreeGrpoError
from treegrpo.observability.log_setup import log_to_stderr
from treegrpo.runtime.entrypoint import report_error
from treegrpo.storage.atomic import remove_partial_files

log = logging.getLogger("init")
SECRETS, DATA, EXAMPLE = Path("/secrets"), Path("/data"), Path("/opt/treegrpo/geohop")
SERVICES = ("learner", "mosquitto", "retriever")
"""Names in docker-compose.yml and deploy/kubernetes; CERTIFICATE_NAMES has further ones, with commas."""
RENEW_DAYS = 60
GROUP_READABLE = 0o640
TLS = ("ca.pem", "{role}.pem", "{role}.key")
VOLUME_FILES = {
    "learner": (*TLS, "learner.password", "metrics.token"),
    "sampler": (*TLS, "sampler.password", "metrics.token", "retriever.token"),
    "retriever": (*TLS, "metrics.token", "retriever.token"),
    "broker": (*TLS, "mosquitto.passwd"),
    "operator": (*TLS, "operator.password", "metrics.token", "retriever.token"),
    "prometheus": ("ca.pem", "metrics.token"),
    "grafana": ("grafana.password",),
}
"""The files of each volume."""
CERTS = "/mosquitto/certs"
SELF_TEST = (
    f"-h localhost\n-p 8883\n--cafile {CERTS}/ca.pem\n--cert {CERTS}/broker.pem\n--key {CERTS}/broker.key\n"
    "-u sampler\n-P {password}\n"
)
"""Options of the broker's health check, which connects as the user with the fewest rights."""


def main() -> int:
    """Returns the exit code."""
    log_to_stderr()
    try:
        distribute_secrets(SECRETS, [*SERVICES, *filter(None, os.environ["CERTIFICATE_NAMES"].split(","))])
        fill_data_volume(DATA, Path(os.environ["CONFIG"]))
    except TreeGrpoError as error:
        return report_error(error)
    return 0


def distribute_secrets(secrets: Path, names: list[str], renew_days: int = RENEW_DAYS) -> None:
    """Make or renew what is missing or expires soon, and copy to each volume what belongs there. Raises ConfigError."""
    authority = secrets / "authority"
    remove_partial_files(authority, ["*"])
    if not is_valid_for(authority, names, renew_days):
        for line in make_certificates(authority, names, []):
            log.info("%s", line)
    if not (password := authority / "grafana.password").exists():
        write_certificate_file(password, os.urandom(16).hex().encode(), secret=True)
    for role, files in VOLUME_FILES.items():
        for file in (name.format(role=role) for name in files):
            install_secret(secrets / role / file, (authority / file).read_bytes())
    password = (authority / "sampler.password").read_text(encoding="utf-8").strip()
    install_secret(secrets / "broker" / "mosquitto_pub", SELF_TEST.format(password=password).encode())


def is_valid_for(authority: Path, names: list[str], days: int) -> bool:
    """Whether the broker's certificate, as old as all others, is valid for ``names`` and for ``days`` more."""
    if not (path := authority / "broker.pem").exists():
        return False
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    known = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
    return set(names) <= set(known) and certificate.not_valid_after_utc > datetime.now(UTC) + timedelta(days=days)


def install_secret(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, readable for its group, unless it is there."""
    if not path.exists() or path.read_bytes() != data:
        write_certificate_file(path, data, secret=True)
        path.chmod(GROUP_READABLE)


def fill_data_volume(data: Path, config: Path, example: Path = EXAMPLE) -> None:
    """Copy ``example`` to an empty ``data``. Raises ConfigError if there is no ``config`` then."""
    try:
        if not any(data.iterdir()):
            shutil.copytree(example, data, dirs_exist_ok=True)
            log.info("GeoHop is in the empty volume /data")
    except OSError as error:
        raise ConfigError(
            f"DATA cannot be read or filled ({error}); let user 10001 read the folder, or leave DATA out of .env for GeoHop."
        ) from error
    if not (data / config).is_file():
        raise ConfigError(f"DATA holds no file {config}; set CONFIG in .env to the name of the configuration file in it.")


if __name__ == "__main__":
    sys.exit(main())
