"""Prints a log line and exits with a code, after an exit report if there is one.

--say LINE --code N [--report SENTENCE] [--linger yes]: with the last it reports and then waits for a signal that kills it.
"""

import signal
import sys

from treegrpo.runtime.exit_report import ExitReport, write_exit_report

words = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
print("2026 INFO something before")
if "--report" in words:
    write_exit_report(ExitReport(int(words["--code"]), words["--report"]))
print(words["--say"], flush=True)
if "--linger" in words:
    signal.pause()
sys.exit(int(words["--code"]))
