from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from treegrpo.runtime import process_environment
from treegrpo.runtime.process_environment import RANKS, REMOVED_VARIABLES, ROOT, child_environment, python_command

SHADOWS = ("tokenizers.py", "rich.py", "torch.py", "learner.py", "prometheus_client.py", "services/__init__.py")
SHOW = "import json, os, sys; sys.argv[0] = '-m'; import services; print(json.dumps([sys.path, dict(os.environ)]))"


def shadowed(folder: Path) -> Path:
    """A directory whose modules have the names of ours and of what we need, and end whoever runs them."""
    for name in SHADOWS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("raise SystemExit('foreign code')\n")
    return folder


@pytest.mark.parametrize("search", ["", ":", ".", "HERE", "HERE:/elsewhere"])
def test_a_child_searches_what_we_search_and_not_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: str
) -> None:
    monkeypatch.chdir(shadowed(tmp_path))
    monkeypatch.setenv("PYTHONPATH", search.replace("HERE", str(tmp_path)))
    given = child_environment()
    assert given["PYTHONPATH"].split(":") == [str(ROOT), *(["/elsewhere"] if "elsewhere" in search else [])]
    assert given["PYTHONSAFEPATH"] == "1"


def test_a_relative_search_path_is_the_same_for_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "lib")
    assert child_environment()["PYTHONPATH"].split(":") == [str(ROOT), str(tmp_path / "lib")]
    assert child_environment(ours=False)["PYTHONPATH"] == str(tmp_path / "lib")


def test_variables_of_other_programs_are_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*REMOVED_VARIABLES, *RANKS, "TORCHELASTIC_RUN_ID", "PET_NNODES", "OMPI_COMM_WORLD_RANK", "UVICORN_WORKERS"]
    for name in (*names, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "1")
    given = child_environment({"MORE": "2"})
    assert [name for name in names if name in given] == []
    assert (given["CUDA_VISIBLE_DEVICES"], given["MORE"], given["GRPC_VERBOSITY"]) == ("1", "2", "NONE")


def test_a_child_asks_loopback_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.delenv("no_proxy", raising=False)
    assert child_environment()["no_proxy"] == "example.org,localhost,127.0.0.1,::1"


def test_a_module_is_isolated_before_it_imports_what_is_not_ours(tmp_path: Path) -> None:
    variables = {**os.environ, "PYTHONPATH": f":{tmp_path}:{ROOT}", "PROMETHEUS_MULTIPROC_DIR": "/nowhere", "RANK": "0"}
    asked = [sys.executable, "-c", SHOW]
    (tmp_path / "learner.py").touch()
    said = subprocess.run(asked, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True, timeout=60).stdout
    search, environment = json.loads(said)
    assert str(tmp_path) not in [os.path.realpath(entry) for entry in search]
    assert str(ROOT) in search
    assert "PROMETHEUS_MULTIPROC_DIR" not in environment
    assert environment["RANK"] == "0", "torchrun's own ranks need it"


@pytest.mark.parametrize("start", [python_command("treegrpo"), [sys.executable, "-m", "services.cli.main"]])
def test_the_command_runs_in_a_directory_of_other_modules(tmp_path: Path, start: list[str]) -> None:
    folder = shadowed(tmp_path)
    if "-P" not in start:  # then Python itself looks for `services` there
        (folder / "services" / "__init__.py").unlink()
        (folder / "services").rmdir()
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}:", "PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "2", "PYTHONINSPECT": "1"}
    said = subprocess.run([*start, "plot"], cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=60)
    assert (said.returncode, said.stderr.split(":")[0]) == (2, "error"), said.stderr
    assert "nothing to plot" in said.stderr


def test_closed_streams_are_opened_for_nobody_else_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    isolate = "from treegrpo.runtime.process_environment import isolate_process; isolate_process()"
    code = f"import os, sys; {isolate}; print('x'); print(os.dup(0))"
    say = (
        f"{code}; sys.stderr.write('said'); os.write(9, repr([os.readlink(f'/proc/self/fd/{{n}}') for n in (0, 1, 2)]).encode())"
    )
    read, write = os.pipe()
    with os.fdopen(read) as answer:
        shell = f'exec {sys.executable} -c "$CODE" 9>&{write} <&- >&- 2>&-'
        subprocess.run(["bash", "-c", shell], env={**os.environ, "CODE": say}, pass_fds=[write], check=True, timeout=60)
        os.close(write)
        assert answer.read() == repr(["/dev/null"] * 3)


def test_a_program_of_others_that_imports_ours_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/theirs")
    process_environment.isolate_module_process()
    assert os.environ["PROMETHEUS_MULTIPROC_DIR"] == "/theirs"
