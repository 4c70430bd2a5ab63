"""Text to token shards: FineWeb-Edu, another Hub dataset, or files of your own.

    python prepare_fineweb.py --subset=sample/10BT --out_dir=data/fineweb
    python prepare_fineweb.py --source=train.txt --val_source=val.txt \\
        --tokenizer=bytes --out_dir=data/mine

A source is a Hub dataset (owner/name), or a local file, folder or glob; several
are separated by commas. Formats: .parquet, .jsonl and .json (one document a
row, in `text_field`; also .gz) and .txt; or published token shards, .bin with
train or val in the name, which are checked and copied. Where a source has both,
the text is used. Folders are searched with the folders in them, also behind
links, but not hidden ones; what else is there is ignored, with a line that says
so. A .txt is one document, unless lines that are <|endoftext|>, or else, with
--split_blank_lines, blank lines separate several. Text is kept as it is, with
the line ends of Windows too, but for a byte order mark.

Writes into out_dir (NAME is a source file's name and the first 8 digits of its
checksum; small local files are put together, as 300_files_CHECKSUM):
    train_NAME.bin, val_NAME.bin   shards: a header of 256 int32, then uint16
                                   tokens; none without documents
    source_NAME.json               what went into them; written last, so that
                                   what has one is finished
    meta.json                      tokenizer, split and totals, derived from all
                                   source_*.json
If it is stopped at any point, even by kill -9, the same command resumes: with
the first shard that is not finished, and in the middle of a download. The next
file downloads (into out_dir/downloads) while one is tokenized. Files are
identified by their checksum: copies of a file are used once. HF_ENDPOINT and
HF_TOKEN name another Hub and a token for it.
"""

import codecs
import errno
import hashlib
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from configurator import BadInput, check_settings, configure, settings_of

import numpy as np
from tqdm import tqdm

import data
from data import SPLITS, match_paths, read_records, split_items
from hub import checksum, download, is_repo, list_hub, open_alone, place, size_of
from tokenizer import SPECIALS, VOCABULARY, Tokenizer

source = "HuggingFaceFW/fineweb-edu"  # Hub dataset, or local file, folder or glob; several separated by commas
subset = ""  # folder in a Hub dataset, like sample/100BT (empty: sample/10BT of FineWeb-Edu, everything of others)
revision = "main"  # branch, tag or commit of a Hub dataset (main: the commit that out_dir was started with, if any)
out_dir = "data/fineweb"  # where the shards go
tokenizer = "gpt2"  # gpt2, bytes, a folder of tools.train_tokenizer, or a checkpoint: its tokenizer
val_fraction = 0.005  # share of documents held out for validation, chosen by a hash of their text
val_source = ""  # files for validation (like source); then all of source is for training, without a hash
text_field = "text"  # parquet column or JSON field with the text of a document
split_blank_lines = False  # split a .txt into documents at its blank lines, if it has no <|endoftext|> lines
max_tokens = 0  # stop after the file that reaches this many training tokens (with --part: of that part); 0: all files
part = ""  # do a share of the files, like 3/8: the third of eight machines
keep_downloads = False  # keep the downloaded files in out_dir/downloads
workers = 0  # threads that tokenize (0: all cores)

FORMATS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".txt", ".bin")
REMEDIES = {  # what to do with files that are ignored
    ".zst": "decompress .zst with zstd -d",
    ".xz": "decompress .xz with xz -d",
    ".gz": "decompress .gz with gunzip",
    ".zip": "unpack .zip",
    ".csv": "convert .csv with pandas, to_json(orient='records', lines=True)",
    ".md": "rename .md to .txt",
    ".bin": "token shards need train or val in their names, and to be passed without text",
    ".json": "a .json needs one record a line, or to be named itself",
}
DEFAULT_SUBSETS = {"HuggingFaceFW/fineweb-edu": "sample/10BT"}
BATCH_CHARS = 250_000  # characters that a thread tokenizes at a time; for each, three times as many are in memory
MAX_DOCUMENT = 50_000_000  # characters: needs 1.5 GiB of memory
# Bytes of shard per byte of source: a guess for FineWeb-Edu's parquet with GPT-2's tokenizer. Every format needs more
# than half of it, and a disk is refused only if it lacks that.
GROWTH = 0.7
SMALL_FILE = 1_000_000  # bytes: local files below this share shards, as the end of each shard is in no window
SMALL_FILES = 16_000_000  # bytes of small files that share a shard; what a kill may cost
SHARD_STEP = 4_000_000  # tokens of a published shard that are checked at a time


