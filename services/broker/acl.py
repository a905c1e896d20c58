"""What the embedded broker lets whom do: users by password, topics by user. deploy/mosquitto says the same to Mosquitto.

                 publish                                subscribe
    learner      state, weights, owner, every presence  everything of treegrpo/
    operator     state, own presence                    everything of treegrpo/
    sampler      own presence                           state, weights, owner, own presence

These are topics of treegrpo/RUN/, where RUN is any name: an embedded broker has one run. Presence is members/ROLE/CLIENT, own
where ROLE is the user and CLIENT the MQTT client id, which is NAME@INCARNATION; a certificate for one sampler is good for its
name alone. A last will is looked at when it is left, since amqtt publishes it without asking.
"""

from __future__ import annotations

import hmac
import logging
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from amqtt.contexts import Action
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin
from amqtt.session import Session

from services.broker.peers import peer_of
from treegrpo.observability.rate_limited_log import RateLimitedLog
from treegrpo.security.server_role import role_of_uris

REFUSALS = RateLimitedLog(logging.getLogger(__name__))
"""amqtt makes its plugins by itself; a process has one broker."""
TOPIC_LETTERS = 128
"""Of a topic in the log."""
WRITES: dict[str, set[str]] = {"learner": {"state", "weights", "owner"}, "operator": {"state"}, "sampler": set()}
READS = {"state", "weights", "owner"}
"""Of samplers. To know the client id of another is to be able to throw it out."""


def may_publish(user: str, client: str, topic: str) -> bool:
    """Whether ``user``, connected as ``client``, may publish to ``topic``."""
    match topic.split("/"):
        case ["treegrpo", _, "members", role, name] if user in WRITES:
            return user == "learner" or (role, name) == (user, client)
        case ["treegrpo", _, what]:
            return what in WRITES.get(user, ())
        case _:
            return False


def may_subscribe(user: str, client: str, topic: str) -> bool:
    """Whether ``user``, connected as ``client``, may subscribe to the filter ``topic``, or be sent a message of that topic."""
    root, _, rest = topic.partition("/")
    if user != "sampler":
        return user in WRITES and root == "treegrpo"
    what = rest.partition("/")[2]
    return root == "treegrpo" and (what in READS or what == f"members/{user}/{client}")


class Passwords(BaseAuthPlugin):
    """Lets in who knows the password of its user, shows a certificate of that role, and leaves a will it may publish."""

    @dataclass
    class Config(BaseAuthPlugin.Config):
        passwords: dict[str, str] = field(default_factory=dict[str, str], repr=False)

    async def authenticate(self, *, session: Session) -> bool:
        user, shown = session.username or "", session.password or ""
        known = self.config.passwords.get(user, "")
        if not known or not hmac.compare_digest(shown.encode(), known.encode()):
            return self._refused(session, "password", "no such user, or another password")
        if session.ssl_object is None or not _certifies(session.ssl_object, user, session.client_id or ""):
            return self._refused(session, "certificate", "its certificate is not of that role, or for another client id")
        will = session.will_topic if session.will_flag else None
        if will is not None and not may_publish(user, session.client_id or "", will):
            return self._refused(session, "will", f"it may not leave a will on {will[:TOPIC_LETTERS]!r}")
        return True

    @staticmethod
    def _refused(session: Session, reason: str, sentence: str) -> bool:
        REFUSALS.log_refusal(peer_of(session), reason, sentence)
        return False


class Topics(BaseTopicPlugin):
    """Lets each user publish what is its own."""

    async def topic_filtering(
        self, *, session: Session | None = None, topic: str | None = None, action: Action | None = None
    ) -> bool:
        if session is None or topic is None:
            return False
        user, client = session.username or "", session.client_id or ""
        if action is not Action.PUBLISH:
            return may_subscribe(user, client, topic)
        allowed = may_publish(user, client, topic)
        if not allowed:
            REFUSALS.log_refusal(peer_of(session), "topic", f"it may not publish to {topic[:TOPIC_LETTERS]!r}")
        return allowed


def _certifies(connection: ssl.SSLObject, user: str, client: str) -> bool:
    """Whether the certificate of a connection says that ``user`` is its role, and ``client`` its name if it has one."""
    names = cast("Sequence[tuple[str, str]]", (connection.getpeercert() or {}).get("subjectAltName", ()))
    found = role_of_uris([name for kind, name in names if kind == "URI"])
    return found is not None and found[0].value == user and found[1] in ("", client.partition("@")[0])
