"""Stage 3: pretrain a GPT on the token shards of prepare_fineweb.py, scoring
HellaSwag on the way if asked.

    python train.py config/shakespeare.py
    torchrun --nproc_per_node=8 train.py config/fgpt_712m.py --batch_size=0

Writes into out_dir: log.jsonl (a line of units, then a line per step), ckpt.pt
(everything needed to resume), ckpt_before.pt (the ckpt.pt before the current
one) and best.pt (the weights with the lowest validation loss). Ctrl-C, SIGTERM
and --max_minutes stop the run after it has saved. A run that was stopped, or
killed at any moment, continues from ckpt.pt as if nothing had happened when you
run the same command with --init_from=resume. --init_from=FILE starts a new run
from the weights of a checkpoint, which also decides the sizes of the model.
Under torchrun each process computes its share of every batch, and the first one
writes; on several nodes out_dir must be on a shared disk.
"""

import math
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from configurator import BadInput, check_settings, configure, one_line, settings_of

import torch

from data import Windows, find_shards, is_unfinished, looks_like_bytes, read_meta, sources_of
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
tied = None  # the output head is the embedding; None: as the family, gpt2 yes, modern no
# optimization
optimizer = "muon"  # muon (AdamW for embeddings and norms) or adamw
tokens_per_step = 524288  # global batch, tokens
batch_size = 16  # rows (of block_size tokens) per forward pass; accumulated up to tokens_per_step; 0: as many as fit
max_steps = 19073  # length of the run, optimizer steps
max_tokens = 0  # length of the run, tokens; replaces max_steps unless 0
learning_rate = 3e-3  # peak of AdamW
muon_learning_rate = 0.02  # peak of Muon
weight_decay = 0.01  # decoupled, on matrices and embeddings
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
sample_prompt = "The "  # text that the samples continue
log_interval = 10  # steps between printed lines
checkpoint_interval = 500  # steps between writes of ckpt.pt
keep_every = 0  # steps between weights that are kept, as step_00001000.pt; 0: none
tracker = ""  # wandb or trackio: show the run there too, in project fgpt
max_minutes = 0.0  # save and stop after this time; 0: no limit
# machine
device = ""  # cpu, cuda, ...; empty: cuda where there is one
dtype = ""  # float32 or bfloat16; empty: bfloat16 where it was measured to be faster
compile = None  # torch.compile; None: on cuda only
activation_checkpointing = False  # less memory for a fifth more compute
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
SIZES = ("block_size", "n_layer", "n_head", "n_embd", "head_dim", "mlp_dim", "rope_theta", "tied")
# not even --force may change these, as the shapes of the stored tensors depend on them
FIXED = {"family", "block_size", "n_layer", "n_head", "n_embd", "head_dim", "mlp_dim", "tied", "optimizer"}
CPU_TOKENS = 8192  # largest micro-batch that --batch_size=0 finds on a CPU


