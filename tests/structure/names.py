"""Finds names that break a rule: classes named twice, bare verbs, retired words, long test names, patched constants."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

from tests.structure.source import Checkout, Module

BARE_VERBS = (
    "accept",
    "add",
    "close",
    "end",
    "load",
    "look",
    "of",
    "open",
    "publish",
    "refuse",
    "restore",
    "run",
    "start",
    "state",
    "take",
    "write",
)
"""Verbs that say nothing without an object."""
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")


def classes_named_twice(checkout: Checkout) -> dict[str, list[str]]:
    """Paths by the name of a class that is defined more than once."""
    places: dict[str, list[str]] = defaultdict(list)
    for module in checkout.modules:
        for found in module.classes():
            places[found.name].append(f"{module.path}:{found.lineno}")
    return {name: paths for name, paths in sorted(places.items()) if len(paths) > 1}


def methods_by_name(checkout: Checkout) -> dict[str, list[str]]:
    """Classes by the name of a method that they define."""
    owners: dict[str, list[str]] = defaultdict(list)
    for module in checkout.modules:
        for owner in module.classes():
            for node in owner.body:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    owners[node.name].append(f"{module.path}:{owner.name}")
    return owners


def definitions(checkout: Checkout) -> Counter[str]:
    """How often a function or method of a name is defined; names of the language (``__init__``) do not count."""
    names = (function.name for module in checkout.modules for function in module.functions())
    return Counter(name for name in names if not name.startswith("__"))


def bare_verbs(checkout: Checkout) -> dict[str, list[str]]:
    """Classes by the bare verb that they define, the commonest first."""
    owners = methods_by_name(checkout)
    return {verb: sorted(set(owners[verb])) for verb in sorted(BARE_VERBS, key=lambda verb: -len(owners.get(verb, ())))}


def retired_words(modules: Iterable[Module], retired: Mapping[str, str], parts: Iterable[str] = ()) -> Iterator[str]:
    """Where a retired identifier is used, or a name with one of ``parts`` in it, as ``path:line: name is retired: new name``."""
    words = dict.fromkeys(parts, "a plain term")
    for module in modules:
        stem = module.path.rpartition("/")[2].removesuffix(".py")
        for line, name in [(1, stem), *module.identifiers()]:
            plain = retired.get(name.strip("_")) or next((words[part] for part in _parts(name) if part in words), None)
            if plain:
                yield f"{module.path}:{line}: {name} is retired: {plain}"


def _parts(name: str) -> list[str]:
    """The words of an identifier in snake case or camel case, in lower case."""
    return [part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def missing_replacements(modules: Iterable[Module], retired: Mapping[str, str]) -> Iterator[str]:
    """Retired identifiers whose replacement is an identifier of no module, as ``old: new is in no module``."""
    used = {name for module in modules for _, name in module.identifiers()}
    for old, new in retired.items():
        if new not in used:
            yield f"{old}: {new} is in no module"


def long_test_names(checkout: Checkout, letters: int) -> Iterator[str]:
    """Tests whose name is longer than ``letters``."""
    for module in checkout.modules:
        for function in module.functions():
            if function.name.startswith("test_") and len(function.name) > letters:
                yield f"{module.path}:{function.lineno}: {function.name} ({len(function.name)})"


def patched_constants(checkout: Checkout) -> Iterator[str]:
    """Where a constant of another module is replaced, by ``monkeypatch.setattr``, ``patch`` or an assignment."""
    for module in checkout.modules:
        for node in ast.walk(module.tree):
            for name in _replaced(node):
                if CONSTANT.fullmatch(name.rpartition(".")[2]):
                    yield f"{module.path}:{node.lineno}: {name}"  # pyright: ignore[reportAttributeAccessIssue]  # it is an expression or a statement


def _replaced(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else (node.target,):
            if isinstance(target, ast.Attribute) and not _is_own(target):
                yield ast.unparse(target)
    elif isinstance(node, ast.Call):
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in {"setattr", "patch", "object", "delattr"}:
            for argument in node.args[:3]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value
                    break


def _is_own(target: ast.Attribute) -> bool:
    return isinstance(target.value, ast.Name) and target.value.id in {"self", "cls"}
