"""Allocates GPUs to a container: ``claim_gpu.py COUNT PROGRAM [ARGUMENT …]`` locks free ones and executes the program.

Docker shows a container all GPUs or a fixed set, and has no allocation. Here every container sees all, and locks a file of a
shared volume for each that it takes; the kernel releases the lock when the program and its children have ended, however they
end. ``--check`` only says whether the machine has a GPU. Exit code 2: there is none; 75: none is free now.
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
WAIT_SECONDS = float(os.environ.get("GPU_PATIENCE", "30"))
"""For a free GPU: a container that is being replaced takes a moment to end."""
NO_GPU = (
    "COMPOSE_PROFILES=gpu needs an NVIDIA GPU with its driver and the NVIDIA container toolkit, and this machine shows "
    "none; set COMPOSE_PROFILES=cpu in .env, or install them and see that `nvidia-smi` works."
)


def visible_gpus() -> list[str]:
    """The UUIDs of the GPUs that this container sees."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False)  # noqa: S603
    return listed.stdout.split() if listed.returncode == 0 else []


def lock_gpu(uuid: str) -> int | None:
    """Lock ``uuid`` for this process and the program it executes: the file descriptor; None if another holds it."""
    held = os.open(LOCKS / f"{uuid}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    os.set_inheritable(held, True)
    return held


def lock_free_gpus(count: int, seen: Sequence[str]) -> list[str]:
    """Lock ``count`` of the ``seen`` GPUs; fewer if no more are free within WAIT_SECONDS."""
    mine: list[str] = []
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        for uuid in seen:
            if len(mine) < count and uuid not in mine and lock_gpu(uuid) is not None:
                mine.append(uuid)
        if len(mine) == count or time.monotonic() > deadline:
            return mine
        time.sleep(0.2)


def check_machine() -> str:
    """The sentence that says that this machine has no GPU; empty if it has."""
    return "" if DRIVER.is_dir() and any(DRIVER.iterdir()) else NO_GPU


def exec_with_gpus(arguments: Sequence[str]) -> ExitReport:
    """Execute the program with GPUs of its own. Returns only with an error."""
    count, program = int(arguments[0]), list(arguments[1:])
    if not (seen := visible_gpus()):
        return ExitReport(FAILED, NO_GPU)
    mine = lock_free_gpus(count, seen)
    if len(mine) < count:
        return ExitReport(
            TRANSIENT,
            f"{count} GPUs are asked for and {len(mine)} of {len(seen)} are free, the others are held by other containers; "
            "scale sampler-gpu down, or start it on another machine.",
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    return os.execvp(program[0], program)  # noqa: S606


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    if list(arguments) == ["--check"]:
        refusal = ExitReport(FAILED, sentence) if (sentence := check_machine()) else None
    else:
        refusal = exec_with_gpus(arguments)
    if refusal is None:
        return 0
    print(f"error: {refusal.sentence}", file=sys.stderr)
    write_exit_report(refusal)
    return refusal.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
