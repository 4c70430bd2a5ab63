"""The learning race: how many tokens and seconds three recipes need to the same loss; python -m tools.bench race.

The same data, size and number of tokens for all: (1) gpt2 family + AdamW with cosine, (2) gpt2 family + Muon, (3)
modern family + Muon. Every run is train.py itself with one config, the recipes take turns, and what is read are the
runs' logs. The baseline (1) is first run with several learning rates, and goes on with the best of them.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ARMS = {  # what config/race.py is asked for
    "gpt2 + AdamW": ["--family=gpt2", "--optimizer=adamw"],
    "gpt2 + Muon": ["--family=gpt2", "--optimizer=muon"],
    "modern + Muon": ["--family=modern", "--optimizer=muon"],
}
BASELINE, *CHALLENGERS = ARMS


def run(config, arm, out_dir, *more):
    """The log of one run of train.py, as a list of rows; a run that ended before is not repeated."""
    log = Path(out_dir) / "log.jsonl"
    if not (Path(out_dir) / "done").exists():
        command = [sys.executable, str(ROOT / "train.py"), *ARMS[arm], config, f"--out_dir={out_dir}", *more]
        print(" ".join(command[1:]), file=sys.stderr, flush=True)
        if code := subprocess.call([*command, "--overwrite=True"], stdout=subprocess.DEVNULL):
            raise ValueError(f"the run in {out_dir} failed (exit code {code})")
        (Path(out_dir) / "done").touch()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [row for row in rows if "step" in row]


def curve(rows):
    """(tokens, seconds, validation loss) arrays of the validations, in nats per token."""
    seconds = {row["step"]: row.get("seconds", 0.0) for row in rows}
    points = [(row["tokens"], seconds[row["step"]], row["val_loss"]) for row in rows if "val_loss" in row]
    return np.array(points, dtype=float).T


def first_reached(curve, loss):
    """(tokens, seconds) at which the validation loss is first `loss`, linear between validations; nan if never."""
    below = np.flatnonzero(curve[2] <= loss)
    if len(below) == 0:
        return np.array([np.nan, np.nan])
    after = max(1, below[0])
    (x0, y0), (x1, y1) = ((curve[:2, i], curve[2, i]) for i in (after - 1, after))
    return x1 if y0 == y1 else x0 + (x1 - x0) * np.clip((y0 - loss) / (y0 - y1), 0, 1)


def bracket(config, folder, rates, more):
    """The learning rate of `rates` (ascending) with which the baseline ends lowest, and the loss of each.

    ValueError when it is the first or the last of them: the best one may lie beyond.
    """
    losses = {}
    for rate in rates:
        rows = run(config, BASELINE, f"{folder}/bracket_{rate:g}", "--seed=0", f"--learning_rate={rate}", *more)
        losses[rate] = float(curve(rows)[2, -1])
    best = min(losses, key=losses.get)
    if len(rates) > 1 and best in (rates[0], rates[-1]):
        found = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())
        raise ValueError(f"the baseline's best learning rate is at the edge ({found}): widen --learning_rates")
    return best, losses


def race(config, folder, seeds, rates, more=(), n_points=8):
    """Yields rows for tables: the bracket, the losses at fixed token counts, and the shares that (2) and (3) need.

    rates: learning rates of the baseline to try, ascending. more: further arguments for train.py. A loss is the mean
    over the seeds, with the standard deviation; a share is of the mean final loss of the baseline, the median over
    seeds with its range.
    """
    best, losses = bracket(config, folder, rates, more)
    for rate, loss in losses.items():
        yield {"baseline's learning rate": f"{rate:g}", "final loss": f"{loss:.4f}", "taken": "*" * (rate == best)}
    curves = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm in ARMS:
            rate = [f"--learning_rate={best}"] if arm == BASELINE else []
            out_dir = f"{folder}/{arm.replace(' + ', '_').lower()}_{seed}"
            curves[arm].append(curve(run(config, arm, out_dir, f"--seed={seed}", *rate, *more)))
    n = len(curves[BASELINE][0][0])
    for i in np.unique(np.linspace(0, n - 1, n_points + 1).round().astype(int)[1:]):
        row = {"tokens": f"{curves[BASELINE][0][0, i]:,.0f}"}
        for arm in ARMS:
            values = [c[2, i] for c in curves[arm]]
            row[arm] = f"{np.mean(values):.4f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.4f}"
        yield row
    target = np.mean([c[2, -1] for c in curves[BASELINE]])
    end = np.median([c[:2, -1] for c in curves[BASELINE]], axis=0)  # tokens, seconds
    for arm in CHALLENGERS:
        shares = np.array([first_reached(c, target) / end for c in curves[arm]])  # (seeds, 2)
        low, middle, high = shares.min(axis=0), np.median(shares, axis=0), shares.max(axis=0)
        cells = [f"{m:.3f} ({a:.3f} to {b:.3f})" for a, m, b in zip(low, middle, high, strict=True)]
        yield {"to reach": f"{target:.4f}", "needs": arm, "share of tokens": cells[0], "share of seconds": cells[1]}
