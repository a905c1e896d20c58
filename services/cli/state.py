"""`treegrpo state running|paused|draining`."""

from __future__ import annotations

from treegrpo.access import Access
from treegrpo.config import Config
from treegrpo.control import RunState, publish_state
from treegrpo.errors import ConfigError
from treegrpo.security import Role


async def set_state(config: Config, word: str) -> str:
    """Tell the run; returns a line about it. Raises ConfigError for another word, UnavailableError without a broker."""
    try:
        state = RunState(word)
    except ValueError as error:
        raise ConfigError(f"{word!r} is no run state; write running, paused or draining.") from error
    access = Access.of(config.security, Role.OPERATOR)
    await publish_state(config.broker.address, config.run.name, state, access)
    return f"The run {config.run.name} is told to be {state.value}."
