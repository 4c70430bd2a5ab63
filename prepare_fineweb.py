"""Text to token shards: FineWeb-Edu, another Hub dataset, or files of your own.

    python prepare_fineweb.py --subset=sample/10BT --out_dir=data/fineweb
    python prepare_fineweb.py --source=train.txt --val_source=val.txt \\
        --tokenizer=bytes --out_dir=data/mine

A source is a Hub dataset (owner/name), or a local file, folder or glob; several
are separated by commas. Formats: .parquet, .jsonl and .jsonl.gz (one document a
row, in `text_field`) and .txt (one document a file); or token shards by others,
.bin with train or val in the name, which are checked and taken as they are.
Text wins where both are.

Writes into out_dir, for each source file (NAME is its name and the first 8
digits of its checksum):
    train_NAME.bin, val_NAME.bin   shards: a header of 256 int32, then uint16
                                   tokens; none without documents
    source_NAME.json               what went into them; written last, so a file
                                   that has one is finished
    meta.json                      tokenizer, split and totals, derived from all
                                   source_*.json
Stopped at any point, even by kill -9, the same command goes on: with the first
source file that is not finished, and in the middle of a download. The next file
downloads (into out_dir/downloads) while one is tokenized. A file is known by
its content: copies of it are taken once. HF_ENDPOINT and HF_TOKEN name another
Hub and a token for it.
"""

import errno
import glob
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from configurator import configure

import numpy as np
from tqdm import tqdm

from hub import checksum, fetch_ahead, is_repo, list_hub, open_alone, place, size_of
from tokenizer import Tokenizer

source = "HuggingFaceFW/fineweb-edu"  # Hub dataset, or local file, folder or glob; several separated by commas
subset = ""  # folder inside a Hub dataset, like sample/100BT (empty: sample/10BT of FineWeb-Edu, all of any other)
revision = "main"  # branch, tag or commit of a Hub dataset (main: the commit with which out_dir was begun, if it was)
out_dir = "data/fineweb"  # where the shards go
tokenizer = "gpt2"  # gpt2 or bytes
val_fraction = 0.005  # share of documents held out for validation, chosen by a hash of their text
val_source = ""  # files that are validation (like source); then all of source is train, without a hash
text_field = "text"  # parquet column or JSON field that holds a document
split_blank_lines = False  # a .txt is cut into documents at its blank lines
max_tokens = 0  # stop after the source file that brings train to this many tokens (0: all files; of this part)
part = ""  # do a share of the files, like 3/8: the third of eight machines
keep_downloads = False  # keep what was downloaded, in out_dir/downloads
workers = 0  # threads that tokenize (0: all cores)

FORMATS = (".parquet", ".jsonl", ".jsonl.gz", ".txt", ".bin")
SPLITS = ("train", "val")
COUNTS = ("documents", "tokens", "bytes")  # what is counted of each; bytes of the text as UTF-8
RULES = ("tokenizer", "split", "text_field", "split_blank_lines")  # must be the same for all of a folder
RECORD = ("source", "stem", "size", "checksum", "revision", "val_fraction")  # of a source file, in its sidecar
DEFAULT_SUBSETS = {"HuggingFaceFW/fineweb-edu": "sample/10BT"}
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4  # llm.c's shard format
HASH_KEY = b"fgpt validation"  # never change it: a document would change sides
BATCH_CHARS, MAX_IN_WORK = 250_000, 32_000_000  # text that a thread tokenizes at a time, and that all may hold
BATCH_BYTES = 16_000_000  # of parquet rows decoded at a time
MAX_DOCUMENT = 50_000_000  # characters: what fits into 1.5 GiB of memory
# bytes of shard for a byte of source, guessed until a folder has its own (FineWeb-Edu's parquet could not be measured)
GROWTH = {".parquet": 0.7, ".jsonl": 0.4, ".jsonl.gz": 1.2, ".txt": 0.4, ".bin": 1.0}
SHARD_STEP = 4_000_000  # tokens of a shard by others that are checked at a time
FORMAT_VERSION = 1

# ---------------------------------------------------------------------------------------------------------------------
# shards and what is recorded about them


