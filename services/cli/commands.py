"""The commands of `treegrpo`: help texts and handlers."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treegrpo.config.loader import is_secret
from treegrpo.config.schema import Config
from treegrpo.errors import ConfigError, DeadlineError, PartError, RunError, UnavailableError
from treegrpo.observability.printable_text import printable_json
from treegrpo.runtime.entrypoint import find_own_error
from treegrpo.runtime.process_environment import child_environment, python_command

if TYPE_CHECKING:
    from treegrpo.runtime.supervisor import RestartPolicy


@dataclass(frozen=True, slots=True)
class Invocation:
    """A parsed command line."""

    config: Config
    arguments: tuple[str, ...]
    """``[CONFIG.toml] [--section.key value …]``, as processes get it."""
    positionals: tuple[str, ...] = ()
    """What a command takes before the configuration: the run state, a directory."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What a command takes instead of the configuration."""

    @property
    def toml(self) -> Path | None:
        return Path(self.arguments[0]) if self.arguments and not self.arguments[0].startswith("-") else None


@dataclass(frozen=True, slots=True)
class Command:
    """One command: help texts, arguments, handler."""

    summary: str
    """One line."""
    description: str
    """For `--help`."""
    handler: Callable[[Invocation], int]
    positionals: tuple[str, ...] = ()
    """Names of its positional arguments before the configuration."""
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    """Flags it takes instead of the configuration, with what they mean; those that end in "=" have a value."""


def run_up(call: Invocation, *, everything: bool, policy: RestartPolicy | None = None) -> int:
    """`up` and `learner`; ``policy``: when parts are restarted."""
    from services.cli.processes.part_supervisor import RESTARTS
    from services.cli.reports.live_view import LiveView
    from services.cli.reports.run_history import describe_finished_run, newest_checkpoint
    from services.cli.reports.summary import command_line, summary_lines
    from services.cli.reports.terminal import Terminal
    from services.cli.up import RunController
    from treegrpo.config.fingerprint import check_fingerprint

    view, run_dir = LiveView(Terminal()), call.config.run.dir
    if sentence := describe_finished_run(call.config):
        check_fingerprint(call.config)
        view.print_line(sentence)
        return 0
    again = ("up" if everything else "learner", *call.arguments)
    resume = command_line("state", "running", *call.arguments)
    run = RunController(call.config, call.arguments, view, resume, everything=everything, policy=policy or RESTARTS)
    try:
        code = asyncio.run(run())
    except Exception as error:  # a task group may have wrapped it
        ours = find_own_error(error)
        if not isinstance(ours, UnavailableError | DeadlineError | RunError) or newest_checkpoint(run_dir) is None:
            raise
        hint = "continue" if ours.is_transient else "fix that, then continue"
        last = PartError(str(ours), is_transient=ours.is_transient)
        last.add_note(f"{hint}: {command_line(*again)}")
        raise last from error
    for line in summary_lines(run_dir, call.config.train.steps, call.toml, again):
        view.print_line(line)
    return code


def exec_module(module: str, call: Invocation) -> int:
    """Replace this process by a Python module; does not return."""
    sys.stdout.flush()
    os.execve(sys.executable, python_command(module, *call.arguments), child_environment())  # noqa: S606


def run_eval(call: Invocation) -> int:
    """`eval`. Raises RunError: no question has an answer."""
    from services.cli.checks.check import run_checks
    from services.cli.checks.run_checks import eval_checks
    from services.cli.evaluate import describe_failures, evaluate_model, family_table, running_retriever
    from services.cli.reports.terminal import Terminal

    terminal = Terminal()
    for warning in run_checks(eval_checks(call.config).values()):
        terminal.print_line(f"Note: {warning}.")

    async def evaluate() -> int:
        async with running_retriever(call.config, call.arguments, terminal.print_line):
            answers = await evaluate_model(call.config)
        terminal.print_renderable(family_table(answers))
        if sentence := describe_failures(answers):
            terminal.print_line(sentence)
        return 0

    return asyncio.run(evaluate())


