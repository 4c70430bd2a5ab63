"""Pretrain a GPT on token shards (stage 3: prepare_fineweb.py wrote them,
hellaswag.py may measure it on the way).

    python train.py config/shakespeare.py
    torchrun --nproc_per_node=8 train.py config/fgpt_712m.py --batch_size=0

Writes into out_dir: log.jsonl (a line of units, then a line a step), ckpt.pt
(everything needed to go on) and best.pt (the weights with the lowest validation
loss). Stopped by Ctrl-C, SIGTERM or --max_minutes, it saves first. Killed at
any moment, the same command with --init_from=resume goes on from ckpt.pt as if
nothing had happened. Under torchrun every process takes its share of the same
global batches, and the first one writes; several nodes need one out_dir.
"""

import json
import math
import os
import resource
import signal
import statistics
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

from configurator import configure, settings_of

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import hellaswag
from model import (
    FAMILIES,
    GPT,
    IGNORE,
    GPTConfig,
    join_processes,
    leave_processes,
    load_checkpoint,
    make_optimizers,
    pick_device,
    rank_and_world,
    save_checkpoint,
    sum_over_ranks,
)
from prepare_fineweb import find_shards, open_shard, read_meta
from tokenizer import Tokenizer

# files
data_dir = "data/fineweb"  # folder of train and val shards
out_dir = "out/fgpt_712m"  # where the log and the checkpoints go
init_from = "scratch"  # scratch, or resume: go on from out_dir/ckpt.pt
overwrite = False  # start anew in an out_dir that holds a run
force = False  # resume although settings changed that change the run
tokenizer = ""  # gpt2 or bytes; empty: what the data's meta.json says
# model
family = "gpt2"  # gpt2 or modern
block_size = 1024  # context, tokens
n_layer = 32  # blocks
n_head = 24  # attention heads
n_embd = 1296  # width
head_dim = 0  # size of a head; 0: n_embd / n_head
mlp_dim = 0  # hidden width of the MLP; 0: the family's ratio
rope_theta = 10000.0  # base of rotary positions (modern)
# optimization
optimizer = "muon"  # muon (AdamW for embeddings and norms) or adamw
tokens_per_step = 524288  # global batch, tokens
batch_size = 16  # micro-batch, sequences, the rest is accumulated; 0: the largest that fits into memory
max_steps = 19073  # length of the run, optimizer steps
max_tokens = 0  # length of the run, tokens (then max_steps does not count); 0: max_steps
learning_rate = 3e-3  # peak of AdamW
muon_learning_rate = 0.02  # peak of Muon
weight_decay = 0.1  # decoupled, on matrices and embeddings
beta2 = 0.95  # decay of AdamW's second moment (Muon's is 0.95)
grad_clip = 1.0  # largest gradient norm; 0: no clipping
warmup_steps = 200  # linear from 0 to the peak
schedule = "constant"  # after warm-up: constant or cosine
decay_fraction = 0.7  # share of the run at its end that decays linearly (constant)
final_lr_fraction = 0.0  # share of the peak at which the decay ends
seed = 1337  # of the initial weights and the data order
# evaluation and output
eval_interval = 250  # steps between validations
eval_tokens = 1048576  # size of the fixed validation set, tokens (at most all)
hellaswag_interval = 0  # steps between HellaSwag scores; 0: never
hellaswag_source = ""  # HellaSwag-format file; empty: the real one
hellaswag_limit = 0  # items to score; 0: all
sample_interval = 0  # steps between printed samples; 0: never
sample_prompt = "The "  # what they continue
log_interval = 10  # steps between printed lines
checkpoint_interval = 500  # steps between writes of ckpt.pt
max_minutes = 0.0  # save and stop after this time; 0: no limit
# machine
device = ""  # cpu, cuda, ...; empty: cuda where there is one
dtype = ""  # float32, bfloat16 or native (bfloat16 where it is fast); empty: float32 on CPUs, else native
compile = None  # torch.compile; None: on cuda only
activation_checkpointing = False  # less memory for a third more compute
deterministic = False  # bit-identical runs where kernels would differ

