"""Parses a checkout: its Python files, what they import, and the functions and classes they define."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PRODUCT = ("treegrpo", "services", "learner")
AROUND = ("tests", "bench", "examples", "deploy")
STUBS = "treegrpo/v1/"
"""Generated, and not measured."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A Python file of a checkout."""

    name: str
    """Dotted; a package's ``__init__.py`` has the name of the package."""
    path: str
    """Relative to the checkout."""
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        return self.text.count("\n")

    @property
    def is_package(self) -> bool:
        return self.path.endswith("__init__.py")

    @property
    def is_empty(self) -> bool:
        """Whether it holds a docstring at most."""
        return all(isinstance(node, ast.Expr) for node in self.tree.body)

    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))

    def classes(self) -> Iterator[ast.ClassDef]:
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef))

    def identifiers(self) -> Iterator[tuple[int, str]]:
        """Line and text of each identifier, those of f-strings among them."""
        for node in ast.walk(self.tree):
            match node:
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                    yield node.lineno, name
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    yield node.lineno, name
                case ast.alias(name=name, asname=other):
                    yield from ((node.lineno, part) for part in (*name.split("."), other) if part)
                case ast.ImportFrom(module=str(name)):
                    yield from ((node.lineno, part) for part in name.split("."))
                case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                    yield node.lineno, name
                case _:
                    pass

    def imports(self) -> Iterator[str]:
        """Dotted names that may be modules: of ``from a import b`` both a and a.b. Relative imports are not used here."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@dataclass(frozen=True)
class Package:
    """How the children of one package, modules and packages, depend on each other."""

    name: str
    files: int
    """Without ``__init__.py``."""
    levels: int
    """Children on the longest chain of imports; a circle is one."""
    arrows: int
    """Pairs of children of which one imports the other."""
    circles: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Checkout:
    """The Python files of a checkout."""

    modules: tuple[Module, ...]

    @classmethod
    def parse(cls, root: Path, folders: tuple[str, ...] = PRODUCT) -> Checkout:
        """Read every Python file below ``folders`` of ``root``, but for generated stubs."""
        paths = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
        return cls(tuple(_parse(root, path) for path in paths if STUBS not in path.as_posix()))

    @cached_property
    def edges(self) -> frozenset[tuple[str, str]]:
        """(importing, imported) modules."""
        known = {module.name for module in self.modules}
        packages = {module.name for module in self.modules if module.is_package and module.is_empty}
        return frozenset(
            (module.name, imported)
            for module in self.modules
            for imported in module.imports()
            if imported in known and imported not in packages and imported != module.name
        )

    @cached_property
    def packages(self) -> tuple[Package, ...]:
        """Every package that holds a module."""
        return tuple(self._package(module.name) for module in self.modules if module.is_package)

    def _package(self, name: str) -> Package:
        files = [one for one in self.modules if not one.is_package and one.name.rpartition(".")[0] == name]
        arrows = {
            (here, there)
            for source, target in self.edges
            if (here := _child(name, source)) and (there := _child(name, target)) and here != there
        }
        circles = _circles(arrows)
        return Package(name, len(files), _levels(arrows, circles) or min(1, len(files)), len(arrows), circles)


def _parse(root: Path, path: Path) -> Module:
    relative = path.relative_to(root)
    parts = relative.with_suffix("").parts
    return Module(".".join(parts[:-1] if parts[-1] == "__init__" else parts), relative.as_posix(), path.read_text("utf-8"))


def _child(package: str, module: str) -> str | None:
    """The child of ``package`` in which ``module`` lies."""
    head, found, rest = module.partition(f"{package}.")
    return rest.partition(".")[0] if found and not head else None


def _reachable(arrows: set[tuple[str, str]]) -> dict[str, set[str]]:
    """What can be reached from each child."""
    reach = {source: {target for one, target in arrows if one == source} for source, _ in arrows}
    while True:
        wider = {source: targets.union(*(reach.get(target, set()) for target in targets)) for source, targets in reach.items()}
        if wider == reach:
            return reach
        reach = wider


def _circles(arrows: set[tuple[str, str]]) -> tuple[tuple[str, ...], ...]:
    reach = _reachable(arrows)
    on_one = [name for name, targets in reach.items() if name in targets]
    return tuple(sorted({tuple(sorted(one for one in on_one if one in reach[name] and name in reach[one])) for name in on_one}))


def _levels(arrows: set[tuple[str, str]], circles: tuple[tuple[str, ...], ...]) -> int:
    """Length of the longest chain, a circle being one child."""
    merged = {name: circle[0] for circle in circles for name in circle}
    below: dict[str, set[str]] = {}
    for source, target in arrows:
        here, there = merged.get(source, source), merged.get(target, target)
        if here != there:
            below.setdefault(here, set()).add(there)
    heights: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in heights:
            heights[name] = 1 + max((height(one) for one in below.get(name, ())), default=0)
        return heights[name]

    return max(map(height, below), default=0)


def function_lines(function: Function) -> int:
    """From ``def`` to the last line, decorators not counted."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def percentile(values: list[int], percent: int) -> int:
    """The smallest value that ``percent`` of all do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def median(values: list[int]) -> float:
    return statistics.median(values)
