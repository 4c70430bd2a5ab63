"""HellaSwag: how often does a model prefer the right one of four endings of a text?

    python hellaswag.py --checkpoint=out/best.pt
    python hellaswag.py --checkpoint=out/best.pt --source=my_items.jsonl --limit=1000

Every ending is scored by its log-likelihood after the context, without <|endoftext|> before it. The two accuracies
are printed with their standard errors, and appended as one JSON line to hellaswag.jsonl next to the checkpoint.
Published numbers follow one of two conventions that must not be compared with each other:

                            completion (this default)      --style=harness
    text                    ctx + " " + ending             activity_label: ctx_a Ctx_b + " " + ending, cleaned up
    acc       highest       sum of log-likelihoods         sum of log-likelihoods
    acc_norm  highest       mean per token                 sum / characters of the ending
    GPT-2 124M              acc 0.2859, acc_norm 0.2955    acc 0.2892, acc_norm 0.3114
    GPT-2 XL                acc 0.3842, acc_norm 0.4893    acc 0.4004, acc_norm 0.5089

Completion style is that of Karpathy's build-nanogpt and llm.c, harness that of EleutherAI's lm-evaluation-harness.
The items are the 10,042 of the validation split; the labels of the test split are not public.
"""

import json
import random
import re
from contextlib import nullcontext
from pathlib import Path

from configurator import configure

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from hub import download, list_hub
from model import load_model, pick_device
from tokenizer import Tokenizer

checkpoint = "out/fgpt_712m/best.pt"  # the model to score
source = ""  # .jsonl or .parquet file; "" = the Hub's validation split, kept in data/hellaswag
limit = 0  # score only this many items, the first of a fixed shuffle; 0 = all
style = "completion"  # completion or harness: the convention, see above
batch_tokens = 16384  # tokens in one batch, padding included
device = ""  # cpu, cuda, cuda:1, ...; "" = cuda where there is one
dtype = ""  # float32 or bfloat16 (autocast); "" = bfloat16 on GPUs that have it

HUB_DATASET, HUB_FILE = "Rowan/hellaswag", Path("data/hellaswag/validation.parquet")
HUB_ITEMS = 10_042
WIDTH_STEP = 32  # batches are padded to multiples of this, so that few shapes exist
LOGIT_ROWS = 2048  # positions whose fp32 logits exist at once: 0.4 GB with GPT-2's vocabulary


def load_items(source="", limit=0):
    """List of items, dicts with at least ctx (str), endings (4 str) and label (int, 0 to 3).

    source: a .jsonl or .parquet file, or "" for the validation split from the Hub, downloaded once.
    limit: return only this many, the first of a fixed shuffle (the file is sorted by origin); 0 = all, in file order.
    Raises FileNotFoundError, or ValueError that names the file and the line or row.
    """
    if limit < 0:
        raise ValueError(f"limit must be 0 (all items) or more, not {limit}")
    path = Path(source) if source else download_validation()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such HellaSwag file (--source= takes a .jsonl or .parquet file)")
    with open(path, "rb") as file:
        start = file.read(1000).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path} is an HTML page, not HellaSwag items: delete it and download it again")
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path}: HellaSwag items are read from .jsonl or .parquet files")
    records = read_jsonl(path) if path.suffix == ".jsonl" else read_parquet(path)
    items = [check_item(record, where) for where, record in records]
    if not items:
        raise ValueError(f"{path} has no items")
    if not source and len(items) != HUB_ITEMS:
        raise ValueError(f"{path} has {len(items):,} items, not {HUB_ITEMS:,}: delete it and try again")
    if limit:
        random.Random(0).shuffle(items)
    return items[: limit or None]


def download_validation():
    """Path of the validation split, from the Hub unless it was fetched before. OSError names what went wrong."""
    if not HUB_FILE.exists():
        file = next(file for file in list_hub(HUB_DATASET, "data") if "/validation" in file["name"])
        HUB_FILE.parent.mkdir(parents=True, exist_ok=True)
        download({**file, "save_as": HUB_FILE.name}, HUB_FILE.parent)
    return HUB_FILE


