"""`treegrpo eval`: evaluates a model greedily on the held-out questions, on the configured engine."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.table import Table

from learner.intake.leases.question_file import load_questions
from services.cli.checks.run_checks import ListenAddress, check_addresses, check_corpus
from services.cli.processes.part_supervisor import SupervisedPart
from services.cli.processes.process_group import ProcessGroup
from services.cli.processes.program import PrintLine, Program
from services.cli.processes.readiness import probe_retriever
from services.cli.reports.terminal import Justify, cell, table
from services.sampler.expansion.expander import Expander, LeaseControl
from services.sampler.factory import open_engine, open_environment
from services.sampler.text.tokenizer import Tokenizer
from treegrpo.config.schema import Config
from treegrpo.config.security import Role
from treegrpo.core.lease import Lease, LeaseEndReason, LeaseKind
from treegrpo.core.question import Question
from treegrpo.core.step import Leaf, PolicyVersion, Subtree
from treegrpo.errors import RunError, UnavailableError
from treegrpo.security.credentials import Credentials

ALL = "all"


@dataclass(frozen=True, slots=True)
class EvalAnswer:
    """One question and the leaf of its episode; None when an engine or tool error left it without one."""

    question: Question
    leaf: Leaf | None
    error: str = ""
    """Why there is no leaf."""


@asynccontextmanager
async def running_retriever(config: Config, arguments: Sequence[str], print_line: PrintLine) -> AsyncGenerator[None]:
    """Use the running retriever for the time of the block, or start one."""
    access = Credentials.from_config(config.security, Role.OPERATOR)
    try:
        await probe_retriever(config, access)
    except UnavailableError:
        if config.retriever.url:
            raise
        check_corpus(config.retriever.corpus)
        check_addresses([ListenAddress("retriever.listen", config.retriever.listen)])
        with tempfile.TemporaryDirectory() as logs:
            async with ProcessGroup(arguments, Path(logs), print_line) as group:
                ready = partial(probe_retriever, config, access)
                await group.start_part(SupervisedPart(Program("retriever", "services.retriever"), ready))
                yield
    else:
        yield


async def evaluate_model(config: Config) -> list[EvalAnswer]:
    """Roll out one greedy chain for each held-out question. Raises ModelError, DataError, UnavailableError."""
    questions = load_questions(config.data.heldout)[: config.eval.questions or None]
    tokenizer = Tokenizer.open(config.model.path)
    access = Credentials.from_config(config.security, Role.OPERATOR)
    engine = await open_engine(config, config.model.path, PolicyVersion(), "eval", access)
    async with engine, open_environment(config, tokenizer, access) as environment:
        expander = Expander(engine, environment, tokenizer, retries=config.sampler.retries)
        slots = asyncio.Semaphore(config.engine.max_running)
        return list(await asyncio.gather(*(_answer(config, expander, question, slots) for question in questions)))


async def _answer(config: Config, expander: Expander, question: Question, slots: asyncio.Semaphore) -> EvalAnswer:
    plan = config.rollout.plan.as_eval()
    lease = Lease(question.id, LeaseKind.EVAL, question, plan, plan.grant, config.run.seed, PolicyVersion())
    subtrees: list[Subtree] = []
    async with slots:
        end = await expander.expand_lease(lease, subtrees.append, LeaseControl())
    if end.reason is LeaseEndReason.RETURNED:  # not the model's fault: a score without this question would be another one
        raise UnavailableError(f"The evaluation is not complete: {end.error}")
    leaves = [leaf for subtree in subtrees for leaf in subtree.leaves]
    return EvalAnswer(question, leaves[0] if leaves else None, end.error)


def describe_failures(answers: Sequence[EvalAnswer]) -> str:
    """A sentence about the questions without an answer, empty if there is none. Raises RunError: no question has one."""
    errors = [answer.error for answer in answers if answer.leaf is None]
    if not errors:
        return ""
    last = errors[-1].rstrip(".") or "no error was named"
    sentence = f"{len(errors)} of {len(answers)} questions have no answer; the last: {last}."
    if len(errors) == len(answers):
        raise RunError(sentence)
    return sentence


def group_by_family(answers: Sequence[EvalAnswer]) -> dict[str, list[EvalAnswer]]:
    """The answers by question family, all of them last."""
    families: dict[str, list[EvalAnswer]] = {}
    for answer in answers:
        families.setdefault(answer.question.family or "-", []).append(answer)
    return {**dict(sorted(families.items())), ALL: list(answers)}


def family_row(answers: Sequence[EvalAnswer]) -> tuple[str, str, str, str, str]:
    """Questions, EM in percent, mean reward, invalid actions per episode, failed."""
    leaves = [answer.leaf for answer in answers if answer.leaf is not None]
    if not leaves:
        return (str(len(answers)), "-", "-", "-", str(len(answers)))
    em, invalid = (sum(leaf.metrics.get(name, 0.0) for leaf in leaves) / len(leaves) for name in ("em", "invalid_actions"))
    reward = sum(leaf.reward for leaf in leaves) / len(leaves)
    return (str(len(answers)), f"{100 * em:.1f}", f"{reward:.3f}", f"{invalid:.2f}", str(len(answers) - len(leaves)))


def family_table(answers: Sequence[EvalAnswer]) -> Table:
    """A table with one row for each family and one for all."""
    figures = ("questions", "EM %", "reward", "invalid actions", "failed")
    headings: list[tuple[str, Justify]] = [("family", "left"), *((heading, "right") for heading in figures)]
    shown = [
        [cell(part, "bold" if family == ALL else "") for part in (family, *family_row(members))]
        for family, members in group_by_family(answers).items()
    ]
    return table(headings, shown)
