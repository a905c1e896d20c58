"""The examples in docstrings give what they say, and those of documents name functions that exist."""

from __future__ import annotations

import ast
import builtins
import doctest
import importlib
import re
from pathlib import Path

import pytest

from tests.structure.source import Checkout

ROOT = Path(__file__).resolve().parents[2]
WITH_EXAMPLES = [module.name for module in Checkout.parse(ROOT).modules if ">>> " in module.text]
RECIPES = {"docs/estimators.md": "learner.trainer.algorithm.advantages"}
"""Documents with Python code to be added to a module."""


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_give_what_they_say(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize(("page", "name"), RECIPES.items())
def test_code_of_a_document_fits_its_module(page: str, name: str) -> None:
    known = vars(importlib.import_module(name)) | vars(builtins)
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    for indent, block in blocks:
        tree = ast.parse(re.sub(f"^{indent}", "", block, flags=re.MULTILINE))
        own = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        assert used - own - known.keys() == set()
