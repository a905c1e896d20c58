"""Starts a program that dies with its parent: `python -m treegrpo.leash PARENT_PID PROGRAM [ARGUMENT …]`.

Linux kills the program the moment its parent ends, however it ends, so nothing is left behind even after `kill -9`.
The wish to be killed survives exec. Elsewhere the program just starts.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Be killed when the process that started this one ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leashed(command: Sequence[str]) -> list[str]:
    """``command`` so that it dies with the process that runs it."""
    return [sys.executable, "-m", "treegrpo.leash", str(os.getpid()), *command]


def main(arguments: list[str]) -> None:
    parent, program = int(arguments[0]), arguments[1:]
    die_with_parent()
    if sys.platform == "linux" and os.getppid() != parent:  # it died before we asked
        raise SystemExit(1)
    os.execv(program[0], program)  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
