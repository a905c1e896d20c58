"""Tiny tokenizers of the kinds that models have, each with control tokens of several sorts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Bpe
from transformers import PreTrainedTokenizerFast

END, USER, CALL, MASK, ROOM = "<|end|>", "<|user|>", "<tool_call>", "[MASK]", "    "
TEXTS = ["what does the river mean in the town, the user said", "The user asked what ends: a river's end?"] * 5
SPECIAL = [END, "</s>", "<unk>"]
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
)


def _bytes() -> Bpe:
    bpe = Bpe(models.BPE(ignore_merges=True))
    bpe.normalizer = normalizers.NFC()
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    split: Any = pre_tokenizers.Split(pattern, behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, special_tokens=[*SPECIAL], initial_alphabet=letters))
    return bpe


def _pieces(scheme: str) -> Bpe:
    bpe = Bpe(models.BPE(unk_token="<unk>", fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL))
    return bpe


def _legacy() -> Bpe:
    bpe = Bpe(models.BPE(unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL))
    return bpe


def _unigram() -> Bpe:
    bpe = Bpe(models.Unigram())
    bpe.normalizer = normalizers.NFKC()
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>"))
    return bpe


def _words() -> Bpe:
    bpe = Bpe(models.WordPiece(unk_token="<unk>"))
    bpe.normalizer = normalizers.BertNormalizer()
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bpe.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))
    return bpe


KINDS: dict[str, Callable[[], Bpe]] = {
    "byte-level": _bytes,
    "metaspace-always": lambda: _pieces("always"),
    "metaspace-first": lambda: _pieces("first"),
    "prepend": _legacy,
    "unigram": _unigram,
    "wordpiece": _words,
}


def make(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer with special tokens, one that is not special, one that is normalised, and a run of blanks."""
    bpe = KINDS[kind]()
    bpe.add_tokens([
        AddedToken(USER, normalized=False),
        AddedToken(CALL, normalized=False, rstrip=True),
        AddedToken(MASK, normalized=True, lstrip=True),
        AddedToken(ROOM, normalized=False),
        AddedToken("Quillmere", normalized=False),
    ])  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer
