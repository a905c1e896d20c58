"""The Unix socket on which the trainer sends its requests; treegrpo/wire/trainer_protocol.py has the messages."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import stat
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

from learner.intake.coordinator.trainer_api import TrainerApi
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import AddressInUseError, ContractError, RunFileError, describe
from treegrpo.storage.run_files import check_kind, unusable_file_error
from treegrpo.wire.trainer_protocol import (
    Covered,
    Done,
    Evaluate,
    Message,
    Publish,
    Refused,
    StepReport,
    Take,
    check_step_report,
    encode_message,
    receive_message,
)

log = logging.getLogger(__name__)
REBIND_CHECK_SECONDS = 2.0
"""A socket that was removed is noticed within this time."""


@contextlib.asynccontextmanager
async def serve_trainer(api: TrainerApi, path: str, rebind_check_seconds: float = REBIND_CHECK_SECONDS) -> AsyncGenerator[None]:
    """Answer trainers at a Unix socket for the time of the block.

    Raises:
        AddressInUseError: another intake answers there.
        RunFileError: something else is in the place of the socket.
    """

    async def serve_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        log.info("the trainer connected")
        try:
            with api.track_connection():
                while (request := await receive_message(reader)) is not None:
                    writer.write(encode_message(await _answer_or_refuse(api, request)))
                    await writer.drain()
        except (ContractError, ConnectionError) as error:
            log.error("the trainer's connection ends: %s", describe(error))  # noqa: TRY400 - one sentence is enough
        finally:
            writer.close()
        log.info("the trainer left")

    listener = UnixListener(Path(path), serve_connection)
    await listener.bind_socket()
    rebinding = asyncio.create_task(listener.rebind_forever(rebind_check_seconds), name="socket")
    try:
        yield
    finally:
        rebinding.cancel()
        await asyncio.gather(rebinding, return_exceptions=True)
        listener.unbind_socket()


async def _answer_or_refuse(api: TrainerApi, request: Message) -> Message:
    try:
        with api.track_request():
            return await _answer(api, request)
    except ContractError as error:
        log.error("a request of the trainer is refused: %s", error)  # noqa: TRY400 - one sentence is enough
        return Refused(str(error))


async def _answer(api: TrainerApi, request: Message) -> Message:
    match request:
        case Take(position, count):
            return await api.handle_take(position, count)
        case Publish(version, path, position):
            await api.handle_publish(PolicyVersion.parse(version), Path(path), position)
        case Covered(position):
            api.handle_covered(position)
        case Evaluate(version):
            return await api.handle_evaluate(PolicyVersion.parse(version))
        case StepReport(values):
            check_step_report(values)
            api.handle_step_report(values)
        case _:
            raise ContractError(f"The trainer sent {type(request).__name__}, which only the intake sends.")
    return Done()


class UnixListener:
    """A listening Unix socket that is bound again when another program removes it."""

    def __init__(self, path: Path, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
        """``serve`` is called with each connection."""
        self._path = path
        self._serve = serve
        self._server: asyncio.Server | None = None
        self._inode: int | None = None

    async def bind_socket(self) -> None:
        """Raises AddressInUseError and RunFileError."""
        await _remove_stale_socket(self._path)
        try:
            server = await asyncio.start_unix_server(self._serve, self._path, limit=1 << 20)
        except OSError as error:
            raise unusable_file_error(self._path, error) from error
        if self._server is not None:
            self._server.close()  # connections stay
        self._server, self._inode = server, _inode(self._path)

    async def rebind_forever(self, seconds: float) -> None:
        """Bind again when the socket's file is another, or gone; checked every few ``seconds``."""
        has_logged = False
        while True:
            await asyncio.sleep(seconds)
            if _inode(self._path) == self._inode:
                continue
            try:
                await self.bind_socket()
            except (RunFileError, AddressInUseError) as error:
                if not has_logged:
                    log.error("a trainer that starts now does not find the intake: %s", error)  # noqa: TRY400 - one sentence is enough
                has_logged = True
            else:
                log.warning("another program removed %s; it was made again", self._path)
                has_logged = False

    def unbind_socket(self) -> None:
        """Remove the socket, unless another program has put something in its place."""
        if self._server is not None:
            self._server.close()
        if _inode(self._path) == self._inode:
            with contextlib.suppress(OSError):
                self._path.unlink()


async def _remove_stale_socket(path: Path) -> None:
    """Remove the socket of an intake that has died.

    Raises:
        AddressInUseError: a running one answers.
        RunFileError: it is no socket, or cannot be used.
    """
    await asyncio.to_thread(check_kind, path, "a socket", stat.S_ISSOCK)
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        await asyncio.to_thread(path.unlink, missing_ok=True)
        return
    except OSError as error:
        raise unusable_file_error(path, error) from error
    writer.close()
    raise AddressInUseError(f"Another intake serves this run at {path}; stop it, or set run.dir to another directory.")


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except OSError:
        return None
