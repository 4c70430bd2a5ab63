"""Stage 3: pretrain a GPT on the token shards of prepare_fineweb.py, scoring
HellaSwag on the way if asked.

    python train.py config/shakespeare.py
    torchrun --nproc_per_node=8 train.py config/fgpt_712m.py --batch_size=0

Writes into out_dir: log.jsonl (a line of units, then a line per step), ckpt.pt
(everything needed to resume), ckpt_before.pt (what it was before) and best.pt
(the weights with the lowest validation loss). Stopped by Ctrl-C, SIGTERM or
--max_minutes, it saves first. If the run is killed at any moment, the same
command with --init_from=resume continues from ckpt.pt as if nothing had
happened. --init_from=FILE starts a new run from the weights of a checkpoint,
which also decide its sizes. Under torchrun each process computes its share of
every batch, and the first one writes; on several nodes out_dir must be on a
shared disk.
"""

import math
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from configurator import BadInput, check_settings, configure, settings_of

import torch

from data import Windows, find_shards, looks_like_bytes, read_meta, sources_of
from model import FAMILIES, GPT, OPTIMIZERS, GPTConfig, family_of, flags_unlike_family, make_optimizers, round_up
from run import (
    TRACKERS,
    Run,
    autocast_for,
    due,
    fixed_shapes,
    is_first_process,
    is_out_of_memory,
    join_processes,
    load_model,
    n_processes,
    pick_device,
    pick_dtype,
    prefetch,
    print_line,
    rank_and_world,
    sum_gradients,
    sum_over_ranks,
)
from tokenizer import Tokenizer, tokenizer_of_checkpoint, tokenizer_of_shards

# files
data_dir = "data/fineweb"  # folder of train and val shards
out_dir = "out/fgpt_712m"  # where the log and the checkpoints go
init_from = "scratch"  # scratch; resume: continue out_dir/ckpt.pt; or a checkpoint: a new run from its weights
overwrite = False  # start over in an out_dir that holds a run
force = False  # resume even if settings that affect training differ
tokenizer = ""  # gpt2, bytes or a folder of tools.train_tokenizer; empty: what the data's meta.json says
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
batch_size = 16  # sequences per forward pass; gradients are accumulated up to tokens_per_step; 0: as many as fit
max_steps = 19073  # length of the run, optimizer steps
max_tokens = 0  # length of the run, tokens; replaces max_steps unless 0
learning_rate = 3e-3  # peak of AdamW
muon_learning_rate = 0.02  # peak of Muon
weight_decay = 0.1  # decoupled, on matrices and embeddings
beta2 = 0.95  # decay of AdamW's second moment (Muon's is 0.95)
grad_clip = 1.0  # largest gradient norm; 0: no clipping
warmup_steps = 200  # linear from 0 to the peak
schedule = "trapezoid"  # after the warm-up: trapezoid (constant, then a linear decay) or cosine
decay_fraction = 0.7  # share of the run at its end over which the rate decays (trapezoid)
final_lr_fraction = 0.0  # share of the peak at which the decay ends
seed = 1337  # of the initial weights and the data order
# evaluation and output
eval_interval = 250  # steps between validations
eval_tokens = 1048576  # size of the fixed validation set, tokens (at most all)
hellaswag_interval = 0  # steps between HellaSwag scores; 0: never
hellaswag_source = ""  # HellaSwag-format file; empty: the real one
hellaswag_limit = 0  # items to score; 0: all
sample_interval = 0  # steps between printed samples; 0: never
sample_prompt = "The "  # the text that they continue
log_interval = 10  # steps between printed lines
checkpoint_interval = 500  # steps between writes of ckpt.pt
keep_every = 0  # steps between weights that are kept, as step_00001000.pt; 0: none
tracker = ""  # wandb or trackio: show the run there too, in project fgpt
max_minutes = 0.0  # save and stop after this time; 0: no limit
# machine
device = ""  # cpu, cuda, ...; empty: cuda where there is one
dtype = ""  # float32 or bfloat16; empty: bfloat16 where it was measured to be faster
compile = None  # torch.compile; None: on cuda only
activation_checkpointing = False  # less memory for a third more compute
deterministic = False  # use only deterministic kernels: the same bits every run, perhaps slower

