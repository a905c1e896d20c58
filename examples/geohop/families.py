"""The question families of GeoHop: the questions, the plans that answer them, and the tempting shortcuts.

An item carries its question, the plan that answers it (searches, then an answer) and the tempting plans: they stop early and
answer with a value that does stand in the documents. The data files hold questions and answers only; the plans make
the demonstrations for the warm start.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from examples.geohop.facts import City, Country, World

_PLAIN = re.compile(r"[A-Z][A-Za-z' -]{2,13}")
_CLEAR_RATIO = 2.0
_RARE = 4
_STOP = "that is it"


@dataclass(frozen=True, slots=True)
class PlannedTurn:
    """One action of a plan: a search, or the answer that ends it."""

    think: str
    kind: str
    text: str

    def __str__(self) -> str:
        # The space keeps a name the same tokens here as in a question or a document, so that it can be copied.
        return f"<think> {self.think}</think><{self.kind}> {self.text}</{self.kind}>"


EpisodePlan = tuple[PlannedTurn, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """One question with its plans."""

    family: str
    question: str
    answer: str
    right: EpisodePlan
    tempting: tuple[EpisodePlan, ...]
    cities: tuple[str, ...]
    """The cities the question names, or whose facts it asks for: what the split keeps apart."""

    @property
    def searches(self) -> tuple[str, ...]:
        """The queries of the right plan: one per hop."""
        return tuple(turn.text for turn in self.right if turn.kind == "search")


@dataclass(frozen=True)
class QuestionPool:
    """The cities that one split asks about."""

    world: World
    members: frozenset[str]
    """Ids of the cities of the split."""

    @cached_property
    def by_name(self) -> Mapping[str, Country | City]:
        """The places of the world with a unique name."""
        unique = self.world.unique_names()
        return {place.name: place for place in (*self.world.cities, *self.world.countries) if place.name in unique}

    @cached_property
    def cities(self) -> Mapping[str, list[City]]:
        """By country, the cities of the split with plain, unique names; at least two."""
        found: dict[str, list[City]] = {}
        for city in self.world.cities:
            own = city.name in self.by_name and city.country in self.by_name
            if own and city.id in self.members and _PLAIN.fullmatch(city.name):
                found.setdefault(city.country, []).append(city)
        return {name: cities for name, cities in found.items() if len(cities) >= 2}

    @cached_property
    def rare_currencies(self) -> frozenset[str]:
        """Names of currencies of few countries: an answer that cannot be guessed."""
        names = [country.currency for country in self.world.countries]
        return frozenset(name for name in names if names.count(name) <= _RARE)

    def draw_city(self, rng: random.Random) -> tuple[City, Country]:
        """A city and its country: every country is equally likely, so that none can be memorised."""
        name = rng.choice(list(self.cities))
        return rng.choice(self.cities[name]), self.country(name)

    def country(self, name: str) -> Country:
        """The country called ``name``."""
        place = self.by_name[name]
        if not isinstance(place, Country):
            raise KeyError(name)
        return place

    def city(self, name: str | None) -> City | None:
        """The city called ``name`` if only one place is."""
        place = self.by_name.get(name or "")
        return place if isinstance(place, City) else None

    def neighbour(self, country: Country) -> Country | None:
        """The largest neighbour of ``country`` if its name is unique."""
        place = self.by_name.get(country.neighbour or "")
        return place if isinstance(place, Country) else None


Family = Callable[[QuestionPool, random.Random], Item | None]


def _look_up(think: str, name: str) -> PlannedTurn:
    return PlannedTurn(think, "search", name)


def _answer(text: str, think: str = _STOP) -> PlannedTurn:
    return PlannedTurn(think, "answer", text)


def country_of_city(pool: QuestionPool, rng: random.Random) -> Item | None:
    """1 hop."""
    city, country = pool.draw_city(rng)
    first = _look_up("the city", city.name)
    right = (first, _answer(country.name))
    tempting = ((first, _answer(city.near)),) if city.near else ()
    return Item("country", f"In which country does {city.name} lie?", country.name, right, tempting, (city.name,))


def near_city(pool: QuestionPool, rng: random.Random) -> Item | None:
    """1 hop."""
    city, country = pool.draw_city(rng)
    near = pool.city(city.near)
    if near is None or near.country != country.name:
        return None
    first = _look_up("the city", city.name)
    tempting = ((first, _answer(country.name)),)
    question = f"Which bigger city is {city.name} near?"
    return Item("near", question, near.name, (first, _answer(near.name)), tempting, (city.name,))


def near_people(pool: QuestionPool, rng: random.Random) -> Item | None:
    """2 hops; tempting: the people of the city itself."""
    city, _ = pool.draw_city(rng)
    near = pool.city(city.near)
    if near is None or near.id not in pool.members or near.thousands == city.thousands:
        return None
    first = _look_up("the city", city.name)
    right = (first, _look_up("the bigger city", near.name), _answer(str(near.thousands)))
    question = f"How many thousand people live in the bigger city near {city.name}?"
    tempting = ((first, _answer(str(city.thousands))),)
    return Item("near_people", question, str(near.thousands), right, tempting, (city.name, near.name))


def currency(pool: QuestionPool, rng: random.Random) -> Item | None:
    """2 hops; tempting: the country's name."""
    city, country = pool.draw_city(rng)
    if country.currency not in pool.rare_currencies:
        return None
    first = _look_up("the city", city.name)
    right = (first, _look_up("the country", country.name), _answer(country.currency))
    question = f"What is the currency of the country of {city.name}?"
    return Item("currency", question, country.currency, right, ((first, _answer(country.name)),), (city.name,))