def write_shard(file, tokens):
    """Append (n,) uint16 tokens to a shard open in mode "wb", and keep its header right.

    Raises ValueError beyond the 2^31 - 1 tokens that a header can count.
    """
    n_tokens = max(file.seek(0, os.SEEK_END) - HEADER_BYTES, 0) // 2 + len(tokens)
    if n_tokens > 2**31 - 1:
        raise ValueError(f"{file.name}: a shard holds at most 2,147,483,647 tokens: cut the source into smaller files")
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, n_tokens
    file.seek(0)
    file.write(header)
    file.seek(0, os.SEEK_END)
    file.write(np.ascontiguousarray(tokens, "<u2"))


def open_shard(path):
    """(n,) uint16 memmap of a shard's tokens. Raises ValueError when the header does not fit the file."""
    size = os.path.getsize(path)
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION:
        found = f"magic {header[0]}, version {header[1]}" if len(header) > 1 else f"{size} bytes"
        raise ValueError(f"{path}: not a token shard (header has {found}): make it with prepare_fineweb.py")
    if size != HEADER_BYTES + 2 * int(header[2]):
        raise ValueError(
            f"{path}: its header says {header[2]:,} tokens but it holds {(size - HEADER_BYTES) / 2:,.10g}: "
            "it is damaged, delete it and prepare or fetch it again"
        )
    if header[2] == 0:
        raise ValueError(f"{path}: a shard without tokens: delete it")
    return np.memmap(path, "<u2", mode="r", offset=HEADER_BYTES)


def split_of(name):
    """Side of a shard by its file's name, or None: its beginning (train_, val_) counts, else a word anywhere in it."""
    starts = [word for word in SPLITS if name.startswith(f"{word}_")]
    return next(iter(starts + [word for word in ("val", "train") if word in name]), None)


def find_shards(folder, split):
    """Sorted paths of a folder's shards, split "train" or "val" (see `split_of`). FileNotFoundError without any."""
    paths = sorted(path for path in Path(folder).glob("*.bin") if split_of(path.name) == split)
    if not paths:
        what = f"no {split} shards ({split}_*.bin) there" if Path(folder).is_dir() else "no such folder of shards"
        more = " and a larger --val_fraction" if split == "val" and Path(folder).is_dir() else ""
        raise FileNotFoundError(f"{folder}: {what}: make them with prepare_fineweb.py --out_dir={folder}{more}")
    return paths


def read_json(path):
    """What a JSON file holds. ValueError that names the file, and the place, when it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}): mend it or make it again") from None


def write_json(path, value):
    """Whole or not at all."""
    temporary = f"{path}.{os.getpid()}.tmp"  # machines that share the folder all write meta.json
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_records(folder):
    """The sidecars of a folder's source files. Raises ValueError for a file that only has the name of one."""
    records, needed = [], {*RULES, *SPLITS, *RECORD} - {"revision"}
    for path in sorted(Path(folder).glob("source_*.json")):
        records.append(read_json(path))
        if not isinstance(records[-1], dict) or not needed <= records[-1].keys():
            raise ValueError(f"{path}: not a record by prepare_fineweb.py: move it to another folder")
    return records


def total(record, what):
    """Documents, tokens or bytes of a source file, of both sides."""
    return sum(record[split][what] for split in SPLITS)


def read_meta(folder):
    """What a folder of shards holds: tokenizer, split rule, totals of train and val; {} where nothing says so.

    Derived from the sidecars, so folders may be merged by copying; meta.json counts only where there are none.
    Raises ValueError when the sidecars do not go together.
    """
    records, path = read_records(folder), Path(folder) / "meta.json"
    if not records:
        return read_json(path) if path.exists() else {}
    meta = {"format_version": FORMAT_VERSION}
    for name in RULES:
        values = sorted({str(record[name]) for record in records})
        if len(values) > 1:
            raise ValueError(f"{folder}: prepared in parts with {name} {' and '.join(values)}: keep one of them")
        meta[name] = records[0][name]
    for split in SPLITS:
        meta[split] = {key: sum(record[split][key] for record in records) for key in COUNTS}
    return meta | {"sources": sorted(record["source"] for record in records)}


