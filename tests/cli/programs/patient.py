"""The `treegrpo` command with an hour's patience before it starts a part again."""

from services.cli import keeper
from services.cli.main import main

if __name__ == "__main__":
    keeper.RESTART_SECONDS = (3600.0,)
    main()
