"""HellaSwag: how often does a model prefer the right one of four endings of a
text?

    python hellaswag.py --checkpoint=out/best.pt
    python hellaswag.py --checkpoint=out/best.pt --source=mine.jsonl --limit=99

Every ending is scored by its log-likelihood after the context, without an
<|endoftext|> before it. The two accuracies are printed with their standard
errors and appended as one JSON line to hellaswag.jsonl next to the checkpoint.
Published numbers follow one of two conventions, which must not be compared with
each other:

                       completion (the default)      --style=harness
    text               ctx + " " + ending            activity_label: ctx_a Ctx_b
                                                     + " " + ending, cleaned up
    acc: highest       sum of log-likelihoods        the same
    acc_norm: highest  mean per token                sum / ending's characters
    GPT-2 124M         acc 0.2859, acc_norm 0.2955   0.2892, 0.3114
    GPT-2 XL           acc 0.3842, acc_norm 0.4893   0.4004, 0.5089

Completion style is that of Karpathy's build-nanogpt and llm.c, harness style
that of EleutherAI's lm-evaluation-harness. The items are the 10,042 of the
validation split; the labels of the test split are not public.

--chat=True shows a finetuned model the context as a user's turn and scores the
endings as answers; there are no published numbers for this. Under torchrun the
processes share the work, and the numbers are the same. tools/contamination.py
counts how many contexts occur word for word in a folder of token shards.
"""

import json
import math
import random
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from configurator import BadInput, configure, settings_of

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import read_records
from model import n_shared
from run import (
    autocast_for,
    is_first_process,
    join_processes,
    leave_processes,
    load_model,
    pick_device,
    pick_dtype,
    rank_and_world,
    sum_over_ranks,
)
from tokenizer import tokenizer_of_checkpoint

checkpoint = "out/fgpt_712m/best.pt"  # the model to score
source = ""  # .jsonl, .parquet or .json file; empty: the Hub's validation split, kept in data/hellaswag
limit = 0  # score only this many items, the first of a fixed shuffle; 0: all
style = "completion"  # completion or harness: the convention, see above
chat = False  # the context as a user's turn, the endings as the assistant's: for finetuned checkpoints
device = ""  # cpu, cuda, cuda:1, ...; empty: cuda where there is one
dtype = ""  # float32 or bfloat16; empty: bfloat16 where it was measured to be faster

HUB_DATASET = "Rowan/hellaswag"
HUB_FILE = Path("data/hellaswag/validation.parquet")
HUB_ITEMS = 10_042
CPU_BATCH = 2048  # tokens in one batch, padding included
GPU_BATCH = 16384
WIDTH_STEP = 16  # batches are padded to multiples of this, so that there are few different shapes
SHARED = -1  # the branch of inputs that all rows of an item have
LOGIT_ROWS = 128  # positions whose fp32 logits exist at once: 26 MB with GPT-2's vocabulary; more is slower on CPUs


def main():
    settings = settings_of(globals())
    join_processes(settings["device"])
    device = pick_device(settings["device"])
    model, stored = load_model(checkpoint, device)
    if chat and stored["stage"] == "pretrain":
        raise BadInput(f"{checkpoint} is not finetuned: --chat=True is for models that answer")
    dtype = pick_dtype(settings["dtype"], device, model.config.n_embd)
    autocast = autocast_for(device, dtype)
    tokenizer = tokenizer_of_checkpoint(stored)
    items = load_items(source, limit)
    result = evaluate(model, tokenizer, items, autocast, style, chat)
    if is_first_process():
        report(result, stored["step"], dtype, model.config.block_size)
    leave_processes()


# ----------------------------------------------------------------------------------------------------------------------
# the items


