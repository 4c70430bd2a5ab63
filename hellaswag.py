"""HellaSwag: how often does a model prefer the right one of four endings of a
text?

    python hellaswag.py --checkpoint=out/best.pt
    python hellaswag.py --checkpoint=out/best.pt --source=mine.jsonl --limit=99

Every ending is scored by its log-likelihood after the context, without
<|endoftext|> before it. The two accuracies are printed with their standard
errors, and appended as one JSON line to hellaswag.jsonl next to the checkpoint.
Published numbers follow one of two conventions that must not be compared with
each other:

                       completion (the default)      --style=harness
    text               ctx + " " + ending            activity_label: ctx_a Ctx_b
                                                     + " " + ending, cleaned up
    acc: highest       sum of log-likelihoods        the same
    acc_norm: highest  mean per token                sum / ending's characters
    GPT-2 124M         acc 0.2859, acc_norm 0.2955   0.2892, 0.3114
    GPT-2 XL           acc 0.3842, acc_norm 0.4893   0.4004, 0.5089

Completion style is that of Karpathy's build-nanogpt and llm.c, harness that of
EleutherAI's lm-evaluation-harness. The items are the 10,042 of the validation
split; the labels of the test split are not public.

--chat=True shows a finetuned model the context as a user's turn and scores the
endings as answers; no published numbers belong to it. Under torchrun the
processes share the work and the numbers are the same. tools/contamination.py
counts how many of the items' contexts stand word for word in a folder of token
shards.
"""

import json
import os
import random
import re
from contextlib import nullcontext
from pathlib import Path

from configurator import configure

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from hub import download, list_hub
from model import join_processes, leave_processes, load_model, pick_device, rank_and_world, sum_over_ranks
from tokenizer import Tokenizer

checkpoint = "out/fgpt_712m/best.pt"  # the model to score
source = ""  # .jsonl or .parquet file; "" = the Hub's validation split, kept in data/hellaswag
limit = 0  # score only this many items, the first of a fixed shuffle; 0 = all
style = "completion"  # completion or harness: the convention, see above
chat = False  # the context as a user's turn, the endings as the assistant's: for finetuned checkpoints
batch_tokens = 0  # tokens in one batch, padding included; 0 = 2048 on a CPU, 16384 on GPUs
device = ""  # cpu, cuda, cuda:1, ...; "" = cuda where there is one
dtype = ""  # float32, bfloat16 or native (bfloat16 where it is fast); empty: float32 on CPUs, else native

HUB_DATASET, HUB_FILE = "Rowan/hellaswag", Path("data/hellaswag/validation.parquet")
HUB_ITEMS = 10_042
WIDTH_STEP = 16  # batches are padded to multiples of this, so that few shapes exist
LOGIT_ROWS = 128  # positions whose fp32 logits exist at once: 26 MB with GPT-2's vocabulary, more is slower on CPUs


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
    """Path of the validation split, from the Hub unless it was fetched before. OSError names what went wrong.

    Under torchrun every process must call it: the first fetches the file, the others wait.
    """
    rank, world = rank_and_world()
    if rank == 0 and not HUB_FILE.exists():
        file = list_hub(HUB_DATASET, "data", wanted=lambda path: "/validation" in path)[0]
        download({**file, "save_as": HUB_FILE.name}, HUB_FILE.parent)
    if world > 1:
        dist.barrier()
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


def render(item, tokenizer, style, chat=False):
    """One item as 4 rows (ids of context + ending, number of the ending's tokens, its characters).

    chat: the context is a user's turn and each ending the assistant's whole answer. Its end token is scored too, as
    finetuning learns it: an answer is its words and nothing more. ValueError for a bad style or missing fields.
    """
    if style not in ("completion", "harness"):
        raise ValueError(f"style must be completion or harness, not {style!r}")
    text, endings = (item["ctx"], item["endings"]) if style == "completion" else harness_texts(item)
    if chat:
        turns = [[dict(role="user", content=text.strip()), dict(role="assistant", content=e.strip())] for e in endings]
        rows = [(ids, sum(mask)) for ids, mask in map(tokenizer.render, turns)]
    elif style == "completion":
        context = tokenizer.encode(text)
        rows = [(context + ids, len(ids)) for ids in (tokenizer.encode(" " + ending) for ending in endings)]
    else:
        n_context = len(tokenizer.encode(text.rstrip()))  # spaces at the boundary count as the ending's
        rows = [(ids, len(ids) - n_context) for ids in (tokenizer.encode(text + " " + ending) for ending in endings)]
    # the clean-up may leave nothing of an ending
    return [(ids, n_scored, max(len(e), 1)) for (ids, n_scored), e in zip(rows, endings, strict=True)]


