"""Measurements: each a table, below the machine it was made on.

    python -m tools.bench train --configs=config/gpt2_124m.py

    train       a training step: tokens/s, share of a ceiling, memory
    race        tokens and seconds that three recipes need to a loss
    checkpoint  seconds to write and to load a checkpoint
    tokenize    tokens/s of prepare_fineweb.py, and of tiktoken alone
    hellaswag   items/s, and those of one item at a time
    decode      tokens/s of sampling, and without a cache

Things that are compared take turns, `repeats` times, and medians are printed:
machines are noisy. A training step runs in a process of its own, so that its
memory is its own; nan: it did not fit. --json=True prints a line to keep as
well.
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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from functools import partial
from json import dumps
from pathlib import Path
from types import SimpleNamespace

from configurator import apply_file, configure

import numpy as np
import torch
import torch.nn.functional as F

import hellaswag
import model as model_py
import prepare_fineweb
import train
from tokenizer import Tokenizer
from tools.race import race

repeats = 3  # how often each thing is measured
json = False  # print the results once more, as a line of JSON
device = ""  # cpu, cuda, ...; empty: cuda where there is one
dtype = ""  # float32, bfloat16 (autocast) or native; empty: bfloat16 on GPUs that have it (train: the config's)
configs = "config/fgpt_712m.py,config/fgpt_modern.py"  # models to measure, configs of train.py
batch_sizes = "1,4,16"  # train: micro-batches, rows
tokens_per_step = 0  # train: 0: those of the config
compile = None  # train: torch.compile; None: on cuda only
activation_checkpointing = False  # train: less memory for a third more compute
data_dir = "data/fineweb"  # race: folder of token shards
race_config = "config/race.py"  # race: config of train.py
out_dir = "out/race"  # race: where the runs go; those that ended are not run again
seeds = "1,2,3"  # race: a run of each recipe with each
learning_rates = "2e-3,4e-3,8e-3"  # race: of the baseline, ascending; the best is taken
source = ""  # tokenize: files of text, as in prepare_fineweb.py
workers = 0  # tokenize: threads (0: all cores)
n_items = 64  # hellaswag: items to score
decode_batches = "1,64"  # decode: rows generated together
new_tokens = 512  # decode: tokens for each of them


def machine():
    """One line: date, processor or GPU, torch."""
    model_names = [line for line in read_cpuinfo() if line.startswith("model name")]
    cpu = model_names[0].split(": ")[1] if model_names else platform.machine()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{datetime.date.today()}, {gpu}{os.cpu_count()} cores of {cpu}, torch {torch.__version__}"


def read_cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def show(rows):
    """Print dicts as rows of a table as they come, with a header wherever their keys change; returns them in a list."""
    kept = []
    for row in rows:
        if not kept or list(row) != list(kept[-1]):
            print(f"\n| {' | '.join(row)} |\n|{'---|' * len(row)}")
        print(f"| {' | '.join(map(cell, row.values()))} |", flush=True)
        kept.append(row)
    return kept


def cell(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def take_turns(repeats, functions):
    """{name: median of what the function of that name returned, one number or several}, each called in turns."""
    results = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            results[name].append(function())
    return {name: np.median(np.array(values), axis=0).tolist() for name, values in results.items()}


def in_child(function, *arguments, n_results=5):
    """The n_results numbers that the function returns in a new process, whose peak memory is its own.

    nan when the memory does not suffice, or the process was killed, as the system does because of it.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except (RuntimeError, BrokenProcessPool) as error:
            if not isinstance(error, BrokenProcessPool) and not train.is_out_of_memory(error):
                raise
            print(str(error).splitlines()[0], file=sys.stderr)
            return (math.nan,) * n_results


def seconds_of(function, device, calls=3):
    """Seconds of the last of the calls: the first two compile and allocate."""
    for _ in range(calls):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - start


def product_speed(device, autocast):
    """FLOP/s of a large product of random matrices, in the type that autocast computes in: the ceiling of training."""
    n, calls = (8192, 20) if device.type == "cuda" else (2048, 2)
    kind = torch.bfloat16 if autocast.keywords["enabled"] else torch.float32
    a, b = torch.randn(2, n, n, device=device).to(kind)
    return calls * 2 * n**3 / seconds_of(lambda: [a @ b for _ in range(calls)], device)


# ----------------------------------------------------------------------------------------------------------------------
# training


def read_config(config):
    """The settings of one of train.py's configs. ValueError when it is missing or wrong."""
    settings = dict(train.DEFAULTS)
    apply_file(config, settings, train.DEFAULTS)
    return settings


def make_model(settings, device):
    """The model of a config, without the vocabulary that a tokenizer would fetch."""
    n_vocab = 259 if settings["tokenizer"] == "bytes" else 50259
    with torch.device(device):
        return train.make_model(settings, SimpleNamespace(n_vocab=n_vocab))