def check_folder(folder, records, rules, sources):
    """The records by checksum. Raises ValueError when they do not go with these rules and sources."""
    for name in RULES:
        for record in records:
            if record[name] != rules[name]:
                raise ValueError(
                    f"{folder} was prepared with {name} {record[name]!r}, not {rules[name]!r}: choose another "
                    "--out_dir, or delete its source_*.json and *.bin to begin anew"
                )
    by_name = {record["source"]: record for record in records}
    by_content = {record["checksum"]: record for record in records}
    there = {file["checksum"] for file in sources}
    for file in sources:
        named, same = by_name.get(file["name"]), by_content.get(file["checksum"])
        changed = named and not same and named["checksum"] not in there
        if changed or same and same.get("val_fraction", file["val_fraction"]) != file["val_fraction"]:
            raise ValueError(
                f"{file['name']} has changed {'' if changed else 'sides '}since {folder} was prepared: choose another "
                f"--out_dir, or delete source_{(named if changed else same)['stem']}.json and its shards there"
            )
    return by_content


# ---------------------------------------------------------------------------------------------------------------------
# where the text comes from


def list_sources(source, val_source, val_fraction, list_dataset):
    """The source files, validation files first: dicts of name, stem, size, checksum, val_fraction, and path or url.

    list_dataset: function of a Hub dataset's name, returns what `list_hub` does. Raises ValueError or OSError for what
    cannot be read, and when there is nothing to train on.
    """
    found = {}
    for items, is_val in ((val_source, True), (source, False)):
        for item in filter(None, map(str.strip, items.split(","))):
            files = find_files(item, list_dataset)
            texts = [file for file in files if not is_shard(file)]
            if 0 < len(texts) < len(files):
                print(
                    f"{item}: {len(files) - len(texts)} token shards (.bin) beside text are left out: name them alone"
                )
            for file in texts or files:
                name = file["name"].rsplit("/", 1)[-1]
                stem = re.sub(r"[^\w.-]", "_", name.split(".")[0])[:80] + "_" + file["checksum"][:8]
                ending = next(ending for ending in FORMATS if name.endswith(ending))
                fraction = 0.0 if val_source else val_fraction
                if is_val or is_shard(file):
                    fraction = float(is_val or split_of(name) == "val")
                more = {"stem": stem, "save_as": stem + ending, "val_fraction": fraction}
                found.setdefault(file["checksum"], file | more)
    if all(file["val_fraction"] == 1 for file in found.values()):
        raise ValueError(f"source={source!r} has no file to train on (files of val_source do not count)")
    return sorted(found.values(), key=lambda file: file["val_fraction"] != 1)


def is_shard(file):
    return file["name"].endswith(".bin")


def is_source(name):
    """Whether the name is that of a file to read: of a known format, and a .bin says train or val."""
    return name.endswith(FORMATS) and (not name.endswith(".bin") or split_of(name.rsplit("/", 1)[-1]) is not None)


def take_part(files, part):
    """For part "i/n" the files i, i + n, i + 2n, ..., counted from 1; all for "". ValueError for what is no part."""
    match = re.fullmatch(r"(\d+)/(\d+)", part or "1/1")
    i, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= n:
        raise ValueError(f"part must be like 3/8 (the third of eight machines), not {part!r}")
    return files[i - 1 :: n]


def find_files(item, list_dataset):
    """Files of one local path, glob or Hub dataset: dicts of name, size, checksum, and path or url.

    FileNotFoundError where there are none, ValueError for one that cannot be read.
    """
    path = Path(item)
    if path.is_dir():
        paths = [p for p in path.rglob("[!.]*") if is_source(p.name) and p.is_file()]
    elif path.exists():
        paths = [path]
    elif any(character in item for character in "*?["):
        paths = [p for p in map(Path, glob.glob(item, recursive=True)) if p.is_file()]
    elif is_repo(item) and not item.endswith(FORMATS):
        return list_dataset(item)
    else:
        raise FileNotFoundError(f"{item}: no such file or folder (a dataset of the Hub is owner/name)")
    if not paths:
        raise FileNotFoundError(f"{item}: no {', '.join(FORMATS)} files there")
    return [local_file(path) for path in tqdm(sorted(paths), "checksums", delay=2, leave=False, disable=None)]


def local_file(path):
    size = path.stat().st_size
    if not is_source(path.name):
        raise ValueError(f"{path}: the name of a source must end in {', '.join(FORMATS)} (with train or val in it)")
    if size == 0:
        raise ValueError(f"{path}: an empty file: get it again, or leave it out")
    return {"name": path.as_posix(), "path": path, "size": size, "checksum": checksum(path)}


