"""Text to token shards: FineWeb-Edu or another dataset of the Hugging Face Hub, or files of your own.

    python prepare_fineweb.py --subset=sample/10BT --out_dir=data/fineweb
    python prepare_fineweb.py --source=train.txt --val_source=val.txt --tokenizer=bytes --out_dir=data/mine

A source is a Hub dataset (owner/name), or a local file, folder or glob; several are separated by commas. Formats:
.parquet, .jsonl and .jsonl.gz (one document a row, in `text_field`) and .txt (one document a file).

Writes into out_dir, for each source file (NAME is its name and the first 8 digits of its checksum):
    train_NAME.bin, val_NAME.bin   shards: a header of 256 int32, then uint16 tokens; none without documents
    source_NAME.json               what went into them; written last, so a file that has one is finished
    meta.json                      tokenizer, split and totals, derived from all source_*.json
Stopped at any point, the same command goes on with the first source file that is not finished. A file is known by
its content: copies of it are taken once. HF_ENDPOINT and HF_TOKEN name another Hub and a token for it.
"""

import glob
import gzip
import hashlib
import json
import os
import re
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import quote

from configurator import configure

import numpy as np
import requests
from tqdm import tqdm

from tokenizer import Tokenizer

source = "HuggingFaceFW/fineweb-edu"  # Hub dataset, or local file, folder or glob; several separated by commas
subset = "sample/10BT"  # folder inside the Hub dataset (sample/100BT, sample/350BT, ...; empty: all of it)
out_dir = "data/fineweb"  # where the shards go
tokenizer = "gpt2"  # gpt2 or bytes
val_fraction = 0.005  # share of documents held out for validation, chosen by a hash of their text
val_source = ""  # files that are validation (like source); then all of source is train, without a hash
text_field = "text"  # parquet column or JSON field that holds a document
split_blank_lines = False  # a .txt is cut into documents at its blank lines
max_tokens = 0  # stop after the source file that brings train to this many tokens (0: all files)
workers = 0  # threads that tokenize (0: all cores)

FORMATS = (".parquet", ".jsonl", ".jsonl.gz", ".txt")
SPLITS = ("train", "val")
COUNTS = ("documents", "tokens", "bytes")  # what is counted of each; bytes of the text as UTF-8
RULES = ("tokenizer", "split", "text_field", "split_blank_lines")  # must be the same for all of a folder
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4  # llm.c's shard format
HASH_KEY = b"fgpt validation"  # never change it: a document would change sides
BATCH_CHARS = 250_000  # text that a thread tokenizes at a time
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


def find_shards(folder, split):
    """Sorted paths of a folder's shards, split "train" or "val".

    The beginning of a name decides (train_*.bin, val_*.bin); any other name counts that contains the word, so that
    shards by others work. Raises FileNotFoundError when there are none.
    """

    def split_of(name):
        starts = [word for word in SPLITS if name.startswith(f"{word}_")]
        return next(iter(starts + [word for word in ("val", "train") if word in name]), None)

    paths = sorted(path for path in Path(folder).glob("*.bin") if split_of(path.name) == split)
    if not paths:
        what = f"no {split} shards ({split}_*.bin) there" if Path(folder).is_dir() else "no such folder of shards"
        more = " and a larger --val_fraction" if split == "val" and Path(folder).is_dir() else ""
        raise FileNotFoundError(f"{folder}: {what}: make them with prepare_fineweb.py --out_dir={folder}{more}")
    return paths


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path}: not JSON, it is damaged: make it again") from None


def write_json(path, value):
    """Whole or not at all."""
    temporary = f"{path}.{os.getpid()}.tmp"  # machines that share the folder all write meta.json
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_records(folder):
    return [read_json(path) for path in sorted(Path(folder).glob("source_*.json"))]


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


def check_folder(folder, rules, sources):
    """The folder's records by checksum. Raises ValueError when they do not go with these rules and sources."""
    records = read_records(folder)
    for name in RULES:
        for record in records:
            if record[name] != rules[name]:
                raise ValueError(
                    f"{folder} was prepared with {name} {record[name]!r}, not {rules[name]!r}: choose another "
                    "--out_dir, or delete its source_*.json and *.bin to begin anew"
                )
    by_name = {record["source"]: record for record in records}
    by_content = {record["checksum"]: record for record in records}
    for file in sources:
        named, same = by_name.get(file["name"], {}), by_content.get(file["checksum"], {})
        changed = named.get("checksum", file["checksum"]) != file["checksum"]
        if changed or same.get("val_fraction", file["val_fraction"]) != file["val_fraction"]:
            raise ValueError(
                f"{file['name']} has changed {'' if changed else 'sides '}since {folder} was prepared: choose another "
                f"--out_dir, or delete source_{(named if changed else same)['stem']}.json and its shards there"
            )
    return by_content