def run_doctor(call: Invocation) -> int:
    """`doctor`: exit code 1 when something fails."""
    from services.cli.doctor import diagnose, findings_table
    from services.cli.reports.terminal import Terminal

    findings = asyncio.run(diagnose(call.config))
    Terminal().print_renderable(findings_table(findings))
    return int(any(finding.verdict == "fail" for finding in findings))


def run_state(call: Invocation) -> int:
    """`state`."""
    from services.cli.reports.terminal import Terminal
    from services.cli.state import set_run_state

    Terminal().print_line(asyncio.run(set_run_state(call.config, call.positionals[0])))
    return 0


def run_plot(call: Invocation) -> int:
    """`plot`."""
    from services.cli.reports.plot import FILE_NAME, plot_progress
    from services.cli.reports.progress_reader import read_progress
    from services.cli.reports.terminal import Terminal

    run_dir = call.config.run.dir
    plot_progress(read_progress(run_dir), run_dir / FILE_NAME, str(run_dir))
    Terminal().print_line(str(run_dir / FILE_NAME))
    return 0


def run_certs(call: Invocation) -> int:
    """`certs`."""
    from services.certs.issue import make_certificates
    from services.cli.reports.terminal import Terminal

    names, samplers = (call.options[flag].split(",") if call.options[flag] else [] for flag in ("names", "samplers"))
    directory, terminal = Path(call.positionals[0]), Terminal()
    new_ca, drop_old_ca = call.options["new_ca"], call.options["drop_old_ca"]
    for line in make_certificates(directory, names, samplers, new_ca=new_ca, drop_old_ca=drop_old_ca):
        terminal.print_line(line)
    terminal.print_line(f"use it: --security.dir {directory}, or [security] dir in the configuration file")
    return 0


COMMANDS = {
    "up": Command(
        "everything on this machine: broker, retriever, learner and samplers",
        """Checks the model, the data, the ports and the run directory, starts every part as a process of its own, trains,
and ends with the held-out exact match before and after, a plot and a checkpoint in Hugging Face format.

Each process writes RUN_DIR/logs/NAME.log. Ctrl-C drains: the trainer writes a checkpoint. Ctrl-C again stops at once.
A part that fails is restarted, unless its error is permanent. The same command continues a run that was
stopped in any way; another run.dir begins a new one.

  treegrpo up examples/geohop/geohop.toml
  treegrpo up examples/geohop/geohop.toml --train.steps 200 --sampler.count 4 --run.dir runs/long""",
        partial(run_up, everything=True),
    ),
    "learner": Command(
        "intake and trainer; samplers come from elsewhere",
        """Starts the learner's two processes. A broker must answer at broker.address. Samplers on any machine join with

  treegrpo sampler CONFIG.toml --security.dir certs --sampler.learner HOST:PORT --broker.address HOST:PORT \\
    --retriever.url https://HOST:PORT

Connections between machines need certificates: treegrpo certs --help""",
        partial(run_up, everything=False),
    ),
    "sampler": Command(
        "one sampler: leases in, subtrees out; a run may have any number",
        """Joins the learner at sampler.learner, fetches the newest weights, and rolls out questions until the run drains.
It stores nothing: stop it, kill it, start more at any time.

  treegrpo sampler CONFIG.toml --sampler.learner 10.0.0.7:50051 --security.dir certs""",
        partial(exec_module, "services.sampler"),
    ),
    "retriever": Command(
        "the search tool: Search-R1's HTTP API over a BM25 index",
        """Indexes retriever.corpus and answers POST /retrieve at retriever.listen.

  treegrpo retriever CONFIG.toml --retriever.listen 0.0.0.0:8765 --security.dir certs""",
        partial(exec_module, "services.retriever"),
    ),
    "intake": Command(
        "the learner's intake alone: leases, ledger, journal, weights",
        "`treegrpo learner` starts it together with the trainer. Run it alone where each process has its own supervisor.",
        partial(exec_module, "learner.intake"),
    ),
    "trainer": Command(
        "the learner's trainer alone: groups in, policy versions out",
        "`treegrpo learner` starts it together with the intake. Run it alone with the run.dir of the intake.",
        partial(exec_module, "learner.trainer"),
    ),
    "broker": Command(
        "the embedded MQTT broker alone",
        "`treegrpo up` starts it if broker.embedded is true. Use Mosquitto on a cluster.",
        partial(exec_module, "services.broker.server"),
    ),
    "eval": Command(
        "greedy exact match of a model on the held-out questions",
        """Answers data.heldout with the model at model.path, one greedy chain each, by family. Uses the running retriever,
or starts one for this command.

  treegrpo eval examples/geohop/geohop.toml --model.path runs/demo/checkpoints/final""",
        run_eval,
    ),
    "doctor": Command(
        "check machine, files and peers of a run, with remedies",
        "Looks at Python, packages, machine, ports, model, data, corpus and peers. Exit code 1 if something fails.",
        run_doctor,
    ),
    "state": Command(
        "set the run state: running, paused or draining",
        """Sets the state of the whole run: paused starts no new work until running; draining ends the run with a checkpoint.

  treegrpo state paused CONFIG.toml""",
        run_state,
        positionals=("running|paused|draining",),
    ),
    "certs": Command(
        "make certificates, passwords and tokens for TLS",
        """Makes a private authority in DIR, a certificate for each role, passwords for the broker and tokens for /metrics and
the retriever. Run again, it renews the certificates and keeps the rest. See docs/security.md.

  treegrpo certs certs --names learner.example.org,10.0.0.7
  treegrpo up examples/geohop/geohop.toml --security.dir certs""",
        run_certs,
        positionals=("DIR",),
        options={
            "--names=": "host names and addresses, with commas, of the machines of learner, broker and retriever",
            "--samplers=": "names, with commas, of samplers that get a certificate valid for them only",
            "--new-ca": "first step of replacing the authority: trust a new one beside the old",
            "--drop-old-ca": "last step of replacing the authority: trust only the new one",
        },
    ),
    "plot": Command(
        "reward, EM, budget, saving and version lag as a PNG",
        """Draws RUN_DIR/progress.png from RUN_DIR/progress.jsonl, also during the run.

  treegrpo plot --run.dir runs/demo""",
        run_plot,
    ),
}


