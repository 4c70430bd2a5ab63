"""Preference tuning (DPO): a finetuned model learns which answers are preferred.

    python prepare_instruct.py --source=pairs.json --out_dir=data/preferences
    python dpo.py --checkpoint=out/finetune/best.pt --data_dir=data/preferences

Direct Preference Optimization (Rafailov et al. 2023): an answer's reward is
beta times by how much more likely the model finds it than the checkpoint it
began with, the reference; the loss is -log sigmoid(reward of the chosen answer
- reward of the rejected one). The reference's log-probabilities are computed
once and kept in out_dir/reference.npz. Writes into out_dir what finetune.py
writes. The log's loss is a mean over pairs, its "tokens" are pairs; a
validation tells the margin of the rewards and the preference accuracy, the
share of pairs whose chosen answer has the higher reward. Before the first step
all rewards are 0, a tie, which counts half.
"""

import json
import os
from functools import partial
from pathlib import Path

from configurator import configure, settings_of

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from finetune import QUESTIONS, answers, conversation_batch, fingerprint, finish, load_base, load_conversations
from model import IGNORE, cross_entropy_sum, make_optimizers, rank_and_world, sum_over_ranks
from train import UNITS, begin, claim_out_dir, due, fit, found_settings, lr_scale, stop_request

# files
checkpoint = "out/finetune/best.pt"  # the model to begin with, and the reference
data_dir = "data/preferences"  # folder of prepare_instruct.py, made from preferences
out_dir = "out/dpo"  # where the log, the checkpoints, reference.npz and samples.md go
init_from = "scratch"  # scratch, or resume: go on from out_dir/ckpt.pt
overwrite = False  # start anew in an out_dir that holds a run
force = False  # resume although settings changed that change the run
# optimization
beta = 0.1  # how dear it is to leave the reference: a reward's nats per nat of log-probability
label_smoothing = 0.0  # share of pairs taken to be labelled the wrong way round (conservative DPO); below 0.5
length_normalized = False  # log-probabilities are means over an answer's tokens instead of sums
optimizer = "adamw"  # adamw, or muon (AdamW for embeddings and norms)
pairs_per_step = 16  # global batch, pairs
batch_size = 4  # micro-batch, pairs; the rest is accumulated
epochs = 1  # passes over the pairs
learning_rate = 1e-5  # peak of AdamW
muon_learning_rate = 0.0002  # peak of Muon
weight_decay = 0.0  # decoupled, on matrices and embeddings
beta2 = 0.95  # decay of AdamW's second moment (Muon's is 0.95)
grad_clip = 1.0  # largest gradient norm; 0: no clipping
warmup_steps = 10  # linear from 0 to the peak; then a linear decay to 0
seed = 1337  # of the order of the pairs
# evaluation and output
eval_interval = 25  # steps between validations, which choose best.pt
log_interval = 10  # steps between printed lines
checkpoint_interval = 200  # steps between writes of ckpt.pt
max_minutes = 0.0  # save and stop after this time; 0: no limit
answer_tokens = 64  # longest answer in samples.md, tokens
# machine
device = ""  # cpu, cuda, ...; empty: cuda where there is one
dtype = ""  # float32, bfloat16 or native (bfloat16 where it is fast); empty: float32 on CPUs, else native
activation_checkpointing = False  # less memory for a third more compute
deterministic = False  # bit-identical runs where kernels would differ

DPO_UNITS = UNITS | {
    "tokens": "trained pairs",
    "loss": "nats/pair",
    "val_loss": "nats/pair",
    "val_reward_margin": "nats, chosen - rejected, mean over pairs",
    "val_preference_accuracy": "share of pairs whose chosen answer has the higher reward",
}


