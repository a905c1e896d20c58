from __future__ import annotations

from pathlib import Path

import pytest

from services.certs.issue import certs


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `treegrpo certs` makes; not to be changed."""
    folder = tmp_path_factory.mktemp("certs")
    certs(folder, [], ["s7"], new_ca=False, drop_old_ca=False)
    return folder
