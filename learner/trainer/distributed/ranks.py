"""Ranks: the processes of the trainer. Each holds a shard of the policy and computes a part of the packs.

    intake ◄─► rank 0 ── broadcast: groups, decisions ──► rank 1 … N−1
                 └── FSDP2: weights gathered layer by layer, gradients summed, each rank steps its own shard ──────┘

torchrun starts them. All process the same groups up to the packs; then each takes its own. Only rank 0 talks to other
processes. A lone process is rank 0 of 1: the same code, without a process group or wrapped modules. Ranks on several
machines share `run.dir`.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from learner.trainer.packing.model import Policy
from learner.trainer.packing.packing import Pack, empty_pack
from treegrpo.errors import ConfigError, RankError, TreeGrpoError
from treegrpo.runtime.parent_death import die_with_parent

CPU = torch.device("cpu")
RANK_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""The environment variables that torchrun sets, and their values without it."""
TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Set by torchrun alone: variables of other launchers, left in a shell or pod, do not start a process group."""
STORE_SECONDS = 30.0
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Timeout of collectives: the longest that one rank may let the others wait, for a checkpoint or an expensive pack. The
intake is polled every few seconds and each answer is broadcast, so a run that is paused for days stays below it. A rank
that ends is noticed at once: its connections close."""
RANK_0_FAILED = "Rank 0 of the trainer failed, and with it all others; its traceback in the log has why."
T = TypeVar("T")


class Ranks:
    """This process among those that train together: its rank, its device, and the collectives."""

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0) -> None:
        """Args:
        rank: which one this is.
        world: how many there are.
        local: which one on its machine; it takes that GPU.
        """
        self.rank, self.world = rank, world
        self.is_first = rank == 0
        """Rank 0 talks to the intake, serves /metrics, writes models, decides."""
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else CPU
        self._common: BaseException | None = None
        """The last error that all ranks raised."""

    def broadcast(self, value: T) -> T:
        """Rank 0's ``value``, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=CPU)
        return box[0]

    def run_on_first(self, work: Callable[[], T]) -> T:
        """Call ``work`` on rank 0 alone, and return its result on every rank.

        Raises:
            TreeGrpoError: rank 0's, on every rank.
            RankError: on the other ranks, for any other exception of rank 0.
        """

        def outcome() -> tuple[T | None, BaseException | None]:
            try:
                return work(), None
            except BaseException as error:  # noqa: BLE001  # raised below, after the broadcast that the others wait for
                return None, error

        value, failure = outcome() if self.is_first else (None, None)
        ours = failure is None or isinstance(failure, TreeGrpoError)
        value, error = self.broadcast((value, failure if ours else RankError(RANK_0_FAILED)))
        if isinstance(error, RankError):
            raise failure or error
        if error is not None:
            self.raise_on_all(error)
        return cast("T", value)

    def raise_on_all(self, error: BaseException) -> NoReturn:
        """Raise an error that all ranks raise, so that rank 0 alone reports it."""
        self._common = error
        raise error

    def reports_error(self, error: BaseException) -> bool:
        """Whether this rank is to print ``error``: rank 0 alone prints an error that all raise."""
        return self.is_first or error is not self._common

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        self.all_gather(None)

    def assign_packs(self, packs: Sequence[Pack]) -> list[Pack]:
        """The packs of this rank, padded with empty ones to as many as on any other."""
        if self.world == 1:
            return list(packs)
        own = [packs[index] for index in balance_costs([pack.cost for pack in packs], self.world)[self.rank]]
        return own + [empty_pack()] * (-(-len(packs) // self.world) - len(own))

    def shard_policy(self, policy: Policy) -> Policy:
        """Shard the weights of ``policy`` over the ranks with FSDP2, in place; a lone rank moves them to its device.

        A decoder layer is gathered when it is its turn. Embeddings, head and final norm are gathered with the root, for
        the whole of a forward and backward pass, so it does not matter whether embeddings and head are tied. After a
        forward pass alone they stay gathered until the next backward pass; a policy that has none, because no parameter
        requires a gradient, frees them at once.
        """
        if self.world == 1:
            return policy.to(self.device)
        mesh = init_device_mesh(self.device.type, (self.world,))
        trained = any(parameter.requires_grad for parameter in policy.parameters())
        for unit in (*cast("Any", policy.causal.get_decoder()).layers, policy):
            wrapped = fully_shard(unit, mesh=mesh, reshard_after_forward=None if trained else True)
            # The weights of the loss are those of the whole batch: gradients add up, and FSDP would average them.
            wrapped.set_gradient_divide_factor(1.0)
            wrapped.set_force_sum_reduction_for_comms(True)
        return policy

    def gather_state(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """All weights of ``model`` in rank 0's main memory, tied ones once; nothing on the others.

        One tensor at a time is whole on the device.
        """
        state: dict[str, Tensor] = {}
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}
        for name, value in model.state_dict().items():
            if name not in tied:
                full = full_tensor(value)
                if self.is_first:
                    state[name] = full.to(CPU, dtype)
        return state


SINGLE_RANK = Ranks()


def full_tensor(value: Tensor) -> Tensor:
    """A sharded tensor whole, on every rank; any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def balance_costs(costs: Sequence[float], world: int) -> list[list[int]]:
    """Balance packs over ranks by cost; the packs of each rank, the most expensive first.

    FSDP keeps the ranks in step, layer by layer: a round of one pack each takes as long as its most expensive. So packs of
    like cost go together, in the least number of rounds, which makes the sum of these least; within a round the most
    expensive goes to the rank with the least cost so far.

    Example:
        >>> balance_costs([1, 9, 5, 8, 5], 2)
        [[1, 4], [3, 2, 0]]
    """
    order = sorted(range(len(costs)), key=lambda index: -costs[index])
    shares: list[list[int]] = [[] for _ in range(world)]
    loads = [0.0] * world
    for begin in range(0, len(order), world):
        for rank, index in zip(sorted(range(world), key=loads.__getitem__), order[begin : begin + world], strict=False):
            shares[rank].append(index)
            loads[rank] += costs[index]
    return shares


