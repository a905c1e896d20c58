"""What starts and watches processes: /health, the probe that asks it, and logs that machines can read."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from treegrpo.observability.metrics import RetrieverMetrics, serve_metrics
from treegrpo.runtime import healthcheck
from treegrpo.security.credentials import OPEN


@pytest.fixture
def process() -> tuple[RetrieverMetrics, str]:
    """A process's metrics, and the address of its health."""
    metrics = RetrieverMetrics()
    port = serve_metrics(metrics, "127.0.0.1:0", "learner.metrics", OPEN)
    return metrics, f"http://127.0.0.1:{port}/health"


def test_health_is_what_the_gauge_says(process: tuple[RetrieverMetrics, str]) -> None:
    metrics, url = process
    assert "503" in healthcheck.probe_failure(url)
    metrics.serving.set(1)
    assert healthcheck.probe_failure(url) == ""
    metrics.serving.set(0)
    assert healthcheck.main([url]) == 1


def test_one_that_does_not_serve_fails_the_probe_of_several(process: tuple[RetrieverMetrics, str]) -> None:
    metrics, url = process
    metrics.serving.set(1)
    assert healthcheck.main([url, url]) == 0
    assert healthcheck.main([url, "http://127.0.0.1:9/health"]) == 1


def test_the_probe_has_a_deadline_for_the_whole_answer() -> None:
    def drip(listener: socket.socket) -> None:
        with suppress(OSError), listener.accept()[0] as peer:
            while True:
                peer.sendall(b"H")
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        began = time.monotonic()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/health"
        assert "no answer within 0.3 s" in healthcheck.probe_failure(url, seconds=0.3)
    assert time.monotonic() - began < 5.0


def last_line(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_the_sentence_a_process_ends_with_is_json_where_logs_are() -> None:
    wrong = ("-m", "services.retriever", "--retriever.listen", "127.0.0.1:0", "--retriever.corpus", "/nowhere.jsonl")
    row = json.loads(last_line(*wrong, LOG_FORMAT="json"))
    assert row["level"] == "CRITICAL"
    assert "/nowhere.jsonl" in row["message"]
    assert last_line(*wrong).startswith("error: ")


def test_a_crash_is_one_line_too() -> None:
    row = json.loads(
        last_line("-c", "from treegrpo.observability import log_setup; log_setup.log_to_stderr(); 1 / 0", LOG_FORMAT="json")
    )
    assert row["message"] == "the process ends: division by zero"
    assert "ZeroDivisionError" in row["exception"]
