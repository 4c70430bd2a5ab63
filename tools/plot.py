"""Draw the logs of one or more runs into one picture: loss, HellaSwag, gradient
norm, learning rate, tokens/s.

    python -m tools.plot --runs=out/fgpt_712m --out=plot.png
    python -m tools.plot --runs=out/adamw,out/muon --x=tokens --out=compare.png

Reads the log.jsonl of each run (of train.py, finetune.py or dpo.py), also while
the run is still writing it. Writes the picture and prints one line per run. A
panel for which no run has data is left out.
"""

import glob
import json
import math
import sys
import textwrap
from datetime import timedelta
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # for `python tools/plot.py`

from configurator import BadInput, configure

import numpy as np

runs = ""  # folders, separated by commas; * and ? are expanded
out = "plot.png"  # the picture to write; .pdf and .svg work too
x = "steps"  # horizontal axis: steps, tokens or hours

FORMAT = "fgpt log 1"
UNITS = {"loss": "nats/token", "tokens": "trained tokens"}  # where a log has no units
X_AXES = {  # x: column of the log, divisor, label
    "steps": ("step", 1, "optimizer step"),
    "tokens": ("tokens", 1, "{tokens}"),
    "hours": ("seconds", 3600, "training time (hours)"),
}
PANELS = {  # title: label of the y axis, then (column of the log, name in the panel's key, style in LINES)
    "Loss": ("{loss}", ("loss", "train", "smoothed"), ("val_loss", "validation", "dots")),
    "HellaSwag": (
        "accuracy (dotted: chance)",
        ("hellaswag_acc_norm", "acc_norm", "dots"),
        ("hellaswag_acc", "acc", "dashed"),
    ),
    "Gradient norm": ("norm before clipping", ("grad_norm", "", "smoothed")),
    "Learning rate": ("learning rate", ("learning_rate", "AdamW", "line"), ("muon_learning_rate", "Muon", "dashed")),
    "Speed": ("tokens per second", ("tokens_per_second", "", "smoothed")),
}
LINES = {
    "smoothed": {"linewidth": 1.8},  # the values themselves are drawn faintly behind it
    "line": {"linewidth": 1.8},
    "dashed": {"linewidth": 1.5, "linestyle": (0, (4, 2))},
    "dots": {"linewidth": 1.2, "marker": "o", "markersize": 4, "markerfacecolor": "white"},
}
# Okabe and Ito's colour-blind safe palette (jfly.uni-koeln.de/color) without its yellow, too pale for lines on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#606060"
STYLE = {
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.xmargin": 0.02,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
}


def main():
    if x not in X_AXES:
        raise BadInput(f"x must be steps, tokens or hours, not {x!r}")
    if Path(out).suffix not in (".png", ".pdf", ".svg"):
        raise BadInput(f"{out}: the picture's name must end in .png (or .pdf, .svg)")
    tables = {run: Table(run, x) for run in find_runs([path for path in runs.split(",") if path])}
    if not 1 <= len(tables) <= len(COLORS):
        raise BadInput(f"name 1 to {len(COLORS)} runs (--runs=out/a,out/b), not {len(tables)}")
    figure = draw(tables, x)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    for name, table in tables.items():
        print(f"{name}: {summary(table)}")
    print(f"wrote {out}")


def find_runs(patterns):
    """The folders of runs; those that * and ? match only if they have a log."""
    folders = []
    for pattern in patterns:
        found = [folder for folder in sorted(glob.glob(pattern)) if Path(folder, "log.jsonl").is_file()]
        folders += found or [pattern]
    return folders


class Table:
    """The log of a run as columns; x: the horizontal axis, a key of X_AXES."""

    def __init__(self, folder, x):
        units, self.rows = read_log(folder)
        self.units = UNITS | units
        self.x = x

    def points(self, name):
        """(xs, ys) of one column, each (n,), of the rows that have it."""
        column, divisor, _ = X_AXES[self.x]
        rows = [row for row in self.rows if column in row and math.isfinite(row.get(name, math.nan))]
        return np.array([row[column] / divisor for row in rows]), np.array([row[name] for row in rows])


