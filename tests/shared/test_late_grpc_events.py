"""gRPC hands a late event of a closed loop to the next one, which logs it; no test may take it for its own."""

from __future__ import annotations

import asyncio

import pytest


async def fail_in_a_callback(callback: str, message: str) -> None:
    """Report what an event loop reports when ``callback`` raises."""
    context = {"message": f"Exception in callback {callback}()", "exception": RuntimeError(message)}
    asyncio.get_running_loop().call_exception_handler(context)


@pytest.mark.parametrize(
    ("callback", "message", "logged"),
    [
        ("PollerCompletionQueue._handle_events", "Event loop is closed", 0),
        ("PollerCompletionQueue._handle_events", "another failure", 1),
        ("RolloutService.deliver", "Event loop is closed", 1),
    ],
)
async def test_only_events_of_closed_loops_are_left_out(
    caplog: pytest.LogCaptureFixture, callback: str, message: str, logged: int
) -> None:
    await fail_in_a_callback(callback, message)
    assert len(caplog.records) == logged
