from __future__ import annotations

from treegrpo.timing.backoff import pause


def test_the_last_pause_is_repeated() -> None:
    assert [pause((0.1, 1.0, 5.0), failures) for failures in range(5)] == [0.1, 1.0, 5.0, 5.0, 5.0]
