from __future__ import annotations

import pytest

from services.sampler.text.tokenizer import Tokenizer
from tests.engines import builders

pytest.register_assert_rewrite("tests.engines.conformance")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    builders.save_tokenizer(path)
    return Tokenizer.open(path)
