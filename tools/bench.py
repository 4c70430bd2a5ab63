"""Measurements: each prints a table, below the machine it was made on.

    python -m tools.bench train --configs=config/gpt2_124m.py

    check       on a rented GPU, before a long run: does all of it work there
    train       a training step: tokens/s, share of a ceiling, memory
    race        tokens and seconds that three recipes need to reach a loss
    tokenize    tokens/s of prepare_fineweb.py, and of tiktoken alone
    hellaswag   items/s, and those of one item at a time
    decode      tokens/s of sampling, and without a cache

Machines are noisy: things that are compared take turns, `repeats` times, and
the table shows medians. The rows are printed as they are measured: a training
step that does not fit into memory ends the table.
"""

import datetime
import math
import multiprocessing
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # for `python tools/bench.py`

from configurator import BadInput, apply_file, check_settings, configure, settings_of

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import hellaswag
import model as model_py
import prepare_fineweb
import train
from run import BF16_WIDTH, BF16_WIDTH_DECODING, autocast_for, fixed_shapes, peak_memory, pick_device, pick_dtype
from tokenizer import Tokenizer
from tools.race import race

repeats = 3  # how often each thing is measured
device = ""  # cpu, cuda, ...; empty: cuda where there is one
dtype = ""  # float32 or bfloat16; empty: that of the config, else bfloat16 where it was measured to be faster
configs = "config/fgpt_712m.py,config/fgpt_modern.py"  # models to measure, configs of train.py
batch_sizes = "1,4,16"  # train: micro-batches, rows
tokens_per_step = 0  # train: 0: those of the config
activation_checkpointing = False  # train: less memory for a fifth more compute
data_dir = "data/fineweb"  # race: folder of token shards
race_config = "config/race.py"  # race: config of train.py
out_dir = "out/race"  # race: folder of the runs; those that are finished are not repeated
seeds = "1,2,3"  # race: one run of each recipe with each of them
learning_rates = "2e-3,4e-3,8e-3"  # race: of the baseline; the best one is used
source = ""  # tokenize: files of text, as in prepare_fineweb.py
n_items = 64  # hellaswag: items to score
decode_batches = "1,64"  # decode: rows generated together
new_tokens = 512  # decode: tokens for each of them
compile = False  # decode: as sample.py's, for GPUs


def main(what):
    check_settings(settings_of(globals()), at_least_1=("repeats", "n_items", "new_tokens"))
    of_a_config = {"train": training, "hellaswag": score_items, "decode": decode}
    if what == "check":
        from tools import check  # here, as it imports this file

        rows = chain(check.tests_on_a_gpu(device), rows_of_configs(check.check))
    elif what in of_a_config:
        rows = rows_of_configs(of_a_config[what])
    elif what == "race":
        arguments = [f"--{name}={value}" for name, value in given("data_dir", "device", "dtype").items()]
        rows = race(race_config, out_dir, numbers("seeds"), sorted(numbers("learning_rates", float)), arguments)
    elif what == "tokenize":
        rows = tokenize(source)
    else:
        names = ", ".join(["check", *of_a_config, "race", "tokenize"])
        raise BadInput(f"python -m tools.bench WHAT [--help]: WHAT is one of {names}, not {what!r}")
    print(machine())
    show(rows)


def rows_of_configs(measure):
    """Yields the rows that measure(settings of train.py) yields, for each config."""
    for config in configs.split(","):
        settings = dict(train.DEFAULTS)
        apply_file(config, settings, train.DEFAULTS)
        settings |= given("device", "dtype", "tokens_per_step", "activation_checkpointing")
        least_width = BF16_WIDTH_DECODING if measure == decode else BF16_WIDTH
        device = pick_device(settings["device"])
        settings["dtype"] = pick_dtype(settings["dtype"], device, settings["n_embd"], least_width)
        if settings["compile"] is None:
            settings["compile"] = device.type == "cuda"
        for row in measure(settings):
            yield {"config": config} | row


def given(*names):
    """Those of these settings that are not empty."""
    return {name: globals()[name] for name in names if globals()[name]}


def numbers(name, kind=int):
    """The numbers of a setting like "1,4". BadInput unless each is above 0."""
    text = globals()[name]
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise BadInput(f"{name} must be numbers above 0, separated by commas, not {text!r}")
    return found


def machine():
    """One line: date, processor or GPU, torch."""
    cpu = platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{datetime.date.today()}, {gpu}{os.cpu_count()} cores of {cpu}, torch {torch.__version__}"


