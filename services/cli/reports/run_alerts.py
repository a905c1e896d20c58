"""Alerts about a run that continues: one line when a problem begins, and one when it is over.

A full disk takes neither log lines nor progress records, so the learner reports it on its /metrics pages. A checkpoint that
was found damaged is recognised by its name.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from services.cli.processes.program import PrintLine
from services.cli.reports.metrics_client import MetricSamples, open_metrics_client
from treegrpo.config.schema import Config
from treegrpo.net.address import join_address, split_address
from treegrpo.observability.metrics import MISMATCH_LIMIT
from treegrpo.security.credentials import Credentials
from treegrpo.storage.manifest import DAMAGED

POLL_SECONDS = 1.0
JOURNAL_BLOCKED = "treegrpo_journal_blocked"
JOURNAL_SHORT = "treegrpo_journal_short"
TRAINER_BLOCKED = "treegrpo_trainer_blocked"
MISMATCH = "treegrpo_kl_mismatch_lag0"


class RunAlerts:
    """Prints the alerts of one run."""

    def __init__(self, config: Config, access: Credentials, print_line: PrintLine) -> None:
        """Damaged checkpoints that exist already are not reported; ``print_line`` prints a line for the user."""
        self._run_dir, self._access, self._print_line = config.run.dir, access, print_line
        host, port = split_address(config.learner.metrics, "learner.metrics")
        self._addresses = (join_address(host, port), join_address(host, port + 1)) if port else ()
        self._reported = set(self._damaged_checkpoints())
        self._active: set[str] = set()
        self.trainer_blocked = asyncio.Event()
        """Set while the disk refuses what the trainer has to write."""

    async def follow_metrics(self) -> None:
        """Poll the metrics pages for ever."""
        async with open_metrics_client(self._access) as read:
            while True:
                self.update_alerts({name: value for address in self._addresses for name, value in (await read(address)).items()})
                await asyncio.sleep(POLL_SECONDS)

    def update_alerts(self, samples: MetricSamples) -> None:
        """Print what is new. An alert whose metric is missing stays as it was: its process does not answer now."""
        for folder in self._damaged_checkpoints():
            if folder not in self._reported:
                self._reported.add(folder)
                self._print_line(f"A damaged checkpoint was renamed to {folder}.")
        for name, limit, begins, over in self._sentences():
            active = samples[name] > limit if name in samples else name in self._active
            if active != (name in self._active):
                self._print_line(begins if active else over)
                (self._active.add if active else self._active.remove)(name)
        (self.trainer_blocked.set if TRAINER_BLOCKED in self._active else self.trainer_blocked.clear)()

    def _sentences(self) -> tuple[tuple[str, float, str, str], ...]:
        """For each metric its threshold, and the lines for the beginning and the end of the alert."""
        disk = f"The disk of {self._run_dir}"
        apart = f"Sampler and trainer compute two policies: more than {MISMATCH_LIMIT} nats per token apart at version lag 0"
        return (
            (
                JOURNAL_SHORT,
                0,
                f"{disk} is full: current leases finish, but no lease is granted; free space on it.",
                f"{disk} has room again: leases are granted.",
            ),
            (
                JOURNAL_BLOCKED,
                0,
                f"{disk} refuses the journal: nothing is acknowledged or granted meanwhile; free space on it, or repair it.",
                f"{disk} takes the journal again.",
            ),
            (
                TRAINER_BLOCKED,
                0,
                f"{disk} refuses the trainer's writes: the trainer waits; free space on it, or repair it.",
                f"{disk} has taken what the trainer had to write.",
            ),
            (
                MISMATCH,
                MISMATCH_LIMIT,
                f"{apart} ({MISMATCH}); see docs/operations.md, MismatchAtLagZero.",
                "Sampler and trainer agree again about what the policy is.",
            ),
        )

    def _damaged_checkpoints(self) -> list[Path]:
        return sorted((self._run_dir / "checkpoints").glob(f"*{DAMAGED}"))
