"""Preference tuning (DPO): a finetuned model learns which answers are preferred.

    python prepare_instruct.py --source=pairs.json --out_dir=data/preferences
    python dpo.py --checkpoint=out/finetune/best.pt --data_dir=data/preferences

Direct Preference Optimization (Rafailov et al. 2023): the reference is the
checkpoint that the run starts from. The reward of an answer is beta times the
difference between its log-probabilities by the model and by the reference; the
loss is -log sigmoid(reward of the chosen answer - reward of the rejected one).
The reference's log-probabilities are computed once and kept in
out_dir/reference.npz. Writes into out_dir what finetune.py writes. The log's
loss is a mean over pairs, its "tokens" are pairs; a validation shows the margin
of the rewards and the preference accuracy, the share of pairs whose chosen
answer has the higher reward. Before the first step all rewards are 0, a tie,
which counts half.
"""

import json
import math
import time
from functools import partial
from pathlib import Path

from configurator import configure, settings_of

import numpy as np
import torch
import torch.nn.functional as F

from data import sources_of
from finetune import (
    MAY_CHANGE,
    QUESTIONS,
    answer,
    batch_at,
    check,
    fingerprint,
    load_base,
    load_conversations,
    sorted_batches,
    upgrade_settings,
    write_samples,
)
from model import IGNORE, cross_entropy_sum, make_optimizers
from run import (
    Run,
    autocast_for,
    broadcast_from_first,
    due,
    is_first_process,
    join_processes,
    pick_device,
    pick_dtype,
    prefetch,
    sum_over_ranks,
    whole_file,
)
from train import UNITS as TRAIN_UNITS
from train import lr_scale, set_learning_rates, train_step

# files
checkpoint = "out/finetune/best.pt"  # the model to start from, and the reference
data_dir = "data/preferences"  # folder of prepare_instruct.py, made from preferences
out_dir = "out/dpo"  # where the log, the checkpoints, reference.npz and samples.md go
init_from = "scratch"  # scratch, or resume: continue from out_dir/ckpt.pt
overwrite = False  # start over in an out_dir that holds a run
force = False  # resume even if settings that affect training differ
# optimization, by AdamW
beta = 0.1  # strength of the pull towards the reference: a reward's nats per nat of log-probability
label_smoothing = 0.0  # share of pairs assumed to be labelled the wrong way round (conservative DPO); below 0.5
length_normalized = False  # log-probabilities are means over an answer's tokens instead of sums
pairs_per_step = 16  # global batch, pairs
batch_size = 4  # pairs per forward pass; gradients are accumulated up to pairs_per_step
epochs = 1  # passes over the pairs
learning_rate = 1e-5  # peak
weight_decay = 0.0  # decoupled, on matrices and embeddings
beta2 = 0.95  # decay of the second moment
grad_clip = 1.0  # largest gradient norm; 0: no clipping
warmup_steps = 10  # linear from 0 to the peak; then a linear decay to 0
seed = 1337  # of the order of the pairs
# evaluation and output
eval_interval = 25  # steps between validations, which choose best.pt
log_interval = 10  # steps between printed lines
checkpoint_interval = 200  # steps between writes of ckpt.pt
keep_every = 0  # steps between weights that are kept, as step_00001000.pt; 0: none
tracker = ""  # wandb or trackio: show the run there too, in project fgpt
max_minutes = 0.0  # save and stop after this time; 0: no limit
answer_tokens = 64  # longest answer in samples.md, tokens
# machine
device = ""  # cpu, cuda, ...; empty: cuda where there is one
dtype = ""  # float32 or bfloat16; empty: bfloat16 where it was measured to be faster
activation_checkpointing = False  # less memory for a fifth more compute
deterministic = False  # use only deterministic kernels: the same bits every run, perhaps slower

UNITS = {
    **TRAIN_UNITS,
    "tokens": "trained pairs",
    "loss": "nats/pair",
    "val_loss": "nats/pair",
    "val_reward_margin": "nats, chosen - rejected, mean over pairs",
    "val_preference_accuracy": "share of pairs whose chosen answer has the higher reward",
}
LABELS = {"loss": "loss", "val_loss": "val", "val_preference_accuracy": "preferred"}
AT_LEAST_1 = {  # all other numbers must be at least 0
    "pairs_per_step", "batch_size", "epochs", "eval_interval", "log_interval", "checkpoint_interval", "answer_tokens",
}  # fmt: skip