def attention_kernels(step):
    """Which of PyTorch's attention kernels a step runs on a GPU, by their names; flash or cuDNN are wanted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        step()
    names = [event.key for event in record.key_averages() if not event.key.startswith("triton")]
    kinds = {"flash": "flash_(fwd|bwd)", "cuDNN": "cudnn.*(sdpa|attention)", "memory-efficient": "fmha_cutlass"}
    found = [kind for kind, name in kinds.items() if any(re.search(name, each) for each in names)]
    return ", ".join(found) or ("unfused" if names else "unknown, as nothing was recorded")


def training_step(settings):
    """(peak memory in GB, tokens/s, FLOP/s, those of a large product, the optimizers' share) of a step on random ids.

    It is train.py's own step with its settings: on tokens_per_step tokens, batch_size rows at a time. RuntimeError when
    it is compiled again after the second step.
    """
    device, autocast = model_py.pick_device(settings["device"], settings["dtype"])
    model, batch_size = make_model(settings, device), settings["batch_size"]
    optimizers = model_py.make_optimizers(model, settings["optimizer"])
    model.checkpoint_activations = settings["activation_checkpointing"]
    T, n_rows = model.config.block_size, settings["tokens_per_step"] // model.config.block_size
    idx = torch.randint(model.config.n_vocab, (batch_size * max(1, n_rows // batch_size), T))
    batch = train.fetch_batch(lambda step: (idx, idx), device, 0)
    compiled = device.type == "cuda" if settings["compile"] is None else settings["compile"]
    forward = torch.compile(model) if compiled else model
    step = partial(train.train_step, forward, optimizers, batch, batch_size, 1.0, autocast)
    seconds_of(step, device, calls=2)
    with torch.compiler.set_stance("fail_on_recompile"):
        seconds = seconds_of(step, device, calls=2)
    peak, speed = train.peak_memory(device), idx.numel() / seconds
    if device.type == "cuda":
        print(f"attention is {attention_kernels(step)}", file=sys.stderr)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with autocast():  # as in train_step
        optimizing = seconds_of(lambda: [opt.step() for opt in optimizers], device)
    return peak, speed, speed * model.flops_per_token(), product_speed(device, autocast), optimizing / seconds


def training(configs, batch_sizes, repeats, **changes):
    """changes: settings of train.py that count instead of the configs'."""
    for config in configs.split(","):
        settings = read_config(config) | changes
        peak = train.peak_flops(model_py.pick_device(settings["device"], settings["dtype"])[0])
        ways = {size: partial(in_child, training_step, settings | {"batch_size": size}) for size in batch_sizes}
        for size, (gigabytes, speed, flops, ceiling, optimizing) in take_turns(repeats, ways).items():
            row = {"config": config, "micro-batch": size, "peak GB": gigabytes, "tokens/s": speed}
            row |= {"TFLOP/s": flops / 1e12, "a large product's": ceiling / 1e12, "share of that": flops / ceiling}
            row |= {"MFU": flops / peak} if peak else {}
            yield row | {"optimizers' share of the time": optimizing}


# ----------------------------------------------------------------------------------------------------------------------
# data


def checkpoint(configs, repeats, device):
    """Seconds to write and to load that of a run, in the current folder: they depend on the disk of the out_dir."""
    device, _ = model_py.pick_device(device)
    for config in configs.split(","):
        settings = read_config(config)
        model = make_model(settings, device)
        optimizers = model_py.make_optimizers(model, settings["optimizer"])
        for opt in optimizers:
            for p in (p for group in opt.param_groups for p in group["params"]):
                if isinstance(opt, model_py.Muon):  # a step of it takes minutes on a CPU
                    opt.state[p]["momentum"] = torch.zeros_like(p)
                p.grad = torch.zeros_like(p)
            if not isinstance(opt, model_py.Muon):
                opt.step()
        times = []
        with tempfile.TemporaryDirectory(dir=".") as folder:
            for _ in range(repeats):
                start = time.perf_counter()
                train.save_run(model, optimizers, {}, train.new_state(), folder, must=True)
                written = time.perf_counter()
                train.resume(model, optimizers, model_py.load_checkpoint(f"{folder}/ckpt.pt"))
                times.append((written - start, time.perf_counter() - written))
            gigabytes = os.path.getsize(f"{folder}/ckpt.pt") / 1e9
        write, load = map(statistics.median, zip(*times, strict=True))
        yield {"config": config, "GB": gigabytes, "seconds to write": write, "seconds to load": load}


def tokenize(source, workers, repeats):
    """The whole of prepare_fineweb.py (checksum, decoding, split, tokens, shards) against tiktoken alone.

    tiktoken gets the same documents, already in memory, and as many threads.
    """
    if not source:
        raise ValueError("tokenize needs --source, files of text like texts/*.parquet")
    coder, n_threads, cpu = Tokenizer("gpt2"), workers or os.cpu_count(), torch.device("cpu")
    paths = [file["path"] for file in prepare_fineweb.find_files(source, None)]
    texts = [text for path in paths for _, text in prepare_fineweb.read_documents(path, "text", False) if text]
    rules = dict(zip(prepare_fineweb.RULES, ("gpt2", "hash < 0.005", "text", False), strict=True))

    def stage():
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):
            files = prepare_fineweb.list_sources(source, "", 0.005, None)
            prepare_fineweb.prepare(files, {}, Path(folder), rules, coder, n_threads, 0)

    ways = {
        "prepare_fineweb.py": stage,
        "tiktoken alone": lambda: coder.bpe.encode_ordinary_batch(texts, num_threads=n_threads),
    }
    seconds = take_turns(repeats, {name: partial(seconds_of, way, cpu, 1) for name, way in ways.items()})
    n_tokens = sum(len(coder.encode(text)) for text in texts)
    ours, theirs = (n_tokens / median for median in seconds.values())
    row = {"documents": len(texts), "tokens": n_tokens, "threads": n_threads, "prepare_fineweb.py, tokens/s": ours}
    yield row | {"tiktoken alone": theirs, "ratio": ours / theirs}


