"""A minimal hostile HTTP/2 client: sends incomplete messages, ignores flow control, and sends frames without end.

A client library would complete its messages and obey flow control; the benchmark needs a peer that does neither.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Generator, Mapping
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK, END_HEADERS = 1, 4
INITIAL_WINDOW = 4
"""The setting's number."""
FRAME_BYTES = 16384
WINDOW = 65535
"""Of a stream and of a connection, until the server changes it."""
BURST_BYTES = 1 << 20
"""Written before the next look for frames of the server."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def header_block(headers: Mapping[str, str]) -> bytes:
    """Literal fields without indexing (RFC 7541, 6.2.2); names and values have less than 127 bytes."""
    out = bytearray()
    for name, value in headers.items():
        out += bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    return bytes(out)


def grpc_frame(message: bytes, length: int | None = None, *, compressed: bool = False) -> bytes:
    """A message behind its five bytes, which may promise another ``length``."""
    return struct.pack(">?I", compressed, len(message) if length is None else length) + message


class Connection:
    """One connection, and the unsent data of each of its streams."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=5.0)
        self._socket.sendall(PREFACE + frame(SETTINGS, 0, 0))
        self._unread = bytearray()
        self._window, self._initial = WINDOW, WINDOW
        self._windows: dict[int, int] = {}
        self._unsent: dict[int, deque[memoryview]] = {}
        self._next = 1
        self.closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    @property
    def open_streams(self) -> int:
        """Streams that the server has not ended."""
        return 0 if self.closed else len(self._windows)

    def call(self, path: str, *payload: bytes, headers: Mapping[str, str] | None = None) -> int:
        """Open a call, and queue its data: sent as far as the server's windows allow."""
        stream, self._next = self._next, self._next + 2
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "learner", "te": "trailers"}
        fields |= {"content-type": "application/grpc", **(headers or {})}
        self._windows[stream], self._unsent[stream] = self._initial, deque(map(memoryview, payload))
        self.send_bytes(frame(HEADERS, END_HEADERS, stream, header_block(fields)))
        return stream

    def queue_data(self, stream: int, payload: bytes) -> None:
        """Queue more data on a stream."""
        if stream in self._windows:
            self._unsent[stream].append(memoryview(payload))

    def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are."""
        with self._broken():
            self._socket.sendall(data)

    def pump(self, seconds: float, *, drained: bool = False, answered: bool = False) -> None:
        """Send queued data and receive frames, for ``seconds``.

        Or until all is sent, if ``drained``, or the server has ended every call, if ``answered``.
        """
        end = time.monotonic() + seconds
        while not self.closed and (left := end - time.monotonic()) > 0:
            if drained and not any(self._unsent.values()):
                return
            if answered and not self._windows:
                return
            sent = self._send()
            with self._broken():
                if select.select([self._socket], [], [], 0.0 if sent else min(0.05, left))[0]:
                    self._receive_data(self._socket.recv(BURST_BYTES))

    @contextlib.contextmanager
    def _broken(self) -> Generator[None]:
        """Note that the server closed the connection or stopped reading, which is what it should do."""
        try:
            yield
        except OSError:
            self.closed = True

    def _send(self) -> int:
        burst = bytearray()
        for stream, unsent in self._unsent.items():
            while unsent and len(burst) < BURST_BYTES:
                piece = unsent.popleft()
                size = max(0, min(len(piece), FRAME_BYTES, self._window, self._windows[stream]))
                if rest := piece[size:]:
                    unsent.appendleft(rest)
                if not size:
                    break
                burst += frame(DATA, 0, stream, bytes(piece[:size]))
                self._window -= size
                self._windows[stream] -= size
        if burst:
            self.send_bytes(bytes(burst))
        return len(burst)

    def _receive_data(self, data: bytes) -> None:
        if not data:
            self.closed = True
        self._unread += data
        while len(self._unread) >= 9:
            size = int.from_bytes(self._unread[:3])
            if len(self._unread) < 9 + size:
                return
            kind, flags, stream = self._unread[3], self._unread[4], int.from_bytes(self._unread[5:9])
            payload = bytes(self._unread[9 : 9 + size])
            del self._unread[: 9 + size]
            self._handle_frame(kind, flags, stream, payload)

    def _handle_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        match kind:
            case 8 if stream == 0:
                self._window += int.from_bytes(payload)
            case 8 if stream in self._windows:
                self._windows[stream] += int.from_bytes(payload)
            case 4 if not flags & ACK:
                self._take_settings(payload)
                self.send_bytes(frame(SETTINGS, ACK, 0))
            case 6 if not flags & ACK:
                self.send_bytes(frame(PING, ACK, 0, payload))
            case 3:
                self._forget(stream)
            case 0 | 1 if flags & 1:
                self._forget(stream)
            case 7:
                self.closed = True
            case _:
                pass

    def _forget(self, stream: int) -> None:
        self._windows.pop(stream, None)
        self._unsent.pop(stream, None)

    def _take_settings(self, payload: bytes) -> None:
        for place in range(0, len(payload), 6):
            number, value = struct.unpack_from(">HI", payload, place)
            if number == INITIAL_WINDOW:
                more, self._initial = value - self._initial, value
                self._windows = {stream: window + more for stream, window in self._windows.items()}