def main():
    settings = settings_of(globals())
    check_settings(settings, rules=[(val_fraction < 1, f"val_fraction must be below 1, not {val_fraction}")])
    with stoppable():
        folder = Path(out_dir)
        tokenizer = Tokenizer(settings["tokenizer"])
        sidecars = data.read_sidecars(folder)
        ignored = Counter()
        list_dataset = partial(list_at_commit, subset=subset, revision=revision, sidecars=sidecars, ignored=ignored)
        sources = list_sources(source, val_source, val_fraction, list_dataset, ignored)
        if ignored:
            print(describe_ignored(ignored))
        by_file = val_source or all(map(is_shard, sources))
        rules = {name: settings.get(name) for name in data.RULES}
        rules["tokenizer"] = tokenizer.name
        rules["split"] = "by file" if by_file else f"hash < {val_fraction}"
        groups = group_files(sources)
        mine = take_part(groups, part)
        if not mine:
            print(f"part {part} has nothing to do: there are only {len(groups)} shards to make")
            return
        finished = check_folder(folder, sidecars, rules, sources)
        others = {file["name"] for record in sidecars for file in record["files"]} - {file["name"] for file in sources}
        if others:
            print(f"{folder} also holds {len(others):,} files that are not in --source, such as {min(others)}")
        todo = unfinished_groups(mine, sidecars, finished)
        check_texts([file for group in todo for file in group.files])
        folder.mkdir(parents=True, exist_ok=True)
        if tokenizer.vocabulary:
            data.write_text(folder / VOCABULARY, tokenizer.vocabulary)
        n_train = finished_tokens(mine, finished)
        n_threads = workers or os.cpu_count()
        prepare(todo, n_train, folder, rules, tokenizer, n_threads, max_tokens, keep_downloads)
        if not keep_downloads:  # also those of shards that an earlier run finished before it was killed
            remove_downloads([file for group in mine for file in group.files], folder / "downloads")
            with suppress(OSError):  # other machines may still use it
                (folder / "downloads").rmdir()
        meta = data.read_meta(folder)
        if not meta:
            raise BadInput(f"{source}: no documents there, nothing to train on")
        meta["ignored_files"] = ignored
        data.write_json(folder / "meta.json", meta)
        print(summary(meta))


