"""Process environment: the variables and import path that a process inherits, and those that it passes to its children.

    shell, pod, notebook ─► isolate_process() ─► this process ─► child_environment() ─► child: the same files, none of the rest

Import path: our packages, and what they need, come from where this process has them: neither the current directory nor
another directory that has a `services` or `learner` of its own comes before them. Variables that other programs leave
behind (ranks of a launcher, Prometheus' files for several processes, settings of matplotlib, uvicorn, Python) are not
handed on. Standard library alone, because it is called before anything else is imported.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from treegrpo.observability.standard_streams import make_streams_lossy

ROOT = Path(__file__).resolve().parents[2]
"""The directory that holds our packages."""
PACKAGES = ("treegrpo", "services", "learner")
SEARCH = "PYTHONPATH"
RANKS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
"""What launchers tell the processes of a job."""
RANK_PREFIXES = ("TORCHELASTIC_", "PET_", "ACCELERATE_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MPI_LOCAL")
READ_AT_START = ("PYTHONOPTIMIZE", "PYTHONINSPECT", "PYTHONWARNINGS")
"""What Python has taken in before we are asked: asserts and docstrings that libraries need, warnings that end them."""
REMOVED_VARIABLES = (
    *("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"),
    *("MPLBACKEND", "MATPLOTLIBRC", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS", "mqtt_proxy", "MQTT_PROXY"),
    "SSLKEYLOGFILE",  # TLS would end where it cannot be written, and be read by others where it can
    *("PYTHONIOENCODING", "PYTHONVERBOSE", "PYTHONPROFILEIMPORTTIME", "PYTHONSTARTUP"),
    *READ_AT_START,
)
"""Settings of libraries that this project sets itself, or that would break it."""
REMOVED_PREFIXES = ("UVICORN_",)
FIXED = {"PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}
"""The current directory is not searched for modules; files and streams are UTF-8."""
LOOPBACK = "localhost,127.0.0.1,::1"
"""Hosts that no library reaches through a proxy. Our own clients use no proxy at all (`treegrpo.net.http_client`)."""
DEFAULTS = {"GRPC_VERBOSITY": "NONE"}
"""gRPC's own log has a line with unescaped text of the peer for each failed handshake: see docs/security.md."""


def isolate_process() -> None:
    """Set up streams, import path and variables of this process. Call it before third-party imports."""
    make_streams_lossy()
    unwanted = _unwanted()
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) not in unwanted]
    kept = _own_environment()
    for name in [name for name in os.environ if name not in kept]:
        del os.environ[name]
    os.environ.update(kept)


def isolate_module_process() -> None:
    """Isolate this process if ``python -m`` is starting one of our modules in it; a program that imports them is left alone."""
    if sys.argv[0] == "-m":  # as long as Python looks for the module
        reexec_with_clean_environment()
        isolate_process()


def reexec_with_clean_environment() -> None:
    """Re-execute this process without the variables that Python itself reads at its start, if any of them is set."""
    if any(os.environ.get(name) for name in READ_AT_START):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], _own_environment())  # noqa: S606


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs one of our modules, found as by this process; use it with `child_environment`."""
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment(more: Mapping[str, str] | None = None, *, ours: bool = True) -> dict[str, str]:
    """The variables of a child process.

    Args:
        more: variables that are set on top.
        ours: it runs our packages; False: the Python of another environment, with packages of its own.
    """
    kept = {name: value for name, value in os.environ.items() if not (is_rank_variable(name) or _is_removed(name))}
    unwanted = {*_unwanted(), str(ROOT)}
    search = [path for entry in kept.pop(SEARCH, "").split(os.pathsep) if (path := os.path.realpath(entry)) not in unwanted]
    if ours and str(ROOT) not in _own_paths():
        search.insert(0, str(ROOT))
    if not ours:
        kept.pop("PYTHONHOME", None)
    direct = ",".join(filter(None, (kept.get("no_proxy") or kept.get("NO_PROXY"), LOOPBACK)))
    kept |= {"no_proxy": direct, "NO_PROXY": direct}
    return {**DEFAULTS, **kept, **({SEARCH: os.pathsep.join(search)} if search else {}), **FIXED, **(more or {})}


def is_rank_variable(name: str) -> bool:
    """Whether a variable is one by which a launcher numbers the processes of a job."""
    return name in RANKS or name.startswith(RANK_PREFIXES)


def remove_rank_variables() -> None:
    """Remove the variables of a launcher from the environment of this process."""
    for name in [name for name in os.environ if is_rank_variable(name)]:
        del os.environ[name]


def _own_environment() -> dict[str, str]:
    ranks = {
        name: value for name, value in os.environ.items() if is_rank_variable(name)
    }  # `learner.trainer.distributed.rank_launcher` decides
    return {**child_environment(), **ranks}


def _is_removed(name: str) -> bool:
    return name in REMOVED_VARIABLES or name.startswith(REMOVED_PREFIXES)


def _own_paths() -> set[str]:
    """The default import paths of this Python."""
    return {os.path.realpath(path) for path in sysconfig.get_paths().values()}


def _unwanted() -> set[str]:
    """Import paths to remove: the current directory, and entries of PYTHONPATH with packages of our names, except our own."""
    try:
        here = str(Path.cwd())
    except OSError:  # it has been deleted
        here = ""
    listed = [os.path.realpath(entry) for entry in os.environ.get(SEARCH, "").split(os.pathsep) if entry]
    shadows = [path for path in listed if any(os.path.exists(f"{path}/{name}{end}") for name in PACKAGES for end in ("", ".py"))]  # noqa: PTH110
    return {here, *shadows} - {str(ROOT), *_own_paths()}