def read_jsonl(path):
    """Yields (where, record) for each line that is not blank; ValueError names the line that is not JSON."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{path}, line {number}", json.loads(line)
                except ValueError as error:  # not JSON, or not UTF-8
                    raise ValueError(f"{path}, line {number} is not JSON (is the file cut off?): {error}") from None


def read_parquet(path):
    """Yields (where, record) for each row; ValueError when the file is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        records = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file ({error}): delete it and get it again") from None
    for number, record in enumerate(records, 1):
        yield f"{path}, row {number}", record


def check_item(record, where):
    """The record with its label as int; ValueError that begins with `where` when it cannot be scored."""
    if not isinstance(record, dict) or not {"ctx", "endings"} <= record.keys():
        raise ValueError(f"{where}: an item needs the fields ctx, endings and label")
    if not isinstance(record["ctx"], str) or not record["ctx"].strip():
        raise ValueError(f"{where}: ctx must be text, not {record['ctx']!r}")
    endings = record["endings"]
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(e, str) and e for e in endings):
        raise ValueError(f"{where}: endings must be a list of 4 texts, not {endings!r}")
    label = record.get("label")
    if label is None or label == "":
        raise ValueError(f"{where} has no label: HellaSwag's test split cannot be scored, its validation split can")
    if str(label) not in ("0", "1", "2", "3"):  # some files have "3" for 3
        raise ValueError(f"{where}: label must be 0, 1, 2 or 3, not {label!r}")
    return {**record, "label": int(label)}


def render(item, tokenizer, style):
    """One item as 4 rows (ids of context + ending, number of the ending's tokens, its characters)."""
    if style == "completion":
        context = tokenizer.encode(item["ctx"])
        endings = [(tokenizer.encode(" " + ending), len(ending)) for ending in item["endings"]]
        return [(context + ids, len(ids), n_characters) for ids, n_characters in endings]
    if style != "harness":
        raise ValueError(f"style must be completion or harness, not {style!r}")
    missing = [name for name in ("activity_label", "ctx_a", "ctx_b") if not isinstance(item.get(name), str)]
    if missing:
        raise ValueError(f"--style=harness needs the fields {', '.join(missing)}, which an item lacks: {item['ctx']!r}")
    text = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
    n_context = len(tokenizer.encode(text.rstrip()))  # spaces at the boundary count as the ending's
    rows = []
    for ending in map(clean, item["endings"]):
        ids = tokenizer.encode(text + " " + ending)
        rows.append((ids, len(ids) - n_context, max(len(ending), 1)))  # the clean-up may leave nothing
    return rows


