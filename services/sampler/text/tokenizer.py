"""Converts between text and token ids. Only environments and prompts need text; what the policy produced stays ids.

`Tokenizer.encode` and `Tokenizer.render` are the one way from text to ids. Contents are data: a control string in a
question, a document or a tool's answer is encoded as plain text. Control tokens come from the chat template, and from what an
environment writes itself (`Markup`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from services.environments.markup import Markup
from services.sampler.text.control_tokens import ControlTokens
from services.sampler.text.placeholders import render_pieces
from treegrpo.core.question import Message
from treegrpo.core.step import TokenIds
from treegrpo.errors import ModelError, describe
from treegrpo.storage.model_config import eos_ids
from treegrpo.storage.surrogates import replace_surrogates

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class Tokenizer:
    """A Hugging Face tokenizer, reduced to the calls that this project makes."""

    def __init__(self, tokenizer: Any, eos: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._template: str | None = _template_source(tokenizer.chat_template)
        self._control = ControlTokens(tokenizer.backend_tokenizer, self._template or "")
        self.eos = eos
        """Ids that end a sequence: the tokenizer's own and those of config.json and generation_config.json."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the tokenizer of a model directory.

        Raises:
            ModelError: its files are missing or cannot be read.
        """
        if not any((path / name).is_file() for name in FILES):
            raise ModelError(f"{path} has no tokenizer ({', '.join(FILES)}); save it beside the model.")
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # AutoTokenizer picks a class by the model's type, which may split text in its own way: tokenizer.json goes first.
        reader: Any = PreTrainedTokenizerFast if (path / "tokenizer.json").is_file() else AutoTokenizer
        try:
            tokenizer = reader.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a broken file surfaces as any of a dozen types
            raise ModelError(
                f"The tokenizer in {path} cannot be read ({describe(error)}); restore it from the model's source."
            ) from error
        if not tokenizer.is_fast:
            raise ModelError(f"The tokenizer in {path} has no fast version; save one as tokenizer.json (save_pretrained does).")
        own: int | None = tokenizer.eos_token_id
        return cls(tokenizer, frozenset([] if own is None else [own]) | eos_ids(path))

    def __len__(self) -> int:
        """Number of ids, added tokens included."""
        return len(self._tokenizer)

    @property
    def has_template(self) -> bool:
        """Whether prompts are rendered by a chat template."""
        return self._template is not None

    def check_fits(self, vocabulary: int, path: Path) -> None:
        """Raise ModelError if an id is beyond a model's ``vocabulary``: there is no embedding for it."""
        text, largest = max(self._tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        if largest >= vocabulary:
            raise ModelError(
                f"The tokenizer in {path} has the id {largest} ({text!r}), and the model's {vocabulary} ids end at "
                f"{vocabulary - 1}; take the tokenizer that the model was trained with, or resize its embeddings."
            )

    def encode(self, text: str) -> TokenIds:
        """Encode ``text``, as plain text except for what `Markup` marks; adds no special token."""
        if isinstance(text, Markup):
            return self._control.encode([(text.before, True), (text.foreign, False), (text.after, True)])
        return self._control.encode([(text, False)])

    def decode(self, ids: Sequence[int] | TokenIds) -> str:
        """Decode ``ids``, special tokens included, without cleaning up spaces."""
        plain = [int(token) for token in ids]
        return self._tokenizer.decode(plain, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def render(self, messages: Sequence[Message]) -> TokenIds:
        """Render a prompt: the chat template up to the generation prompt, or the plain contents if there is no template.

        The template's control strings are control tokens, those of the messages plain text.

        Raises:
            ModelError: the template fails on these messages, or cuts one in the middle of a control string.
        """
        if self._template is None:
            return self.encode("\n".join(message.content for message in messages))
        contents = [replace_surrogates(message.content) for message in messages]
        roles = [message.role for message in messages]
        return self._control.encode(render_pieces(contents, self._control, lambda texts: self._apply_template(roles, texts)))

    def _apply_template(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            return self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template can raise any type
            raise ModelError(
                f"The chat template fails on messages of the roles {', '.join(roles)} ({describe(error)}); fix it or the data."
            ) from error


def _template_source(template: Any) -> str | None:
    """The text of a chat template, or of several by name."""
    if not template:
        return None
    return template if isinstance(template, str) else json.dumps(template, ensure_ascii=False)
