"""Security configuration: the section [security], roles, and which addresses may be used without TLS.

The rule: what only this machine can reach (loopback) may be plain; everything else needs TLS, or the user's word that the
network is safe. `treegrpo.security.credentials` reads the files; docs/security.md is the whole story.
"""

from __future__ import annotations

from enum import Enum
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from treegrpo.config.base import OptionalInputPath, Section
from treegrpo.errors import ConfigError
from treegrpo.net.address import is_local, join_address

DOMAIN = "treegrpo.internal"
SCHEME = "treegrpo://role/"


class Role(Enum):
    """The role of a process in the run, which its certificate names."""

    LEARNER = "learner"
    SAMPLER = "sampler"
    BROKER = "broker"
    RETRIEVER = "retriever"
    OPERATOR = "operator"
    """A person with the command line: asks for health, sets the run state."""


USERS = (Role.LEARNER, Role.SAMPLER, Role.OPERATOR)
"""Who talks to the broker, each with a password of its own."""


def host_of(role: Role) -> str:
    """The host name in a role's certificate by which a client knows it, wherever it runs."""
    return f"{role.value}.{DOMAIN}"


def uri_of(role: Role, name: str = "") -> str:
    """The URI in a role's certificate; with ``name`` it is valid for the sampler of that name only."""
    return f"{SCHEME}{role.value}" + (f"/{name}" if name else "")


def role_of(uri: str) -> tuple[Role, str] | None:
    """The role and name in a certificate's URI, or None when it is another kind of URI."""
    role, _, name = uri.removeprefix(SCHEME).partition("/")
    return (Role(role), name) if uri.startswith(SCHEME) and role in {known.value for known in Role} else None


class SecurityConfig(Section):
    """Who may talk to whom; see docs/security.md."""

    dir: OptionalInputPath = None
    """What `treegrpo certs` made: every process takes the files of its role from there. Turns on TLS for everything."""
    ca: OptionalInputPath = None
    """Instead of `dir`, for certificates made elsewhere: the authorities to trust, one PEM file."""
    certificate: OptionalInputPath = None
    """This process's certificate, PEM; goes with `ca` and `key`."""
    key: OptionalInputPath = Field(default=None, validate_default=True)
    """Its private key, PEM, which others must not be able to read."""
    broker_user: str = ""
    """Empty: this process's role."""
    broker_password: SecretStr = SecretStr("")
    """Only from the environment, TREEGRPO_SECURITY__BROKER_PASSWORD."""
    broker_password_file: OptionalInputPath = None
    """Its file; else ROLE.password in `dir`."""
    metrics_token: SecretStr = SecretStr("")
    """Only from the environment: what /metrics asks for as "Authorization: Bearer"."""
    metrics_token_file: OptionalInputPath = None
    """Its file; else metrics.token in `dir`."""
    retriever_token: SecretStr = SecretStr("")
    """Only from the environment: what the retriever asks for, and the samplers send."""
    retriever_token_file: OptionalInputPath = None
    """Its file; else retriever.token in `dir`."""
    insecure_network: bool = False
    """Beyond this machine too: plain text where there is no certificate, /metrics without a token. Whoever is on the network
    can then read, forge and stop everything."""

    @field_validator("key")
    @classmethod
    def _complete(cls, key: object, info: ValidationInfo) -> object:
        given = {name: info.data.get(name) is not None for name in ("ca", "certificate")} | {"key": key is not None}
        if any(given.values()) and not all(given.values()):
            missing = ", ".join(f"security.{name}" for name, there in given.items() if not there)
            raise PydanticCustomError("keys", "ca, certificate and key go together; {missing} is missing", {"missing": missing})
        if any(given.values()) and info.data.get("dir") is not None:
            raise PydanticCustomError("keys", "security.dir already says where the files are; give one or the other")
        return key

    @property
    def tls(self) -> bool:
        """Whether all connections use TLS."""
        return self.dir is not None or self.ca is not None


def check_address(key: str, address: str, *, safe: bool, verb: str = "listens where other machines can reach it") -> None:
    """Raise ConfigError when ``address`` (HOST:PORT) is not on this machine and the connection is not ``safe``."""
    if not safe and not is_local(address):
        raise ConfigError(
            f"{key} = {address} {verb}, in plain text; make certificates with `treegrpo certs DIR` and set security.dir = DIR, "
            "or accept that anybody there can read and forge everything with security.insecure_network = true."
        )


def check_url(key: str, url: str, *, safe: bool) -> None:
    """`check_address` for a URL: https is as good as certificates."""
    scheme, host, port = web_address(key, url)
    if scheme != "https":
        check_address(key, join_address(host, port), safe=safe, verb="is on another machine")


def web_address(key: str, url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a web server's URL. Raises ConfigError if it is invalid."""
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:  # the port is no number or too large, or a bracket is missing
        scheme, host, port = "", None, None
    if scheme not in {"http", "https"} or not host:
        raise ConfigError(f"{key} = {url!r} is not the URL of a web server; write http://HOST:PORT or https://HOST:PORT.")
    return scheme, host, port or (443 if scheme == "https" else 80)
