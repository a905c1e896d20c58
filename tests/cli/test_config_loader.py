from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from services.cli.commands import as_toml
from treegrpo.config.loader import config_from_arguments, flag_parser, load_config
from treegrpo.config.schema import Config
from treegrpo.config.train import Correction, Estimator, Loss
from treegrpo.errors import ConfigError

pytestmark = pytest.mark.pure


def toml(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_the_environment_which_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toml(tmp_path, "[train]\nlr = 1e-3\nbatch = 3\nsteps = 3\n")
    monkeypatch.setenv("TREEGRPO_TRAIN__BATCH", "4")
    monkeypatch.setenv("TREEGRPO_TRAIN__STEPS", "4")
    train = load_config(path, ["--train.steps", "5"]).train
    assert (train.lr, train.batch, train.steps) == (1e-3, 4, 5)


def test_without_any_source_the_defaults_stand() -> None:
    assert load_config(None) == Config()


def test_input_paths_of_a_file_are_relative_to_it_and_others_are_not(tmp_path: Path) -> None:
    config = load_config(toml(tmp_path, '[model]\npath = "m"\n[run]\ndir = "r"\n'), ["--data.train", "t.jsonl"])
    assert config.model.path == tmp_path / "m"
    assert config.run.dir == Path("r")
    assert config.data.train == Path("t.jsonl")


def test_a_flag_may_be_joined_to_its_value() -> None:
    assert load_config(None, ["--train.std_floor=0.1", "--run.seed=3"]).train.std_floor == 0.1


def test_the_file_comes_first_among_a_commands_arguments(tmp_path: Path) -> None:
    path = toml(tmp_path, "[train]\nbatch = 7\n")
    assert config_from_arguments([str(path), "--train.steps", "2"]).train.batch == 7
    assert config_from_arguments(["--train.steps", "2"]).train.steps == 2


@pytest.mark.parametrize("text", ["[train]\nlrr = 1", "[trian]\nlr = 1", "lr = 1"])
def test_an_unknown_key_of_the_file_names_the_file_and_the_nearest_key(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml: .*; the nearest is train\.\w+\."):
        load_config(toml(tmp_path, text))


@pytest.mark.parametrize("name", ["TREEGRPO_TRAIN__LRR", "TREEGRPO_TRIAN__LR"])
def test_an_unknown_variable_is_named_with_the_nearest_key(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "s3cret")
    with pytest.raises(ConfigError, match=rf"{name}.*the nearest is train\.lr\.") as caught:
        load_config(None)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("flag", ["--train.lrr", "--trian.lr", "--train.l"])
def test_an_unknown_flag_is_named_with_the_nearest_key(flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"the flag {flag}: .*the nearest is train\.lr\."):
        load_config(None, [flag, "3"])


@pytest.mark.parametrize("flag", ["--resume", "--run.resume"])
def test_a_key_of_an_earlier_version_is_refused_with_what_is_right_now(tmp_path: Path, flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"the flag {flag}: .* is gone: a run continues by itself"):
        load_config(None, [flag, "true"])
    with pytest.raises(ConfigError, match=r"run\.toml: run\.resume is gone: a run continues by itself"):
        load_config(toml(tmp_path, "[run]\nresume = true"))


@pytest.mark.parametrize("key", ["run.seed", "rollout.trees", "rollout.max_turns", "rollout.max_action_tokens"])
def test_a_number_that_no_part_could_use_or_send_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} = .* is not acceptable: input should be less than"):
        load_config(None, [f"--{key}", str(2**32)])


def test_a_value_that_does_not_fit_names_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"train\.lr = -1 \(.*run\.toml\) is not acceptable: .*greater than 0"):
        load_config(toml(tmp_path, "[train]\nlr = -1"))
    with pytest.raises(ConfigError, match=r"train\.lr = 'x' \(the flag --train\.lr\)"):
        load_config(toml(tmp_path, "[train]\nlr = -1"), ["--train.lr", "x"])
    monkeypatch.setenv("TREEGRPO_TRAIN__LR", "y")
    with pytest.raises(ConfigError, match=r"train\.lr = 'y' \(the environment variable TREEGRPO_TRAIN__LR\)"):
        load_config(toml(tmp_path, "[train]\nlr = -1"))


@pytest.mark.parametrize(
    ("flags", "sentence"), [(["--train.lr"], "expected one argument"), (["word"], "unrecognized arguments: word")]
)
def test_flags_that_cannot_be_read_say_how_to_write_them(flags: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"{sentence}; a key is written --section.key VALUE"):
        load_config(None, flags)


def test_a_section_given_as_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train is a section"):
        load_config(toml(tmp_path, "train = 3"))


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml does not exist"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"run\.toml is not valid TOML"):
        load_config(toml(tmp_path, "train ="))


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(None).train.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_what_dry_run_prints_is_a_file_that_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(None, ["--run.name", "x", "--train.lr", "3e-5", "--model.path", str(tmp_path / 'a "b"')])
    assert load_config(toml(Path(), as_toml(config))) == config


