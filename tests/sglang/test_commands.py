"""The command lines this project makes, read by the parser of the SGLang that is installed."""

from __future__ import annotations

import json
import subprocess
import tomllib
from email import message_from_string
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from services.sampler.engines.sglang.server.launch_command import CONTEXT_MARGIN, SGLangInstallation, parse_extra_flags
from tests.sglang.server_harness import CONTEXT, PYTHON, launch
from treegrpo.config.schema import EngineConfig

PROJECT: dict[str, Any] = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
RECIPES: dict[str, EngineConfig] = {
    name: EngineConfig.model_validate({"kind": "sglang", **recipe})
    for name, recipe in tomllib.loads(Path("deploy/sglang/recipes.toml").read_text(encoding="utf-8")).items()
}
ON_CPU, UNKNOWN = "on a CPU", "unknown"
PARSE = """
import argparse, contextlib, io, json, sys
from sglang.srt.server_args import ServerArgs
parser, found = argparse.ArgumentParser(allow_abbrev=False), {}
ServerArgs.add_cli_args(parser)
for name, command in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            found[name] = vars(parser.parse_args(command))
        except SystemExit:
            found[name] = said.getvalue()[-300:]
print(json.dumps(found, default=str))
"""


def command(max_running: int, flags: str, *, cuda: bool) -> list[str]:
    plan = launch(
        installation=SGLangInstallation(PYTHON, cuda=cuda),
        max_running=max_running,
        flags=parse_extra_flags(flags),
        dtype="bfloat16",
    )
    _, *words = plan.command_line(Path("/model"), "1.42", "127.0.0.1", 30000)
    assert words[:2] == ["-m", "sglang.launch_server"]
    return words[2:]


@pytest.fixture(scope="module")
def parsed() -> dict[str, Any]:
    """What SGLang understands of each command line, or what it says against it."""
    commands = {
        **{name: command(recipe.max_running, recipe.flags, cuda=True) for name, recipe in RECIPES.items()},
        ON_CPU: command(8, "--schedule-policy fcfs --page-size 4", cuda=False),
        UNKNOWN: command(8, "--tensor-size 4", cuda=True),
    }
    environment = launch().environment()
    asked = [str(PYTHON), "-c", PARSE, json.dumps(commands)]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", RECIPES)
def test_sglang_knows_the_flags_of_a_recipe(name: str, parsed: dict[str, Any]) -> None:
    found = parsed[name]
    assert isinstance(found, dict), found
    assert (found["max_running_requests"], found["context_length"]) == (RECIPES[name].max_running, CONTEXT + CONTEXT_MARGIN)
    assert (found["model_path"], found["weight_version"], found["schedule_policy"]) == ("/model", "1.42", "lpm")
    assert (found["dtype"], found["enable_metrics"]) == ("bfloat16", True)
    assert 0.5 < found["mem_fraction_static"] < 0.95


def test_cpu_flags_are_known_and_configured_flags_win(parsed: dict[str, Any]) -> None:
    found = parsed[ON_CPU]
    assert (found["device"], found["attention_backend"], found["grammar_backend"]) == ("cpu", "torch_native", "none")
    assert (found["schedule_policy"], found["page_size"]) == ("fcfs", 4)


def test_a_flag_that_sglang_does_not_know_is_found_out(parsed: dict[str, Any]) -> None:
    assert "unrecognized arguments: --tensor-size" in parsed[UNKNOWN]


def test_the_extra_can_be_installed_beside_what_the_project_needs() -> None:
    """As far as the two speak of the same packages themselves."""
    (extra,) = map(Requirement, PROJECT["optional-dependencies"]["sglang"])
    (theirs,) = PYTHON.parent.parent.glob("lib/python*/site-packages/sglang-*.dist-info/METADATA")
    said = message_from_string(theirs.read_text(encoding="utf-8"))
    if said["Version"] not in extra.specifier:
        pytest.skip(f"SGLang {said['Version']} is not the one for GPUs")
    ours = {needed.name: needed.specifier for needed in map(Requirement, PROJECT["dependencies"])}
    needs = [
        needed for needed in map(Requirement, said.get_all("Requires-Dist", [])) if needed.name in ours and not needed.marker
    ]
    pinned = {needed.name: pin.version for needed in needs for pin in needed.specifier if pin.operator == "=="}
    assert pinned.keys() >= {"torch", "transformers", "tokenizers"}
    assert {name: version for name, version in pinned.items() if version not in ours[name]} == {}
