"""`treegrpo eval`: a model's greedy answers to the held-out questions, on the configured engine."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.table import Table

from learner.intake.leases.question_queue import load_questions
from services.cli.checks.run_checks import Address, check_addresses, check_corpus
from services.cli.processes.part_supervisor import Part, Say
from services.cli.processes.process_group import Crew
from services.cli.processes.program import Program
from services.cli.processes.readiness import retriever_ready
from services.cli.reports.terminal import Justify, cell, table
from services.sampler.expansion.expander import Expander, Gate
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
class Answered:
    """One question and the episode's end; None when an engine or tool error left it without one."""

    question: Question
    leaf: Leaf | None
    error: str = ""
    """Why there is no end."""


@asynccontextmanager
async def retriever_for(config: Config, arguments: Sequence[str], say: Say) -> AsyncGenerator[None]:
    """A retriever for the time of the block: the one that runs already, or one of our own."""
    access = Credentials.from_config(config.security, Role.OPERATOR)
    try:
        await retriever_ready(config, access)
    except UnavailableError:
        if config.retriever.url:
            raise
        check_corpus(config.retriever.corpus)
        check_addresses([Address("retriever.listen", config.retriever.listen)])
        with tempfile.TemporaryDirectory() as logs:
            async with Crew(arguments, Path(logs), say) as crew:
                ready = partial(retriever_ready, config, access)
                await crew.start(Part(Program("retriever", "services.retriever"), ready))
                yield
    else:
        yield


async def evaluate(config: Config) -> list[Answered]:
    """Greedy, one chain for each held-out question. Raises ModelError, DataError, UnavailableError."""
    questions = load_questions(config.data.heldout)[: config.eval.questions or None]
    tokenizer = Tokenizer.open(config.model.path)
    access = Credentials.from_config(config.security, Role.OPERATOR)
    engine = await open_engine(config, config.model.path, PolicyVersion(), "eval", access)
    async with engine, open_environment(config, tokenizer, access) as environment:
        expander = Expander(engine, environment, tokenizer, retries=config.sampler.retries)
        places = asyncio.Semaphore(config.engine.max_running)
        return list(await asyncio.gather(*(_answer(config, expander, question, places) for question in questions)))


async def _answer(config: Config, expander: Expander, question: Question, places: asyncio.Semaphore) -> Answered:
    plan = config.rollout.plan.as_eval()
    lease = Lease(question.id, LeaseKind.EVAL, question, plan, plan.grant, config.run.seed, PolicyVersion())
    subtrees: list[Subtree] = []
    async with places:
        end = await expander.grow(lease, subtrees.append, Gate())
    if end.reason is LeaseEndReason.RETURNED:  # not the model's fault: a score without this question would be another one
        raise UnavailableError(f"The evaluation is not complete: {end.error}")
    leaves = [leaf for subtree in subtrees for leaf in subtree.leaves]
    return Answered(question, leaves[0] if leaves else None, end.error)


def failures(answers: Sequence[Answered]) -> str:
    """A sentence about the questions that have no answer, empty if all have. Raises RunError: none has."""
    errors = [answer.error for answer in answers if answer.leaf is None]
    if not errors:
        return ""
    last = errors[-1].rstrip(".") or "no error was named"
    sentence = f"{len(errors)} of {len(answers)} questions came to no answer, the last so: {last}."
    if len(errors) == len(answers):
        raise RunError(sentence)
    return sentence


def by_family(answers: Sequence[Answered]) -> dict[str, list[Answered]]:
    """The answers by question family, all of them last."""
    families: dict[str, list[Answered]] = {}
    for answer in answers:
        families.setdefault(answer.question.family or "-", []).append(answer)
    return {**dict(sorted(families.items())), ALL: list(answers)}


def row(answers: Sequence[Answered]) -> tuple[str, str, str, str, str]:
    """Questions, EM in percent, mean reward, invalid actions per episode, failed."""
    leaves = [answer.leaf for answer in answers if answer.leaf is not None]
    if not leaves:
        return (str(len(answers)), "-", "-", "-", str(len(answers)))
    em, invalid = (sum(leaf.metrics.get(name, 0.0) for leaf in leaves) / len(leaves) for name in ("em", "invalid_actions"))
    reward = sum(leaf.reward for leaf in leaves) / len(leaves)
    return (str(len(answers)), f"{100 * em:.1f}", f"{reward:.3f}", f"{invalid:.2f}", str(len(answers) - len(leaves)))


def report(answers: Sequence[Answered]) -> Table:
    """One row a family and one for all."""
    figures = ("questions", "EM %", "reward", "invalid actions", "failed")
    headings: list[tuple[str, Justify]] = [("family", "left"), *((heading, "right") for heading in figures)]
    shown = [
        [cell(part, "bold" if family == ALL else "") for part in (family, *row(members))]
        for family, members in by_family(answers).items()
    ]
    return table(headings, shown)