@contextmanager
def stoppable():
    """Ctrl-C, SIGTERM and a full disk end the stage with a line that says how to resume."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(f"{out_dir}: the disk is full: free some space, the same command resumes") from None


def stop(number, frame):
    """End the process at once: a thread may be busy with a long text, or wait for a silent connection.

    A KeyboardInterrupt instead could end between taking and releasing a lock, such as that of the progress bar.
    """
    with suppress(RuntimeError):  # the signal interrupted a print
        sys.stdout.flush()
    os.write(2, b"\nstopped: finished files are kept, the same command resumes\n")
    os._exit(130)


# ----------------------------------------------------------------------------------------------------------------------
# the source files


@dataclass
class Group:
    """Source files whose documents share a shard of each split: one file, or many small ones."""

    files: list  # dicts, see list_sources; all have the same val_fraction
    stem: str = ""  # in the names of the shards; empty: derived from the files

    def __post_init__(self):
        if self.stem:
            return
        self.stem = self.files[0]["stem"]
        if len(self.files) > 1:
            digest = hashlib.sha256("".join(file["checksum"] for file in self.files).encode()).hexdigest()
            self.stem = f"{len(self.files)}_files_{digest[:8]}"

    @property
    def size(self):
        """Bytes."""
        return sum(file["size"] for file in self.files)

    @property
    def val_fraction(self):
        return self.files[0]["val_fraction"]


def list_sources(source, val_source, val_fraction, list_dataset, ignored):
    """The source files, validation files first: dicts of name, stem, save_as, size, checksum, val_fraction and path or
    url.

    list_dataset: function of a Hub dataset's name that returns what `list_hub` does. ignored: Counter to which the
    endings of files that are not read are added. BadInput or OSError for files that cannot be read, and when there is
    nothing to train on.
    """
    files = {}
    for file in find_all(val_source, list_dataset, ignored):
        files.setdefault(file["checksum"], {**file, "val_fraction": 1.0})
    for file in find_all(source, list_dataset, ignored):
        if is_shard(file):
            fraction = float(data.split_of(Path(file["name"]).name) == "val")
        else:
            fraction = 0.0 if val_source else val_fraction
        if file["checksum"] in files:
            ignored["copies"] += 1
        else:
            files[file["checksum"]] = {**file, "val_fraction": fraction}
    if all(file["val_fraction"] == 1 for file in files.values()):
        raise BadInput(f"source={source!r} has no file to train on (files of val_source do not count)")
    for file in files.values():
        name, _, ending = Path(file["name"]).name.partition(".")
        file["stem"] = re.sub(r"[^\w-]", "_", name)[:80] + "_" + file["checksum"][:8]
        file["save_as"] = f"{file['stem']}.{ending}"
    return sorted(files.values(), key=lambda file: file["val_fraction"] != 1)


def find_all(items, list_dataset, ignored):
    """Files of several items separated by commas, see `find_files`; token shards only where an item has no text."""
    found = []
    for item in split_items(items):
        files = find_files(item, list_dataset, ignored)
        texts = [file for file in files if not is_shard(file)]
        if 0 < len(texts) < len(files):
            ignored[".bin"] += len(files) - len(texts)
        found += texts or files
    return found


def find_files(item, list_dataset, ignored):
    """Files of one local path, glob or Hub dataset: dicts of name, size, checksum, and path or url.

    FileNotFoundError where there are none, BadInput for one that cannot be read.
    """
    if os.path.isdir(item):
        paths = []
        for path in walk(item):
            if not path.is_file():
                ignored["broken links"] += 1
            elif is_source(path.name) and (path.suffix.lower() != ".json" or is_for_folder(path)):
                paths.append(path)
            else:
                ignored[path.suffix.lower() or "without ending"] += 1
    else:
        paths = match_paths(item)
    if not paths and is_repo(item) and not os.path.exists(item) and not is_source(item):
        return list_dataset(item)
    if not paths:
        more = f" ({describe_ignored(ignored)})" if ignored else ""
        raise FileNotFoundError(
            f"{item}: no {', '.join(FORMATS)} file there (a dataset of the Hub is owner/name){more}"
        )
    return [local_file(path) for path in tqdm(sorted(paths), "checksums", delay=2, leave=False, disable=None)]


def is_for_folder(path):
    """Whether a .json of a folder is one of documents. One that is only a pointer of Git LFS is refused later."""
    return data.is_lfs_pointer(path) or data.has_record_lines(path)


def walk(folder):
    """Paths of the files below a folder, also behind links, without hidden ones; no folder is entered twice."""
    entered = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(here) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(here))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                yield Path(here, name)


def local_file(path):
    if not is_source(path.name):
        remedy = REMEDIES.get(path.suffix.lower(), f"it must end in {', '.join(FORMATS)}")
        raise BadInput(f"{path}: not a source that can be read: {remedy}")
    return {"name": path.as_posix(), "path": path, "size": size_of(path), "checksum": checksum(path)}


def describe_ignored(ignored):
    """A line about the files that are not read, {ending: how many}, with what to do about the common ones."""
    most_first = sorted(ignored, key=lambda ending: (-ignored[ending], ending))
    endings = ", ".join(f"{ignored[ending]:,} {ending}" for ending in most_first)
    remedies = [REMEDIES[ending] for ending in most_first if ending in REMEDIES]
    return f"ignored: {ignored.total():,} files ({endings})" + "".join(f"; {remedy}" for remedy in remedies)


def group_files(files):
    """The Groups of the source files, in their order; small ones by checksum, so that names and folders do not count.

    Only local files are put together, and files of the same val_fraction. No group of small files depends on those that
    come after it.
    """
    groups = []
    small = {}  # val_fraction: files
    for file in files:
        if file["size"] < SMALL_FILE and "path" in file and not is_shard(file):
            small.setdefault(file["val_fraction"], []).append(file)
        else:
            groups.append(Group([file]))
    for together in small.values():
        members = []
        for file in sorted(together, key=lambda file: file["checksum"]):
            if members and sum(member["size"] for member in members) + file["size"] > SMALL_FILES:
                groups.append(Group(members))
                members = []
            members.append(file)
        groups.append(Group(members))
    return sorted(groups, key=lambda group: group.val_fraction != 1)


def list_at_commit(repo, subset, revision, sidecars, ignored):
    """`list_hub` at the commit that a folder was started with, unless another revision than main is asked for."""
    ours = [record for record in sidecars if record["files"][0]["name"].startswith(f"{repo}/")]
    commits = {record["revision"] for record in ours} - {None}
    if commits and revision == "main":
        revision = min(commits)
    subset = subset or DEFAULT_SUBSETS.get(repo, "")

    left_out = set()

    def is_wanted(path):
        name = Path(path).name.lower()
        wanted = is_source(name) and not name.endswith((".txt", ".json"))  # there, those are about the dataset
        if not wanted and not name.startswith((".", "readme")):
            left_out.add(path)
        return wanted

    files = list_hub(repo, subset, revision, is_wanted)
    ignored.update(Path(path).suffix.lower() or "without ending" for path in left_out)
    return files


def is_shard(file):
    return file["name"].lower().endswith(".bin")


def is_source(name):
    """Whether this is the name of a file to read: of a known format, and a .bin says train or val."""
    name = Path(name).name.lower()
    if name.endswith(".bin"):
        return data.split_of(name) is not None
    return name.endswith(FORMATS)


def take_part(groups, part):
    """For part "i/n" the groups i, i + n, i + 2n, ..., counted from 1; all for "". BadInput for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", part or "1/1")
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise BadInput(f"part must be like 3/8 (the third of eight machines), not {part!r}")
    return groups[int(match[1]) - 1 :: int(match[2])]


