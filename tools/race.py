"""The learning race: how many tokens and seconds three recipes need to the same loss; python -m tools.bench race.

The same data, size and number of tokens for all: (1) gpt2 family + AdamW with cosine, (2) gpt2 family + Muon, (3)
modern family + Muon. Every run is train.py itself with one config, the recipes take turns, and the results are read
from the logs of the runs. The baseline (1) is first run with several learning rates, and then uses the best of them.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # for `python tools/race.py`

from configurator import BadInput

import numpy as np

from tools.plot import COLORS, GREY, STYLE, read_log

ROOT = Path(__file__).resolve().parent.parent
ARMS = {  # arguments of train.py before the config
    "gpt2 + AdamW": ["--family=gpt2", "--optimizer=adamw"],
    "gpt2 + Muon": ["--family=gpt2", "--optimizer=muon"],
    "modern + Muon": ["--family=modern", "--optimizer=muon"],
}
BASELINE, *CHALLENGERS = ARMS


def race(config, folder, seeds, rates, more=(), n_points=8):
    """Yields rows for tables: the bracket, losses at fixed token counts, shares that (2) and (3) need, shorter runs.

    rates: learning rates of the baseline to try, ascending. more: further arguments for train.py. A loss is the mean
    over the seeds with its standard deviation (0 of one seed); a share is of the baseline's tokens and seconds to its
    own final loss (the mean over the seeds): the median over the seeds, and its range. Then (2) and (3) are run with
    fewer and fewer steps, until their final loss is above the baseline's; each of these runs has its whole schedule,
    with the rate falling to zero at its end. The curves are drawn into folder/race.png, if matplotlib is installed.
    """
    losses = {}
    for rate in rates:
        rows = run(config, BASELINE, f"{folder}/bracket_{rate:g}", "--seed=0", f"--learning_rate={rate}", *more)
        losses[rate] = float(curve(rows)[2, -1])
        yield {"baseline's learning rate": rate, "final loss": losses[rate]}
    best = min(losses, key=losses.get)
    if len(rates) > 1 and best in (rates[0], rates[-1]):
        raise BadInput("the baseline's best learning rate is at the edge: widen --learning_rates")
    curves = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm in ARMS:
            arguments = [f"--seed={seed}"]
            if arm == BASELINE:
                arguments.append(f"--learning_rate={best}")
            rows = run(config, arm, f"{folder}/{folder_name(arm)}_{seed}", *arguments, *more)
            curves[arm].append(curve(rows))
            n_steps = rows[-1]["step"]
    curves = {arm: np.array(of_seeds) for arm, of_seeds in curves.items()}  # (seeds, 3, validations)
    yield from loss_rows(curves, n_points)
    yield from share_rows(curves)

    def run_shorter(arm, twentieths):
        steps = f"--max_steps={max(1, n_steps * twentieths // 20)}"
        out_dirs = {seed: f"{folder}/{folder_name(arm)}_{seed}_shorter_{twentieths}" for seed in seeds}
        return [curve(run(config, arm, out_dir, f"--seed={seed}", steps, *more)) for seed, out_dir in out_dirs.items()]

    if importlib.util.find_spec("matplotlib"):
        draw(curves, Path(folder, "race.png"))
    else:
        print("no picture: pip install -e '.[plot]', and the same command draws it", file=sys.stderr)
    for arm in CHALLENGERS:
        yield from shorter_rows(arm, curves, run_shorter)


def folder_name(arm):
    return arm.replace(" + ", "_").lower()


def run(config, arm, out_dir, *arguments):
    """The rows of the log of a run of train.py. A finished run of the same command and code is not repeated."""
    folder = Path(out_dir)
    command = ["train.py", *ARMS[arm], config, f"--out_dir={out_dir}", *arguments]
    code = [Path(config), ROOT / "model.py", ROOT / "muon.py", ROOT / "train.py"]
    recipe = "\n".join([*command, *(path.read_text(encoding="utf-8") for path in code)])
    done = folder / "done.txt"
    if not done.exists() or done.read_text(encoding="utf-8") != recipe:
        print(*command, file=sys.stderr, flush=True)
        done.unlink(missing_ok=True)
        words = [sys.executable, ROOT / command[0], *command[1:], "--overwrite=True"]
        code = subprocess.call(words, stdout=subprocess.DEVNULL)
        if code:
            raise BadInput(f"the run in {out_dir} failed (exit code {code})")
        done.write_text(recipe, encoding="utf-8")
    return read_log(folder)[1]


def curve(rows):
    """(3, validations): tokens, seconds and validation loss in nats per token.

    The seconds are of training, without the extra time of the first step: compilation happens once, and does not depend
    on the number of tokens.
    """
    seconds = {row["step"]: row.get("seconds", 0.0) for row in rows}  # from the start to the end of each step
    extra = max(0.0, 2 * seconds[1] - seconds[2]) if 2 in seconds else 0.0
    points = [(row["tokens"], seconds[row["step"]] - extra, row["val_loss"]) for row in rows if "val_loss" in row]
    return np.maximum(np.array(points, dtype=float).T, 0.0)


def loss_rows(curves, n_points):
    """The loss of each arm at n_points token counts, mean and standard deviation over the seeds."""
    n = curves[BASELINE].shape[2]
    for i in np.unique(np.linspace(0, n - 1, n_points + 1).round().astype(int)[1:]):
        row = {"tokens": int(curves[BASELINE][0, 0, i])}
        for arm, of_seeds in curves.items():
            losses = of_seeds[:, 2, i]
            row[arm] = float(losses.mean())
            row[f"± {arm}"] = float(losses.std(ddof=1)) if len(losses) > 1 else 0.0
        yield row


def share_rows(curves):
    """What share of the baseline's tokens and seconds the other arms need to reach its final loss."""
    target, end = goal(curves)
    for arm in CHALLENGERS:
        shares = np.array([first_reached(of_seed, target) / end for of_seed in curves[arm]])  # (seeds, 2)
        row = {"to reach": target, "recipe": arm}
        for name, share in zip(("tokens", "seconds"), shares.T.tolist(), strict=True):
            row |= {f"share of {name}": float(np.median(share)), f"{name} from": min(share), f"{name} to": max(share)}
        yield row


