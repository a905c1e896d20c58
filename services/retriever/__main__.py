"""``python -m services.retriever [CONFIG.toml] [--section.key value …]``."""

from services.retriever.service import serve_retriever
from treegrpo.config.security import Role
from treegrpo.runtime.entrypoint import run_service
from treegrpo.security.credentials import Credentials

if __name__ == "__main__":
    run_service(lambda config: serve_retriever(config.retriever, Credentials.from_config(config.security, Role.RETRIEVER)))
