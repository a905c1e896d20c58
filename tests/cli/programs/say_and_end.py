"""Says its sentence and ends with a code: the flags --say SENTENCE and --code N."""

import sys

words = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
print("2026 INFO something before")
print(words["--say"])
sys.exit(int(words["--code"]))
