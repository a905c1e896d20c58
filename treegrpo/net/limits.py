"""Limits of what a peer may send, open and wait for, for both ends of every connection.

What follows from the plan of a run (nodes of a branch, depth, tokens of a prompt) is derived in `treegrpo.wire.size_limits` and
checked there. These are the limits on the memory that an unauthenticated peer may use.
"""

from __future__ import annotations

GROUP_LEAVES = 4096
"""Episodes of one question; a larger value is assumed to be a typing error."""
TURNS = 4096
"""Turns of one episode."""
MESSAGE_BYTES = 32 << 20
"""One gRPC message, on both ends. A branch of 32 turns of 16 Ki tokens with log-probabilities is 6 MiB."""
RECEIVE_BYTES = 2 << 30
"""Of messages that are half received, the sum over all calls: so many calls are served at once that it is kept; see `calls`."""
PEERS = 4096
"""Samplers with an open stream, and connections to each port."""
STREAMS = 8
"""Calls at once on one connection: a sampler has a rollout stream and a few calls for weights."""
NAMED_CALLS = 2 * STREAMS
"""Calls at once of a sampler whose certificate names it, over all its connections: those of one, and of one that broke."""
PLAIN = 1
"""gRPC's bit set of the encodings that are taken, which has identity alone: a few bytes on the wire are no longer megabytes."""
HANDSHAKE_SECONDS = 10.0
"""From connecting to the end of the TLS handshake and the first frames; from asking for a stream to Hello."""
IDLE_SECONDS = 300.0
"""A gRPC connection without any call is closed after this."""
CHUNK_SECONDS = 60.0
"""The longest that one chunk of weights may wait for who asked for it."""
NAME_BYTES = 64
"""The name of a sampler or of an engine, and the id of a lease."""
SENTENCE_CHARACTERS = 2000
"""What a sampler says in its own words: why a lease failed, what it waits for. The rest is cut off."""
CONTROL_BYTES = 64 << 10
"""One MQTT message. The largest of ours has a few hundred bytes."""
QUESTION_BYTES = 1 << 20
"""Prompt and answers of one question, in UTF-8."""
REQUEST_BYTES = 1 << 20
"""The body of a search request: 1,024 queries of 1 KiB."""
HEADER_BYTES = 16 << 10
"""The head of an HTTP request."""
ANSWER_SECONDS = 60.0
"""From the last byte of a search request to the last of its answer."""
REQUEST_SECONDS = 10.0
"""From the first byte of an HTTP request, or of a unary call, to the last; and without reading anything of the answer."""
SCRAPERS = 32
"""Connections to one /metrics at once."""
QUERY_LENGTH = 1 << 15
"""Letters of a query that are searched for."""
TOPK = 100
"""Documents that our retriever gives for one query."""
ANSWER_BYTES = MESSAGE_BYTES
"""The body of an HTTP answer, as it is sent and decompressed. A hundred documents of 300 KiB."""
LARGE_BYTES = 1 << 20
"""An HTTP answer or request beyond this is a large one."""
LARGE_ANSWERS = 2
"""Large answers that one client reads at once, and a server makes at once; others wait."""
LOOP_CHARACTERS = 8192
"""Text that a process may format, cut and encode on its event loop; more goes to a thread."""
LOOP_BYTES = 64 << 10
"""What a process may take apart on its event loop; more goes to a thread."""
JSON_PARTS = 1 << 19
"""Values of a JSON answer: the log-probabilities of 128 Ki tokens."""


def calls(message_bytes: int) -> int:
    """How many calls are served at once, if each may hold a partly received message of ``message_bytes``."""
    return min(2 * PEERS, RECEIVE_BYTES // message_bytes)


def samplers(message_bytes: int) -> int:
    """How many of those may be streams of samplers. The others are for weights, health checks and new connections."""
    return min(PEERS, calls(message_bytes) * 7 // 8)
