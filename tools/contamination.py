"""Contamination: how many of HellaSwag's contexts occur word for word in the
token shards that a model is trained on?

    python -m tools.contamination --data_dir=data/fineweb
    python -m tools.contamination --data_dir=data/a.bin --source=mine.jsonl

Word for word: the same ASCII letters and digits in the same order; case,
punctuation and WikiHow's marks do not count.
"""

import re
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # for `python tools/contamination.py`

from configurator import BadInput, configure

import numpy as np
from tqdm import tqdm

from data import find_shards, open_shard, read_meta
from hellaswag import load_items
from tokenizer import tokenizer_of_shards

data_dir = "data/fineweb"  # folder of token shards (its train shards are searched), or one shard
source = ""  # HellaSwag-format file; empty: the real one
limit = 0  # search for this many items, the first of a fixed shuffle; 0: all

KEY_BYTES = 32  # by which a context is looked up; shorter ones are not searched for
WORD_BYTES = bytes(ord(chr(i).lower()) if i < 128 and chr(i).isalnum() else ord(" ") for i in range(256))


def main():
    items = load_items(source, limit)
    found, n_searched, n_tokens = find_contexts(items, data_dir)
    print(
        f"{len(found):,} of {n_searched:,} contexts ({len(found) / n_searched:.2%}) occur word for word in the "
        f"{n_tokens:,} tokens of {data_dir} ({len(items) - n_searched:,} are too short to tell)"
    )
    for number in found[:5]:
        print(f"  {items[number]['ctx'][:100]}")


def find_contexts(items, path):
    """Which contexts occur word for word in a folder's train shards, or in one shard: (found, searched, tokens).

    found: their numbers in items, sorted. searched: how many were searched for, those with KEY_BYTES of words or more,
    since shorter ones occur by chance. tokens: how many were read. Case, punctuation, WikiHow's marks and letters
    beyond ASCII do not count. OSError for what are no shards, BadInput when no context is long enough.
    """
    paths = [Path(path)] if Path(path).is_file() else find_shards(path, "train")
    folder = paths[0].parent
    tokenizer = tokenizer_of_shards(folder, read_meta(folder).get("tokenizer", "gpt2"))
    by_key = contexts_by_key(items)
    found = set()
    total = sum(len(open_shard(path)) for path in paths)
    with tqdm(total=total, desc="contamination", unit=" tokens", unit_scale=True, disable=None) as bar:
        for path in paths:
            for document in documents_of(path, tokenizer):
                bar.update(len(document))
                text = words_of(tokenizer.decode_bytes(document))
                for space in re.finditer(b" ", text):
                    start = space.start()
                    for number, words in by_key.get(text[start : start + KEY_BYTES], ()):
                        if text.startswith(words, start):
                            found.add(number)
    return sorted(found), sum(map(len, by_key.values())), total


def contexts_by_key(items):
    """{first KEY_BYTES bytes: [(number of the item, words of its context)]} of the contexts that are long enough."""
    by_key = {}
    for number, item in enumerate(items):
        text = re.sub(r"\[(header|title|step|substeps)\]", "", item["ctx"])  # marks that WikiHow's pages do not have
        words = words_of(text.encode(errors="replace"))
        if len(words) > KEY_BYTES:
            by_key.setdefault(words[:KEY_BYTES], []).append((number, words))
    if not by_key:
        raise BadInput(f"no context is long enough to search for: {KEY_BYTES} letters, digits and spaces")
    return by_key


def words_of(text):
    """UTF-8 bytes -> their words (ASCII letters and digits) in lower case, with one space before and after each."""
    return b" ".join([b"", *text.translate(WORD_BYTES).split(), b""])


def documents_of(path, tokenizer):
    """Yields the documents of a shard as lists of token ids."""
    tokens = np.asarray(open_shard(path))  # a plain view is sliced faster than a memmap
    if tokens.max() >= tokenizer.n_vocab:
        raise OSError(f"{path}: token id {tokens.max()} is not one of {tokenizer.name}'s {tokenizer.n_vocab:,}")
    starts = np.flatnonzero(tokens == tokenizer.eot).tolist()
    for first, end in zip([0, *starts], [*starts, len(tokens)], strict=True):
        yield tokens[first:end].tolist()


if __name__ == "__main__":
    configure(globals())
    main()
