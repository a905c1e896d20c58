"""Encodes text into ids without blocking the event loop: long text is encoded in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from treegrpo.core.question import Message
from treegrpo.core.step import TokenIds
from treegrpo.net.limits import LOOP_CHARACTERS


class Encoder(Protocol):
    """The part of a tokenizer that makes ids."""

    def encode(self, text: str) -> TokenIds: ...

    def render(self, messages: Sequence[Message]) -> TokenIds: ...


class TextCodec(Encoder, Protocol):
    """The part of a tokenizer that episodes need."""

    def decode(self, ids: Sequence[int] | TokenIds) -> str: ...


async def encode_text(encoder: Encoder, text: str) -> TokenIds:
    """As `Tokenizer.encode`."""
    return await asyncio.to_thread(encoder.encode, text) if len(text) > LOOP_CHARACTERS else encoder.encode(text)


async def render_prompt(encoder: Encoder, messages: Sequence[Message]) -> TokenIds:
    """As `Tokenizer.render`."""
    large = sum(len(message.content) for message in messages) > LOOP_CHARACTERS
    return await asyncio.to_thread(encoder.render, messages) if large else encoder.render(messages)
