"""The run state across restarts: a pause ends only when an operator resumes the run.

A pause outlives the intake, which sets "draining" when it is stopped, and a broker that loses its retained messages.
"""

from __future__ import annotations

import logging
from pathlib import Path

from treegrpo.errors import describe
from treegrpo.wire.control import ControlPlane, RunState

log = logging.getLogger(__name__)
PAUSED_FILE = "paused"
"""A file of this name in the run's directory."""


async def restore_run_state(control: ControlPlane, run_dir: Path) -> None:
    """Set the run state at the start of the intake: paused if it was; a drain ends with the process that drained."""
    await control.wait_retained_state()
    state = control.announced_state
    paused = state is RunState.PAUSED or (state is not RunState.RUNNING and (run_dir / PAUSED_FILE).exists())
    await control.set_state(RunState.PAUSED if paused else RunState.RUNNING)


async def persist_pause_forever(control: ControlPlane, run_dir: Path) -> None:
    """Record the beginning and end of each pause in the run's directory."""
    while True:
        try:
            match control.announced_state:
                case RunState.PAUSED:
                    (run_dir / PAUSED_FILE).touch()
                case RunState.RUNNING:
                    (run_dir / PAUSED_FILE).unlink(missing_ok=True)
                case _:  # not known yet, or the end of a process
                    pass
        except OSError as error:  # a full disk does not end the run
            log.warning("the pause of the run could not be recorded (%s)", describe(error))
        await control.wait_change()