def parse_invocation(command: Command, arguments: Sequence[str]) -> Invocation:
    """Parse the positional arguments and the configuration of a command line. Raises ConfigError."""
    from treegrpo.config.loader import config_from_arguments

    count = len(command.positionals)
    positionals, rest = arguments[:count], arguments[count:]
    if len(positionals) < count or any(word.startswith("-") for word in positionals):
        raise ConfigError(
            f"{next(iter(command.positionals[len(positionals) :]), command.positionals[0])} is missing; see --help."
        )
    if command.options:
        return Invocation(Config(), (), tuple(positionals), parse_own_options(command, rest))
    return Invocation(config_from_arguments(rest), tuple(rest), tuple(positionals))


def own_option_parser(command: Command, **options: Any) -> argparse.ArgumentParser:
    """A parser of a command's own flags; ``options`` are ArgumentParser's."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(formatter_class=formatter, exit_on_error=False, allow_abbrev=False, **options)
    for flag, text in command.options.items():
        kind: dict[str, Any] = {"default": ""} if flag.endswith("=") else {"action": "store_true"}
        parser.add_argument(flag.rstrip("="), help=text, **kind)
    return parser


def parse_own_options(command: Command, arguments: Sequence[str]) -> Mapping[str, Any]:
    """A command's own flags by name, with _ for -. Raises ConfigError."""
    try:
        known, unknown = own_option_parser(command, add_help=False).parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"The flags cannot be read: {error}; see --help.") from error
    if unknown:
        flags = ", ".join(flag.rstrip("=") for flag in command.options)
        raise ConfigError(f"{unknown[0]} is not a flag of this command; it has {flags}.")
    return vars(known)


def as_toml(config: Config) -> str:
    """The configuration as TOML, without secrets."""
    lines: list[str] = []
    for section, keys in config.model_dump(mode="json").items():
        lines += [f"[{section}]", *(_line(section, key, value) for key, value in keys.items()), ""]
    return "\n".join(lines)


def _line(section: str, key: str, value: object) -> str:
    if is_secret(section, key):
        return f"# {key} is {'set in the environment' if value else 'not set'}"
    return f"# {key} is not set" if value is None else f"{key} = {printable_json(value)}"
