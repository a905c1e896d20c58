"""State of one SGLang server: whether it is up, its free slots, the weights it serves; and requests to it."""

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

from services.sampler.engines.sglang.server.aimd_limit import AimdLimit
from services.sampler.engines.sglang.server.http_client import SGLangClient
from services.sampler.engines.sglang.server.pending_generation import PendingGeneration
from services.sampler.engines.sglang.server.prefill_dedup import Prefill, PrefillDedup
from services.sampler.engines.sglang.server.responses import ForeignVersionError, GenerateResponse, ServerLoad
from services.sampler.engines.sglang.server.weight_staging import StagedVersion
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import UnavailableError, WeightsError

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class SGLangServer:
    """State of one server; the engine's tasks change it, all on one event loop."""

    client: SGLangClient
    request_limit: AimdLimit
    up: bool = False
    serving: StagedVersion | None = None
    """None: not known."""
    sent_versions: set[PolicyVersion] = field(default_factory=set[PolicyVersion])
    """Versions sent to it since the start."""
    cache_namespace: str = ""
    """Namespace of its prefix cache: the version served last."""
    swapping: bool = False
    load: ServerLoad | None = None
    metrics: Sequence[Metric] = ()
    """The metrics it returned last."""
    dedup: PrefillDedup = field(default_factory=PrefillDedup)
    check_requested: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a request failed in a way that suggests that the server is lost."""
    requests: set[asyncio.Task[GenerateResponse]] = field(default_factory=set[asyncio.Task[GenerateResponse]])
    """Requests in flight."""
    aborts: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])
    pauses: int = 0
    """Times running requests were retracted on it for a weight update, since the start."""
    stalled: float = 0.0
    """Seconds in which it generated nothing because of weight updates, since the start."""
    slots_taken: int = 0
    """Requests that hold a slot."""
    check_usable: Callable[[], Awaitable[object]] | None = None
    """Raises a TreeGrpoError if the server does not meet the requirements; None: it was started here, to meet them."""

    @property
    def has_free_slot(self) -> bool:
        return self.up and not self.swapping and self.slots_taken < self.request_limit.current

    @property
    def slot_usage(self) -> float:
        return self.slots_taken / self.request_limit.current

    async def continue_generation(self, pending: PendingGeneration) -> GenerateResponse:
        """Have the server sample more of ``pending``. Cancelling the call aborts the request on the server.

        Raises:
            UnavailableError, DeadlineError, ContractError, EngineError: see `SGLangClient`; or the server was lost meanwhile.
        """
        async with self.dedup.reserve_prefill(pending.sequence) as prefill:
            if not self.up:  # which weights it has now is not known
                raise UnavailableError(f"The SGLang server at {self.client.url} was lost before the request was sent.")
            rid, pauses = uuid4().hex, self.pauses
            body = pending.request_body(rid, self.cache_namespace)
            request = asyncio.create_task(self._generate(prefill, body), name=f"sglang-{rid}")
            self.requests.add(request)
            try:
                await asyncio.wait({request})
                response = self._result(request)
            except BaseException:
                request.cancel()
                self._abort(rid)
                raise
            finally:
                self.requests.discard(request)
        self.dedup.record_computed(np.concatenate((pending.sequence, np.array(response.ids, np.uint32))))
        # A pause retracts a request once at most: not while it waits in the server's queue.
        self.request_limit.count_retractions(max(0, response.retractions - (self.pauses - pauses)))
        return response

    async def _generate(self, prefill: Prefill, body: dict[str, Any]) -> GenerateResponse:
        on_first_token = partial(self.dedup.mark_computed, prefill) if prefill.awaited else None
        return await self.client.generate(body, on_first_token)

    def _result(self, request: asyncio.Task[GenerateResponse]) -> GenerateResponse:
        if request.cancelled():
            raise UnavailableError(f"The SGLang server at {self.client.url} was lost while it computed.")
        try:
            return self._check_versions(request.result())
        except ForeignVersionError:  # it has to get our weights again
            self.serving = None
            self.check_requested.set()
            raise

    def _check_versions(self, response: GenerateResponse) -> GenerateResponse:
        """The response, if only versions sent by this engine sampled it. Raises ForeignVersionError."""
        for version, _ in response.versions:
            if version not in self.sent_versions:
                raise ForeignVersionError(
                    f"The SGLang server at {self.client.url} sampled with version {version}, which this sampler did not send; "
                    "a server belongs to one sampler."
                )
        return response

    def mark_lost(self) -> None:
        """Note that the server is lost: requests in flight fail at once."""
        self.up, self.serving, self.load, self.metrics = False, None, None, ()
        self.dedup.clear_computed()
        for request in self.requests:
            request.cancel()

    async def swap_weights(self, new: StagedVersion) -> None:
        """Serve ``new``; running requests go on with it.

        Raises:
            WeightsError: the server refused; it serves what it served before.
            UnavailableError, DeadlineError, ContractError, EngineError: the update failed half-way; what it serves is not
                known, and it stays paused, so that no token of unknown weights bears the name of the old version.
        """
        self.swapping, began = True, time.monotonic()
        self.dedup.clear_computed()
        old, self.serving = self.serving, None
        self.sent_versions.add(new.version)
        self.pauses += 1
        try:
            await self.client.pause_generation()
            try:
                await self.client.update_weights(new.version, new.path)
            except WeightsError:
                if old is not None:
                    await self._roll_back(old, new.version)
                raise
            await self.client.resume_generation()
            self.serving, self.cache_namespace = new, str(new.version)
        finally:
            self.swapping = False
            self.stalled += time.monotonic() - began

    async def _roll_back(self, old: StagedVersion, refused: PolicyVersion) -> None:
        """Serve ``old`` again. Raises UnavailableError when that is refused, too."""
        log.warning("the SGLang server refused weights %s; it reads %s again", refused, old.version)
        try:
            await self.client.update_weights(old.version, old.path)
        except WeightsError as error:
            raise UnavailableError(f"{error} So were those of version {refused} before.") from error
        await self.client.resume_generation()
        self.serving = old

    def _abort(self, rid: str) -> None:
        """Abort a request on the server, in a task of its own."""
        if not self.up:
            return
        task = asyncio.create_task(self.client.abort_request(rid), name=f"sglang-abort-{rid}")
        self.aborts.add(task)
        task.add_done_callback(self.aborts.discard)

    async def cancel_requests(self) -> None:
        """Cancel all requests and aborts in flight."""
        for task in (tasks := [*self.requests, *self.aborts]):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def bring_up_server(server: SGLangServer, served: StagedVersion) -> None:
    """Make a server that answers serve ``served``. Raises a TreeGrpoError if it cannot be used."""
    # A sampler that died in the middle of an update may have left it paused, or with other weights of the same name.
    await server.client.resume_generation()
    await server.client.check_health()
    if server.check_usable is None:
        server.sent_versions.add(served.version)
        server.serving, server.cache_namespace = served, str(served.version)
        return
    await server.check_usable()
    try:
        await server.swap_weights(served)
    except WeightsError as error:
        raise UnavailableError(f"{error} It is left out until it serves version {served.version}.") from error
