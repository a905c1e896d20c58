"""``python -m learner.intake [CONFIG.toml] [--section.key value …]``."""

import os

from learner.intake.service import run_intake
from treegrpo.observability.native_log import filter_native_log
from treegrpo.runtime.entrypoint import run_service

if __name__ == "__main__":
    if os.environ.get("GRPC_VERBOSITY") != "NONE":  # an operator has asked for the native log
        filter_native_log()
    run_service(run_intake)
