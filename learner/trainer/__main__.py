"""``python -m learner.trainer [CONFIG.toml] [--section.key value …]``; of `train.processes` ranks, or of as many as in

    torchrun --nproc-per-node=2 -m learner.trainer CONFIG.toml

Exit code 0 at the end of the run or after a drain; of `train.processes` ranks that a signal told to drain, 128 + its number.
"""

from __future__ import annotations

import sys

from learner.trainer.distributed.rank_launcher import run
from learner.trainer.loop import main

if __name__ == "__main__":
    sys.exit(run(main, "learner.trainer"))
