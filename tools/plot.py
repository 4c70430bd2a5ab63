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
from pathlib import Path

from configurator import BadInput, configure

import numpy as np

runs = ""  # folders or log.jsonl files, separated by commas; * and ? are expanded
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
    "Loss": ("{loss}", ("loss", "train", "noisy"), ("val_loss", "validation", "dots")),
    "HellaSwag": ("accuracy", ("hellaswag_acc_norm", "acc_norm", "dots"), ("hellaswag_acc", "acc", "dashed")),
    "Gradient norm": ("norm before clipping", ("grad_norm", "", "noisy")),
    "Learning rate": ("learning rate", ("learning_rate", "AdamW", "line"), ("muon_learning_rate", "Muon", "dashed")),
    "Speed": ("tokens per second", ("tokens_per_second", "", "noisy")),
}
LINES = {
    "noisy": {"linewidth": 1.8},  # the smoothed line; the values themselves are drawn faintly behind it
    "line": {"linewidth": 1.8},
    "dashed": {"linewidth": 1.5, "linestyle": (0, (4, 2))},
    "dots": {"linewidth": 1.2, "marker": "o", "markersize": 5, "markerfacecolor": "white"},
}
# Okabe and Ito's colour-blind safe palette (jfly.uni-koeln.de/color) without its yellow, too pale for lines on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#606060"
STYLE = {
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
}


def main():
    if x not in X_AXES:
        raise BadInput(f"x must be steps, tokens or hours, not {x!r}")
    if Path(out).suffix not in (".png", ".pdf", ".svg"):
        raise BadInput(f"{out}: the picture's name must end in .png (or .pdf, .svg)")
    logs = find_logs([path for path in runs.split(",") if path])
    if not 1 <= len(logs) <= len(COLORS):
        raise BadInput(f"name 1 to {len(COLORS)} runs (--runs=out/a,out/b), not {len(logs)}")
    tables = {name: Table(path, x) for name, path in logs.items()}
    figure = draw(tables, x)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    for name, table in tables.items():
        print(f"{name}: {summary(table)}")
    print(f"wrote {out}")


def find_logs(paths):
    """{name: log file}. A run has the name of its folder; if two have the same, all are named by their whole paths."""
    files = []
    for path in paths:
        found = [log_file(match) for match in sorted(glob.glob(path))]
        files += [file for file in found if file.is_file()] or [log_file(path)]
    files = list(dict.fromkeys(files))
    names = [file.resolve().parent.name if file.name == "log.jsonl" else file.stem for file in files]
    if len(set(names)) < len(names):
        names = [str(file) for file in files]
    return dict(zip(names, files, strict=True))


def log_file(path):
    return Path(path) if path.endswith(".jsonl") else Path(path) / "log.jsonl"


class Table:
    """A log as columns; x: the horizontal axis, a key of X_AXES."""

    def __init__(self, path, x):
        units, self.rows = read_log(path)
        self.units = UNITS | units
        column, divisor, _ = X_AXES[x]
        self.x = self.column(column) / divisor

    def column(self, name):
        """(n,) float64, nan where a row has no value."""
        return np.array([row.get(name) for row in self.rows], dtype=float)

    def points(self, name):
        """The points of one column: (xs, ys), each (m,), without rows that lack it."""
        ys = self.column(name)
        exists = np.isfinite(self.x) & np.isfinite(ys)
        return self.x[exists], ys[exists]


def read_log(path):
    """(units, rows) of a run's log.jsonl: of each column, {name: unit}, and a dict of numbers for each step.

    A last line that is incomplete (the run was killed, or is writing it now) is skipped with a note.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: a run writes it into its out_dir")
    records = [parse(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    if not records or records[0].get("format") != FORMAT:
        raise BadInput(f'{path}: not a log of a run: its first line should say "format": "{FORMAT}"')
    header, *rows = records
    if rows and not rows[-1]:
        print(f"note: {path}: its last line is cut off and is skipped")
        rows.pop()
    for number, row in enumerate(rows, start=2):
        if "step" not in row:
            raise BadInput(f"{path}: line {number} is damaged: remove it to read the others")
    return header.get("units", {}), rows


def parse(line):
    """The line's JSON object; {} if it is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


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
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        for title, ax in figure.subplot_mosaic(rows).items():
            draw_panel(ax, title, tables, x)
        handles = [matplotlib.lines.Line2D([], [], color=color, linewidth=4) for color in COLORS[: len(tables)]]
        labels = [f"{name}: {summary(table)}" for name, table in tables.items()]
        figure.legend(handles, labels, loc="outside upper left", fontsize=9)
    return figure


def columns_with_data(title, tables):
    """The columns of a panel for which any run has data, as in PANELS."""
    _, *columns = PANELS[title]
    return [column for column in columns if any(len(table.points(column[0])[0]) for table in tables.values())]


