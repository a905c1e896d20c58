"""Stands in for SGLang's CUDA kernels where there is no GPU: SGLang imports their names, and on a CPU calls none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU; this environment is for the CPU (deploy/sglang/).")

    return missing
