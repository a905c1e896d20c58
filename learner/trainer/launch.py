"""The edge of the trainer's processes: a rank, or, where `train.processes` asks for several, what starts them here."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

import torch.distributed as dist

from learner.trainer.ranks import ALONE, Ranks, by_torchrun, joined
from treegrpo import logs
from treegrpo.config import Config
from treegrpo.edge import FAILED, PASSING, complain, exit_code
from treegrpo.errors import TreeGrpoError
from treegrpo.process_environment import forget_ranks
from treegrpo.settings import from_arguments

SIGNALLED = 128
"""And the signal's number: the exit code of a shell's children."""
DRAIN_SECONDS = 180
"""From a SIGTERM or SIGINT to the end of the last rank; then they are killed."""


def run(work: Callable[[Config, Ranks], None], module: str) -> int:
    """Do ``work``, which is what ``python -m module`` does, as the command line says; returns the exit code.

    A process that torchrun started is one of its ranks. Any other is the only rank, or starts `train.processes` of them,
    whatever another launcher has left in the environment.
    """
    arguments, ranks = sys.argv[1:], ALONE
    try:
        config = from_arguments(arguments)
        if not by_torchrun():
            forget_ranks()
            if config.train.processes > 1:
                return start(module, config.train.processes, arguments)
        with joined() as ranks:
            who = "" if ranks.is_first else f"rank {ranks.rank}: "
            logs.to_stderr(logging.INFO if ranks.is_first else logging.WARNING, who)
            work(config, ranks)
        code = 0
    except TreeGrpoError as error:
        code = complain(error) if ranks.says(error) else exit_code(error)
    if dist.is_initialized():  # with a process group, the end of the interpreter now and then aborts (torch 2.13, gloo)
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code)
    return code


def start(module: str, processes: int, arguments: Sequence[str]) -> int:
    """Run ``processes`` ranks of ``module`` on this machine, which alone can reach them; returns the exit code.

    It is what torchrun does, with its logs: when one rank ends badly the others are ended. A signal is passed on, the
    ranks drain, and the code says which signal it was.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    here = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}", f"--shutdown-timeout={DRAIN_SECONDS}"]
    try:
        torchrun.main([*here, "-m", module, *arguments])
    except ChildFailedError as error:  # the children have said why; another's failure is the reason of most
        return FAILED if any(failure.exitcode == FAILED for failure in error.failures.values()) else PASSING
    except SignalException as signal:  # it has waited for the ranks; how they ended, their log says
        return SIGNALLED + signal.sigval
    return 0