def draw_panel(ax, title, tables, x):
    """Each column of the panel for each run; then the axes, and a key above the panel that tells columns apart."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    columns = columns_with_data(title, tables)
    # runs of several stages have several units
    units = {name: ", ".join(dict.fromkeys(table.units[name] for table in tables.values())) for name in UNITS}
    ax.set(title=title, xlabel=X_AXES[x][2].format(**units), ylabel=PANELS[title][0].format(**units))
    for color, table in zip(COLORS, tables.values(), strict=False):
        for name, _, style in columns:
            draw_column(ax, *table.points(name), style, color)
    end = max(np.nanmax(table.x, initial=0) for table in tables.values())
    ax.set_xlim(-0.02 * end, 1.02 * end or 1)
    ax.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=x != "hours"))
    ax.xaxis.set_major_formatter(FuncFormatter(short))
    if title == "HellaSwag":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
        ax.axhline(0.25, color=GREY, linewidth=1.2, linestyle=":")
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
        ax.annotate("chance: 25%", (1, 0.25), (0, 3), color=GREY, fontsize=9, **place)
    else:
        ax.yaxis.set_major_formatter(FuncFormatter(short))
        points = [table.points(name) for table in tables.values() for name, _, _ in columns]
        limit_y(ax, points, from_zero=title != "Loss")
    if len(columns) > 1:
        handles = [Line2D([], [], color=GREY, **LINES[style]) for _, _, style in columns]
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2, "ncols": 2}
        ax.legend(handles, [key for _, key, _ in columns], fontsize=9, labelcolor=GREY, **place)


def draw_column(ax, xs, ys, style, color):
    if not len(xs):
        return
    line = dict(LINES[style], color=color)
    if style == "noisy":
        ax.plot(xs, ys, color=color, linewidth=0.6, alpha=0.3)
        ys = smooth(ys)
    if style == "dots":
        every = max(1, len(xs) // 30)
        line["markevery"] = ((len(xs) - 1) % every, every)  # the last one always
    ax.plot(xs, ys, **line)


def smooth(ys):
    """(n,) -> (n,): the mean around each step, with weights that fall to 0 at 1% of the run on either side."""
    triangle = np.bartlett(2 * (len(ys) // 100) + 3)[1:-1]
    return np.convolve(ys, triangle, "same") / np.convolve(np.ones(len(ys)), triangle, "same")


def limit_y(ax, points, from_zero):
    """Fit the y axis to the points, a list of (xs, ys), without the fall of the first steps and without single spikes.

    A note in the panel says what is cut off.
    """
    points = [(xs, ys) for xs, ys in points if len(xs)]
    bottom = 0 if from_zero else min(ys.min() for _, ys in points)
    highest = max(ys.max() for _, ys in points)
    settled = max(np.quantile(ys[xs >= 0.03 * xs[-1]], 0.99) for xs, ys in points)
    top = bottom + 1.2 * (settled - bottom)
    if highest > bottom + 1.2 * (top - bottom):
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2}
        place = {"transform": ax.transAxes, "ha": "right", "va": "top", "bbox": box}
        ax.text(0.99, 0.97, f"values up to {short(highest)} are cut off", color=GREY, fontsize=9, **place)
    else:
        top = highest
    pad = 0.05 * (top - bottom) or 0.1
    ax.set_ylim(bottom if from_zero else bottom - pad, top + pad)


def short(value, _=None):
    """12500 -> 12.5k, 3e9 -> 3B, 0.0003 -> 3e-4; the second argument is for matplotlib's formatters."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    if 0 < abs(value) < 1e-3:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.3g}"


def summary(table):
    """A run in a line, which is printed and stands above the panels: what it has reached, and what that took."""
    parts = []
    _, losses = table.points("loss")
    if len(losses):
        parts.append(f"train loss {smooth(losses)[-1]:.4f}")
    val_losses = table.column("val_loss")
    if np.isfinite(val_losses).any():
        best = np.nanargmin(val_losses)
        parts.append(f"best validation loss {val_losses[best]:.4f} at step {table.column('step')[best]:,.0f}")
    for name, text in (("val_bpb", "{:.3f} bits/byte"), ("hellaswag_acc_norm", "HellaSwag acc_norm {:.1%}")):
        _, values = table.points(name)
        if len(values):
            parts.append(text.format(values[-1]))
    parts.append(f"{np.nanmax(table.column('tokens'), initial=0):,.0f} {table.units['tokens']}")
    seconds = np.nanmax(table.column("seconds"), initial=0)
    parts.append(f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes")
    return ", ".join(parts)


if __name__ == "__main__":
    configure(globals())
    main()
