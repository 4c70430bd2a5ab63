"""Measurements, each a table with the machine it was made on; docs/benchmarks.md keeps them.

    python -m tools.bench WHAT [config/x.py] [--name=value ...]

Runs that are compared take turns, `repeats` times, and medians are printed: machines are noisy.
"""

import datetime
import os
import platform
import statistics
import sys
from pathlib import Path

from configurator import configure

import torch

repeats = 3  # how often each thing is measured
device = ""  # cpu, cuda, ...; empty: cuda where there is one


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


def main():
    print(machine())
    measurements = {}
    if what not in measurements:
        raise ValueError(f"python -m tools.bench WHAT, one of {', '.join(measurements)}: not {what!r}")
    measurements[what]()


if __name__ == "__main__":
    what = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    configure(globals())
    main()
