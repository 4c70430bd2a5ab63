"""Conversations to token rows with loss masks (the stage between train.py and finetune.py).

    python prepare_instruct.py --source=data/toyworld/instruct.json --tokenizer=bytes --max_tokens=256
    python prepare_instruct.py --source=a.json,more/*.jsonl --show=3

A source file (.json, .jsonl, .parquet; several separated by commas, globs allowed) holds records in Alpaca form
(instruction, input, output) or chat form (messages with role and content). A conversation is rendered as
`<|user|>question<|assistant|>answer<|endoftext|>`; the mask is 1 on each answer and its end token, which alone are
learned. Same question, same side: a hash of the first question splits train from validation.

Writes into out_dir, replacing what an earlier run wrote: {train,val}_tokens.npy (uint16), {train,val}_mask.npy
(uint8), {train,val}_offsets.npy (int64, one more than conversations) and meta.json with the counts.
"""

import glob
import json
from collections import Counter
from pathlib import Path

from configurator import configure

import numpy as np

from hellaswag import read_jsonl, read_parquet
from prepare_fineweb import SPLITS, is_validation, write_json
from tokenizer import Tokenizer

source = ""  # .json, .jsonl or .parquet files, separated by commas; globs allowed
out_dir = "data/instruct"  # where the arrays go
tokenizer = "gpt2"  # gpt2 or bytes: the one of the model to be finetuned
val_fraction = 0.1  # share of the first questions held out for validation
max_tokens = 1024  # longest conversation; longer ones lose their last turns, or are dropped
show = 0  # print so many conversations with what is learned between brackets


def list_files(source):
    """Paths of a comma-separated list of files and globs. FileNotFoundError for one that names nothing."""
    paths = []
    for item in filter(None, map(str.strip, source.split(","))):
        found = sorted(glob.glob(item, recursive=True)) if any(c in item for c in "*?[") else [item]
        if not found or not all(Path(path).is_file() for path in found):
            raise FileNotFoundError(f"{item}: no such file (--source= takes .json, .jsonl or .parquet files)")
        paths += map(Path, found)
    if not paths:
        raise ValueError("--source= names the files of conversations: .json, .jsonl or .parquet")
    return paths


def read_records(path):
    """Yield (where, record) for every record of a file. ValueError that names the file when it is damaged."""
    if path.suffix == ".jsonl":
        yield from read_jsonl(path)
    elif path.suffix == ".parquet":
        yield from read_parquet(path)
    elif path.suffix == ".json":
        try:
            records = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON (is the file cut off?): {error}") from None
        if not isinstance(records, list):
            raise ValueError(f"{path}: a list of records is needed, not {type(records).__name__}")
        for number, record in enumerate(records, 1):
            yield f"{path}, record {number}", record
    else:
        raise ValueError(f"{path}: conversations are read from .json, .jsonl or .parquet files")


def to_messages(record, where):
    """A record in either form as a list of {role, content}. ValueError that begins with `where` for another form."""
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        messages = record["messages"]
    elif isinstance(record, dict) and "instruction" in record and "output" in record:
        asked = [part for part in (record["instruction"], record.get("input")) if part]
        question = "\n\n".join(asked) if all(isinstance(part, str) for part in asked) else asked
        messages = [dict(role="user", content=question), dict(role="assistant", content=record["output"])]
    else:
        names = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where}: neither instruction and output nor messages, but {names}")
    for message in messages:
        is_text = isinstance(message, dict) and isinstance(message.get("content"), str | None)
        if not is_text or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: a message needs a role and a text as content, not {message!r:.80}")
    texts = [(message["content"] or "").strip().encode("utf-8", errors="replace").decode() for message in messages]
    return [dict(role=message["role"], content=text) for message, text in zip(messages, texts, strict=True)]