def started_by_torchrun() -> bool:
    """Whether torchrun started this process as one of its ranks.

    Raises:
        ConfigError: the environment says that it is one of several ranks, and no torchrun is there.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    remedy = "unset RANK and WORLD_SIZE, so that train.processes decides, or start the ranks with torchrun."
    if TORCHRUN not in os.environ:
        if world != "1":
            raise ConfigError(f"The environment has WORLD_SIZE = {world!r}, and it was not torchrun that set it; {remedy}")
        return False
    if not all(os.environ.get(name, default).isdecimal() for name, default in RANK_VARIABLES.items()):
        place = ", ".join(f"{name} = {os.environ.get(name)!r}" for name in RANK_VARIABLES)
        raise ConfigError(f"The environment has {place}, which are not numbers; {remedy}")
    if world != "1" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not _store_answers():
        raise ConfigError(f"The environment has the variables of a torchrun that has ended; {remedy}")
    return True


def _store_answers() -> bool:
    """Whether torchrun's rendezvous store listens."""
    place = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        with socket.create_connection(place, timeout=STORE_SECONDS):
            return True
    except (OSError, OverflowError):
        return False


@contextmanager
def join_process_group() -> Generator[Ranks]:
    """Join the process group of torchrun's ranks within the block; a lone rank joins none.

    When all raise the same, or rank 0 has failed, the others wait until rank 0 has ended: torchrun ends the remaining ranks
    when the first one fails, and rank 0 has to report why.

    Raises:
        ConfigError: there are fewer GPUs on this machine than ranks.
        RankError: another rank has died.
    """
    rank, world, local = (int(os.environ.get(name, default)) for name, default in RANK_VARIABLES.items())
    if TORCHRUN in os.environ:  # a killed torchrun would leave its processes behind
        die_with_parent()
    ranks = Ranks(rank, world, local)
    if world == 1:
        yield ranks
        return
    if ranks.device.type == "cuda":
        if local >= (gpus := torch.cuda.device_count()):
            raise ConfigError(f"Rank {rank} of the trainer finds {gpus} GPUs on its machine; start at most as many processes.")
        torch.cuda.set_device(ranks.device)
    if sys.platform == "linux" and os.environ.get("LOCAL_WORLD_SIZE") == str(world):  # all on this machine: use loopback
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
        yield ranks
        ranks.barrier()  # a rank that leaves first would look as if it had died
    except TreeGrpoError as error:
        if isinstance(error, RankError) or not ranks.reports_error(error):
            with suppress(RuntimeError):  # the end of rank 0
                ranks.barrier()
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise RankError(f"Rank {rank} of the trainer lost another; the log has why that one ended.") from error
        raise
