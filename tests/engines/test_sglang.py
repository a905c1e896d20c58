"""What of the SGLang adapter needs no server: routing, pressure, answers, drafts, staged versions, command lines."""

from __future__ import annotations

import asyncio
import copy
import os
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.sampler.engines.base import Sampling
from services.sampler.engines.sglang.answers import Answer, read_answer, read_load
from services.sampler.engines.sglang.child import Child
from services.sampler.engines.sglang.command import CPU, Installed, Launch, check_installed, find, own_flags
from services.sampler.engines.sglang.draft import Draft
from services.sampler.engines.sglang.prefill import Prefills
from services.sampler.engines.sglang.pressure import HIGH, LOW, Pressure
from services.sampler.engines.sglang.routing import BLOCK, Router
from services.sampler.engines.sglang.stage import Stage
from services.sampler.engines.stopping import StopStrings
from services.sampler.tokenizer import Tokenizer
from tests.engines import builders
from treegrpo.errors import ConfigError, ContractError, EngineError, WeightsError
from treegrpo.step import PolicyVersion, TokenIds, VersionSpan

FIRST, SECOND = PolicyVersion(0, 0), PolicyVersion(0, 1)


# ---- routing


def test_a_prefix_goes_where_the_longest_part_of_it_went() -> None:
    router = Router[str]()
    tree, other = builders.prompt(0, 10 * BLOCK), builders.prompt(1, 10 * BLOCK)
    router.remember(tree, "a")
    router.remember(other, "b")
    equal = {"a": 0.5, "b": 0.5}
    assert router.choose(np.concatenate((tree, other[:40])), equal) == "a"
    assert router.choose(np.concatenate((other[: 5 * BLOCK], tree)), equal) == "b"
    assert router.choose(tree, {"a": 0.9, "b": 0.0}) == "a"


def test_a_branch_that_spilled_over_stays_where_it_went_and_the_tree_does_not_follow() -> None:
    router = Router[str]()
    tree = builders.prompt(0, 10 * BLOCK)
    branch = np.concatenate((tree, builders.prompt(1, 3 * BLOCK)))
    router.remember(tree, "a")
    assert router.choose(branch, {"b": 0.0}) == "b"  # a has no room
    router.remember(branch, "b")
    assert router.choose(np.concatenate((branch, builders.prompt(2, BLOCK))), {"a": 0.0, "b": 0.9}) == "b"
    assert router.choose(np.concatenate((tree, builders.prompt(3, BLOCK))), {"a": 0.1, "b": 0.9}) == "a"


def test_what_nobody_knows_goes_to_the_emptiest() -> None:
    router = Router[str]()
    assert router.choose(builders.prompt(0, 100), {"a": 0.5, "b": 0.2, "c": 0.3}) == "b"
    assert router.choose(builders.prompt(0, 100), {}) is None


# ---- pressure


def test_the_limit_grows_while_it_holds_work_back_and_memory_is_free() -> None:
    pressure = Pressure(64)
    start = pressure.limit
    pressure.look(LOW - 0.1, start - 1)
    assert pressure.limit == start  # nobody waits for more
    for _ in range(20):
        pressure.look(LOW - 0.1, pressure.limit)
    assert pressure.limit == 64


def test_the_limit_shrinks_under_pressure_and_stays_between_the_marks() -> None:
    pressure = Pressure(64)
    for _ in range(20):
        pressure.look(0.0, pressure.limit)
    pressure.look((LOW + HIGH) / 2, 64)
    assert pressure.limit == 64
    pressure.look(HIGH + 0.01, 64)
    assert pressure.limit == 48
    pressure.retracted(1)
    pressure.look(0.5, 40)
    assert pressure.limit == 30
    for _ in range(50):
        pressure.look(1.0, pressure.limit)
    assert pressure.limit == 1


