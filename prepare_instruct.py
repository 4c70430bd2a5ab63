"""Conversations, or preferences, to token rows with loss masks.

    python prepare_instruct.py --source=raschka,alpaca:20000,mine.json --show=3
    python prepare_instruct.py --source=pairs.json --out_dir=data/preferences

The stage between train.py and finetune.py or dpo.py.

A source is a name (below), or a .json, .jsonl (also .gz) or .parquet file or
glob; several are separated by commas, and name:5000 uses 5,000 records, the
first of a fixed shuffle:

    raschka   GitHub: 1,300 instructions, rasbt/LLMs-from-scratch, chapter 7
    alpaca    Hub: yahma/alpaca-cleaned, those whose prompt and answer have at
              most 1,000 characters each
    smoltalk  Hub: HuggingFaceTB/smol-smoltalk, 460,000 conversations of several
              turns

A record is one of these; other names for the same things, as other programs
write them, are in FIELDS and ROLES below:

    question with answer  instruction, input (optional) and output
    conversation          messages, each with role and content; system, history
    preference            chosen and rejected: two answers to a question as
                          above or to prompt, or two conversations

A message with "train": false or "weight": 0 is read, but not trained on. A
record with "label": false, tool calls, roles out of turn or an empty side is
dropped. The table at the end counts what was dropped, cut, and the fields that
were ignored.

A conversation becomes `<|user|>question<|assistant|>answer<|endoftext|>`; the
mask is 1 on each answer and its end token, the only ones that are trained
on; for a preference, on the last answer. A hash of the first question splits
train from validation, so a question is only on one side, and also in
preferences: dpo.py is not validated on what finetuning has learned.

Writes into out_dir, replacing what an earlier run wrote: {train,val}_tokens.npy
(uint16), {train,val}_mask.npy (uint8), {train,val}_offsets.npy (int64, one more
than rows) and meta.json with the counts. A row is a conversation; of
preferences, row 2i is the chosen and 2i + 1 the rejected one. Downloads are
kept in data/instruct_sources.
"""

import hashlib
import heapq
import itertools
import math
import os
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from configurator import BadInput, check_settings, configure, settings_of

import numpy as np

from data import SPLITS, is_validation, match_paths, read_json, read_records, split_items, write_json
from hub import download, list_hub
from tokenizer import BadConversation, Tokenizer

