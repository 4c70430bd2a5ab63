"""Token shards, and the order in which training reads them. Needs only numpy: copy this file where you like.

    windows = Windows(find_shards("data/mine", "train"), block_size=1024, n_vocab=50259, seed=1)
    batch = windows.batch(first=0, count=16)  # (16, 1025)

A shard is a file in the format of llm.c: a header of 256 little-endian int32 (magic 20240520, version 1, number of
tokens, zeros), then the tokens as uint16. Every document begins with the end token.
"""

import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

SPLITS = ("train", "val")
MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
ALL_READ = 500_000_000  # bytes of which a checksum takes about a second
LONGEST_LINE = 100_000_000  # bytes of a line of JSON
HASH_KEY = b"fgpt validation"  # never change it: documents would change sides
# prepare_fineweb.py writes a record about each source file; these must be the same for all files of a folder
RULES = ("tokenizer", "split", "text_field", "split_blank_lines")
NOT_USED = ("documents_without_text", "end_tokens_as_text")  # counts of each record
COUNTS = {"documents": int, "tokens": int, "bytes": int}
FILE = {"size": int, "checksum": str}
RECORD = {  # the shape of a record
    **dict.fromkeys(RULES, object),
    "stem": str,
    "files": [{"name": str, **FILE}],
    "val_fraction": int | float,
    "revision": str | None,
    "train": COUNTS,
    "val": COUNTS,
    **dict.fromkeys(NOT_USED, int),
}


# ----------------------------------------------------------------------------------------------------------------------
# shards


def write_shard(file, tokens):
    """Append (n,) uint16 tokens to a shard that is open in mode "wb", and keep its header right.

    OSError beyond the 2^31 - 1 tokens that a header can count.
    """
    n_before = max(file.seek(0, os.SEEK_END) - HEADER_BYTES, 0) // 2
    n_tokens = n_before + len(tokens)
    if n_tokens > 2**31 - 1:
        raise OSError(f"{file.name}: a shard holds at most 2,147,483,647 tokens: split the source into smaller files")
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, n_tokens
    file.seek(0)
    file.write(header)
    file.seek(0, os.SEEK_END)
    file.write(np.ascontiguousarray(tokens, "<u2"))


def open_shard(path):
    """(n,) uint16 memmap of a shard's tokens. OSError when the header does not fit the file."""
    size = os.path.getsize(path)
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION:
        raise OSError(f"{path}: not a token shard (it has another header): create it with prepare_fineweb.py")
    if size != HEADER_BYTES + 2 * int(header[2]):
        raise OSError(
            f"{path}: its header says {header[2]:,} tokens but it holds {(size - HEADER_BYTES) / 2:,.10g}: "
            "the file is damaged, delete it and prepare or download it again"
        )
    if header[2] == 0:
        raise OSError(f"{path}: a shard without tokens: delete it")
    return np.memmap(path, "<u2", mode="r", offset=HEADER_BYTES)


def split_of(name):
    """The split of a shard, train or val: the word that comes first in its name; None where there is neither."""
    found = re.search("train|val", name)
    return found[0] if found else None


def looks_like_bytes(tokens):
    """Whether (n,) ids have no more than the 259 of `bytes`, so that no other tokenizer has likely made them."""
    return len(tokens) > 1000 and int(tokens[:1_000_000].max()) < 259


def find_shards(folder, split):
    """Sorted paths of a folder's shards of a split. FileNotFoundError when there are none."""
    paths = sorted(path for path in Path(folder).glob("*.bin") if split_of(path.name) == split)
    if not paths:
        remedy = f"create them with prepare_fineweb.py --source=... --out_dir={folder}"
        raise FileNotFoundError(f"{folder}: no {split} shards ({split}_*.bin) there: {remedy}")
    return paths


