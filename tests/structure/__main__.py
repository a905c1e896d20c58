"""Measures the structure of a checkout, or of two side by side:

    python -m tests.structure [ROOT] [--before ROOT] [--no-trace] [--write docs/structure.md]

With the tracing it runs some steps of GeoHop in each checkout, with the Python that runs this; two minutes each.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.structure.report import Measured, measure, page


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.structure")
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[2], help="the checkout to measure")
    parser.add_argument("--before", type=Path, help="another one, to compare it with")
    parser.add_argument("--no-trace", action="store_true", help="measure the source alone, without running it")
    parser.add_argument("--write", type=Path, help="write the page there instead of printing it")
    options = parser.parse_args()
    measured: list[Measured] = []
    for root in (options.before, options.root):
        if root is not None:
            measured.append(measure(root.resolve(), trace=not options.no_trace))
            print(f"measured {root}", file=sys.stderr)
    text = page(measured)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
