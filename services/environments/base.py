"""The environment interface: turns an agent's action into an observation, and a finished episode into rewards.

Write your own by copying `search_qa.py`. An environment knows nothing of trees, leases or engines; a branch of a
tree reaches it as a state to continue from. The environment declares how one state serves several branches:

- ``stateless``: states are immutable values, so a branch simply continues from the value (search QA).
- ``fork``: `Environment.fork` copies a live state (a process snapshot, a database transaction).
- ``replay``: the branch starts a new episode and the actions of its path are performed again (a web session).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from treegrpo.core.question import Question

Forking = Literal["stateless", "fork", "replay"]
State = TypeVar("State")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool, as recorded on the step."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Outcome(Generic[State]):
    """The result of one action."""

    state: State
    observation: str | None
    """Text the policy reads next; ``None`` when the action ended the episode (the node is a leaf).

    All of it is plain text to the policy; control strings of the environment's own are written as `Markup`."""
    tool_calls: tuple[ToolCall, ...] = ()
    valid: bool = True
    """False when the action violated the protocol; the observation then tells the policy how to act."""


class Environment(Protocol[State]):
    """A task for agents. All methods may be called concurrently, for different states."""

    forking: Forking
    stop: tuple[str, ...]
    """Stop strings: generation of an action ends with the first of them."""

    async def start(self, question: Question) -> State:
        """Begin an episode."""
        ...

    async def step(self, state: State, action: str, *, last: bool) -> Outcome[State]:
        """Perform ``action``. With ``last`` no tool may be used and the outcome must be a leaf.

        Raises:
            ToolError: a tool failed; the step is retried, then its branch fails.
            ToolAwayError: a tool is unavailable; the step is retried once `probe` succeeds.
        """
        ...

    async def probe(self) -> None:
        """Check that the tools answer, by a harmless call. Raises ToolAwayError if one does not."""
        ...

    async def fork(self, state: State) -> State:
        """Copy ``state`` (called only where ``forking`` is ``"fork"``)."""
        ...

    def score(self, state: State) -> Mapping[str, float]:
        """Compute the reward components of a finished episode, by name; the reward is their sum.

        Components that only report (``em``, ``f1`` beside the one trained on) go under `metrics`.
        """
        ...

    def metrics(self, state: State) -> Mapping[str, float]:
        """Compute metrics of a finished episode that are not part of the reward (``em``, ``invalid_actions``)."""
        ...
