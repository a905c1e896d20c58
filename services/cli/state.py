"""`treegrpo state running|paused|draining`: publishes the run state; and follows it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiomqtt

from treegrpo.config.schema import Config
from treegrpo.config.security import Role
from treegrpo.errors import ConfigError
from treegrpo.security.credentials import Credentials
from treegrpo.timing.backoff import Backoff
from treegrpo.wire.control import RunState, open_client, publish_state

RECONNECT = Backoff((1.0,))
"""To a broker that was lost."""


async def set_run_state(config: Config, word: str) -> str:
    """Publish the run state; returns a line about it. Raises ConfigError: unknown state; UnavailableError: no broker."""
    try:
        state = RunState(word)
    except ValueError as error:
        raise ConfigError(f"{word!r} is not a run state; write running, paused or draining.") from error
    access = Credentials.from_config(config.security, Role.OPERATOR)
    await publish_state(config.broker.address, config.run.name, state, access)
    return f"The run {config.run.name} is set to {state.value}."


async def follow_run_state(config: Config, access: Credentials, on_state: Callable[[RunState], None]) -> None:
    """Call ``on_state`` with the present run state and at every change of it, for ever. Reconnects to the broker."""
    states = {state.value.encode(): state for state in RunState}
    while True:
        try:
            async with open_client(config.broker.address, access) as client:
                await client.subscribe(f"treegrpo/{config.run.name}/state", qos=1)
                async for message in client.messages:
                    if (state := states.get(bytes(message.payload))) is not None:
                        on_state(state)
        except aiomqtt.MqttError:  # the broker is started again, by us or by others
            await asyncio.sleep(RECONNECT.delay(0))
