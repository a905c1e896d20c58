"""``python -m learner.intake [CONFIG.toml] [--section.key value …]``."""

from learner.intake.service import run
from treegrpo.edge import run_service

if __name__ == "__main__":
    run_service(run)