# ---------------------------------------------------------------------------------------------------------------------
# where the text comes from


def list_sources(source, val_source, subset, val_fraction):
    """The source files, validation files first: dicts of name, stem, size, checksum, val_fraction, and path or url."""
    found = {}
    for items, fraction in ((val_source, 1.0), (source, 0.0 if val_source else val_fraction)):
        for item in filter(None, map(str.strip, items.split(","))):
            for file in find_files(item, subset):
                stem = re.sub(r"[^\w.-]", "_", file["name"].rsplit("/", 1)[-1].split(".")[0])[:80]
                stem = f"{stem}_{file['checksum'][:8]}"
                found.setdefault(file["checksum"], {**file, "stem": stem, "val_fraction": fraction})
    if all(file["val_fraction"] == 1 for file in found.values()):
        raise ValueError(f"source={source!r} has no file to train on (files of val_source do not count)")
    return list(found.values())


def find_files(item, subset):
    """Files of one local path, glob or Hub dataset."""
    path = Path(item)
    if path.is_dir():
        paths = [p for p in path.rglob("[!.]*") if p.name.endswith(FORMATS) and p.is_file()]
    elif path.exists():
        paths = [path]
    elif any(character in item for character in "*?["):
        paths = [p for p in map(Path, glob.glob(item, recursive=True)) if p.is_file()]
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", item) and not item.endswith(FORMATS):
        return list_hub(item, subset)
    else:
        raise FileNotFoundError(f"{item}: no such file or folder (a dataset of the Hub is owner/name)")
    if not paths:
        raise FileNotFoundError(f"{item}: no {', '.join(FORMATS)} files there")
    return [local_file(path) for path in tqdm(sorted(paths), "checksums", delay=2, leave=False, disable=None)]


def local_file(path):
    size = path.stat().st_size
    if not path.name.endswith(FORMATS):
        raise ValueError(f"{path}: the name of a source file must end in {', '.join(FORMATS)}")
    if size == 0:
        raise ValueError(f"{path}: an empty file: get it again, or leave it out")
    return {"name": path.resolve().as_posix(), "path": path, "size": size, "checksum": checksum(path)}