@given(st.lists(st.tuples(st.floats(0, 1.2), st.integers(0, 80), st.integers(0, 3)), max_size=60), st.integers(1, 80))
def test_the_limit_is_at_least_one_and_never_above_the_cap(looks: list[tuple[float, int, int]], cap: int) -> None:
    pressure = Pressure(cap)
    for usage, running, retracted in looks:
        pressure.retracted(retracted)
        pressure.look(usage, running)
        assert 1 <= pressure.limit <= cap


# ---- answers

GOOD: dict[str, Any] = {
    "text": "…",
    "meta_info": {
        "finish_reason": {"type": "length", "length": 3},
        "prompt_tokens": 5,
        "cached_tokens": 4,
        "num_retractions": 1,
        "output_token_logprobs": [[-0.5, 7, None], [-1.5, 8, None], [0.0, 9, None]],
        "weight_versions": [{"version": "0.0", "start": 0, "end": 1}, {"version": "0.1", "start": 1, "end": 3}],
    },
}


def test_a_good_answer_is_read() -> None:
    answer = read_answer(GOOD, asked=3)
    assert (list(answer.ids), list(answer.logprobs)) == ([7, 8, 9], [-0.5, -1.5, 0.0])
    assert list(answer.versions) == [(FIRST, 0), (SECOND, 1)]
    assert (answer.finish, answer.prompt, answer.cached, answer.retractions) == ("length", 5, 4, 1)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("finish_reason", {"type": "bored"}),
        ("finish_reason", None),
        ("prompt_tokens", -1),
        ("cached_tokens", 6),
        ("output_token_logprobs", [[None, 7, None]] * 3),
        ("output_token_logprobs", [[-0.5, -7, None]] * 3),
        ("output_token_logprobs", [[-0.5, 1 << 32, None]] * 3),
        ("output_token_logprobs", [[-0.5, 7, None]] * 4),
        ("output_token_logprobs", "many"),
        ("weight_versions", []),
        ("weight_versions", [{"version": "0.0", "start": 0, "end": 2}]),
        ("weight_versions", [{"version": "0.0", "start": 1, "end": 3}]),
        ("weight_versions", [{"version": "default", "start": 0, "end": 3}]),
    ],
)
def test_an_answer_that_is_none_is_refused(where: str, what: object) -> None:
    body = copy.deepcopy(GOOD)
    body["meta_info"][where] = what
    with pytest.raises(ContractError):
        read_answer(body, asked=3)


@pytest.mark.parametrize("body", [None, [], "no", {}, {"meta_info": 3}, {"error": {"message": "no"}}])
def test_what_is_no_answer_at_all_is_refused(body: object) -> None:
    for read in (lambda: read_answer(body, 3), lambda: read_load(body)):
        with pytest.raises(ContractError):
            read()


# ---- drafts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.save_model(tmp_path_factory.mktemp("model"), "qwen2", seed=2)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.open(model)


def draft(tokenizer: Tokenizer, room: int, *stop: str) -> Draft:
    return Draft(builders.prompt(0, 5), Sampling(room, 1.0, stop), room, StopStrings(tokenizer), tokenizer.eos)


def answer(
    ids: list[int], *versions: tuple[PolicyVersion, int], finish: str = "stop", prompt: int = 5, cached: int = 3
) -> Answer:
    return Answer(ids, [-1.0] * len(ids), versions or [(FIRST, 0)], finish, None, prompt, cached, 0)  # pyright: ignore[reportArgumentType]