def show(rows):
    """Print dicts as rows of a table as they come, with a header wherever their keys change."""
    names = None
    for row in rows:
        if list(row) != names:
            names = list(row)
            print(f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
        print(f"| {' | '.join(map(cell, row.values()))} |", flush=True)


def cell(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def compare(n, functions, device):
    """{name: n a second} of two functions that do the same work, by name, and the ratio of the first to the second."""
    seconds = take_turns([partial(seconds_of, function, device) for function in functions.values()])
    ours, theirs = [n / each for each in seconds]
    return dict(zip(functions, (ours, theirs), strict=True), ratio=ours / theirs)


def take_turns(functions):
    """The median of the numbers that each function returns; all are called `repeats` times."""
    turns = [[function() for function in functions] for _ in range(repeats)]
    return [statistics.median(results) for results in zip(*turns, strict=True)]


def seconds_of(function, device, calls=1):
    """Seconds of the last of the calls: on a GPU, the first two may compile and allocate."""
    for _ in range(calls):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - start


def in_new_process(function, *arguments):
    """What the function returns in a process of its own, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def prepare(settings):
    """(model with new weights, device, autocast) of settings of train.py."""
    device = pick_device(settings["device"])
    n_vocab = 259 if settings["tokenizer"] == "bytes" else 50259  # a tokenizer would download its vocabulary
    with torch.device(device):
        model = train.make_model(settings, SimpleNamespace(n_vocab=n_vocab))
    model.checkpoint_activations = settings["activation_checkpointing"]
    return model, device, autocast_for(device, settings["dtype"])


# ----------------------------------------------------------------------------------------------------------------------
# training


def training(settings):
    for size in numbers("batch_sizes"):
        yield {"micro-batch": size} | in_new_process(training_step, settings | {"batch_size": size}, repeats)


def training_step(settings, repeats):
    """Figures of train.py's own step with its settings, on random ids, as a dict.

    A step has tokens_per_step tokens, of which batch_size rows are computed at a time. RuntimeError when it is compiled
    again after the second step.
    """
    model, device, autocast = prepare(settings)
    optimizers = model_py.make_optimizers(model, settings["optimizer"])
    batch_size = settings["batch_size"]
    n_micro_batches = max(1, settings["tokens_per_step"] // settings["block_size"] // batch_size)
    shape = (n_micro_batches * batch_size, settings["block_size"])
    idx = torch.randint(model.config.n_vocab, shape, device=device)
    trained = torch.compile(model) if settings["compile"] else model
    arguments = (trained, optimizers, (idx, idx), idx.numel(), batch_size, settings["grad_clip"], autocast)

    def step():
        with fixed_shapes():
            train.train_step(train.next_token_loss, *arguments)

    seconds_of(step, device, calls=2)
    with torch.compiler.set_stance("fail_on_recompile"):
        seconds = statistics.median([seconds_of(step, device) for _ in range(repeats)])
    peak_gigabytes = peak_memory(device) or math.nan
    if device.type == "cuda":
        print(f"attention is {attention_kernels(step)}", file=sys.stderr)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with autocast():  # as in train_step
        optimizer_seconds = seconds_of(lambda: [opt.step() for opt in optimizers], device, calls=3)
    flops = idx.numel() * model.flops_per_token() / seconds
    ceiling = product_speed(device, settings["dtype"])
    return {
        "peak GB": peak_gigabytes,
        "tokens/s": idx.numel() / seconds,
        "TFLOP/s": flops / 1e12,
        "a large product's": ceiling / 1e12,
        "share of that": flops / ceiling,
        "optimizers' share of the time": optimizer_seconds / seconds,
    }


def attention_kernels(step):
    """Which of PyTorch's attention kernels a step runs on a GPU, by their names; flash or cuDNN is the fast one."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        step()
    names = "\n".join(event.key for event in record.key_averages() if not event.key.startswith("triton"))
    kinds = {"flash": "flash_(fwd|bwd)", "cuDNN": "cudnn.*(sdpa|attention)", "memory-efficient": "fmha_cutlass"}
    return ", ".join(kind for kind, name in kinds.items() if re.search(name, names)) or "unfused, or not recorded"


def product_speed(device, dtype):
    """FLOP/s of a large product of random matrices of this dtype: the ceiling of training."""
    n = 8192 if device.type == "cuda" else 1024
    calls = 20
    a, b = torch.randn(2, n, n, device=device).to(getattr(torch, dtype))
    return calls * 2 * n**3 / seconds_of(lambda: [a @ b for _ in range(calls)], device, calls=3)


# ----------------------------------------------------------------------------------------------------------------------
# tokenizing


def tokenize(source):
    """The whole of prepare_fineweb.py (checksum, decoding, split, tokens, shards) against tiktoken alone.

    tiktoken gets the same documents, already in memory, and as many threads.
    """
    if not source:
        raise BadInput("tokenize needs --source, files of text like texts/*.parquet")
    tokenizer = Tokenizer("gpt2")
    paths = [file["path"] for file in prepare_fineweb.find_files(source, None, Counter())]
    texts = [text for path in paths for _, text in prepare_fineweb.read_documents(path, "text", False) if text]
    n_tokens = sum(len(tokenizer.encode(text)) for text in texts)

    def stage():
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):
            prepare_fineweb.source = source
            prepare_fineweb.out_dir = folder
            prepare_fineweb.main()

    def tiktoken_alone():
        tokenizer.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count())

    functions = {"prepare_fineweb.py, tokens/s": stage, "tiktoken alone": tiktoken_alone}
    yield {"documents": len(texts), "tokens": n_tokens} | compare(n_tokens, functions, torch.device("cpu"))


# ----------------------------------------------------------------------------------------------------------------------
# HellaSwag