def list_begun(repo, subset, revision, records):
    """`list_hub` at the commit with which a folder was begun, unless another revision than main is asked for."""
    begun = sorted({r["revision"] for r in records if r["source"].startswith(f"{repo}/") and r.get("revision")})
    revision = begun[0] if begun and revision == "main" else revision
    subset = subset or DEFAULT_SUBSETS.get(repo, "")
    files = list_hub(repo, subset, revision, lambda path: is_source(path) and not path.endswith(".txt"))
    if begun and begun != [files[0]["revision"]]:
        print(f"{repo}: files are of {files[0]['revision']} now, finished ones of {' and '.join(begun)}")
    return files


def check_space(sources, records, folder, tokenizer, max_tokens, keep_downloads):
    """Bytes of the source files to be read. OSError when shards and downloads clearly do not fit on the disk.

    sources: of this part, with their records, or None where there is still something to do. records: of the folder.
    """
    shards, n_files, n_bytes, n_train, remote = 0, 0, 0, 0, []
    for file, record in sources:
        if 0 < max_tokens <= n_train:
            break
        if record:
            n_train += record["train"]["tokens"]
            continue
        size = file["size"] * growth(file["name"], records, tokenizer)
        n_files, n_bytes, shards = n_files + 1, n_bytes + file["size"], shards + size
        n_train += size / 2 if file["val_fraction"] < 1 else 0
        if "url" in file:
            remote.append(file["size"] - max(map(size_of, place(file, folder / "downloads"))))
    downloads = sum(sorted(remote, reverse=True)[: None if keep_downloads else 2])
    free, needed = shutil.disk_usage(folder).free, tqdm.format_sizeof(downloads + shards, "B")
    if downloads + shards * (1 if records else 0.5) > free:  # what is only guessed may be half of that
        raise OSError(
            f"{folder}: about {needed} are needed, {tqdm.format_sizeof(free, 'B')} are free: free some, choose another "
            "--out_dir, or take less with --subset, --part or --max_tokens"
        )
    kind = "" if records else " (a guess)"
    print(f"files to do: {n_files:,}, about {needed} needed{kind}, {tqdm.format_sizeof(free, 'B')} free")
    return n_bytes


def growth(name, records, tokenizer):
    """Bytes of shard for a byte of this source: as in the folder so far, else a constant."""
    ending = next(ending for ending in FORMATS if name.endswith(ending))
    same = [record for record in records if record["source"].endswith(ending)]
    if same:
        return 2 * sum(total(record, "tokens") for record in same) / sum(record["size"] for record in same)
    return GROWTH[ending] * (4 if tokenizer == "bytes" and ending != ".bin" else 1)


# ---------------------------------------------------------------------------------------------------------------------
# documents


def read_documents(path, text_field, split_blank_lines):
    """Yield (share of the file that is read, text), the text None or blank where a row has none.

    Raises ValueError naming the file.
    """
    if path.name.endswith(".parquet"):
        documents = parquet_documents(path, text_field)
    elif path.name.endswith(".txt"):
        documents = txt_documents(path, split_blank_lines)
    else:
        documents = jsonl_documents(path, text_field)
    try:
        for share, text in documents:
            if text and len(text) > MAX_DOCUMENT:
                raise too_long(path)
            yield share, text
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text: convert it first") from None


def too_long(path):
    return ValueError(f"{path}: a document has more than {MAX_DOCUMENT:,} characters: cut it into several documents")


