"""TLS reload: renewed certificate files are used from the next handshake on, without a restart.

    handshake ─► files changed? ─┬─ no ──────────────────────► what was loaded last
                                 ├─ yes, and they are good ──► loaded again
                                 └─ yes, but they are not ───► what was loaded last, until the files change again

Half of a renewal changes again when its other half is written. Some causes pass without a change, such as a certificate that
is not valid yet, so unusable files are loaded again after RETRY_SECONDS. Each change is logged once.
"""

from __future__ import annotations

import logging
import ssl
from asyncio import sslproto
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Generic, TypeVar

from treegrpo.errors import ConfigError, describe

log = logging.getLogger(__name__)
sslproto.SSLProtocol.max_size = 32 << 10
"""Bytes of asyncio's receive buffer, which it allocates for each accepted connection, also without a certificate. Its default of
256 Ki is a gigabyte for four thousand connections. A TLS record has 16 Ki at most."""
RETRY_SECONDS = 1.0
"""From one attempt to load unusable files to the next, if they do not change."""
FileStamp = tuple[tuple[int, ...], ...]
Loaded = TypeVar("Loaded")


class CertificateReload(Generic[Loaded]):
    """Loads an object from certificate files, and loads it again when they have changed."""

    def __init__(
        self,
        files: tuple[Path, Path, Path],
        load: Callable[[], Loaded],
        check: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """Load for the first time; raises what ``load`` raises.

        Args:
            files: authorities, certificate, key.
            load: raises OSError, ssl.SSLError or ConfigError while the files cannot be used.
            check: called before they are loaded again; raises in the same way.
            clock: the monotonic time in seconds.
        """
        self._files = files
        self._load = load
        self._check = check
        self._clock = clock
        self._loaded_stamp = self._failed_stamp = _stamp_if_there(files)
        self._retry_at = 0.0
        self.newest = load()

    def reload_if_changed(self) -> bool:
        """Load `newest` again if the files have changed and are valid; returns whether it was."""
        stamp: FileStamp = ()
        try:
            stamp = file_stamp(self._files)
            if stamp == self._loaded_stamp or (stamp == self._failed_stamp and self._clock() < self._retry_at):
                return False
            self._check()
            self.newest = self._load()
        except (OSError, ConfigError) as error:
            self._retry_at = self._clock() + RETRY_SECONDS
            if stamp != self._failed_stamp:
                self._failed_stamp = stamp
                why = describe(error)
                log.warning("the renewed %s cannot be used, so the previous certificate stays in use: %s", self._files[1], why)
            return False
        self._loaded_stamp = self._failed_stamp = stamp
        log.info("%s was renewed and is in use now", self._files[1])
        return True


def reloading_context(files: tuple[Path, Path, Path], *, ask: bool) -> ssl.SSLContext:
    """A server's TLS context, whose handshakes use the newest valid files.

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
    """`file_stamp`, or the stamp of no files: loading them raises the error that names the missing one."""
    try:
        return file_stamp(files)
    except OSError:
        return ()


def file_stamp(files: Sequence[Path]) -> FileStamp:
    """Inode, size and times of each file, one of which changes with its content or its mode. Raises OSError."""
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in (path.stat() for path in files))
