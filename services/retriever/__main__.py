"""``python -m services.retriever [CONFIG.toml] [--section.key value …]``."""

from services.retriever.service import serve
from treegrpo.edge import run_service

if __name__ == "__main__":
    run_service(lambda config: serve(config.retriever))
