from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from services.cli.checks.check import run_checks
from services.cli.checks.run_checks import eval_checks, up_checks
from services.cli.doctor import check_findings
from services.cli.reports.live_view import LiveView
from services.cli.reports.terminal import Terminal
from services.cli.up import RunController
from tests.cli.command_harness import treegrpo
from tests.cli.prepared_faults import FAULTS, PreparedFault
from tests.cli.small_run import SmallRun
from treegrpo.config.loader import load_config
from treegrpo.errors import TreeGrpoError
from treegrpo.runtime.entrypoint import FAILED, exit_code

every_fault = pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])


def prepared(folder: Path, fault: PreparedFault) -> SmallRun:
    small_run = SmallRun(folder)
    small_run.keys.update(fault.prepare(small_run))
    return small_run


@every_fault
def test_the_doctor_finds_it_with_its_remedy(tmp_path: Path, fault: PreparedFault) -> None:
    failed = [
        finding
        for finding in check_findings(up_checks(load_config(None, prepared(tmp_path, fault).flags())))
        if finding.verdict == "fail"
    ]
    assert [finding.text for finding in failed if re.search(fault.says, finding.text)], failed
    assert len({finding.text for finding in failed}) == len(failed)


@every_fault
def test_up_refuses_it_before_anything_is_made(tmp_path: Path, fault: PreparedFault) -> None:
    small_run = prepared(tmp_path, fault)
    config, before = load_config(None, small_run.flags()), sorted(tmp_path.rglob("*"))
    with pytest.raises(TreeGrpoError, match=fault.says) as refusal:
        asyncio.run(RunController(config, small_run.flags(), LiveView(Terminal()), "", everything=True).check_configuration())
    assert exit_code(refusal.value) == FAILED
    assert "\n" not in str(refusal.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["template that raises", "max_running beyond memory", "run.dir a dangling link"])
def test_the_command_says_it_in_one_sentence_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    result = treegrpo("up", *prepared(tmp_path, fault).flags())
    assert (result.code, result.left) == (FAILED, [])
    assert re.search(fault.says, result.sentence)


@pytest.mark.parametrize(
    "name", ["empty generation_config.json", "eos as a name", "tied config, another head", "template that raises"]
)
def test_eval_says_the_same(tmp_path: Path, name: str) -> None:
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    checks = eval_checks(load_config(None, prepared(tmp_path, fault).flags()))
    with pytest.raises(TreeGrpoError, match=fault.says.replace(r"data.train", r"data\.\w+")):
        run_checks(checks.values())
