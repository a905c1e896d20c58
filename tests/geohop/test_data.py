"""The shipped questions against the shipped corpus, followed hop by hop by a reader that knows no plans."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from examples.geohop.facts import load_world
from examples.geohop.make_data import COUNTS, DATA, SEED, TOPK, ReachabilityFilter, Split, corpus, items, pool, row
from services.retriever.index import Index, load_corpus

CITY = re.compile(r"(?P<name>.+) is a city in (?P<country>.+?)(?: near (?P<near>.+))? with (?P<people>\d+) thousand people\.")
COUNTRY = re.compile(
    r"(?P<name>.+) is a country in (?P<continent>.+): capital (?P<capital>.+), currency (?P<currency>.+), "
    r"phone code (?P<phone>.+), (?P<people>\d+) thousand people(?:, largest neighbour (?P<neighbour>.+))?\."
)


@cache
def shipped_index() -> Index:
    return Index(load_corpus(DATA / "corpus.jsonl"))


@cache
def rows(split: Split) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


class FactReader:
    """Looks places up, one search each, and counts them."""

    def __init__(self) -> None:
        self.searches = 0

    def look_up(self, name: str) -> Mapping[str, str]:
        self.searches += 1
        for hit in shipped_index().search(name, TOPK):
            title, _, text = hit.document.contents.partition("\n")
            if title == name:
                facts = CITY.fullmatch(text) or COUNTRY.fullmatch(text)
                assert facts, text
                return facts.groupdict()
        raise AssertionError(f"{name} is not among the first documents")

    def follow(self, city: str, *links: str) -> str:
        """The fact at the end of a chain: each link but the last names a place to look up."""
        found = self.look_up(city)
        for link, further in pairwise(links):
            found = self.look_up(found[link])
            assert further in found
        return found[links[-1]]

    def compare(self, family: str, one: str, other: str) -> str:
        first, second = self.look_up(one), self.look_up(other)
        if family == "same_country":
            return "yes" if first["country"] == second["country"] else "no"
        return max(first, second, key=lambda place: int(place["people"]))["name"]


CHAINS = {
    "country": ("In which country does (.+) lie?", ("country",)),
    "near": ("Which bigger city is (.+) near?", ("near",)),
    "near_people": ("How many thousand people live in the bigger city near (.+)?", ("near", "people")),
    "currency": ("What is the currency of the country of (.+)?", ("country", "currency")),
    "capital": ("What is the capital of the country of (.+)?", ("country", "capital")),
    "capital_people": (
        "How many thousand people live in the capital of the country of (.+)?",
        ("country", "capital", "people"),
    ),
    "neighbour_capital": (
        "What is the capital of the largest neighbour of the country of (.+)?",
        ("country", "neighbour", "capital"),
    ),
    "neighbour_phone": (
        "What is the phone code of the largest neighbour of the country of (.+)?",
        ("country", "neighbour", "phone"),
    ),
}
COMPARISONS = {
    "same_country": "Do (.+) and (.+) lie in the same country?",
    "more_people": "Which city has more people, (.+) or (.+)?",
}


def asked(one: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The family of a row and the cities it names."""
    family = one["extra_info"]["family"]
    pattern = (COMPARISONS.get(family) or CHAINS[family][0]).replace("?", r"\?")
    found = re.fullmatch(pattern, one["prompt"][0]["content"])
    assert found, one
    return family, found.groups()


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_answer_takes_as_many_searches_as_its_family_has_hops(split: Split) -> None:
    for one in rows(split):
        family, names = asked(one)
        reader = FactReader()
        links = CHAINS[family][1] if family in CHAINS else ()
        answer = reader.follow(names[0], *links) if links else reader.compare(family, *names)
        assert [answer] == one["reward_model"]["ground_truth"]["target"], one
        assert reader.searches == len(links or names)


def test_the_splits_share_no_question_and_no_city() -> None:
    questions: dict[str, set[str]] = {}
    cities: dict[str, set[str]] = {}
    for split in COUNTS:
        questions[split] = {one["prompt"][0]["content"] for one in rows(split)}
        read = [(family, name, FactReader().look_up(name)) for family, names in map(asked, rows(split)) for name in names]
        needed = {place["near"] for family, _, place in read if family == "near_people"}
        cities[split] = {name for _, name, _ in read} | needed
    for found in (questions, cities):
        assert found["train"].isdisjoint(found["heldout"])


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_families_are_equally_frequent_and_the_rows_are_search_r1s(split: Split) -> None:
    found = rows(split)
    assert len(found) == len({one["prompt"][0]["content"] for one in found}) == COUNTS[split]
    assert set(Counter(asked(one)[0] for one in found).values()) == {COUNTS[split] // len({**CHAINS, **COMPARISONS})}
    assert [one["extra_info"]["index"] for one in found] == list(range(len(found)))
    assert {(one["data_source"], one["extra_info"]["split"], one["reward_model"]["style"]) for one in found} == {
        ("geohop", split, "rule")
    }


def test_the_first_documents_hold_distractors() -> None:
    shown = [len(shipped_index().search(name, TOPK)) for one in rows("heldout") for name in asked(one)[1]]
    assert sum(count > 1 for count in shown) > len(shown) / 4


def test_the_script_makes_the_shipped_files_again() -> None:
    world = load_world()
    documents = corpus(world)
    assert documents == shipped_index().documents
    some = list(items(pool(world, "heldout"), ReachabilityFilter(shipped_index()), 30, SEED))
    assert [row(item, "heldout", place) for place, item in enumerate(some)] == rows("heldout")[:30]
    assert all(item.right[-1].text == item.answer for item in some)
    assert all(len(plan) <= len(item.right) for item in some for plan in item.tempting)