class Pairs:
    """Conversations of which number 2i is the chosen and 2i + 1 the rejected one of pair i."""

    def __init__(self, conversations):
        self.rows = conversations
        self.lengths = conversations.lengths.reshape(-1, 2).max(axis=1)

    def __len__(self):
        return len(self.lengths)

    def batch(self, numbers):
        """(codes, numbers): (P, 2, T) int64 codes of chosen and rejected, padded with 0, and (P,) numbers of the pairs.

        A token's code is 2 * id, and 1 more where it is part of the answer: train_step knows a batch as (idx, targets),
        so ids and mask share one tensor, and a pair's number stands where a target would.
        """
        codes, rows = torch.zeros(len(numbers), 2, int(self.lengths[numbers].max()), dtype=torch.long), self.rows
        for pair, number in enumerate(numbers):
            for side in (0, 1):
                piece = slice(rows.offsets[2 * number + side], rows.offsets[2 * number + side + 1])
                ids = torch.from_numpy(2 * rows.tokens[piece].astype(np.int64) + rows.mask[piece])
                codes[pair, side, : len(ids)] = ids
        return codes, torch.from_numpy(np.asarray(numbers, np.int64))


def answer_log_probs(model, codes):
    """((P, 2) log-probability in nats of each chosen and rejected answer, (P, 2) number of its tokens)."""
    ids, learned = codes // 2, codes % 2 == 1  # (P, 2, T)
    targets = ids[..., 1:].masked_fill(~learned[..., 1:], IGNORE).flatten(0, 1)  # (2P, T - 1)
    hidden = model.hidden(ids[..., :-1].flatten(0, 1))  # (2P, T - 1, C)
    losses = [cross_entropy_sum(h, model.wte.weight, t) for h, t in zip(hidden, targets, strict=True)]
    return -torch.stack(losses).view(-1, 2), learned.sum(dim=-1)


class PreferenceLoss(nn.Module):
    """The DPO loss around a model. reference: (N, 2) log-probabilities by the reference of each pair's two answers."""

    def __init__(self, model, reference, beta, label_smoothing=0.0, length_normalized=False):
        super().__init__()
        self.model, self.beta, self.label_smoothing = model, beta, label_smoothing
        self.length_normalized = length_normalized
        self.register_buffer("reference", reference)

    def margins(self, codes, numbers):
        """(P,) reward of the chosen less that of the rejected answer, nats."""
        log_probs, n_tokens = answer_log_probs(self.model, codes)
        ratios = log_probs - self.reference[numbers]  # (P, 2)
        ratios = ratios / n_tokens if self.length_normalized else ratios
        return self.beta * (ratios[:, 0] - ratios[:, 1])

    def losses(self, margins):
        """(P,) nats: -log sigmoid(margin) (Rafailov et al. 2023, eq. 7); a label is wrong with label_smoothing."""
        return -(1 - self.label_smoothing) * F.logsigmoid(margins) - self.label_smoothing * F.logsigmoid(-margins)

    def forward(self, codes, numbers):
        """The sum of the losses of the pairs whose number is not -100."""
        losses = self.losses(self.margins(codes, numbers.clamp(min=0)))
        return (losses * (numbers != IGNORE)).sum()


def batches(pairs, batch_size):
    """The numbers of all pairs in batches of similar length, of which every process takes its share."""
    order, (rank, world) = np.argsort(pairs.lengths, kind="stable"), rank_and_world()
    return [order[start : start + batch_size] for start in range(rank * batch_size, len(order), world * batch_size)]


@torch.no_grad()  # its result becomes part of a module that is trained: not inference_mode
def reference_log_probs(model, pairs, batch_size, autocast):
    """(N, 2) fp32: the model's log-probability of the chosen and the rejected answer of each pair."""
    device = next(model.parameters()).device
    log_probs = torch.zeros(len(pairs), 2, device=device)
    for numbers in batches(pairs, batch_size):
        codes, numbers = pairs.batch(numbers)
        with autocast():
            log_probs[numbers.to(device)] = answer_log_probs(model, codes.to(device))[0]
    return sum_over_ranks(log_probs)


