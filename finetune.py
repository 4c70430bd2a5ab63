"""Supervised finetuning: trains a checkpoint of train.py on the rows of
prepare_instruct.py, to make an assistant.

    python finetune.py --checkpoint=out/mine/best.pt --out_dir=out/chat
    python finetune.py --checkpoint=out/mine/best.pt --out_dir=out/chat \\
        --init_from=resume

The loss counts only the answers and their end tokens. Each validation also
scores the most likely answers to a fixed sample of validation questions, and,
with --score_hellaswag, HellaSwag shows whether finetuning harms the base.
Writes into out_dir what train.py writes (log.jsonl, ckpt.pt, best.pt: talk to
it with sample.py) and samples.md: ten questions answered, and these scores,
before and after (by best.pt).
"""

import functools
import hashlib
import math
import re
import time
from collections import Counter
from functools import partial
from pathlib import Path

from configurator import BadInput, check_settings, configure, settings_of

import numpy as np
import torch

from data import read_json, sources_of
from model import IGNORE, make_optimizers
from run import (
    TRACKERS,
    Run,
    autocast_for,
    due,
    is_first_process,
    join_processes,
    load_model,
    pick_device,
    pick_dtype,
    prefetch,
    rank_and_world,
    row_of,
    sum_over_ranks,
)
from tokenizer import tokenizer_of_checkpoint
from train import UNITS as TRAIN_UNITS
from train import find_batch_size, load_hellaswag, lr_scale, next_token_loss, set_learning_rates, train_step

# files
checkpoint = "out/fgpt_712m/best.pt"  # the model to start from; family and tokenizer come from it
data_dir = "data/instruct"  # folder of prepare_instruct.py
out_dir = "out/finetune"  # where the log, the checkpoints and samples.md go
init_from = "scratch"  # scratch, or resume: continue from out_dir/ckpt.pt
overwrite = False  # start over in an out_dir that holds a run
force = False  # resume even if settings that affect training differ
# optimization, by AdamW
rows_per_step = 32  # global batch, conversations
batch_size = 8  # conversations per forward pass; gradients are accumulated up to rows_per_step; 0: as many as fit
epochs = 3  # passes over the conversations
learning_rate = 3e-4  # peak; 1e-3 is better for a model of a few million parameters
weight_decay = 0.0  # decoupled, on matrices and embeddings
beta2 = 0.95  # decay of the second moment
grad_clip = 1.0  # largest gradient norm; 0: no clipping
warmup_steps = 10  # linear from 0 to the peak; then a linear decay to 0
seed = 1337  # of the order of the conversations
# evaluation and output
eval_interval = 50  # steps between validations, which choose best.pt
log_interval = 10  # steps between printed lines
checkpoint_interval = 200  # steps between writes of ckpt.pt
keep_every = 0  # steps between weights that are kept, as step_00001000.pt; 0: none
tracker = ""  # wandb or trackio: show the run there too, in project fgpt
max_minutes = 0.0  # save and stop after this time; 0: no limit
answer_tokens = 64  # longest answer that is generated, tokens
scored_answers = 64  # validation conversations whose answers are scored, a fixed sample; 0: none
score_hellaswag = False  # score HellaSwag at each validation
hellaswag_source = ""  # HellaSwag-format file; empty: the real one
hellaswag_limit = 0  # items to score; 0: all
# machine
device = ""  # cpu, cuda, ...; empty: cuda where there is one
dtype = ""  # float32 or bfloat16; empty: bfloat16 where it was measured to be faster
activation_checkpointing = False  # less memory for a fifth more compute
deterministic = False  # use only deterministic kernels: the same bits every run, perhaps slower

UNITS = {
    **TRAIN_UNITS,
    "val_exact_match": "share of first answers",
    "val_f1": "mean over first answers",
    "val_exact_match_2": "share of second answers",
    "val_f1_2": "mean over second answers",
}
LABELS = {"loss": "loss", "val_loss": "val", "val_exact_match": "exact match", "hellaswag_acc": "hellaswag"}
AT_LEAST_1 = {  # all other numbers must be at least 0
    "rows_per_step", "epochs", "eval_interval", "log_interval", "checkpoint_interval", "answer_tokens",
}  # fmt: skip
MAY_CHANGE = {  # on resuming; files are recognized by their checksums
    "checkpoint", "data_dir", "epochs", "eval_interval", "answer_tokens", "scored_answers", "score_hellaswag",
    "hellaswag_source", "hellaswag_limit",
}  # fmt: skip
QUESTIONS = """What is the capital of France?
What is 2 + 2?
Say hello.
Define 'cat'.
What color is the sky?
Translate 'hello' to Spanish.
Where is the White House located?
Who wrote 'Romeo and Juliet'?
What is the boiling point of water?
Summarize the plot of '1984' by George Orwell.""".splitlines()