def main():
    settings = settings_of(globals())
    rules = [
        (beta > 0, "beta must be above 0: with 0 nothing is learned"),
        (label_smoothing < 0.5, "label_smoothing must be below 0.5"),
    ]
    check(settings, AT_LEAST_1, rules)
    join_processes(settings["device"])
    device = pick_device(settings["device"], deterministic)
    model, tokenizer, base = load_base(settings, device)
    if base["stage"] == "pretrain":
        print(f"warning: {checkpoint} is not finetuned: preferences are for models that answer (finetune.py)")
    splits = load_conversations(data_dir, tokenizer, model.config.block_size, preferences=True)
    train, val = Pairs(splits[0]), Pairs(splits[1])
    n_steps = epochs * math.ceil(len(train) / pairs_per_step)
    optimizers = make_optimizers(model, "adamw", learning_rate, weight_decay=weight_decay, beta2=beta2)
    run = Run("dpo", settings, n_steps, UNITS, LABELS, may_change=MAY_CHANGE, upgrade=upgrade_settings)
    settings["device"] = device.type
    settings["dtype"] = pick_dtype(dtype or run.stored_settings.get("dtype", ""), device, model.config.n_embd)
    autocast = autocast_for(device, settings["dtype"])
    before = answer(model, tokenizer, QUESTIONS, answer_tokens, autocast)  # before `restore` changes the weights
    data = fingerprint(checkpoint, data_dir)
    # log-probabilities depend, within rounding, on the batches and the dtype that they were computed with
    reference_file = Path(out_dir, "reference.npz")
    belongs_to = json.dumps([*data, batch_size, settings["dtype"]])
    stored = broadcast_from_first(read_reference(reference_file, belongs_to))
    if stored is None:
        train.reference = reference_log_probs(model, train, batch_size, autocast)
        val.reference = reference_log_probs(model, val, batch_size, autocast)
    else:
        train.reference, val.reference = stored
    print(f"{len(train):,} pairs, {n_steps:,} steps of {pairs_per_step}; {len(val):,} for validation")
    print(f"on {settings['device']} in {settings['dtype']}")
    run.restore(model, optimizers, tokenizer.name, data, tokenizer.vocabulary, sources_of(data_dir), base)
    if stored is None and is_first_process():  # only now: a run that is refused writes nothing
        with whole_file(reference_file) as file:
            np.savez(file, train.reference.numpy(), val.reference.numpy(), belongs_to=belongs_to)
    batches = prefetch(partial(batch_at, train, pairs_per_step, seed), run.step, device)

    def margins_of(model, ids, mask, reference):
        return reward_margins(model, ids, mask, reference, beta, length_normalized)

    def loss_of(model, ids, mask, reference):
        return preference_losses(margins_of(model, ids, mask, reference), label_smoothing).sum()

    def evaluate(step):
        if due(step, eval_interval, n_steps):
            return preference_metrics(model, val, margins_of, label_smoothing, batch_size, autocast)
        return {}

    if run.step == 0:
        run.log_step_0(evaluate(0))
    while not run.is_over:
        started = time.perf_counter()
        batch = next(batches)
        rates = set_learning_rates(optimizers, lr_scale(run.step, n_steps, warmup_steps, decay_fraction=1.0))
        ids = batch[0]  # (P, 2, T)
        result = train_step(loss_of, model, optimizers, batch, len(ids), batch_size, grad_clip, autocast)
        row = run.count(result, len(ids), ids.numel(), seconds=time.perf_counter() - started)
        run.end_step(row | rates | evaluate(run.step))
    if is_first_process():
        write_samples(out_dir, before, tokenizer, device, autocast, answer_tokens)
    run.finish("samples.md")


