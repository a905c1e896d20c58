"""gRPC hands a late event of a closed loop to the next one, which logs it; no test may take it for its own."""

from __future__ import annotations

import logging

import pytest


@pytest.mark.parametrize(
    ("callback", "message", "logged"),
    [
        ("PollerCompletionQueue._handle_events", "Event loop is closed", False),
        ("PollerCompletionQueue._handle_events", "another failure", True),
        ("RolloutService.deliver", "Event loop is closed", True),
    ],
)
def test_only_events_of_closed_loops_are_left_out(callback: str, message: str, logged: bool) -> None:
    logger = logging.getLogger("asyncio")
    failed = RuntimeError(message)
    text = f"Exception in callback {callback}()"
    record = logger.makeRecord(logger.name, logging.ERROR, __file__, 1, text, (), (type(failed), failed, None))
    assert bool(logger.filter(record)) is logged