def main():
    settings = settings_of(globals())  # as the user set them; below, what is chosen for the user is filled in
    check(settings)
    join_processes(settings["device"])
    n_steps = math.ceil(max_tokens / tokens_per_step) if max_tokens else max_steps
    run = Run(
        "pretrain", settings, n_steps, UNITS, LABELS, may_change=MAY_CHANGE, fixed=FIXED, upgrade=upgrade_settings
    )
    start, base = load_start()  # the model and checkpoint that a new run starts from; None without --init_from=FILE
    choose_sizes(settings, start, run.stored_settings)
    n_rows = rows_per_step(tokens_per_step, settings["block_size"], batch_size)
    device = pick_device(settings["device"], deterministic)
    tokenizer, train, val = load_data(settings, base or run.stored)
    hellaswag, items = load_hellaswag(hellaswag_interval > 0, hellaswag_source, hellaswag_limit)
    choose_machine_settings(settings, device, run.stored_settings)
    autocast = autocast_for(device, settings["dtype"])
    model = make_model(settings, tokenizer).to(device)
    if start:
        load_weights(model, start, init_from)
        start = None  # free its memory
    model.checkpoint_activations = activation_checkpointing
    optimizers = make_optimizers(model, optimizer, learning_rate, muon_learning_rate, weight_decay, beta2)
    if batch_size == 0:
        stored_size = run.stored_settings.get("batch_size", 0)
        settings["batch_size"] = find_batch_size(model, optimizers, stored_size, n_rows, autocast, settings["compile"])
    describe(model, optimizers, settings, tokenizer, train, val, n_steps)
    data = fingerprint(train, val, run.stored)
    run.restore(model, optimizers, tokenizer.name, data, tokenizer.vocabulary, sources_of(data_dir), base)

    micro_batch = settings["batch_size"]
    n_val = min(len(val), max(1, eval_tokens // settings["block_size"]))  # rows
    token_bytes = tokenizer.token_bytes()
    compiled = torch.compile(model) if settings["compile"] else model  # evaluation and samples use the raw model
    batches = prefetch(partial(next_token_batch, train, n_rows), run.step, device)

    def evaluate(step):
        """The metrics that are due at this step, a dict."""
        metrics = {}
        if due(step, eval_interval, n_steps):
            metrics |= validation_loss(model, val, n_val, micro_batch, token_bytes, autocast)
        if due(step, hellaswag_interval, n_steps):
            scores = hellaswag.evaluate(model, tokenizer, items, autocast=autocast)
            metrics |= {"hellaswag_acc": scores["acc"], "hellaswag_acc_norm": scores["acc_norm"]}
        return metrics

    if run.step == 0:
        run.log_step_0(evaluate(0))
    while not run.is_over:
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
        (compile is None or isinstance(compile, bool), "compile must be None, True or False"),
        (tied is None or isinstance(tied, bool), "tied must be None, True or False"),
        (
            init_from in ("scratch", "resume") or Path(init_from).resolve().parent != Path(out_dir).resolve(),
            f"out_dir {out_dir} is the folder of {init_from}, which would be overwritten: choose another",
        ),
    ]
    check_settings(settings, AT_LEAST_1, rules)


def upgrade_settings(stored):
    """Convert the settings of a checkpoint of an earlier version, in place."""
    if stored["schedule"] == "constant":
        stored["schedule"] = "trapezoid"
    stored.setdefault("tied", True)


def load_start():
    """(model, other entries of its checkpoint) of --init_from=FILE; (None, None) without."""
    if init_from in ("scratch", "resume"):
        return None, None
    start, base = load_model(init_from)
    if base["stage"] != "pretrain":
        print(f"{init_from} was finetuned: trained on text it becomes a model that continues text")
    return start, base


def choose_sizes(settings, start, stored):
    """Change the settings that decide the model's sizes, in place, to those of the run's first weights, if it has any.

    start: the model that a new run starts from, or None. stored: settings of the run to resume, {} for a new one.
    """
    if start:
        take_sizes(settings, start.config)
    for name in (*SIZES, "family"):
        if name in stored and settings[name] == DEFAULTS[name]:
            settings[name] = stored[name]
    if settings["tied"] is None:
        settings["tied"] = GPTConfig(**FAMILIES[settings["family"]]).tied


def take_sizes(settings, config):
    """Change the settings that the config of a run's first weights decides, in place; block_size may be set smaller.

    BadInput for another setting that is neither the config's nor the default.
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


def rows_per_step(tokens_per_step, block_size, batch_size):
    """Rows of a global batch. BadInput if they do not divide into micro-batches. batch_size 0: not chosen yet."""
    world = n_processes()
    unit = block_size * max(1, batch_size) * world
    if tokens_per_step % unit:
        factors = "block_size x batch_size"
        if world > 1:
            factors += f" x {world} processes"
        raise BadInput(f"tokens_per_step {tokens_per_step} must be a multiple of {factors} = {unit}")
    return tokens_per_step // block_size


def load_data(settings, checkpoint=None):
    """(Tokenizer, training Windows, validation Windows) for data_dir. BadInput when they do not fit together.

    checkpoint: entries of the checkpoint that the weights come from, which decides the tokenizer, or None.
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
    if is_unfinished(folder):
        print(f"warning: {folder} is not finished: the command of prepare_fineweb.py that made it resumes")
    outside = train.share_outside()
    if outside > 0.01:
        print(
            f"warning: {outside:.1%} of the training tokens are in no window of {train.block_size}, as the shards are "
            "short: prepare the texts together, or use a smaller --block_size"
        )
    if tokenizer.name != "bytes" and looks_like_bytes(train.shards[0]):
        print(f"warning: {train.paths[0]} has no token above 258: was it made with --tokenizer=bytes?")
    return tokenizer, train, val


def fingerprint(train, val, stored):
    """What a resumed run recognizes its data by. stored: its checkpoint, or None."""
    of_ends = train.fingerprint_of_ends() + val.fingerprint_of_ends()
    if stored and stored["data"] == of_ends:  # a run of an earlier version
        return of_ends
    return train.fingerprint() + val.fingerprint()


def load_tokenizer(folder, source, checkpoint):
    """The tokenizer of the checkpoint, else of the folder of shards, else the one of --tokenizer= (`source`).

    BadInput when they contradict each other. checkpoint may be None, source "".
    """
    name_in_meta = read_meta(folder).get("tokenizer")
    if checkpoint:
        tokenizer = tokenizer_of_checkpoint(checkpoint)
    elif name_in_meta:
        tokenizer = tokenizer_of_shards(folder, name_in_meta)
    else:
        tokenizer = Tokenizer(source or "gpt2")
    if name_in_meta not in (None, tokenizer.name):
        remedy = "prepare the text again with --tokenizer= the checkpoint"
        raise BadInput(f"{folder} was made with the {name_in_meta} tokenizer, the model has {tokenizer.name}: {remedy}")
    if source not in ("", tokenizer.name) and Tokenizer(source).name != tokenizer.name:
        raise BadInput(f"the tokenizer of {folder} is {tokenizer.name}, not {source}: leave --tokenizer= out")
    return tokenizer


def load_hellaswag(is_needed, source, limit):
    """(the module hellaswag, its items), or (None, None) if it is not needed: it imports much else."""
    if not is_needed:
        return None, None
    import hellaswag

    return hellaswag, hellaswag.load_items(source, limit)


def choose_machine_settings(settings, device, stored):
    """Fill in device, dtype and compile, in place. stored: settings of the run to resume, which keeps its dtype."""
    settings["device"] = device.type
    settings["dtype"] = pick_dtype(settings["dtype"] or stored.get("dtype", ""), device, settings["n_embd"])
    if settings["compile"] is None:
        settings["compile"] = device.type == "cuda"


def make_model(settings, tokenizer):
    """A GPT with new weights for the settings' sizes and the tokenizer's vocabulary. BadInput if they do not fit."""
    sizes = {name: settings[name] for name in SIZES if settings[name] is not None}
    sizes["vocab_size"] = round_up(tokenizer.n_vocab, 64)  # GPUs multiply matrices of such sizes fastest
    sizes["n_vocab"] = tokenizer.n_vocab
    try:
        config = GPTConfig(**FAMILIES[settings["family"]] | sizes)
    except ValueError as error:
        raise BadInput(str(error)) from None
    torch.manual_seed(settings["seed"])
    return GPT(config)


def load_weights(model, start, path):
    """Copy the weights of the model that the run starts from; the positions beyond the model's block_size are left out.

    BadInput, naming the path of its checkpoint, if they do not fit.
    """
    weights = start.state_dict()
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][: model.config.block_size]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise BadInput(f"{path}: its weights do not fit ({one_line(error):.200})") from None


