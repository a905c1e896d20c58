"""Foreign text on the way to the terminal, and a standard output that takes nothing."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli.doctor import Finding, findings_table
from services.cli.evaluate import EvalAnswer, family_table
from services.cli.reports.live_view import run_panel
from services.cli.reports.plot import plot_progress
from services.cli.reports.progress_reader import RunProgress
from services.cli.reports.summary import summary_lines
from services.cli.reports.terminal import Terminal
from tests.cli.progress_rows import evaluation, step, step_row, write
from treegrpo.core.question import Question
from treegrpo.observability.printable_text import UNPRINTABLE
from treegrpo.observability.standard_streams import LossyFile

NASTY = "[red]a[/] [/b] :smile: [link=x] $\\frac{ ^_ \x1b[31m\x9b\u202e\ud800 é"
SHOWN = "[red]a[/] [/b] :smile: [link=x] $\\frac{ ^_ \\x1b[31m\\x9b\\u202e\\ud800 é"


def terminal() -> tuple[Terminal, io.StringIO]:
    out = io.StringIO()
    return Terminal(out, width=200), out


def test_foreign_text_is_shown_as_it_is_in_every_table() -> None:
    here, out = terminal()
    here.print_line(f"{NASTY}\nerror: forged")
    here.print_renderable(findings_table([Finding("model", "fail", NASTY)]))
    here.print_renderable(family_table([EvalAnswer(Question("id", "made", (), ("a",), NASTY), None)]))
    here.print_renderable(run_panel(RunProgress(), {}, 3, NASTY, paused=NASTY))
    text = out.getvalue()
    assert text.count(SHOWN) == 5
    assert "error: forged" not in text.splitlines()
    assert UNPRINTABLE.search(text.replace("\n", "")) is None


@pytest.mark.parametrize("columns", ["0", "1", "-1", "many"])
def test_a_table_is_readable_whatever_the_shell_takes_for_columns(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    out = io.StringIO()
    Terminal(out).print_renderable(findings_table([Finding("model", "ok", "a directory")]))
    assert "a directory" in out.getvalue()


@pytest.mark.filterwarnings("error")
def test_a_plot_has_any_title_and_needs_no_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    progress = RunProgress([step(1), step(2)], [evaluation(0, 0.5)])
    plot_progress(progress, tmp_path / "progress.png", f"{NASTY} 北京 $a_$b$")
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_ends_well_without_its_plot(tmp_path: Path) -> None:
    write(tmp_path, step_row(1))
    (tmp_path / "progress.png").mkdir()
    lines = summary_lines(tmp_path, 1, None, ["up"])
    assert [line for line in lines if line.startswith("no plot: ")] != []


FULL, CLOSED, GONE, LATIN = "full", "closed", "gone", "latin"


def command(output: str, *arguments: str, error: str = "") -> tuple[int, str]:
    """The exit code and standard error of the command, with such an output; ``error``: that is what takes nothing."""
    shell = f'exec "$@" {2 if error else 1}' + {FULL: ">/dev/full", CLOSED: ">&-", GONE: ">&$GONE", LATIN: ">/dev/null"}[output]
    reading, writing = os.pipe()
    os.close(reading)
    variables = {**os.environ, "GONE": str(writing), **({"PYTHONIOENCODING": "ascii"} if output == LATIN else {})}
    start = ["bash", "-c", shell, "bash", sys.executable, "-P", "-m", "services.cli.main", *arguments]
    pipe = subprocess.PIPE
    done = subprocess.run(
        start, env=variables, pass_fds=[writing], stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, check=False, timeout=60
    )
    os.close(writing)
    return done.returncode, (done.stdout if error else done.stderr).decode()


@pytest.mark.parametrize("output", [FULL, CLOSED, GONE, LATIN])
@pytest.mark.parametrize("arguments", [["--help"], ["plot", "--dry-run"], ["certs", "DIR"]])
def test_a_command_ends_well_whatever_becomes_of_its_output(tmp_path: Path, output: str, arguments: list[str]) -> None:
    code, said = command(output, *(word.replace("DIR", str(tmp_path / "certs")) for word in arguments))
    assert code == 0
    assert "Traceback" not in said
    assert ("No space left" in said) is (output == FULL)


@pytest.mark.parametrize("output", [FULL, CLOSED, GONE])
def test_an_error_has_its_exit_code_whatever_becomes_of_the_sentence(output: str) -> None:
    assert command(output, "no-such-command", error="closed") == (2, "")


def test_a_reader_that_does_not_read_holds_nobody_up() -> None:
    reading, writing = os.pipe()
    file = LossyFile(writing, blocked_seconds=0.01)
    with os.fdopen(reading, "rb") as reader:
        assert file.write(b"x" * 200_000) == 200_000
        assert file.lost is not None
        took = len(reader.read1(1_000_000))
        assert 0 < took < 200_000
        assert file.write(b"again") == 5
        os.close(writing)
        assert reader.read().endswith(b"again")
