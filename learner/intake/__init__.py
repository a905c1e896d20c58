"""The learner's face: an asyncio process without torch."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
"""Before gRPC is imported: else it writes a line for each handshake that fails, and any stranger could fill the log."""
