# SPDX-License-Identifier: Apache-2.0
"""Byte-pair tokenizers of CLIP: captions in, rows of token ids out.

A caption is cleaned (`clean_text`), split into words, and each word's UTF-8 bytes are merged pair by pair, the most
frequent pairs of the training text first (https://arxiv.org/abs/1508.07909). Every byte is in the vocabulary, so no
text fails. The vocabulary is laid out as OpenAI's: 256 bytes, 256 bytes that end a word, one entry a merge,
``<start_of_text>``, ``<end_of_text>``.
"""

import gzip
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

from fvm_fast.data.clean_text import clean_text

_FOLDER = Path(__file__).parent / "bpe"
START_OF_TEXT, END_OF_TEXT = "<start_of_text>", "<end_of_text>"
_SPECIAL = re.compile(f"{START_OF_TEXT}|{END_OF_TEXT}")
_WORD = rf"{_SPECIAL.pattern}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"


class BPETokenizer:
    """Captions to ids with a byte-level BPE whose end-of-text token has the highest id.

    Args:
        bpe: a `tokenizers.Tokenizer` whose vocabulary ends with ``<start_of_text>`` and ``<end_of_text>``.
        context_length: length of a row when a call does not say.

    Attributes:
        vocab_size: number of ids.
        sot_token, eot_token: ids that start and end each caption; ``eot_token`` is the highest.
        context_length: default length of a row.
    """

    def __init__(self, bpe: Tokenizer, context_length: int = 77) -> None:
        self._bpe = bpe
        self.context_length = _check_length(context_length)
        self.vocab_size = bpe.get_vocab_size()
        self.sot_token = bpe.token_to_id(START_OF_TEXT)
        self.eot_token = bpe.token_to_id(END_OF_TEXT)
        if (self.sot_token, self.eot_token) != (self.vocab_size - 2, self.vocab_size - 1):
            raise ValueError(
                f"tokenizer: its last two of {self.vocab_size} entries should be {START_OF_TEXT} and {END_OF_TEXT}, "
                f"got ids {self.sot_token} and {self.eot_token}; CLIP finds the end of a caption by the highest id"
            )

    @classmethod
    def from_merges(cls, merges: Iterable[tuple[str, str]], context_length: int = 77) -> "BPETokenizer":
        """Build the vocabulary from merges, most frequent first, in the byte alphabet of GPT-2."""
        return cls(build_bpe(merges), context_length)

    @classmethod
    def from_file(cls, path: str | Path, context_length: int = 77) -> "BPETokenizer":
        """Read a ``tokenizer.json`` written by `save` or by scripts/make_emoji_bpe.py."""
        try:
            bpe = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception, whatever went wrong
            reason = "no such file" if not Path(path).is_file() else f"not a tokenizer.json ({error})"
            raise ValueError(f"tokenizer {path}: {reason}; make one with BPETokenizer.save") from error
        return cls(bpe, context_length)

    def save(self, path: str | Path) -> None:
        """Write the vocabulary and the rules as a ``tokenizer.json``."""
        self._bpe.save(str(path))

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> torch.Tensor:
        """Tokenize one caption or several.

        Args:
            texts: a string or strings; longer ones are cut, their end-of-text token is kept.
            context_length: length of a row; the tokenizer's own when None.

        Returns:
            int64 [n, context_length]: start, words, end, then zeros.
        """
        length = self.context_length if context_length is None else _check_length(context_length)
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            ids = [self.sot_token, *self.encode(text)[: length - 2], self.eot_token]
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def encode(self, text: str) -> list[int]:
        """The ids of one caption, without start, end or padding."""
        if not isinstance(text, str):
            raise TypeError(f"tokenizer: captions should be strings, got {type(text).__name__}")
        text = clean_text(text)
        if _SPECIAL.search(text):
            return self._encode_words(text)
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; start, end and everything after the end are left out."""
        kept = []
        for index in map(int, ids):
            if index == self.eot_token:
                break
            if index != self.sot_token:
                kept.append(self._bpe.id_to_token(index))
        from_symbol = {symbol: byte for byte, symbol in byte_symbols().items()}
        return " ".join(
            bytes(from_symbol[symbol] for symbol in word).decode("utf-8", errors="replace")
            for word in "".join(kept).split("</w>")
        ).strip()

    def _encode_words(self, text: str) -> list[int]:
        """As `encode`, where the text spells a special token: as a word of its own it is that token."""
        ids = []
        for word, _ in self._bpe.pre_tokenizer.pre_tokenize_str(text):
            if _SPECIAL.fullmatch(word):
                ids.append(self._bpe.token_to_id(word))
            else:
                ids.extend(token.id for token in self._bpe.model.tokenize(word))
        return ids


class CLIPTokenizer(BPETokenizer):
    """OpenAI's tokenizer: 49,408 entries, the ids of open_clip's ``SimpleTokenizer``, mojibake repair apart."""

    def __init__(self, context_length: int = 77) -> None:
        super().__init__(_clip_bpe(), context_length)


class EmojiTokenizer(BPETokenizer):
    """The demo's small vocabulary, trained on the labels and tags of CLDR by scripts/make_emoji_bpe.py."""

    def __init__(self, context_length: int = 16) -> None:
        super().__init__(_emoji_bpe(), context_length)


@lru_cache(maxsize=1)
def byte_symbols() -> dict[int, str]:
    """GPT-2's printable stand-in for each of the 256 bytes, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def split_words() -> PreTokenizers:
    """The rule that cuts a cleaned caption into words, written in `byte_symbols`."""
    words = Split(Regex(_WORD), behavior="removed", invert=True)
    return PreTokenizers([words, ByteLevel(add_prefix_space=False, use_regex=False)])


def build_bpe(merges: Iterable[tuple[str, str]]) -> Tokenizer:
    """A `tokenizers.Tokenizer` with CLIP's vocabulary layout and word splitting."""
    merges = list(merges)
    symbols = list(byte_symbols().values())
    entries = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), START_OF_TEXT, END_OF_TEXT]
    vocab = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    bpe = Tokenizer(BPE(vocab, merges, end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = split_words()
    return bpe


def _check_length(context_length: int) -> int:
    if context_length < 2:
        raise ValueError(f"tokenizer: context_length should be at least 2 (start and end), got {context_length}")
    return context_length


@lru_cache(maxsize=1)
def _clip_bpe() -> Tokenizer:
    with gzip.open(_FOLDER / "clip_merges.txt.gz", "rt", encoding="utf-8") as lines:
        next(lines)  # the version
        return build_bpe(tuple(line.split()) for line in lines)


@lru_cache(maxsize=1)
def _emoji_bpe() -> Tokenizer:
    return Tokenizer.from_file(str(_FOLDER / "emoji_tokenizer.json"))
