"""The `treegrpo` command, also `python -m treegrpo`: isolates the process, then runs `services.cli.main`."""

from __future__ import annotations

from treegrpo.runtime.process_environment import isolate_process, reexec_with_clean_environment


def main() -> None:
    """The entry point. Isolation comes before late imports, which could find another package first on the import path."""
    reexec_with_clean_environment()
    isolate_process()
    from services.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
