from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.small_run import GEOHOP, SmallRun
from treegrpo.config.fingerprint import FILE_NAME, KEYS, MODEL, check_fingerprint, record_fingerprint
from treegrpo.config.loader import load_config
from treegrpo.config.schema import Config
from treegrpo.errors import ConfigError, DataError, RunFileError


def begun(folder: Path) -> SmallRun:
    """A run that has begun."""
    small_run = SmallRun(folder)
    small_run.run_dir.mkdir()
    record_fingerprint(configured(small_run), begun=False)
    return small_run


def configured(small_run: SmallRun, **changes: str) -> Config:
    return load_config(None, small_run.flags(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__steps": "500", "train__lr": "1e-3", "train__max_lag": "4", "train__loss": "cispo", "train__estimator": "rloo"},
        {
            "run__name": "other",
            "learner__listen": "127.0.0.1:1",
            "sampler__count": "9",
            "security__dir": "certs",
            "eval__every": "7",
        },
    ],
)
def test_what_a_run_is_not_made_of_may_change(tmp_path: Path, changes: dict[str, str]) -> None:
    check_fingerprint(configured(begun(tmp_path), **changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"run__seed": "5"}, r"run\.seed was 0 and is 5"),
        ({"train__batch": "4"}, r"train\.batch was 2 and is 4"),
        ({"eval__questions": "1"}, r"eval\.questions was 0 and is 1"),
        ({"environment__reward": "f1"}, r"environment\.reward was em and is f1"),
        (
            {"rollout__trees": "3", "rollout__temperature": "0.5"},
            r"rollout\.trees was 2 and is 3, rollout\.temperature was 1\.0 and is 0\.5",
        ),
    ],
)
def test_another_run_is_refused_with_the_keys_and_both_values(tmp_path: Path, changes: dict[str, str], sentence: str) -> None:
    small_run = begun(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"{small_run.run_dir} cannot resume with other settings: {sentence}\. Set them back .*run\.dir"
    ):
        check_fingerprint(configured(small_run, **changes))


def test_of_files_the_content_counts_not_where_they_lie(tmp_path: Path) -> None:
    small_run = begun(tmp_path)
    moved = shutil.copyfile(small_run.train, tmp_path / "moved.jsonl")
    model = shutil.copytree(GEOHOP / "model", tmp_path / "model")
    check_fingerprint(configured(small_run, data__train=str(moved), model__path=str(model)))
    with pytest.raises(ConfigError, match=rf"data\.train was {small_run.train} and is {small_run.heldout}\."):
        check_fingerprint(configured(small_run, data__train=str(small_run.heldout)))
    with small_run.heldout.open("a") as file:
        file.write("\n")
    with pytest.raises(ConfigError, match=rf"data\.heldout = {small_run.heldout} has changed since"):
        check_fingerprint(configured(small_run))


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer_config.json"],
)
def test_another_template_or_special_token_is_another_model(tmp_path: Path, name: str) -> None:
    small_run, model = begun(tmp_path), shutil.copytree(GEOHOP / "model", tmp_path / "model")
    (model / "README.md").write_text("no part of it")
    check_fingerprint(configured(small_run, model__path=str(model)))
    with (model / name).open("a") as file:
        file.write(" ")
    with pytest.raises(ConfigError, match=rf"model\.path was .* and is {model}\."):
        check_fingerprint(configured(small_run, model__path=str(model)))


def test_a_run_that_noted_less_of_its_model_goes_on(tmp_path: Path) -> None:
    small_run = begun(tmp_path)
    noted = json.loads((small_run.run_dir / FILE_NAME).read_text())
    del noted[MODEL]["text_sha256"]
    (small_run.run_dir / FILE_NAME).write_text(json.dumps(noted))
    check_fingerprint(configured(small_run))


def test_one_weight_is_another_model(tmp_path: Path) -> None:
    small_run, model = begun(tmp_path), shutil.copytree(GEOHOP / "model", tmp_path / "model")
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"!!")
    with pytest.raises(ConfigError, match=rf"model\.path was {GEOHOP / 'model'} and is {model}"):
        check_fingerprint(configured(small_run, model__path=str(model)))


def test_who_has_not_the_questions_compares_the_rest(tmp_path: Path) -> None:
    small_run = begun(tmp_path)
    small_run.train.unlink()
    check_fingerprint(configured(small_run), (*KEYS, MODEL))
    with pytest.raises(DataError, match=r"data\.train = .* cannot be read"):
        check_fingerprint(configured(small_run))


def test_what_an_earlier_version_began_becomes_what_it_is_told_to_be(tmp_path: Path) -> None:
    small_run = SmallRun(tmp_path)
    small_run.run_dir.mkdir()
    check_fingerprint(configured(small_run))
    record_fingerprint(configured(small_run, run__seed="7"), begun=True)
    with pytest.raises(ConfigError, match=r"run\.seed was 7 and is 8"):
        record_fingerprint(configured(small_run, run__seed="8"), begun=True)
    record_fingerprint(configured(small_run, run__seed="8"), begun=False)
    check_fingerprint(configured(small_run, run__seed="8"))


def test_a_damaged_record_is_named_with_the_remedy(tmp_path: Path) -> None:
    small_run = begun(tmp_path)
    (small_run.run_dir / FILE_NAME).write_text("{")
    with pytest.raises(RunFileError, match=r"run\.json is not what was written there .*; restore it, or"):
        check_fingerprint(configured(small_run))
