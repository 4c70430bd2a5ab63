"""Supervised finetuning: a checkpoint of train.py and the rows of
prepare_instruct.py make an assistant.

    python finetune.py --checkpoint=out/mine/best.pt --out_dir=out/chat
    python finetune.py --checkpoint=out/mine/best.pt --out_dir=out/chat \\
        --init_from=resume

The loss counts the answers and their end tokens alone. Each validation also
scores the likeliest answers to a fixed sample of validation questions, and
HellaSwag with --hellaswag_items: finetuning must not ruin the base. Writes into
out_dir what train.py writes (log.jsonl, ckpt.pt, best.pt: talk to it with
sample.py) and samples.md: ten questions answered, and these scores, before and
after (by best.pt).
"""

import functools
import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

from configurator import configure, settings_of

import numpy as np
import torch

import hellaswag
from hub import checksum
from model import (
    IGNORE,
    join_processes,
    leave_processes,
    load_model,
    make_optimizers,
    pick_device,
    rank_and_world,
    sum_over_ranks,
)
from prepare_fineweb import read_json
from tokenizer import Tokenizer
from train import begin, check_settings, claim_out_dir, closing_line, due, fit, found_settings, lr_scale, stop_request

# files
checkpoint = "out/fgpt_712m/best.pt"  # the model to begin with; family and tokenizer come from it
data_dir = "data/instruct"  # folder of prepare_instruct.py
out_dir = "out/finetune"  # where the log, the checkpoints and samples.md go
init_from = "scratch"  # scratch, or resume: go on from out_dir/ckpt.pt
overwrite = False  # start anew in an out_dir that holds a run
force = False  # resume although settings changed that change the run
# optimization
optimizer = "adamw"  # adamw, or muon (AdamW for embeddings and norms)
rows_per_step = 32  # global batch, conversations
batch_size = 8  # micro-batch, conversations; the rest is accumulated
epochs = 3  # passes over the conversations
learning_rate = 3e-4  # peak of AdamW; a model of a few million parameters wants 1e-3
muon_learning_rate = 0.002  # peak of Muon
weight_decay = 0.0  # decoupled, on matrices and embeddings
beta2 = 0.95  # decay of AdamW's second moment (Muon's is 0.95)
grad_clip = 1.0  # largest gradient norm; 0: no clipping
warmup_steps = 10  # linear from 0 to the peak; then a linear decay to 0
seed = 1337  # of the order of the conversations
# evaluation and output
eval_interval = 50  # steps between validations, which choose best.pt
log_interval = 10  # steps between printed lines
checkpoint_interval = 200  # steps between writes of ckpt.pt
max_minutes = 0.0  # save and stop after this time; 0: no limit
answer_tokens = 64  # longest answer that is written, tokens
scored_answers = 64  # validation conversations whose answers are scored, a fixed sample; 0: none
hellaswag_items = 0  # items to score, the first of a fixed shuffle; 0: none
hellaswag_source = ""  # HellaSwag-format file; empty: the real one
# machine
device = ""  # cpu, cuda, ...; empty: cuda where there is one
dtype = ""  # float32, bfloat16 or native (bfloat16 where it is fast); empty: float32 on CPUs, else native
activation_checkpointing = False  # less memory for a third more compute
deterministic = False  # bit-identical runs where kernels would differ

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