def harness_texts(item):
    """(context, endings) of an item in the harness's wording."""
    missing = [name for name in ("activity_label", "ctx_a", "ctx_b") if not isinstance(item.get(name), str)]
    if missing:
        raise ValueError(f"--style=harness needs the fields {', '.join(missing)}, which an item lacks: {item['ctx']!r}")
    text = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
    return text, [clean(ending) for ending in item["endings"]]


def clean(text):
    """The harness's clean-up: WikiHow's marks like [header] go, [title] becomes the end of a sentence."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


class Branches:
    """Lets rows that begin alike be run as one, with what they share computed once.

    It stands in for a KVCache: the model takes anything that has begin() and extend().
    position, branch: (B, T). A token sees the earlier ones of its own branch and of branch 0, the shared beginning.
    """

    def __init__(self, position, branch):
        own, shared = branch[:, :, None] == branch[:, None, :], branch[:, None, :] == 0
        causal = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool, device=branch.device).tril()
        self.position, self.mask = position, ((own | shared) & causal)[:, None]  # (B, 1, T, T)

    def begin(self, n_new):
        """Positions of the tokens: (B, T)."""
        return self.position

    def extend(self, layer, k, v):
        """Keys and values (B, H, T, D rounded up to a multiple of 8) to read, and who sees whom."""
        pad = (0, -k.shape[-1] % 8)  # as KVCache does
        return F.pad(k, pad), F.pad(v, pad), self.mask


def pack(rows):
    """Rows (ids, n_scored) that begin alike as one: (idx, position, branch, where, targets), lists.

    idx: the inputs they share, then each row's own. where: indices into idx whose output predicts the targets.
    Of the context c1 c2 with the endings a1 a2 and b1 b2:

        idx       c1 c2 a1 b1      where     1  2  1  3
        position  0  1  2  2       targets   a1 a2 b1 b2
        branch    0  0  1  2
    """
    n_shared = len(os.path.commonprefix([ids[:-1] for ids, _ in rows]))  # the last token is only predicted
    idx, position, branch, where, targets = rows[0][0][:n_shared], [*range(n_shared)], [0] * n_shared, [], []
    for number, (ids, n_scored) in enumerate(rows, 1):
        n_inputs, shift = len(ids) - 1, len(idx) - n_shared
        where += [i if i < n_shared else i + shift for i in range(n_inputs - n_scored, n_inputs)]
        targets += ids[-n_scored:]
        idx = idx + ids[n_shared:-1]
        position += range(n_shared, n_inputs)
        branch += [number] * (n_inputs - n_shared)
    return idx, position, branch, where, targets


def score_batch(model, batch, width, autocast):
    """Log-likelihoods of all targets of what `pack` returned, one after the other: (sum of targets,) fp32."""
    device = next(model.parameters()).device
    idx, position, branch = torch.zeros(3, len(batch), width, dtype=torch.long)
    branch -= 1  # padding is on the right, where nothing sees it
    for number, item in enumerate(batch):
        for tensor, values in zip((idx, position, branch), item[:3], strict=True):
            tensor[number, : len(values)] = torch.tensor(values)
    where = torch.tensor([number * width + i for number, item in enumerate(batch) for i in item[3]], device=device)
    targets = torch.tensor([target for item in batch for target in item[4]], device=device)
    with autocast():
        hidden = model.hidden(idx.to(device), Branches(position.to(device), branch.to(device)))  # (B, T, C)
    hidden = hidden.flatten(0, 1)[where].float()  # (n, C)
    chunks = zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    with torch.autocast(device.type, enabled=False):
        return torch.cat([-F.cross_entropy(model.logits(h).float(), t, reduction="none") for h, t in chunks])


def make_batches(lengths, batch_tokens):
    """[(width, indices)]: the longest come first, so that what does not fit into memory fails at once."""
    order, batches = np.argsort(-np.array(lengths), kind="stable").tolist(), []
    while order:
        width = -(-lengths[order[0]] // WIDTH_STEP) * WIDTH_STEP
        n = max(1, batch_tokens // width)
        batches.append((width, order[:n]))
        order = order[n:]
    return batches


@torch.inference_mode()
def log_likelihoods(model, items, batch_tokens=0, autocast=nullcontext, progress=False):
    """(number of rows,) float64: sum of the log-likelihoods, in nats, of each row's last n_scored tokens.

    items: lists of rows (ids, n_scored) with 0 < n_scored < len(ids) <= block_size + 1. What an item's rows have in
    common at their beginning is computed once. Processes of torchrun share the batches, and each returns all sums.
    """
    packed = [pack(rows) for rows in items]
    batch_tokens = batch_tokens or (2048 if next(model.parameters()).device.type == "cpu" else 16384)
    rank, world = rank_and_world()
    done, parts = [], []
    with tqdm(
        total=len(items), desc="hellaswag", unit=" items", disable=None if progress and rank == 0 else True
    ) as bar:
        for number, (width, batch) in enumerate(make_batches([len(item[0]) for item in packed], batch_tokens)):
            if number % world == rank:
                parts.append(score_batch(model, [packed[i] for i in batch], width, autocast))
                done += batch
            bar.update(len(batch))
    first = np.cumsum([0] + [len(rows) for rows in items])  # number of each item's first row
    sums = np.zeros(first[-1])
    if done:
        scores = torch.cat(parts).double().cpu().numpy()
        sizes = [n_scored for i in done for _, n_scored in items[i]]
        numbers = np.concatenate([np.arange(first[i], first[i + 1]) for i in done])
        sums[numbers] = np.add.reduceat(scores, np.cumsum([0] + sizes[:-1]))
    sum_over_ranks(torch.from_numpy(sums))  # one process has a sum, the others 0: the same to the last bit
    return sums


def evaluate(
    model, tokenizer, items, batch_tokens=0, autocast=nullcontext, style="completion", chat=False, progress=False
):
    """Score a GPT on items from `load_items`: acc, acc_norm, acc_stderr, acc_norm_stderr, items, cut in a dict.

    autocast: makes the context in which the network runs, see model.pick_device; the softmax is fp32 in any case.
    A standard error is sqrt(p (1 - p) / n). cut: number of items that do not fit into block_size; of those the model
    saw only the last block_size + 1 tokens. Leaves the model's mode and torch's random state as they were.
    Under torchrun every process must call it, with the same arguments, and gets the same numbers.
    Raises ValueError for another style, items that lack a field of harness style, and a model that has diverged.
    """
    groups, divisors, cut = [], [], 0
    longest = model.config.block_size + 1
    for item in items:
        rendered = render(item, tokenizer, style, chat)
        cut += any(len(ids) > longest for ids, _, _ in rendered)
        # the first token of a row has none before it to be predicted from
        rows = [(ids[-longest:], min(n_scored, len(ids[-longest:]) - 1)) for ids, n_scored, _ in rendered]
        groups.append(rows)
        divisors += [characters for _, _, characters in rendered] if style == "harness" else [n for _, n in rows]
    was_training = model.training
    model.eval()
    try:
        sums = log_likelihoods(model, groups, batch_tokens, autocast, progress)
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


def report(result, run, block_size):
    """Print the result, and append it to hellaswag.jsonl next to the checkpoint."""
    if result["cut"]:
        share = f"{result['cut']:,} of {result['items']:,} items"
        print(f"{share} are longer than block_size {block_size}: the model saw only their ends")
    scores = ", ".join(f"{name} {result[name]:.4f} ± {result[name + '_stderr']:.4f}" for name in ("acc", "acc_norm"))
    print(f"HellaSwag, {run['style']} style{', chat' * run['chat']}: {scores} ({result['items']:,} items)")
    with open(Path(run["checkpoint"]).parent / "hellaswag.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({**run, **result}) + "\n")


def main():
    rank, _ = join_processes(device)
    compute, autocast = pick_device(device, dtype)
    model, saved = load_model(checkpoint, compute)
    if chat and saved.get("stage", "pretrain") == "pretrain":
        raise ValueError(f"{checkpoint} is not finetuned: --chat=True is for models that answer")
    coder, items = Tokenizer(saved["tokenizer"]), load_items(source, limit)
    result = evaluate(model, coder, items, batch_tokens, autocast, style, chat, progress=True)
    if rank == 0:
        names = dict(source=source or HUB_DATASET, style=style, chat=chat)
        report(result, {"checkpoint": checkpoint, "step": saved["step"], **names}, model.config.block_size)
    leave_processes()


if __name__ == "__main__":
    configure(globals())
    main()