def is_validation(text, val_fraction):
    """Whether a text is held out: a hash of the text alone decides, so a smaller fraction holds out a subset."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=HASH_KEY).digest()
    return int.from_bytes(digest, "little") / 2**64 < val_fraction


# ----------------------------------------------------------------------------------------------------------------------
# JSON and records, and what a folder of shards says about itself


def parse_json(text, where):
    """The value of a JSON text, str or bytes. OSError that begins with `where` when it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number that is too long; nested too deep
        raise OSError(f"{where}: not JSON ({error}): fix it, or create or download it again") from None


def read_json(path, shape=object):
    """The content of a JSON file. OSError that names the file when it is damaged, or has another shape."""
    content = parse_json(Path(path).read_bytes(), path)
    if not has_shape(content, shape):
        raise OSError(f"{path}: not what was expected there: delete it or create it again")
    return content


def has_shape(value, shape):
    """Whether a JSON value has a shape: a type, {name: shape} for an object with these fields, [shape] for a list."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(name in value and has_shape(value[name], shape[name]) for name in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(item, shape[0]) for item in value)
    return isinstance(value, shape)


def read_records(path):
    """Yields (where, record, share) for each record of a .json, .jsonl (also .gz) or .parquet file.

    where names the file and the place. share: of the file, how much has been read. A .json holds one list of records,
    or one record a line as .jsonl does; blank lines are skipped. OSError when the file is damaged.
    """
    path = Path(path)
    if path.suffix.lower() == ".parquet":
        yield from read_parquet(path)
        return
    if is_lfs_pointer(path):
        raise OSError(f"{path}: only a pointer of Git LFS: run git lfs pull")
    size = os.path.getsize(path)
    try:
        by_line = ".jsonl" in path.name.lower() or has_record_lines(path)
        with open(path, "rb") as raw:
            file = gzip.open(raw) if path.suffix.lower() == ".gz" else raw
            if by_line:
                for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                    if line.strip():
                        where = f"{path}, line {number}"
                        yield where, parse_json(line, where), raw.tell() / size
            else:
                records = parse_json(file.read(), path)
                if not isinstance(records, list):
                    raise OSError(f"{path}: must be a list of records, or one record a line")
                for number, record in enumerate(records, 1):
                    yield f"{path}, record {number}", record, number / len(records)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise OSError(f"{path}: damaged gzip file ({error}): download it again") from None


def is_lfs_pointer(path):
    """Whether a file is what Git leaves of a large one that git lfs has not fetched."""
    with open(path, "rb") as file:
        return file.read(100).startswith(b"version https://git-lfs")


def has_record_lines(path):
    """Whether the first line of a .json or .json.gz is a whole record."""
    open_file = gzip.open if Path(path).suffix.lower() == ".gz" else open
    with open_file(path, "rb") as file:
        line = file.readline(LONGEST_LINE)
        is_only_line = not file.readline(LONGEST_LINE).strip()
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) or not is_only_line  # a list alone in a file is that of its records


def read_parquet(path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        records = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"{path} is not a complete parquet file ({error}): delete it and download it again") from None
    for number, record in enumerate(records, 1):
        yield f"{path}, row {number}", record, number / len(records)


def split_items(text):
    """The items of a list separated by commas; a text that is an existing path is one item, whatever its name."""
    if os.path.exists(text):
        return [text]
    return [item.strip() for item in text.split(",") if item.strip()]


def match_paths(item):
    """Sorted paths of the files that a path or a glob names; a path that exists is taken as it is."""
    found = [item] if os.path.exists(item) else glob.glob(item, recursive=True)
    return [Path(path) for path in sorted(found) if Path(path).is_file()]


def write_json(path, value):
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path, text):
    """Write a file, whole or not at all."""
    temporary = f"{path}.{os.getpid()}.tmp"  # several machines may write the meta.json of a shared folder
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_sidecars(folder):
    """The records source_*.json of a folder's source files. OSError for a file of that name that is no record."""
    records = []
    for path in sorted(Path(folder).glob("source_*.json")):
        record = read_json(path)
        if isinstance(record, dict):
            if "files" not in record and "source" in record:  # of format_version 1: one file a record
                record["files"] = [{**record, "name": record["source"]}]
            record = {**dict.fromkeys(NOT_USED, 0), **record}
        if not has_shape(record, RECORD) or not record["files"]:
            raise OSError(f"{path}: not a record by prepare_fineweb.py: move it to another folder")
        records.append(record)
    return records