DEFAULTS = settings_of(globals())
UNITS = {
    "step": "optimizer steps done",
    "tokens": "trained tokens",
    "loss": "nats/token",
    "grad_norm": "before clipping",
    "learning_rate": "AdamW",
    "muon_learning_rate": "Muon",
    "seconds": "training time",
    "tokens_per_second": "this step, padding included",
    "mfu": "share of the GPUs' bf16 peak",
    "peak_memory": "GB, of the first process: allocated on its GPU, or resident",
    "skipped": "1: not finite, not applied",
    "val_loss": "nats/token",
    "val_bpb": "bits/byte",
    "val_exact_match": "share of first answers",
    "val_f1": "mean over first answers",
    "val_exact_match_2": "share of second answers",
    "val_f1_2": "mean over second answers",
    "hellaswag_acc": "share",
    "hellaswag_acc_norm": "share",
}
# dense bf16 FLOP/s from NVIDIA's data sheets; the first name contained in the GPU's name counts
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12,
    "RTX 4090": 165e12,
}  # fmt: skip
# settings that may differ when a run is resumed, because they do not change its weights (or extend it on purpose)
MAY_CHANGE = {"out_dir", "data_dir", "init_from", "overwrite", "force", "max_steps", "max_tokens"} | {
    "eval_interval", "eval_tokens",
    "hellaswag_interval", "hellaswag_source", "hellaswag_limit", "sample_interval", "sample_prompt", "log_interval",
    "checkpoint_interval", "max_minutes", "epochs", "answer_tokens", "checkpoint",
    "scored_answers", "hellaswag_items",
}  # fmt: skip
# settings that --force cannot change: weights and optimizer states would not fit
SHAPES = {"family", "block_size", "n_layer", "n_head", "n_embd", "head_dim", "mlp_dim", "optimizer", "tokenizer"}
CPU_TOKENS = 8192  # largest micro-batch that --batch_size=0 finds on a CPU
AT_LEAST_1 = {  # all other numbers must be at least 0
    "block_size", "n_layer", "n_head", "n_embd", "tokens_per_step", "rows_per_step", "pairs_per_step", "max_steps",
    "epochs", "eval_tokens", "answer_tokens", "log_interval", "checkpoint_interval",
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# data order: the batch of a step is a pure function of (seed, step)


def mix(x):
    """splitmix64's finalizer (Steele et al. 2014): uint64 array -> well-mixed uint64 array."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*numbers):
    """A uint64 key from several integers, or (n,) keys where some of them are (n,) arrays."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = mix(key + np.asarray(number).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return key


def permute(index, n, key):
    """Where a pseudo-random permutation of range(n) puts `index` (array of ints < n), without storing it.

    A four-round Feistel network permutes the next power of four; a value that lands beyond n is sent through again
    (cycle walking) until it lands below.
    """
    half = np.uint64(max(1, math.ceil(math.log2(max(n, 2)) / 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)

    def shuffle(x):
        left, right = x >> half, x & mask
        for round_ in range(4):
            left, right = right, left ^ (mix(right ^ mix(key + np.uint64(round_))) & mask)
        return (left << half) | right

    x = shuffle(np.asarray(index, np.uint64))
    while (outside := x >= n).any():
        x[outside] = shuffle(x[outside])
    return x.astype(np.int64)


class Windows:
    """Windows of block_size + 1 tokens from a list of shards, in an endless pseudo-random order.

    A shard of n tokens holds (n - 1) // block_size windows; each epoch visits every window of every shard once. What a
    shard has left over is skipped at its beginning or end, split anew each epoch. ValueError if there is no window, or
    when a shard holds an id that is not below n_vocab.
    """

    def __init__(self, paths, block_size, n_vocab, seed):
        self.paths, self.block_size, self.n_vocab, self.seed = paths, block_size, n_vocab, seed
        self.shards = [np.asarray(open_shard(path)) for path in paths]  # slices of a plain view are made faster
        self.lengths = np.array([len(shard) for shard in self.shards])
        self.counts = (self.lengths - 1) // block_size
        self.ends = np.cumsum(self.counts)
        if len(self) == 0:
            longest = max(range(len(paths)), key=lambda i: len(self.shards[i]))
            raise ValueError(
                f"block_size {block_size} is longer than the data: {paths[longest]}, the longest of its kind, has "
                f"{len(self.shards[longest])} tokens; use a smaller --block_size, more data, or a larger --val_fraction"
            )

    def __len__(self):
        return int(self.ends[-1])

    def batch(self, first, count):
        """Windows number first to first + count - 1 of the endless order: (count, block_size + 1) int64."""
        shards, starts = self.places(np.arange(first, first + count))
        stop = self.block_size + 1
        rows = [self.shards[shard][start : start + stop] for shard, start in zip(shards, starts, strict=True)]
        batch = np.stack(rows)
        if batch.max() >= self.n_vocab:
            raise ValueError(
                f"{Path(self.paths[0]).parent}: token id {batch.max()} is outside the vocabulary of {self.n_vocab}: "
                "the shards are damaged or were made with another tokenizer (--tokenizer=)"
            )
        return batch.astype(np.int64)

    def fingerprint(self):
        """[name, tokens, checksum of its ends] of each shard: by which a resumed run knows its data again."""
        ends = [zlib.crc32(np.concatenate((shard[:4096], shard[-4096:]))) for shard in self.shards]
        return [[path.name, len(shard), end] for path, shard, end in zip(self.paths, self.shards, ends, strict=True)]

    def places(self, numbers):
        """Numbers in the endless order -> (shard, first token in it) of each window, two arrays."""
        epochs, windows = numbers // len(self), self.order(numbers)
        shards = np.searchsorted(self.ends, windows, side="right")
        left_over = (self.lengths[shards] - 1) % self.block_size
        offsets = (key_of(self.seed, epochs, shards) % (left_over + 1).astype(np.uint64)).astype(np.int64)
        return shards, offsets + (windows - (self.ends - self.counts)[shards]) * self.block_size

    def order(self, numbers):
        """Numbers in the endless order -> windows in range(len(self))."""
        windows = np.empty_like(numbers)
        for epoch in np.unique(numbers // len(self)):
            here = numbers // len(self) == epoch
            windows[here] = permute(numbers[here] % len(self), len(self), key_of(self.seed, epoch))
        return windows


def next_token_batch(windows, n_rows, step):
    """The global batch of a step: (idx, targets), each (n_rows, block_size) int64."""
    rows = torch.from_numpy(windows.batch(step * n_rows, n_rows))
    return rows[:, :-1], rows[:, 1:]


# ----------------------------------------------------------------------------------------------------------------------
# one step


def lr_scale(step, max_steps, warmup_steps, schedule="constant", decay_fraction=0.7, final_lr_fraction=0.0):
    """Share of the peak learning rate that step 0 <= step < max_steps uses.

    "constant" decays linearly at the end, over decay_fraction of the run, but begins not before the warm-up is done.
    """
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"schedule must be constant or cosine, not {schedule!r}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "cosine":
        done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * done))
    else:
        n_decay = min(decay_fraction * max_steps, max_steps - warmup_steps)
        share = min(1.0, (max_steps - step) / max(1.0, n_decay))
    return final_lr_fraction + (1 - final_lr_fraction) * share


def train_step(model, optimizers, batch, batch_size, grad_clip, autocast):
    """One optimizer step on a global batch, of which every process takes its share, batch_size rows at a time.

    The loss is the sum over all targets divided by their number in the whole batch, so shares and micro-batches of
    unequal numbers of targets weigh right. A step whose loss or gradient is not finite is not applied. Returns loss
    (nats/token), gradient norm before clipping, and whether the step was applied: the same on every process.
    """
    (idx, targets), device, (rank, world) = batch, next(model.parameters()).device, rank_and_world()
    n_targets = max(1, int((targets != IGNORE).sum()))
    idx, targets = (part.tensor_split(world)[rank] for part in (idx, targets))
    if len(idx) == 0:  # fewer rows than processes: the others still wait for this one's gradients, which are zero
        idx, targets = batch[0][:1], torch.full_like(batch[1][:1], IGNORE)
    total = torch.zeros((), device=device)
    for start in range(0, len(idx), batch_size):
        rows, last = slice(start, start + batch_size), start + batch_size >= len(idx)
        x, y = idx[rows].to(device, non_blocking=True), targets[rows].to(device, non_blocking=True)
        with nullcontext() if last or world == 1 else model.no_sync():  # gradients are exchanged once a step
            with autocast():
                loss = model(x, y) / n_targets
            (loss * world).backward()  # DistributedDataParallel takes the mean over processes, but this is a sum
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    # the one time in a step that the host waits for the device
    loss, norm = torch.stack((sum_over_ranks(total), norm)).tolist()
    applied = math.isfinite(loss) and math.isfinite(norm)
    for opt in optimizers:
        if applied:
            with autocast():  # Muon's matrix products
                opt.step()
        opt.zero_grad(set_to_none=True)
    return loss, norm, applied


@torch.inference_mode()
def validation_loss(model, windows, n_windows, batch_size, token_bytes, autocast):
    """Mean loss over the first n_windows of `windows`: {"val_loss": nats/token, "val_bpb": bits/byte}.

    token_bytes: (n_vocab,) bytes of text that each token stands for.
    """
    device, (rank, world) = next(model.parameters()).device, rank_and_world()
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    for first in range(rank * batch_size, n_windows, world * batch_size):
        rows = torch.from_numpy(windows.batch(first, min(batch_size, n_windows - first)))
        with autocast():
            sums[0] += model(rows[:, :-1].to(device), rows[:, 1:].to(device)).double()
        sums[1] += rows[:, 1:].numel()
        sums[2] += int(token_bytes[rows[:, 1:].numpy()].sum())
    nats, n_tokens, n_bytes = sum_over_ranks(sums).tolist()
    return {"val_loss": nats / n_tokens, "val_bpb": nats / math.log(2) / max(1, n_bytes)}


def is_out_of_memory(error):
    """Whether a RuntimeError says so: those of CPUs and of cuBLAS have no class of their own."""
    return "memory" in str(error) or "ALLOC_FAILED" in str(error)


def fits(model, optimizers, batch_size, autocast):
    """Whether a forward and backward pass of batch_size rows fits, beside the optimizers' states and gradients."""
    try:
        kept = [
            torch.empty_like(p)
            for opt in optimizers
            for group in opt.param_groups
            for p in group["params"]
            for _ in range(3 if isinstance(opt, torch.optim.AdamW) else 2)
        ]
        idx = torch.zeros(batch_size, model.config.block_size, dtype=torch.long, device=kept[0].device)
        with autocast():
            loss = model(idx, idx)
        loss.backward()
        return True
    except RuntimeError as error:
        if is_out_of_memory(error):
            return False
        raise
    finally:
        model.zero_grad(set_to_none=True)


def find_batch_size(model, optimizers, checkpoint, n_rows, autocast):
    """The micro-batch for n_rows a step and process: that of the checkpoint if it divides them, else the largest.

    The divisors of n_rows are tried from the largest down, each at most half the one before, until one fits into the
    memory of every process; without torch.compile, which needs less. ValueError when not even one row fits.
    """
    stored = checkpoint["settings"].get("batch_size", 0) if checkpoint else 0
    if stored and n_rows % stored == 0:
        return stored
    device, T = next(model.parameters()).device, model.config.block_size
    sizes = [size for size in range(n_rows, 0, -1) if n_rows % size == 0]
    if device.type == "cpu":  # where what does not fit is swapped, without an error
        sizes = [size for size in sizes if size * T <= CPU_TOKENS] or [1]
    while sum_over_ranks(torch.tensor(float(not fits(model, optimizers, sizes[0], autocast)))) > 0:
        sizes = [size for size in sizes if size <= sizes[0] // 2]
        if not sizes:
            raise ValueError("not even one row fits into memory: --activation_checkpointing=True or a smaller model")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # the log tells of the training
    return sizes[0]


# ----------------------------------------------------------------------------------------------------------------------
# the run


def claim_out_dir(out_dir, init_from, overwrite):
    """Make out_dir; the checkpoint to resume from, or None. ValueError if a run would be lost or there is none."""
    folder, is_first = Path(out_dir), rank_and_world()[0] == 0
    if init_from not in ("scratch", "resume"):
        raise ValueError(f"init_from must be scratch or resume, not {init_from!r}")
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    in_use = init_from == "scratch" and there and not overwrite
    # killed before its first checkpoint, a run is resumed from its start
    empty = folder.is_dir() and all(name.endswith((".tmp", ".npz")) for name in there)  # .npz: of dpo.py
    # the first process decides for all: its files may be there when the others look
    in_use, empty = sum_over_ranks(torch.tensor([bool(in_use) and is_first, empty and is_first], dtype=torch.float))
    if in_use:
        raise ValueError(
            f"{out_dir} is in use: --init_from=resume goes on, --overwrite=True starts anew, or --out_dir="
        )
    if is_first:
        stale = ["ckpt.pt.tmp", "best.pt.tmp"]
        if init_from == "scratch":  # a later resume must not find the old run
            folder.mkdir(parents=True, exist_ok=True)
            stale += ["ckpt.pt", "best.pt", "log.jsonl"]
        for name in stale:
            (folder / name).unlink(missing_ok=True)
    if init_from == "scratch":
        return None
    if empty:
        print(f"{out_dir} has no checkpoint yet: the run begins")
        return None
    return load_checkpoint(folder / "ckpt.pt")


def check_settings(settings):
    """ValueError that names every setting out of its range."""
    problems = [
        f"{name} is {value}, at least {int(name in AT_LEAST_1)} is needed"
        for name, value in settings.items()
        if isinstance(value, int | float) and value < (name in AT_LEAST_1)
    ]
    problems += ["label_smoothing must be below 0.5"] if settings.get("label_smoothing", 0) >= 0.5 else []
    problems += ["beta2 must be below 1"] if settings["beta2"] >= 1 else []
    problems += [f"{n} must be at most 1" for n in ("decay_fraction", "final_lr_fraction") if settings.get(n, 0) > 1]
    if settings.get("compile") not in (None, True, False):
        problems.append("compile must be None, True or False")
    if problems:
        raise ValueError("; ".join(problems))


def check_resumable(record, checkpoint, force):
    """ValueError naming everything that would make the resumed run another run than the stored one."""
    if "optimizers" not in checkpoint:
        raise ValueError("ckpt.pt holds no optimizer state (is it a copy of best.pt?): it cannot be resumed")
    old, new = checkpoint["settings"], record["settings"]
    may_change = MAY_CHANGE | ({"batch_size"} if checkpoint.get("processes", 1) != record["processes"] else set())
    changed = [name for name in old if name not in may_change and new.get(name) != old[name]]
    listed = [f"{name} {old[name]!r} -> {new.get(name)!r}" for name in changed]
    if checkpoint["data"] != record["data"]:
        listed.append("the data is not what it was")
    if listed and not (force and SHAPES.isdisjoint(changed)):
        remedy = "set it back, or --force=True" if SHAPES.isdisjoint(changed) else "set it back"
        raise ValueError(f"resuming would change the run ({', '.join(listed)}): {remedy}")


def open_log(path, n_bytes, units):
    """The log, cut to its first n_bytes, ready to append; a new log begins with the line of units.

    What a full disk does not take waits in the file's buffer, large enough for 100,000 rows.
    """
    if rank_and_world()[0] > 0:
        return open(os.devnull, "ab")
    log = open(path, "ab", buffering=1 << 26)
    if log.tell() < n_bytes:
        print(f"{path} lacks rows that were written before the checkpoint: it begins anew")
        n_bytes = 0
    log.truncate(n_bytes)
    log.seek(0, os.SEEK_END)
    if n_bytes == 0:
        write_row(log, {"format": "fgpt log 1", "units": units})
    return log


def write_row(log, row):
    with suppress(OSError):  # a full disk: saving a checkpoint will report it
        log.write((json.dumps(row) + "\n").encode())
        log.flush()


def stop_request(max_minutes):
    """A function that is true once SIGINT or SIGTERM came, or the minutes are over (0: never), on any process.

    A second signal ends the process at once. Not under torchrun, which sends its processes a second one when the
    terminal has sent the first, and ends them itself when they take longer than 30 s.
    """
    began, caught = time.monotonic(), []
    afterwards = signal.SIG_IGN if "LOCAL_RANK" in os.environ else signal.SIG_DFL

    def handler(number, frame):
        caught.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, afterwards)
        if rank_and_world()[0] == 0:
            more = b"; once more to stop at once" * (afterwards == signal.SIG_DFL)
            os.write(
                1, b"stopping after this step (--init_from=resume goes on later)" + more + b"\n"
            )  # print may be at work itself

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)

    def should_stop():
        wanted = bool(caught) or (max_minutes > 0 and time.monotonic() - began > 60 * max_minutes)
        return bool(sum_over_ranks(torch.tensor(float(wanted))) > 0)

    return should_stop


def peak_flops(device):
    """Dense bf16 peak of the GPU in FLOP/s, or None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory(device):
    """Largest memory of this process so far, GB: allocated on the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def step_row(state, loss, norm, optimizers, tokens_per_second, flops_over_peak, device):
    """The log's row for a step just done; flops_over_peak: FLOPs per token over the GPUs' peak, or None."""
    row = {"step": state["step"], "tokens": state["tokens"]}
    row |= {"loss": loss} if math.isfinite(loss) else {"skipped": 1}
    row |= {"grad_norm": norm} if math.isfinite(norm) else {"skipped": 1}
    row["learning_rate"] = optimizers[0].param_groups[0]["lr"]
    if len(optimizers) > 1:
        row["muon_learning_rate"] = optimizers[1].param_groups[0]["lr"]
    row |= {"seconds": round(state["seconds"], 3), "tokens_per_second": round(tokens_per_second)}
    row |= {"mfu": round(flops_over_peak * tokens_per_second, 4)} if flops_over_peak else {}
    return row | {"peak_memory": round(peak_memory(device), 3)}


def say(line):
    """Print a line above the progress bar, and at once also into a pipe."""
    with tqdm.external_write_mode():
        print(line, flush=True)


def line_of(row, max_steps, seconds=0.0):
    """What a terminal shows of a log row; the time left is that of steps that take `seconds` each."""
    parts = [f"step {row['step']}/{max_steps}"] + ["NOT FINITE, skipped"] * ("skipped" in row)
    labels = {"loss": "loss", "val_loss": "val", "val_bpb": "bits/byte", "val_exact_match": "exact match"}
    labels |= {"val_preference_accuracy": "preferred", "hellaswag_acc": "hellaswag"}
    for name, label in labels.items():
        parts += [f"{label} {row[name]:.4f}"] if name in row else []
    if "tokens_per_second" in row:
        parts += [f"lr {row['learning_rate']:.2e}", f"{row['tokens_per_second']:,} tok/s"]
        parts += [f"MFU {row['mfu']:.1%}"] if "mfu" in row else []
        left = int((max_steps - row["step"]) * seconds)
        parts += [f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"]
    return " | ".join(parts)


def closing_line(state, out_dir):
    """Which weights lie in out_dir."""
    best = f"best.pt of step {state['best_step']} (validation loss {state['best_val_loss']:.4f})"
    best = "no best.pt, as nothing was validated" if state["best_val_loss"] == math.inf else best
    if state["best_step"] == 0 < state["step"] and state["best_val_loss"] < math.inf:
        best += ": NOT TRAINED, as no later validation was better, if there was one; ckpt.pt is trained"
    return f"{out_dir}: ckpt.pt of step {state['step']}, {best}"


def new_state():
    """What a run counts: steps, trained tokens, seconds of training, length of its log, what its checkpoints hold."""
    counts = {"step": 0, "tokens": 0, "seconds": 0.0, "log_bytes": 0, "skipped_in_a_row": 0}
    return counts | {"best_val_loss": math.inf, "best_step": 0, "saved_step": 0}


def finish_step(row, model, record, state, log, out_dir):
    """Log a row; keep the weights as best.pt when its validation loss is the lowest yet."""
    if row.get("val_loss", math.inf) < state["best_val_loss"]:
        metrics = {name: row[name] for name in row if name.startswith(("val_", "hellaswag_"))}
        entries = dict(step=row["step"], tokens=row["tokens"], metrics=metrics, **record)
        if write(f"{out_dir}/best.pt", model, entries):  # if not, the next one may be no better
            state["best_val_loss"], state["best_step"] = row["val_loss"], row["step"]
    write_row(log, row)
    state["log_bytes"] = log.tell()


def fit(model, optimizers, batch_at, metrics_at, lr_at, record, state, *, out_dir, max_steps, batch_size, grad_clip,
        autocast, should_stop, compiled=False, log_interval=10, checkpoint_interval=500, objective=None,
        units=UNITS):  # fmt: skip
    """The training loop, from state["step"] to max_steps.

    batch_at(step) gives the global batch (idx, targets) of a step, metrics_at(step) what is measured after `step` steps
    (a dict, often empty; the lowest "val_loss" decides which weights are best.pt), lr_at(step) the share of the peak
    learning rates. `record` (tokenizer, settings) goes into the checkpoints; `state` (new_state()) changes in place.
    objective: a module around the model whose forward(idx, targets) is another loss, summed over the targets that are
    not -100; `units` then tells what the log's numbers are. ValueError when three steps in a row are not finite;
    OSError when the last checkpoint cannot be written.
    """
    device, (rank, world) = next(model.parameters()).device, rank_and_world()
    forward = objective or model  # evaluation and generation use the raw module
    forward = torch.compile(forward) if compiled else forward
    if world > 1:
        forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)
    peak, fetch = peak_flops(device), partial(fetch_batch, batch_at, device)
    flops_over_peak = model.flops_per_token() / (peak * world) if peak else None
    log = open_log(f"{out_dir}/log.jsonl", state["log_bytes"], units)
    bar = tqdm(total=max_steps, initial=state["step"], unit=" steps", disable=None if rank == 0 else True)
    with log, bar, ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(fetch, state["step"])  # the next batch is read while this one is trained on
        if world > 1:
            blank_pass(forward, coming.result(), batch_size, autocast)
        if state["step"] == 0:
            row = {"step": 0, "tokens": 0} | metrics_at(0)
            finish_step(row, model, record, state, log, out_dir)
            say(line_of(row, max_steps))
        stop, second, recent = state["step"] >= max_steps, state["step"] + 2, deque(maxlen=20)
        if stop:
            say(f"step {state['step']} of {max_steps}: nothing is left to do (to go on, raise what ends it)")
        while not stop:
            start = time.perf_counter()
            batch, coming = coming.result(), ahead.submit(fetch, state["step"] + 1)
            for group in (group for opt in optimizers for group in opt.param_groups):
                group["lr"] = group["initial_lr"] * lr_at(state["step"])
            loss, norm, applied = train_step(forward, optimizers, batch, batch_size, grad_clip, autocast)
            seconds = time.perf_counter() - start
            recent.append(seconds)
            count_step(state, batch, seconds, applied)
            row = step_row(state, loss, norm, optimizers, batch[0].numel() / seconds, flops_over_peak, device)
            row |= metrics_at(state["step"])
            finish_step(row, model, record, state, log, out_dir)
            stop = should_stop() or state["step"] == max_steps
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()
            # the second step is the first that tells how long the run will take: the first one compiles
            if stop or not applied or "val_loss" in row or state["step"] % log_interval == 0 or state["step"] == second:
                say(line_of(row, max_steps, statistics.median_low(recent)))
            check_finite(state, out_dir)
            if stop or state["step"] % checkpoint_interval == 0:
                save_run(model, optimizers, record, state, out_dir, log, must=stop)


def fetch_batch(batch_at, device, step):
    """The batch of a step; in pinned memory, so that its copy to the GPU runs while that computes."""
    return [part.contiguous().pin_memory() if device.type == "cuda" else part for part in batch_at(step)]


def blank_pass(forward, batch, batch_size, autocast):
    """A pass without effect: in its first one DistributedDataParallel sums gradients in another order than later.

    So a run that is resumed sums as one that was not interrupted.
    """
    idx, targets = (part[:batch_size].to(next(forward.parameters()).device) for part in batch)
    with autocast():
        loss = forward(idx, torch.full_like(targets, IGNORE))
    loss.backward()
    forward.zero_grad(set_to_none=True)


def count_step(state, batch, seconds, applied):
    state["step"] += 1
    state["tokens"] += int((batch[1] != IGNORE).sum())
    state["seconds"] += seconds
    state["skipped_in_a_row"] = 0 if applied else state["skipped_in_a_row"] + 1


def check_finite(state, out_dir):
    """ValueError after three steps in a row that were not applied."""
    if state["skipped_in_a_row"] == 3:
        raise ValueError(
            f"loss or gradient is not finite since step {state['step'] - 2}: go on from {out_dir}/ckpt.pt (of step "
            f"{state['saved_step']}) with a lower learning rate (--init_from=resume --force=True --learning_rate=...)"
        )


def save_run(model, optimizers, record, state, out_dir, log=None, must=False):
    """Write ckpt.pt: all that is needed to go on."""
    states = [opt.state_dict() for opt in optimizers]
    entries = dict(step=state["step"], tokens=state["tokens"], optimizers=states, state=state, **record)
    if write(f"{out_dir}/ckpt.pt", model, entries, log, must):
        state["saved_step"] = state["step"]


def write(path, model, entries, log=None, must=False):
    """Write a checkpoint, from the first process; whether it worked. A full disk ends the run only if it `must`."""
    try:
        if rank_and_world()[0] == 0:
            if log:
                log.flush()
                os.fsync(log.fileno())  # the checkpoint relies on the log's length
            save_checkpoint(path, model, **entries)
        return True
    except OSError as error:
        if must:
            raise
        say(f"warning: no new {path} ({error}); training goes on, and tries again later")
        return False


def resume(model, optimizers, checkpoint):
    """Load weights and optimizer states, under the settings of now; returns the run's state."""
    model.load_state_dict(checkpoint["model"])
    for opt, stored in zip(optimizers, checkpoint["optimizers"], strict=True):
        of_now = [{name: group[name] for name in group if name != "params"} for group in opt.param_groups]
        opt.load_state_dict(stored)
        for group, settings in zip(opt.param_groups, of_now, strict=True):
            group.update(settings)  # the same as stored, unless --force changed them
    return checkpoint["state"] | {"saved_step": checkpoint["step"]}


def print_sample(model, tokenizer, prompt, step, autocast):
    """64 tokens after the prompt, from a generator of its own: the run does not depend on samples."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(step)
    prompt_ids = [tokenizer.eot, *tokenizer.encode(prompt)][-model.config.block_size // 2 :]
    with autocast():
        n_new = min(64, model.config.block_size - len(prompt_ids))
        ids = [int(i) for i in model.generate([prompt_ids], n_new, top_k=50, stop=tokenizer.eot, generator=generator)]
    say(f"sample: {prompt}{tokenizer.decode(ids)}")


def describe(model, optimizers, record, train, val, max_steps):
    """What is about to happen, a line each."""
    settings, T, world = record["settings"], train.block_size, rank_and_world()[1]
    changed = [f"{name}={value}" for name, value in settings.items() if value != DEFAULTS[name]]
    print(f"settings that are not the default: {' '.join(changed) or 'none'}")
    print(f"{model.n_params():,} parameters, {model.flops_per_token():.3g} FLOPs/token")
    for opt in optimizers:
        for group in opt.param_groups:
            n = sum(p.numel() for p in group["params"])
            rates = f"learning rate {group['initial_lr']:g}, weight decay {group['weight_decay']:g}"
            print(f"  {type(opt).__name__:5} {group['name']:16} {len(group['params']):4} tensors {n:13,}  {rates}")
    n_tokens, n_epoch, n_val = max_steps * settings["tokens_per_step"], len(train) * T, len(val) * T
    print(f"{n_epoch:,} training and {n_val:,} validation tokens, tokenizer {record['tokenizer']}, windows of {T}")
    shared = f", shared by {world} processes" * (world > 1)
    print(f"a step: {settings['tokens_per_step']:,} tokens, {settings['batch_size']} windows at a time{shared}")
    total = f"{n_tokens:,} tokens ({n_tokens / n_epoch:.3g} epochs), {n_tokens * model.flops_per_token():.3g} FLOPs"
    print(f"{max_steps:,} steps: {total}", flush=True)


def begin(model, optimizers, record, checkpoint, force, out_dir):
    """The state to begin with: that of the checkpoint, which is loaded, or a new run's, which is saved.

    So a run can be resumed from its first moment.
    """
    world = rank_and_world()[1]
    record["processes"] = world
    if checkpoint is None:
        state = new_state()
        save_run(model, optimizers, record, state, out_dir, must=True)
        return state
    check_resumable(record, checkpoint, force)
    if checkpoint.get("processes", 1) != world:
        print("another number of processes than before: the run goes on as it would have, within rounding")
    return resume(model, optimizers, checkpoint)


def make_model(settings, tokenizer):
    """A GPT with new weights for the settings' sizes and the tokenizer's vocabulary. ValueError if they do not fit."""
    if settings["family"] not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {settings['family']!r}")
    sizes = ("block_size", "n_layer", "n_head", "n_embd", "head_dim", "mlp_dim", "rope_theta")
    sizes = {name: settings[name] for name in sizes}
    n_rows = -(-tokenizer.n_vocab // 64) * 64
    torch.manual_seed(settings["seed"])
    return GPT(GPTConfig(vocab_size=n_rows, n_vocab=tokenizer.n_vocab, **FAMILIES[settings["family"]], **sizes))


def found_settings(compute, autocast, **more):
    """What was found for settings left open: a run that is resumed elsewhere would find something else."""
    dtype = "bfloat16" if autocast.keywords["enabled"] else "float32"
    return {"device": compute.type, "dtype": dtype, **more}


def check_batch(tokens_per_step, block_size, batch_size, world):
    """Rows of a global batch; ValueError if they do not divide into micro-batches. batch_size 0: still to be found."""
    unit = block_size * max(1, batch_size) * world
    if tokens_per_step % unit:
        processes = f" x {world} processes" * (world > 1)
        raise ValueError(
            f"tokens_per_step {tokens_per_step} must be a multiple of block_size x batch_size{processes} = {unit}"
        )
    return tokens_per_step // block_size


def due(step, interval, max_steps):
    """Whether something that is measured every `interval` steps (0: never) and at the end is to be measured now."""
    return interval and (step % interval == 0 or step == max_steps)


def load_data(data_dir, tokenizer, block_size, seed):
    """(Tokenizer, training windows, validation windows) of a folder of shards."""
    stored = read_meta(data_dir).get("tokenizer")
    if tokenizer and stored and tokenizer != stored:
        raise ValueError(f"{data_dir} was made with the {stored} tokenizer, not {tokenizer}: leave --tokenizer= out")
    paths = [find_shards(data_dir, split) for split in ("train", "val")]
    coder = Tokenizer(tokenizer or stored or "gpt2")
    train = Windows(paths[0], block_size, coder.n_vocab, seed)
    val = Windows(paths[1], block_size, coder.n_vocab, seed=0)  # the same for every run
    return coder, train, val


def main():
    settings = settings_of(globals())
    check_settings(settings)
    rank, world = join_processes(device)
    n_rows = check_batch(tokens_per_step, block_size, batch_size, world)
    n_steps = math.ceil(max_tokens / tokens_per_step) or max_steps
    compute, autocast = pick_device(device, dtype, deterministic)
    coder, train, val = load_data(data_dir, tokenizer, block_size, seed)
    items = hellaswag.load_items(hellaswag_source, hellaswag_limit) if hellaswag_interval else []
    token_bytes, n_val = coder.token_bytes(), min(len(val), max(1, eval_tokens // block_size))
    lr_at = partial(lr_scale, max_steps=n_steps, warmup_steps=warmup_steps, schedule=schedule,
                    decay_fraction=decay_fraction, final_lr_fraction=final_lr_fraction)  # fmt: skip
    lr_at(0)  # refuses an unknown schedule before anything is written
    compiled = compute.type == "cuda" if compile is None else compile
    settings |= found_settings(compute, autocast, compile=compiled)
    model = make_model(settings, coder).to(compute)
    model.checkpoint_activations = activation_checkpointing
    optimizers = make_optimizers(model, optimizer, learning_rate, muon_learning_rate, weight_decay, beta2)
    checkpoint = claim_out_dir(out_dir, init_from, overwrite)
    size = settings["batch_size"] = batch_size or find_batch_size(
        model, optimizers, checkpoint, n_rows // world, autocast
    )
    data = train.fingerprint() + val.fingerprint()
    record = {"stage": "pretrain", "tokenizer": coder.name, "settings": settings, "data": data}
    state = begin(model, optimizers, record, checkpoint, force, out_dir)
    describe(model, optimizers, record, train, val, n_steps)

    def metrics_at(step):
        metrics = {}
        if due(step, eval_interval, n_steps):
            metrics |= validation_loss(model, val, n_val, size, token_bytes, autocast)
        if due(step, hellaswag_interval, n_steps):
            scores = hellaswag.evaluate(model, coder, items, autocast=autocast)
            metrics |= {f"hellaswag_{name}": scores[name] for name in ("acc", "acc_norm")}
        if step and rank == 0 and due(step, sample_interval, n_steps):  # before the first step there is only noise
            print_sample(model, coder, sample_prompt, step, autocast)
        return metrics

    fit(
        model, optimizers, partial(next_token_batch, train, n_rows), metrics_at, lr_at, record, state,
        out_dir=out_dir, max_steps=n_steps, batch_size=size, grad_clip=grad_clip, autocast=autocast,
        should_stop=stop_request(max_minutes), compiled=compiled, log_interval=log_interval,
        checkpoint_interval=checkpoint_interval,
    )  # fmt: skip
    print(closing_line(state, out_dir))
    leave_processes()


if __name__ == "__main__":
    configure(globals())
    main()