def check_folder(folder, sidecars, rules, sources):
    """{checksum: record} of a folder's finished files. BadInput when they do not go with these rules and sources."""
    for name in data.RULES:
        for record in sidecars:
            if record[name] != rules[name]:
                raise BadInput(
                    f"{folder} was prepared with {name} {record[name]!r}, not {rules[name]!r}: choose another "
                    "--out_dir, or delete its source_*.json and *.bin to start over"
                )
    by_name = {file["name"]: record for record in sidecars for file in record["files"]}
    by_checksum = {file["checksum"]: record for record in sidecars for file in record["files"]}
    present = {file["checksum"] for file in sources}
    for file in sources:
        problem = None
        record = by_checksum.get(file["checksum"])
        if record is None:
            record = by_name.get(file["name"])
            before = [old["checksum"] for old in record["files"] if old["name"] == file["name"]] if record else []
            if before and before[0] not in present:
                problem = "has changed"
        elif record["val_fraction"] != file["val_fraction"]:
            problem = "has moved between train and validation"
        if problem:
            raise BadInput(
                f"{file['name']} {problem} since {folder} was prepared: choose another --out_dir, or delete "
                f"source_{record['stem']}.json and its shards there"
            )
    return {key: record for key, record in by_checksum.items() if is_finished(folder, record)}


def unfinished_groups(mine, sidecars, finished):
    """The Groups that are still to be prepared. finished: what check_folder returned.

    A record whose shards are lost or damaged is made again as it was, whatever has been added since. BadInput when its
    files are not all there.
    """
    files = {file["checksum"]: file for group in mine for file in group.files}
    groups = []
    known = set(finished)
    for record in sidecars:
        checksums = [file["checksum"] for file in record["files"]]
        if not set(checksums).isdisjoint(known) or set(checksums).isdisjoint(files):
            continue
        if not set(checksums) <= files.keys():
            raise BadInput(
                f"the shards of source_{record['stem']}.json are lost or damaged, and so are some of its files: "
                "delete it and its shards, the rest is prepared again"
            )
        groups.append(Group([files[checksum] for checksum in checksums], record["stem"]))
        known.update(checksums)
    for group in mine:
        new = [file for file in group.files if file["checksum"] not in known]
        if new:
            groups.append(Group(new))
    return sorted(groups, key=lambda group: group.val_fraction != 1)


