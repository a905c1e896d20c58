"""``python -m learner.trainer [CONFIG.toml] [--section.key value …]``; exit code 0 at the end of the run or after a drain."""

from __future__ import annotations

import logging
import sys

from learner.trainer.loop import main
from treegrpo.edge import complain
from treegrpo.errors import TreeGrpoError
from treegrpo.settings import from_arguments

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        main(from_arguments(sys.argv[1:]))
    except TreeGrpoError as error:
        sys.exit(complain(error))
