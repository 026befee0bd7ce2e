# SPDX-License-Identifier: Apache-2.0
"""Train the small BPE vocabulary of the emoji demo on the captions and tags that lie in the emoji shards.

    python scripts/make_emoji_bpe.py                 # writes fvm_fast/data/bpe/emoji_tokenizer.json
    python scripts/make_emoji_bpe.py --check         # fails unless the file is what this script would write

The same captions give the same bytes.
"""

import argparse
import json
import os
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, normalizers
from tokenizers.processors import TemplateProcessing

from fvm_fast.data.clean_text import clean_text
from fvm_fast.data.tokenizer import END_OF_TEXT, START_OF_TEXT, build_bpe, split_words

DATA = Path(__file__).parents[1] / "fvm_fast" / "data"
NUM_RESERVED = 2 * 256 + 2  # bytes, bytes that end a word, start and end of text


def read_captions(shard: Path) -> list[str]:
    """The caption of every concept in a shard and its tags, sorted by file name."""
    with tarfile.open(shard) as tar:
        metadata = {member.name: json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")}
    entries = [metadata[name] for name in sorted(metadata)]
    return [clean_text(text) for entry in entries for text in (entry["caption"], *entry["tags"])]


def spell_words(captions: list[str]) -> dict[tuple[str, ...], int]:
    """Every word as its byte symbols, the last one marked as the end of a word, with the number of times it occurs."""
    rule = split_words()
    counts = Counter(word for caption in captions for word, _ in rule.pre_tokenize_str(caption))
    return {(*word[:-1], word[-1] + "</w>"): count for word, count in counts.items()}


def train_merges(words: dict[tuple[str, ...], int], num_merges: int) -> list[tuple[str, str]]:
    """The most frequent pair of neighbours, merged everywhere, again and again; equal counts go by the alphabet.

    The trainer of the `tokenizers` library takes equal counts in an order that changes from run to run.
    """
    words, pairs = dict(words), count_pairs(words)
    merges, products = [], set()
    while len(products) < num_merges:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None:
            raise SystemExit(f"expected {num_merges} merges, the captions give {len(products)}; ask for fewer entries")
        merges.append(best)
        products.add("".join(best))
        old = {word: count for word, count in words.items() if best[0] in word and best in pairwise(word)}
        new = {merge_pair(word, best): words.pop(word) for word in old}
        words.update(new)
        pairs.subtract(count_pairs(old))
        pairs.update(count_pairs(new))
        pairs = +pairs
    return merges


def count_pairs(words: dict[tuple[str, ...], int]) -> Counter:
    """How often each two symbols stand side by side."""
    pairs = Counter()
    for word, count in words.items():
        for pair in pairwise(word):
            pairs[pair] += count
    return pairs


def merge_pair(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The word with each occurrence of ``pair``, left to right, made one symbol."""
    symbols = list(word)
    for i in range(len(symbols) - 1):
        if tuple(symbols[i : i + 2]) == pair:
            symbols[i : i + 2] = ["".join(pair)]
    return tuple(symbols)


def make_tokenizer(captions: list[str], vocab_size: int) -> Tokenizer:
    """A tokenizer that is complete in itself: lower case, start and end included."""
    bpe = build_bpe(train_merges(spell_words(captions), vocab_size - NUM_RESERVED))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    special = [(token, bpe.token_to_id(token)) for token in (START_OF_TEXT, END_OF_TEXT)]
    bpe.post_processor = TemplateProcessing(single=f"{START_OF_TEXT} $A {END_OF_TEXT}", special_tokens=special)
    return bpe


def describe(bpe: Tokenizer, captions: list[str]) -> str:
    """Vocabulary size and how long the captions come out."""
    lengths = [len(encoding.ids) for encoding in bpe.encode_batch(captions)]
    over = sum(length > 16 for length in lengths)
    mean = sum(lengths) / len(lengths)
    return f"{bpe.get_vocab_size()} entries; {len(captions)} captions, {mean:.2f} tokens each, {over} over 16"


def main() -> None:
    """Make the file, or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", type=Path, default=DATA / "emoji3" / "google.tar.gz")
    parser.add_argument("--out", type=Path, default=DATA / "bpe" / "emoji_tokenizer.json")
    parser.add_argument("--vocab-size", type=int, default=3072)
    parser.add_argument("--check", action="store_true", help="compare with --out instead of writing it")
    options = parser.parse_args()

    captions = read_captions(options.shard)
    bpe = make_tokenizer(captions, options.vocab_size)
    text = bpe.to_str() + "\n"
    if options.check:
        if options.out.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{options.out} is not what {Path(__file__).name} makes from {options.shard}")
        print(f"{options.out.name} is up to date")
        return
    beside = options.out.with_suffix(".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, options.out)
    print(f"{options.out}: {describe(bpe, captions)}")


if __name__ == "__main__":
    main()
