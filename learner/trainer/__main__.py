"""``python -m learner.trainer [CONFIG.toml] [--section.key value …]``; of several ranks with

    torchrun --nproc-per-node=2 -m learner.trainer CONFIG.toml

Exit code 0 at the end of the run or after a drain.
"""

from __future__ import annotations

import sys

from learner.trainer.loop import main
from learner.trainer.ranks import run

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
