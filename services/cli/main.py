"""The `treegrpo` command: `treegrpo COMMAND [CONFIG.toml] [--section.key value …] [--dry-run]`."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Sequence

from services.cli.commands import COMMANDS, as_toml, own_option_parser, parse_invocation
from treegrpo.config.loader import flag_parser
from treegrpo.errors import ConfigError
from treegrpo.observability import log_setup
from treegrpo.observability.standard_streams import lost_output
from treegrpo.runtime.entrypoint import report_error
from treegrpo.runtime.process_environment import isolate_process

DRY_RUN = "--dry-run"
HELP = ("-h", "--help")
INTERRUPTED = 130

CONFIGURATION = """configuration: CONFIG.toml, then the environment (TREEGRPO_TRAIN__LR=1e-4), then flags (--train.lr 1e-4); the
later wins. --dry-run prints what comes of it, as TOML, and does nothing else."""


def usage_text() -> str:
    """What `treegrpo --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: treegrpo COMMAND [CONFIG.toml] [--section.key value …] [--dry-run]",
            "",
            "Tree-GRPO for LLM agents: samplers grow trees of agent steps, one learner trains on them.",
            "",
            "commands:",
            *lines,
            "",
            CONFIGURATION,
            "",
            "Begin with: treegrpo up examples/geohop/geohop.toml",
            "More about one: treegrpo COMMAND --help",
        ]
    )


def command_help(name: str) -> str:
    """What `treegrpo COMMAND --help` prints: the command, then every key."""
    command = COMMANDS[name]
    if command.options:
        usage = " ".join([f"treegrpo {name}", *command.positionals, "[FLAGS]"])
        return own_option_parser(command, usage=usage, description=command.description, add_help=False).format_help()
    usage = " ".join([f"treegrpo {name}", *command.positionals, "[CONFIG.toml] [--section.key value …] [--dry-run]"])
    parser = flag_parser(usage=usage, description=f"{command.description}\n\n{CONFIGURATION}", add_help=False)
    return parser.format_help()


def run_command(arguments: Sequence[str]) -> int:
    """Execute a command line; returns the exit code. Raises TreeGrpoError."""
    if not arguments or arguments[0] in HELP:
        print(usage_text())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{name!r} is not a command; the nearest is {near}, and `treegrpo --help` lists all.")
    if any(flag in rest for flag in HELP):
        print(command_help(name))
        return 0
    call = parse_invocation(COMMANDS[name], [flag for flag in rest if flag != DRY_RUN])
    if DRY_RUN in rest:
        print(as_toml(call.config))
        return 0
    return COMMANDS[name].handler(call)


def main() -> None:
    """The entry point: one sentence and an exit code for an error of ours, see `treegrpo.runtime.entrypoint`."""
    isolate_process()
    log_setup.log_to_stderr(logging.WARNING, form=log_setup.BRIEF)
    try:
        code = run_command(sys.argv[1:])
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C before it was done.", file=sys.stderr)
        code = INTERRUPTED
    except Exception as error:  # noqa: BLE001  # the edge: any other error is raised again
        code = report_error(error)
    if why := lost_output():
        print(f"What this command printed is not complete: standard output could not be written ({why}).", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
