"""The embedded MQTT broker, for runs on one machine: `python -m services.cli.broker CONFIG.toml`."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from amqtt.broker import Broker
from amqtt.contexts import BrokerConfig, ListenerConfig

from treegrpo.config import Config
from treegrpo.edge import run_service
from treegrpo.telemetry import check_free

SHUTDOWN_SECONDS = 2.0


def embedded_broker(address: str) -> Broker:
    """An amqtt broker for ``address`` that lets everybody in; not started. Needs a running event loop."""
    return Broker(
        BrokerConfig(
            listeners={"default": ListenerConfig(bind=address)},
            plugins={"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        )
    )


async def serve(config: Config) -> None:
    """Run the broker at ``broker.address`` until cancelled. Raises AddressInUseError."""
    check_free(config.broker.address, "broker.address")
    for chatty in ("amqtt", "transitions"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    broker = embedded_broker(config.broker.address)
    await broker.start()
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        with suppress(TimeoutError):  # its shutdown may wait for ever for a client that stays; there is nothing to save
            async with asyncio.timeout(SHUTDOWN_SECONDS):
                await broker.shutdown()


if __name__ == "__main__":
    run_service(serve)
