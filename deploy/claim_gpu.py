"""Gives a container GPUs of its own: ``claim_gpu.py COUNT PROGRAM [ARGUMENT …]`` takes free ones and becomes the program.

Docker shows a container all GPUs or the same ones, and knows of no allocation. Here every container sees all, and holds a lock
on a file of a shared volume for each that it takes; the kernel lets go of the lock when the program and its children have
ended, however they end. ``--check`` only says whether the machine has a GPU. Exit code 2: there is none; 75: none is free now.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from treegrpo.runtime.exit_report import FAILED, TRANSIENT, ExitReport, write_exit_report

LOCKS = Path(os.environ.get("GPU_LOCKS", "/gpus"))
DRIVER = Path(os.environ.get("GPU_DRIVER", "/proc/driver/nvidia/gpus"))
"""The kernel's list, which every container sees."""
PATIENCE_SECONDS = float(os.environ.get("GPU_PATIENCE", "30"))
"""A container that is being replaced takes a moment to end."""
NO_GPU = (
    "COMPOSE_PROFILES=gpu needs an NVIDIA GPU with its driver and the NVIDIA container toolkit, and this machine shows "
    "none; set COMPOSE_PROFILES=cpu in .env, or install them and see that `nvidia-smi` works."
)


def gpus() -> list[str]:
    """The UUIDs of the GPUs that this container sees."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False)  # noqa: S603
    return listed.stdout.split() if listed.returncode == 0 else []


def claim(uuid: str) -> int | None:
    """A file descriptor that holds ``uuid`` for this process and what it becomes; None if another has it."""
    held = os.open(LOCKS / f"{uuid}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    os.set_inheritable(held, True)
    return held


def take(count: int, seen: Sequence[str]) -> list[str]:
    """``count`` of the ``seen`` GPUs that nobody has, held; fewer if there are no more within PATIENCE_SECONDS."""
    mine: list[str] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        for uuid in seen:
            if len(mine) < count and uuid not in mine and claim(uuid) is not None:
                mine.append(uuid)
        if len(mine) == count or time.monotonic() > deadline:
            return mine
        time.sleep(0.2)


def check() -> str:
    """The sentence that says that this machine has no GPU; empty if it has."""
    return "" if DRIVER.is_dir() and any(DRIVER.iterdir()) else NO_GPU


def become(arguments: Sequence[str]) -> ExitReport:
    """Become the program. Returns why not."""
    count, program = int(arguments[0]), list(arguments[1:])
    if not (seen := gpus()):
        return ExitReport(FAILED, NO_GPU)
    mine = take(count, seen)
    if len(mine) < count:
        return ExitReport(
            TRANSIENT,
            f"{count} GPUs are wanted and {len(mine)} of {len(seen)} are free, the others are held by other containers; "
            "scale sampler-gpu down, or start it on another machine.",
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    return os.execvp(program[0], program)  # noqa: S606


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    if list(arguments) == ["--check"]:
        refusal = ExitReport(FAILED, sentence) if (sentence := check()) else None
    else:
        refusal = become(arguments)
    if refusal is None:
        return 0
    print(f"error: {refusal.sentence}", file=sys.stderr)
    write_exit_report(refusal)
    return refusal.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