DEFAULTS = settings_of(globals())
UNITS = {
    "step": "optimizer steps done",
    "tokens": "trained tokens",
    "loss": "nats/token",
    "grad_norm": "2-norm, before clipping",
    "learning_rate": "per step, of AdamW",
    "muon_learning_rate": "per step, of Muon",
    "seconds": "s of training",
    "tokens_per_second": "this step, padding included",
    "mfu": "share of the GPUs' bf16 peak",
    "peak_memory": "GB, of the first process: allocated on its GPU, or resident",
    "skipped": "1: not finite, not applied",
    "val_loss": "nats/token",
    "val_bpb": "bits/byte",
    "hellaswag_acc": "share",
    "hellaswag_acc_norm": "share",
}
LABELS = {"loss": "loss", "val_loss": "val", "val_bpb": "bits/byte", "hellaswag_acc": "hellaswag"}
AT_LEAST_1 = {  # all other numbers must be at least 0
    "block_size", "n_layer", "n_head", "n_embd", "tokens_per_step", "max_steps", "eval_tokens", "log_interval",
    "checkpoint_interval",
}  # fmt: skip
MAY_CHANGE = {  # on resuming: these do not affect the weights, or only lengthen the run; Run compares the tokenizers
    "data_dir", "max_steps", "max_tokens", "eval_interval", "eval_tokens", "hellaswag_interval", "hellaswag_source",
    "hellaswag_limit", "sample_interval", "sample_prompt", "tokenizer",
}  # fmt: skip
SIZES = ("block_size", "n_layer", "n_head", "n_embd", "head_dim", "mlp_dim", "rope_theta")
# not even --force may change these: the stored tensors have these shapes
FIXED = {"family", "block_size", "n_layer", "n_head", "n_embd", "head_dim", "mlp_dim", "optimizer"}
CPU_TOKENS = 8192  # largest micro-batch that --batch_size=0 finds on a CPU


