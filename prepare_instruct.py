"""Conversations, or preferences, to token rows with loss masks.

    python prepare_instruct.py --source=raschka,alpaca:20000,mine.json --show=3
    python prepare_instruct.py --source=pairs.json --out_dir=data/preferences

The stage between train.py and finetune.py or dpo.py.

A source is a name (below), or a .json, .jsonl or .parquet file or glob; several
are separated by commas, and name:5000 takes 5,000 records, the first of a fixed
shuffle:

    raschka   GitHub: 1,300 instructions, rasbt/LLMs-from-scratch, chapter 7
    alpaca    Hub: yahma/alpaca-cleaned, those whose prompt and answer have at
              most 1,000 characters each
    smoltalk  Hub: HuggingFaceTB/smol-smoltalk, 460,000 talks of several turns

Records are in Alpaca form (instruction, input, output), chat form (messages
with role and content) or preference form (chosen and rejected: two answers to
instruction and input, or to prompt, or two lists of messages). A conversation
is rendered as `<|user|>question<|assistant|>answer<|endoftext|>`; the mask is 1
on each answer and its end token, which alone are learned; of a preference, on
the last answer. Same question, same side: a hash of the first question splits
train from validation, for preferences too, so that finetuning has not learned
what dpo.py is validated on.

Writes into out_dir, replacing what an earlier run wrote: {train,val}_tokens.npy
(uint16), {train,val}_mask.npy (uint8), {train,val}_offsets.npy (int64, one more
than rows) and meta.json with the counts. A row is a conversation; of
preferences, row 2i is the chosen and 2i + 1 the rejected one. Downloads are
kept in data/instruct_sources.
"""

import glob
import hashlib
import heapq
import random
from collections import Counter
from pathlib import Path

from configurator import configure

import numpy as np

from hellaswag import read_jsonl, read_parquet
from hub import download, fetch, json_of, list_hub
from prepare_fineweb import SPLITS, is_validation, read_json, write_json
from tokenizer import Tokenizer

source = "raschka,alpaca"  # names, .json, .jsonl or .parquet files, globs; separated by commas; :5000 limits one
out_dir = "data/instruct"  # where the arrays go
tokenizer = "gpt2"  # gpt2 or bytes: the one of the model to be finetuned
val_fraction = 0.1  # share of the first questions held out for validation
max_tokens = 1024  # longest conversation; longer ones lose their last turns, or are dropped
show = 0  # print so many records with what is learned between brackets

DOWNLOADS = Path("data/instruct_sources")
GITHUB_API = "https://api.github.com"
RASCHKA = {  # path: commit that holds it
    "ch07/01_main-chapter-code/instruction-data.json": "b80e7804b30830a00eb55d2abc7ac25a07f36fdc",
    "ch07/02_dataset-utilities/instruction-examples.json": "abdb2fc61f4245e27a9bf4c24f8afbda85fe1170",
}
SOURCES = {
    "raschka": lambda: [list_github("rasbt/LLMs-from-scratch", path, commit) for path, commit in RASCHKA.items()],
    "alpaca": lambda: list_hub("yahma/alpaca-cleaned", wanted=lambda path: path == "alpaca_data_cleaned.json"),
    "smoltalk": lambda: list_hub("HuggingFaceTB/smol-smoltalk", "data", wanted=lambda path: "/train-" in path),
}
LONGEST_TEXT = {"alpaca": 1000}  # source: most characters that a prompt or answer may have


def list_github(repo, path, commit):
    """One file of a GitHub repository at a commit, as a dict for hub.download: url, checksum (git blob hash), size."""
    entry = json_of(fetch(f"{GITHUB_API}/repos/{repo}/contents/{path}?ref={commit}"))
    return {"url": entry["download_url"], "checksum": entry["sha"], "size": entry["size"]}


def download_source(name):
    """Paths of a named source's files, verified. Its listing is kept: the next run needs no network."""
    listing = DOWNLOADS / name / "files.json"
    if not listing.exists():
        files = SOURCES[name]()
        listing.parent.mkdir(parents=True, exist_ok=True)
        write_json(listing, files)
    return [download(file, listing.parent) for file in read_json(listing)]