def main():
    settings = settings_of(globals())
    check(settings, AT_LEAST_1, [(score_hellaswag or hellaswag_limit == 0, "hellaswag_limit needs --score_hellaswag")])
    join_processes(settings["device"])
    device = pick_device(settings["device"], deterministic)
    model, tokenizer, base = load_base(settings, device)
    train, val = load_conversations(data_dir, tokenizer, model.config.block_size)
    hellaswag, items = load_hellaswag(score_hellaswag, hellaswag_source, hellaswag_limit)
    n_steps = epochs * math.ceil(len(train) / rows_per_step)
    optimizers = make_optimizers(model, "adamw", learning_rate, weight_decay=weight_decay, beta2=beta2)
    run = Run("finetune", settings, n_steps, UNITS, LABELS, may_change=MAY_CHANGE, upgrade=upgrade_settings)
    settings["device"] = device.type
    settings["dtype"] = pick_dtype(dtype or run.stored_settings.get("dtype", ""), device, model.config.n_embd)
    autocast = autocast_for(device, settings["dtype"])
    if batch_size == 0:
        stored_size = run.stored_settings.get("batch_size", 0)
        settings["batch_size"] = find_batch_size(model, optimizers, stored_size, rows_per_step, autocast)
    micro_batch = settings["batch_size"]
    before = answer(model, tokenizer, QUESTIONS, answer_tokens, autocast)  # before `restore` changes the weights
    print(f"{len(train):,} conversations, {n_steps:,} steps of {rows_per_step}, {micro_batch} at a time")
    print(f"{len(val):,} conversations for validation")
    print(f"on {settings['device']} in {settings['dtype']}")
    data = fingerprint(checkpoint, data_dir)
    run.restore(model, optimizers, tokenizer.name, data, tokenizer.vocabulary, sources_of(data_dir), base)
    batches = prefetch(partial(batch_at, train, rows_per_step, seed), run.step, device)

    def evaluate(step):
        metrics = {}
        if not due(step, eval_interval, n_steps):
            return metrics
        metrics |= answer_loss(model, val, micro_batch, autocast)
        metrics |= answer_scores(model, tokenizer, val, scored_answers, answer_tokens, autocast)
        if score_hellaswag:
            scores = hellaswag.evaluate(model, tokenizer, items, autocast=autocast)
            metrics |= {"hellaswag_acc": scores["acc"], "hellaswag_acc_norm": scores["acc_norm"]}
        return metrics

    if run.step == 0:
        run.log_step_0(evaluate(0))
    while not run.is_over:
        started = time.perf_counter()
        idx, targets = batch = next(batches)
        rates = set_learning_rates(optimizers, lr_scale(run.step, n_steps, warmup_steps, decay_fraction=1.0))
        n_targets = int((targets != IGNORE).sum())
        result = train_step(next_token_loss, model, optimizers, batch, n_targets, micro_batch, grad_clip, autocast)
        row = run.count(result, n_targets, idx.numel(), seconds=time.perf_counter() - started)
        run.end_step(row | rates | evaluate(run.step))
    if is_first_process():
        write_samples(out_dir, before, tokenizer, device, autocast, answer_tokens)
    run.finish("samples.md")


# ----------------------------------------------------------------------------------------------------------------------
# preparation, for dpo.py too


def check(settings, at_least_1, rules=()):
    """BadInput that names every setting that cannot be used; at_least_1 and rules: see check_settings."""
    path = Path(settings["checkpoint"])
    folder = Path(settings["out_dir"])
    start = settings["init_from"]
    rules = [
        *rules,
        (start in ("scratch", "resume"), f"init_from must be scratch or resume, not {start!r}"),
        (settings["beta2"] < 1, "beta2 must be below 1"),
        (settings["tracker"] in TRACKERS, f"tracker must be wandb or trackio, not {settings['tracker']!r}"),
        (
            path.resolve().parent != folder.resolve(),
            f"out_dir {folder} is the folder of the checkpoint, which would be overwritten: choose another",
        ),
    ]
    check_settings(settings, at_least_1, rules)


def load_base(settings, device):
    """(the model to start from, its tokenizer, the checkpoint's other entries)."""
    model, stored = load_model(settings["checkpoint"], device)
    model.checkpoint_activations = settings["activation_checkpointing"]
    tokenizer = tokenizer_of_checkpoint(stored)
    model.config.n_vocab = tokenizer.n_vocab  # an imported GPT-2 has rows for the chat tokens that it does not use yet
    return model, tokenizer, stored


