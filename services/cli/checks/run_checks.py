"""Checks of a run before anything is started. Each returns what it found, or raises an error with the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from learner.intake.leases.question_file import load_questions
from learner.intake.persistence.untrained_run import check_resumable
from learner.trainer.algorithm.plan_signal import check_signal
from services.cli.checks.check import Check, CheckWarning
from services.cli.reports.run_history import steps_done
from services.sampler.retriever_client import check_topk
from treegrpo.config.schema import Config
from treegrpo.config.security import Role
from treegrpo.core.question import Question
from treegrpo.errors import AddressInUseError, ConfigError, DataError
from treegrpo.net.address import check_free, check_port, join_address, share_port, split_address
from treegrpo.net.http_client import public_url
from treegrpo.runtime.run_directory import check_run_directory, check_writable
from treegrpo.security.credentials import Credentials
from treegrpo.storage.run_files import check_run_files


class ListenAddress(NamedTuple):
    """An address that a process of ours will listen on, and its configuration key."""

    key: str
    value: str


def check_corpus(path: Path) -> str:
    """Every row of the corpus is valid. Raises DataError."""
    from services.retriever.index import load_corpus

    return f"{path} ({len(load_corpus(path))} documents)" if path.is_file() else _raise_no_file(path, "retriever.corpus")


def _raise_no_file(path: Path, key: str) -> str:
    raise DataError(f"{key} = {path} {'is a directory, not a file' if path.is_dir() else 'does not exist'}; check the path.")


def check_run_dir(config: Config) -> str:
    """The run directory is new, or holds the run that is to be continued. Raises ConfigError, JournalError and DataError."""
    path = config.run.dir
    check_run_directory(path)
    check_run_files(path)
    if (done := steps_done(path)) is None:
        return f"{path} (fresh)"
    if changed := check_resumable(config):
        return f"{path} (nothing was trained yet; it begins anew: {changed})"
    return f"{path} (continues after step {done})"


def learner_addresses(config: Config) -> list[ListenAddress]:
    """Where intake and trainer will listen."""
    host, port = split_address(config.learner.metrics, "learner.metrics")
    metrics = {"learner.metrics": port, "learner.metrics (the trainer's, the port after it)": port + 1} if port else {}
    return [
        ListenAddress("learner.listen", config.learner.listen),
        *(ListenAddress(key, join_address(host, number)) for key, number in metrics.items()),
    ]


def all_addresses(config: Config) -> list[ListenAddress]:
    """Where the processes of `treegrpo up` will listen."""
    return [
        *([ListenAddress("broker.address", config.broker.address)] if config.broker.embedded else []),
        *([] if config.retriever.url else [ListenAddress("retriever.listen", config.retriever.listen)]),
        *learner_addresses(config),
        *([ListenAddress("engine.listen", config.engine.listen)] if _starts_sglang_server(config) else []),
        *([] if config.sampler.metrics.endswith(":0") else [ListenAddress("sampler.metrics", config.sampler.metrics)]),
    ]


def _starts_sglang_server(config: Config) -> bool:
    """Whether an SGLang server is started, on a port known beforehand."""
    engine = config.engine
    return engine.kind == "sglang" and not engine.urls and not engine.listen.endswith(":0")


def check_addresses(addresses: list[ListenAddress]) -> str:
    """Each address resolves and can be bound, and no two are the same. Raises ConfigError and AddressInUseError."""
    for address in addresses:
        check_port(address.value, address.key)
    for one, other in combinations(addresses, 2):
        if share_port(one.value, other.value):
            both = f"both {one.value}" if one.value == other.value else f"{one.value} and {other.value}, on the same port"
            raise AddressInUseError(f"{one.key} and {other.key} are {both}; give one of them another port.")
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


def check_engine(config: Config, samplers: int) -> str:
    """The engines of ``samplers`` samplers can be started, or their servers can be used. Raises ConfigError."""
    engine = config.engine
    if engine.kind == "embedded":
        return "embedded"
    from services.sampler.engines.sglang.server.launch_command import (
        check_distinct_urls,
        check_installed,
        check_listen_address,
        parse_extra_flags,
    )

    if not engine.weights_dir.is_dir():
        raise ConfigError(f"engine.weights_dir = {engine.weights_dir} does not exist; name a directory in memory.")
    check_writable(engine.weights_dir, "engine.weights_dir")
    if engine.urls:
        if samplers > 1:
            raise ConfigError(
                f"engine.urls would be shared by {samplers} samplers, and each would give the servers its own "
                "weights; set sampler.count = 1, which uses all of them."
            )
        check_distinct_urls(engine.urls)
        return ", ".join(engine.urls)
    parse_extra_flags(engine.flags)
    _, port = split_address(engine.listen, "engine.listen")
    check_listen_address(engine.listen, insecure_network=config.security.insecure_network)
    if port and samplers > 1:
        raise ConfigError(
            f"engine.listen = {engine.listen} would be shared by the SGLang servers of {samplers} samplers; "
            "give port 0, and each takes a free one."
        )
    return f"SGLang {check_installed(engine.python)} of {engine.python}"


def check_security(config: Config) -> str:
    """Certificates, passwords and tokens can be read, and no public address is without them. Raises ConfigError."""
    access = Credentials.from_config(config.security, Role.LEARNER)
    access.check_reach("broker.address", config.broker.address)
    access.check_listen("learner.listen", config.learner.listen)
    access.check_metrics("learner.metrics", config.learner.metrics)
    Credentials.from_config(config.security, Role.OPERATOR)
    return f"TLS with {access.keys.certificate}" if access.keys else "plain text, on this machine alone"


def check_parts_security(config: Config) -> str:
    """`check_security` for the other processes of `treegrpo up`. Raises ConfigError."""
    sampler = Credentials.from_config(config.security, Role.SAMPLER)
    retriever = Credentials.from_config(config.security, Role.RETRIEVER)
    sampler.check_metrics("sampler.metrics", config.sampler.metrics)
    sampler.check_url("retriever.url", config.search_url)
    if config.engine.kind == "sglang":
        for url in config.engine.urls:
            sampler.check_url("engine.urls", url)
    retriever.check_metrics("retriever.listen", config.retriever.listen)
    Credentials.from_config(config.security, Role.BROKER)
    return "sampler, retriever, broker"


def check_data(train: Sequence[Question], heldout: Sequence[Question], batch: int) -> str:
    """Training and held-out questions are disjoint, and a batch is no larger than the training set."""
    known = {question.prompt for question in train}
    if same := sum(question.prompt in known for question in heldout):
        return CheckWarning(
            f"{same} of {len(heldout)} prompts of data.heldout are in data.train too, so the held-out score counts what was "
            "trained on; leave them out of one"
        )
    if batch > len(train):
        return CheckWarning(
            f"train.batch = {batch} is more than the {len(train)} questions of data.train; a batch has some of them twice"
        )
    return f"{len(train)} and {len(heldout)} questions, none in both"


def check_limits(config: Config) -> str:
    """The limits of an episode are consistent, and no key is set that has no effect."""
    rollout, environment = config.rollout, config.environment
    for key, value in (
        ("rollout.max_action_tokens", rollout.max_action_tokens),
        ("environment.max_observation_tokens", environment.max_observation_tokens),
    ):
        if value >= rollout.max_context:
            return CheckWarning(
                f"{key} = {value} is not less than rollout.max_context = {rollout.max_context}: one can fill an episode alone, "
                "which then ends as truncated; lower the one or raise the other"
            )
    if config.retriever.url and "corpus" in config.retriever.model_fields_set:
        return CheckWarning(
            f"retriever.corpus is not used, since retriever.url names a retriever that runs: {public_url(config.retriever.url)}"
        )
    return f"{rollout.max_context} tokens of an episode, {rollout.max_action_tokens} of a turn"


def check_plan(config: Config) -> str:
    """Check that groups of this plan give a learning signal with this estimator. Raises ConfigError."""
    check_signal(config)
    return f"{config.rollout.plan.leaves} leaves a question"


class QuestionFiles:
    """The question files of a run, read once for all checks."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._load = cache(self._load_file)

    def __getitem__(self, key: str) -> Sequence[Question]:
        """Those of ``data.train`` or ``data.heldout``. Raises DataError."""
        return self._load(key)

    def check_file(self, key: str) -> str:
        """Every row is valid. Raises DataError."""
        return f"{self._path(key)} ({len(self[key])} questions)"

    def check_prompt_file(self, key: str) -> str:
        """See `check_prompts`."""
        from services.cli.checks.model_checks import check_prompts

        config = self._config
        return check_prompts(config.model.path, self[key], key, config.rollout.max_context)

    def check_split(self) -> str:
        """See `check_data`."""
        return check_data(self["data.train"], self["data.heldout"], self._config.train.batch)

    def _path(self, key: str) -> Path:
        return self._config.data.train if key == "data.train" else self._config.data.heldout

    def _load_file(self, key: str) -> Sequence[Question]:
        path = self._path(key)
        if not path.is_file():
            _raise_no_file(path, key)
        return load_questions(path)


