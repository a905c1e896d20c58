from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from treegrpo.errors import ModelError
from treegrpo.storage.model_config import check_context, read_model_config

pytestmark = pytest.mark.pure

GOOD: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 64, "max_position_embeddings": 128, "eos_token_id": 3}


def written(folder: Path, config: object = None, generation: str | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(GOOD if config is None else config), encoding="utf-8")
    if generation is not None:
        (folder / "generation_config.json").write_text(generation, encoding="utf-8")
    return folder


def test_both_files_are_read(tmp_path: Path) -> None:
    found = read_model_config(written(tmp_path, generation='{"eos_token_id": [8, 9]}'))
    assert (found.kind, found.vocabulary, found.context, found.tied, found.eos) == ("qwen2", 64, 128, None, {3, 8, 9})


def test_a_multimodal_model_is_read_by_its_text_config(tmp_path: Path) -> None:
    found = read_model_config(written(tmp_path, {"model_type": "gemma3", "text_config": GOOD | {"tie_word_embeddings": True}}))
    assert (found.kind, found.vocabulary, found.tied) == ("gemma3", 64, True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vocab_size": None}, "vocab_size None"),
        ({"vocab_size": True}, "vocab_size True"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"vocab_size": "64"}, "vocab_size '64'"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers '4'"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"max_position_embeddings": 1.5}, "max_position_embeddings 1.5"),
        ({"model_type": 7}, "model_type 7"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes'"),
        ({"eos_token_id": "<|end|>"}, "eos_token_id '<|end|>'"),
        ({"eos_token_id": [3, None]}, "eos_token_id [3, None]"),
        ({"eos_token_id": -1}, "eos_token_id -1"),
        ({"text_config": []}, "text_config []"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_file(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError) as refusal:
        read_model_config(written(tmp_path, GOOD | change))
    assert str(refusal.value).startswith(f"{tmp_path / 'config.json'} has {says}")
    assert "restore it from the model's source" in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "says"), [("{", "is not valid JSON"), ("[]", "is not a JSON object"), ("", "is not valid JSON")]
)
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=f"config.json {says}"):
        read_model_config(tmp_path)


def test_a_directory_that_is_not_there_or_has_no_config_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_model_config(tmp_path)
    with pytest.raises(ModelError, match="there is no such directory"):
        read_model_config(tmp_path / "absent")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json cannot be read \(Is a directory\)"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "is not valid JSON"), ("[1]", "is not a JSON object"), ('{"eos_token_id": "<|end|>"}', "has eos_token_id '<|end|>'")],
)
def test_a_generation_config_that_is_broken_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ModelError) as refusal:
        read_model_config(written(tmp_path, generation=text))
    assert f"generation_config.json {says}" in str(refusal.value)


def test_a_context_beyond_the_positions_of_the_model_is_refused(tmp_path: Path) -> None:
    config = read_model_config(written(tmp_path))
    check_context(config, 128)
    with pytest.raises(ModelError, match=r"allows 128 positions .* rollout\.max_context = 129 .* lower the context"):
        check_context(config, 129)
