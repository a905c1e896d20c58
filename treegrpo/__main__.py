"""The `treegrpo` command, also `python -m treegrpo`: isolates the process, then hands over to `services.cli.main`."""

from __future__ import annotations

from treegrpo.runtime.process_environment import isolate_process, reexec_with_clean_environment


def main() -> None:
    """The entry point. What it imports late would otherwise come from a directory that happens to be searched first."""
    reexec_with_clean_environment()
    isolate_process()
    from services.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
