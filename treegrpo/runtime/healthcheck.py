"""Health check: requests /health of processes of this container or machine; exit code 0 if all serve.

    python -m treegrpo.runtime.healthcheck https://localhost:9400/health https://localhost:9401/health
    python -m treegrpo.runtime.healthcheck --alive https://localhost:9402/health

With --alive whether it needs no restart: it answers anything at all, or has failed permanently and waits for an operator
(`container.py`).

For health checks, which run every few seconds: the standard library alone, a tenth of a second. Nothing secret is sent and
nothing but the status believed, so a certificate is not asked whose it is.
"""

from __future__ import annotations

import signal
import ssl
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

from treegrpo.errors import describe
from treegrpo.runtime.container import failure_marker

PROBE_SECONDS = 3.0
"""For one URL, from connecting to the end of the answer's head."""
ALIVE = "--alive"


def probe_failure(url: str, *, alive: bool = False, seconds: float = PROBE_SECONDS) -> str:
    """Why the process at ``url`` does not serve, or is not ``alive``; empty if it does."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with _deadline(seconds), build_opener(ProxyHandler({}), HTTPSHandler(context=context)).open(url, timeout=seconds):
            return ""
    except HTTPError as error:
        with error:
            return "" if alive else f"{url}: {describe(error)}"
    except (OSError, HTTPException, ValueError) as error:
        return f"{url}: {describe(error)}"


@contextmanager
def _deadline(seconds: float) -> Generator[None]:
    """Raise TimeoutError in the block after ``seconds``: a socket's own time-out is for each read."""

    def expired(_number: int, _frame: object) -> None:
        raise TimeoutError(f"no answer within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: Sequence[str]) -> int:
    """Print the processes that do not serve; returns the exit code."""
    alive = ALIVE in arguments
    if failure_marker().exists():
        print(f"ended for good: {failure_marker().read_text(encoding='utf-8').strip()}")
        return int(not alive)
    urls = [word for word in arguments if word != ALIVE]
    complaints = [said for url in urls if (said := probe_failure(url, alive=alive))]
    print("\n".join(complaints) or "ok")
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
