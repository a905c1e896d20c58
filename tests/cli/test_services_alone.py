"""A service that is started alone says what `treegrpo up` would have said."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch

from learner.intake import service as intake
from learner.trainer import loop
from learner.trainer.distributed.ranks import SINGLE_RANK
from learner.trainer.packing.model import load_model
from learner.trainer.persistence.policy_versions import export_model
from services.broker import server
from services.cli.checks.run_checks import eval_checks, up_checks
from services.cli.doctor import check_findings
from services.retriever import service as retriever
from services.sampler.factory import open_engine
from services.sampler.text.tokenizer import Tokenizer
from tests.cli.prepared_faults import FAULTS
from tests.cli.small_run import GEOHOP, SmallRun
from treegrpo.config.loader import load_config
from treegrpo.config.schema import Config
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import TreeGrpoError
from treegrpo.security.credentials import OPEN

CPU = torch.device("cpu")


async def sampler(config: Config) -> None:
    """What a sampler does with a version that it has fetched."""
    await open_engine(config, config.model.path, PolicyVersion(), "test", OPEN)


async def tokenizer(config: Config) -> None:
    """What a sampler does for each question."""
    Tokenizer.open(config.model.path).render((*intake.load_questions(config.data.train)[0].prompt,))


async def search(config: Config) -> None:
    await retriever.serve_retriever(config.retriever, OPEN)


async def trainer(config: Config) -> None:
    loop.main(config, SINGLE_RANK)


async def policy(config: Config) -> None:
    load_model(config.model.path, CPU)


@pytest.mark.parametrize(
    ("service", "name"),
    [
        (intake.run_intake, "config.json that is a list"),
        (intake.run_intake, "empty generation_config.json"),
        (intake.run_intake, "port 0 of the learner"),
        (intake.run_intake, "run.dir below a file"),
        (intake.run_intake, "run.dir a dangling link"),
        (server.serve_broker, "port 0 of the broker"),
        (search, "corpus without words"),
        (search, "empty corpus row"),
        (trainer, "one leaf a question"),
        (policy, "eos as a name"),
        (policy, "weights cut short"),
        (policy, "quantised weights"),
        (policy, "tied config, another head"),
        (policy, "missing shard"),
        (sampler, "tokenizer beyond the embedding"),
        (sampler, "max_running beyond memory"),
        (sampler, "context beyond the positions"),
        (sampler, "tied config, another head"),
        (sampler, "missing tensors"),
        (sampler, "eos as a name"),
        (tokenizer, "template that raises"),
        (tokenizer, "no tokenizer"),
    ],
)
async def test_it_says_the_same_sentence(tmp_path: Path, service: Callable[[Config], Awaitable[None]], name: str) -> None:
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    small_run = SmallRun(tmp_path)
    small_run.keys.update(fault.prepare(small_run))
    config = load_config(None, small_run.flags())
    with pytest.raises(TreeGrpoError) as refusal:
        await service(config)
    assert re.search(fault.says, str(refusal.value))
    assert not refusal.value.is_transient
    assert str(refusal.value) in {finding.text for finding in check_findings(up_checks(config))} or service is tokenizer


def test_the_model_that_a_run_leaves_passes_all_checks(tmp_path: Path) -> None:
    final = tmp_path / "checkpoints" / "final"
    final.parent.mkdir()
    export_model(load_model(GEOHOP / "model", CPU), final, GEOHOP / "model", "bfloat16")
    config = load_config(None, SmallRun(tmp_path).flags(model__path=str(final)))
    for checks in (up_checks(config), eval_checks(config)):
        found = {finding.subject: finding.verdict for finding in check_findings(checks)}
        assert {subject for subject, verdict in found.items() if verdict != "ok"} <= {"data", "limits"}