source = "raschka,alpaca"  # names, .json, .jsonl or .parquet files, globs; separated by commas; :5000 limits one
out_dir = "data/instruct"  # where the arrays go
tokenizer = "gpt2"  # that of the model: gpt2, bytes, a folder of tools.train_tokenizer, or the checkpoint itself
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
FORMATS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
# The names that datasets have for the fields of a record or a message. Of several that a record has, the first counts.
FIELDS = {
    "messages": ("messages", "conversations", "conversation"),
    "question": ("instruction", "prompt", "question"),
    "input": ("input", "context"),
    "answer": ("output", "response", "completion", "answer"),
    "chosen": ("chosen", "preferred_output"),
    "rejected": ("rejected", "non_preferred_output"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "role": ("role", "from"),
    "content": ("content", "value"),
    "tool calls": ("tool_calls", "function_call"),
    "train": ("train",),
    "weight": ("weight",),
}
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
TOOL_ROLES = ("tool", "function", "function_call", "observation")


def main():
    settings = settings_of(globals())
    between = (0 < val_fraction < 1, f"val_fraction must be between 0 and 1, not {val_fraction}")
    check_settings(settings, at_least_1=["max_tokens"], rules=[between])
    tokenizer = Tokenizer(settings["tokenizer"])
    folder = Path(out_dir)
    sources = open_sources(source)
    kept, counts, ignored, first = collect(sources, tokenizer, max_tokens, val_fraction)
    for what in sorted(counts, reverse=True):
        print(f"{counts[what]:9,} {what}" + (f" (first: {first[what]})" if what in first else ""))
    if ignored:
        print("ignored fields: " + ", ".join(f"{name} ({n:,})" for name, n in ignored.most_common()))
    if not counts:
        raise BadInput(f"{source}: there are no records")
    if not counts["kept"]:
        raise BadInput(f"{source}: no record that can be used: the table above says why, --help what a record is")
    for split in SPLITS:
        if not kept[split]:
            raise BadInput(f"{source}: none of the {counts['kept']} records kept is for {split}: add more records")
    for rows in kept["train"][:show]:
        print("\n".join(mark_supervised(ids, mask, tokenizer) for ids, mask in rows), end="\n\n")
    meta = {
        "tokenizer": tokenizer.name,
        "sources": sorted(sources),
        "val_fraction": val_fraction,
        "preferences": len(kept["train"][0]) == 2,
        "counts": counts,
        "ignored_fields": ignored,
    }
    for split, totals in write_folder(folder, kept, meta).items():
        print(f"{split}: " + ", ".join(f"{n:,} {what}" for what, n in totals.items()))


# ----------------------------------------------------------------------------------------------------------------------
# sources


def open_sources(source):
    """{name: its records as (where, record)} of a --source; all files are found or downloaded before any is read."""
    opened = {}
    for item in split_items(source):
        name, limit = item, None
        if not os.path.exists(item):
            name, limit = re.fullmatch(r"(.*?)(?::(\d+))?", item).groups()
        paths = download_source(name) if name in SOURCES else list_files(name)
        records = ((where, record) for path in paths for where, record, _ in read_records(path))
        if limit:
            records = take(records, int(limit))
        opened[name] = itertools.chain(opened.get(name, ()), records)
    return opened


def download_source(name):
    """Paths of a named source's files, verified. Its listing is kept: the next run needs no network."""
    listing = DOWNLOADS / name / "files.json"
    if not listing.exists():
        files = SOURCES[name]()
        listing.parent.mkdir(parents=True, exist_ok=True)
        write_json(listing, files)
    return [download(file, listing.parent) for file in read_json(listing, [{"url": str}])]


def list_files(item):
    """Paths of a file or glob. FileNotFoundError when there is none, BadInput for one of another format."""
    paths = match_paths(item)
    if not paths:
        raise FileNotFoundError(f"{item}: no such file (--source= needs {', '.join(SOURCES)}, or files)")
    for path in paths:
        if not path.name.lower().endswith(FORMATS):
            raise BadInput(f"{path}: conversations are read from {', '.join(FORMATS)} files")
    return paths


def take(records, limit):
    """The first `limit` of a fixed shuffle of the records, of which a larger limit takes more; only these are held."""
    shuffle = random.Random(0)
    yield from heapq.nsmallest(limit, records, key=lambda record: shuffle.random())


# ----------------------------------------------------------------------------------------------------------------------
# records to rows


class Unusable(Exception):
    """A record cannot be used; the text says why, for the table at the end."""


@dataclass
class Record:
    """What is read of a record: one conversation, or the chosen and the rejected one of a preference."""

    form: str  # what the record is
    used: list  # names of the fields that were used
    sides: list  # conversations: lists of {role, content, train}
    ignored: list  # names of the fields that were not used


class Fields:
    """The fields of a record or a message that are not empty. Those that nobody takes are ignored, and counted."""

    def __init__(self, record):
        self.left = {name: value for name, value in record.items() if not is_empty(value)}
        self.ignored = set()  # names of fields of messages inside this record

    def take(self, field):
        """The value of a field, under any of its names; None where there is none."""
        for name in FIELDS[field]:
            if name in self.left:
                return self.left.pop(name)
        return None


def is_empty(value):
    is_nan = value != value
    return is_nan or value in (None, "", [], {})


def collect(sources, tokenizer, max_tokens, val_fraction):
    """({split: list of records}, counts of what was read, kept, cut and dropped, counts of ignored fields, places).

    The places say where the first record is that was dropped for a reason. A record is a list of rows, each its
    (ids, mask) arrays: one row, or two for a preference. sources: {name: (where, record) of each}.
    """
    kept = {split: [] for split in SPLITS}
    counts = Counter()
    ignored = Counter()
    first = {}  # of what was dropped: where the first one is
    seen = set()
    for name, records in sources.items():
        forms = Counter()
        used = {}  # as an ordered set
        for where, record in records:
            counts[f"read from {name}"] += 1
            try:
                found = to_conversations(record)
                forms[found.form] += 1
                used.update(dict.fromkeys(found.used))
                ignored.update(found.ignored)
                check_length(found.sides, LONGEST_TEXT.get(name, math.inf))
                rows, cut = render_record(found.sides, tokenizer, max_tokens)
                digest = hashlib.blake2b(
                    b"".join(ids.tobytes() + mask.tobytes() for ids, mask in rows), digest_size=16
                ).digest()
                if digest in seen:
                    raise Unusable("a duplicate")
            except Unusable as reason:
                counts[f"dropped, {reason}"] += 1
                first.setdefault(f"dropped, {reason}", where)
                continue
            seen.add(digest)
            counts["kept"] += 1
            if cut:
                counts[f"kept without {cut}"] += 1
            question = next(message["content"] for message in found.sides[0] if message["role"] == "user")
            kept["val" if is_validation(question, val_fraction) else "train"].append(rows)
        if forms:
            read_as = " and ".join(f"{n:,} {form}" for form, n in forms.items())
            print(f"{name}: read as {read_as}, from the fields {', '.join(used)}")
    if len({len(rows) for split in SPLITS for rows in kept[split]}) == 2:
        raise BadInput("the sources hold preferences and conversations: prepare them separately, each with --out_dir=")
    return kept, counts, ignored, first


def to_conversations(record):
    """The Record that a value of a file stands for. Unusable when it is none."""
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise Unusable("no object with fields")
    fields = Fields(record)
    if fields.left.get("label") is False:  # of KTO: an answer that is not wanted
        raise Unusable("label false")
    if fields.left.get("label") is True:
        del fields.left["label"]
    if not is_trained_on(fields):
        raise Unusable("not to be trained on")
    form = form_of(fields.left)
    if form is None:
        if form_of(record):
            raise Unusable("an empty message")
        names = ", ".join(record)
        raise Unusable(f"neither question and answer nor messages nor chosen and rejected: {names:.60}")
    before = read_history(fields)
    if form == "preferences":
        answers = [to_messages(fields.take(side), "assistant", fields.ignored) for side in ("chosen", "rejected")]
        if answers[0][0]["role"] == answers[1][0]["role"] == "assistant":
            before += read_question(fields)
    elif form == "conversations":
        messages = fields.take("messages")
        if not isinstance(messages, list | None):
            raise Unusable(f"messages that are {type(messages).__name__}, not a list")
        answers = [to_messages(messages, "user", fields.ignored)]
    else:
        before += read_question(fields)
        answers = [to_messages(fields.take("answer"), "assistant", fields.ignored)]
    used = [name for name in record if not is_empty(record[name]) and name not in fields.left]
    ignored = [*fields.left, *(f"{name} of a message" for name in fields.ignored)]
    sides = [before + answer for answer in answers]
    return Record(form, used, sides, ignored)


def form_of(names):
    """What a record with these fields is: preferences, conversations, questions with answers, or None."""
    has = {field for field, synonyms in FIELDS.items() if not names.keys().isdisjoint(synonyms)}
    if {"chosen", "rejected"} <= has:
        return "preferences"
    if "messages" in has:
        return "conversations"
    if "answer" in has and has & {"question", "input"}:
        return "questions with answers"
    return None


def is_trained_on(fields):
    """Whether train and weight of a record or a message let it be learned. Unusable for what is not a yes or no."""
    flags = (fields.take("train"), fields.take("weight"))
    if any(flag not in (None, 0, 1) for flag in flags):  # True and False are 1 and 0
        raise Unusable("train or weight that is neither 0 nor 1")
    return 0 not in flags


def read_history(fields):
    """Messages of the fields system, a text, and history, a list of [question, answer]."""
    system = fields.take("system")
    messages = to_messages(system, "system", fields.ignored) if system else []
    history = fields.take("history") or []
    if not isinstance(history, list):
        raise Unusable("a history that is not a list of questions and answers")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Unusable("a history that is not a list of questions and answers")
        messages += to_messages(turn[0], "user", fields.ignored) + to_messages(turn[1], "assistant", fields.ignored)
    return messages


def read_question(fields):
    """Messages of what is asked: messages, or a question with its input."""
    question = fields.take("messages") or fields.take("question")
    if isinstance(question, list):
        return to_messages(question, "user", fields.ignored)
    parts = [part for part in (question, fields.take("input")) if part is not None]
    if all(isinstance(part, str) for part in parts):
        parts = ["\n\n".join(parts)]
    return [message for part in parts for message in to_messages(part, "user", fields.ignored)]


def to_messages(value, role, ignored):
    """A text by `role`, a message, or a list of messages, as a list of {role, content, train}; none of it is empty.

    ignored: set to which the names of a message's other fields are added.
    """
    if isinstance(value, str) and value.startswith("\n\nHuman:"):  # Anthropic's HH-RLHF
        names_and_texts = re.split(r"\n\n(Human|Assistant):", value)[1:]
        turns = list(zip(names_and_texts[::2], names_and_texts[1::2], strict=True))
        if not turns[-1][1].strip():  # a prompt ends where the answer is to begin
            turns.pop()
        value = [{"role": name, "content": text} for name, text in turns]
    if isinstance(value, dict) and "messages" in value:
        value = value["messages"]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        value = [{"role": role, "content": value}]
    if not value:
        raise Unusable("an empty message")
    return [to_message(message, ignored) for message in value]


def to_message(message, ignored):
    """{role, content, train} of a message: content is UTF-8 without spaces around it, train whether to learn it."""
    if not isinstance(message, dict):
        raise Unusable("a message without role and content")
    fields = Fields(message)
    role = str(fields.take("role") or "nobody").lower()
    if fields.take("tool calls") or role in TOOL_ROLES:
        raise Unusable("tool calls")
    if role not in ROLES:
        raise Unusable(f"a message by {role:.40}, not by user, assistant or system")
    content = fields.take("content")
    if isinstance(content, list):
        content = join_parts(content)
    if not isinstance(content, str | None):
        raise Unusable(f"content that is {type(content).__name__}, not text")
    text = (content or "").strip()
    if not text:
        raise Unusable("an empty message")
    train = is_trained_on(fields)
    ignored.update(fields.left)
    return {"role": ROLES[role], "content": text.encode("utf-8", errors="replace").decode(), "train": train}


def join_parts(parts):
    """The text of a content in parts, as in OpenAI's format. Unusable when one of them is not text."""
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        raise Unusable("content that is not text")
    return "".join(str(part.get("text", "")) for part in parts)


def check_length(sides, longest):
    """Unusable when a message has more characters than `longest`."""
    if any(len(message["content"]) > longest for messages in sides for message in messages):
        raise Unusable(f"longer than {longest:,} characters")


def render_record(sides, tokenizer, max_tokens):
    """(rows, what was cut or ""): (ids, mask) arrays of a conversation, or of the two of a preference.

    Unusable for one that teaches nothing or does not fit.
    """
    cut = ""
    try:
        if len(sides) == 2:
            rows = render_pair(*sides, tokenizer, max_tokens)
        else:
            row, cut = render_within(*sides, tokenizer, max_tokens)
            rows = [row]
    except BadConversation:
        raise Unusable("roles that do not take turns") from None
    if not all(any(mask) for _, mask in rows):
        raise Unusable("no answer to train on")
    return [(np.array(ids, np.uint16), np.array(mask, np.uint8)) for ids, mask in rows], cut


def render_within(messages, tokenizer, max_tokens):
    """((ids, mask), what was cut or "") of the whole turns of a conversation that fit into max_tokens."""
    cut = ""
    if messages[-1]["role"] != "assistant":
        tokenizer.render(messages)  # for its roles
        messages = messages[:-1]
        cut = "their last question, which has no answer"
    if all(message["role"] != "assistant" for message in messages):
        raise Unusable("no answer")
    while messages and messages[-1]["role"] == "assistant":
        ids, mask = tokenizer.render(messages)
        if len(ids) <= max_tokens:
            return (ids, mask), cut
        messages = messages[:-2]
        cut = "their last turns, which do not fit"
    raise Unusable("no whole turn that fits")


def render_pair(chosen, rejected, tokenizer, max_tokens):
    """[(ids, mask)] of the chosen and the rejected conversation; the mask is 1 on the last answer."""
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("two answers to different questions")
    if chosen == rejected:
        raise Unusable("two equal answers")
    rows = []
    for messages in (chosen, rejected):
        if messages[-1]["role"] != "assistant":
            raise Unusable("a side that does not end with an answer")
        ids, mask = tokenizer.render(messages)
        n_asked = len(tokenizer.render(messages[:-1])[0])  # earlier answers are part of what was asked
        rows.append((ids, [0] * n_asked + mask[n_asked:]))
    if any(len(ids) > max_tokens for ids, _ in rows):
        raise Unusable("a pair that does not fit")
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# output


def mark_supervised(ids, mask, tokenizer):
    """A conversation as text, what is trained on between ⟦ and ⟧."""
    text = ""
    for trained, pairs in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        piece = tokenizer.decode([i for i, _ in pairs])
        text += f"⟦{piece}⟧" if trained else piece
    return text


def write_folder(folder, kept, meta):
    """Write the arrays and meta.json; returns the totals of each split. OSError that says what to do on a full disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "meta.json").unlink(missing_ok=True)  # written last: a folder that has one is complete
        totals = {split: write_rows(folder, split, kept[split]) for split in SPLITS}
        write_json(folder / "meta.json", {**meta, **totals})
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error}): free some space, or choose another --out_dir") from None
    return totals


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