def checksum(path, kind="sha256", start=b""):
    digest = hashlib.new(kind, start)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def list_hub(repo, subset):
    """Data files below a folder of a Hub dataset. The checksum is a sha256 (LFS) or a git blob hash (small files)."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    subset = subset.strip("/")
    url = f"{endpoint}/api/datasets/{repo}/tree/main{'/' * bool(subset)}{quote(subset)}?recursive=true"
    files, endings = [], set()
    while url:  # the listing comes in pages
        response = fetch(url)
        for entry in response.json():
            path = entry["path"]
            endings.add(Path(path).suffix)
            if entry["type"] == "file" and path.endswith(FORMATS[:3]):
                link = f"{endpoint}/datasets/{repo}/resolve/main/{quote(path)}"
                digest = entry.get("lfs", entry)["oid"]
                files.append({"name": f"{repo}/{path}", "url": link, "size": entry["size"], "checksum": digest})
        url = response.links.get("next", {}).get("url")
    if not files:
        raise ValueError(
            f"{repo}: no {', '.join(FORMATS[:3])} files in {subset or 'it'} (it has {', '.join(sorted(endings))}): "
            "name another folder with --subset"
        )
    return sorted(files, key=lambda file: file["name"])


def fetch(url, **options):
    """GET with the token, if there is one; requests drops it when a redirect leads to another host.

    Raises OSError, one line with the URL and what to do, on anything but a good answer.
    """
    advice = {
        401: "the dataset asks for a token: set HF_TOKEN",
        403: "the token in HF_TOKEN has no access: accept the dataset's terms on its page",
        404: "not there: check --source (a local path has to exist) and --subset",
        451: "withheld for legal reasons: choose another source",
    }
    token = os.environ.get("HF_TOKEN")
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        response = requests.get(url, headers=headers, timeout=(10, 60), **options)
    except requests.RequestException as error:
        raise OSError(f"{url}: no answer ({type(error).__name__}): check the network and HF_ENDPOINT") from None
    if response.status_code != 200:
        what = advice.get(response.status_code, "run the same command again later, it goes on where it stopped")
        raise OSError(f"{url}: HTTP {response.status_code}: {what}")
    if "text/html" in response.headers.get("Content-Type", ""):
        raise OSError(f"{url}: a web page came instead of data: is there a proxy or sign-in page in between?")
    return response


def download(file, folder):
    """Path of the source file, fetched and verified; one that was fetched before is taken as it is."""
    path = folder / (file["stem"] + next(ending for ending in FORMATS if file["name"].endswith(ending)))
    temporary = path.with_name(path.name + ".tmp")
    if path.exists():
        return path
    bar = tqdm(total=file["size"], desc=path.name, unit="B", unit_scale=True, leave=False, disable=None)
    with fetch(file["url"], stream=True) as response, open(temporary, "wb") as target, bar:
        try:
            for chunk in response.iter_content(1 << 20):
                target.write(chunk)
                bar.update(len(chunk))
        except requests.RequestException:
            pass  # the connection broke: the size tells
    size = temporary.stat().st_size
    if size != file["size"]:
        raise OSError(f"{file['url']}: got {size:,} of {file['size']:,} bytes: run the same command again")
    is_git = len(file["checksum"]) == 40
    found = checksum(temporary, "sha1", b"blob %d\0" % size) if is_git else checksum(temporary)
    if found != file["checksum"]:
        raise OSError(f"{file['url']}: checksum {found}, not {file['checksum']}: run the same command again")
    os.replace(temporary, path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# documents


def read_documents(path, text_field, split_blank_lines):
    """Yield the texts of a source file, None or blank where a row has none. Raises ValueError naming the file."""
    try:
        if path.name.endswith(".parquet"):
            yield from read_parquet(path, text_field)
        elif path.name.endswith(".txt"):
            yield from read_txt(path, split_blank_lines)
        else:
            yield from read_jsonl(path, text_field)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text: convert it first") from None


def read_parquet(path, text_field):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise ValueError(f"{path}: no column {text_field!r}: set --text_field to one of {', '.join(columns)}")
            for batch in file.iter_batches(256, columns=[text_field]):
                texts = batch.column(0).to_pylist()
                wrong = {type(text).__name__ for text in texts} - {"str", "NoneType"}
                if wrong:
                    raise ValueError(f"{path}: column {text_field!r} holds {wrong.pop()}, not text: set --text_field")
                yield from texts
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split(". ")[0]
        raise ValueError(f"{path}: not a sound parquet file ({reason}): get it again, or leave it out") from None


def read_txt(path, split_blank_lines):
    with open(path, encoding="utf-8", newline="") as file:  # newline="": line ends stay as they are
        if not split_blank_lines:
            yield file.read()
            return
        lines = []
        for line in file:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines).rstrip("\r\n")
                lines = []
        yield "".join(lines).rstrip("\r\n")


def read_jsonl(path, text_field):
    number = 0
    try:
        with gzip.open(path) if path.name.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict) or text_field not in row:
                    names = f"one of {', '.join(row)}" if row and isinstance(row, dict) else "a field that is there"
                    raise ValueError(f"{path}, line {number}: no field {text_field!r}: set --text_field to {names}")
                text = row[text_field]
                if not isinstance(text, str | None):
                    raise ValueError(f"{path}, line {number}: {text_field!r} is {type(text).__name__}, not text")
                # half a surrogate pair, which JSON can spell, has no UTF-8
                yield text and text.encode("utf-8", errors="replace").decode()
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error.msg}): mend or remove the line") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}, after line {number}: damaged gzip ({error}): get it again") from None


def batches(texts):
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text or "")
        if size >= BATCH_CHARS or len(group) >= 1000:
            yield group
            group, size = [], 0
    yield group


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


def in_order(n_threads, function, items):
    """Yield (item, function(item)) in the order of the items, few of them in work, so that memory stays bounded."""
    pending = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) > 3 * n_threads:
                item, future = pending.popleft()
                yield item, future.result()
        for item, future in pending:
            yield item, future.result()


def tokenize_file(file, path, folder, rules, tokenizer, n_threads, bar):
    """Write one source file's shards, complete and fsynced, under their names; return its record."""
    shards = {split: folder / f"{split}_{file['stem']}.bin" for split in SPLITS}
    temporary = {split: folder / f"{split}_{file['stem']}.bin.tmp" for split in SPLITS}
    counts = {split: np.zeros(len(COUNTS), np.int64) for split in SPLITS}
    lengths, n_rows = [], 0
    texts = read_documents(path, rules["text_field"], rules["split_blank_lines"])
    encode = partial(encode_batch, tokenizer=tokenizer, val_fraction=file["val_fraction"])
    try:
        with open(temporary["train"], "wb") as train, open(temporary["val"], "wb") as val:
            for batch, sides in in_order(n_threads, encode, batches(texts)):
                n_rows += len(batch)
                for target, (split, (tokens, sizes, n_bytes)) in zip((train, val), sides.items(), strict=True):
                    write_shard(target, tokens)
                    counts[split] += len(sizes), len(tokens), n_bytes
                    lengths += sizes
                    bar.update(len(tokens))
                bar.set_postfix_str(f"{len(lengths):,} documents of {path.name}", refresh=False)
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
        **{key: file[key] for key in ("stem", "size", "checksum", "val_fraction")},
        **rules,
        **{split: dict(zip(COUNTS, counts[split].tolist(), strict=True)) for split in SPLITS},
        "documents_without_text": n_rows - len(lengths),
        "tokens_per_document": {"median": float(np.median(lengths or [0])), "max": max(lengths, default=0)},
    }


