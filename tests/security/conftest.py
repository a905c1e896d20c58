"""Certificates that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.certs.issue import make_certificates


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `treegrpo certs` makes; not to be changed."""
    folder = tmp_path_factory.mktemp("certs")
    make_certificates(folder, [], ["s7"])
    return folder
