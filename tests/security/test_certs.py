"""`treegrpo certs`: what it makes, what it keeps, what it refuses."""

from __future__ import annotations

import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509

from services.certs.issue import make_certificates
from tests.cli.command_harness import treegrpo
from tests.security.credential_builders import access
from treegrpo.config.security import Role
from treegrpo.errors import ConfigError
from treegrpo.storage.atomic import partial_path


def make(folder: Path, *names: str, new_ca: bool = False, drop_old_ca: bool = False, samplers: tuple[str, ...] = ()) -> list[str]:
    return make_certificates(folder, names, samplers, new_ca=new_ca, drop_old_ca=drop_old_ca)


def hosts(path: Path) -> list[str]:
    known = (
        x509.load_pem_x509_certificate(path.read_bytes()).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    )
    return [*known.get_values_for_type(x509.DNSName), *map(str, known.get_values_for_type(x509.IPAddress))]


def serials(path: Path) -> list[int]:
    return [certificate.serial_number for certificate in x509.load_pem_x509_certificates(path.read_bytes())]


def test_every_role_can_work_with_what_it_makes(tmp_path: Path) -> None:
    make(tmp_path)
    for role in Role:
        assert access(tmp_path, role).keys is not None
    assert access(tmp_path, Role.SAMPLER).broker_user == "sampler"
    assert len(access(tmp_path, Role.LEARNER).metrics_token.get_secret_value()) > 30


def test_secrets_are_for_their_owner_alone(tmp_path: Path) -> None:
    make(tmp_path / "new", samplers=("s7",))
    secret = [path for path in (tmp_path / "new").iterdir() if path.suffix != ".pem"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_a_key_that_a_crash_has_left_is_removed_by_the_next_call(tmp_path: Path) -> None:
    make(tmp_path)
    left = partial_path(tmp_path / "ca.key")
    left.write_text("half a key")
    make(tmp_path)
    assert not left.exists()


def test_certificates_last_a_year_and_the_authority_ten(tmp_path: Path) -> None:
    make(tmp_path)
    for name, days in (("ca", 3650), ("learner", 365)):
        left = x509.load_pem_x509_certificate((tmp_path / f"{name}.pem").read_bytes()).not_valid_after_utc - datetime.now(UTC)
        assert left.days in {days - 1, days}


def test_servers_get_their_names_and_samplers_none(tmp_path: Path) -> None:
    make(tmp_path, "learner.example.org", "10.0.0.7")
    assert hosts(tmp_path / "broker.pem") == [
        *("broker.treegrpo.internal", "localhost", "learner.example.org"),
        *("127.0.0.1", "::1", "10.0.0.7"),
    ]
    assert hosts(tmp_path / "sampler.pem") == ["sampler.treegrpo.internal"]


def test_running_it_again_renews_certificates_says_so_and_keeps_the_rest(tmp_path: Path) -> None:
    make(tmp_path, "learner.example.org", samplers=("s7",))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    said = make(tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    same = {name for name in before if before[name] == after[name]}
    assert same == {"ca.pem", "ca.key", *(name for name in before if name.endswith((".password", ".token")))}
    assert "learner.example.org" in hosts(tmp_path / "learner.pem")
    renewed = [line for line in said if "renewed (the old one was valid until" in line]
    assert len(renewed) == len(Role) + 1


def test_an_authority_is_replaced_in_three_steps_and_trusted_at_each(tmp_path: Path) -> None:
    make(tmp_path)
    (old,) = serials(tmp_path / "ca.pem")
    make(tmp_path, new_ca=True)
    new, kept = serials(tmp_path / "ca.pem")
    assert kept == old
    access(tmp_path, Role.SAMPLER)  # still of the old one, and trusted
    with pytest.raises(ConfigError, match="still of the old authority"):
        make(tmp_path, drop_old_ca=True)
    make(tmp_path)
    access(tmp_path, Role.SAMPLER)
    make(tmp_path, drop_old_ca=True)
    assert serials(tmp_path / "ca.pem") == [new]
    for role in Role:
        access(tmp_path, role)


def test_nothing_that_is_not_its_own_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "learner.pem").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds learner\.pem but no ca\.pem"):
        make(tmp_path)
    assert (tmp_path / "learner.pem").read_text() == "mine"


def test_without_its_key_an_authority_cannot_renew(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "ca.key").unlink()
    with pytest.raises(ConfigError, match=r"has no ca\.key beside it"):
        make(tmp_path)


def test_the_key_of_another_authority_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b")
    (tmp_path / "a" / "ca.key").write_bytes((tmp_path / "b" / "ca.key").read_bytes())
    with pytest.raises(ConfigError, match="the key is not the certificate's"):
        make(tmp_path / "a")


@pytest.mark.parametrize("name", ["a b", "", "ü.example.org", "../x"])
def test_what_is_no_name_is_refused_before_anything_is_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is not a name"):
        make(tmp_path / "new", name)
    assert not (tmp_path / "new").exists()


def test_the_command_takes_a_directory_and_its_own_flags(tmp_path: Path) -> None:
    done = treegrpo("certs", str(tmp_path / "c"), "--names", "a.example.org,10.0.0.7", "--samplers", "s7")
    assert (done.code, done.error) == (0, "")
    assert (tmp_path / "c" / "sampler-s7.key").is_file()
    assert "DIR is missing" in treegrpo("certs").sentence
    assert "--bogus is not a flag of this command" in treegrpo("certs", str(tmp_path / "c"), "--bogus").sentence
