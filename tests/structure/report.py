"""Measures one checkout by every rule, and writes the figures of one or two as a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.structure import lease
from tests.structure.names import BARE_VERBS, bare_verbs, classes_named_twice, definitions
from tests.structure.source import AROUND, PRODUCT, Checkout, Package, function_lines, median, percentile

COMMAND = "python -m tests.structure --before CHECKOUT --write docs/structure.md"
INTAKE_FOLDER = "learner/intake/"
MOST_FILES, MOST_LEVELS, MOST_CLASSES = 12, 7, 5
"""Of a package, and of a bare verb."""


@dataclass(frozen=True)
class Measured:
    """The figures of one checkout."""

    figures: dict[str, str]
    packages: tuple[Package, ...]
    verbs: dict[str, int]
    """Classes of the product that define a method of this name."""
    commonest: tuple[tuple[str, int], ...]


TARGETS = {
    "files that one lease of two branches touches": "≤ 35",
    "moves between files in that": "≤ 300",
    "files of the intake that accept one subtree": "≤ 12",
    "files of the largest package": f"≤ {MOST_FILES}",
    "levels of the deepest package": f"≤ {MOST_LEVELS}",
    "circles between packages": "0",
    "class names used twice, product": "0",
    "class names used twice, everywhere": "0",
    "classes of the commonest bare verb": f"≤ {MOST_CLASSES}",
    "lines of the longest function": "≤ 60",
}


def measure(root: Path, *, trace: bool) -> Measured:
    """All figures of the checkout at ``root``; with ``trace`` also those that need a run of it."""
    product, everything = Checkout.parse(root), Checkout.parse(root, PRODUCT + AROUND)
    owners = bare_verbs(product)
    verbs = {verb: len(owners[verb]) for verb in BARE_VERBS}
    figures = (_traced(root) if trace else {}) | _counted(product, everything, verbs)
    commonest = tuple(definitions(product).most_common(10))
    return Measured(figures, tuple(one for one in product.packages if one.files), verbs, commonest)


def _counted(product: Checkout, everything: Checkout, verbs: dict[str, int]) -> dict[str, str]:
    files = [module.lines for module in product.modules if not module.is_empty]
    functions = [function_lines(function) for module in product.modules for function in module.functions()]
    largest = max(product.packages, key=lambda one: one.files)
    deepest = max(product.packages, key=lambda one: one.levels)
    verb = max(verbs, key=lambda one: verbs[one])
    return {
        "files of the product": str(len(files)),
        "lines of a file: median, largest": f"{median(files):.0f}, {max(files)}",
        "lines of a function: median, 99th percentile": f"{median(functions):.0f}, {percentile(functions, 99)}",
        "lines of the longest function": str(max(functions)),
        "files of the largest package": f"{largest.files} ({largest.name})",
        "levels of the deepest package": f"{deepest.levels} ({deepest.name})",
        "circles between packages": str(sum(len(one.circles) for one in product.packages)),
        "class names used twice, product": str(len(classes_named_twice(product))),
        "class names used twice, everywhere": str(len(classes_named_twice(everything))),
        "classes of the commonest bare verb": f"{verbs[verb]} (`{verb}`)",
    }


def _traced(root: Path) -> dict[str, str]:
    paths = lease.trace(root)

    def middle(count: Callable[[lease.LeasePath], int]) -> str:
        return str(lease.median_of([count(path) for path in paths]))

    parts = {
        folder: middle(lambda path, folder=folder: path.files_below(folder))
        for folder in ("services/", "learner/intake/", "learner/trainer/", "treegrpo/")
    }
    return {
        "files that one lease of two branches touches": middle(lambda path: len(path.files)),
        "of these services, intake, trainer, treegrpo": ", ".join(parts.values()),
        "functions in that": middle(lambda path: len(path.functions)),
        "calls between two functions in that": middle(lambda path: len(path.pairs)),
        "moves between files in that": middle(lambda path: len(path.moves)),
        "files of the intake that accept one subtree": middle(lambda path: len(path.accepting(INTAKE_FOLDER))),
        "the same with files of `treegrpo/`": middle(lambda path: len(path.accepting())),
    }


def page(measured: Sequence[Measured]) -> str:
    """The page docs/structure.md of one or two checkouts, the older one first."""
    heads = ["before", "after"][-len(measured) :] if len(measured) > 1 else ["now"]
    names = list(dict.fromkeys(name for one in measured for name in one.figures))
    rows = [[name, *(one.figures.get(name, "") for one in measured), TARGETS.get(name, "")] for name in names]
    verbs = [verb for verb in BARE_VERBS if any(one.verbs[verb] for one in measured)]
    packages = measured[-1].packages
    parts = [
        INTRODUCTION.format(command=COMMAND),
        _table(["measure", *heads, "target"], rows),
        METHOD,
        "## Bare verbs\n\nClasses of the product that define a method of this name.\n",
        _table(["verb", *heads], [[f"`{verb}`", *(str(one.verbs[verb]) for one in measured)] for verb in verbs]),
        COMMONEST,
        _table(heads, [list(row) for row in zip(*(_commonest(one) for one in measured), strict=True)]),
        PACKAGES.format(which=f", {heads[-1]}" if len(heads) > 1 else ""),
        _table(
            ["package", "files", "levels", "arrows"],
            [[f"`{one.name}`", str(one.files), str(one.levels), str(one.arrows)] for one in packages],
        ),
    ]
    if len(measured) > 1:
        older = [one for one in measured[0].packages if one.files > MOST_FILES or one.levels > MOST_LEVELS]
        parts += [
            "Packages beyond the limits, before.\n",
            _table(
                ["package", "files", "levels", "arrows"],
                [[f"`{one.name}`", str(one.files), str(one.levels), str(one.arrows)] for one in older],
            ),
        ]
    return "\n".join(parts)


def _commonest(measured: Measured) -> list[str]:
    return [f"`{name}` {count}" for name, count in measured.commonest]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


INTRODUCTION = """\
# Structure

The division of the product into packages, files and names, and the number of files and functions
that one lease runs through. This page is generated by

    {command}

"Before" is the version with a few large packages.
"""

METHOD = """\
How a lease is measured: the intake, the trainer and a sampler of GeoHop run with a profile function
(`tests/structure/traced.py`), with one tree of two branches per group, one group per batch and no
lag, so that leases follow one another. A lease consists of all calls of these processes from the
first `generate` of an engine to the end of the optimizer's step: the embedded engine, the
environment and its search, the stream, the intake, its journal, the trainer's socket, and the whole
step. The figures are medians over the leases of a run, on a quiet machine; on a busy machine a
lease takes longer and includes more of the periodic work of the processes. *Calls* are pairs of
functions of which one calls the other, whatever the number of calls; *moves* are the pairs whose
functions are in different files. A lambda or generator is part of the function that contains it.
*Files that accept one subtree* are the files that the intake runs through from the call of the
function that receives the message to its return, and the file of its caller. Libraries and
generated stubs are not counted.

The targets for files and moves refer to an earlier count, of which only the figures are known: 57
files, 389 functions and 630 moves before. Its number of functions agrees with the one here; its
files and moves were counted by another rule.

Levels are the length of the longest chain of imports between the children of a package, arrows the
pairs of children of which one imports the other.
"""

COMMONEST = """\
## Names that are defined most often

Functions and methods of the product; protocols and their implementations among them.
"""

PACKAGES = """\
## Packages{which}
"""
