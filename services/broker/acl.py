"""Access control of the embedded broker: users by password, topics by user. deploy/mosquitto/acl has the same for Mosquitto.

                 publish                                subscribe
    learner      state, weights, owner, every presence  everything of treegrpo/
    operator     state, own presence                    everything of treegrpo/
    sampler      own presence                           state, weights, owner, own presence

These are topics of treegrpo/RUN/, where RUN is any name: an embedded broker has one run. Presence is members/ROLE/CLIENT, own
where ROLE is the user and CLIENT the MQTT client id, which is NAME@INCARNATION; a certificate for one sampler is valid for its
name alone. A last will is checked at CONNECT, since amqtt publishes it without a check.
"""

from __future__ import annotations

import hmac
import logging
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from amqtt.broker import BrokerContext
from amqtt.contexts import Action
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin
from amqtt.session import Session

from services.broker.connection import describe_peer
from treegrpo.observability.rate_limited_log import RateLimitedLog
from treegrpo.security.server_role import role_of_uris

log = logging.getLogger(__name__)
LOGGED_TOPIC_CHARACTERS = 128
PUBLISH_TOPICS: dict[str, set[str]] = {"learner": {"state", "weights", "owner"}, "operator": {"state"}, "sampler": set()}
SAMPLER_SUBSCRIPTIONS = {"state", "weights", "owner"}
"""No presence of others: who knows another's client id can disconnect it by connecting with the same."""


def may_publish(user: str, client: str, topic: str) -> bool:
    """Whether ``user``, connected as ``client``, may publish to ``topic``."""
    match topic.split("/"):
        case ["treegrpo", _, "members", role, name] if user in PUBLISH_TOPICS:
            return user == "learner" or (role, name) == (user, client)
        case ["treegrpo", _, what]:
            return what in PUBLISH_TOPICS.get(user, ())
        case _:
            return False


def may_subscribe(user: str, client: str, topic: str) -> bool:
    """Whether ``user``, connected as ``client``, may subscribe to the filter ``topic``, or be sent a message of that topic."""
    root, _, rest = topic.partition("/")
    if user != "sampler":
        return user in PUBLISH_TOPICS and root == "treegrpo"
    what = rest.partition("/")[2]
    return root == "treegrpo" and (what in SAMPLER_SUBSCRIPTIONS or what == f"members/{user}/{client}")


@dataclass
class AclConfig(BaseAuthPlugin.Config):
    passwords: dict[str, str] = field(default_factory=dict[str, str], repr=False)


class PasswordAuthPlugin(BaseAuthPlugin):
    """Authenticates a client: its password, a certificate of the same role, and a last will that it may publish."""

    Config = AclConfig

    def __init__(self, context: BrokerContext) -> None:
        super().__init__(context)
        self._refusals = RateLimitedLog(log)

    async def authenticate(self, *, session: Session) -> bool:
        user, shown = session.username or "", session.password or ""
        known = self.config.passwords.get(user, "")
        if not known or not hmac.compare_digest(shown.encode(), known.encode()):
            return self._refused(session, "password", "no such user, or another password")
        if session.ssl_object is None or not _certificate_matches(session.ssl_object, user, session.client_id or ""):
            return self._refused(session, "certificate", "its certificate is not of that role, or for another client id")
        will = session.will_topic if session.will_flag else None
        if will is not None and not may_publish(user, session.client_id or "", will):
            return self._refused(session, "will", f"it may not leave a will on {will[:LOGGED_TOPIC_CHARACTERS]!r}")
        return True

    def _refused(self, session: Session, reason: str, sentence: str) -> bool:
        self._refusals.log_refusal(describe_peer(session), reason, sentence)
        return False


class TopicAclPlugin(BaseTopicPlugin):
    """Authorizes publications and subscriptions by user and topic."""

    def __init__(self, context: BrokerContext) -> None:
        super().__init__(context)
        self._refusals = RateLimitedLog(log)

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
            self._refusals.log_refusal(
                describe_peer(session), "topic", f"it may not publish to {topic[:LOGGED_TOPIC_CHARACTERS]!r}"
            )
        return allowed


def _certificate_matches(connection: ssl.SSLObject, user: str, client: str) -> bool:
    """Whether a connection's certificate names ``user`` as its role, and ``client`` as its name if it has one."""
    names = cast("Sequence[tuple[str, str]]", (connection.getpeercert() or {}).get("subjectAltName", ()))
    found = role_of_uris([name for kind, name in names if kind == "URI"])
    return found is not None and found[0].value == user and found[1] in ("", client.partition("@")[0])
