"""For all tests: how long an example takes says nothing on a busy machine, and how pytest was started nothing of a program."""

from __future__ import annotations

import signal

from hypothesis import settings

settings.register_profile("here", deadline=None)
settings.load_profile("here")


def stay(_number: int, _frame: object) -> None:
    """What SIGHUP does to pytest then: nothing, as before."""


if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup, which what the tests start would take over
    signal.signal(signal.SIGHUP, stay)
