"""TLS for what listens, with the files as they are at each handshake: a renewed certificate serves without a restart."""

from __future__ import annotations

import logging
import ssl
from asyncio import sslproto
from collections.abc import Sequence
from pathlib import Path

from treegrpo.errors import describe

log = logging.getLogger(__name__)
sslproto.SSLProtocol.max_size = 32 << 10
"""Bytes that asyncio sets aside for each connection when it is accepted, before anybody has shown anything: 256 Ki otherwise, a
gigabyte for four thousand strangers. A TLS record has 16 Ki at most."""
FileStamp = tuple[tuple[int, int], ...]


class TlsReload:
    """The newest good context of a certificate's files; looks at them when somebody connects."""

    def __init__(self, files: tuple[Path, Path, Path], *, ask: bool) -> None:
        """``files``: authorities, certificate, key. ``ask`` clients for a certificate too. Raises OSError, ssl.SSLError too."""
        self._files = files
        self._ask = ask
        self._seen = file_stamp(files)
        self._newest = self._load()

    def context(self) -> ssl.SSLContext:
        """To listen with. Each handshake goes on with the newest one; OpenSSL tells of each, with or without a server name."""
        context = self._load()
        context.sni_callback = self._renew
        return context

    def _renew(self, connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        try:
            if (now := file_stamp(self._files)) != self._seen:
                self._seen = now
                self._newest = self._load()
                log.info("%s is served as it is now", self._files[1])
        except OSError as error:  # half of a renewal; the next handshake finds the rest
            log.warning("the certificate of before goes on to serve: %s: %s", self._files[1], describe(error))
        connection.context = self._newest

    def _load(self) -> ssl.SSLContext:
        ca, certificate, key = self._files
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(ca) if self._ask else None)
        context.load_cert_chain(certificate, key)
        context.verify_mode = ssl.CERT_REQUIRED if self._ask else ssl.CERT_NONE
        return context


def file_stamp(files: Sequence[Path]) -> FileStamp:
    """Another one when any of the files was written again. Raises OSError."""
    return tuple((stat.st_mtime_ns, stat.st_ino) for stat in (path.stat() for path in files))