def score_items(settings):
    """Items/s of both ways, and the largest difference between their sums of log-likelihoods."""
    model, device, autocast = prepare(settings)
    model.eval()
    items = random_items(n_items, model.config.n_vocab, model.config.block_size + 1)
    ours = partial(hellaswag.log_likelihoods, model, items, autocast=autocast)
    theirs = partial(one_item_at_a_time, model, items, autocast)
    error = max(abs(a - b) for a, b in zip(ours(), theirs(), strict=True))  # which also warms up
    row = compare(n_items, {"items/s": ours, "one at a time": theirs}, device)
    yield row | {"sums differ by, nats": error}


def random_items(n_items, n_vocab, longest):
    """Items as four rows (ids, n_scored) of random tokens, about as long as HellaSwag's; at most `longest` ids.

    A third are short captions, two thirds longer how-to texts. Their tokens (22 of context and 14 an ending, or 75 and
    28, spread by a third) are set by hand from what is published about the data, not fitted to it.
    """
    rng = random.Random(0)
    items = []
    for _ in range(n_items):
        n_context, n_ending = (22, 14) if rng.random() < 1 / 3 else (75, 28)
        lengths = [n_context, n_ending, n_ending, n_ending, n_ending]
        sizes = [max(3, round(rng.gauss(n, n / 3))) for n in lengths]
        context, *endings = (rng.choices(range(n_vocab), k=size) for size in sizes)
        items.append([((context + ids)[-longest:], min(len(ids), longest - 1)) for ids in endings])
    return items


@torch.inference_mode()
def one_item_at_a_time(model, items, autocast):
    """Sums of log-likelihoods the plain way: four rows at a time, padded to the longest, logits everywhere."""
    device = model.wte.weight.device
    sums = []
    for rows in items:
        ids = pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True).to(device)
        with autocast():
            logits = model(ids[:, :-1])
        losses = F.cross_entropy(logits.float().mT, ids[:, 1:], reduction="none").cpu()  # (4, T)
        for loss, (ids, n_scored) in zip(losses, rows, strict=True):
            end = len(ids) - 1
            sums.append(-float(loss[end - n_scored : end].double().sum()))
    return sums


# ----------------------------------------------------------------------------------------------------------------------
# generation


def decode(settings, n_prompt=16):
    """Against recomputing the whole context for each token, and against the limit that the memory's bandwidth sets.

    The limit: all weights, and the mean of each row's keys and values, at the speed of a copy in this run.
    """
    model, device, autocast = prepare(settings)
    model.eval()
    with autocast():
        model.for_decoding()
    c = model.config
    n_new = min(new_tokens, c.block_size - n_prompt)
    if n_new < 5:
        raise BadInput(f"{n_new} tokens after a prompt of {n_prompt} are too few to time: at least 5")
    bytes_per_value = model.wte.weight.element_size()
    n_looked_up = 0 if c.tied else model.wte.weight.numel()
    n_read = model.n_params() - n_looked_up  # weights that each token reads
    row_bytes = 2 * c.n_layer * c.n_head * c.head_dim * (n_prompt + n_new / 2) * bytes_per_value
    for n_rows in numbers("decode_batches"):
        step_bytes = n_read * bytes_per_value + n_rows * row_bytes
        prompts = torch.randint(c.n_vocab, (n_rows, n_prompt)).tolist()
        cached = partial(decoding, model, prompts, n_new, compile)
        cached()  # warms up, compiles
        others = [partial(recomputing, model, prompts, n_new), partial(copy_bandwidth, device)]
        speed, slow, bandwidth = take_turns([cached, *others])
        share = step_bytes * (speed / n_rows) / bandwidth
        yield {"batch": n_rows, "tokens/s": speed, "of the limit": share, "recomputing": slow, "ratio": speed / slow}


def decoding(model, prompts, n_new, compile):
    """Tokens/s of sampling with sample.py's defaults, after the fourth token: compilation and its cache come before."""
    steps = model.generate(prompts, n_new, temperature=0.8, top_k=50, compile=compile)
    for _ in range(4):
        next(steps)
    start = time.perf_counter()
    n = sum(len(ids) for ids in steps)
    return n / (time.perf_counter() - start)


@torch.inference_mode()
def recomputing(model, prompts, n_new, n_measured=16):
    """Tokens/s without a cache: the whole context for each token. Measured at 16 lengths spread over the new tokens."""
    device = model.wte.weight.device
    seconds = []
    for number in range(n_measured):
        length = len(prompts[0]) + int(n_new * (number + 0.5) / n_measured)
        idx = torch.ones(len(prompts), length, dtype=torch.long, device=device)
        seconds.append(seconds_of(lambda idx=idx: model.logits(model.hidden(idx)[:, -1]), device))
    return len(prompts) / statistics.mean(seconds)


def copy_bandwidth(device):
    """Bytes/s that a copy reads and writes: what limits decoding, which reads all weights for each token."""
    n_bytes = 2**31 if device.type == "cuda" else 2**28
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / min(seconds_of(lambda: target.copy_(source), device, calls=3) for _ in range(5))


if __name__ == "__main__":
    _what = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    configure(globals())
    main(_what)
