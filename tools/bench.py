"""Measurements, each a table with the machine it was made on; docs/benchmarks.md keeps them.

    python -m tools.bench WHAT [config/x.py] [--name=value ...]

Runs that are compared take turns, `repeats` times, and medians are printed: machines are noisy.
"""

import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

from configurator import configure

import torch

import prepare_fineweb
from tokenizer import Tokenizer

repeats = 3  # how often each thing is measured
device = ""  # cpu, cuda, ...; empty: cuda where there is one
source = ""  # tokenize: files of text, as in prepare_fineweb.py
workers = 0  # tokenize: threads (0: all cores)


def machine():
    """One line: date, processor or GPU, torch."""
    model_names = [line for line in read_cpuinfo() if line.startswith("model name")]
    cpu = model_names[0].split(": ")[1] if model_names else platform.machine()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{datetime.date.today()}, {gpu}{os.cpu_count()} cores of {cpu}, torch {torch.__version__}"


def read_cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def take_turns(repeats, **functions):
    """Call each function `repeats` times, in turns; {name: median of what it returned}."""
    results = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            results[name].append(function())
    return {name: statistics.median(values) for name, values in results.items()}


def tokenize(source, workers, repeats):
    """The whole of prepare_fineweb.py (checksum, decoding, split, tokens, shards) against tiktoken alone.

    tiktoken gets the same documents, already in memory, and as many threads.
    """
    if not source:
        raise ValueError("tokenize needs --source, files of text like texts/*.parquet")
    coder, n_threads = Tokenizer("gpt2"), workers or os.cpu_count()
    paths = [file["path"] for file in prepare_fineweb.find_files(source, None)]
    texts = [text for path in paths for _, text in prepare_fineweb.read_documents(path, "text", False) if text]

    def stage():
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):
            start, rules = time.perf_counter(), ("gpt2", "hash < 0.005", "text", False)
            files = prepare_fineweb.list_sources(source, "", 0.005, None)
            rules = dict(zip(prepare_fineweb.RULES, rules, strict=True))
            prepare_fineweb.prepare(files, {}, Path(folder), rules, coder, n_threads, 0)
            return time.perf_counter() - start

    def batch():
        start = time.perf_counter()
        coder.bpe.encode_ordinary_batch(texts, num_threads=n_threads)
        return time.perf_counter() - start

    def arrays():
        start = time.perf_counter()
        with ThreadPoolExecutor(n_threads) as pool:
            for _ in pool.map(lambda text: coder.bpe.encode_to_numpy(text, disallowed_special=()), texts):
                pass
        return time.perf_counter() - start

    seconds = take_turns(repeats, stage=stage, batch=batch, arrays=arrays)
    n_tokens = sum(len(coder.encode(text)) for text in texts)
    print(f"{len(texts):,} documents, {n_tokens:,} tokens, {n_threads} threads\n")
    print("| | tokens/s | prepare_fineweb.py reaches of it |\n|---|---|---|")
    names = {"stage": "prepare_fineweb.py", "batch": "encode_ordinary_batch", "arrays": "encode_to_numpy, in threads"}
    for key, name in names.items():
        print(f"| {name} | {n_tokens / seconds[key]:,.0f} | {seconds[key] / seconds['stage']:.2f} |")


def main():
    print(machine())
    measurements = {"tokenize": lambda: tokenize(source, workers, repeats)}
    if what not in measurements:
        raise ValueError(f"python -m tools.bench WHAT, one of {', '.join(measurements)}: not {what!r}")
    measurements[what]()


if __name__ == "__main__":
    what = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    configure(globals())
    main()