def clean(text):
    """The harness's clean-up: WikiHow's marks like [header] go, [title] becomes the end of a sentence."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def score_batch(model, rows, width, autocast):
    """Log-likelihoods of the endings' tokens of all rows, one after the other: (sum of n_scored,) fp32.

    rows: (ids, n_scored) with at most width + 1 ids. Padding is on the right, where a causal model cannot see it.
    """
    device = next(model.parameters()).device
    idx = torch.zeros(len(rows), width, dtype=torch.long)
    positions, targets = [], []  # the prediction of ids[i] is at position i - 1
    for number, (ids, n_scored) in enumerate(rows):
        idx[number, : len(ids) - 1] = torch.tensor(ids[:-1])
        end = number * width + len(ids) - 1
        positions.extend(range(end - n_scored, end))
        targets.extend(ids[-n_scored:])
    with autocast():
        hidden = model.hidden(idx.to(device))  # (B, T, C)
    hidden = hidden.flatten(0, 1)[torch.tensor(positions, device=device)].float()  # (n, C)
    chunks = zip(hidden.split(LOGIT_ROWS), torch.tensor(targets, device=device).split(LOGIT_ROWS), strict=True)
    with torch.autocast(device.type, enabled=False):
        return torch.cat([-F.cross_entropy(model.logits(h).float(), t, reduction="none") for h, t in chunks])


@torch.inference_mode()
def log_likelihoods(model, rows, batch_tokens=16384, autocast=nullcontext, progress=False):
    """(len(rows),) float64: sum of the log-likelihoods, in nats, of each row's last n_scored tokens.

    rows: (ids, n_scored) with 0 < n_scored < len(ids) <= block_size + 1. The longest come first, so that what does
    not fit into memory fails at once.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]), reverse=True)
    parts, start = [], 0
    with tqdm(total=len(rows), desc="hellaswag", unit=" endings", disable=not progress) as bar:
        while start < len(order):
            longest = len(rows[order[start]][0]) - 1  # the last token is only predicted
            width = min(-(-longest // WIDTH_STEP) * WIDTH_STEP, model.config.block_size)
            batch = [rows[i] for i in order[start : start + max(1, batch_tokens // width)]]
            parts.append(score_batch(model, batch, width, autocast))
            start += len(batch)
            bar.update(len(batch))
    scores = torch.cat(parts).double().cpu().numpy()
    starts = np.cumsum([0] + [rows[i][1] for i in order[:-1]])
    sums = np.empty(len(rows))
    sums[order] = np.add.reduceat(scores, starts)
    return sums


def evaluate(model, tokenizer, items, batch_tokens=16384, autocast=nullcontext, style="completion", progress=False):
    """Score a GPT on items from `load_items`: acc, acc_norm, acc_stderr, acc_norm_stderr, items, cut in a dict.

    autocast: makes the context in which the network runs, see model.pick_device; the softmax is fp32 in any case.
    A standard error is sqrt(p (1 - p) / n). cut: number of items that do not fit into block_size; of those the model
    saw only the last block_size + 1 tokens. Leaves the model's mode and torch's random state as they were.
    Raises ValueError for another style, items that lack a field of harness style, and a model that has diverged.
    """
    rows, divisors, cut = [], [], 0
    longest = model.config.block_size + 1
    for item in items:
        rendered = render(item, tokenizer, style)
        cut += any(len(ids) > longest for ids, _, _ in rendered)
        for ids, n_scored, n_characters in rendered:
            ids = ids[-longest:]
            n_scored = min(n_scored, len(ids) - 1)  # the first token has none before it to be predicted from
            rows.append((ids, n_scored))
            divisors.append(n_characters if style == "harness" else n_scored)
    was_training = model.training
    model.eval()
    try:
        sums = log_likelihoods(model, rows, batch_tokens, autocast, progress)
    finally:
        model.train(was_training)
    if np.isnan(sums).any():
        raise ValueError("the model's log-likelihoods are not numbers: its training has diverged")
    labels = np.array([item["label"] for item in items])
    result = {}
    for name, scores in (("acc", sums), ("acc_norm", sums / np.array(divisors))):
        accuracy = float(np.mean(scores.reshape(-1, 4).argmax(axis=1) == labels))
        result[name] = accuracy
        result[f"{name}_stderr"] = (accuracy * (1 - accuracy) / len(items)) ** 0.5
    return {**result, "items": len(items), "cut": cut}


def main():
    compute, autocast = pick_device(device, dtype)
    model, saved = load_model(checkpoint, compute)
    coder, items = Tokenizer(saved["tokenizer"]), load_items(source, limit)
    result = evaluate(model, coder, items, batch_tokens, autocast, style, progress=True)
    if result["cut"]:
        share = f"{result['cut']:,} of {result['items']:,} items"
        print(f"{share} are longer than block_size {model.config.block_size}: the model saw only their ends")
    scores = ", ".join(f"{name} {result[name]:.4f} ± {result[name + '_stderr']:.4f}" for name in ("acc", "acc_norm"))
    print(f"HellaSwag, {style} style: {scores} ({result['items']:,} items)")
    record = {
        "checkpoint": checkpoint,
        "step": saved["step"],
        "source": source or HUB_DATASET,
        "style": style,
        **result,
    }
    with open(Path(checkpoint).parent / "hellaswag.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    configure(globals())
    main()