def load_items(source="", limit=0):
    """List of items, dicts with at least ctx (str), endings (4 str) and label (int, 0 to 3).

    source: a .jsonl, .parquet or .json file, or "" for the validation split from the Hub, which is downloaded once.
    limit: return only this many, the first of a fixed shuffle (the file is sorted by origin); 0: all, in file order.
    OSError for a missing or damaged file; BadInput, with the file and the line or row, for what is not HellaSwag.
    """
    if limit < 0:
        raise BadInput(f"limit must be 0 (all items) or more, not {limit}")
    path = Path(source) if source else download_validation()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such HellaSwag file (--source= takes a .jsonl, .parquet or .json file)")
    items = [check_item(record, where) for where, record, _ in read_records(path)]
    if not items:
        raise BadInput(f"{path} has no items")
    if not source and len(items) != HUB_ITEMS:
        raise BadInput(f"{path} has {len(items):,} items, not {HUB_ITEMS:,}: delete it and try again")
    if limit:
        random.Random(0).shuffle(items)
        items = items[:limit]
    return items


def download_validation():
    """Path of the validation split, downloaded from the Hub unless it is there. OSError when that fails.

    Under torchrun every process must call it: the first one downloads the file, the others wait.
    """
    rank, world = rank_and_world()
    if rank == 0 and not HUB_FILE.exists():
        from hub import download, list_hub  # only here: scoring a local file does not need requests

        files = list_hub(HUB_DATASET, "data", wanted=lambda path: "/validation" in path)
        download({**files[0], "save_as": HUB_FILE.name}, HUB_FILE.parent)
    if world > 1:
        dist.barrier()
    return HUB_FILE


def check_item(record, where):
    """The record with its label as an int. BadInput that begins with `where` when it cannot be scored."""
    if not isinstance(record, dict) or not {"ctx", "endings"} <= record.keys():
        raise BadInput(f"{where}: an item needs the fields ctx, endings and label")
    if not isinstance(record["ctx"], str) or not record["ctx"].strip():
        raise BadInput(f"{where}: ctx must be text, not {record['ctx']!r}")
    endings = record["endings"]
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(e, str) and e for e in endings):
        raise BadInput(f"{where}: endings must be a list of 4 texts, not {endings!r}")
    label = record.get("label")
    if str(label) not in ("0", "1", "2", "3"):  # some files have "3" instead of 3
        raise BadInput(f"{where}: label must be 0, 1, 2 or 3, not {label!r} (the test split has no labels)")
    return {**record, "label": int(label)}


# ----------------------------------------------------------------------------------------------------------------------
# accuracies


def evaluate(model, tokenizer, items, autocast=nullcontext, style="completion", chat=False):
    """Score a GPT on items from `load_items`: acc, acc_norm, acc_stderr, acc_norm_stderr, items, cut in a dict.

    autocast: makes the context in which the network runs, see run.autocast_for; the softmax is fp32 in any case.
    A standard error is sqrt(p (1 - p) / n). cut: number of items that do not fit into block_size; of these the model
    sees only the last block_size + 1 tokens. BadInput for another style and for items that lack a field of harness
    style; FloatingPointError for a model that has diverged.
    Under torchrun every process must call it, with the same arguments, and gets the same numbers.
    """
    block_size = model.config.block_size
    groups = []  # the rows of each item
    divisors = []  # of each ending, for acc_norm
    cut = 0
    for item in items:
        context, endings = texts_of(item, style)
        rows = [make_row(context, ending, tokenizer, style, chat) for ending in endings]
        cut += any(len(ids) > block_size + 1 for ids, _ in rows)
        # Nothing predicts the first of the block_size + 1 tokens that are left.
        rows = [(ids[-block_size - 1 :], min(n_scored, block_size)) for ids, n_scored in rows]
        groups.append(rows)
        if style == "harness":
            divisors += [max(len(ending), 1) for ending in endings]  # the clean-up may leave nothing of an ending
        else:
            divisors += [n_scored for _, n_scored in rows]
    sums = log_likelihoods(model, groups, autocast)
    if np.isnan(sums).any():
        raise FloatingPointError("the model's log-likelihoods are not numbers: its training has diverged")
    labels = np.array([item["label"] for item in items])
    result = {}
    for name, scores in (("acc", sums), ("acc_norm", sums / np.array(divisors))):
        accuracy = float(np.mean(scores.reshape(-1, 4).argmax(axis=1) == labels))
        result[name] = accuracy
        result[f"{name}_stderr"] = (accuracy * (1 - accuracy) / len(items)) ** 0.5
    return {**result, "items": len(items), "cut": cut}