def list_files(item):
    """Paths of a file or glob. FileNotFoundError when it names nothing."""
    paths = sorted(glob.glob(item, recursive=True)) if any(c in item for c in "*?[") else [item]
    if not paths or not all(Path(path).is_file() for path in paths):
        raise FileNotFoundError(f"{item}: no such file (--source= takes {', '.join(SOURCES)}, or files)")
    return [Path(path) for path in paths]


def open_sources(source):
    """{name: its records as (where, record)} of a --source; files are found, and fetched, before any is read."""
    opened = {}
    for item in filter(None, map(str.strip, source.split(","))):
        name, _, limit = item.rpartition(":") if item.rpartition(":")[2].isdigit() else (item, "", "")
        paths = download_source(name) if name in SOURCES else list_files(name)
        records = (record for path in paths for record in read_records(path))
        opened[name] = take(records, int(limit)) if limit else records
    if not opened:
        raise ValueError(f"--source= names conversations: {', '.join(SOURCES)}, or .json, .jsonl or .parquet files")
    return opened


def take(records, limit):
    """The first `limit` of a fixed shuffle of the records; holding no more than these, and a larger limit adds some."""
    shuffle = random.Random(0)
    yield from heapq.nsmallest(limit, records, key=lambda record: shuffle.random())


def read_records(path):
    """Yield (where, record) for every record of a file. ValueError that names the file when it is damaged."""
    if path.suffix == ".jsonl":
        yield from read_jsonl(path)
    elif path.suffix == ".parquet":
        yield from read_parquet(path)
    elif path.suffix == ".json":
        records = read_json(path)
        if not isinstance(records, list):
            raise ValueError(f"{path}: a list of records is needed, not {type(records).__name__}")
        for number, record in enumerate(records, 1):
            yield f"{path}, record {number}", record
    else:
        raise ValueError(f"{path}: conversations are read from .json, .jsonl or .parquet files")


def to_conversations(record, where):
    """A record as lists of {role, content}: one, or of a preference two, that of the chosen and the rejected answer.

    ValueError that begins with `where` for another form.
    """
    fields = record if isinstance(record, dict) else {}
    if {"chosen", "rejected"} <= fields.keys():
        names = "chosen", "rejected"
    elif isinstance(fields.get("messages"), list):
        names = ("messages",)
    else:
        names = ("output",)
    question = fields.get("instruction", fields.get("prompt"))
    if all(isinstance(fields.get(name), list) for name in names):
        sides = [fields[name] for name in names]
    elif question is not None and names[0] in fields:
        asked = [part for part in (question, fields.get("input")) if part]
        question = "\n\n".join(asked) if all(isinstance(part, str) for part in asked) else asked
        sides = [[dict(role="user", content=question), dict(role="assistant", content=fields[n])] for n in names]
    else:
        has = ", ".join(fields) if fields else type(record).__name__
        raise ValueError(f"{where}: neither instruction and output nor messages nor chosen and rejected, but {has}")
    return [check_messages(messages, where) for messages in sides]


def check_messages(messages, where):
    """The messages as valid UTF-8 without outer blanks, an empty text for none."""
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


def render_pair(chosen, rejected, tokenizer, max_tokens):
    """([(ids, mask) of the chosen, of the rejected conversation], "") or ([], why the pair is dropped)."""
    if chosen[:-1] != rejected[:-1]:
        return [], "dropped, two answers to different questions"
    if chosen == rejected:
        return [], "dropped, two equal answers"
    rows = []
    for messages in (chosen, rejected):
        if messages[-1]["role"] != "assistant":
            raise ValueError("a chosen or rejected conversation has to end with an answer")
        ids, mask = tokenizer.render(messages)
        n_asked = len(tokenizer.render(messages[:-1])[0])  # earlier answers belong to what was asked
        rows.append((ids, [0] * n_asked + mask[n_asked:]))
    fits = max(len(ids) for ids, _ in rows) <= max_tokens
    return (rows, "") if fits else ([], "dropped, a pair that does not fit")