def render_within(messages, tokenizer, max_tokens):
    """(ids, mask, cut) of the whole turns that fit into max_tokens; ids is empty where not even the first does."""
    tokenizer.render(messages)  # another order of roles is refused, whatever fits
    while messages and messages[-1]["role"] != "assistant":  # a question without an answer teaches nothing
        messages = messages[:-1]
    whole = len(messages)
    while len(messages) > 1:
        ids, mask = tokenizer.render(messages)
        if len(ids) <= max_tokens:
            return ids, mask, len(messages) < whole
        messages = messages[:-2]
    return [], [], False


def collect(records, tokenizer, max_tokens, val_fraction):
    """({split: list of (ids, mask)}, counts of what was kept, cut and dropped)."""
    rows, seen, counts = {split: [] for split in SPLITS}, set(), Counter()
    for where, record in records:
        messages = to_messages(record, where)
        counts["read"] += 1
        if not messages or not all(message["content"] for message in messages):
            counts["dropped, an empty side"] += 1
            continue
        try:
            ids, mask, cut = render_within(messages, tokenizer, max_tokens)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not ids:
            counts["dropped, no whole turn that fits"] += 1
        elif bytes(np.array(ids, np.uint16)) in seen:
            counts["dropped, a duplicate"] += 1
        else:
            seen.add(bytes(np.array(ids, np.uint16)))
            question = next(message["content"] for message in messages if message["role"] == "user")
            rows["val" if is_validation(question, val_fraction) else "train"].append((ids, mask))
            counts["kept"] += 1
            counts["kept without their last turns, which do not fit"] += cut
    return rows, counts


def write_rows(folder, split, rows):
    """Write the arrays of one side; returns its totals."""
    tokens = np.concatenate([np.array(ids, np.uint16) for ids, _ in rows])
    mask = np.concatenate([np.array(mask, np.uint8) for _, mask in rows])
    offsets = np.cumsum([0, *(len(ids) for ids, _ in rows)], dtype=np.int64)
    for name, array in (("tokens", tokens), ("mask", mask), ("offsets", offsets)):
        np.save(folder / f"{split}_{name}.npy", array)
    longest = max(len(ids) for ids, _ in rows)
    return dict(conversations=len(rows), tokens=len(tokens), supervised=int(mask.sum()), longest=longest)


def mark_supervised(ids, mask, tokenizer):
    """The conversation as text, the supervised stretches between ⟦ and ⟧."""
    text, changes = b"", np.flatnonzero(np.diff([0, *mask, 0]))
    for start, end in zip([0, *changes], [*changes, len(ids)], strict=True):
        piece = tokenizer.decode_bytes(ids[start:end])
        text += "⟦".encode() + piece + "⟧".encode() if start < len(ids) and mask[start] else piece
    return text.decode("utf-8", errors="replace")


def main():
    if not 0 < val_fraction < 1 or max_tokens < 1:
        raise ValueError("val_fraction must be between 0 and 1, and max_tokens at least 1")
    coder, folder, paths = Tokenizer(tokenizer), Path(out_dir), list_files(source)
    records = (record for path in paths for record in read_records(path))
    rows, counts = collect(records, coder, max_tokens, val_fraction)
    for split in SPLITS:
        if not rows[split]:
            raise ValueError(f"{source}: of {counts['read']} conversations none is for {split}: get more of them")
    for ids, mask in rows["train"][:show]:
        print(mark_supervised(ids, mask, coder), end="\n\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)  # written last: a folder that has one is whole
    totals = {split: write_rows(folder, split, rows[split]) for split in SPLITS}
    write_json(
        folder / "meta.json", dict(tokenizer=tokenizer, sources=[str(p) for p in paths], counts=counts, **totals)
    )
    print("\n".join(f"{n:9,} {what}" for what, n in counts.items() if n))
    for split in SPLITS:
        print(f"{split}: " + ", ".join(f"{n:,} {what}" for what, n in totals[split].items()))


if __name__ == "__main__":
    configure(globals())
    main()