def _check_model(config: Config) -> str:
    """See `check_model`; torch, which takes a second to be imported, comes with this and what follows."""
    from services.cli.checks.model_checks import check_model

    return check_model(config.model.path, config.engine.kind, config.rollout.max_context)


def _check_tokenizer(config: Config) -> str:
    from services.cli.checks.model_checks import check_tokenizer

    return check_tokenizer(config.model.path)


def _check_memory(config: Config, samplers: int, *, trains: bool) -> str:
    from services.cli.checks.model_checks import check_memory

    return check_memory(config, samplers, trains=trains)


def _check_disk(config: Config) -> str:
    from services.cli.checks.model_checks import check_disk

    return check_disk(config)


def learner_checks(config: Config) -> dict[str, Check]:
    """The checks of `treegrpo learner`, by name."""
    questions = QuestionFiles(config)
    return {  # cheapest first
        "security": partial(check_security, config),
        "ports": partial(check_addresses, learner_addresses(config)),
        "plan": partial(check_plan, config),
        "limits": partial(check_limits, config),
        "run directory": partial(check_run_dir, config),
        "model": partial(_check_model, config),
        "tokenizer": partial(_check_tokenizer, config),
        "memory for the run": partial(_check_memory, config, 0, trains=True),
        "disk for the run": partial(_check_disk, config),
        "training questions": partial(questions.check_file, "data.train"),
        "held-out questions": partial(questions.check_file, "data.heldout"),
        "data": questions.check_split,
        "training prompts": partial(questions.check_prompt_file, "data.train"),
        "held-out prompts": partial(questions.check_prompt_file, "data.heldout"),
    }


def up_checks(config: Config) -> dict[str, Check]:
    """The checks of `treegrpo up`, by name."""
    corpus: dict[str, Check] = {} if config.retriever.url else {"corpus": partial(check_corpus, config.retriever.corpus)}
    return {
        "documents of a search": partial(check_topk, config),  # first: it costs nothing
        **learner_checks(config),
        "ports": partial(check_addresses, all_addresses(config)),
        "memory for the run": partial(_check_memory, config, config.sampler.count, trains=True),
        "sampler metrics": partial(check_sampler_metrics, config),
        "engine": partial(check_engine, config, config.sampler.count),
        "security of the parts": partial(check_parts_security, config),
        **corpus,
    }


def eval_checks(config: Config) -> dict[str, Check]:
    """The checks of `treegrpo eval`, by name."""
    questions = QuestionFiles(config)
    return {
        "documents of a search": partial(check_topk, config),
        "model": partial(_check_model, config),
        "tokenizer": partial(_check_tokenizer, config),
        "memory for the run": partial(_check_memory, config, 1, trains=False),
        "held-out questions": partial(questions.check_file, "data.heldout"),
        "held-out prompts": partial(questions.check_prompt_file, "data.heldout"),
        "engine": partial(check_engine, config, 1),
    }