def main():
    # the module-level names are what the user asked for; `settings` also gets what is chosen here
    settings = settings_of(globals())
    check(settings)
    join_processes(settings["device"])
    n_steps = math.ceil(max_tokens / tokens_per_step) if max_tokens else max_steps
    run = Run(
        "pretrain", settings, n_steps, UNITS, LABELS, may_change=MAY_CHANGE, fixed=FIXED, upgrade=upgrade_settings
    )
    start = None  # the model that a new run takes its weights from
    known = run.stored  # the checkpoint that decides the tokenizer
    if init_from not in ("scratch", "resume"):
        start, known = load_model(init_from)
        take_sizes(settings, start.config)
        if known["stage"] != "pretrain":
            print(f"{init_from} was finetuned: trained on text it becomes a model that continues text")
    elif run.stored:
        take_stored(settings, run.stored_settings)
    block_size = settings["block_size"]
    n_rows = rows_per_step(tokens_per_step, block_size, batch_size)
    device = pick_device(settings["device"], deterministic)
    tokenizer, train, val = load_data(settings, known)
    hellaswag, items = load_hellaswag(hellaswag_interval > 0, hellaswag_source, hellaswag_limit)
    settings["device"] = device.type
    settings["dtype"] = pick_dtype(dtype or run.stored_settings.get("dtype", ""), device, settings["n_embd"])
    settings["compile"] = device.type == "cuda" if compile is None else compile
    autocast = autocast_for(device, settings["dtype"])
    model = make_model(settings, tokenizer).to(device)
    if start:
        load_weights(model, start, init_from)
        start = None  # its memory is free now
    model.checkpoint_activations = activation_checkpointing
    optimizers = make_optimizers(model, optimizer, learning_rate, muon_learning_rate, weight_decay, beta2)
    if batch_size == 0:
        stored_size = run.stored_settings.get("batch_size", 0)
        settings["batch_size"] = find_batch_size(model, optimizers, stored_size, n_rows, autocast, settings["compile"])
    describe(model, optimizers, settings, tokenizer, train, val, n_steps)
    data = train.fingerprint() + val.fingerprint()
    base = None if init_from in ("scratch", "resume") else known
    run.restore(model, optimizers, tokenizer.name, data, tokenizer.vocabulary, sources_of(data_dir), base)

    micro_batch = settings["batch_size"]
    n_val = min(len(val), max(1, eval_tokens // block_size))
    token_bytes = tokenizer.token_bytes()
    compiled = torch.compile(model) if settings["compile"] else model  # evaluation and samples use the raw model
    batches = prefetch(partial(next_token_batch, train, n_rows), run.step, device)

    def evaluate(step):
        metrics = {}
        if due(step, eval_interval, n_steps):
            metrics |= validation_loss(model, val, n_val, micro_batch, token_bytes, autocast)
        if due(step, hellaswag_interval, n_steps):
            scores = hellaswag.evaluate(model, tokenizer, items, autocast=autocast)
            metrics |= {"hellaswag_acc": scores["acc"], "hellaswag_acc_norm": scores["acc_norm"]}
        return metrics

    if run.step == 0:
        run.log_step_0(evaluate(0))
    while not run.over():
        started = time.perf_counter()
        idx, targets = batch = next(batches)
        n_tokens = targets.numel()
        scale = lr_scale(run.step, n_steps, warmup_steps, schedule, decay_fraction, final_lr_fraction)
        rates = set_learning_rates(optimizers, scale)
        with fixed_shapes():
            result = train_step(
                next_token_loss, compiled, optimizers, batch, n_tokens, micro_batch, grad_clip, autocast
            )
        row = run.count(result, n_targets=n_tokens, n_inputs=idx.numel(), seconds=time.perf_counter() - started)
        row |= rates
        row |= evaluate(run.step)
        if due(run.step, sample_interval, n_steps):
            print_sample(model, tokenizer, sample_prompt, run.step, autocast)
        run.end_step(row)
    run.finish()


# ----------------------------------------------------------------------------------------------------------------------
# preparation


def check(settings):
    """BadInput that names every setting that cannot be used."""
    rules = [
        (
            init_from in ("scratch", "resume") or Path(init_from).is_file(),
            f"init_from must be scratch, resume or a file (tools.convert_hf import writes one), not {init_from!r}",
        ),
        (family in FAMILIES, f"family must be one of {', '.join(FAMILIES)}, not {family!r}"),
        (optimizer in OPTIMIZERS, f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {optimizer!r}"),
        (tracker in TRACKERS, f"tracker must be wandb or trackio, not {tracker!r}"),
        (schedule in ("trapezoid", "cosine"), f"schedule must be trapezoid or cosine, not {schedule!r}"),
        (beta2 < 1, "beta2 must be below 1"),
        (decay_fraction <= 1, "decay_fraction must be at most 1"),
        (final_lr_fraction <= 1, "final_lr_fraction must be at most 1"),
        (compile in (None, True, False), "compile must be None, True or False"),
        (
            Path(init_from).resolve().parent != Path(out_dir).resolve(),
            f"out_dir {out_dir} is the folder of {init_from}, which would be overwritten: choose another",
        ),
    ]
    check_settings(settings, AT_LEAST_1, rules)


def take_sizes(settings, config):
    """Change the settings that a run's first weights decide, in place; only block_size may be smaller than theirs.

    BadInput for a setting that is neither theirs nor the default.
    """
    path = settings["init_from"]
    if flags_unlike_family(config):
        raise BadInput(f"{path}: the model is of no family that train.py makes ({', '.join(FAMILIES)})")
    decided = {name: getattr(config, name) for name in SIZES} | {"family": family_of(config)}
    problems = []
    for name, value in decided.items():
        asked = settings[name]
        if asked == DEFAULTS[name]:
            settings[name] = value
        elif name == "block_size" and asked > value:
            problems.append(f"block_size {value}, which may be made smaller, not {asked}")
        elif name != "block_size" and asked != value:
            problems.append(f"{name} {value}, not {asked}")
    if problems:
        raise BadInput(f"{path} has {', '.join(problems)}: leave out what the file decides")


def take_stored(settings, stored):
    """Change the sizes that were not asked for to those of the run that is resumed, in place."""
    for name in (*SIZES, "family"):
        if settings[name] == DEFAULTS[name]:
            settings[name] = stored.get(name, settings[name])


def load_weights(model, start, path):
    """Copy the weights of a start model into the model: of learned positions as many as it has."""
    weights = start.state_dict()
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][: model.config.block_size]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise BadInput(f"{path}: its weights do not fit ({' '.join(str(error).split()):.200})") from None


def rows_per_step(tokens_per_step, block_size, batch_size):
    """Rows of a global batch. BadInput if they do not divide into micro-batches; batch_size 0: still to be found."""
    world = n_processes()
    unit = block_size * max(1, batch_size) * world
    if tokens_per_step % unit:
        factors = "block_size x batch_size"
        if world > 1:
            factors += f" x {world} processes"
        raise BadInput(f"tokens_per_step {tokens_per_step} must be a multiple of {factors} = {unit}")
    return tokens_per_step // block_size


def load_data(settings, checkpoint=None):
    """(Tokenizer, training windows, validation windows) of a folder of shards. BadInput when they do not fit.

    checkpoint: the content of the one that the weights come from, which decides the tokenizer.
    """
    folder = settings["data_dir"]
    tokenizer = load_tokenizer(folder, settings["tokenizer"], checkpoint)
    shards = {split: find_shards(folder, split) for split in ("train", "val")}
    train = Windows(shards["train"], settings["block_size"], tokenizer.n_vocab, settings["seed"])
    val = Windows(shards["val"], settings["block_size"], tokenizer.n_vocab, seed=0)  # the same for every run
    for windows in (train, val):
        if len(windows) == 0:
            longest = windows.lengths.argmax()
            raise BadInput(
                f"block_size {settings['block_size']} is longer than the data: {windows.paths[longest]}, the longest "
                f"of its kind, has {windows.lengths[longest]} tokens; use a smaller --block_size, more data, or a "
                "larger --val_fraction"
            )
    outside = train.share_outside()
    if outside > 0.01:
        print(
            f"warning: {outside:.1%} of the training tokens are in no window of {train.block_size}, as the shards are "
            "short: prepare the texts together, or use a smaller --block_size"
        )
    if tokenizer.name != "bytes" and looks_like_bytes(train.shards[0]):
        print(f"warning: {train.paths[0]} has no token above 258: was it made with --tokenizer=bytes?")
    return tokenizer, train, val


def load_tokenizer(folder, name, checkpoint):
    """The tokenizer of a checkpoint, of a folder of shards, or of this name, in this order.

    BadInput when they contradict each other; a name may be "".
    """
    of_data = read_meta(folder).get("tokenizer")
    if checkpoint:
        tokenizer = tokenizer_of_checkpoint(checkpoint)
    elif of_data:
        tokenizer = tokenizer_of_shards(folder, of_data)
    else:
        tokenizer = Tokenizer(name or "gpt2")
    if of_data not in (None, tokenizer.name):
        remedy = "prepare the text again with --tokenizer= the checkpoint"
        raise BadInput(f"{folder} was made with the {of_data} tokenizer, the model has {tokenizer.name}: {remedy}")
    if name not in ("", tokenizer.name) and Tokenizer(name).name != tokenizer.name:
        raise BadInput(f"the tokenizer of {folder} is {tokenizer.name}, not {name}: leave --tokenizer= out")
    return tokenizer


def load_hellaswag(wanted, source, limit):
    """(the module hellaswag, its items), both None when they are not wanted: the module imports much else."""
    if not wanted:
        return None, None
    import hellaswag

    return hellaswag, hellaswag.load_items(source, limit)


def make_model(settings, tokenizer):
    """A GPT with new weights for the settings' sizes and the tokenizer's vocabulary. BadInput if they do not fit."""
    sizes = {name: settings[name] for name in ("block_size", "n_layer", "n_head", "n_embd", "head_dim", "mlp_dim")}
    sizes["vocab_size"] = round_up(tokenizer.n_vocab, 64)  # GPUs multiply matrices of such sizes fastest
    sizes["n_vocab"] = tokenizer.n_vocab
    sizes["rope_theta"] = settings["rope_theta"]
    try:
        config = GPTConfig(**FAMILIES[settings["family"]], **sizes)
    except ValueError as error:
        raise BadInput(str(error)) from None
    torch.manual_seed(settings["seed"])
    return GPT(config)


def upgrade_settings(stored):
    """Change the settings of a checkpoint by an earlier version, in place, to today's."""
    if stored["schedule"] == "constant":
        stored["schedule"] = "trapezoid"


def find_batch_size(model, optimizers, stored_size, n_rows, autocast, compiled=False):
    """The micro-batch for n_rows a step: the checkpoint's stored_size if it divides them, else the largest that fits.

    Tries the divisors of a process's rows from the largest down, until one fits into the memory of every process.
    Measured without torch.compile, which needs less but for the logits, which it keeps. BadInput when not even one row
    fits.
    """
    n_rows //= n_processes()
    if stored_size and n_rows % stored_size == 0:
        return stored_size
    device = next(model.parameters()).device
    sizes = [size for size in range(n_rows, 0, -1) if n_rows % size == 0]
    if device.type == "cpu":  # there, what does not fit is swapped, without an error
        sizes = [size for size in sizes if size * model.config.block_size <= CPU_TOKENS] or [1]
    for size in sizes:
        n_full = sum_over_ranks(torch.tensor(0.0 if fits(model, optimizers, size, autocast, compiled) else 1.0))
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)  # so that the log shows the peak of training
        if n_full == 0:
            return size
    raise BadInput("not even one row fits into memory: --activation_checkpointing=True or a smaller model")


def fits(model, optimizers, batch_size, autocast, compiled):
    """Whether a forward and backward pass of batch_size rows fits, beside the optimizers' states and gradients."""
    try:
        reserved = []
        for opt in optimizers:
            n_copies = 3 if isinstance(opt, torch.optim.AdamW) else 2  # the gradient, and one or two moments
            for p in (p for group in opt.param_groups for p in group["params"]):
                reserved += [torch.empty_like(p) for _ in range(n_copies)]
        idx = torch.zeros(batch_size, model.config.block_size, dtype=torch.long, device=reserved[0].device)
        with autocast():
            if compiled:
                logits = (batch_size, model.config.block_size, model.config.vocab_size)
                reserved.append(torch.empty(logits, dtype=model.compute_dtype(), device=idx.device))
            loss = model(idx, idx)
        loss.backward()
        return True
    except RuntimeError as error:
        if is_out_of_memory(error):
            return False
        raise
    finally:
        model.zero_grad(set_to_none=True)


def describe(model, optimizers, settings, tokenizer, train, val, n_steps):
    """Print what is about to happen."""
    changed = [f"{name}={value}" for name, value in settings_of(globals()).items() if value != DEFAULTS[name]]
    print(f"settings that are not the default: {' '.join(changed) or 'none'}")
    print(f"on {settings['device']} in {settings['dtype']}, {'compiled' if settings['compile'] else 'not compiled'}")
    print(f"{model.n_params():,} parameters, {model.flops_per_token():.3g} FLOPs/token")
    for opt in optimizers:
        for group in opt.param_groups:
            n = sum(p.numel() for p in group["params"])
            rates = f"learning rate {group['initial_lr']:g}, weight decay {group['weight_decay']:g}"
            print(f"  {type(opt).__name__:5} {group['name']:16} {len(group['params']):4} tensors {n:13,}  {rates}")
    T = train.block_size
    n_epoch = len(train) * T
    print(f"{n_epoch:,} training and {len(val) * T:,} validation tokens, tokenizer {tokenizer.name}, windows of {T}")
    step = f"a step: {settings['tokens_per_step']:,} tokens, {settings['batch_size']} windows at a time"
    world = n_processes()
    if world > 1:
        step += f", shared by {world} processes"
    print(step)
    n_tokens = n_steps * settings["tokens_per_step"]
    flops = n_tokens * model.flops_per_token()
    print(f"{n_steps:,} steps: {n_tokens:,} tokens ({n_tokens / n_epoch:.3g} epochs), {flops:.3g} FLOPs", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# a step


def next_token_batch(windows, n_rows, step):
    """The global batch of a step: (idx, targets), each (n_rows, block_size) int64."""
    rows = torch.from_numpy(windows.batch(step * n_rows, n_rows))
    return rows[:, :-1], rows[:, 1:]


def next_token_loss(model, idx, targets):
    """Sum over the targets of -log p, nats. For another loss start from the logits, `model(idx)` (B, T, vocab_size)."""
    return model(idx, targets)


def lr_scale(step, n_steps, warmup_steps, schedule="trapezoid", decay_fraction=0.7, final_lr_fraction=0.0):
    """Share of the peak learning rate that step 0 <= step < n_steps uses.

    After a linear warm-up, "cosine" decays to the end; "trapezoid" stays at the peak, then decays linearly over the
    last decay_fraction of the run, though never during the warm-up.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "cosine":
        done = (step - warmup_steps) / max(1, n_steps - warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * done))
    else:
        n_decay = min(decay_fraction * n_steps, n_steps - warmup_steps)
        share = min(1.0, (n_steps - step) / max(1.0, n_decay))
    return final_lr_fraction + (1 - final_lr_fraction) * share


def set_learning_rates(optimizers, scale):
    """Set every group to `scale` times its peak; returns the rates, as the log names them."""
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = group["initial_lr"] * scale
    names = ("learning_rate", "muon_learning_rate")
    return {name: opt.param_groups[0]["lr"] for name, opt in zip(names, optimizers, strict=False)}


class StepResult(NamedTuple):
    loss: float  # mean over the global batch
    grad_norm: float  # before clipping
    applied: bool  # False: loss or gradient was not finite, and the weights are as they were


def train_step(loss_of, model, optimizers, batch, n_targets, batch_size, grad_clip, autocast):
    """One optimizer step on a global batch, of which every process takes its share, batch_size rows at a time.

    batch: a tuple of tensors whose first dimension is rows. loss_of(model, *batch) returns the sum of the loss over the
    targets in these rows; n_targets is their number in the global batch, so shares and micro-batches with unequal
    numbers of targets are weighted right. Returns a StepResult, the same in every process.
    """
    rank, world = rank_and_world()
    device = next(model.parameters()).device
    my_rows = [part.tensor_split(world)[rank] for part in batch]
    total = torch.zeros((), device=device)
    for start in range(0, len(my_rows[0]), batch_size):
        rows = [part[start : start + batch_size].to(device, non_blocking=True) for part in my_rows]
        with autocast():
            loss = loss_of(model, *rows) / max(1, n_targets)  # a batch may have none
        loss.backward()
        total += loss.detach()
    sum_gradients(model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    # the one time in a step that the host waits for the device
    loss, norm = torch.stack((sum_over_ranks(total), norm)).tolist()
    applied = math.isfinite(loss) and math.isfinite(norm)
    for opt in optimizers:
        if applied:
            with autocast():  # Muon's matrix products
                opt.step()
        opt.zero_grad(set_to_none=True)
    return StepResult(loss, norm, applied)


# ----------------------------------------------------------------------------------------------------------------------
# evaluation


@torch.inference_mode()
def validation_loss(model, windows, n_windows, batch_size, token_bytes, autocast):
    """Mean loss over the first n_windows of `windows`: {"val_loss": nats/token, "val_bpb": bits/byte}.

    token_bytes: (n_vocab,) bytes of text that each token stands for.
    """
    rank, world = rank_and_world()
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes; on the host, as Apple GPUs have no float64
    for first in range(rank * batch_size, n_windows, world * batch_size):
        rows = torch.from_numpy(windows.batch(first, min(batch_size, n_windows - first)))
        idx, targets = rows[:, :-1], rows[:, 1:]
        with autocast():
            sums[0] += model(idx.to(device), targets.to(device)).item()
        sums[1] += targets.numel()
        sums[2] += int(token_bytes[targets.numpy()].sum())
    nats, n_tokens, n_bytes = sum_over_ranks(sums).tolist()
    return {"val_loss": nats / n_tokens, "val_bpb": nats / math.log(2) / max(1, n_bytes)}


def print_sample(model, tokenizer, prompt, step, autocast):
    """Print 64 tokens after the prompt. Their own random generator keeps them from affecting training."""
    if not is_first_process():
        return
    generator = torch.Generator(next(model.parameters()).device).manual_seed(step)
    prompt_ids = [tokenizer.eot, *tokenizer.encode(prompt)][-model.config.block_size // 2 :]
    n_new = min(64, model.config.block_size - len(prompt_ids))
    with autocast():
        steps = model.generate([prompt_ids], n_new, top_k=50, stop=tokenizer.eot, generator=generator)
        text = tokenizer.decode([int(ids) for ids in steps])
    print_line(f"sample: {prompt}{text}")


if __name__ == "__main__":
    configure(globals())
    main()