# ----------------------------------------------------------------------------------------------------------------------
# HellaSwag


def random_items(n_items, n_vocab, longest):
    """Items as four rows (ids, n_scored) of random tokens, about as long as HellaSwag's; at most `longest` ids.

    A third are short captions, two thirds longer how-to texts. Their tokens (22 of context and 14 an ending, or 75 and
    28, spread by a third) are set by hand from what is published about the data, not fitted to it.
    """
    rng, items = random.Random(0), []
    for _ in range(n_items):
        n_context, n_ending = (22, 14) if rng.random() < 1 / 3 else (75, 28)
        sizes = [max(3, round(rng.gauss(n, n / 3))) for n in (n_context, *[n_ending] * 4)]
        context, *endings = (rng.choices(range(n_vocab), k=size) for size in sizes)
        items.append([((context + ids)[-longest:], min(len(ids), longest - 1)) for ids in endings])
    return items


@torch.inference_mode()
def one_item_at_a_time(model, items, autocast):
    """Sums of log-likelihoods the plain way: four rows at a time, padded to the longest, logits everywhere."""
    sums = []
    for rows in items:
        width = max(len(ids) for ids, _ in rows) - 1
        idx, targets = torch.zeros(2, len(rows), width, dtype=torch.long, device=model.wte.weight.device)
        targets += model_py.IGNORE
        for i, (ids, n_scored) in enumerate(rows):
            idx[i, : len(ids) - 1] = torch.tensor(ids[:-1])
            targets[i, len(ids) - 1 - n_scored : len(ids) - 1] = torch.tensor(ids[-n_scored:])
        with autocast():
            logits = model(idx)[..., : model.config.n_vocab]
        losses = F.cross_entropy(logits.float().mT, targets, reduction="none")  # (4, T)
        sums += (-losses.double().sum(dim=1)).tolist()
    return sums


def hellaswag_items(configs, n_items, repeats, device, dtype):
    """Items/s of both ways, and the largest difference between their sums of log-likelihoods."""
    device, autocast = model_py.pick_device(device, dtype)
    for config in configs.split(","):
        model = make_model(read_config(config), device).eval()
        items = random_items(n_items, model.config.n_vocab, model.config.block_size + 1)
        ways = {
            "hellaswag.py": partial(hellaswag.log_likelihoods, model, items, 0, autocast),
            "one at a time": partial(one_item_at_a_time, model, items, autocast),
        }
        error = max(abs(a - b) for a, b in zip(*(way() for way in ways.values()), strict=True))  # and warms up
        seconds = take_turns(repeats, {name: partial(seconds_of, way, device, 1) for name, way in ways.items()})
        fast, slow = (n_items / median for median in seconds.values())
        row = {"config": config, "items/s": fast, "one at a time": slow, "ratio": fast / slow}
        yield row | {"sums differ by, nats": error}


# ----------------------------------------------------------------------------------------------------------------------
# generation


def copy_bandwidth(device):
    """Bytes/s that a copy reads and writes: what limits decoding, which reads all weights for each token."""
    n_bytes = 2**31 if device.type == "cuda" else 2**28
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(5))


