"""The local socket on which the trainer asks; treegrpo/handoff.py has the conversation."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from pathlib import Path

from learner.intake.trainer_desk import TrainerDesk
from treegrpo.errors import AddressInUseError, ContractError, describe
from treegrpo.handoff import Covered, Done, Evaluate, Message, Publish, Refused, Report, Take, check_report, encode, receive
from treegrpo.step import PolicyVersion

log = logging.getLogger(__name__)


async def _answer(desk: TrainerDesk, request: Message) -> Message:
    match request:
        case Take(position, count):
            return await desk.take(position, count)
        case Publish(version, path, position):
            await desk.publish(PolicyVersion.parse(version), Path(path), position)
        case Covered(position):
            desk.covered(position)
        case Evaluate(version):
            return await desk.evaluate(PolicyVersion.parse(version))
        case Report(values):
            check_report(values)
            desk.report(values)
        case _:
            raise ContractError(f"The trainer sent {type(request).__name__}, which only the intake says.")
    return Done()


async def _answer_or_refuse(desk: TrainerDesk, request: Message) -> Message:
    try:
        with desk.question():
            return await _answer(desk, request)
    except ContractError as error:
        log.error("the trainer is refused: %s", error)  # noqa: TRY400 - one sentence is enough
        return Refused(str(error))


@contextlib.asynccontextmanager
async def listen(desk: TrainerDesk, path: str) -> AsyncGenerator[None]:
    """Answer trainers at a Unix socket for the time of the block. Raises AddressInUseError."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        log.info("the trainer connected")
        try:
            with desk.connection():
                while (request := await receive(reader)) is not None:
                    writer.write(encode(await _answer_or_refuse(desk, request)))
                    await writer.drain()
        except (ContractError, ConnectionError) as error:
            log.error("the trainer's connection ends: %s", describe(error))  # noqa: TRY400 - one sentence is enough
        finally:
            writer.close()
        log.info("the trainer left")

    await _take_over(path)
    server = await asyncio.start_unix_server(serve, path, limit=1 << 20)
    try:
        yield
    finally:
        server.close()
        await asyncio.to_thread(Path(path).unlink, missing_ok=True)


async def _take_over(path: str) -> None:
    """Remove the socket of a dead intake. Raises AddressInUseError when a living one answers."""
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        await asyncio.to_thread(Path(path).unlink)
        return
    writer.close()
    raise AddressInUseError(f"Another intake serves this run at {path}; stop it, or set run.dir to another directory.")
