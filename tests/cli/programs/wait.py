"""Waits until it is told to end; a service that does nothing."""

import signal
import sys

signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
print("waiting", flush=True)
signal.pause()
