"""What a process refuses to start with, and what it never shows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr

from services.certs.authority import create_authority, issue_certificate
from services.cli.commands import as_toml
from tests.security.credential_builders import authority, save
from treegrpo.config.loader import load_config
from treegrpo.config.security import Role, SecurityConfig, check_address
from treegrpo.errors import ConfigError
from treegrpo.net.address import is_loopback
from treegrpo.security.credentials import OPEN, Credentials, has_token

pytestmark = pytest.mark.pure

SECRET = "correct-horse-battery-staple"


@pytest.fixture
def folder(tmp_path: Path, made: Path) -> Path:
    """A copy of what `treegrpo certs` makes, to be broken."""
    return shutil.copytree(made, tmp_path / "certs")


def replaced(folder: Path, path: str, data: bytes) -> None:
    (folder / path).write_bytes(data)


def expired(folder: Path) -> None:
    pair = issue_certificate(
        authority(folder), Role.SAMPLER, now=datetime.now(UTC) - timedelta(days=9), lifetime=timedelta(days=2)
    )
    replaced(folder, "sampler.pem", pair.pem)
    replaced(folder, "sampler.key", pair.key_pem)


def other_authority(folder: Path) -> None:
    pair = issue_certificate(create_authority(), Role.SAMPLER)
    replaced(folder, "sampler.pem", pair.pem)
    replaced(folder, "sampler.key", pair.key_pem)


def other_role(folder: Path) -> None:
    shutil.copy(folder / "retriever.pem", folder / "sampler.pem")
    shutil.copy(folder / "retriever.key", folder / "sampler.key")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no key": (
        lambda folder: (folder / "sampler.key").unlink(),
        r"sampler\.key \(the private key\) cannot be read \(No such file",
    ),
    "a directory for a key": (
        lambda folder: ((folder / "sampler.key").unlink(), (folder / "sampler.key").mkdir()),
        r"sampler\.key \(the private key\) cannot be read \(Is a directory",
    ),
    "an open key": (lambda folder: (folder / "sampler.key").chmod(0o644), r"sampler\.key .* \(mode 0644\); run `chmod 600"),
    "an open password": (lambda folder: (folder / "sampler.password").chmod(0o604), r"sampler\.password .* \(mode 0604\)"),
    "an empty password": (lambda folder: replaced(folder, "sampler.password", b"\n"), r"sampler\.password .* holds no secret"),
    "garbage": (lambda folder: replaced(folder, "sampler.pem", b"garbage"), r"is not a valid PEM file"),
    "another key": (
        lambda folder: shutil.copy(folder / "learner.key", folder / "sampler.key"),
        r"sampler\.key is not the key of .*sampler\.pem",
    ),
    "expired": (expired, r"sampler\.pem is valid from .* not now; renew it with `treegrpo certs`"),
    "another authority": (other_authority, r"sampler\.pem is not signed by an authority in .*ca\.pem"),
    "another role": (other_role, r"has the role retriever; this process needs one for the role sampler"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_the_files_is_said_in_a_sentence(folder: Path, fault: str) -> None:
    breaks, sentence = FAULTS[fault]
    breaks(folder)
    with pytest.raises(ConfigError, match=sentence):
        Credentials.from_config(SecurityConfig(dir=folder), Role.SAMPLER)


def test_certificates_from_elsewhere_are_named_one_by_one(made: Path, tmp_path: Path) -> None:
    keys = save(tmp_path / "other", issue_certificate(authority(made), Role.SAMPLER), (made / "ca.pem").read_bytes())
    flags = ["--security.ca", str(keys.ca), "--security.certificate", str(keys.certificate), "--security.key", str(keys.key)]
    assert Credentials.from_config(load_config(None, flags).security, Role.SAMPLER).keys == keys
    with pytest.raises(ConfigError, match=r"security\.key .*ca, certificate and key go together; security\.key is missing"):
        load_config(None, flags[:4])
    with pytest.raises(ConfigError, match=r"security\.dir already says where the files are"):
        load_config(None, [*flags, "--security.dir", str(made)])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_nothing(host: str) -> None:
    assert is_loopback(host)
    check_address("learner.listen", f"[{host}]:1", safe=False)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.7:1", "learner:1", "127.0.0.1.example.org:1"])
def test_beyond_this_machine_plain_text_is_refused_with_the_remedy(address: str) -> None:
    with pytest.raises(ConfigError, match=r"learner\.listen = .* in plain text; .*`treegrpo certs DIR`.*insecure_network = true"):
        OPEN.check_listen("learner.listen", address)
    Credentials(Role.LEARNER, insecure_network=True).check_listen("learner.listen", address)


def test_with_certificates_any_address_will_do_but_metrics_want_a_token(made: Path) -> None:
    access = Credentials.from_config(SecurityConfig(dir=made), Role.LEARNER)
    access.check_listen("learner.listen", "0.0.0.0:1")
    access.check_metrics("learner.metrics", "0.0.0.0:1")
    without = Credentials(Role.LEARNER, access.keys)
    without.check_metrics("learner.metrics", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"set security\.metrics_token_file"):
        without.check_metrics("learner.metrics", "0.0.0.0:1")


@pytest.mark.parametrize(
    ("url", "good"), [("https://search.example.org", True), ("http://localhost:1/x", True), ("http://10.0.0.7", False)]
)
def test_a_retriever_elsewhere_wants_https(url: str, good: bool) -> None:
    if good:
        OPEN.check_url("retriever.url", url)
    else:
        with pytest.raises(ConfigError, match=r"retriever\.url = .* is on another machine"):
            OPEN.check_url("retriever.url", url)


NO_URLS = ("localhost:8765", "ftp://localhost/x", "http:///x", "search", "http://localhost:99999", "http://[::1:1", "https://a:b")


@pytest.mark.parametrize("url", NO_URLS)
def test_a_url_that_is_none_is_refused_before_anybody_waits_for_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"retriever\.url = .* write http://HOST:PORT"):
        OPEN.check_url("retriever.url", url)


# ---- secrets


def test_a_secret_comes_from_the_environment_or_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "word").write_text(f"{SECRET}\n")
    (tmp_path / "word").chmod(0o600)
    flags = ["--security.broker_password_file", str(tmp_path / "word"), "--security.broker_user", "me"]
    access = Credentials.from_config(load_config(None, flags).security, Role.SAMPLER)
    assert (access.broker_user, access.broker_password.get_secret_value()) == ("me", SECRET)
    monkeypatch.setenv("TREEGRPO_SECURITY__METRICS_TOKEN", SECRET)
    assert Credentials.from_config(load_config(None).security, Role.SAMPLER).metrics_token.get_secret_value() == SECRET


def test_a_secret_where_others_could_read_it_is_refused_and_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(f'[security]\nretriever_token = "{SECRET}"\n')
    for source in (lambda: load_config(None, ["--security.metrics_token", SECRET]), lambda: load_config(tmp_path / "run.toml")):
        with pytest.raises(ConfigError, match=r"is a secret; name a file in security\.\w+_token_file") as caught:
            source()
        assert SECRET not in str(caught.value)


def test_a_secret_is_in_no_dry_run_and_no_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BROKER_PASSWORD", "METRICS_TOKEN", "RETRIEVER_TOKEN"):
        monkeypatch.setenv(f"TREEGRPO_SECURITY__{name}", SECRET)
    config = load_config(None)
    assert SECRET not in as_toml(config) + repr(config) + repr(Credentials.from_config(config.security, Role.SAMPLER))
    assert "# broker_password is set in the environment" in as_toml(config)


def test_a_token_is_compared_as_a_whole() -> None:
    token = SecretStr(SECRET)
    assert has_token(f"Bearer {SECRET}", token)
    assert has_token("", SecretStr(""))
    for header in ("", SECRET, f"Bearer {SECRET[:-1]}", f"Bearer {SECRET} ", f"Basic {SECRET}", "Bearer ü"):
        assert not has_token(header, token)
