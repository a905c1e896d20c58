"""TLS reload: renewed certificate files are used from the next handshake on, without a restart.

handshake ─► files changed? ─┬─ no ───────────────────► what was loaded last
├─ yes, and they are good ► loaded again
└─ yes, half of a renewal ► what was loaded last; the next handshake tries again
"""

from __future__ import annotations

import logging
import ssl
from asyncio import sslproto
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from treegrpo.errors import ConfigError, describe

log = logging.getLogger(__name__)
sslproto.SSLProtocol.max_size = 32 << 10
"""Bytes that asyncio sets aside for each connection when it is accepted, before anybody has shown anything: 256 Ki otherwise, a
gigabyte for four thousand strangers. A TLS record has 16 Ki at most."""
FileStamp = tuple[tuple[int, int], ...]
Loaded = TypeVar("Loaded")


class CertificateReload(Generic[Loaded]):
    """What is loaded from a certificate's files, loaded again when they have changed."""

    def __init__(
        self, files: tuple[Path, Path, Path], load: Callable[[], Loaded], check: Callable[[], None] = lambda: None
    ) -> None:
        """Load for the first time; raises what ``load`` raises.

        Args:
            files: authorities, certificate, key.
            load: raises OSError, ssl.SSLError or ConfigError while the files cannot be used.
            check: called before they are loaded again; raises in the same way.
        """
        self._files = files
        self._load = load
        self._check = check
        self._loaded_stamp = self._reported_stamp = _stamp_if_there(files)
        self.newest = load()

    def reload_if_changed(self) -> bool:
        """Whether `newest` has been loaded again just now."""
        stamp: FileStamp = ()
        try:
            stamp = file_stamp(self._files)
            if stamp == self._loaded_stamp:
                return False
            self._check()
            self.newest = self._load()
        except (OSError, ConfigError) as error:
            if stamp != self._reported_stamp:
                self._reported_stamp = stamp
                log.warning("the renewed %s cannot be used, so the one before stays in use: %s", self._files[1], describe(error))
            return False
        self._loaded_stamp = self._reported_stamp = stamp
        log.info("%s was renewed and is in use now", self._files[1])
        return True


def reloading_context(files: tuple[Path, Path, Path], *, ask: bool) -> ssl.SSLContext:
    """A TLS context to listen with, whose handshakes go on with the newest good files.

    Args:
        files: authorities, certificate, key.
        ask: clients for a certificate too.

    Raises:
        OSError, ssl.SSLError: the files cannot be used now.
    """

    def load() -> ssl.SSLContext:
        ca, certificate, key = files
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(ca) if ask else None)
        context.load_cert_chain(certificate, key)
        context.verify_mode = ssl.CERT_REQUIRED if ask else ssl.CERT_NONE
        return context

    reload = CertificateReload(files, load)

    def use_newest(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        reload.reload_if_changed()
        connection.context = reload.newest

    context = load()
    context.sni_callback = use_newest  # OpenSSL calls it in each handshake, with or without a server name
    return context


def _stamp_if_there(files: Sequence[Path]) -> FileStamp:
    """`file_stamp`, or the stamp of no files: whoever loads them says what is missing."""
    try:
        return file_stamp(files)
    except OSError:
        return ()


def file_stamp(files: Sequence[Path]) -> FileStamp:
    """Another one when any of the files was written again. Raises OSError."""
    return tuple((stat.st_mtime_ns, stat.st_ino) for stat in (path.stat() for path in files))
