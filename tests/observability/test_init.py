"""What runs before everything else in docker compose: each service's own secrets, and data where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509

from deploy import init
from treegrpo.errors import ConfigError


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(init, "SECRETS", tmp_path)
    for volume in ("authority", *init.SHARES):
        (tmp_path / volume).mkdir()
    return tmp_path


def hand_out(secrets: Path, *more: str) -> None:
    init.hand_out(secrets / "authority", [*init.SERVICES, *more])


def files(secrets: Path) -> dict[str, bytes]:
    return {str(path.relative_to(secrets)): path.read_bytes() for path in secrets.rglob("*") if path.is_file()}


def names(secrets: Path) -> set[str]:
    """Those that the learner's certificate holds for."""
    certificate = x509.load_pem_x509_certificate((secrets / "learner" / "learner.pem").read_bytes())
    known = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(known.get_values_for_type(x509.DNSName))


def test_each_service_has_what_it_needs_and_nothing_else(secrets: Path) -> None:
    hand_out(secrets)
    for role, wanted in init.SHARES.items():
        more = {"mosquitto_pub"} if role == "broker" else set[str]()
        assert {path.name for path in (secrets / role).iterdir()} == {name.format(role=role) for name in wanted} | more
        assert all(path.stat().st_mode & 0o777 == init.GROUP_READABLE for path in (secrets / role).iterdir())
    holders = [role for role in init.SHARES if (secrets / role / "ca.key").exists()]
    assert holders == [], "only the authority signs"


def test_a_second_time_changes_nothing(secrets: Path) -> None:
    hand_out(secrets)
    before = files(secrets)
    hand_out(secrets)
    assert files(secrets) == before


def test_a_new_name_and_an_end_that_comes_near_make_new_certificates_of_the_same_authority(
    secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_out(secrets)
    before = files(secrets)
    hand_out(secrets, "trainer.example.org")
    assert "trainer.example.org" in names(secrets)
    named = files(secrets)
    monkeypatch.setattr(init, "RENEW_DAYS", 400)
    hand_out(secrets, "trainer.example.org")
    renewed = files(secrets)
    assert len({one["learner/learner.pem"] for one in (before, named, renewed)}) == 3
    assert len({one["learner/ca.pem"] for one in (before, named, renewed)}) == 1
    assert len({one["sampler/sampler.password"] for one in (before, named, renewed)}) == 1, "who is connected stays so"


def test_an_empty_volume_gets_geohop_and_a_full_one_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "EXAMPLE", Path(__file__).parents[2] / "examples" / "geohop")
    (data := tmp_path / "data").mkdir()
    init.fill(data, Path("geohop.toml"))
    assert (data / "model").is_dir()
    (data / "mine.toml").touch()
    (data / "geohop.toml").unlink()
    init.fill(data, Path("mine.toml"))
    assert not (data / "geohop.toml").exists()
    with pytest.raises(ConfigError, match=r"no file other\.toml; set CONFIG in \.env"):
        init.fill(data, Path("other.toml"))


def test_a_folder_that_cannot_be_read_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="let user 10001 read the folder"):
        init.fill(tmp_path / "none", Path("geohop.toml"))