def capital(pool: QuestionPool, rng: random.Random) -> Item | None:
    """2 hops; tempting: the bigger city that stands in the city's document."""
    city, country = pool.draw_city(rng)
    if city.near in (None, country.capital) or city.name == country.capital:
        return None
    first = _look_up("the city", city.name)
    right = (first, _look_up("the country", country.name), _answer(country.capital))
    question = f"What is the capital of the country of {city.name}?"
    return Item("capital", question, country.capital, right, ((first, _answer(city.near)),), (city.name,))


def capital_people(pool: QuestionPool, rng: random.Random) -> Item | None:
    """3 hops; tempting: the people of the country, or of the city."""
    city, country = pool.draw_city(rng)
    main = pool.city(country.capital)
    if main is None or main.country != country.name or main == city or main.thousands == city.thousands:
        return None
    first, second = _look_up("the city", city.name), _look_up("the country", country.name)
    right = (first, second, _look_up("the capital", main.name), _answer(str(main.thousands)))
    tempting = ((first, second, _answer(str(country.thousands))), (first, _answer(str(city.thousands))))
    question = f"How many thousand people live in the capital of the country of {city.name}?"
    return Item("capital_people", question, str(main.thousands), right, tempting, (city.name,))


def neighbour_capital(pool: QuestionPool, rng: random.Random) -> Item | None:
    """3 hops; tempting: the country's own capital, or the neighbour's name."""
    city, country = pool.draw_city(rng)
    neighbour = pool.neighbour(country)
    if neighbour is None:
        return None
    first, second = _look_up("the city", city.name), _look_up("the country", country.name)
    right = (first, second, _look_up("the neighbour", neighbour.name), _answer(neighbour.capital))
    tempting = ((first, second, _answer(country.capital)), (first, second, _answer(neighbour.name)))
    question = f"What is the capital of the largest neighbour of the country of {city.name}?"
    return Item("neighbour_capital", question, neighbour.capital, right, tempting, (city.name,))


def neighbour_phone(pool: QuestionPool, rng: random.Random) -> Item | None:
    """3 hops; tempting: the country's own phone code."""
    city, country = pool.draw_city(rng)
    neighbour = pool.neighbour(country)
    if neighbour is None or neighbour.phone == country.phone:
        return None
    first, second = _look_up("the city", city.name), _look_up("the country", country.name)
    right = (first, second, _look_up("the neighbour", neighbour.name), _answer(neighbour.phone))
    tempting = ((first, second, _answer(country.phone)),)
    question = f"What is the phone code of the largest neighbour of the country of {city.name}?"
    return Item("neighbour_phone", question, neighbour.phone, right, tempting, (city.name,))


def same_country(pool: QuestionPool, rng: random.Random) -> Item | None:
    """Comparison; tempting: a guess after the first city."""
    city, country = pool.draw_city(rng)
    other = rng.choice(pool.cities[country.name]) if rng.random() < 0.5 else pool.draw_city(rng)[0]
    if other == city:
        return None
    answer = "yes" if other.country == city.country else "no"
    first, second = _look_up("the city", city.name), _look_up("the other city", other.name)
    right = (first, second, _answer(answer, f"{city.country} and {other.country}"))
    tempting = ((first, _answer("no")), (first, _answer("yes")))
    question = f"Do {city.name} and {other.name} lie in the same country?"
    return Item("same_country", question, answer, right, tempting, (city.name, other.name))


def more_people(pool: QuestionPool, rng: random.Random) -> Item | None:
    """Comparison; tempting: a guess after the first city."""
    city, other = pool.draw_city(rng)[0], pool.draw_city(rng)[0]
    small, large = sorted((city, other), key=lambda place: place.thousands)
    if large.thousands < _CLEAR_RATIO * small.thousands:
        return None
    first, second = _look_up("the city", city.name), _look_up("the other city", other.name)
    right = (first, second, _answer(large.name, f"{city.thousands} or {other.thousands}"))
    tempting = ((first, _answer(city.name)), (first, _answer(other.name)))
    question = f"Which city has more people, {city.name} or {other.name}?"
    return Item("more_people", question, large.name, right, tempting, (city.name, other.name))


FAMILIES: tuple[Family, ...] = (
    country_of_city,
    near_city,
    near_people,
    currency,
    capital,
    capital_people,
    neighbour_capital,
    neighbour_phone,
    same_country,
    more_people,
)