def load_conversations(folder, tokenizer, block_size, preferences=False):
    """(train, val) Conversations. FileNotFoundError or BadInput when they do not suit this model and stage."""
    path = Path(folder) / "meta.json"
    kind = "preferences" if preferences else "conversations"
    meta = read_json(path, {"tokenizer": str, "train": dict}) if path.exists() else {}
    if "supervised" not in meta.get("train", {}):
        raise FileNotFoundError(f"{folder}: no {kind} there: name the --out_dir of prepare_instruct.py")
    if meta.get("preferences", False) != preferences:
        raise BadInput(f"{folder} does not hold {kind}: finetune.py learns conversations, dpo.py preferences")
    if meta["tokenizer"] != tokenizer.name:
        raise BadInput(
            f"{folder} was made with the {meta['tokenizer']} tokenizer, the model has {tokenizer.name}: run "
            "prepare_instruct.py again with --tokenizer= the checkpoint"
        )
    splits = [Conversations(folder, "train"), Conversations(folder, "val")]
    longest = max(int(split.lengths.max()) for split in splits)
    if longest > block_size + 1:
        raise BadInput(
            f"{folder} has conversations of {longest} tokens, the model's block_size is {block_size}: "
            f"prepare_instruct.py --max_tokens={block_size + 1}"
        )
    if max(int(split.tokens.max()) for split in splits) >= tokenizer.n_vocab:
        raise BadInput(f"{folder} holds ids outside the vocabulary, it is damaged: run prepare_instruct.py again")
    return splits


def upgrade_settings(stored):
    """Change the settings of a checkpoint by an earlier version, in place, to today's. BadInput for a run with Muon."""
    if stored.pop("optimizer", "adamw") != "adamw":
        raise BadInput("this run was trained with Muon, which is no longer offered here: start a new run")
    stored.pop("muon_learning_rate", None)
    if stored.pop("hellaswag_items", 0):
        print("HellaSwag is scored with --score_hellaswag=True now")


def fingerprint(checkpoint, data_dir):
    """Checksums of the checkpoint and the arrays of data_dir, by which a resumed run recognizes them."""
    paths = [checkpoint, *sorted(Path(data_dir).glob("*.npy"))]
    # mapped rather than read: a checkpoint has gigabytes
    return [hashlib.sha256(np.memmap(path, mode="r")).hexdigest() for path in paths]


# ----------------------------------------------------------------------------------------------------------------------
# data