def read_meta(folder):
    """What a folder of shards holds: tokenizer, split rule, totals of train and val (bytes are those of the text as
    UTF-8); {} if it has neither sidecars nor meta.json.

    Derived from the sidecars, so folders may be merged by copying; meta.json counts only where there are none.
    OSError when the sidecars contradict each other.
    """
    records = read_sidecars(folder)
    path = Path(folder) / "meta.json"
    if not records:
        return read_json(path, {"tokenizer": str}) if path.exists() else {}
    stems = {}  # of each file's checksum
    for record in records:
        for file in record["files"]:
            stem = stems.setdefault(file["checksum"], record["stem"])
            if stem != record["stem"]:
                names = f"source_{stem}.json and source_{record['stem']}.json"
                raise OSError(f"{folder}: {file['name']} is in {names}: delete one of them, and its shards")
    meta = {"format_version": 1}
    for name in RULES:
        values = sorted({str(record[name]) for record in records})
        if len(values) > 1:
            raise OSError(f"{folder}: prepared in parts with {name} {' and '.join(values)}: keep one of them")
        meta[name] = records[0][name]
    for split in SPLITS:
        meta[split] = {key: sum(record[split][key] for record in records) for key in COUNTS}
    meta["sources"] = sorted(file["name"] for record in records for file in record["files"])
    for name in NOT_USED:
        meta[name] = sum(record[name] for record in records)
    return meta


def is_unfinished(folder):
    """Whether prepare_fineweb.py was stopped in a folder, or is still at work there."""
    has_records = any(Path(folder).glob("source_*.json"))
    return any(Path(folder).glob("*.bin.tmp")) or (has_records and not Path(folder, "meta.json").exists())


def sources_of(folder):
    """Names of what a stage's data_dir was made from: files' folders, or datasets; the data_dir itself if unknown."""
    path = Path(folder) / "meta.json"
    meta = read_json(path, dict) if path.exists() else {}
    names = {name.rpartition("/")[0] or name for name in meta.get("sources", [])}
    return sorted(names) or [str(folder)]


# ----------------------------------------------------------------------------------------------------------------------
# the order: a batch is a pure function of (seed, step)


