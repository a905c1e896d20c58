"""deploy/init.py: the secrets of each service's volume, and data for an empty data volume."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509

from deploy import init
from treegrpo.errors import ConfigError


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    for volume in ("authority", *init.VOLUME_FILES):
        (tmp_path / volume).mkdir()
    return tmp_path


def distribute_secrets(secrets: Path, *more: str, renew_days: int = init.RENEW_DAYS) -> None:
    init.distribute_secrets(secrets, [*init.SERVICES, *more], renew_days)


def files(secrets: Path) -> dict[str, bytes]:
    return {str(path.relative_to(secrets)): path.read_bytes() for path in secrets.rglob("*") if path.is_file()}


def names(secrets: Path) -> set[str]:
    """Those that the learner's certificate holds for."""
    certificate = x509.load_pem_x509_certificate((secrets / "learner" / "learner.pem").read_bytes())
    known = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(known.get_values_for_type(x509.DNSName))


def test_each_service_has_what_it_needs_and_nothing_else(secrets: Path) -> None:
    distribute_secrets(secrets)
    for role, expected in init.VOLUME_FILES.items():
        more = {"mosquitto_pub"} if role == "broker" else set[str]()
        assert {path.name for path in (secrets / role).iterdir()} == {name.format(role=role) for name in expected} | more
        assert all(path.stat().st_mode & 0o777 == init.GROUP_READABLE for path in (secrets / role).iterdir())
    holders = [role for role in init.VOLUME_FILES if (secrets / role / "ca.key").exists()]
    assert holders == [], "only the authority signs"


def test_a_second_time_changes_nothing(secrets: Path) -> None:
    distribute_secrets(secrets)
    before = files(secrets)
    distribute_secrets(secrets)
    assert files(secrets) == before


def test_a_new_name_or_a_near_expiry_renews_certificates_of_one_authority(secrets: Path) -> None:
    distribute_secrets(secrets)
    before = files(secrets)
    distribute_secrets(secrets, "trainer.example.org")
    assert "trainer.example.org" in names(secrets)
    named = files(secrets)
    distribute_secrets(secrets, "trainer.example.org", renew_days=400)
    renewed = files(secrets)
    assert len({one["learner/learner.pem"] for one in (before, named, renewed)}) == 3
    assert len({one["learner/ca.pem"] for one in (before, named, renewed)}) == 1
    assert len({one["sampler/sampler.password"] for one in (before, named, renewed)}) == 1, "who is connected stays so"


def test_an_empty_volume_gets_geohop_and_a_full_one_is_left_alone(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "geohop"
    (data := tmp_path / "data").mkdir()
    init.fill_data_volume(data, Path("geohop.toml"), example)
    assert (data / "model").is_dir()
    (data / "mine.toml").touch()
    (data / "geohop.toml").unlink()
    init.fill_data_volume(data, Path("mine.toml"), example)
    assert not (data / "geohop.toml").exists()
    with pytest.raises(ConfigError, match=r"no file other\.toml; set CONFIG in \.env"):
        init.fill_data_volume(data, Path("other.toml"), example)


def test_a_folder_that_cannot_be_read_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="let user 10001 read the folder"):
        init.fill_data_volume(tmp_path / "none", Path("geohop.toml"))
