"""Command line and environment of an SGLang server, and checks of the SGLang installation.

The server's Python environment is not ours: it pins its own torch and transformers (deploy/sglang/).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treegrpo.config.security import web_address
from treegrpo.errors import ConfigError, describe
from treegrpo.net.address import is_local
from treegrpo.runtime.process_environment import child_environment

TESTED_VERSIONS = ("0.5.21", "0.5.23")
OLDEST_VERSION = (0, 5, 21)
"""The first version whose responses name the policy version of each token."""
CONTEXT_MARGIN = 8
"""Tokens of context a server keeps for itself."""
PROBE_SECONDS = 120.0
PRINT_VERSION = "import importlib.metadata as m; print(*(d.version for d in m.distributions(name='sglang')))"
PRINT_CUDA = "import torch; print(torch.cuda.is_available())"
INSTALL_HINT = "install it with `make sglang-cpu`, or see docs/sglang.md for a GPU, and name its Python in engine.python."
DERIVED_FLAGS = (
    "--model-path",
    "--model",
    "--host",
    "--port",
    "--weight-version",
    "--context-length",
    "--random-seed",
    "--config",
)
"""Flags that follow from the rest of the configuration, or would override such."""
AUTH_FLAGS = ("--api-key", "--admin-api-key", "--ssl")
"""Prefixes of flags that ask clients for credentials which ours does not send."""
NO_TOKENIZER_FLAG = "--skip-tokenizer-init"
"""Without its tokenizer a server knows no stop strings."""
CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--disable-cuda-graph", "--disable-overlap-schedule"),  # there is nothing that a second stream could overlap with
    "--sleep-on-idle",  # a scheduler that looks for work all the time takes it from the learner
)
SERVER_ENVIRONMENT = {
    # The prefix of siblings is computed once, also when they start together and share a beginning with what is cached.
    "IN_BATCH_PREFIX_CACHING_CHECK_THRESHOLD": "1000000000",
    "IN_BATCH_PREFIX_CACHING_DEPRIORITIZE_THRESHOLD": "8",
    # The margin may go beyond what the model was trained for; no token ever does.
    "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True, slots=True)
class SGLangInstallation:
    """The SGLang of an environment."""

    python: Path
    cuda: bool


@dataclass(frozen=True, slots=True)
class ServerLaunch:
    """Parameters of a server's command line."""

    installation: SGLangInstallation
    context: int
    max_running: int
    cache_tokens: int
    dtype: str
    threads: int
    seed: int
    flags: tuple[str, ...]

    def command_line(self, model: Path, version: str, host: str, port: int) -> list[str]:
        """The command line that serves the model directory ``model`` as ``version``."""
        own = {
            "--model-path": str(model),
            "--weight-version": version,
            "--host": host,
            "--port": str(port),
            "--context-length": str(self.context + CONTEXT_MARGIN),
            "--random-seed": str(self.seed),
            "--dtype": self.dtype,
            "--max-running-requests": str(self.max_running),
            "--schedule-policy": "lpm",
        }
        if not self.installation.cuda:
            own["--max-total-tokens"] = str(self.cache_tokens + self.max_running * (self.context + CONTEXT_MARGIN))
        rest = ["--enable-metrics", "--skip-server-warmup", *(() if self.installation.cuda else CPU_FLAGS)]
        # argparse takes the last of two, so configured flags come last.
        return [
            *(str(self.installation.python), "-m", "sglang.launch_server"),
            *(part for pair in own.items() for part in pair),
            *rest,
            *self.flags,
        ]

    def environment(self) -> dict[str, str]:
        """The environment variables of the server."""
        cpu = {} if self.installation.cuda else {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(self.threads)}
        return child_environment({**SERVER_ENVIRONMENT, **cpu}, ours=False)


