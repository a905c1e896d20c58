"""Limits of the embedded broker, which amqtt lacks: on the requests of one client, and on waiting for it."""

from __future__ import annotations

from dataclasses import dataclass

from treegrpo.net.limits import HANDSHAKE_SECONDS, PEERS

KEEPALIVE_SECONDS = 60
UNWRITTEN_BYTES = 4 << 20
RETAINED_BYTES = 4096
"""The largest message that is retained. The largest of ours has a few hundred bytes."""


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """The defaults are what runs use; tests set smaller ones."""

    peers: int = PEERS
    """Connections at once."""
    handshake_seconds: float = HANDSHAKE_SECONDS
    """For the TLS handshake and CONNECT, each."""
    keepalive_seconds: float = KEEPALIVE_SECONDS
    """The longest keep-alive a client may ask for; also for one that asks for none."""
    keepalive_factor: float = 1.5
    """Multiple of its keep-alive after which a silent client is disconnected, as MQTT says."""
    grace_seconds: float = 1.0
    """Added once when the keep-alive has expired: it may have been this process that stood still."""
    pending_messages: int = 256
    """Messages received from one client and not yet handled; above this nothing is read from it."""
    unwritten_bytes: int = UNWRITTEN_BYTES
    """Messages queued for one client. The presence of all peers has 1 MiB."""
    filters: int = 16
    """Topic filters of one client. Ours have four at most."""
    filter_bytes: int = 1024
    retained: int = 2 * PEERS
    """Retained presence messages, also of members that have left a moment ago."""
    retained_besides: int = 64
    """Further retained messages that are not presence, so that presence cannot keep a run from publishing its state."""
    retained_at_once: int = UNWRITTEN_BYTES // (4 * RETAINED_BYTES)
    """Retained messages sent to a new subscriber before it has acknowledged them: fewer than may be queued for one client."""


DEFAULT_LIMITS = BrokerLimits()