def test_what_was_sampled_beyond_a_stop_string_is_cut_off(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the river town search").tolist()
    one = draft(tokenizer, 40, "er t")
    one.take(answer(ids))
    done = one.completion()
    assert done.finish == "stop"
    assert "er t" in tokenizer.decode(done.ids)
    assert "er t" not in tokenizer.decode(done.ids[:-1])
    assert len(done.ids) < len(ids)
    assert done.spans == (VersionSpan(FIRST, 0, len(done.ids)),)


def test_a_server_that_stops_too_early_is_asked_to_go_on(tokenizer: Tokenizer) -> None:
    one = draft(tokenizer, 6, "never said")
    one.take(answer([5, 6], (FIRST, 0)))
    assert one.finish is None
    body = one.request("rid", "0.0")
    assert body["input_ids"] == [*builders.prompt(0, 5).tolist(), 5, 6]
    assert body["sampling_params"]["max_new_tokens"] == 4
    one.take(answer([7, 8, 9, 10], (FIRST, 0), (SECOND, 2), finish="length", prompt=7, cached=7))
    done = one.completion()
    assert (done.ids.tolist(), done.finish) == ([5, 6, 7, 8, 9, 10], "length")
    assert done.spans == (VersionSpan(FIRST, 0, 4), VersionSpan(SECOND, 4, 6))
    # 2 of the prompt; nothing to go on; and 7 + 2 again under the new weights.
    assert (done.prefilled, done.cached) == (2 + 0 + 9, 3)


def test_an_end_of_sequence_token_ends_a_draft_whatever_the_server_says(tokenizer: Tokenizer) -> None:
    end = next(iter(tokenizer.eos))
    one = draft(tokenizer, 10)
    one.take(answer([5, end, 6], finish="length"))
    assert (one.completion().ids.tolist(), one.completion().finish) == ([5, end], "stop")


# ---- versions


def test_a_staged_version_is_complete_and_the_one_before_can_go(tmp_path: Path, model: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    other = builders.save_model(tmp_path / "other", "qwen2", seed=3)
    (weights / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    stage = Stage(tmp_path)
    first = stage.first(FIRST, model)
    second = stage.put(SECOND, weights)
    assert {file.name for file in second.path.iterdir()} == {file.name for file in first.path.iterdir()}
    assert (second.path / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    stage.drop(first)
    assert not (first.path / "model.safetensors").exists()
    third = stage.put(PolicyVersion(0, 2), weights)
    assert (third.path / "config.json").is_file()
    stage.close()
    assert not third.path.exists()


def test_weights_of_another_model_are_not_staged(tmp_path: Path, model: Path) -> None:
    other = builders.save_model(tmp_path / "other", "qwen2", hidden_size=16, num_attention_heads=2)
    stage = Stage(tmp_path)
    first = stage.first(FIRST, model)
    with pytest.raises(WeightsError, match="shape"):
        stage.put(SECOND, other)
    assert [path.name for path in first.path.parent.iterdir()] == ["0.0"]
    stage.close()


def test_a_directory_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match=r"engine\.weights_dir = /nowhere"):
        Stage(Path("/nowhere"))


# ---- the command


def test_what_the_configuration_says_comes_last_and_a_cpu_gets_its_flags() -> None:
    shape: dict[str, Any] = {
        "context": 512,
        "max_running": 8,
        "cache_tokens": 1000,
        "dtype": "float32",
        "threads": 1,
        "seed": 3,
        "flags": own_flags("--schedule-policy fcfs"),
    }
    on_cpu = Launch(Installed(Path("/py"), cuda=False), **shape)
    command = on_cpu.command(Path("/model"), "1.2", "127.0.0.1", 30000)
    assert command[-2:] == ["--schedule-policy", "fcfs"]
    assert set(CPU) <= set(command)
    assert on_cpu.environment()["SGLANG_USE_CPU_ENGINE"] == "1"
    on_gpu = Launch(Installed(Path("/py"), cuda=True), **shape)
    assert not set(CPU) & set(on_gpu.command(Path("/model"), "1.2", "127.0.0.1", 30000))
    assert "SGLANG_USE_CPU_ENGINE" not in on_gpu.environment()


@pytest.mark.parametrize("flags", ["--port 3", "--model-path=x", "--weight-version 1", "--api-key x", "--ssl-certfile=x"])
def test_flags_that_follow_from_the_configuration_are_refused(flags: str) -> None:
    with pytest.raises(ConfigError, match="leave it out"):
        own_flags(flags)


@pytest.mark.parametrize("version", ["0.4.9", "0.5.20", "0.6.0", "1.0"])
def test_versions_that_cannot_be_used_are_refused_with_those_that_can(version: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"SGLang {version} in .*bin/python cannot be used; install 0\.5\.21 or 0\.5\.23"):
        find(environment_with(tmp_path, version))


def test_versions_that_can_be_used_are_told(tmp_path: Path) -> None:
    for version in ("0.5.21", "0.5.23", "0.5.23.post1"):
        assert check_installed(environment_with(tmp_path / version, version)) == version


def test_without_sglang_how_to_install_it_is_said(tmp_path: Path) -> None:
    for python in (tmp_path / "none", Path(sys.executable)):
        with pytest.raises(ConfigError, match=rf"SGLang is not installed.*{python}.*make sglang-cpu"):
            find(python)
    (tmp_path / "broken").write_text("#!/bin/false\n")
    (tmp_path / "broken").chmod(0o755)
    with pytest.raises(ConfigError, match=r"engine\.python = .*broken cannot be used"):
        find(tmp_path / "broken")


def environment_with(path: Path, version: str) -> Path:
    """The Python of an environment in which an SGLang of ``version`` seems to be installed."""
    venv.create(path, with_pip=False)
    (site,) = path.glob("lib/python*/site-packages")
    (site / f"sglang-{version}.dist-info").mkdir()
    (site / f"sglang-{version}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
    return path / "bin" / "python"


async def test_a_port_that_cannot_be_had_is_told_whatever_the_server_says_later(tmp_path: Path) -> None:
    code = "print('ERROR:    [Errno 98] address already in use', 'TimeoutError: timed out', sep=chr(10)); raise SystemExit(1)"
    child = await Child.start([sys.executable, "-c", code], os.environ, tmp_path / "log")
    await child.ended
    assert "ended with exit code 1; its last words: [Errno 98] address already in use" in child.obituary()


# ---- prefills


async def settled() -> None:
    """Let every task run until all wait for something."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_siblings_that_come_together_wait_until_the_first_has_computed_what_they_share() -> None:
    prefills, order = Prefills(), list[str]()
    shared = builders.prompt(0, 4 * BLOCK)

    async def ask(name: str, ids: TokenIds) -> None:
        async with prefills.turn(ids) as turn:
            order.append(f"{name} asks{', awaited' if turn.awaited else ''}")
            await go.wait()
            order.append(f"{name} computed")
            prefills.computed(turn)
            await done.wait()

    done, go = asyncio.Event(), asyncio.Event()
    prefixes = {"a": shared, "b": np.concatenate((shared, builders.prompt(1, BLOCK))), "c": builders.prompt(2, 4 * BLOCK)}
    async with asyncio.TaskGroup() as tasks:
        for name, ids in prefixes.items():
            tasks.create_task(ask(name, ids))
        await settled()
        assert order == ["a asks, awaited", "c asks"]
        go.set()
        await settled()
        assert order.index("b asks") > order.index("a computed")
        done.set()


async def test_who_comes_too_late_to_be_told_waits_for_a_moment_only() -> None:
    prefills, shared = Prefills(), builders.prompt(0, 4 * BLOCK)
    async with prefills.turn(shared) as first:
        assert not first.awaited
        async with prefills.turn(shared) as second:
            assert second.keys == []


async def test_who_fails_to_compute_leaves_it_to_the_next_and_what_is_computed_is_waited_for_by_nobody() -> None:
    prefills, shared = Prefills(), builders.prompt(0, 4 * BLOCK)
    with pytest.raises(EngineError):
        async with prefills.turn(shared):
            raise EngineError("it is gone")
    async with prefills.turn(shared) as first:
        assert len(first.keys) == 4
        prefills.computed(first)
        async with prefills.turn(np.concatenate((shared, builders.prompt(3, 2)))) as second:
            assert second.keys == []
