"""A service that does nothing until SIGTERM, then exits: [--report SENTENCE --code N]."""

import signal
import sys

from treegrpo.runtime.exit_report import ExitReport, write_exit_report

words = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))


def end(_number: int, _frame: object) -> None:
    code = int(words.get("--code", "0"))
    if "--report" in words:
        write_exit_report(ExitReport(code, words["--report"]))
    sys.exit(code)


signal.signal(signal.SIGTERM, end)
print("waiting", flush=True)
signal.pause()