class Windows:
    """Windows of block_size + 1 tokens from a list of shards, in an endless pseudo-random order.

    A shard of n tokens has (n - 1) // block_size windows; each epoch visits every window of every shard once. The
    (n - 1) % block_size tokens left over are skipped, part of them at the start of the shard and the rest at its end,
    by an offset drawn per epoch. Validation uses this order too. A short shard has no window.
    """

    def __init__(self, paths, block_size, n_vocab, seed):
        self.paths = paths
        self.block_size = block_size
        self.n_vocab = n_vocab
        self.seed = seed
        self.shards = [np.asarray(open_shard(path)) for path in paths]  # a plain view is sliced faster than a memmap
        self.lengths = np.array([len(shard) for shard in self.shards])
        self.counts = (self.lengths - 1) // block_size
        self.ends = np.cumsum(self.counts)

    def __len__(self):
        return int(self.ends[-1])

    def share_outside(self):
        """Share of the tokens, 0 to 1, that are in no window of an epoch, such as those of short shards."""
        return 1 - len(self) * self.block_size / int(self.lengths.sum())

    def batch(self, first, count):
        """Windows number first to first + count - 1 of the endless order: (count, block_size + 1) int64.

        OSError when a shard holds an id that is not below n_vocab.
        """
        shards, starts = self.places(np.arange(first, first + count))
        width = self.block_size + 1
        rows = [self.shards[shard][start : start + width] for shard, start in zip(shards, starts, strict=True)]
        batch = np.stack(rows)
        if batch.max() >= self.n_vocab:
            raise OSError(
                f"{Path(self.paths[0]).parent}: token id {batch.max()} is outside the vocabulary of {self.n_vocab}: "
                "the shards are damaged or were made with another tokenizer (--tokenizer=)"
            )
        return batch.astype(np.int64)

    def places(self, numbers):
        """Numbers in the endless order -> (shard, first token in it) of each window, two arrays."""
        epochs = numbers // len(self)
        windows = self.order(numbers)
        shards = np.searchsorted(self.ends, windows, side="right")
        left_over = (self.lengths[shards] - 1) % self.block_size
        offsets = hash_of(self.seed, epochs, shards) % (left_over + 1).astype(np.uint64)
        window_in_shard = windows - (self.ends - self.counts)[shards]
        return shards, offsets.astype(np.int64) + window_in_shard * self.block_size

    def order(self, numbers):
        """Numbers in the endless order -> windows in range(len(self))."""
        windows = np.empty_like(numbers)
        epochs = numbers // len(self)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = permute(numbers[here] % len(self), len(self), hash_of(self.seed, epoch))
        return windows

    def fingerprint(self):
        """[name, tokens, checksum] of each shard, by which a resumed run recognizes its data.

        Of more than ALL_READ bytes only 2,000 of each megabyte are read, so that damage of a megabyte is found without
        reading tens of gigabytes.
        """
        step = 2_000 if 2 * self.lengths.sum() <= ALL_READ else 1_000_000
        with ThreadPoolExecutor(8) as pool:
            checksums = pool.map(partial(sampled_checksum, step=step), self.paths)
            return [
                [path.name, int(n_tokens), checksum]
                for path, n_tokens, checksum in zip(self.paths, self.lengths, checksums, strict=True)
            ]

    def fingerprint_of_ends(self):
        """What `fingerprint` was for runs of earlier versions: checksums of the first and last 4,096 tokens."""
        found = []
        for path, shard in zip(self.paths, self.shards, strict=True):
            ends = np.concatenate((shard[:4096], shard[-4096:]))
            found.append([path.name, len(shard), zlib.crc32(ends)])
        return found


def sampled_checksum(path, step):
    """CRC-32 of the first 2,000 of each `step` bytes of a file, and of the last ones."""
    size = os.path.getsize(path)
    checksum = 0
    with open(path, "rb", buffering=0) as file:  # a memory map would read more around each place
        for first in (*range(0, size, step), max(0, size - 2_000)):
            file.seek(first)
            checksum = zlib.crc32(file.read(2_000), checksum)
    return checksum


def permute(index, n, key):
    """Where a pseudo-random permutation of range(n) puts `index` (array of ints < n), without storing it.

    A four-round Feistel network permutes the numbers below the next power of four; a value that lands at n or above is
    sent through again (cycle walking) until it lands below.
    """
    half = np.uint64(max(2, (n - 1).bit_length() + 1) // 2)  # bits of each half of a number, at least one
    mask = (np.uint64(1) << half) - np.uint64(1)

    def shuffle(x):
        left = x >> half
        right = x & mask
        for round_ in range(4):
            left, right = right, left ^ (mix(right ^ mix(key + np.uint64(round_))) & mask)
        return (left << half) | right

    x = shuffle(np.asarray(index, np.uint64))
    while (outside := x >= n).any():
        x[outside] = shuffle(x[outside])
    return x.astype(np.int64)


def hash_of(*numbers):
    """A uint64 hash of several integers, (1,), or (n,) hashes where some of them are (n,) arrays."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = mix(key + np.asarray(number).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return key


def mix(x):
    """splitmix64's finalizer (Steele et al. 2014): uint64 array -> well-mixed uint64 array."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
