"""Makes GeoHop's corpus and question files: ``python -m examples.geohop.make_data``.

facts ─► corpus (one document per place) ─► pools (cities of a split) ─► items ─► only those the retriever can serve ─► rows
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from examples.geohop.facts import City, Country, World, load_world
from examples.geohop.families import FAMILIES, Item, QuestionPool
from services.retriever.index import Document, Index

Split = Literal["train", "heldout"]

DATA = Path(__file__).parent / "data"
TOPK = 2
SEED = 7
COUNTS: Mapping[Split, int] = {"train": 4000, "heldout": 200}
_HELDOUT_SHARE = 0.15


def corpus(world: World) -> list[Document]:
    """One short document per country and city."""
    return [
        *(Document(id=place.id, contents=f"{place.name}\n{_country_text(place)}") for place in world.countries),
        *(Document(id=place.id, contents=f"{place.name}\n{_city_text(place)}") for place in world.cities),
    ]


def _country_text(country: Country) -> str:
    neighbour = f", largest neighbour {country.neighbour}" if country.neighbour else ""
    return (
        f"{country.name} is a country in {country.continent}: capital {country.capital}, currency {country.currency}, "
        f"phone code {country.phone}, {country.thousands} thousand people{neighbour}."
    )


def _city_text(city: City) -> str:
    near = f" near {city.near}" if city.near else ""
    return f"{city.name} is a city in {city.country}{near} with {city.thousands} thousand people."


def pool(world: World, split: Split) -> QuestionPool:
    """The cities of a split. Held-out are those whose hash falls under `_HELDOUT_SHARE`."""
    heldout = split == "heldout"
    return QuestionPool(world, frozenset(city.id for city in world.cities if (_hash(city.id) < _HELDOUT_SHARE) is heldout))


def _hash(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


class ReachabilityFilter:
    """Tests whether the retriever finds every document that an item's right plan searches for."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._finds = cache(self._find)

    def __call__(self, item: Item) -> bool:
        """True when each search of the plan has its place among the first documents."""
        return all(self._finds(query) for query in item.searches)

    def _find(self, query: str) -> bool:
        return any(hit.document.contents.startswith(f"{query}\n") for hit in self._index.search(query, TOPK))


def items(pool: QuestionPool, reachable: ReachabilityFilter, count: int, seed: int) -> Iterator[Item]:
    """``count`` different questions, the families in turn."""
    rng = random.Random(seed)
    asked: set[str] = set()
    while len(asked) < count:
        item = FAMILIES[len(asked) % len(FAMILIES)](pool, rng)
        if item is not None and item.question not in asked and reachable(item):
            asked.add(item.question)
            yield item


def row(item: Item, split: Split, place: int) -> dict[str, Any]:
    """One question in Search-R1's row format."""
    return {
        "data_source": "geohop",
        "prompt": [{"role": "user", "content": item.question}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": [item.answer]}},
        "extra_info": {"split": split, "index": place, "family": item.family},
    }


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows), encoding="utf-8")


def make_data_files(folder: Path, world: World, documents: Sequence[Document]) -> None:
    """Write the corpus and both question files into ``folder``."""
    write_jsonl(folder / "corpus.jsonl", (document.model_dump() for document in documents))
    reachable = ReachabilityFilter(Index(documents))
    for split, count in COUNTS.items():
        found = items(pool(world, split), reachable, count, SEED)
        write_jsonl(folder / f"{split}.jsonl", (row(item, split, place) for place, item in enumerate(found)))


if __name__ == "__main__":
    facts = load_world()
    make_data_files(DATA, facts, corpus(facts))
