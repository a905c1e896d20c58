"""What the embedded broker lets whom do: users by password, topics by user. deploy/mosquitto says the same to Mosquitto.

                 publish                          subscribe
    learner      state, weights, own presence     everything of treegrpo/
    operator     state, own presence              everything of treegrpo/
    sampler      own presence                     everything of treegrpo/

Presence is treegrpo/RUN/members/ROLE/ID, own where ROLE is the user and ID the MQTT client id; a certificate for one sampler
is good for its client id alone. A last will is looked at when
it is left, since amqtt publishes it without asking.
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

from services.cli.broker_peers import peer_of
from treegrpo.access import roles_in
from treegrpo.refusals import Refusals

REFUSALS = Refusals(logging.getLogger(__name__))
"""amqtt makes its plugins by itself; a process has one broker."""
TOPIC_LETTERS = 128
"""Of a topic in the log."""
TOPICS = {"learner": ("state", "weights"), "operator": ("state",), "sampler": ()}


def may_publish(user: str, client: str, topic: str) -> bool:
    """Whether ``user``, connected as ``client``, may publish to ``topic``."""
    parts = topic.split("/")
    if user not in TOPICS or len(parts) < 3 or parts[0] != "treegrpo":
        return False
    return parts[2:] == ["members", user, client] or (len(parts) == 3 and parts[2] in TOPICS[user])


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
        REFUSALS.count(peer_of(session), reason, sentence)
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
            return user in TOPICS and topic.split("/")[0] == "treegrpo"
        allowed = may_publish(user, client, topic)
        if not allowed:
            REFUSALS.count(peer_of(session), "topic", f"it may not publish to {topic[:TOPIC_LETTERS]!r}")
        return allowed


def _certifies(connection: ssl.SSLObject, user: str, client: str) -> bool:
    """Whether the certificate of a connection says that ``user`` is its role, and ``client`` its name if it has one."""
    names = cast("Sequence[tuple[str, str]]", (connection.getpeercert() or {}).get("subjectAltName", ()))
    found = roles_in([name for kind, name in names if kind == "URI"])
    return found is not None and found[0].value == user and found[1] in ("", client)
