"""Asks a process of this container or machine whether it serves: ``python -m treegrpo.probe URL …``; exit code 0 if all do.

    python -m treegrpo.probe https://localhost:9400/health https://localhost:9401/health

For health checks, which run every few seconds: the standard library alone, a tenth of a second. Nothing secret is sent and
nothing but the status believed, so a certificate is not asked whose it is.
"""

from __future__ import annotations

import ssl
import sys
from collections.abc import Sequence
from http.client import HTTPException
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

from treegrpo.errors import describe

PROBE_SECONDS = 3.0


def complaint(url: str) -> str:
    """Why what is at ``url`` cannot be said to serve; empty if it does."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with build_opener(ProxyHandler({}), HTTPSHandler(context=context)).open(url, timeout=PROBE_SECONDS):
            return ""
    except (OSError, HTTPException, ValueError) as error:
        return f"{url}: {describe(error)}"


def main(urls: Sequence[str]) -> int:
    """Print what does not serve; returns the exit code."""
    complaints = [said for url in urls if (said := complaint(url))]
    print("\n".join(complaints) or "ok")
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
