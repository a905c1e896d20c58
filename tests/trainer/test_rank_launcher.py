"""Which process of how many: what torchrun says counts, what other launchers leave behind does not."""

from __future__ import annotations

import os
import re
import socket

import pytest

from learner.trainer.distributed.ranks import TORCHRUN, started_by_torchrun
from tests.ports import free_address
from treegrpo.errors import ConfigError
from treegrpo.runtime.process_environment import is_rank_variable


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE = '2', and it was not torchrun"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE = 'many', and it was not torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "x", TORCHRUN: "1"}, "RANK = 'x'"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", TORCHRUN: "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"},
            "a torchrun that has ended",
        ),
    ],
)
def test_what_a_launcher_left_behind_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str) -> None:
    alone(monkeypatch, {"MASTER_PORT": free_address().rpartition(":")[2], **variables})
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        started_by_torchrun()
    assert "unset RANK and WORLD_SIZE" in str(caught.value)


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "elsewhere"}])
def test_alone_in_a_job_of_one_is_alone(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    alone(monkeypatch, variables)
    assert started_by_torchrun() is False


def test_a_rank_of_torchrun_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as store:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.getsockname()[1]), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        alone(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", TORCHRUN: "x", **place})
        assert started_by_torchrun() is True


def alone(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """The environment of a launcher: ``variables``, and nothing that this test was started with."""
    for name in [name for name in os.environ if is_rank_variable(name)]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