class Conversations:
    """One side ("train" or "val") of prepare_instruct.py's folder, memory-mapped."""

    def __init__(self, folder, split):
        try:
            names = ("tokens", "mask", "offsets")
            self.tokens, self.mask, self.offsets = (
                np.load(Path(folder) / f"{split}_{name}.npy", mmap_mode="r") for name in names
            )
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{folder}: damaged ({error}): run prepare_instruct.py again") from None
        self.lengths = np.diff(self.offsets)

    def __len__(self):
        return len(self.lengths)

    def turns(self, number):
        """(ids of all that comes before an answer, ids of the answer without its end token), for each answer."""
        piece = slice(self.offsets[number], self.offsets[number + 1])
        ids, edges = self.tokens[piece].tolist(), np.flatnonzero(np.diff(self.mask[piece], prepend=0, append=0))
        return [(ids[:start], ids[start : end - 1]) for start, end in edges.reshape(-1, 2)]

    def batch(self, numbers):
        """(idx, targets), each (len(numbers), T) int64, padded on the right; targets not to be learned are -100."""
        width = max(int(self.lengths[numbers].max()) - 1, 1)
        idx, targets = torch.zeros(len(numbers), width, dtype=torch.long), torch.full((len(numbers), width), IGNORE)
        for row, number in enumerate(numbers):
            piece = slice(self.offsets[number], self.offsets[number + 1])
            ids, mask = torch.from_numpy(self.tokens[piece].astype(np.int64)), self.mask[piece]
            idx[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = ids[1:].masked_fill(torch.from_numpy(mask[1:] == 0), IGNORE)
        return idx, targets


@functools.lru_cache(maxsize=2)
def epoch_order(conversations, rows, seed, epoch):
    """A random order of all conversations, as batches of `rows` of similar length, so that little is padding."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(conversations))
    groups = [order[i : i + 32 * rows] for i in range(0, len(order), 32 * rows)]
    order = np.concatenate([group[np.argsort(conversations.lengths[group], kind="stable")] for group in groups])
    batches = [order[i : i + rows] for i in range(0, len(order), rows)]
    return [batches[i] for i in rng.permutation(len(batches))]


def conversation_batch(conversations, rows, seed, step):
    """The global batch of a step, a pure function of (seed, step): (idx, targets), each (rows, T) int64."""
    epoch, position = divmod(step, -(-len(conversations) // rows))
    return conversations.batch(epoch_order(conversations, rows, seed, epoch)[position])


@torch.inference_mode()
def answer_loss(model, conversations, batch_size, autocast):
    """{"val_loss": nats per supervised token over all conversations}."""
    device, (rank, world) = next(model.parameters()).device, rank_and_world()
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats, supervised tokens
    order = np.argsort(conversations.lengths, kind="stable")
    for start in range(rank * batch_size, len(order), world * batch_size):
        idx, targets = conversations.batch(order[start : start + batch_size])
        with autocast():
            sums[0] += model(idx.to(device), targets.to(device)).double()
        sums[1] += int((targets != IGNORE).sum())
    nats, n_targets = sum_over_ranks(sums).tolist()
    return {"val_loss": nats / n_targets}


def complete(model, prompts, stop, max_new_tokens, autocast, batch_size=32):
    """The likeliest continuation of each prompt (lists of ids) up to `stop`, as a list of ids without it."""
    texts, order = [[]] * len(prompts), sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for rows in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
        with autocast():
            steps = list(model.generate([prompts[i] for i in rows], max_new_tokens, temperature=0, stop=stop))
        for i, ids in zip(rows, torch.stack(steps, dim=1).tolist(), strict=True):
            texts[i] = [token for token in ids if token not in (-1, stop)]
    return texts


def answers(model, tokenizer, questions, max_new_tokens, autocast):
    """The likeliest answer to each question, as text; a note for one too long for the context."""
    asked = [
        tokenizer.render([dict(role="user", content=question)])[0] + [tokenizer.assistant] for question in questions
    ]
    fitting = [i for i, ids in enumerate(asked) if len(ids) < model.config.block_size]
    texts = ["(the question does not fit into the context)"] * len(asked)
    given = complete(model, [asked[i] for i in fitting], tokenizer.eot, max_new_tokens, autocast)
    for i, ids in zip(fitting, given, strict=True):
        texts[i] = tokenizer.decode(ids)
    return texts


def token_f1(given, right):
    """Harmonic mean of precision and recall of the words of an answer (SQuAD's F1, Rajpurkar et al. 2016)."""
    given, right = (Counter(re.findall(r"\w+", text.lower())) for text in (given, right))
    common = (given & right).total()
    return 2 * common / (given.total() + right.total()) if common else float(given == right)


def answer_scores(model, tokenizer, conversations, limit, max_new_tokens, autocast):
    """Exact match (but for case) and F1 of the likeliest answers, means over first turns and over second ones.

    Of a fixed sample of `limit` conversations; a second answer follows the right first one. {name: share}, the names
    of second turns end in _2; without those that no conversation of the sample has.
    """
    sample = np.random.default_rng(0).permutation(len(conversations))[:limit]
    turns = [(number, *turn) for i in sample for number, turn in enumerate(conversations.turns(i)[:2])]
    given = complete(model, [asked for _, asked, _ in turns], tokenizer.eot, max_new_tokens, autocast)
    scores = {}
    for (number, _, right), ids in zip(turns, given, strict=True):
        text, right = tokenizer.decode(ids).strip(), tokenizer.decode(right).strip()
        values = (text.lower() == right.lower(), token_f1(text, right))
        for name, value in zip(("val_exact_match", "val_f1"), values, strict=True):
            scores.setdefault(name + "_2" * number, []).append(value)
    return {name: sum(values) / len(values) for name, values in scores.items()}


def write_samples(out_dir, before, tokenizer, device, autocast, max_new_tokens):
    """samples.md: the ten questions and what the log has measured, before the first step and with best.pt."""
    best, stored = load_model(f"{out_dir}/best.pt", device)
    first = json.loads(Path(out_dir, "log.jsonl").read_text(encoding="utf-8").splitlines()[1])
    rows = zip(QUESTIONS, before, answers(best, tokenizer, QUESTIONS, max_new_tokens, autocast), strict=True)
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    scores = [
        [name, f"{first[name]:.4f}", f"{value:.4f}"] for name, value in stored["metrics"].items() if name in first
    ]
    lines = []
    for title, table in (("question", rows), ("measure", scores)):
        lines += [f"| {title} | before | after |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in table), ""]
    Path(out_dir, "samples.md").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")


def load_conversations(folder, tokenizer, block_size, preferences=False):
    """(train, val). FileNotFoundError, or ValueError when they were not prepared for this model and stage."""
    path, what = Path(folder) / "meta.json", "preferences" if preferences else "conversations"
    meta = read_json(path) if path.exists() else {}
    if "supervised" not in meta.get("train", {}):
        raise FileNotFoundError(f"{folder}: no {what} there: run prepare_instruct.py --out_dir={folder}")
    if meta.get("preferences", False) != preferences:
        raise ValueError(f"{folder} does not hold {what}: finetune.py learns conversations, dpo.py preferences")
    if meta["tokenizer"] != tokenizer.name:
        raise ValueError(f"{folder} was made with the {meta['tokenizer']} tokenizer, the model has {tokenizer.name}")
    sides = Conversations(folder, "train"), Conversations(folder, "val")
    longest = max(int(side.lengths.max()) for side in sides)
    if longest > block_size + 1:
        raise ValueError(
            f"{folder} has conversations of {longest} tokens, the model's block_size is {block_size}: "
            f"prepare_instruct.py --max_tokens={block_size + 1}"
        )
    if max(int(side.tokens.max()) for side in sides) >= tokenizer.n_vocab:
        raise ValueError(f"{folder} holds ids outside the vocabulary, it is damaged: run prepare_instruct.py again")
    return sides


def load_base(settings):
    """(model, tokenizer, device, autocast) to begin with, by the settings of finetune.py or dpo.py.

    ValueError for settings out of range, and if out_dir would overwrite the checkpoint.
    """
    check_settings(settings)
    if settings["eval_interval"] == 0 or settings["batch_size"] == 0:
        raise ValueError("eval_interval (validation chooses best.pt) and batch_size must be at least 1")
    path, out_dir = Path(settings["checkpoint"]), settings["out_dir"]
    if path.resolve().parent == Path(out_dir).resolve():
        raise ValueError(f"out_dir {out_dir} is where the checkpoint lies, which would be overwritten: name another")
    join_processes(settings["device"])
    compute, autocast = pick_device(settings["device"], settings["dtype"], settings["deterministic"])
    model, base = load_model(path, compute)
    coder = Tokenizer(base["tokenizer"])
    model.config.n_vocab = coder.n_vocab  # an imported GPT-2 has rows for the chat tokens that it does not use yet
    model.checkpoint_activations = settings["activation_checkpointing"]
    return model, coder, compute, autocast


def fingerprint(checkpoint, data_dir):
    """Checksums of the checkpoint and of the arrays of data_dir: by these a resumed run knows them again."""
    return [checksum(path) for path in (Path(checkpoint), *sorted(Path(data_dir).glob("*.npy")))]


def finish(state, out_dir, before, tokenizer, device, autocast, answer_tokens):
    """Write samples.md, and say where the weights lie."""
    if rank_and_world()[0] == 0:
        write_samples(out_dir, before, tokenizer, device, autocast, answer_tokens)
    print(f"{closing_line(state, out_dir)}; samples.md")
    leave_processes()


def main():
    settings = settings_of(globals())
    model, coder, compute, autocast = load_base(settings)
    settings |= found_settings(compute, autocast)
    train, val = load_conversations(data_dir, coder, model.config.block_size)
    items = hellaswag.load_items(hellaswag_source, hellaswag_items) if hellaswag_items else []
    max_steps = epochs * -(-len(train) // rows_per_step)
    optimizers = make_optimizers(model, optimizer, learning_rate, muon_learning_rate, weight_decay, beta2)
    lr_at = partial(lr_scale, max_steps=max_steps, warmup_steps=warmup_steps, decay_fraction=1.0)
    before = answers(model, coder, QUESTIONS, answer_tokens, autocast)
    data = fingerprint(checkpoint, data_dir)
    record = {"stage": "finetune", "tokenizer": coder.name, "settings": settings, "data": data}
    checkpoint_of_run = claim_out_dir(out_dir, init_from, overwrite)
    state = begin(model, optimizers, record, checkpoint_of_run, force, out_dir)
    print(f"{len(train):,} conversations, {max_steps:,} steps of {rows_per_step}; {len(val):,} for validation")

    def metrics_at(step):
        if not due(step, eval_interval, max_steps):
            return {}
        metrics = answer_loss(model, val, batch_size, autocast)
        metrics |= answer_scores(model, coder, val, scored_answers, answer_tokens, autocast)
        scores = hellaswag.evaluate(model, coder, items, autocast=autocast) if items else {}
        return metrics | {f"hellaswag_{name}": scores[name] for name in ("acc", "acc_norm") if items}

    fit(
        model, optimizers, partial(conversation_batch, train, rows_per_step, seed), metrics_at, lr_at, record, state,
        out_dir=out_dir, max_steps=max_steps, batch_size=batch_size, grad_clip=grad_clip, autocast=autocast,
        should_stop=stop_request(max_minutes), log_interval=log_interval, checkpoint_interval=checkpoint_interval,
    )  # fmt: skip
    finish(state, out_dir, before, coder, compute, autocast, answer_tokens)


if __name__ == "__main__":
    configure(globals())
    main()
