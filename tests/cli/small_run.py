"""A complete small run in a folder: the shipped warm start, a few documents and questions, free ports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.ports import free_address, free_ports

GEOHOP = Path(__file__).parents[2] / "examples" / "geohop"


def question(index: int, city: str, answer: str | None) -> dict[str, Any]:
    truth = {} if answer is None else {"target": [answer]}
    return {
        "data_source": "test",
        "prompt": [{"role": "user", "content": f"In which country does {city} lie?"}],
        "ability": "fact",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": "train", "index": index, "family": "country"},
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class SmallRun:
    """A folder with everything `treegrpo up` needs; `flags` says where."""

    def __init__(self, folder: Path) -> None:
        cities = ["Borikhan", "Pakxan", "Ghazni", "Guelma", "Pirapora", "Mubi", "Gombi", "Thakhek"]
        unseen = ["Attapeu", "Champasak"]
        self.folder = folder
        self.run_dir = folder / "run"
        self.corpus = write_rows(
            folder / "corpus.jsonl",
            [{"id": city, "contents": f"{city}\n{city} is a city in Laos near Pakxan."} for city in (*cities, *unseen)],
        )
        self.train = write_rows(folder / "train.jsonl", [question(n, city, "Laos") for n, city in enumerate(cities)])
        self.heldout = write_rows(folder / "heldout.jsonl", [question(9 + n, city, "Laos") for n, city in enumerate(unseen)])
        self.keys: dict[str, str] = {
            "run.name": "test",
            "run.dir": str(self.run_dir),
            "model.path": str(GEOHOP / "model"),
            "data.train": str(self.train),
            "data.heldout": str(self.heldout),
            "retriever.corpus": str(self.corpus),
            "retriever.listen": free_address(),
            "broker.address": free_address(),
            "learner.listen": free_address(),
            "learner.metrics": f"127.0.0.1:{free_ports(2)[0]}",
            "rollout.max_turns": "1",
            "rollout.max_action_tokens": "8",
            "rollout.max_context": "256",
            "environment.max_observation_tokens": "128",
            "train.batch": "2",
            "train.steps": "2",
            "sampler.count": "1",
            "train.kl_coef": "0",
        }

    def flags(self, **changes: str) -> list[str]:
        """Flags of the configuration; ``changes`` are written with _ for the dot, like train__steps="3"."""
        keys = {**self.keys, **{name.replace("__", "."): value for name, value in changes.items()}}
        return [part for key, value in keys.items() for part in (f"--{key}", value)]