class Conversations:
    """One split ("train" or "val") of prepare_instruct.py's folder, memory-mapped."""

    def __init__(self, folder, split):
        def load(name):
            return np.load(Path(folder) / f"{split}_{name}.npy", mmap_mode="r")

        try:
            self.tokens = load("tokens")
            self.mask = load("mask")
            self.offsets = load("offsets")
        except (FileNotFoundError, ValueError, EOFError) as error:  # what may not be read is not damaged
            raise OSError(f"{folder}: damaged ({error}): run prepare_instruct.py again") from None
        self.lengths = np.diff(self.offsets)

    def __len__(self):
        return len(self.lengths)

    def span(self, number):
        """The slice of `tokens` and `mask` that is conversation `number`."""
        return slice(self.offsets[number], self.offsets[number + 1])

    def turns(self, number):
        """(ids of everything before an answer, ids of the answer without its end token), for each answer."""
        ids = self.tokens[self.span(number)].tolist()
        edges = np.flatnonzero(np.diff(self.mask[self.span(number)], prepend=0, append=0))
        return [(ids[:start], ids[start : end - 1]) for start, end in edges.reshape(-1, 2)]

    def batch(self, numbers):
        """(idx, targets), each (len(numbers), T) int64, padded on the right; targets not to be learned are -100."""
        width = max(int(self.lengths[numbers].max()) - 1, 1)
        idx = torch.zeros(len(numbers), width, dtype=torch.long)
        targets = torch.full((len(numbers), width), IGNORE)
        for row, number in enumerate(numbers):
            ids = torch.from_numpy(self.tokens[self.span(number)].astype(np.int64))
            mask = torch.from_numpy(self.mask[self.span(number)] == 1)
            idx[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = ids[1:].masked_fill(~mask[1:], IGNORE)
        return idx, targets


def batch_at(rows, n_rows, seed, step):
    """The global batch of a step, a pure function of (seed, step), from rows with `lengths` and `batch`."""
    epoch, position = divmod(step, math.ceil(len(rows) / n_rows))
    return rows.batch(epoch_order(rows, n_rows, seed, epoch)[position])


@functools.lru_cache(maxsize=2)
def epoch_order(rows, n_rows, seed, epoch):
    """A random order of all rows, as batches of n_rows of similar length, so that little is padding."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(rows))
    groups = [order[i : i + 32 * n_rows] for i in range(0, len(order), 32 * n_rows)]
    order = np.concatenate([group[np.argsort(rows.lengths[group], kind="stable")] for group in groups])
    batches = [order[i : i + n_rows] for i in range(0, len(order), n_rows)]
    return [batches[i] for i in rng.permutation(len(batches))]


def sorted_batches(rows, batch_size):
    """The numbers of all rows in batches of similar length, of which every process gets its share."""
    rank, world = rank_and_world()
    order = np.argsort(rows.lengths, kind="stable")
    return [order[start : start + batch_size] for start in range(rank * batch_size, len(order), world * batch_size)]


# ----------------------------------------------------------------------------------------------------------------------
# evaluation


@torch.inference_mode()
def answer_loss(model, conversations, batch_size, autocast):
    """{"val_loss": nats per supervised token over all conversations}."""
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64)  # nats, supervised tokens; on the host, as Apple GPUs have no float64
    for numbers in sorted_batches(conversations, batch_size):
        idx, targets = conversations.batch(numbers)
        with autocast():
            sums[0] += model(idx.to(device), targets.to(device)).item()
        sums[1] += int((targets != IGNORE).sum())
    nats, n_targets = sum_over_ranks(sums).tolist()
    return {"val_loss": nats / n_targets}


def answer_scores(model, tokenizer, conversations, limit, max_new_tokens, autocast):
    """Exact match (ignoring case) and F1 of the most likely answers: means over first turns and over second ones.

    Over a fixed sample of `limit` conversations; a second answer follows the right first one. {name: share}, the names
    of second turns end in _2; those that no conversation of the sample has are left out.
    """
    sample = np.random.default_rng(0).permutation(len(conversations))[:limit]
    prompts = []
    right = []  # (the answer, the end of its scores' names)
    for number in sample:
        for (prompt, answer), ending in zip(conversations.turns(number), ("", "_2"), strict=False):
            prompts.append(prompt)
            right.append((tokenizer.decode(answer).strip(), ending))
    given = most_likely(model, prompts, tokenizer.eot, max_new_tokens, autocast)
    scores = {}
    for ids, (answer, ending) in zip(given, right, strict=True):
        text = tokenizer.decode(ids).strip()
        scores.setdefault(f"val_exact_match{ending}", []).append(text.lower() == answer.lower())
        scores.setdefault(f"val_f1{ending}", []).append(token_f1(text, answer))
    return {name: sum(values) / len(values) for name, values in scores.items()}


def token_f1(given, right):
    """Harmonic mean of precision and recall of an answer's words (the F1 of SQuAD, Rajpurkar et al. 2016)."""
    given_words = Counter(re.findall(r"\w+", given.lower()))
    right_words = Counter(re.findall(r"\w+", right.lower()))
    common = (given_words & right_words).total()
    if common == 0:
        return float(given_words == right_words)
    return 2 * common / (given_words.total() + right_words.total())


def most_likely(model, prompts, stop, max_new_tokens, autocast, batch_size=32):
    """The most likely continuation of each prompt (lists of ids) up to `stop`, as a list of ids without it."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        with autocast():
            steps = list(model.generate([prompts[i] for i in rows], max_new_tokens, temperature=0, stop=stop))
        for i, ids in zip(rows, torch.stack(steps, dim=1).tolist(), strict=True):
            found[i] = [token for token in ids if token not in (-1, stop)]
    return [found[i] for i in range(len(prompts))]


def answer(model, tokenizer, questions, max_new_tokens, autocast):
    """The most likely answer to each question, as text; a note for one too long for the context."""
    texts = ["(the question does not fit into the context)"] * len(questions)
    prompts = {}
    for number, question in enumerate(questions):
        ids, _ = tokenizer.render([{"role": "user", "content": question}])
        if len(ids) + 1 < model.config.block_size:
            prompts[number] = [*ids, tokenizer.assistant]
    given = most_likely(model, list(prompts.values()), tokenizer.eot, max_new_tokens, autocast)
    for number, ids in zip(prompts, given, strict=True):
        texts[number] = tokenizer.decode(ids)
    return texts


def write_samples(out_dir, before, tokenizer, device, autocast, max_new_tokens):
    """samples.md: the ten questions and what the log has measured, before the first step and with best.pt."""
    best, stored = load_model(f"{out_dir}/best.pt", device)
    after = answer(best, tokenizer, QUESTIONS, max_new_tokens, autocast)
    rows = [row_of(line) for line in Path(out_dir, "log.jsonl").read_bytes().split(b"\n")]
    first = next((row for row in rows if row.get("step") == 0), {})  # a log that was lost has none
    lines = ["| question | before | after |", "|---|---|---|"]
    for row in zip(QUESTIONS, before, after, strict=True):
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| measure | before | after |", "|---|---|---|"]
    for name, value in stored["metrics"].items():
        if name in first:
            lines.append(f"| {name} | {first[name]:.4f} | {value:.4f} |")
    Path(out_dir, "samples.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    configure(globals())
    main()
