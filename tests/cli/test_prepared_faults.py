from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from services.cli.checks.run_checks import eval_checks, run_checks, up_checks
from services.cli.doctor import files
from services.cli.reports.live_view import Screen
from services.cli.reports.terminal import Terminal
from services.cli.up import Run
from tests.cli.machine import treegrpo
from tests.cli.prepared_faults import FAULTS, Fault
from tests.cli.workbench import Workbench
from treegrpo.config.loader import load_config
from treegrpo.errors import TreeGrpoError
from treegrpo.runtime.entrypoint import FAILED, exit_code

every_fault = pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])


def prepared(folder: Path, fault: Fault) -> Workbench:
    bench = Workbench(folder)
    bench.keys.update(fault.prepare(bench))
    return bench


@every_fault
def test_the_doctor_finds_it_with_its_remedy(tmp_path: Path, fault: Fault) -> None:
    failed = [
        finding for finding in files(up_checks(load_config(None, prepared(tmp_path, fault).flags()))) if finding.verdict == "fail"
    ]
    assert [finding.text for finding in failed if re.search(fault.says, finding.text)], failed
    assert len({finding.text for finding in failed}) == len(failed)


@every_fault
def test_up_refuses_it_before_anything_is_made(tmp_path: Path, fault: Fault) -> None:
    bench = prepared(tmp_path, fault)
    config, before = load_config(None, bench.flags()), sorted(tmp_path.rglob("*"))
    with pytest.raises(TreeGrpoError, match=fault.says) as refusal:
        asyncio.run(Run(config, bench.flags(), Screen(Terminal()), "", everything=True).check())
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