def render_record(sides, tokenizer, max_tokens):
    """(rows, note): the (ids, mask) of one conversation or a pair; why there are none, or what was cut, else ""."""
    if not all(messages and all(message["content"] for message in messages) for messages in sides):
        return [], "dropped, an empty side"
    if len(sides) == 2:
        return render_pair(*sides, tokenizer, max_tokens)
    ids, mask, cut = render_within(*sides, tokenizer, max_tokens)
    if not ids:
        return [], "dropped, no whole turn that fits"
    return [(ids, mask)], "kept without their last turns, which do not fit" if cut else ""


def collect(sources, tokenizer, max_tokens, val_fraction):
    """({split: list of records, each its (ids, mask) arrays: one, or two of a preference}, counts).

    sources: {name: records}. counts: how many were read from each, kept, cut and dropped.
    """
    kept, seen, counts = {split: [] for split in SPLITS}, set(), Counter()
    for name, where, record in ((name, *record) for name, records in sources.items() for record in records):
        counts[f"read from {name}"] += 1
        sides = to_conversations(record, where)
        longest = LONGEST_TEXT.get(name)
        if longest and any(len(message["content"]) > longest for messages in sides for message in messages):
            counts[f"dropped, longer than {longest:,} characters"] += 1
            continue
        try:
            rows, note = render_record(sides, tokenizer, max_tokens)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        rows = [(np.array(ids, np.uint16), np.array(mask, np.uint8)) for ids, mask in rows]
        digest = hashlib.blake2b(b"".join(ids.tobytes() for ids, _ in rows), digest_size=16).digest()
        if rows and digest in seen:
            rows, note = [], "dropped, a duplicate"
        counts[note] += bool(note)
        if rows:
            seen.add(digest)
            question = next(message["content"] for message in sides[0] if message["role"] == "user")
            kept["val" if is_validation(question, val_fraction) else "train"].append(rows)
            counts["kept"] += 1
    if len({len(rows) for split in SPLITS for rows in kept[split]}) == 2:
        raise ValueError("the sources hold preferences and conversations: prepare them apart, each with its --out_dir=")
    return kept, +counts


def write_rows(folder, split, records):
    """Write the arrays of one side; returns its totals, by what is counted."""
    rows, what = [row for rows in records for row in rows], "pairs" if len(records[0]) == 2 else "conversations"
    tokens, mask = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    offsets = np.cumsum([0, *(len(ids) for ids, _ in rows)], dtype=np.int64)
    for name, array in (("tokens", tokens), ("mask", mask), ("offsets", offsets)):
        np.save(folder / f"{split}_{name}.npy", array)
    longest = max(len(ids) for ids, _ in rows)
    return {what: len(records), "tokens": len(tokens), "supervised": int(mask.sum()), "longest": longest}


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
    coder, folder = Tokenizer(tokenizer), Path(out_dir)
    sources = open_sources(source)
    kept, counts = collect(sources, coder, max_tokens, val_fraction)
    for split in SPLITS:
        if not kept[split]:
            raise ValueError(
                f"{source}: of {counts['kept']} records that are kept none is for {split}: get more of them"
            )
    for rows in kept["train"][:show]:
        print("\n".join(mark_supervised(ids, mask, coder) for ids, mask in rows), end="\n\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)  # written last: a folder that has one is whole
    preferences = len(kept["train"][0]) == 2
    totals = {split: write_rows(folder, split, kept[split]) for split in SPLITS}
    about = dict(tokenizer=tokenizer, sources=sorted(sources), val_fraction=val_fraction, preferences=preferences)
    write_json(folder / "meta.json", dict(**about, counts=counts, **totals))
    print("\n".join(f"{counts[what]:9,} {what}" for what in sorted(counts, reverse=True)))
    for split in SPLITS:
        print(f"{split}: " + ", ".join(f"{n:,} {what}" for what, n in totals[split].items()))


if __name__ == "__main__":
    configure(globals())
    main()
