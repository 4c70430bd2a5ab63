"""Conversations, or preferences, to token rows with loss masks.

    python prepare_instruct.py --source=raschka,alpaca:20000,mine.json --show=3
    python prepare_instruct.py --source=pairs.json --out_dir=data/preferences

The stage between train.py and finetune.py or dpo.py.

A source is a name (below), or a .json, .jsonl or .parquet file or glob; several
are separated by commas, and name:5000 uses 5,000 records, the first of a fixed
shuffle:

    raschka   GitHub: 1,300 instructions, rasbt/LLMs-from-scratch, chapter 7
    alpaca    Hub: yahma/alpaca-cleaned, those whose prompt and answer have at
              most 1,000 characters each
    smoltalk  Hub: HuggingFaceTB/smol-smoltalk, 460,000 conversations of several
              turns

Records are in Alpaca form (instruction, input, output), chat form (messages
with role and content) or preference form (chosen and rejected: two answers to
instruction and input, or to prompt, or two lists of messages). A conversation
is rendered as `<|user|>question<|assistant|>answer<|endoftext|>`; the mask is 1
on each answer and its end token, the only ones that are trained on; for a
preference, on the last answer. A hash of the first question splits train from
validation, so a question is only on one side, and also in preferences: dpo.py
is not validated on what finetuning has learned.

Writes into out_dir, replacing what an earlier run wrote: {train,val}_tokens.npy
(uint16), {train,val}_mask.npy (uint8), {train,val}_offsets.npy (int64, one more
than rows) and meta.json with the counts. A row is a conversation; of
preferences, row 2i is the chosen and 2i + 1 the rejected one. Downloads are
kept in data/instruct_sources.
"""

import glob
import hashlib
import heapq
import itertools
import random
import re
from collections import Counter
from pathlib import Path

from configurator import BadInput, check_settings, configure, settings_of

import numpy as np

from data import SPLITS, is_validation, read_json, read_records, write_json
from hub import download, list_hub
from tokenizer import BadConversation, Tokenizer

source = "raschka,alpaca"  # names, .json, .jsonl or .parquet files, globs; separated by commas; :5000 limits one
out_dir = "data/instruct"  # where the arrays go
tokenizer = "gpt2"  # that of the model to be finetuned: gpt2, bytes, or a folder of tools.train_tokenizer
val_fraction = 0.1  # share of the first questions held out for validation
max_tokens = 1024  # longest conversation; longer ones lose their last turns, or are dropped
show = 0  # print this many records, with what is trained on in brackets

DOWNLOADS = Path("data/instruct_sources")
CHAPTER_7 = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/b80e7804b30830a00eb55d2abc7ac25a07f36fdc/ch07"
RASCHKA = [  # checksum: git blob hash
    {
        "url": f"{CHAPTER_7}/01_main-chapter-code/instruction-data.json",
        "checksum": "ffda7284cf1e6d833d704d111f2e78732c727eae",
        "size": 203_524,
    },
    {
        "url": f"{CHAPTER_7}/02_dataset-utilities/instruction-examples.json",
        "checksum": "d2a157083dfbda8c1c18b71d8bbc76abdfa9d07a",
        "size": 39_348,
    },
]
SOURCES = {  # name: function that lists its files as dicts for hub.download
    "raschka": lambda: RASCHKA,
    "alpaca": lambda: list_hub("yahma/alpaca-cleaned", wanted=lambda path: path == "alpaca_data_cleaned.json"),
    "smoltalk": lambda: list_hub("HuggingFaceTB/smol-smoltalk", "data", wanted=lambda path: "/train-" in path),
}
LONGEST_TEXT = {"alpaca": 1000}  # name: most characters that a prompt or answer may have
FORMATS = (".json", ".jsonl", ".parquet")