def finished_tokens(mine, finished):
    """Training tokens of the finished shards that hold files of these groups, each shard once."""
    records = [finished[file["checksum"]] for group in mine for file in group.files if file["checksum"] in finished]
    return sum({record["stem"]: record["train"]["tokens"] for record in records}.values())


def check_texts(files):
    """BadInput that names all files that are not text at once, by what is wrong with them."""
    wrong = {}  # what: names
    for file in tqdm([file for file in files if "path" in file], "reading", delay=2, leave=False, disable=None):
        problem = problem_of_text(file["path"])
        if problem:
            wrong.setdefault(problem, []).append(file["name"])
    if wrong:
        lists = []
        for problem in sorted(wrong):
            names = sorted(wrong[problem])
            if len(names) > 20:
                names = [*names[:20], f"and {len(names) - 20:,} more"]
            lists.append(f"{problem}: {', '.join(names)}")
        raise BadInput("; ".join(lists) + "; nothing was written")


def problem_of_text(path):
    """What is wrong with a source file, as far as one sees without its format; "" if nothing is."""
    if data.is_lfs_pointer(path):
        return "only a pointer of Git LFS (run git lfs pull)"
    if path.suffix.lower() != ".txt":
        return ""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        start = file.read(2)
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "UTF-16 (convert with iconv -f utf-16 -t utf-8)"
        file.seek(0)
        try:
            while piece := file.read(1 << 20):
                if b"\0" in piece:
                    return "NUL bytes, so it is not text, or UTF-16 (convert it, or leave it out)"
                decoder.decode(piece)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "not UTF-8 (convert with iconv -f latin1 -t utf-8, or from what it is)"
    return ""


def is_finished(folder, record):
    """Whether the shards that a record describes exist and have the recorded length."""
    for split in SPLITS:
        n_tokens = record[split]["tokens"]
        if n_tokens and size_of(folder / f"{split}_{record['stem']}.bin") != data.HEADER_BYTES + 2 * n_tokens:
            return False
    return True


# ----------------------------------------------------------------------------------------------------------------------
# all files


@dataclass
class Counts:
    """What went into some shards."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def add(self, piece):
        self.documents += len(piece.lengths)
        self.tokens += len(piece.tokens)
        self.bytes += piece.n_bytes


def prepare(groups, n_train, folder, rules, tokenizer, n_threads, max_tokens, keep_downloads):
    """Prepare groups in order, up to the one that brings train to max_tokens (0: all).

    n_train: tokens that train has already.
    """
    n_bytes = check_space(groups, n_train, folder, max_tokens, keep_downloads)
    paths = fetch_ahead([file for group in groups for file in group.files], folder / "downloads")
    totals = Counts()
    layout = "{percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
    # smoothing: the time left follows the mean speed, not that of the last batch
    with tqdm(total=n_bytes, bar_format=layout, smoothing=0, disable=None) as bar:
        for group in groups:
            if 0 < max_tokens <= n_train:
                break
            advance = partial(show_progress, bar, totals, bar.n, group.size)
            record = tokenize_group(group, paths, folder, rules, tokenizer, n_threads, advance)
            if total(record, "tokens"):
                data.write_json(folder / f"source_{group.stem}.json", record)
            if not keep_downloads:
                remove_downloads(group.files, folder / "downloads")
            name = group.files[0]["name"] if len(group.files) == 1 else f"{len(group.files):,} small files"
            blank = f"{record['documents_without_text']:,} without text ignored"
            tqdm.write(f"{name}: {total(record, 'documents'):,} documents, {blank}")
            n_train += record["train"]["tokens"]


def total(record, what):
    """Documents or tokens of a source file, of both splits."""
    return sum(record[split][what] for split in SPLITS)


def check_space(groups, n_train, folder, max_tokens, keep_downloads):
    """Bytes of the source files to be read. OSError when shards and downloads clearly do not fit on the disk."""
    n_bytes = 0
    missing = []  # bytes of each download
    for group in groups:
        if 0 < max_tokens <= n_train:
            break
        n_bytes += group.size
        if group.val_fraction < 1:
            n_train += group.size * GROWTH / 2
        for file in group.files:
            if "url" in file:
                missing.append(file["size"] - max(map(size_of, place(file, folder / "downloads"))))
    if not keep_downloads:
        missing = sorted(missing)[-2:]  # one is tokenized, the next one downloads
    free = shutil.disk_usage(folder).free
    needed = sum(missing) + n_bytes * GROWTH / 2
    if needed > free:
        raise OSError(
            f"{folder}: at least {tqdm.format_sizeof(needed, 'B')} needed, {tqdm.format_sizeof(free, 'B')} free: "
            "free some, choose another --out_dir, or take less with --subset, --part or --max_tokens"
        )
    return n_bytes


def fetch_ahead(files, folder):
    """Yields the path of each file; while it is used, the next one downloads. An error is raised at its file's turn."""
    futures = [Future() for _ in files]

    def work(file, future):
        try:
            future.set_result(file["path"] if "path" in file else download(file, folder))
        except BaseException as error:
            future.set_exception(error)

    def start(number):
        if number < len(files):  # a daemon, as the threads of an executor keep a process that ends alive
            threading.Thread(target=work, args=(files[number], futures[number]), daemon=True).start()

    start(0)
    for number, future in enumerate(futures):
        path = future.result()
        start(number + 1)
        yield path