def decoding(model, prompts, n_new, compile=False):
    """(tokens/s after the fourth token, seconds to the first one) of sampling with sample.py's defaults."""
    start = time.perf_counter()
    steps = model.generate(prompts, n_new, 0.8, 50, compile=compile)
    next(steps)
    first = time.perf_counter()
    next(steps), next(steps), next(steps)  # with compile, a new cache is recorded by its first steps
    fourth = time.perf_counter()
    n = sum(len(ids) for ids in steps)
    return n / (time.perf_counter() - fourth), first - start


@torch.inference_mode()
def recomputing(model, prompts, n_new, n_measured=16):
    """Tokens/s without a cache: the whole context for each token. Measured at 16 lengths spread over the new tokens."""
    n_first, device, seconds = len(prompts[0]), model.wte.weight.device, []
    for number in range(n_measured):
        idx = torch.ones(len(prompts), n_first + int(n_new * (number + 0.5) / n_measured), dtype=torch.long).to(device)
        seconds.append(seconds_of(lambda idx=idx: model.logits(model.hidden(idx)[:, -1]), device, 1))
    return len(prompts) / statistics.mean(seconds)


def decode(configs, batches, new_tokens, repeats, device, dtype, n_prompt=16):
    """Against recomputing the whole context for each token, and against the limit that the memory's bandwidth sets.

    The limit: all weights, and the mean of each row's keys and values, at the speed of a copy in this run.
    """
    device, autocast = model_py.pick_device(device, dtype)
    for config in configs.split(","):
        model = make_model(read_config(config), device).eval()
        with autocast():
            model.for_decoding()
        c, n_new = model.config, min(new_tokens, model.config.block_size - n_prompt)
        if n_new < 5:
            raise ValueError(f"{config}: {n_new} tokens after a prompt of {n_prompt} are too few to time: at least 5")
        size = model.wte.weight.element_size()
        row_bytes = 2 * c.n_layer * c.n_head * c.head_dim * (n_prompt + n_new / 2) * size
        for n_rows in batches:
            prompts = np.random.default_rng(0).integers(0, c.n_vocab, (n_rows, n_prompt)).tolist()
            ways = {"eager": partial(decoding, model, prompts, n_new)}
            if device.type == "cuda":
                ways["compiled"] = partial(decoding, model, prompts, n_new, True)
            for way in ways.values():
                way()  # warms up, compiles
            ways["recomputing"] = partial(recomputing, model, prompts, n_new)
            ways["copy"] = partial(copy_bandwidth, device)
            found = take_turns(repeats, ways)
            slow, bandwidth = found.pop("recomputing"), found.pop("copy")
            for way, (speed, first) in found.items():
                share = (model.n_params() * size + n_rows * row_bytes) / bandwidth / (n_rows / speed)
                row = {"config": config, "batch": n_rows, "way": way, "tokens/s": speed, "first token, ms": first * 1e3}
                yield row | {"of the limit": share, "recomputing": slow, "ratio": speed / slow}


def numbers(name, kind=int):
    """The numbers of a setting like "1,4", or of one that is a number. ValueError unless each is above 0."""
    value = globals()[name]
    try:
        found = [kind(part) for part in str(value).split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise ValueError(f"{name} must be above 0 (several with commas where the default has them), not {value!r}")
    return found


def main(what):
    changes = dict(device=device, compile=compile, activation_checkpointing=activation_checkpointing)
    changes |= {name: value for name, value in dict(dtype=dtype, tokens_per_step=tokens_per_step).items() if value}
    for name in ("repeats", "n_items", "new_tokens"):
        numbers(name)
    runs = [f"--data_dir={data_dir}"] + [f"--device={device}"] * bool(device) + [f"--dtype={dtype}"] * bool(dtype)
    measurements = {
        "train": lambda: training(configs, numbers("batch_sizes"), repeats, **changes),
        "race": lambda: race(race_config, out_dir, numbers("seeds"), sorted(numbers("learning_rates", float)), runs),
        "checkpoint": lambda: checkpoint(configs, repeats, device),
        "tokenize": lambda: tokenize(source, workers, repeats),
        "hellaswag": lambda: hellaswag_items(configs, n_items, repeats, device, dtype),
        "decode": lambda: decode(configs, numbers("decode_batches"), new_tokens, repeats, device, dtype),
    }
    if what not in measurements:
        asked = f": {what!r} is none of them" * bool(what)
        raise ValueError(f"python -m tools.bench WHAT [--help], WHAT one of {', '.join(measurements)}{asked}")
    print(machine())
    results = show(measurements[what]())
    if json:
        results = [{k: None if v != v else v for k, v in row.items()} for row in results]  # nan is no JSON
        print(dumps({"what": what, "machine": machine(), "command": sys.argv[1:], "rows": results}))


if __name__ == "__main__":
    _what = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    configure(globals())
    main(_what)
