"""GeoHop's tokenizer: byte-level BPE of about a thousand entries, each tag and each digit a token of its own."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

VOCABULARY = 1024
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
TAGS = tuple(f"<{slash}{name}>" for name in ("think", "search", "information", "answer") for slash in ("", "/"))
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn the merges from ``texts``. The same texts give the same tokenizer.

    It is a Qwen2 tokenizer with a small vocabulary: AutoTokenizer makes one of any tokenizer that lies beside a Qwen2 model.
    """
    markers = [AddedToken(text, normalized=False) for text in (USER, ASSISTANT, *TAGS)]
    blank = Qwen2Tokenizer(eos_token=END, unk_token=END, pad_token=END)  # its own would be an id beyond the vocabulary
    tokenizer = blank.train_new_from_iterator(texts, VOCABULARY - len(markers), show_progress=False)
    tokenizer.add_tokens(markers)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
