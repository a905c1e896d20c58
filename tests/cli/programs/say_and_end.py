"""Ends with a code after a line in its log, and after a report if it has one: --say LINE --code N [--report SENTENCE]."""

import sys

from treegrpo.exit_report import Report, write_report

words = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
print("2026 INFO something before")
print(words["--say"])
if "--report" in words:
    write_report(Report(int(words["--code"]), words["--report"]))
sys.exit(int(words["--code"]))
