"""The entry point of a container; docs/adr/0005-restarts.md says why there is one.

    python -m treegrpo.runtime.container [--job] PROGRAM [ARGUMENT …]

    the program ends with 2, a permanent error ─► its sentence is logged, and this waits to be stopped
    in any other way ───────────────────────────► this ends alike, and whoever runs the container starts it again

Neither compose nor a Deployment of Kubernetes can leave a container alone because of its exit code. While this waits the
health check fails with the sentence, and a liveness check passes (`healthcheck.py`). A Job of Kubernetes can, so with --job
nothing is waited for; but for a Job code 0 is the end of its work, so a program that was told to stop ends with 128 + the
signal's number.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from treegrpo.observability import log_setup
from treegrpo.runtime.exit_report import FAILED, ExitReports, decisive_report
from treegrpo.runtime.stop_signals import stop_signals

log = logging.getLogger(__name__)
JOB = "--job"
FAILURE_MARKER = "treegrpo-ended"
"""A file in the directory for temporary files: the sentence of a program that ended with a permanent error."""
SIGNALLED = 128


def failure_marker() -> Path:
    return Path(tempfile.gettempdir()) / FAILURE_MARKER


def main(arguments: Sequence[str]) -> int:
    """Run a program; returns its exit code, after FAILED only when told to stop."""
    log_setup.log_to_stderr()
    failure_marker().unlink(missing_ok=True)  # a directory for temporary files may outlive the container
    job = list(arguments[:1]) == [JOB]
    program = arguments[job:]
    stopping, signals, reports = threading.Event(), list[int](), ExitReports()
    child = subprocess.Popen(program, env={**os.environ, **reports.environment})  # noqa: S603

    def pass_on(number: int, _frame: object) -> None:
        signals.append(number)
        stopping.set()
        child.send_signal(number)  # nothing happens once it has ended

    for number in stop_signals():
        signal.signal(number, pass_on)
    code = child.wait()
    if job and code == 0 and signals:
        return SIGNALLED + signals[0]
    if code == FAILED and not job and not signals:
        report = decisive_report(reports.read())
        sentence = report.sentence if report else "it gave no reason; see the lines above"
        with suppress(OSError):  # a disk that is full: then the log alone has it
            failure_marker().write_text(sentence + "\n", encoding="utf-8")
        log.critical(
            "%s ended with a permanent error, so this container waits; fix it and restart the container: %s",
            " ".join(program),
            sentence,
        )
        stopping.wait()
    return code if code >= 0 else SIGNALLED - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
