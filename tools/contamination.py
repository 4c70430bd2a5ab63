"""Contamination: how many of HellaSwag's contexts occur word for word in the
token shards that a model is trained on?

    python -m tools.contamination --data_dir=data/fineweb
    python -m tools.contamination --data_dir=data/a.bin --source=mine.jsonl

Word for word: the same ASCII letters and digits in the same order; case,
punctuation and WikiHow's marks do not count.
"""

import re
from pathlib import Path

from configurator import BadInput, configure

import numpy as np
from tqdm import tqdm

from data import find_shards, open_shard, read_meta
from hellaswag import load_items
from tokenizer import Tokenizer

data_dir = "data/fineweb"  # folder of token shards (its train shards are searched), or one shard
source = ""  # HellaSwag-format file; empty: the real one
limit = 0  # search for this many items, the first of a fixed shuffle; 0: all

CHUNK_TOKENS = 1_000_000  # of a shard are decoded at a time: about 150 MB
KEY_BYTES = 32  # by which a context is looked up, a multiple of 8; shorter ones are not searched for
WORD_BYTES = np.array([ord(chr(i).lower()) if i < 128 and chr(i).isalnum() else ord(" ") for i in range(256)], np.uint8)
SPACE = np.frombuffer(b" ", np.uint8)


def main():
    items = load_items(source, limit)
    found, n_searched, n_tokens = find_contexts(items, data_dir, progress=True)
    print(
        f"{len(found):,} of {n_searched:,} contexts ({len(found) / n_searched:.2%}) occur word for word in the "
        f"{n_tokens:,} tokens of {data_dir} ({len(items) - n_searched:,} are too short to tell)"
    )
    for number in found[:5]:
        print(f"  {items[number]['ctx'][:100]}")


def find_contexts(items, path, progress=False):
    """Which contexts occur word for word in a folder's train shards, or in one shard: (found, searched, tokens).

    found: their numbers in items, sorted. searched: how many were searched for, those with KEY_BYTES of words or more,
    since shorter ones occur by chance. tokens: how many were read. Case, punctuation, WikiHow's marks and letters
    beyond ASCII do not count. OSError for what are no shards, BadInput when no context is long enough.
    """
    paths = [Path(path)] if Path(path).is_file() else find_shards(path, "train")
    tokenizer = Tokenizer(read_meta(paths[0].parent).get("tokenizer", "gpt2"))
    by_key = contexts_by_key(items)
    contexts = [context for group in by_key.values() for context in group]
    is_key = np.zeros(2**22, bool)
    for key in by_key:
        is_key[key_hashes(np.frombuffer(key, np.uint8), np.zeros(1, int))] = True
    overlap = max(len(words) for _, words in contexts) - 1
    total = sum(len(open_shard(path)) for path in paths)
    found = set()
    n_tokens = 0
    hidden = None if progress else True  # None: hidden without a terminal
    with tqdm(total=total, desc="contamination", unit=" tokens", unit_scale=True, disable=hidden) as bar:
        for path in paths:
            for n, text in shard_words(path, tokenizer, overlap):
                n_tokens += n
                bar.update(n)
                starts = np.flatnonzero(text[: 1 - KEY_BYTES] == SPACE)  # a key begins with the space before a word
                if len(starts):
                    starts = starts[is_key[key_hashes(text, starts)]]
                for start in starts.tolist():
                    for number, words in by_key.get(text[start : start + KEY_BYTES].tobytes(), ()):
                        if text[start : start + len(words)].tobytes() == words:
                            found.add(number)
    return sorted(found), len(contexts), n_tokens


def contexts_by_key(items):
    """{first KEY_BYTES bytes: [(number of the item, words of its context)]} of the contexts that are long enough."""
    by_key = {}
    for number, item in enumerate(items):
        text = re.sub(r"\[(header|title|step|substeps)\]", "", item["ctx"])  # marks that WikiHow's pages do not have
        words = words_of(np.frombuffer(f" {text} ".encode(errors="replace"), np.uint8)).tobytes()
        if len(words) > KEY_BYTES:
            by_key.setdefault(words[:KEY_BYTES], []).append((number, words))
    if not by_key:
        raise BadInput(f"no context is long enough to search for: {KEY_BYTES} letters, digits and spaces")
    return by_key


def words_of(text):
    """(n,) uint8 of UTF-8 -> its words (ASCII letters and digits) in lower case with one space between, uint8."""
    text = WORD_BYTES[text]
    extra = text == SPACE
    extra[1:] &= extra[:-1]
    extra[:1] = False
    return text[~extra]


def key_hashes(text, starts):
    """(n,) 22-bit hashes of the KEY_BYTES bytes of text that begin at each of `starts` (n,)."""
    eight = np.ndarray(len(text) - 7, "<u8", np.ascontiguousarray(text), strides=(1,))  # the 8 bytes from each position
    mixed = np.zeros(len(starts), np.uint64)
    for i in range(0, KEY_BYTES, 8):
        mixed = (mixed ^ eight[starts + i]) * np.uint64(0x9E3779B97F4A7C15)  # multiplicative hashing (Knuth)
        mixed ^= mixed >> np.uint64(32)
    return mixed >> np.uint64(42)


def shard_words(path, tokenizer, overlap):
    """Yields (number of tokens, their words), a shard in pieces; words begin with the last `overlap` bytes before."""
    token_texts = [tokenizer.decode_bytes([i]) for i in range(tokenizer.n_vocab)]
    sizes = np.array([len(text) for text in token_texts])
    starts = np.cumsum(sizes) - sizes
    all_texts = np.frombuffer(b"".join(token_texts), np.uint8)
    tokens = open_shard(path)
    before = SPACE
    for first in range(0, len(tokens), CHUNK_TOKENS):
        chunk = tokens[first : first + CHUNK_TOKENS]
        if chunk.max() >= tokenizer.n_vocab:
            raise OSError(f"{path}: token id {chunk.max()} is not one of {tokenizer.name}'s {tokenizer.n_vocab:,}")
        n_bytes = sizes[chunk]
        shift = starts[chunk] - (np.cumsum(n_bytes) - n_bytes)
        text = all_texts[np.repeat(shift, n_bytes) + np.arange(n_bytes.sum())]  # decoding, without a loop over tokens
        if first + CHUNK_TOKENS >= len(tokens):
            text = np.concatenate((text, SPACE))
        words = words_of(np.concatenate((before, text)))
        yield len(chunk), words
        before = words[-overlap:]


if __name__ == "__main__":
    configure(globals())
    main()