def find_batch_size(model, optimizers, stored_size, n_rows, autocast, is_compiled=False):
    """The micro-batch, in rows: stored_size, of the run to resume, if it divides n_rows, else the largest that fits.

    Tries the divisors of the rows that each process has in a step, from the largest down, until one fits into the
    memory of every process. BadInput when not even one row fits.
    """
    my_rows = n_rows // n_processes()
    if stored_size and my_rows % stored_size == 0:
        return stored_size
    device = next(model.parameters()).device
    sizes = [size for size in range(my_rows, 0, -1) if my_rows % size == 0]
    if device.type == "cpu":  # when a CPU's memory is full there is no error: the system swaps
        sizes = [size for size in sizes if size * model.config.block_size <= CPU_TOKENS] or [1]
    for size in sizes:
        is_too_large = not fits(model, optimizers, size, autocast, is_compiled)
        n_too_large = sum_over_ranks(torch.tensor(float(is_too_large)))  # number of processes
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)  # so that the log shows the peak of training
        if n_too_large == 0:
            return size
    raise BadInput("not even one row fits into memory: --activation_checkpointing=True or a smaller model")


def fits(model, optimizers, batch_size, autocast, is_compiled):
    """Whether a forward and backward pass of batch_size rows fits, in addition to gradients and optimizer states.

    Tries without torch.compile, which needs less memory, except that it keeps the logits.
    """
    try:
        reserved = []  # as much memory as gradients and optimizer states will take
        for opt in optimizers:
            n_copies = 3 if isinstance(opt, torch.optim.AdamW) else 2  # the gradient, and one or two moments
            for group in opt.param_groups:
                for p in group["params"]:
                    reserved += [torch.empty_like(p) for _ in range(n_copies)]
        idx = torch.zeros(batch_size, model.config.block_size, dtype=torch.long, device=reserved[0].device)
        with autocast():
            if is_compiled:
                shape = (*idx.shape, model.config.vocab_size)  # of the logits
                reserved.append(torch.empty(shape, dtype=model.compute_dtype(), device=idx.device))
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
    """Print the settings, the model and its parameter groups, the data, and how much the run will compute."""
    changed = [f"{name}={value}" for name, value in settings_of(globals()).items() if value != DEFAULTS[name]]
    print(f"settings that are not the default: {' '.join(changed) or 'none'}")
    print(f"on {settings['device']} in {settings['dtype']}, {'compiled' if settings['compile'] else 'not compiled'}")
    print(f"{model.n_params():,} parameters, {model.flops_per_token():.3g} FLOPs/token")
    for opt in optimizers:
        for group in opt.param_groups:
            n_elements = sum(p.numel() for p in group["params"])
            sizes = f"{len(group['params']):4} tensors {n_elements:13,}"
            rates = f"learning rate {group['initial_lr']:g}, weight decay {group['weight_decay']:g}"
            print(f"  {type(opt).__name__:5} {group['name']:16} {sizes}  {rates}")
    T = train.block_size
    tokens_per_epoch = len(train) * T
    splits = f"{tokens_per_epoch:,} training and {len(val) * T:,} validation tokens"
    print(f"{splits}, tokenizer {tokenizer.name}, rows of {T}")
    step = f"a step: {settings['tokens_per_step']:,} tokens, {settings['batch_size']} rows at a time"
    if n_processes() > 1:
        step += f", shared by {n_processes()} processes"
    print(step)
    n_tokens = n_steps * settings["tokens_per_step"]
    epochs = n_tokens / tokens_per_epoch
    flops = n_tokens * model.flops_per_token()
    print(f"{n_steps:,} steps: {n_tokens:,} tokens ({epochs:.3g} epochs), {flops:.3g} FLOPs", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# a step


def next_token_batch(windows, n_rows, step):
    """The global batch of a step: (idx, targets), each (n_rows, block_size) int64."""
    rows = torch.from_numpy(windows.batch(step * n_rows, n_rows))
    return rows[:, :-1], rows[:, 1:]


def next_token_loss(model, idx, targets):
    """Sum of -log p over the targets, nats. For another loss, start from the logits: model(idx) (B, T, n_vocab)."""
    return model(idx, targets)


def lr_scale(step, n_steps, warmup_steps, schedule="trapezoid", decay_fraction=0.7, final_lr_fraction=0.0):
    """The learning rate of a step (0 <= step < n_steps) as a share of its peak.

    After a linear warm-up, "cosine" decays until the end of the run; "trapezoid" stays at the peak, then decays
    linearly over the last decay_fraction of the run, but not before the end of the warm-up.
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
    """Set the rate of every parameter group to `scale` times its peak. Returns the rates for the log, {name: rate}."""
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
    """One optimizer step on a global batch; each process computes its share of the rows, batch_size rows at a time.

    batch: a tuple of tensors whose first dimension is rows. loss_of(model, *rows): the sum of the loss over the targets
    in some rows. n_targets: number of targets in the global batch; the sums are divided by it, so that each target
    counts the same, however many targets a micro-batch has. Returns a StepResult, the same in every process.
    """
    rank, world = rank_and_world()
    device = next(model.parameters()).device
    my_rows = [part.tensor_split(world)[rank] for part in batch]
    total = torch.zeros((), device=device)
    for start in range(0, len(my_rows[0]), batch_size):
        rows = [part[start : start + batch_size].to(device, non_blocking=True) for part in my_rows]
        with autocast():
            loss = loss_of(model, *rows) / max(1, n_targets)  # a batch may have no targets
        loss.backward()
        total += loss.detach()
    sum_gradients(model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    # the only time in a step that the CPU waits for the GPU
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

    token_bytes: (n_vocab,) number of bytes of text that each token stands for.
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
    """Print the prompt and 64 tokens after it, drawn with a separate random generator, so training is not affected."""
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