def main():
    settings = settings_of(globals())
    between = (0 < val_fraction < 1, f"val_fraction must be between 0 and 1, not {val_fraction}")
    check_settings(settings, at_least_1=["max_tokens"], rules=[between])
    tokenizer = Tokenizer(settings["tokenizer"])
    folder = Path(out_dir)
    sources = open_sources(source)
    kept, counts = collect(sources, tokenizer, max_tokens, val_fraction)
    for split in SPLITS:
        if not kept[split]:
            raise BadInput(f"{source}: none of the {counts['kept']} records kept is for {split}: add more records")
    for rows in kept["train"][:show]:
        print("\n".join(mark_supervised(ids, mask, tokenizer) for ids, mask in rows), end="\n\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)  # written last: a folder that has one is complete
    meta = {
        "tokenizer": tokenizer.name,
        "sources": sorted(sources),
        "val_fraction": val_fraction,
        "preferences": len(kept["train"][0]) == 2,
        "counts": counts,
    }
    for split in SPLITS:
        meta[split] = write_rows(folder, split, kept[split])
    write_json(folder / "meta.json", meta)
    print("\n".join(f"{counts[what]:9,} {what}" for what in sorted(counts, reverse=True)))
    for split in SPLITS:
        print(f"{split}: " + ", ".join(f"{n:,} {what}" for what, n in meta[split].items()))


# ----------------------------------------------------------------------------------------------------------------------
# sources


def open_sources(source):
    """{name: its records as (where, record)} of a --source; all files are found or downloaded before any is read."""
    opened = {}
    for item in filter(None, map(str.strip, source.split(","))):
        name, limit = re.fullmatch(r"(.*?)(?::(\d+))?", item).groups()
        paths = download_source(name) if name in SOURCES else list_files(name)
        opened[name] = (record for path in paths for record in read_records(path))
        if limit:
            opened[name] = take(opened[name], int(limit))
    return opened


def download_source(name):
    """Paths of a named source's files, verified. Its listing is kept: the next run needs no network."""
    listing = DOWNLOADS / name / "files.json"
    if not listing.exists():
        files = SOURCES[name]()
        listing.parent.mkdir(parents=True, exist_ok=True)
        write_json(listing, files)
    return [download(file, listing.parent) for file in read_json(listing)]


def list_files(item):
    """Paths of a file or glob. FileNotFoundError when there is none, BadInput for one of another format."""
    found = glob.glob(item, recursive=True) or [item]  # the name of a file may look like a pattern
    paths = [Path(path) for path in sorted(found) if Path(path).is_file()]
    if not paths:
        raise FileNotFoundError(f"{item}: no such file (--source= needs {', '.join(SOURCES)}, or files)")
    for path in paths:
        if path.suffix not in FORMATS:
            raise BadInput(f"{path}: conversations are read from {', '.join(FORMATS)} files")
    return paths


def take(records, limit):
    """The first `limit` of a fixed shuffle of the records, of which a larger limit takes more; only these are held."""
    shuffle = random.Random(0)
    yield from heapq.nsmallest(limit, records, key=lambda record: shuffle.random())


# ----------------------------------------------------------------------------------------------------------------------
# records to rows


def collect(sources, tokenizer, max_tokens, val_fraction):
    """({split: list of records}, counts of what was read, kept, cut and dropped).

    A record is a list of rows, each its (ids, mask) arrays: one row, or two for a preference. sources: {name: records}.
    """
    kept = {split: [] for split in SPLITS}
    counts = Counter()
    seen = set()
    for name, records in sources.items():
        for where, record in records:
            counts[f"read from {name}"] += 1
            try:
                sides = to_conversations(record)
                rows, note = render_record(sides, tokenizer, max_tokens)
            except (BadInput, BadConversation) as error:
                raise BadInput(f"{where}: {error}") from None
            longest = max((len(message["content"]) for messages in sides for message in messages), default=0)
            if name in LONGEST_TEXT and longest > LONGEST_TEXT[name]:
                rows = []
                note = f"dropped, longer than {LONGEST_TEXT[name]:,} characters"
            digest = hashlib.blake2b(b"".join(ids.tobytes() for ids, _ in rows), digest_size=16).digest()
            if rows and digest in seen:
                rows = []
                note = "dropped, a duplicate"
            if note:
                counts[note] += 1
            if rows:
                seen.add(digest)
                counts["kept"] += 1
                question = next(message["content"] for message in sides[0] if message["role"] == "user")
                kept["val" if is_validation(question, val_fraction) else "train"].append(rows)
    if len({len(rows) for split in SPLITS for rows in kept[split]}) == 2:
        raise BadInput("the sources hold preferences and conversations: prepare them separately, each with --out_dir=")
    return kept, counts


def to_conversations(record):
    """A record as lists of {role, content}: one, or for a preference two, with the chosen and the rejected answer.

    BadInput for another form.
    """
    fields = record if isinstance(record, dict) else {}
    question = fields.get("instruction", fields.get("prompt"))
    answers = []
    if "chosen" in fields and "rejected" in fields:
        answers = [fields["chosen"], fields["rejected"]]
    elif isinstance(fields.get("messages"), list):
        answers = [fields["messages"]]
    elif "output" in fields:
        answers = [fields["output"]]
    if answers and all(isinstance(answer, list) for answer in answers):
        conversations = answers
    elif answers and question is not None:
        content = [part for part in (question, fields.get("input")) if part]
        if all(isinstance(part, str) for part in content):  # others are refused below
            content = "\n\n".join(content)
        asked = {"role": "user", "content": content}
        conversations = [[asked, {"role": "assistant", "content": answer}] for answer in answers]
    else:
        found = ", ".join(fields) or type(record).__name__
        raise BadInput(f"neither instruction and output nor messages nor chosen and rejected, but {found}")
    return [[clean(message) for message in messages] for messages in conversations]


def clean(message):
    """The message as valid UTF-8 without spaces around it; an empty text for none."""
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or not isinstance(message.get("content"), str | None):
        raise BadInput(f"a message needs a role and a text as content, not {message!r:.80}")
    text = (message["content"] or "").strip()
    return {"role": role, "content": text.encode("utf-8", errors="replace").decode()}


def render_record(sides, tokenizer, max_tokens):
    """(rows, note): (ids, mask) arrays of a conversation or a pair; what was cut, why there are none, or "".

    BadConversation for roles in a wrong order.
    """
    if not all(messages and all(message["content"] for message in messages) for messages in sides):
        return [], "dropped, an empty side"
    if len(sides) == 2:
        rows, note = render_pair(*sides, tokenizer, max_tokens)
    else:
        rows, note = render_within(*sides, tokenizer, max_tokens)
    return [(np.array(ids, np.uint16), np.array(mask, np.uint8)) for ids, mask in rows], note


def render_within(messages, tokenizer, max_tokens):
    """(rows, note) of the whole turns of a conversation that fit into max_tokens."""
    note = ""
    while messages:
        ids, mask = tokenizer.render(messages)
        if messages[-1]["role"] != "assistant":  # a question without an answer teaches nothing
            messages = messages[:-1]
        elif len(ids) <= max_tokens:
            return [(ids, mask)], note
        else:
            messages = messages[:-2]
            note = "kept without their last turns, which do not fit"
    return [], "dropped, no whole turn that fits"


def render_pair(chosen, rejected, tokenizer, max_tokens):
    """(rows, note) of the chosen and the rejected conversation."""
    if chosen[:-1] != rejected[:-1]:
        return [], "dropped, two answers to different questions"
    if chosen == rejected:
        return [], "dropped, two equal answers"
    rows = []
    for messages in (chosen, rejected):
        if messages[-1]["role"] != "assistant":
            raise BadInput("a chosen or rejected conversation must end with an answer")
        ids, mask = tokenizer.render(messages)
        n_asked = len(tokenizer.render(messages[:-1])[0])  # earlier answers are part of what was asked
        rows.append((ids, [0] * n_asked + mask[n_asked:]))
    if any(len(ids) > max_tokens for ids, _ in rows):
        return [], "dropped, a pair that does not fit"
    return rows, ""


# ----------------------------------------------------------------------------------------------------------------------
# output


def mark_supervised(ids, mask, tokenizer):
    """A conversation as text, what is trained on between ⟦ and ⟧."""
    text = ""
    for trained, pairs in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        piece = tokenizer.decode([i for i, _ in pairs])
        text += f"⟦{piece}⟧" if trained else piece
    return text


def write_rows(folder, split, records):
    """Write the arrays of one split; returns its totals."""
    rows = [row for rows in records for row in rows]
    lengths = [len(ids) for ids, _ in rows]
    tokens = np.concatenate([ids for ids, _ in rows])
    mask = np.concatenate([mask for _, mask in rows])
    np.save(folder / f"{split}_tokens.npy", tokens)
    np.save(folder / f"{split}_mask.npy", mask)
    np.save(folder / f"{split}_offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    what = "pairs" if len(records[0]) == 2 else "conversations"
    return {what: len(records), "tokens": len(tokens), "supervised": int(mask.sum()), "longest": max(lengths)}


if __name__ == "__main__":
    configure(globals())
    main()
