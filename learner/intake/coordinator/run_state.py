"""A pause is the operator's word: only another word of theirs ends it.

It outlives the intake, which says "draining" when it is told to stop, and a broker that forgets what it had retained.
"""

from __future__ import annotations

import logging
from pathlib import Path

from treegrpo.errors import describe
from treegrpo.wire.control import ControlPlane, RunState

log = logging.getLogger(__name__)
MARK = "paused"
"""A file of this name in the run's directory."""


async def begin(control: ControlPlane, run_dir: Path) -> None:
    """Set the run state of a run that begins or goes on; a drain is over with the process that drained."""
    await control.wait_retained_state()
    state = control.announced_state
    paused = state is RunState.PAUSED or (state is not RunState.RUNNING and (run_dir / MARK).exists())
    await control.set_state(RunState.PAUSED if paused else RunState.RUNNING)


async def remember(control: ControlPlane, run_dir: Path) -> None:
    """Note pauses and their ends, for ever."""
    while True:
        try:
            match control.announced_state:
                case RunState.PAUSED:
                    (run_dir / MARK).touch()
                case RunState.RUNNING:
                    (run_dir / MARK).unlink(missing_ok=True)
                case _:  # not heard yet, or the end of a process
                    pass
        except OSError as error:  # a full disk ends nobody
            log.warning("the pause of the run could not be noted (%s)", describe(error))
        await control.wait_change()
