"""The intake, the part of the learner that samplers talk to: an asyncio process without torch."""

import os

from treegrpo.runtime.process_environment import DEFAULTS

for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)
"""Before gRPC is imported: it reads the variable then."""
