"""Keys for blocks of a prefix: a block's key stands for all tokens up to its end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from treegrpo.core.step import TokenIds

BLOCK = 8
"""Tokens of a block."""
MAX_BLOCKS = 1 << 17
"""Blocks that are remembered: a million tokens, 30 MB."""


def block_keys(ids: TokenIds) -> Iterator[int]:
    """One key for each whole block, of everything up to its end."""
    key, raw = 0, np.ascontiguousarray(ids, np.uint32).tobytes()
    for end in range(BLOCK * 4, len(raw) + 1, BLOCK * 4):
        key = hash((key, raw[end - BLOCK * 4 : end]))
        yield key
