"""The measures themselves, on small made-up sources and traces."""

from __future__ import annotations

from pathlib import Path

from tests.structure.lease import INTAKE, Call, LeasePath, leases
from tests.structure.names import classes_named_twice, long_test_names, missing_replacements, patched_constants, retired_words
from tests.structure.source import Checkout, Package

SAMPLER = "services.sampler"
ENGINE, EXPANDER = "services/sampler/engines/base.py:Engine.generate", "services/sampler/expander.py:Expander.expand"
SERVICER, ACCEPT = "learner/intake/rpc.py:Servicer.handle", "learner/intake/table.py:Table.accept_subtree"
LEDGER = "learner/intake/ledger.py:Ledger.charge"


def test_a_circle_and_its_levels_are_seen(tmp_path: Path) -> None:
    files = {
        "treegrpo/__init__.py": "",
        "treegrpo/low/__init__.py": "",
        "treegrpo/low/one.py": "from treegrpo.high import two\n",
        "treegrpo/high/__init__.py": "",
        "treegrpo/high/two.py": "import treegrpo.low.one\n",
        "treegrpo/top.py": "from treegrpo.high.two import x\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = {package.name: package for package in Checkout.parse(tmp_path).packages}
    assert found["treegrpo"] == Package("treegrpo", files=1, levels=2, arrows=3, circles=(("high", "low"),))


def test_names_that_break_the_rules_are_seen(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text(
        "class Same: ...\nclass Same: ...\n"
        "def test_x(monkeypatch, module):\n"
        "    desk = monkeypatch.setattr(module, 'LIMIT_SECONDS', 1)\n"
        "    monkeypatch.setattr('a.b.LIMIT', 1)\n"
        "    module.LIMIT = 2\n"
        "    monkeypatch.setattr(module, 'method', desk)\n"
        "    print(f'{module._desk}')\n"
        "    module.TheClerk()\n"
    )
    checkout = Checkout.parse(tmp_path, ("tests",))
    assert list(classes_named_twice(checkout)) == ["Same"]
    assert {found.rpartition(" ")[2] for found in patched_constants(checkout)} == {"LIMIT_SECONDS", "a.b.LIMIT", "module.LIMIT"}
    found = {line.partition(" is")[0] for line in retired_words(checkout.modules, {"desk": "coordinator"}, ["clerk"])}
    assert found == {
        "tests/test_it.py:4: desk",
        "tests/test_it.py:7: desk",
        "tests/test_it.py:8: _desk",
        "tests/test_it.py:9: TheClerk",
    }
    assert list(missing_replacements(checkout.modules, {"old": "desk", "older": "gone"})) == ["older: gone is in no module"]
    assert list(long_test_names(checkout, 5)) == ["tests/test_it.py:3: test_x (6)"]


def test_a_lease_reaches_from_the_engine_to_the_step() -> None:
    calls = [
        Call(1, "trainer", "-", "torch:step"),
        Call(2, INTAKE, "-", SERVICER),  # before the engine: of no lease
        Call(3, SAMPLER, EXPANDER, ENGINE),
        Call(4, SAMPLER, EXPANDER, ENGINE),
        Call(5, INTAKE, SERVICER, ACCEPT),
        Call(6, INTAKE, ACCEPT, LEDGER),
        Call(7, INTAKE, "-", f"return:{ACCEPT}"),
        Call(8, INTAKE, "-", "learner/intake/journal.py:Journal.flush"),
        Call(9, "trainer", "-", "torch:step"),
        Call(10, SAMPLER, EXPANDER, ENGINE),  # and no step after it
    ]
    (path,) = leases(calls)
    assert path.functions == {ENGINE, ACCEPT, LEDGER, "learner/intake/journal.py:Journal.flush"}
    assert path.moves == {(EXPANDER, ENGINE), (SERVICER, ACCEPT), (ACCEPT, LEDGER)}
    assert path.accepting() == {"learner/intake/rpc.py", "learner/intake/table.py", "learner/intake/ledger.py"}


def test_calls_within_a_file_are_no_moves() -> None:
    path = LeasePath((Call(1, INTAKE, ACCEPT, "learner/intake/table.py:Table.add"),))
    assert path.moves == frozenset()