def remove_downloads(files, folder):
    """Remove the downloads of files, and what a run that was killed has left of them."""
    for file in files:
        if "url" in file:
            for path in place(file, folder):
                path.unlink(missing_ok=True)


def show_progress(bar, totals, first_byte, size, share, pieces):
    """Add pieces to totals, and move the bar to where this share is within the file of `size` bytes."""
    for piece in pieces:
        totals.add(piece)
    if not bar.disable:
        rate = totals.tokens / (time.time() - bar.start_t)
        counts = f"{totals.documents:,} documents, {totals.tokens:,} tokens, {rate:,.0f} tokens/s"
        bar.set_postfix_str(counts, refresh=False)
        bar.update(int(first_byte + share * size) - bar.n)


# ----------------------------------------------------------------------------------------------------------------------
# one file


@dataclass
class Piece:
    """Tokens for the shard of one split."""

    split: str
    tokens: np.ndarray  # (n,) uint16: for each document the end token, then those of its text
    lengths: list  # number of tokens of each document
    n_bytes: int  # of the documents as UTF-8


@dataclass
class Batch:
    """Documents that are tokenized together."""

    share: float  # how much of the group has been read after the last document
    texts: list
    n_chars: int = 0  # and one for each document, as there may be many without text


def tokenize_group(group, paths, folder, rules, tokenizer, n_threads, advance):
    """Write one group's shards, complete and fsynced, under their names; returns its record.

    paths: yields the path of each of its files. advance: called with the share of the group that is done, and the
    latest pieces.
    """
    seen = Counter()
    if is_shard(group.files[0]):
        batches = read_shard(next(paths), tokenizer, "val" if group.val_fraction else "train", seen)
    else:
        documents = read_group(group, paths, rules, seen)
        encode = partial(encode_batch, tokenizer=tokenizer, val_fraction=group.val_fraction)
        batches = encode_documents(documents, encode, n_threads)
    temporary = {split: folder / f"{split}_{group.stem}.bin.tmp" for split in SPLITS}
    counts = {split: Counts() for split in SPLITS}
    lengths = []
    with open_alone(temporary["train"]) as train, open_alone(temporary["val"]) as val:
        shards = {"train": train, "val": val}
        try:
            for share, pieces in batches:
                for piece in pieces:
                    data.write_shard(shards[piece.split], piece.tokens)
                    counts[piece.split].add(piece)
                    lengths += piece.lengths
                advance(share, pieces)
            for shard in shards.values():
                shard.flush()
                os.fsync(shard.fileno())
            for split in SPLITS:
                if counts[split].tokens:
                    os.replace(temporary[split], temporary[split].with_suffix(""))
        finally:
            for leftover in temporary.values():
                leftover.unlink(missing_ok=True)
    return {
        "format_version": 2,
        "files": [{key: file[key] for key in ("name", "size", "checksum")} for file in group.files],
        "stem": group.stem,
        "revision": group.files[0].get("revision"),
        "val_fraction": group.val_fraction,
        **rules,
        **{split: asdict(counts[split]) for split in SPLITS},
        "documents_without_text": seen["documents"] - len(lengths),
        "end_tokens_as_text": seen["end tokens"],
        "tokens_per_document": {"median": float(np.median(lengths or [0])), "max": max(lengths, default=0)},
    }


