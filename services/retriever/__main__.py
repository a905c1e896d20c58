"""``python -m services.retriever [CONFIG.toml] [--section.key value …]``."""

from services.retriever.service import serve
from treegrpo.access import Access
from treegrpo.edge import run_service
from treegrpo.security import Role

if __name__ == "__main__":
    run_service(lambda config: serve(config.retriever, Access.of(config.security, Role.RETRIEVER)))
