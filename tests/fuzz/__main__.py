"""`make fuzz`: all 100,000 cases; a table, and one JSON line at the end.

python -m tests.fuzz [--share 1.0] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.case_runner import CaseCounts
from tests.fuzz.fuzz_runs import fuzz_pure, fuzz_servers
from treegrpo.net.limits import ANSWER_BYTES

GROWTH_MIB = 32.0
"""Of one server over all its cases: more is a leak, less is how an allocator works."""
PEAK_MIB = 4 * ANSWER_BYTES / (1 << 20)
"""What one case may need: the largest answer that is read as bytes, as text and as objects."""
SHOWN = 3000
"""Letters of a crash."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--share", type=float, default=1.0, help="of the 100,000 cases")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    counts, began = list[CaseCounts](), time.monotonic()
    heads = (("cases", 7), ("seconds", 8), ("slowest s", 9), ("crashes", 7), ("hangs", 6), ("stalls", 6), ("growth MiB", 10))
    print(f"{'target':10} {' '.join(f'{head:>{width}}' for head, width in heads)} {'peak MiB':>8}")

    def print_counts(count: CaseCounts) -> None:
        counts.append(count)
        row = f"{count.name:10} {count.cases:7} {count.seconds:8.1f} {count.slowest:9.3f}"
        print(
            f"{row} {len(count.crashes):7} {count.hangs:6} {count.stalls:6} {count.growth_mib:10.1f} {count.peak_mib:8.1f}",
            flush=True,
        )
        for crash in count.crashes:
            print(crash[-SHOWN:])

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        fuzz_servers(options.share, options.seed, Path(folder), print_counts)
    fuzz_pure(options.share, options.seed, print_counts)
    summary = {
        "cases": sum(count.cases for count in counts),
        "crashes": sum(len(count.crashes) for count in counts),
        "hangs": sum(count.hangs for count in counts),
        "stalls": sum(count.stalls for count in counts),
        "peak_mib": round(max(count.peak_mib for count in counts), 1),
        "growth_mib": round(max(count.growth_mib for count in counts), 1),
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(summary))
    wrong = summary["crashes"] or summary["hangs"] or summary["stalls"]
    return int(wrong > 0 or summary["growth_mib"] > GROWTH_MIB or summary["peak_mib"] > PEAK_MIB)


if __name__ == "__main__":
    sys.exit(main())
