"""Strings that no encoding knows: they hold a surrogate (U+D800 to U+DFFF) without its partner, which JSON can write."""

from __future__ import annotations


def has_lone_surrogate(text: str) -> bool:
    """Whether ``text`` cannot be written as UTF-8: not in protobuf, msgpack, MQTT, nor in a file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def replace_surrogates(text: str) -> str:
    """``text`` with U+FFFD for each surrogate without a partner; pairs become the character that they stand for."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if has_lone_surrogate(text) else text
