"""Memory limit of this process: the machine's memory, or the control group's limit where that is less."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes", "memory.limit_in_bytes")
GIB = 1 << 30


def memory_limit() -> int:
    """The memory limit of this process in bytes."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for folder in _groups() for limit in _limits(folder))])


def _groups() -> list[Path]:
    """The directories of this process's control group and of those above it."""
    try:
        lines = OWN.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = list[str]()
    paths = {line.split(":", 2)[-1].lstrip("/") for line in lines}
    own = [CGROUPS / path for path in paths]
    return [CGROUPS, *own, *(above for path in own for above in path.parents if above.is_relative_to(CGROUPS))]


def _limits(folder: Path) -> list[int]:
    """The limits that a control group sets; "max" means no limit."""
    found: list[int] = []
    for name in _LIMITS:
        try:
            text = (folder / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal():
            found.append(int(text))
    return found
