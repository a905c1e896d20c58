"""The `treegrpo` command with a delay of an hour before it restarts a part."""

from dataclasses import replace
from functools import partial

from services.cli.commands import COMMANDS, run_up
from services.cli.main import main
from treegrpo.runtime.supervisor import RestartPolicy
from treegrpo.timing.backoff import Backoff

if __name__ == "__main__":
    run_slowly = partial(run_up, everything=True, policy=RestartPolicy(Backoff((3600.0,))))
    COMMANDS["up"] = replace(COMMANDS["up"], handler=run_slowly)
    main()
