"""One server as the engine sees it: is it up, how full is it, which weights does it serve."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np
from prometheus_client import Metric

from services.sampler.engines.sglang.aimd_limit import Pressure
from services.sampler.engines.sglang.api.http_client import Api
from services.sampler.engines.sglang.api.responses import Answer, ForeignVersionError, Load
from services.sampler.engines.sglang.pending_generation import Draft
from services.sampler.engines.sglang.prefill_dedup import Prefills, Turn
from services.sampler.engines.sglang.weight_staging import Staged
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import UnavailableError, WeightsError

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Server:
    """State of one server; the engine's tasks change it, all on one event loop."""

    api: Api
    pressure: Pressure
    up: bool = False
    serves: Staged | None = None
    """None: nobody knows."""
    given: set[PolicyVersion] = field(default_factory=set[PolicyVersion])
    """Versions it was told to serve since the start."""
    space: str = ""
    """Namespace of its prefix cache: the version served last."""
    swapping: bool = False
    load: Load | None = None
    families: Sequence[Metric] = ()
    """What it last said to Prometheus."""
    prefills: Prefills = field(default_factory=Prefills)
    suspect: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by whoever has reason to think that it is gone."""
    asking: set[asyncio.Task[Answer]] = field(default_factory=set[asyncio.Task[Answer]])
    """Requests on their way."""
    aborting: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])
    pauses: int = 0
    """Times it was told to put running requests back for the sake of new weights, since the start."""
    stalled: float = 0.0
    """Seconds in which it generated nothing for the sake of new weights, since the start."""
    taken: int = 0
    """Places that are taken by requests."""
    examine: Callable[[], Awaitable[object]] | None = None
    """Raises a TreeGrpoError if it is not what is needed; None: it was started here, with exactly that."""

    @property
    def has_room(self) -> bool:
        return self.up and not self.swapping and self.taken < self.pressure.limit

    @property
    def fullness(self) -> float:
        return self.taken / self.pressure.limit

    async def ask(self, draft: Draft) -> Answer:
        """Let it go on with ``draft``. Cancelling the call ends the request over there.

        Raises:
            UnavailableError, DeadlineError, ContractError, EngineError: see `Api`; or it was lost meanwhile.
        """
        async with self.prefills.turn(draft.sequence) as turn:
            if not self.up:  # nobody knows which weights it has now
                raise UnavailableError(f"The SGLang server at {self.api.url} was lost before it was asked.")
            rid, pauses = uuid4().hex, self.pauses
            asking = asyncio.create_task(self._generate(turn, draft.request(rid, self.space)), name=f"sglang-{rid}")
            self.asking.add(asking)
            try:
                await asyncio.wait({asking})
                answer = self._result(asking)
            except BaseException:
                asking.cancel()
                self._abort(rid)
                raise
            finally:
                self.asking.discard(asking)
        self.prefills.remember(np.concatenate((draft.sequence, np.array(answer.ids, np.uint32))))
        # A pause puts it back once at most: not while it waits for its turn over there.
        self.pressure.retracted(max(0, answer.retractions - (self.pauses - pauses)))
        return answer

    async def _generate(self, turn: Turn, body: dict[str, Any]) -> Answer:
        started = partial(self.prefills.computed, turn) if turn.awaited else None
        return await self.api.generate(body, started)

    def _result(self, asking: asyncio.Task[Answer]) -> Answer:
        if asking.cancelled():
            raise UnavailableError(f"The SGLang server at {self.api.url} was lost while it computed.")
        try:
            return self._known(asking.result())
        except ForeignVersionError:  # it has to be given ours again
            self.serves = None
            self.suspect.set()
            raise

    def _known(self, answer: Answer) -> Answer:
        """An answer of versions that are ours. Raises ForeignVersionError."""
        for version, _ in answer.versions:
            if version not in self.given:
                raise ForeignVersionError(
                    f"The SGLang server at {self.api.url} sampled with version {version}, which is none of ours; "
                    "a server belongs to one sampler."
                )
        return answer

    def lose(self) -> None:
        """It is gone, or hangs: whoever waits for it learns it now."""
        self.up, self.serves, self.load, self.families = False, None, None, ()
        self.prefills.forget()
        for asking in self.asking:
            asking.cancel()

    async def swap(self, new: Staged) -> None:
        """Serve ``new``; requests that run go on with it.

        Raises:
            WeightsError: it refused; it serves what it served before.
            UnavailableError, DeadlineError, ContractError, EngineError: it failed on the way; what it serves is not known,
                and it stays paused, so that no token of unknown weights bears the name of the old version.
        """
        self.swapping, began = True, time.monotonic()
        self.prefills.forget()
        old, self.serves = self.serves, None
        self.given.add(new.version)
        self.pauses += 1
        try:
            await self.api.pause()
            try:
                await self.api.update(new.version, new.path)
            except WeightsError:
                if old is not None:
                    await self._return_to(old, new.version)
                raise
            await self.api.resume()
            self.serves, self.space = new, str(new.version)
        finally:
            self.swapping = False
            self.stalled += time.monotonic() - began

    async def _return_to(self, old: Staged, refused: PolicyVersion) -> None:
        """Serve ``old`` again. Raises UnavailableError when that is refused, too."""
        log.warning("weights %s were refused; %s are read again", refused, old.version)
        try:
            await self.api.update(old.version, old.path)
        except WeightsError as error:
            raise UnavailableError(f"{error} So were those of version {refused} before.") from error
        await self.api.resume()
        self.serves = old

    def _abort(self, rid: str) -> None:
        """End a request that nobody waits for any more, without waiting for that."""
        if not self.up:
            return
        task = asyncio.create_task(self.api.abort(rid), name=f"sglang-abort-{rid}")
        self.aborting.add(task)
        task.add_done_callback(self.aborting.discard)

    async def close(self) -> None:
        """End what is on its way."""
        for task in (tasks := [*self.asking, *self.aborting]):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def wake(server: Server, served: Staged) -> None:
    """Make a server that answers serve ``served``. Raises a TreeGrpoError if it cannot be used."""
    # Somebody who died in the middle of an update may have left it paused, or with other weights of the same name.
    await server.api.resume()
    await server.api.health()
    if server.examine is None:
        server.given.add(served.version)
        server.serves, server.space = served, str(served.version)
        return
    await server.examine()
    try:
        await server.swap(served)
    except WeightsError as error:
        raise UnavailableError(f"{error} It is left out until it serves version {served.version}.") from error
