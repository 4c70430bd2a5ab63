"""The learning race: how many tokens and seconds three recipes need to the same loss; python -m tools.bench race.

The same data, size and number of tokens for all: (1) gpt2 family + AdamW with cosine, (2) gpt2 family + Muon, (3)
modern family + Muon. Every run is train.py itself with one config, the recipes take turns, and what is read are the
runs' logs. The baseline (1) is first run with several learning rates, and goes on with the best of them.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

from tools.plot import read_log

ROOT = Path(__file__).resolve().parent.parent
ARMS = {  # what config/race.py is asked for
    "gpt2 + AdamW": ["--family=gpt2", "--optimizer=adamw"],
    "gpt2 + Muon": ["--family=gpt2", "--optimizer=muon"],
    "modern + Muon": ["--family=modern", "--optimizer=muon"],
}
BASELINE, *CHALLENGERS = ARMS


def run(config, arm, out_dir, *more):
    """The log of one run of train.py, as a list of rows. A run that ended before, of the same command, is not repeated.

    ValueError when the run fails.
    """
    folder, command = Path(out_dir), ["train.py", *ARMS[arm], config, f"--out_dir={out_dir}", *more]
    done, recipe = folder / "done.txt", f"{' '.join(command)}\n{Path(config).read_text(encoding='utf-8')}"
    if not done.exists() or done.read_text(encoding="utf-8") != recipe:
        print(*command, file=sys.stderr, flush=True)
        done.unlink(missing_ok=True)
        code = subprocess.call(
            [sys.executable, ROOT / command[0], *command[1:], "--overwrite=True"], stdout=subprocess.DEVNULL
        )
        if code:
            raise ValueError(f"the run in {out_dir} failed (exit code {code})")
        done.write_text(recipe, encoding="utf-8")
    return read_log(folder / "log.jsonl")[1]


def curve(rows):
    """(tokens, seconds, validation loss) arrays of the validations, in nats per token.

    The seconds are of training, and without what the first step took longer than the second: compilation is done once,
    and not a matter of tokens.
    """
    seconds = {row["step"]: row.get("seconds", 0.0) for row in rows}
    first = max(0.0, 2 * seconds[1] - seconds[2])
    points = [(row["tokens"], seconds[row["step"]] - first, row["val_loss"]) for row in rows if "val_loss" in row]
    return np.maximum(np.array(points, dtype=float).T, 0.0)


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
    over the seeds with its standard deviation (0 of one seed); a share is of the baseline's tokens and seconds to its
    own final loss (the mean over the seeds): the median over the seeds, and its range.
    """
    best, losses = bracket(config, folder, rates, more)
    for rate, loss in losses.items():
        yield {"baseline's learning rate": rate, "final loss": loss, "taken": "*" * (rate == best)}
    curves = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm in ARMS:
            rate = [f"--learning_rate={best}"] if arm == BASELINE else []
            out_dir = f"{folder}/{arm.replace(' + ', '_').lower()}_{seed}"
            curves[arm].append(curve(run(config, arm, out_dir, f"--seed={seed}", *rate, *more)))
    curves = {arm: np.array(of_seeds) for arm, of_seeds in curves.items()}  # (seeds, 3, validations)
    n = curves[BASELINE].shape[2]
    for i in np.unique(np.linspace(0, n - 1, n_points + 1).round().astype(int)[1:]):
        row = {"tokens": int(curves[BASELINE][0, 0, i])}
        for arm, c in curves.items():
            row |= {arm: float(c[:, 2, i].mean()), f"± {arm}": float(c[:, 2, i].std(ddof=1)) if len(c) > 1 else 0.0}
        yield row
    target, end = curves[BASELINE][:, 2, -1].mean(), np.median(curves[BASELINE][:, :2, -1], axis=0)  # tokens, seconds
    for arm in CHALLENGERS:
        shares = np.array([first_reached(c, target) / end for c in curves[arm]])  # (seeds, 2)
        row = {"to reach": float(target), "needs": arm}
        for name, share in zip(("tokens", "seconds"), shares.T.tolist(), strict=True):
            row |= {f"share of {name}": float(np.median(share)), f"{name} from": min(share), f"{name} to": max(share)}
        yield row | {"runs that ended above their lowest loss": int((curves[arm][:, 2].argmin(axis=1) < n - 1).sum())}
