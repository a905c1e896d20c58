"""The intake that `python -m learner` starts: how its end is understood."""

from __future__ import annotations

import time

import pytest

from learner.__main__ import IntakeChild, IntakeSupervisor
from treegrpo.errors import PartError
from treegrpo.runtime.process_environment import python_command


def test_a_signal_to_stop_does_not_hide_why_the_intake_was_ending() -> None:
    words = ("--say", "waiting", "--code", "2", "--report", "The disk is full.", "--linger", "yes")
    child = IntakeChild(python_command("tests.cli.programs.print_and_exit", *words))
    while not child.reports.read():
        time.sleep(0.01)
    supervisor = IntakeSupervisor(child)
    supervisor.stop()
    with pytest.raises(PartError, match=r"^The intake ended with code 2: The disk is full\.$"):
        supervisor.raise_permanent_error()