def read_group(group, paths, rules, seen):
    """Yields (share of the group that is read, text) of the documents of its files, and counts them in `seen`."""
    n_bytes = 0
    for file in group.files:
        for share, text in read_documents(next(paths), rules["text_field"], rules["split_blank_lines"]):
            seen["documents"] += 1
            seen["end tokens"] += (text or "").count(SPECIALS[0])
            yield (n_bytes + share * file["size"]) / group.size, text
        n_bytes += file["size"]


def read_documents(path, text_field, split_blank_lines):
    """Yields (share of the file that is read, text); the text is None or blank where a row has none.

    BadInput or OSError that names the file, and the place.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        documents = parquet_documents(path, text_field)
    elif name.endswith(".txt"):
        documents = txt_documents(path, split_blank_lines)
    else:
        documents = json_documents(path, text_field)
    for share, text in documents:
        if text and len(text) > MAX_DOCUMENT:
            remedy = "split it with --split_blank_lines=True" if name.endswith(".txt") else "split it into several"
            raise BadInput(f"{path}: a document has more than {MAX_DOCUMENT:,} characters: {remedy}")
        yield share, text


def parquet_documents(path, text_field):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:  # with a buffer, no row group is read as a whole
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise BadInput(f"{path}: no column {text_field!r}: set --text_field to one of {', '.join(columns)}")
            n_rows = 0
            for batch in file.iter_batches(16, columns=[text_field]):  # few at a time, as texts may be long
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str | None):
                        kind = type(text).__name__
                        raise BadInput(f"{path}: column {text_field!r} holds {kind}, not text: set --text_field")
                    n_rows += 1
                    yield n_rows / file.metadata.num_rows, text
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split(". ")[0]
        raise BadInput(f"{path}: damaged parquet file ({reason}): download it again, or leave it out") from None


def txt_documents(path, split_blank_lines):
    size = path.stat().st_size
    is_separator = is_end_line
    if split_blank_lines and not any(is_end_line(line) for line, _ in text_lines(path)):
        is_separator = str.isspace
    lines = []
    n_chars = 0
    is_whole = True
    for line, n_read in text_lines(path):
        if is_separator(line):
            is_whole = False
            if lines:
                yield n_read / size, "".join(lines).strip("\r\n")
            lines = []
            n_chars = 0
        elif n_chars <= MAX_DOCUMENT:  # what is longer is refused
            lines.append(line)
            n_chars += len(line)
    if lines or is_whole:
        text = "".join(lines)
        yield 1, text if is_whole else text.strip("\r\n")


def text_lines(path):
    """Yields (line, bytes of the file that are read so far); a line may end where it has MAX_DOCUMENT characters."""
    with open(path, encoding="utf-8-sig", newline="") as file:  # newline="": line ends stay as they are
        while line := file.readline(MAX_DOCUMENT):
            yield line, file.buffer.tell()


def is_end_line(line):
    """Whether a line of a .txt separates documents, as in TinyStories' files."""
    return line.strip() == SPECIALS[0]


def json_documents(path, text_field):
    for where, record, share in read_records(path):
        yield share, text_of(record, text_field, where)


