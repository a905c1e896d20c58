from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from tests.manual_clock import ManualClock
from treegrpo.errors import ConfigError
from treegrpo.security.tls_reload import RETRY_SECONDS, CertificateReload

pytestmark = pytest.mark.pure


class TextCertificate:
    """Three files, of which the second is loaded as text; "bad" cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.files = (folder / "ca.pem", folder / "role.pem", folder / "role.key")
        for path in self.files:
            path.write_text("first")
        self.loads = 0
        self.clock = ManualClock()
        self.reload = CertificateReload(self.files, self._load, clock=self.clock.monotonic)

    def _load(self) -> str:
        self.loads += 1
        if (text := self.files[1].read_text()) == "bad":
            raise ConfigError("it is bad.")
        return text


@pytest.fixture
def certificate(tmp_path: Path) -> TextCertificate:
    return TextCertificate(tmp_path)


def test_a_changed_file_is_loaded_once(certificate: TextCertificate) -> None:
    assert not certificate.reload.reload_if_changed()
    certificate.files[1].write_text("second")
    assert [certificate.reload.reload_if_changed() for _ in range(3)] == [True, False, False]
    assert (certificate.reload.newest, certificate.loads) == ("second", 2)


def test_a_bad_file_is_loaded_and_logged_once(certificate: TextCertificate, caplog: pytest.LogCaptureFixture) -> None:
    certificate.files[1].write_text("bad")
    with caplog.at_level(logging.WARNING):
        assert [certificate.reload.reload_if_changed() for _ in range(3)] == [False] * 3
    assert (certificate.reload.newest, certificate.loads, len(caplog.records)) == ("first", 2, 1)


def test_the_other_half_of_a_renewal_is_used_at_once(certificate: TextCertificate) -> None:
    certificate.files[1].write_text("bad")
    assert not certificate.reload.reload_if_changed()
    certificate.files[1].write_text("good")
    assert certificate.reload.reload_if_changed()


def test_files_whose_rights_change_are_loaded_again(certificate: TextCertificate) -> None:
    certificate.files[1].write_text("bad")
    certificate.reload.reload_if_changed()
    before = certificate.files[2].stat()
    certificate.files[2].chmod(0o600)
    os.utime(certificate.files[2], ns=(before.st_atime_ns, before.st_mtime_ns))
    certificate.reload.reload_if_changed()
    assert certificate.loads == 3


def test_unchanged_bad_files_are_loaded_again_after_a_while(
    certificate: TextCertificate, caplog: pytest.LogCaptureFixture
) -> None:
    certificate.files[1].write_text("bad")
    with caplog.at_level(logging.WARNING):
        certificate.reload.reload_if_changed()
        certificate.clock.advance(RETRY_SECONDS)
        certificate.reload.reload_if_changed()
    assert (certificate.loads, len(caplog.records)) == (3, 1)
