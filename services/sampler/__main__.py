"""``python -m services.sampler [CONFIG.toml] [--section.key value …]``."""

from services.sampler.service import run_sampler
from treegrpo.runtime.entrypoint import run_service

if __name__ == "__main__":
    run_service(run_sampler)