def texts_of(item, style):
    """(context, four endings) of an item, in the wording of the style. BadInput as `evaluate`."""
    if style == "completion":
        return item["ctx"], item["endings"]
    if style != "harness":
        raise BadInput(f"style must be completion or harness, not {style!r}")
    if not all(isinstance(item.get(name), str) for name in ("activity_label", "ctx_a", "ctx_b")):
        raise BadInput(f"--style=harness needs activity_label, ctx_a, ctx_b; an item lacks one: {item['ctx']!r}")
    context = clean_up(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
    return context, [clean_up(ending) for ending in item["endings"]]


def clean_up(text):
    """The harness's clean-up: WikiHow's marks like [header] are removed, [title] becomes the end of a sentence."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def make_row(context, ending, tokenizer, style, chat=False):
    """(ids of the context and an ending, how many of the last ids are scored).

    chat: the context is a user's turn and the ending the assistant's answer. Its end token is scored too, because
    finetuning teaches it: the ending is the whole answer.
    """
    if chat:
        question = {"role": "user", "content": context.strip()}
        answer = {"role": "assistant", "content": ending.strip()}
        ids, mask = tokenizer.render([question, answer])
        return ids, sum(mask)
    if style == "completion":
        scored = tokenizer.encode(" " + ending)
        return tokenizer.encode(context) + scored, len(scored)
    ids = tokenizer.encode(context + " " + ending)
    return ids, len(ids) - len(tokenizer.encode(context.rstrip()))  # spaces between them count to the ending


# ----------------------------------------------------------------------------------------------------------------------
# log-likelihoods


@torch.inference_mode()
def log_likelihoods(model, items, autocast=nullcontext):
    """(number of rows,) float64: sum of the log-likelihoods, in nats, of each row's last n_scored tokens.

    items: lists of rows (ids, n_scored) with 0 < n_scored < len(ids) <= block_size + 1. What the rows of an item share
    at their beginning is computed once. Under torchrun the processes share the batches, and each returns all sums.
    """
    different_rows, row_numbers = without_repetition(items)
    packed = [pack(rows) for rows in different_rows]
    on_cpu = next(model.parameters()).device.type == "cpu"
    batches = make_batches([len(item.inputs) for item in packed], CPU_BATCH if on_cpu else GPU_BATCH)
    first_rows = np.cumsum([0] + [len(rows) for rows in different_rows])  # the number of each item's first row
    rank, world = rank_and_world()
    scores = []  # of targets; they stay on the device, so that it need not wait for the host
    rows = []  # the number of each target's row
    no_bar = True if rank > 0 else None  # None: none unless stderr is a terminal
    for width, batch in tqdm(batches[rank::world], "hellaswag", unit=" batches", leave=False, disable=no_bar):
        scores.append(score_batch(model, [packed[i] for i in batch], width, autocast))
        rows += [first_rows[i] + row for i in batch for _, _, row in packed[i].targets]
    sums = np.zeros(first_rows[-1])
    if rows:
        sums = np.bincount(rows, torch.cat(scores).cpu().numpy(), minlength=len(sums))
    sum_over_ranks(torch.from_numpy(sums))  # one process has a row's sum, the others 0: exact
    return sums[row_numbers]


def without_repetition(items):
    """(each item's different rows, the number of each row among them): equal endings get one sum, not two that differ
    by rounding."""
    different_rows = []
    row_numbers = []
    n_rows = 0
    for rows in items:
        different = []
        for row in rows:
            if row not in different:
                different.append(row)
            row_numbers.append(n_rows + different.index(row))
        different_rows.append(different)
        n_rows += len(different)
    return different_rows, row_numbers


@dataclass
class Packed:
    """The rows of an item as one row of the network: what they share at their beginning, then each row's own.

    Of the context c1 c2 with the endings a1 a2 and b1 b2:

        inputs   token     c1 c2 a1 b1        targets   token  a1 a2 b1 b2
                 position  0  1  2  2                   input  1  2  1  3
                 branch    -1 -1 0  1                   row    0  0  1  1
    """

    inputs: list  # (token, its position in its row, SHARED or the number of its row)
    targets: list  # (token, index of the input whose output predicts it, number of its row)


def pack(rows):
    """Rows (ids, n_scored) as a Packed."""
    n = n_shared([ids[:-1] for ids, _ in rows])  # the last token of a row is only predicted
    inputs = [(token, position, SHARED) for position, token in enumerate(rows[0][0][:n])]
    targets = []
    for row, (ids, n_scored) in enumerate(rows):
        own = [(ids[position], position, row) for position in range(n, len(ids) - 1)]
        where = [*range(n), *range(len(inputs), len(inputs) + len(own))]  # the row's inputs among all
        inputs += own
        targets += [(token, i, row) for token, i in zip(ids[-n_scored:], where[-n_scored:], strict=True)]
    return Packed(inputs, targets)


def make_batches(lengths, batch_tokens):
    """[(width, indices)]: the longest come first, so that what does not fit into memory fails at once."""
    order = np.argsort(-np.array(lengths), kind="stable").tolist()
    batches = []
    while order:
        width = math.ceil(lengths[order[0]] / WIDTH_STEP) * WIDTH_STEP
        n = max(1, batch_tokens // width)
        batches.append((width, order[:n]))
        order = order[n:]
    return batches


def score_batch(model, batch, width, autocast):
    """Log-likelihoods of all targets of a list of Packed, one after the other: (number of targets,) fp32."""
    device = next(model.parameters()).device
    # Items are padded on the right, where nothing sees it.
    inputs = [item.inputs + [(0, 0, 0)] * (width - len(item.inputs)) for item in batch]
    idx, position, branch = torch.tensor(inputs, device=device).unbind(-1)  # (B, T) each
    targets = [token for item in batch for token, _, _ in item.targets]
    where = [number * width + i for number, item in enumerate(batch) for _, i, _ in item.targets]  # what predicts them
    with autocast():
        hidden = model.hidden(idx, Branches(position, branch))  # (B, T, C)
    hidden = hidden.flatten(0, 1)[torch.tensor(where, device=device)].float()  # (number of targets, C)
    targets = torch.tensor(targets, device=device)
    chunks = zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    return torch.cat([-F.cross_entropy(model.logits(h).float(), t, reduction="none") for h, t in chunks])


class Branches:
    """An AttentionCache of model.py that keeps nothing, and hides the branches of a Packed from each other.

    position, branch: (B, T). A token sees the earlier ones of its branch, and what is SHARED.
    """

    def __init__(self, position, branch):
        T = branch.shape[1]
        own = branch[:, :, None] == branch[:, None, :]
        shared = branch[:, None, :] == SHARED
        causal = torch.ones(T, T, dtype=torch.bool, device=branch.device).tril()
        self.position = position
        self.mask = ((own | shared) & causal)[:, None]  # (B, 1, T, T)

    def advance(self, n_new):
        """See AttentionCache."""
        return self.position

    def extend(self, layer, k, v):
        """See AttentionCache."""
        pad = (0, -k.shape[-1] % 8)
        return F.pad(k, pad), F.pad(v, pad), self.mask


# ----------------------------------------------------------------------------------------------------------------------


def report(result, step, used_dtype, block_size):
    """Print the result, and append it to hellaswag.jsonl next to the checkpoint."""
    cut = result["cut"]
    n_items = result["items"]
    if cut:
        print(f"{cut:,} of {n_items:,} items are longer than block_size {block_size}: the model saw only their ends")
    name = f"{style} style, chat" if chat else f"{style} style"
    acc = f"acc {result['acc']:.4f} ± {result['acc_stderr']:.4f}"
    acc_norm = f"acc_norm {result['acc_norm']:.4f} ± {result['acc_norm_stderr']:.4f}"
    print(f"HellaSwag, {name}: {acc}, {acc_norm} ({n_items:,} items, {used_dtype})")
    settings = dict(checkpoint=checkpoint, step=step, source=source or HUB_DATASET, style=style, chat=chat)
    settings["dtype"] = used_dtype
    with open(Path(checkpoint).parent / "hellaswag.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({**settings, **result}) + "\n")


if __name__ == "__main__":
    configure(globals())
    main()
