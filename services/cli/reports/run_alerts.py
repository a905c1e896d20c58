"""What is wrong in a run and not its end: a line when it begins, and one when it is over.

On a full disk there is room neither for a line of a log nor for one of the progress file, so the learner says it on its
/metrics pages. A checkpoint that was found damaged says it by its name.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from services.cli.processes.part_supervisor import Say
from services.cli.reports.metrics_client import Scrape, pages
from treegrpo.config.schema import Config
from treegrpo.net.address import join_address, split_address
from treegrpo.observability.metrics import MISMATCH_LIMIT
from treegrpo.security.credentials import Credentials
from treegrpo.storage.manifest import DAMAGED

LOOK_SECONDS = 1.0
JOURNAL_BLOCKED = "treegrpo_journal_blocked"
JOURNAL_SHORT = "treegrpo_journal_short"
TRAINER_BLOCKED = "treegrpo_trainer_blocked"
MISMATCH = "treegrpo_kl_mismatch_lag0"


class Troubles:
    def __init__(self, config: Config, access: Credentials, say: Say) -> None:
        """What is there already is known, and not said; ``say`` prints a line for the user."""
        self._run_dir, self._access, self._say = config.run.dir, access, say
        host, port = split_address(config.learner.metrics, "learner.metrics")
        self._addresses = (join_address(host, port), join_address(host, port + 1)) if port else ()
        self._damaged = set(self._set_aside())
        self._now: set[str] = set()
        self.trainer_blocked = asyncio.Event()
        """Set while the disk refuses what the trainer has to write."""

    async def follow(self) -> None:
        """Look for ever."""
        async with pages(self._access) as read:
            while True:
                self.look({name: value for address in self._addresses for name, value in (await read(address)).items()})
                await asyncio.sleep(LOOK_SECONDS)

    def look(self, scrape: Scrape) -> None:
        """Say what is new. What ``scrape`` lacks is as it was: its process does not answer now."""
        for folder in self._set_aside():
            if folder not in self._damaged:
                self._damaged.add(folder)
                self._say(f"A damaged checkpoint is set aside as {folder}; the run goes on from the one before.")
        for name, limit, begins, over in self._sentences():
            there = scrape[name] > limit if name in scrape else name in self._now
            if there != (name in self._now):
                self._say(begins if there else over)
                (self._now.add if there else self._now.remove)(name)
        (self.trainer_blocked.set if TRAINER_BLOCKED in self._now else self.trainer_blocked.clear)()

    def _sentences(self) -> tuple[tuple[str, float, str, str], ...]:
        """For each metric what it is above in trouble, and what to say at the beginning and at the end."""
        disk = f"The disk of {self._run_dir}"
        apart = f"Sampler and trainer compute two policies: more than {MISMATCH_LIMIT} nats per token apart at version lag 0"
        return (
            (
                JOURNAL_SHORT,
                0,
                f"{disk} is full: what is under way comes in, but nothing new is granted; make room.",
                f"{disk} has room again: leases are granted.",
            ),
            (
                JOURNAL_BLOCKED,
                0,
                f"{disk} refuses the journal: nothing is acknowledged or granted until it takes it; make room, or mend it.",
                f"{disk} takes the journal again.",
            ),
            (
                TRAINER_BLOCKED,
                0,
                f"{disk} refuses what the trainer has to write: it waits; make room, or mend it.",
                f"{disk} has taken what the trainer had to write.",
            ),
            (
                MISMATCH,
                MISMATCH_LIMIT,
                f"{apart} ({MISMATCH}); see docs/operations.md, MismatchAtLagZero.",
                "Sampler and trainer agree again about what the policy is.",
            ),
        )

    def _set_aside(self) -> list[Path]:
        return sorted((self._run_dir / "checkpoints").glob(f"*{DAMAGED}"))