def shorter_rows(arm, curves, run_shorter):
    """Complete runs of an arm with fewer steps, by twentieths, until their mean final loss is above the baseline's.

    run_shorter(arm, twentieths): the curves of such runs, one of each seed.
    """
    target, end = goal(curves)
    reached = [first_reached(of_seed, target)[0] / end[0] for of_seed in curves[arm]]
    if np.isnan(reached).any():
        return
    for twentieths in range(int(20 * np.median(reached)), 0, -1):
        tokens, seconds, losses = np.transpose([of_seed[:, -1] for of_seed in run_shorter(arm, twentieths)])
        row = {"a whole run of": arm, "share of tokens": float(tokens[0] / end[0])}
        row |= {"share of seconds": float(np.median(seconds) / end[1]), "final loss": float(losses.mean())}
        yield row | {"from": float(losses.min()), "to": float(losses.max())}
        if losses.mean() > target:
            return


def goal(curves):
    """The baseline's final loss, the mean over the seeds, and its (tokens, seconds) there, the median."""
    return float(curves[BASELINE][:, 2, -1].mean()), np.median(curves[BASELINE][:, :2, -1], axis=0)


def first_reached(curve, loss):
    """(tokens, seconds) at which the validation loss is first `loss`, linear between validations; nan if never."""
    below = np.flatnonzero(curve[2] <= loss)
    if len(below) == 0:
        return np.array([np.nan, np.nan])
    i = max(1, below[0])
    losses = curve[2, [i, i - 1]]  # ascending, as np.interp needs them
    return np.array([np.interp(loss, losses, values[[i, i - 1]]) for values in curve[:2]])


def draw(curves, path):
    """Write a picture: the loss of each arm over the tokens, the mean over the seeds with its standard deviation.

    Dotted lines show the baseline's final loss, and after how many tokens the arms reach it.
    """
    import matplotlib
    from matplotlib.figure import Figure

    means = {arm: of_seeds.mean(axis=0) for arm, of_seeds in curves.items()}  # (3, validations)
    target = means[BASELINE][2, -1]
    lowest = min(mean[2].min() for mean in means.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4), layout="constrained")
        ax = figure.subplots()
        ax.axhline(target, color=GREY, linestyle=":", linewidth=1)
        for color, (arm, mean) in zip(COLORS, means.items(), strict=False):
            tokens, _, losses = mean
            deviation = curves[arm][:, 2].std(axis=0, ddof=min(1, len(curves[arm]) - 1))
            ax.plot(tokens / 1e6, losses, color=color, linewidth=1.8, label=arm)
            ax.fill_between(tokens / 1e6, losses - deviation, losses + deviation, color=color, alpha=0.2, linewidth=0)
            reached, _ = first_reached(mean, target) / 1e6
            ax.plot([reached, reached], [0, target], color=color, linestyle=":", linewidth=1)
        ax.set(xlabel="million trained tokens", ylabel="validation loss, nats per token")
        ax.set_ylim(lowest - 0.05, lowest + 1.5)  # without the first steps, where all lines fall steeply
        ax.legend()
    figure.savefig(path, dpi=150)
