"""Prints what pyproject.toml depends on, a line each, but for the packages named: ``packages.py pyproject.toml [NAME …]``."""

import re
import sys
import tomllib
from pathlib import Path

dependencies = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]["dependencies"]
known = {re.split(r"[\[<>=~!;]", line)[0]: line for line in dependencies}
if strangers := set(sys.argv[2:]) - set(known):
    sys.exit(f"error: {', '.join(sorted(strangers))}: no dependency in {sys.argv[1]}; take it out of the Dockerfile.")
print("\n".join(line for name, line in known.items() if name not in sys.argv[2:]))