def is_finished(folder, record):
    """Whether the shards that a record tells of are there, as long as it says."""
    for split in SPLITS:
        path, n_tokens = folder / f"{split}_{record['stem']}.bin", record[split]["tokens"]
        if n_tokens and not (path.exists() and path.stat().st_size == HEADER_BYTES + 2 * n_tokens):
            return False
    return True


def prepare(sources, records, folder, rules, tokenizer, n_threads, max_tokens):
    """Do every source file that is not finished, in order; return the records of all. ValueError if there is no text.

    records: what check_folder returned. Stops after the file with which train has max_tokens, unless that is 0.
    """
    done, n_train = [], 0
    with tqdm(unit=" tokens", unit_scale=True, disable=None) as bar:
        for file in sources:
            if 0 < max_tokens <= n_train:
                break
            record = records.get(file["checksum"])
            if not record or not is_finished(folder, record):
                path = file["path"] if "path" in file else download(file, folder)
                record = tokenize_file(file, path, folder, rules, tokenizer, n_threads, bar)
                n_documents = sum(record[split]["documents"] for split in SPLITS)
                tqdm.write(f"{file['name']}: {n_documents:,} documents")
                if n_documents:
                    write_json(folder / f"source_{file['stem']}.json", record)
                if "path" not in file:
                    path.unlink()
                if not n_documents:
                    continue
            done.append(record)
            n_train += record["train"]["tokens"]
    if not done:
        raise ValueError(f"{', '.join(file['name'] for file in sources[:3])}: no documents there, nothing to train on")
    return done


def summary(done, folder, seconds):
    """The closing table, with a warning for a side of the split that is empty."""
    n_train, n_val = (sum(record[split]["tokens"] for record in done) for split in SPLITS)
    documents = np.array([record["train"]["documents"] + record["val"]["documents"] for record in done])
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
            remedy = f"{change} --val_fraction or name files with --val_source, and choose another --out_dir"
            lines.append(f"warning: {split} got no document: {remedy}")
    return "\n".join(lines)


def main():
    if not 0 <= val_fraction < 1 or workers < 0 or max_tokens < 0:
        raise ValueError("val_fraction must be from 0 to below 1, workers and max_tokens 0 or more")
    started, folder = time.time(), Path(out_dir)
    encoder = Tokenizer(tokenizer)
    split = "by file" if val_source else f"hash < {val_fraction}"
    rules = dict(zip(RULES, (tokenizer, split, text_field, split_blank_lines), strict=True))
    try:
        sources = list_sources(source, val_source, subset, val_fraction)
        folder.mkdir(parents=True, exist_ok=True)
        records = check_folder(folder, rules, sources)
        done = prepare(sources, records, folder, rules, encoder, workers or os.cpu_count(), max_tokens)
    except KeyboardInterrupt:
        print("\nstopped: what is finished is kept, the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None
    write_json(folder / "meta.json", read_meta(folder))
    print(summary(done, folder, time.time() - started))


if __name__ == "__main__":
    configure(globals())
    main()
