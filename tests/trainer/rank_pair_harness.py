"""Two ranks of a trainer, in processes of their own, that call functions of a test."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Self

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from learner.trainer.distributed.ranks import Ranks, join_process_group

WORLD = 2
SECONDS = 90.0
"""Until an answer is there; the first one waits for the libraries to be imported."""


class RankPair:
    """For the time of the ``with`` block. One process group serves all tests: to import the libraries is what takes long."""

    def __enter__(self) -> Self:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(WORLD)]
        self._ends = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(theirs, rank, self._store.port), daemon=True, name=f"rank {rank}")
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join(SECONDS)
            process.kill()

    def __call__(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``work(ranks, *args)`` returns on each rank; fails with the traceback of one that raised."""
        for end in self._ends:
            end.send((work, args))
        answers: list[Any] = []
        for rank, end in enumerate(self._ends):
            assert end.poll(SECONDS), f"rank {rank} does not answer"
            value, failure = end.recv()
            assert failure is None, f"rank {rank}: {failure}"
            answers.append(value)
        return answers


def _serve(end: Connection, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    with join_process_group() as ranks:
        while (asked := end.recv()) is not None:
            end.send(_answer(ranks, *asked))


def _answer(ranks: Ranks, work: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, str | None]:
    try:
        return work(ranks, *args), None
    except Exception:  # noqa: BLE001  # the test is told
        return None, traceback.format_exc()