class Pairs:
    """Conversations of which number 2i is the chosen and 2i + 1 the rejected one of pair i.

    reference: (N, 2) log-probabilities in nats of each pair's two answers by the reference, 0 until they are known.
    """

    def __init__(self, conversations):
        self.rows = conversations
        self.lengths = conversations.lengths.reshape(-1, 2).max(axis=1)
        self.reference = torch.zeros(len(self.lengths), 2)

    def __len__(self):
        return len(self.lengths)

    def batch(self, numbers):
        """(ids (P, 2, T) int64, mask (P, 2, T) bool, reference (P, 2)): each pair's chosen and rejected conversation.

        Padded with 0 on the right; the mask is true on the tokens of the answers.
        """
        width = int(self.lengths[numbers].max())
        ids = torch.zeros(len(numbers), 2, width, dtype=torch.long)
        mask = torch.zeros(len(numbers), 2, width, dtype=torch.bool)
        for pair, number in enumerate(numbers):
            for side in (0, 1):
                span = self.rows.span(2 * number + side)
                n = span.stop - span.start
                ids[pair, side, :n] = torch.from_numpy(self.rows.tokens[span].astype(np.int64))
                mask[pair, side, :n] = torch.from_numpy(self.rows.mask[span] == 1)
        return ids, mask, self.reference[torch.from_numpy(numbers)]


# ----------------------------------------------------------------------------------------------------------------------
# the loss


def answer_log_probs(model, ids, mask):
    """(P, 2) log-probability in nats of each chosen and rejected answer. ids, mask: (P, 2, T)."""
    targets = ids[..., 1:].masked_fill(~mask[..., 1:], IGNORE).flatten(0, 1)  # (2P, T - 1)
    hidden = model.hidden(ids[..., :-1].flatten(0, 1))  # (2P, T - 1, C)
    n_vocab = model.config.n_vocab
    losses = [cross_entropy_sum(h, model.head, t, n_vocab) for h, t in zip(hidden, targets, strict=True)]
    return -torch.stack(losses).view(-1, 2)


def reward_margins(model, ids, mask, reference, beta, length_normalized=False):
    """(P,) nats: reward of the chosen answer minus that of the rejected one. reference: (P, 2) log-probabilities."""
    ratios = answer_log_probs(model, ids, mask) - reference  # (P, 2)
    if length_normalized:
        ratios = ratios / mask.sum(dim=-1)
    return beta * (ratios[:, 0] - ratios[:, 1])


def preference_losses(margins, label_smoothing=0.0):
    """(P,) nats: -log sigmoid(margin) (Rafailov et al. 2023, eq. 7). label_smoothing: how likely a label is wrong."""
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


# ----------------------------------------------------------------------------------------------------------------------
# the reference, and validation


def read_reference(path, belongs_to):
    """(that of the training pairs, that of the validation pairs); None if missing, damaged, or made from others."""
    try:
        with np.load(path) as stored:  # compares checksums
            if stored["belongs_to"] != belongs_to:
                return None
            return torch.from_numpy(stored["arr_0"]), torch.from_numpy(stored["arr_1"])
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy and zipfile raise many kinds
        print(f"warning: {path} is damaged ({type(error).__name__}): what it held is computed again")
        return None


@torch.no_grad()  # not inference_mode: the result takes part in training
def reference_log_probs(model, pairs, batch_size, autocast):
    """(N, 2) fp32: the model's log-probability of the chosen and the rejected answer of each pair."""
    device = next(model.parameters()).device
    log_probs = torch.zeros(len(pairs), 2)
    for numbers in sorted_batches(pairs, batch_size):
        ids, mask, _ = pairs.batch(numbers)
        with autocast():
            found = answer_log_probs(model, ids.to(device), mask.to(device))
        log_probs[torch.from_numpy(numbers)] = found.float().cpu()
    return sum_over_ranks(log_probs)


@torch.inference_mode()
def preference_metrics(model, pairs, margins_of, label_smoothing, batch_size, autocast):
    """{"val_loss", "val_reward_margin", "val_preference_accuracy"}: means over all pairs; a tie counts half."""
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64)  # on the host, as Apple GPUs have no float64
    for numbers in sorted_batches(pairs, batch_size):
        batch = [part.to(device) for part in pairs.batch(numbers)]
        with autocast():
            margins = margins_of(model, *batch).cpu()
        right = ((margins > 0).double() + (margins >= 0)) / 2
        losses = preference_losses(margins, label_smoothing)
        sums += torch.stack([losses.sum().double(), margins.sum().double(), right.sum()])
    loss, margin, accuracy = (sum_over_ranks(sums) / len(pairs)).tolist()
    return {"val_loss": loss, "val_reward_margin": margin, "val_preference_accuracy": accuracy}


if __name__ == "__main__":
    configure(globals())
    main()