def read_log(folder):
    """(units, rows) of a run's log.jsonl: of each column, {name: unit}, and a dict of numbers for each step.

    A last line that is incomplete (the run was killed, or is writing it now) is skipped with a note.
    """
    path = Path(folder, "log.jsonl")
    complete, _, rest = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    if FORMAT not in complete.partition("\n")[0]:
        raise BadInput(f'{path}: not a log of a run: its first line should say "format": "{FORMAT}"')
    if rest:
        print(f"note: {path}: its last line is cut off and is skipped")
    rows = []
    for number, line in enumerate(complete.split("\n"), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise BadInput(f"{path}: line {number} is damaged: remove it to read the others") from None
    return rows[0].get("units", {}), rows[1:]


def draw(tables, x):
    """The figure: a panel for each entry of PANELS with data, in two columns; of an odd number the first is wide."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("plots need matplotlib: pip install -e '.[plot]'") from None

    titles = [title for title in PANELS if columns_with_data(title, tables)]
    if not titles:
        raise BadInput(f"{', '.join(tables)}: nothing to draw over {x} yet")
    if len(titles) % 2:
        titles.insert(0, titles[0])
    rows = [titles[i : i + 2] for i in range(0, len(titles), 2)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.2 * len(rows) + 0.25 * len(tables)), layout="constrained")
        for title, ax in figure.subplot_mosaic(rows).items():
            draw_panel(ax, title, tables, x)
        handles = [matplotlib.lines.Line2D([], [], color=color, linewidth=4) for color in COLORS[: len(tables)]]
        labels = [textwrap.fill(f"{name}: {summary(table)}", 130) for name, table in tables.items()]
        figure.legend(handles, labels, loc="outside upper left", fontsize=9)
    return figure


def columns_with_data(title, tables):
    """The columns of a panel for which any run has data, as in PANELS."""
    _, *columns = PANELS[title]
    return [column for column in columns if any(len(table.points(column[0])[0]) for table in tables.values())]


def draw_panel(ax, title, tables, x):
    """Each column of the panel for each run; then the axes, and a key above the panel that tells columns apart."""
    from matplotlib.lines import Line2D

    columns = columns_with_data(title, tables)
    # runs of several stages have several units
    units = {name: ", ".join(dict.fromkeys(table.units[name] for table in tables.values())) for name in UNITS}
    ax.set(title=title, xlabel=X_AXES[x][2].format(**units), ylabel=PANELS[title][0].format(**units))
    drawn = []
    for color, table in zip(COLORS, tables.values(), strict=False):
        for name, _, style in columns:
            xs, ys = table.points(name)
            if len(xs):
                drawn.append((xs, ys))
                draw_column(ax, xs, ys, style, color)
    if title == "HellaSwag":
        ax.axhline(0.25, color=GREY, linestyle=":")  # chance
    else:
        limit_y(ax, drawn)
        if title != "Loss":
            ax.set_ylim(bottom=0)
    if len(columns) > 1:
        handles = [Line2D([], [], color=GREY, **LINES[style]) for _, _, style in columns]
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2, "ncols": 2}
        ax.legend(handles, [key for _, key, _ in columns], fontsize=9, labelcolor=GREY, **place)


def draw_column(ax, xs, ys, style, color):
    if style == "smoothed":
        ax.plot(xs, ys, color=color, linewidth=0.6, alpha=0.3)
        ys = smooth(ys)
    ax.plot(xs, ys, color=color, **LINES[style])


def smooth(ys):
    """(n,) -> (n,): the mean around each step, with weights that fall to 0 at 1% of the run on either side."""
    triangle = np.bartlett(2 * (len(ys) // 100) + 3)[1:-1]
    return np.convolve(ys, triangle, "same") / np.convolve(np.ones(len(ys)), triangle, "same")


def limit_y(ax, points):
    """End the y axis above the points, a list of (xs, ys), without the fall of the first steps and single spikes."""
    settled = max(np.quantile(ys[xs >= 0.03 * xs[-1]], 0.99) for xs, ys in points)
    ax.set_ylim(top=1.1 * settled or 1)


def summary(table):
    """A run in a line, which is printed and stands above the panels: what it has reached, and what that took."""
    parts = []
    _, losses = table.points("loss")
    if len(losses):
        parts.append(f"train loss {smooth(losses)[-1]:.4f}")
    validated = [row for row in table.rows if "val_loss" in row]
    if validated:
        best = min(validated, key=lambda row: row["val_loss"])
        parts.append(f"best validation loss {best['val_loss']:.4f} at step {best['step']:,}")
    for name, text in (("val_bpb", "{:.3f} bits/byte"), ("hellaswag_acc_norm", "HellaSwag acc_norm {:.1%}")):
        _, values = table.points(name)
        if len(values):
            parts.append(text.format(values[-1]))
    last = table.rows[-1] if table.rows else {}
    seconds = timedelta(seconds=round(last.get("seconds", 0)))
    parts.append(f"{last.get('tokens', 0):,} {table.units['tokens']} in {seconds}")
    return ", ".join(parts)


if __name__ == "__main__":
    configure(globals())
    main()
