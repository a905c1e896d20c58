"""``python -m learner.intake [CONFIG.toml] [--section.key value …]``."""

import os

from learner.intake.service import run
from treegrpo.observability.native_log import filter_native_log
from treegrpo.runtime.entrypoint import run_service

if __name__ == "__main__":
    if os.environ.get("GRPC_VERBOSITY") != "NONE":  # somebody wants to see it
        filter_native_log()
    run_service(run)