def load_reference(model, sides, batch_size, autocast, path, belongs_to):
    """[reference_log_probs of each side]: those of the file at `path` if it belongs_to the same, else it is written."""
    device, key = next(model.parameters()).device, json.dumps(belongs_to)
    if Path(path).exists():
        with np.load(path) as stored:
            if stored["belongs_to"] == key:
                return [torch.from_numpy(stored[f"arr_{side}"]).to(device) for side in range(len(sides))]
    log_probs = [reference_log_probs(model, pairs, batch_size, autocast) for pairs in sides]
    if rank_and_world()[0] == 0:
        with open(f"{path}.tmp", "wb") as file:
            np.savez(file, *(side.cpu().numpy() for side in log_probs), belongs_to=key)
        os.replace(f"{path}.tmp", path)
    return log_probs


@torch.inference_mode()
def preference_metrics(objective, pairs, batch_size, autocast):
    """{"val_loss", "val_reward_margin", "val_preference_accuracy"}: means over all pairs; a tie counts half."""
    device = next(objective.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for numbers in batches(pairs, batch_size):
        codes, numbers = (part.to(device) for part in pairs.batch(numbers))
        with autocast():
            margins = objective.margins(codes, numbers)
        right = ((margins > 0).double() + (margins >= 0)) / 2
        sums += torch.stack([objective.losses(margins).sum().double(), margins.sum().double(), right.sum()])
    names = ("val_loss", "val_reward_margin", "val_preference_accuracy")
    return dict(zip(names, (sum_over_ranks(sums) / len(pairs)).tolist(), strict=True))


def main():
    settings = settings_of(globals())
    if beta <= 0:
        raise ValueError(f"beta must be above 0, not {beta}: with 0 nothing is learned")
    model, coder, compute, autocast = load_base(settings)
    settings |= found_settings(compute, autocast)
    train, val = map(Pairs, load_conversations(data_dir, coder, model.config.block_size, preferences=True))
    max_steps = epochs * -(-len(train) // pairs_per_step)
    optimizers = make_optimizers(model, optimizer, learning_rate, muon_learning_rate, weight_decay, beta2)
    lr_at = partial(lr_scale, max_steps=max_steps, warmup_steps=warmup_steps, decay_fraction=1.0)
    before = answers(model, coder, QUESTIONS, answer_tokens, autocast)
    data = fingerprint(checkpoint, data_dir)
    checkpoint_of_run = claim_out_dir(out_dir, init_from, overwrite)
    # of the same batches, so that before the first step all rewards are 0
    belongs_to = [*data, batch_size, settings["dtype"]]
    reference = load_reference(model, (train, val), batch_size, autocast, f"{out_dir}/reference.npz", belongs_to)
    objective, held_out = (PreferenceLoss(model, r, beta, label_smoothing, length_normalized) for r in reference)
    record = {"stage": "dpo", "tokenizer": coder.name, "settings": settings, "data": data}
    state = begin(model, optimizers, record, checkpoint_of_run, force, out_dir)
    print(f"{len(train):,} pairs, {max_steps:,} steps of {pairs_per_step}; {len(val):,} for validation")

    def metrics_at(step):
        return preference_metrics(held_out, val, batch_size, autocast) if due(step, eval_interval, max_steps) else {}

    fit(
        model, optimizers, partial(conversation_batch, train, pairs_per_step, seed), metrics_at, lr_at, record, state,
        out_dir=out_dir, max_steps=max_steps, batch_size=batch_size, grad_clip=grad_clip, autocast=autocast,
        should_stop=stop_request(max_minutes), log_interval=log_interval, checkpoint_interval=checkpoint_interval,
        objective=objective, units=DPO_UNITS,
    )  # fmt: skip
    finish(state, out_dir, before, coder, compute, autocast, answer_tokens)


if __name__ == "__main__":
    configure(globals())
    main()
