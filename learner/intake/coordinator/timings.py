"""The time limits of the coordinator, in one object that is passed in: tests pass shorter ones."""

from __future__ import annotations

from dataclasses import dataclass

from learner.intake.leases.staleness import FINISHING_SECONDS
from treegrpo.core.lease import HEARTBEAT_SECONDS, SILENCE_SECONDS

WILL_GRACE_SECONDS = 2 * HEARTBEAT_SECONDS
SILENCE_CHECK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class CoordinatorTimings:
    silence_seconds: float = SILENCE_SECONDS
    """A sampler that has sent nothing for so long is gone, and its leases are lost."""
    will_grace_seconds: float = WILL_GRACE_SECONDS
    """A sampler's last will counts once it has sent nothing for so long."""
    silence_check_seconds: float = SILENCE_CHECK_SECONDS
    """From one check for silent samplers to the next."""
    finishing_seconds: float = FINISHING_SECONDS
    """A sampler may finish the branches that it has begun for so long while a whole batch waits for them."""