CHOICES = [
    *({"loss": loss} for loss in get_args(Loss)),
    *({"correction": correction} for correction in get_args(Correction)),
    *({"estimator": estimator} for estimator in get_args(Estimator)),
    {"loss": "dppo", "dppo_delta": "0.1", "correction": "icepop", "icepop_low": "0.9", "kl_coef": "0"},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: " ".join(choice.values()))
def test_what_dry_run_prints_can_be_read_again_whatever_was_chosen(tmp_path: Path, choice: dict[str, str]) -> None:
    config = load_config(None, [f"--train.{key}={value}" for key, value in choice.items()])
    assert load_config(toml(tmp_path, as_toml(config))).train == config.train


def test_what_dry_run_prints_for_ppo_is_no_file_for_gspo(tmp_path: Path) -> None:
    path = toml(tmp_path, as_toml(load_config(None)))
    with pytest.raises(ConfigError, match=r"train\.clip_low = 0\.2 \(.*run\.toml\).*train\.loss = gspo.*leave it out"):
        load_config(path, ["--train.loss", "gspo"])


def test_the_help_explains_every_key() -> None:
    text = flag_parser().format_help()
    keys = [f"--{section}.{key} " for section, values in Config().model_dump().items() for key in values]
    assert all(key in text for key in keys)


def test_a_variable_with_one_underscore_is_an_error_not_a_silent_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREEGRPO_TRAIN_LR", "9")
    with pytest.raises(ConfigError, match=r"TREEGRPO_SECTION__KEY.*the nearest is train\.lr"):
        load_config(None)


def test_a_configuration_file_behind_flags_is_told_where_it_goes() -> None:
    with pytest.raises(ConfigError, match="goes first"):
        config_from_arguments(["--train.steps", "3", "geohop.toml"])


def test_an_infinite_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.lr"):
        load_config(None, ["--train.lr", "inf"])


@pytest.mark.parametrize("key", ["retriever.url", "engine.urls", "broker.address", "sampler.learner", "learner.listen"])
@pytest.mark.parametrize(
    "place", ["http://me:s3cret@host:80/retrieve", "https://s3cret@host", "me:s3cret@host:1883", "http://me:s3cret/1?@host"]
)
def test_a_password_in_an_address_is_refused_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, place: str
) -> None:
    section, name = key.split(".")
    value = json.dumps([place]) if key == "engine.urls" else place
    with pytest.raises(ConfigError, match=r"security\.retriever_token") as of_flag:
        load_config(None, [f"--{key}", value])
    with pytest.raises(ConfigError) as of_file:
        load_config(toml(tmp_path, f"[{section}]\n{name} = {value if value[0] == '[' else json.dumps(value)}\n"))
    with pytest.raises(ConfigError) as of_a_wrong_name:
        load_config(None, [f"--{key}x={value}"])
    monkeypatch.setenv(f"TREEGRPO_{section}__{name}".upper(), value)
    with pytest.raises(ConfigError) as of_the_environment:
        load_config(None)
    for caught in (of_flag, of_file, of_a_wrong_name, of_the_environment):
        assert key in str(caught.value)
        assert "s3cret" not in str(caught.value)


def test_an_at_sign_in_a_path_is_no_password() -> None:
    for url in ("http://host/@me/retrieve?by=@me", "http://host:80/@me", "http://[::1]/@me"):
        assert load_config(None, ["--retriever.url", url]).retriever.url == url


def test_what_is_printed_as_toml_is_read_again_whatever_is_in_it(tmp_path: Path) -> None:
    config = load_config(None, ["--run.dir", "a\x1b\x9b\u202e\u2028\x7f[red]$é\n\"'\\"])
    text = as_toml(config)
    assert load_config(toml(tmp_path, text)).run == config.run
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_a_current_directory_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    with pytest.raises(ConfigError, match="The current directory is gone"):
        config_from_arguments([])


@pytest.mark.parametrize("flag", ["--run.name", "--retriever.url", "--model.path"])
def test_a_value_that_is_no_utf8_is_refused_with_its_flag(flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"{flag.removeprefix('--')} \(the flag {flag}\) is not UTF-8"):
        load_config(None, [flag, "caf\udce9"])


@pytest.mark.parametrize(("encoding", "says"), [("utf-16", "byte order mark of UTF-16"), ("utf-8-sig", "")])
def test_a_configuration_may_begin_with_a_byte_order_mark(encoding: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[run]\nname = "a"\n', encoding=encoding)
    if not says:
        assert load_config(path).run.name == "a"
        return
    with pytest.raises(ConfigError, match=says):
        load_config(path)
