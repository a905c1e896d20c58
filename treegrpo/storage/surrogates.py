"""Lone surrogates (U+D800 to U+DFFF), which JSON can spell and UTF-8 cannot encode: finds and replaces them."""

from __future__ import annotations


def has_lone_surrogate(text: str) -> bool:
    """Whether ``text`` cannot be encoded as UTF-8, as protobuf, msgpack, MQTT and files need it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def replace_surrogates(text: str) -> str:
    """``text`` with U+FFFD for each surrogate without a partner; pairs become the character that they stand for."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if has_lone_surrogate(text) else text
