"""Contamination: how many of HellaSwag's contexts stand word for word in token
shards that a model is trained on?

    python -m tools.contamination --data_dir=data/fineweb
    python -m tools.contamination --data_dir=data/a.bin --source=mine.jsonl

Word for word: the same ASCII letters and digits in the same order; case,
punctuation and WikiHow's marks do not count.
"""

import re
from pathlib import Path

from configurator import configure

import numpy as np
from tqdm import tqdm

from hellaswag import load_items
from prepare_fineweb import find_shards, open_shard, read_meta
from tokenizer import Tokenizer

data_dir = "data/fineweb"  # folder of token shards, of which the training ones are read, or one shard
source = ""  # HellaSwag-format file; empty: the real one
limit = 0  # look for only this many items, the first of a fixed shuffle; 0: all

CHUNK_TOKENS = 1_000_000  # of a shard are decoded at once: about 150 MB
KEY_BYTES = 32  # by which a context is looked up, a multiple of 8; shorter ones are not looked for
WORD_BYTES = np.array([ord(chr(i).lower()) if i < 128 and chr(i).isalnum() else ord(" ") for i in range(256)], np.uint8)


def words(text):
    """(n,) uint8 of UTF-8 -> its words (ASCII letters and digits) in lower case with one space between, uint8."""
    text = WORD_BYTES[text]
    space = text == ord(" ")
    space[1:] &= space[:-1]
    space[:1] = False
    return text[~space]


def shard_words(path, tokenizer, overlap):
    """Yields (number of tokens, their words), a shard in pieces; words begin with the last `overlap` bytes before."""
    pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.n_vocab)]
    flat, sizes = np.frombuffer(b"".join(pieces), np.uint8), np.array([len(piece) for piece in pieces])
    starts = np.cumsum(sizes) - sizes
    tokens, edge = open_shard(path), np.frombuffer(b" ", np.uint8)
    tail = edge
    for begin in range(0, len(tokens), CHUNK_TOKENS):
        chunk = tokens[begin : begin + CHUNK_TOKENS]
        if chunk.max() >= tokenizer.n_vocab:
            raise ValueError(f"{path}: token id {chunk.max()} is not one of {tokenizer.name}'s {tokenizer.n_vocab:,}")
        n_bytes = sizes[chunk]
        shift = starts[chunk] - (np.cumsum(n_bytes) - n_bytes)
        raw = flat[np.repeat(shift, n_bytes) + np.arange(n_bytes.sum())]  # decoding, without a loop over tokens
        is_last = begin + CHUNK_TOKENS >= len(tokens)
        text = words(np.concatenate((tail, raw, edge) if is_last else (tail, raw)))
        yield len(chunk), text
        tail = text[-overlap:]


def key_hashes(text, at):
    """(n,) 22-bit hashes of the KEY_BYTES bytes of text that begin at each of `at` (n,)."""
    eight = np.ndarray(len(text) - 7, "<u8", np.ascontiguousarray(text), strides=(1,))  # the 8 bytes from each position
    mixed = np.zeros(len(at), np.uint64)
    for i in range(0, KEY_BYTES, 8):
        mixed = (mixed ^ eight[at + i]) * np.uint64(0x9E3779B97F4A7C15)  # multiplicative hashing (Knuth)
        mixed ^= mixed >> np.uint64(32)
    return mixed >> np.uint64(42)


def find_contexts(items, path, progress=False):
    """Which contexts stand word for word in a folder's train shards, or in one shard: (found, searched, tokens).

    found: their numbers in items, sorted. searched: how many were looked for, those with KEY_BYTES of words or more,
    since shorter ones occur by chance. tokens: how many were read. Case, punctuation, WikiHow's marks and letters
    beyond ASCII do not count. Raises ValueError or FileNotFoundError for what are no shards.
    """
    paths = [Path(path)] if Path(path).is_file() else find_shards(path, "train")
    tokenizer = Tokenizer(read_meta(paths[0].parent).get("tokenizer", "gpt2"))
    needles = {}
    for number, item in enumerate(items):
        text = re.sub(r"\[(header|title|step|substeps)\]", "", item["ctx"])  # marks that WikiHow's pages do not have
        needle = words(np.frombuffer(f" {text} ".encode(errors="replace"), np.uint8)).tobytes()
        if len(needle) > KEY_BYTES:
            needles.setdefault(needle[:KEY_BYTES], []).append((number, needle))
    if not needles:
        raise ValueError(f"no context is long enough to look for: {KEY_BYTES} letters, digits and spaces")
    is_key = np.zeros(2**22, bool)
    for key in needles:
        is_key[key_hashes(np.frombuffer(key, np.uint8), np.zeros(1, int))] = True
    found, n_tokens, overlap = set(), 0, max(len(needle) for group in needles.values() for _, needle in group) - 1
    total = sum(len(open_shard(shard)) for shard in paths)
    with tqdm(
        total=total, desc="contamination", unit=" tokens", unit_scale=True, disable=None if progress else True
    ) as bar:
        for n, text in (piece for shard in paths for piece in shard_words(shard, tokenizer, overlap)):
            at = np.flatnonzero(text[: 1 - KEY_BYTES] == ord(" "))  # a key begins with the space before a word
            for start in at[is_key[key_hashes(text, at)]].tolist() if len(at) else []:
                for number, needle in needles.get(text[start : start + KEY_BYTES].tobytes(), ()):
                    if text[start : start + len(needle)].tobytes() == needle:
                        found.add(number)
            n_tokens += n
            bar.update(n)
    return sorted(found), sum(map(len, needles.values())), n_tokens


def main():
    items = load_items(source, limit)
    found, searched, n_tokens = find_contexts(items, data_dir, progress=True)
    print(
        f"{len(found):,} of {searched:,} contexts ({len(found) / searched:.2%}) stand word for word among the "
        f"{n_tokens:,} tokens of {data_dir} ({len(items) - searched:,} are too short to tell)"
    )
    for number in found[:5]:
        print(f"  {items[number]['ctx'][:100]}")


if __name__ == "__main__":
    configure(globals())
    main()
