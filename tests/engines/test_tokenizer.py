from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Bpe

from services.sampler.text.tokenizer import Tokenizer
from tests.engines import builders
from treegrpo.core.question import Message
from treegrpo.errors import ModelError

pytestmark = pytest.mark.pure

CHAT = (Message("system", "Search."), Message("user", "Which river?"))


def test_encoding_adds_nothing_and_decoding_drops_nothing(tmp_path: Path) -> None:
    builders.save_tokenizer(tmp_path)
    tokenizer = Tokenizer.open(tmp_path)
    text = f"<search>né ☃ , the river .{builders.END}\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == builders.VOCABULARY


def test_tokenizer_json_is_taken_as_it_is_whatever_the_model(tmp_path: Path) -> None:
    builders.save_model(tmp_path, "qwen2")
    text = "the rivER's 2024 river\r\n town"
    own = Bpe.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    assert Tokenizer.open(tmp_path).encode(text).tolist() == own


def test_end_of_sequence_ids_come_from_all_three_files(tmp_path: Path) -> None:
    builders.save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": 7}), encoding="utf-8")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}), encoding="utf-8")
    assert Tokenizer.open(tmp_path).eos == {0, 7, 8, 9}


def test_a_prompt_is_rendered_by_the_chat_template(tmp_path: Path) -> None:
    builders.save_tokenizer(tmp_path)
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.decode(tokenizer.render(CHAT)) == "[system] Search.\n[user] Which river?\n[assistant] "


def test_without_a_template_a_prompt_is_its_contents(tmp_path: Path) -> None:
    builders.save_tokenizer(tmp_path)
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.decode(tokenizer.render(CHAT)) == "Search.\nWhich river?"


@pytest.mark.parametrize("content", [None, "{broken"])
def test_missing_or_broken_files_are_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=str(tmp_path)):
        Tokenizer.open(tmp_path)