def parquet_documents(path, text_field):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:  # with a buffer, no row group is read as a whole
            columns, groups = file.schema_arrow.names, map(file.metadata.row_group, range(file.num_row_groups))
            if text_field not in columns:
                raise ValueError(f"{path}: no column {text_field!r}: set --text_field to one of {', '.join(columns)}")
            row_bytes = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
            n_rows, n_at_once = 0, min(max(BATCH_BYTES // max(row_bytes, 1), 1), 256)
            for batch in file.iter_batches(n_at_once, columns=[text_field]):
                texts = batch.column(0).to_pylist()
                wrong = {type(text).__name__ for text in texts} - {"str", "NoneType"}
                if wrong:
                    raise ValueError(f"{path}: column {text_field!r} holds {wrong.pop()}, not text: set --text_field")
                n_rows += len(texts)
                for text in texts:
                    yield n_rows / file.metadata.num_rows, text
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split(". ")[0]
        raise ValueError(f"{path}: not a sound parquet file ({reason}): get it again, or leave it out") from None


def txt_documents(path, split_blank_lines):
    size = path.stat().st_size
    with open(path, encoding="utf-8", newline="") as file:  # newline="": line ends stay as they are
        if not split_blank_lines:
            yield 1, file.read(MAX_DOCUMENT + 1)
            return
        lines, length = [], 0
        while line := file.readline(MAX_DOCUMENT + 1):
            if line.strip():
                lines.append(line)
                length += len(line)
                if length > MAX_DOCUMENT:
                    raise too_long(path)
            elif lines:
                yield file.buffer.tell() / size, "".join(lines).rstrip("\r\n")
                lines, length = [], 0
        yield 1, "".join(lines).rstrip("\r\n")


def jsonl_documents(path, text_field):
    number, size = 0, path.stat().st_size
    try:
        with open(path, "rb") as raw, gzip.open(raw) if path.name.endswith(".gz") else raw as file:
            while line := file.readline(2 * MAX_DOCUMENT):
                number += 1
                if not line.strip():
                    continue
                if len(line) == 2 * MAX_DOCUMENT:
                    raise too_long(f"{path}, line {number}")
                row = json.loads(line)
                if not isinstance(row, dict) or text_field not in row:
                    names = f"one of {', '.join(row)}" if row and isinstance(row, dict) else "a field that is there"
                    raise ValueError(f"{path}, line {number}: no field {text_field!r}: set --text_field to {names}")
                text = row[text_field]
                if not isinstance(text, str | None):
                    raise ValueError(f"{path}, line {number}: {text_field!r} is {type(text).__name__}, not text")
                # half a surrogate pair, which JSON can spell, has no UTF-8
                yield raw.tell() / size, text and text.encode("utf-8", errors="replace").decode()
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error.msg}): mend or remove the line") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}, after line {number}: damaged gzip ({error}): get it again") from None


def batches(documents):
    """Yield (share of the file, texts, their characters) for some documents at a time."""
    group, size, share = [], 0, 1
    for share, text in documents:
        group.append(text)
        size += len(text or "")
        if size >= BATCH_CHARS or len(group) >= 1000:
            yield share, group, size
            group, size = [], 0
    yield share, group, size


# ---------------------------------------------------------------------------------------------------------------------
# tokens