def text_of(row, text_field, where):
    if not isinstance(row, dict) or text_field not in row:
        names = f"one of {', '.join(row)}" if row and isinstance(row, dict) else "a field that is there"
        raise BadInput(f"{where}: no field {text_field!r}: set --text_field to {names}")
    text = row[text_field]
    if text != text:  # pandas writes NaN where there is none
        return None
    if not isinstance(text, str | None):
        raise BadInput(f"{where}: {text_field!r} is {type(text).__name__}, not text")
    # JSON can spell half a surrogate pair, which has no UTF-8
    return text and text.encode("utf-8", errors="replace").decode()


def encode_documents(documents, encode, n_threads):
    """Yields (share of the documents that is read, pieces that `encode` returns) in the order of the documents.

    What waits or is being tokenized is bounded, so that the memory is.
    """
    pool = ThreadPoolExecutor(n_threads)
    pending = deque()
    try:
        for batch in group_documents(documents):
            pending.append((batch, pool.submit(encode, batch.texts)))
            while sum(batch.n_chars for batch, _ in pending) > 3 * n_threads * BATCH_CHARS:
                oldest, future = pending.popleft()
                yield oldest.share, future.result()
        for oldest, future in pending:
            yield oldest.share, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def group_documents(documents):
    """Yields batches of documents."""
    batch = Batch(1, [])
    for share, text in documents:
        batch.share = share
        batch.texts.append(text)
        batch.n_chars += 1 + len(text or "")
        if batch.n_chars >= BATCH_CHARS:
            yield batch
            batch = Batch(share, [])
    yield batch


def encode_batch(texts, tokenizer, val_fraction):
    """Tokenize documents: a piece for each split that has any, without documents that have no text."""
    texts_of = {split: [] for split in SPLITS}
    for text in texts:
        if text and not text.isspace():
            texts_of["val" if data.is_validation(text, val_fraction) else "train"].append(text)
    pieces = []
    for split in SPLITS:
        if texts_of[split]:
            arrays = [tokenizer.encode_document(text) for text in texts_of[split]]
            n_bytes = sum(len(text.encode("utf-8")) for text in texts_of[split])
            pieces.append(Piece(split, np.concatenate(arrays), [len(array) for array in arrays], n_bytes))
    return pieces


def read_shard(path, tokenizer, split, seen):
    """Yields a published shard as encode_documents does: its tokens, and at last the lengths of its documents.

    OSError when it is damaged, BadInput when it has tokens that the tokenizer does not know.
    """
    tokens = data.open_shard(path)
    if tokenizer.name != "bytes" and data.looks_like_bytes(tokens):
        print(f"warning: {path} has no token above 258: was it made with --tokenizer=bytes?")
    token_bytes = tokenizer.token_bytes()
    starts = []
    for first in range(0, len(tokens), SHARD_STEP):
        some = tokens[first : first + SHARD_STEP]
        if some.max() >= tokenizer.n_vocab:
            raise BadInput(
                f"{path}: has token {some.max()}, {tokenizer.name} only {tokenizer.n_vocab}: set --tokenizer"
            )
        starts += (first + np.flatnonzero(some == tokenizer.eot)).tolist()
        yield (first + len(some)) / len(tokens), [Piece(split, some, [], int(token_bytes[some].sum()))]
    lengths = np.diff([*starts, len(tokens)]).tolist()
    seen["documents"] = len(starts)
    yield 1, [Piece(split, tokens[:0], lengths, 0)]


# ----------------------------------------------------------------------------------------------------------------------
# the end


def summary(meta):
    """What the folder holds, with a warning for a split without documents."""
    lines = []
    for split, change in (("train", "decrease"), ("val", "increase")):
        counts = meta[split]
        lines.append(f"{split}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))
        if not counts["tokens"]:
            lines.append(
                f"warning: {split} got no document: {change} --val_fraction, split a .txt into documents with "
                "--split_blank_lines, or name files with --val_source; and choose another --out_dir"
            )
    n_files = sum(meta["ignored_files"].values())
    blank = f"{meta['documents_without_text']:,} documents without text"
    lines.append(f"not used: {blank}; this command ignored {n_files:,} files")
    if meta["end_tokens_as_text"]:
        lines.append(
            f"warning: the text contains {SPECIALS[0]} {meta['end_tokens_as_text']:,} times: it is kept as ordinary "
            "text, as only a line of its own in a .txt separates documents"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    configure(globals())
    main()