def parse_extra_flags(text: str) -> tuple[str, ...]:
    """engine.flags as a shell would split them. Raises ConfigError for one that is set elsewhere."""
    try:
        flags = tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(
            f"engine.flags = {text!r} cannot be split into words ({describe(error)}); close the quotation."
        ) from error
    for flag in flags:
        name = flag.partition("=")[0]
        if _abbreviates(name, DERIVED_FLAGS):
            raise ConfigError(f"engine.flags has {name}, which follows from the rest of the configuration; leave it out.")
        if name.startswith(AUTH_FLAGS) or _abbreviates(name, AUTH_FLAGS):
            raise ConfigError(
                f"engine.flags has {name}, which asks for credentials that the sampler does not send; leave it out."
            )
        if _abbreviates(name, (NO_TOKENIZER_FLAG,)):
            raise ConfigError(f"engine.flags has {name}, and stop strings need the server's tokenizer; leave it out.")
    return flags


def _abbreviates(name: str, flags: tuple[str, ...]) -> bool:
    """Whether argparse takes ``name`` for one of ``flags``: an unambiguous beginning is enough."""
    return len(name) > len("--") and name.startswith("--") and any(flag.startswith(name) for flag in flags)


def check_listen_address(listen: str, *, insecure_network: bool) -> None:
    """Raise ConfigError if others could reach the server: they could replace its weights."""
    if not (insecure_network or is_local(listen)):
        raise ConfigError(
            f"engine.listen = {listen} lets everybody who can connect change the weights, since SGLang has no authentication; "
            "listen on 127.0.0.1, or accept that with security.insecure_network = true."
        )


def check_distinct_urls(urls: Sequence[str]) -> None:
    """Raise ConfigError if two of ``urls`` are one server, which would get each policy version twice at once."""
    seen: dict[tuple[str, int], str] = {}
    for url in urls:
        _, host, port = web_address("engine.urls", url)
        place = ("127.0.0.1" if host == "localhost" else host, port)
        if place in seen:
            raise ConfigError(f"engine.urls has one server twice, as {seen[place]} and as {url}; leave one out.")
        seen[place] = url


def find_installation(python: Path) -> SGLangInstallation:
    """The SGLang that ``python`` runs. Raises ConfigError, as `check_installed`; takes as long as importing torch."""
    check_installed(python)
    return SGLangInstallation(_absolute(python), cuda=_run_python(python, PRINT_CUDA) == "True")


def check_installed(python: Path) -> str:
    """The version of the SGLang that ``python`` runs. Raises ConfigError if there is none, or not one that can be used."""
    if not os.access(_absolute(python), os.X_OK):
        what = "is not an executable program" if python.exists() else "does not exist"
        raise ConfigError(f"SGLang is not installed: engine.python = {python} {what}; {INSTALL_HINT}")
    if not (versions := _run_python(python, PRINT_VERSION)):
        raise ConfigError(f"SGLang is not installed in the environment of engine.python = {python}; {INSTALL_HINT}")
    version = versions.split()[0]  # of two on the path, the first is what is imported
    check_version(version, f"the environment of engine.python = {python}")
    return version


def check_version(version: str, where: str) -> None:
    """Raise ConfigError if an SGLang of this ``version`` cannot be used."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if not numbers:
        raise ConfigError(f"The SGLang in {where} reports an invalid version ({version!r}); {INSTALL_HINT}")
    if not OLDEST_VERSION <= numbers < (0, 6):
        raise ConfigError(f"SGLang {version} in {where} cannot be used; install {' or '.join(TESTED_VERSIONS)} there.")


def _absolute(python: Path) -> Path:
    """The absolute path with links unresolved: a virtual environment is known by the path of its link."""
    return Path(os.path.abspath(python))  # noqa: PTH100


def _run_python(python: Path, code: str) -> str:
    """What ``code`` prints in that Python. Raises ConfigError if it cannot be run."""
    try:
        command = [_absolute(python), "-c", code]
        environment = child_environment(ours=False)
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=True, env=environment)  # noqa: S603
    except subprocess.CalledProcessError as error:
        last_line = (error.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConfigError(f"engine.python = {python} ended with code {error.returncode} ({last_line}); {INSTALL_HINT}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"engine.python = {python} cannot be used ({describe(error)}); {INSTALL_HINT}") from error
    return done.stdout.strip()
