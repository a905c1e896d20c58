"""The `treegrpo` command with an hour's patience before it starts a part again."""

from services.cli.main import main
from services.cli.processes import part_supervisor

if __name__ == "__main__":
    part_supervisor.RESTART_SECONDS = (3600.0,)
    main()
