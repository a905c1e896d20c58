"""Launches a program that is killed when its parent dies: `python parent_death.py [--group] PARENT_PID PROGRAM [ARGUMENT …]`.

Linux kills the program the moment its parent ends, however it ends, so nothing is left behind even after `kill -9`.
The setting survives exec. Elsewhere the program just starts.

With --group the processes in its session are killed as well, for programs that do not end them themselves:

    parent ends ─► program is killed ─► its watcher, which was started before it, kills the group
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def parent_bound_command(command: Sequence[str], *, group: bool = False) -> list[str]:
    """``command``, run so that it is killed when its parent ends, with ``group`` together with its session."""
    launcher = [sys.executable, "-P", "-S", __file__]  # the standard library alone, independent of the program's options
    return [*launcher, *(["--group"] if group else []), str(os.getpid()), *command]


def start_group_killer() -> None:
    """Start a process that kills this process's group, whose leader this one is, when this one ends."""
    leader = os.getpid()
    if os.fork():
        return
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # said to the group, meant for its leader
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    if os.getppid() == leader:  # else it ended before we asked
        signal.sigwait({signal.SIGUSR1})
    os.killpg(leader, signal.SIGKILL)


def main(arguments: list[str]) -> None:
    group = arguments[0] == "--group"
    parent, *program = arguments[group:]
    die_with_parent()
    if sys.platform == "linux":
        if os.getppid() != int(parent):  # it died before we asked
            raise SystemExit(1)
        if group:
            start_group_killer()
    os.execv(program[0], program)  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