def is_validation(text, val_fraction):
    """Whether a document is held out: a hash of its text alone decides, so a smaller fraction holds out a subset."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=HASH_KEY).digest()
    return int.from_bytes(digest, "little") / 2**64 < val_fraction


def encode_batch(texts, tokenizer, val_fraction):
    """Tokenize documents: {split: (tokens, lengths, bytes)}, without those that have no text.

    tokens: (n,) uint16, for each document the end token and its own. lengths: their number for each document.
    bytes: of all texts as UTF-8.
    """
    sides = {split: ([np.empty(0, np.uint16)], []) for split in SPLITS}
    for text in texts:
        if text and not text.isspace():
            arrays, sizes = sides["val" if is_validation(text, val_fraction) else "train"]
            arrays.append(tokenizer.encode_document(text))
            sizes.append(len(text.encode("utf-8")))
    return {
        split: (np.concatenate(arrays), [len(tokens) for tokens in arrays[1:]], sum(sizes))
        for split, (arrays, sizes) in sides.items()
    }


def encode_documents(documents, encode, n_threads):
    """Yield (share of the file, rows, what encode_batch returns) in the order of the documents.

    What is in work is bounded, so that memory is.
    """
    pending, pool = deque(), ThreadPoolExecutor(n_threads)

    def oldest():
        share, n_rows, _, future = pending.popleft()
        return share, n_rows, future.result()

    try:
        for share, texts, size in batches(documents):
            pending.append((share, len(texts), size, pool.submit(encode, texts)))
            while len(pending) > 3 * n_threads or sum(size for _, _, size, _ in pending) > MAX_IN_WORK:
                yield oldest()
        while pending:
            yield oldest()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read_shard(path, tokenizer, split):
    """Yield a shard by others as encode_documents does, and nothing for the other split.

    Raises ValueError when it is damaged, or has tokens that the tokenizer does not know.
    """
    tokens, token_bytes, starts = open_shard(path), tokenizer.token_bytes(), []
    for at in range(0, len(tokens), SHARD_STEP):
        piece = tokens[at : at + SHARD_STEP]
        if piece.max() >= tokenizer.n_vocab:
            raise ValueError(
                f"{path}: has token {piece.max()}, {tokenizer.name} only {tokenizer.n_vocab}: set --tokenizer"
            )
        starts += (at + np.flatnonzero(piece == tokenizer.eot)).tolist()
        yield (at + len(piece)) / len(tokens), 0, {split: (piece, [], int(token_bytes[piece].sum()))}
    yield 1, len(starts), {split: (tokens[:0], np.diff([*starts, len(tokens)]).tolist(), 0)}


def tokenize_file(file, path, folder, rules, tokenizer, n_threads, advance):
    """Write one source file's shards, complete and fsynced, under their names; return its record.

    advance: is told (share of the file, documents, tokens) of each batch.
    """
    shards = {split: folder / f"{split}_{file['stem']}.bin" for split in SPLITS}
    temporary = {split: folder / f"{split}_{file['stem']}.bin.tmp" for split in SPLITS}
    counts = {split: np.zeros(len(COUNTS), np.int64) for split in SPLITS}
    lengths, n_rows = [], 0
    if is_shard(file):
        pieces = read_shard(path, tokenizer, "val" if file["val_fraction"] else "train")
    else:
        documents = read_documents(path, rules["text_field"], rules["split_blank_lines"])
        encode = partial(encode_batch, tokenizer=tokenizer, val_fraction=file["val_fraction"])
        pieces = encode_documents(documents, encode, n_threads)
    targets = {split: open_alone(path) for split, path in temporary.items()}
    train, val = targets.values()
    try:
        with train, val:
            for share, n_in_piece, sides in pieces:
                n_rows += n_in_piece
                for split, (tokens, sizes, n_bytes) in sides.items():
                    write_shard(targets[split], tokens)
                    counts[split] += len(sizes), len(tokens), n_bytes
                    lengths += sizes
                    advance(share, len(sizes), len(tokens))
            for target in (train, val):
                target.flush()
                os.fsync(target.fileno())
        for split in SPLITS:
            if counts[split].any():
                os.replace(temporary[split], shards[split])
    finally:
        for leftover in temporary.values():
            leftover.unlink(missing_ok=True)
    return {
        "format_version": FORMAT_VERSION,
        "source": file["name"],
        **{key: file.get(key) for key in RECORD[1:]},
        **rules,
        **{split: dict(zip(COUNTS, counts[split].tolist(), strict=True)) for split in SPLITS},
        "documents_without_text": n_rows - len(lengths),
        "tokens_per_document": {"median": float(np.median(lengths or [0])), "max": max(lengths, default=0)},
    }


def is_finished(folder, record):
    """Whether there is a record, and the shards that it tells of are there, as long as it says."""
    for split in SPLITS if record else ():
        path, n_tokens = folder / f"{split}_{record['stem']}.bin", record[split]["tokens"]
        if n_tokens and size_of(path) != HEADER_BYTES + 2 * n_tokens:
            return False
    return record is not None


def show_progress(bar, totals, begun, size, share, *counts):
    """Add (documents, tokens) to totals, and move the bar within the file of `size` bytes that began there."""
    totals += counts
    if not bar.disable:
        rate = totals[1] / (time.time() - bar.start_t)
        bar.set_postfix_str(f"{totals[0]:,} documents, {totals[1]:,} tokens, {rate:,.0f} tokens/s", refresh=False)
        bar.update(int(begun + share * size) - bar.n)


def prepare(sources, records, folder, rules, tokenizer, n_threads, max_tokens, keep_downloads=False):
    """Do every source file that is not finished, in order; return the records of all. ValueError if there is no text.

    records: what check_folder returned. Stops after the file with which train has max_tokens, unless that is 0.
    """
    todo = {file["checksum"]: file for file in sources if not is_finished(folder, records.get(file["checksum"]))}
    finished = {key: record for key, record in records.items() if key not in todo}
    pairs = [(file, finished.get(file["checksum"])) for file in sources]
    expected = check_space(pairs, finished.values(), folder, rules["tokenizer"], max_tokens, keep_downloads)
    done, n_train, downloads, totals = [], 0, folder / "downloads", np.zeros(2, np.int64)
    paths = fetch_ahead(list(todo.values()), downloads)
    layout = "{percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
    # smoothing: the time left follows the mean speed, not that of the last batch
    with tqdm(total=expected, bar_format=layout, smoothing=0, disable=None) as bar:
        for file in sources:
            if 0 < max_tokens <= n_train:
                break
            record = records.get(file["checksum"])
            if file["checksum"] in todo:
                path = next(paths)
                advance = partial(show_progress, bar, totals, bar.n, file["size"])
                record = tokenize_file(file, path, folder, rules, tokenizer, n_threads, advance)
                if total(record, "tokens"):
                    write_json(folder / f"source_{file['stem']}.json", record)
                if "url" in file and not keep_downloads:
                    path.unlink()
                tqdm.write(f"{file['name']}: {total(record, 'documents'):,} documents")
            if total(record, "tokens"):
                done.append(record)
                n_train += record["train"]["tokens"]
    if not keep_downloads:  # of a run that was killed, and with max_tokens, the next one
        for path in (path for file in sources if "url" in file for path in place(file, downloads)):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # other machines may still use it
            downloads.rmdir()
    if not done:
        raise ValueError(f"{', '.join(file['name'] for file in sources[:3])}: no documents there, nothing to train on")
    return done


def summary(done, folder, seconds):
    """The closing table, with a warning for a side of the split that is empty."""
    n_train, n_val = (sum(record[split]["tokens"] for record in done) for split in SPLITS)
    documents = np.array([total(record, "documents") for record in done])
    medians, longest = np.array([list(record["tokens_per_document"].values()) for record in done]).T
    n_blank = sum(record["documents_without_text"] for record in done)
    order = np.argsort(medians)  # the files' medians weighted by documents: exact for one file
    median = medians[order][np.searchsorted(documents[order].cumsum(), documents.sum() / 2)]
    lines = [
        f"files                {len(done):,}",
        f"documents            {documents.sum():,}, and {n_blank:,} without text left out",
        f"tokens               {n_train + n_val:,}",
        f"tokens per document  median {'about ' * (len(done) > 1)}{median:,.0f}, max {longest.max():,.0f}",
        f"validation           {n_val:,} tokens, {n_val / (n_train + n_val):.2%}",
        f"time                 {seconds:,.1f} s",
        f"written to           {folder}",
    ]
    for split, n_tokens, change in (("train", n_train, "lower"), ("val", n_val, "raise")):
        if not n_tokens:
            remedy = (
                f"{change} --val_fraction, cut a .txt into documents with --split_blank_lines, or name files with "
                "--val_source; and choose another --out_dir"
            )
            lines.append(f"warning: {split} got no document: {remedy}")
    return "\n".join(lines)


def run():
    if not 0 <= val_fraction < 1 or workers < 0 or max_tokens < 0:
        raise ValueError("val_fraction must be from 0 to below 1, workers and max_tokens 0 or more")
    started, folder = time.time(), Path(out_dir)
    encoder, recorded = Tokenizer(tokenizer), read_records(folder)
    list_dataset = partial(list_begun, subset=subset, revision=revision, records=recorded)
    sources = list_sources(source, val_source, val_fraction, list_dataset)
    split = "by file" if val_source or all(map(is_shard, sources)) else f"hash < {val_fraction}"
    rules = dict(zip(RULES, (tokenizer, split, text_field, split_blank_lines), strict=True))
    mine = take_part(sources, part)
    if not mine:
        return print(f"part {part} has nothing to do: there are only {len(sources)} files")
    records = check_folder(folder, recorded, rules, sources)
    folder.mkdir(parents=True, exist_ok=True)
    done = prepare(mine, records, folder, rules, encoder, workers or os.cpu_count(), max_tokens, keep_downloads)
    written = None
    while (meta := read_meta(folder)) != written:  # again, where another machine finished meanwhile
        write_json(folder / "meta.json", meta)
        written = meta
    print(summary(done, folder, time.time() - started))


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM stops it as Ctrl-C does
    try:
        run()
    except KeyboardInterrupt:
        sys.stdout.flush()
        print("\nstopped: what is finished is kept, the same command goes on from there", file=sys.stderr, flush=True)
        os._exit(130)  # at once: a thread may be busy with a long text, or wait for a silent connection
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(f"{out_dir}: the disk is full: free some space, the same command goes on from there") from None


if __name__ == "__main__":
    configure(globals())
    main()
