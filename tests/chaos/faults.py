"""A seeded schedule of faults over all parts of a run: kills, stops, and cut connections.

Each third of the faults is of one kind. Within a kind the parts take turns in a seeded order, so that a long schedule
meets all of them several times and a short one most of them once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from tests.chaos.fault_proxy import LinkFault
from treegrpo.core.lease import SILENCE_SECONDS

SHORT_SECONDS = (1.0, 6.0)
LONG_SECONDS = (SILENCE_SECONDS + 3.0, SILENCE_SECONDS + 8.0)
"""Longer than a sampler may be silent, than the broker's keepalive and than a search may take."""
PAUSE_SECONDS = (0.0, 4.0)
"""After the recovery from one fault, before the next: any moment of a step may be hit."""
LEARNER = ("intake", "trainer")
ROLES = ("sampler", "intake", "trainer", "broker", "retriever")
ENDS = {
    "sampler": ("intake", "retriever", "broker"),
    "intake": ("intake", "broker"),
    "broker": ("broker",),
    "retriever": ("retriever",),
}
"""By role: to which services connections are cut; to itself: everybody's. The trainer has no network."""


Turn = TypeVar("Turn")


class FaultKind(Enum):
    KILL = "kill"
    """SIGKILL."""
    STOP = "stop"
    """SIGSTOP, and after some seconds SIGCONT."""
    CUT_OFF = "cut off"
    """Its connections fail for some seconds."""


@dataclass(frozen=True, slots=True)
class Fault:
    kind: FaultKind
    parts: tuple[str, ...]
    """Who is killed, stopped or cut off."""
    pause: float
    """Seconds to wait before it."""
    seconds: float = 0.0
    """How long it lasts."""
    mode: LinkFault = LinkFault.OPEN
    links: tuple[tuple[str, str], ...] = ()
    """(client, service) of the connections that fail."""

    @property
    def what(self) -> str:
        """For the table."""
        how = {
            FaultKind.KILL: "",
            FaultKind.STOP: f" {self.seconds:.0f} s",
            FaultKind.CUT_OFF: f" {self.mode.value} {self.seconds:.0f} s",
        }
        return self.kind.value + how[self.kind]

    @property
    def whom(self) -> str:
        """For the table."""
        services = {service for _, service in self.links} - set(self.parts)
        return " and ".join(self.parts) + "".join(f" from the {service}" for service in services)


def schedule(seed: int, count: int, samplers: list[str], links: list[tuple[str, str]]) -> list[Fault]:
    """``count`` faults; ``links`` are the connections there are, as (client, service)."""
    chance = random.Random(seed)
    plans: dict[FaultKind, Iterator[Fault]] = {
        FaultKind.KILL: _kills(chance, samplers),
        FaultKind.STOP: _stops(chance, samplers),
        FaultKind.CUT_OFF: _cuts(chance, samplers, links),
    }
    kinds = [list(FaultKind)[number % len(FaultKind)] for number in range(count)]
    chance.shuffle(kinds)
    return [next(plans[kind]) for kind in kinds]


def _kills(chance: random.Random, samplers: list[str]) -> Iterator[Fault]:
    parts = _turns(chance, [(role,) for role in ROLES] + [LEARNER])
    while True:
        yield Fault(FaultKind.KILL, _named(chance, next(parts), samplers), _pause(chance))


def _stops(chance: random.Random, samplers: list[str]) -> Iterator[Fault]:
    parts = _turns(chance, [((role,), length) for role in ROLES for length in (SHORT_SECONDS, LONG_SECONDS)])
    while True:
        part, length = next(parts)
        yield Fault(FaultKind.STOP, _named(chance, part, samplers), _pause(chance), chance.uniform(*length))


def _cuts(chance: random.Random, samplers: list[str], links: list[tuple[str, str]]) -> Iterator[Fault]:
    modes = [mode for mode in LinkFault if mode is not LinkFault.OPEN]
    turns = _turns(chance, [(role, mode) for role in ENDS for mode in modes])
    while True:
        role, mode = next(turns)
        (part,) = _named(chance, (role,), samplers)
        service = chance.choice(ENDS[role])
        hit = [link for link in links if link[1] == service and part in link]
        length = chance.choice((SHORT_SECONDS, LONG_SECONDS)) if mode is LinkFault.DROP else SHORT_SECONDS
        yield Fault(FaultKind.CUT_OFF, (part,), _pause(chance), chance.uniform(*length), mode, tuple(hit))


def _turns(chance: random.Random, choices: list[Turn]) -> Iterator[Turn]:
    """Every choice once, in a new order each time round."""
    while True:
        yield from chance.sample(choices, len(choices))


def _named(chance: random.Random, roles: tuple[str, ...], samplers: list[str]) -> tuple[str, ...]:
    return tuple(chance.choice(samplers) if role == "sampler" else role for role in roles)


def _pause(chance: random.Random) -> float:
    return chance.uniform(*PAUSE_SECONDS)
