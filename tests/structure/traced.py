"""Runs ``python -m MODULE ARGUMENTS…`` of a checkout and writes down which of its functions call which.

    python tests/structure/traced.py ROOT EVENTS MODULE ARGUMENTS…

A line of EVENTS is ``seconds caller callee``, a function being ``path:qualified.name``. The caller is the nearest function of the
product on the stack, ``-`` if there is none or if the event loop begins a task. A coroutine counts when it starts, not when it
resumes. Two ends are noted as well: of the optimizer's step as ``torch:step``, and of functions that accept something as
``return:`` and the function. This file imports nothing else of the repository, so that it can measure a checkout without it.
"""

from __future__ import annotations

import asyncio
import runpy
import sys
import threading
import time
from pathlib import Path
from types import CodeType, FrameType

PRODUCT = ("treegrpo/", "services/", "learner/")
EVENT_LOOP_STEP = asyncio.Handle._run.__code__  # beneath it is who runs the loop, not who started the task
ACCEPT = ("accept", "accept_subtree")
RESUME_AFTER_START = 3
"""Bits of the oparg of RESUME that say that a generator or coroutine goes on."""


class Tracer:
    """A profile function that notes calls of the product."""

    def __init__(self, root: Path) -> None:
        self._root = f"{root}/"
        self.events: list[tuple[float, str, str]] = []
        """Kept in memory until the end: the process does with its open files what it likes."""
        self._labels: dict[CodeType, str] = {}
        """Of functions of the product; empty for all others."""
        self._steps: dict[CodeType, bool] = {}

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            label = self._label(frame.f_code)
            if label and _starts(frame):
                self._note(self._caller(frame), label)
        elif event == "return":
            if self._is_optimizer_step(frame.f_code):
                self._note("-", "torch:step")
            elif frame.f_code.co_name in ACCEPT and (label := self._label(frame.f_code)):
                self._note("-", f"return:{label}")

    def _caller(self, frame: FrameType) -> str:
        above = frame.f_back
        while above is not None and above.f_code is not EVENT_LOOP_STEP:
            if label := self._label(above.f_code):
                return label
            above = above.f_back
        return "-"

    def _label(self, code: CodeType) -> str:
        label = self._labels.get(code)
        if label is None:
            path = code.co_filename.removeprefix(self._root)
            ours = path != code.co_filename and path.startswith(PRODUCT) and not path.startswith("treegrpo/v1/")
            label = self._labels[code] = f"{path}:{code.co_qualname}" if ours else ""
        return label

    def _is_optimizer_step(self, code: CodeType) -> bool:
        found = self._steps.get(code)
        if found is None:
            found = code.co_name == "step" and code.co_filename.endswith(("torch/optim/adam.py", "torch/optim/adamw.py"))
            self._steps[code] = found
        return found

    def _note(self, caller: str, callee: str) -> None:
        self.events.append((time.time(), caller, callee))


def _starts(frame: FrameType) -> bool:
    """Whether this call begins the function, rather than going on after a ``yield`` or ``await``."""
    return frame.f_code.co_code[frame.f_lasti + 1] & RESUME_AFTER_START == 0


def main() -> None:
    root, events, module, *arguments = sys.argv[1:]
    sys.path[0] = root
    sys.argv = [module, *arguments]
    tracer = Tracer(Path(root))
    threading.setprofile(tracer)
    sys.setprofile(tracer)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        lines = [f"{seconds:.6f} {caller} {callee}\n" for seconds, caller, callee in list(tracer.events)]
        Path(events).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
