"""What can be wrong before anything is started: each check returns what it found, or raises with the remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from services.cli.history import steps_done
from services.cli.model_checks import check_model
from services.sampler.engines.sglang.command import check_different, check_installed, check_listen, own_flags
from services.sampler.retriever_client import check_topk
from treegrpo.access import Access
from treegrpo.address import check_free, join_address, split_address
from treegrpo.config import Config
from treegrpo.errors import AddressInUseError, ConfigError, DataError
from treegrpo.identity import check_identity
from treegrpo.run_directory import check_run_directory, check_writable
from treegrpo.security import Role

Check = Callable[[], str]


class Address(NamedTuple):
    """An address a process of ours will listen on, and the key that says so."""

    key: str
    value: str


def check_questions(path: Path, key: str) -> str:
    """Every row of a question file is good. Raises DataError."""
    from learner.intake.questions import load_questions

    return f"{path} ({len(load_questions(path))} questions)" if path.is_file() else _no_file(path, key)


def check_corpus(path: Path) -> str:
    """Every row of the corpus is good. Raises DataError."""
    from services.retriever.index import load_corpus

    return f"{path} ({len(load_corpus(path))} documents)" if path.is_file() else _no_file(path, "retriever.corpus")


def _no_file(path: Path, key: str) -> str:
    raise DataError(f"{key} = {path} {'is a directory, not a file' if path.is_dir() else 'does not exist'}; check the path.")


def check_run_dir(config: Config) -> str:
    """The run directory is fresh, or holds the run that is to go on. Raises ConfigError, JournalError and DataError."""
    path = config.run.dir
    check_run_directory(path)
    if (done := steps_done(path)) is None:
        return f"{path} (fresh)"
    check_identity(config)
    return f"{path} (goes on after step {done})"


def learner_addresses(config: Config) -> list[Address]:
    """Where intake and trainer will listen."""
    host, port = split_address(config.learner.metrics, "learner.metrics")
    metrics = {"learner.metrics": port, "learner.metrics (the trainer's, the port after it)": port + 1} if port else {}
    return [
        Address("learner.listen", config.learner.listen),
        *(Address(key, join_address(host, number)) for key, number in metrics.items()),
    ]


def all_addresses(config: Config) -> list[Address]:
    """Where the processes of `treegrpo up` will listen."""
    return [
        *([Address("broker.address", config.broker.address)] if config.broker.embedded else []),
        *([] if config.retriever.url else [Address("retriever.listen", config.retriever.listen)]),
        *learner_addresses(config),
        *([Address("engine.listen", config.engine.listen)] if _starts_engine(config) else []),
    ]


def _starts_engine(config: Config) -> bool:
    """Whether an SGLang server is started, at a port that is known."""
    engine = config.engine
    return engine.kind == "sglang" and not engine.urls and not engine.listen.endswith(":0")


def check_addresses(addresses: list[Address]) -> str:
    """Each address can be listened on, and no two are the same. Raises ConfigError and AddressInUseError."""
    value, count = Counter(address.value for address in addresses).most_common(1)[0]
    if count > 1:
        first, second, *_ = (address.key for address in addresses if address.value == value)
        raise AddressInUseError(f"{first} and {second} are both {value}; give one of them another port.")
    for address in addresses:
        check_free(address.value, address.key)
    return ", ".join(address.value for address in addresses)


def check_sampler_metrics(config: Config) -> str:
    """Several samplers on one machine do not share a metrics port. Raises ConfigError."""
    _, port = split_address(config.sampler.metrics, "sampler.metrics")
    if port and config.sampler.count > 1:
        raise ConfigError(
            f"sampler.metrics = {config.sampler.metrics} would be shared by {config.sampler.count} samplers; "
            "give port 0, and each takes a free one."
        )
    return config.sampler.metrics


def check_engine(config: Config) -> str:
    """The engine can be started, or its servers be used. Raises ConfigError and AddressInUseError."""
    engine = config.engine
    if engine.kind == "embedded":
        return "embedded"
    if not engine.weights_dir.is_dir():
        raise ConfigError(f"engine.weights_dir = {engine.weights_dir} does not exist; name a directory in memory.")
    check_writable(engine.weights_dir, "engine.weights_dir")
    if engine.urls:
        if config.sampler.count > 1:
            raise ConfigError(
                f"engine.urls would be shared by {config.sampler.count} samplers, and each would give the servers its own "
                "weights; set sampler.count = 1, which uses all of them."
            )
        check_different(engine.urls)
        return ", ".join(engine.urls)
    own_flags(engine.flags)
    _, port = split_address(engine.listen, "engine.listen")
    check_listen(engine.listen, insecure_network=config.security.insecure_network)
    if port and config.sampler.count > 1:
        raise ConfigError(
            f"engine.listen = {engine.listen} would be shared by the SGLang servers of {config.sampler.count} samplers; "
            "give port 0, and each takes a free one."
        )
    return f"SGLang {check_installed(engine.python)} of {engine.python}"


def check_security(config: Config) -> str:
    """Certificates, passwords and tokens can be read, and no address is in the open without them. Raises ConfigError."""
    access = Access.of(config.security, Role.LEARNER)
    access.check_reach("broker.address", config.broker.address)
    access.check_listen("learner.listen", config.learner.listen)
    access.check_metrics("learner.metrics", config.learner.metrics)
    Access.of(config.security, Role.OPERATOR)
    return f"TLS with {access.keys.certificate}" if access.keys else "plain text, on this machine alone"


def check_parts_security(config: Config) -> str:
    """`check_security` for the other processes of `treegrpo up`. Raises ConfigError."""
    sampler, retriever = Access.of(config.security, Role.SAMPLER), Access.of(config.security, Role.RETRIEVER)
    sampler.check_metrics("sampler.metrics", config.sampler.metrics)
    sampler.check_url("retriever.url", config.search_url)
    if config.engine.kind == "sglang":
        for url in config.engine.urls:
            sampler.check_url("engine.urls", url)
    retriever.check_metrics("retriever.listen", config.retriever.listen)
    Access.of(config.security, Role.BROKER)
    return "sampler, retriever, broker"


def learner_checks(config: Config) -> dict[str, Check]:
    """What `treegrpo learner` needs, by name."""
    return {
        "security": partial(check_security, config),
        "ports": partial(check_addresses, learner_addresses(config)),
        "model": partial(check_model, config.model.path, config.engine.kind, config.rollout.max_context),
        "training questions": partial(check_questions, config.data.train, "data.train"),
        "held-out questions": partial(check_questions, config.data.heldout, "data.heldout"),
        "run directory": partial(check_run_dir, config),
    }


def up_checks(config: Config) -> dict[str, Check]:
    """What `treegrpo up` needs, by name."""
    corpus: dict[str, Check] = {} if config.retriever.url else {"corpus": partial(check_corpus, config.retriever.corpus)}
    return {
        **learner_checks(config),
        "ports": partial(check_addresses, all_addresses(config)),
        "sampler metrics": partial(check_sampler_metrics, config),
        "engine": partial(check_engine, config),
        "security of the parts": partial(check_parts_security, config),
        **corpus,
        "documents of a search": partial(check_topk, config),
    }


def run_checks(checks: Iterable[Check]) -> None:
    """Run all; the first that fails raises."""
    for check in checks:
        check()
