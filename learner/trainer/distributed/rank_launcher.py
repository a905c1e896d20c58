"""Launcher of ranks: runs this process as a rank, or starts `train.processes` of them with torchrun."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from learner.trainer.distributed.ranks import SINGLE_RANK, Ranks, join_process_group, started_by_torchrun
from treegrpo.config.loader import config_from_arguments
from treegrpo.config.schema import Config
from treegrpo.errors import TreeGrpoError
from treegrpo.observability import log_setup
from treegrpo.runtime.entrypoint import FAILED, TRANSIENT, exit_code, report_error
from treegrpo.runtime.exit_report import ExitReport, ExitReports, decisive_report, exit_report_for, write_exit_report
from treegrpo.runtime.process_environment import remove_rank_variables
from treegrpo.runtime.stop_signals import stop_signals

SIGNALLED = 128
"""Plus the signal's number: the exit code after a signal, as in a shell."""
DRAIN_SECONDS = 180
"""From a SIGTERM or SIGINT to the end of the last rank; then they are killed."""


def run(work: Callable[[Config, Ranks], None], module: str) -> int:
    """Run ``work``, the main function of ``python -m module``, with the command line's configuration; returns the exit code.

    A process that torchrun started is one of its ranks. Any other is the only rank, or starts `train.processes` of them,
    and ignores variables of another launcher in the environment.
    """
    arguments, ranks = sys.argv[1:], SINGLE_RANK
    try:
        config = config_from_arguments(arguments)
        if not started_by_torchrun():
            remove_rank_variables()
            if config.train.processes > 1:
                return start(module, config.train.processes, arguments)
        with join_process_group() as ranks:
            who = "" if ranks.is_first else f"rank {ranks.rank}: "
            log_setup.log_to_stderr(logging.INFO if ranks.is_first else logging.WARNING, who)
            work(config, ranks)
        code = 0
    except TreeGrpoError as error:
        code = report_error(error) if ranks.reports_error(error) else exit_code(error)
    except Exception as crash:
        write_exit_report(exit_report_for(crash))
        raise
    if dist.is_initialized():  # with a process group, the end of the interpreter now and then aborts (torch 2.13, gloo)
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code)
    return code


def start(module: str, processes: int, arguments: Sequence[str]) -> int:
    """Run ``processes`` ranks of ``module`` on this machine, on loopback addresses; returns the exit code.

    This is torchrun, with its logs: when one rank fails the others are ended. A signal is passed on, the ranks drain, and
    the code is that of the signal, unless a rank reports that it failed.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    here = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}", f"--shutdown-timeout={DRAIN_SECONDS}"]
    code, died, reports, signals = 0, list[ExitReport](), ExitReports(), ",".join(number.name for number in stop_signals())
    try:
        with _environment({**reports.environment, "TORCHELASTIC_SIGNALS_TO_HANDLE": signals}):
            torchrun.main([*here, "-m", module, *arguments])
    except ChildFailedError as error:
        code = FAILED if any(failure.exitcode == FAILED for failure in error.failures.values()) else TRANSIENT
        died = [_killed(rank, -failure.exitcode) for rank, failure in error.failures.items() if failure.exitcode < 0]
    except SignalException as signalled:  # torchrun has waited for the ranks
        code = SIGNALLED + signalled.sigval
    cause = decisive_report([*reports.read(), *died])
    if cause is None or (cause.secondary and code > SIGNALLED):  # ranks that drain may lose each other at the very end
        return code
    write_exit_report(cause)
    return FAILED if cause.code == FAILED else TRANSIENT


def _killed(rank: int, number: int) -> ExitReport:
    memory = "; probably out of memory" if number == signal.SIGKILL else ""
    return ExitReport(-number, f"Rank {rank} of the trainer was killed by signal {number}{memory}.", number == signal.SIGTERM)


@contextmanager
def _environment(more: Mapping[str, str]) -> Generator[None]:
    """Set the environment variables ``more`` within the block."""
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
