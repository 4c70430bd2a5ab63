"""Draw the logs of one or more runs into one picture: loss, HellaSwag, gradient
norm, learning rate, tokens/s.

    python -m tools.plot --runs=out/fgpt_712m --out=plot.png
    python -m tools.plot --runs=out/adamw,out/muon --x=tokens --out=compare.png

Reads log.jsonl of each run (of train.py, finetune.py or dpo.py, also one that
is still being written). Writes the picture and prints one line per run. A panel
that no run has data for is left out.
"""

import glob
import json
from pathlib import Path

from configurator import configure

import numpy as np

runs = ""  # folders or log.jsonl files, separated by commas; * and ? are expanded
out = "plot.png"  # the picture to write; .pdf and .svg work too
x = "steps"  # horizontal axis: steps, tokens or hours

FORMAT = "fgpt log 1"
UNITS = {"loss": "nats/token", "tokens": "trained tokens"}  # where a log does not tell
X_AXES = {  # x: column of the log, divisor, label
    "steps": ("step", 1, "optimizer step"),
    "tokens": ("tokens", 1, "{tokens}"),
    "hours": ("seconds", 3600, "training time (hours)"),
}
PANELS = {  # title: label of the y axis, then (column of the log, name in the panel's key, line style)
    "Loss": ("{loss}", ("loss", "train", "noisy"), ("val_loss", "validation", "dots")),
    "HellaSwag": ("accuracy", ("hellaswag_acc_norm", "acc_norm", "dots"), ("hellaswag_acc", "acc", "dashed")),
    "Gradient norm": ("norm before clipping", ("grad_norm", "", "noisy")),
    "Learning rate": ("learning rate", ("learning_rate", "AdamW", "line"), ("muon_learning_rate", "Muon", "dashed")),
    "Speed": ("tokens per second", ("tokens_per_second", "", "noisy")),
}
LINES = {
    "noisy": {"linewidth": 1.8},  # the smoothed line; the values themselves are drawn faint behind it
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


def plot_runs(paths, out, x="steps"):
    """Draw the runs at `paths` (folders, log.jsonl files, or globs of them) into the picture `out`; print a line each.

    x: "steps", "tokens" or "hours". Raises ValueError or OSError for a log that cannot be drawn, for more runs than
    colours, and when matplotlib is not installed.
    """
    if x not in X_AXES:
        raise ValueError(f"x must be steps, tokens or hours, not {x!r}")
    if Path(out).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"{out}: the picture's name must end in .png (or .pdf, .svg)")
    logs = find_logs(paths)
    if not 1 <= len(logs) <= len(COLORS):
        raise ValueError(f"name 1 to {len(COLORS)} runs (--runs=out/a,out/b), not {len(logs)}")
    tables = {name: read_table(path, x) for name, path in logs.items()}
    figure = draw(tables, x)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    for name, table in tables.items():
        print(f"{name}: {summary(table)}")
    print(f"wrote {out}")


def find_logs(paths):
    """{name: log file}. A run is called as its folder; if two folders have the same name, all by their whole paths."""
    files = []
    for path in paths:
        found = [log_file(match) for match in sorted(glob.glob(path)) if log_file(match).is_file()]
        files += found or [log_file(path)]
    files = list(dict.fromkeys(files))
    names = [file.resolve().parent.name if file.name == "log.jsonl" else file.stem for file in files]
    if len(set(names)) < len(names):
        names = [str(file) for file in files]
    return dict(zip(names, files, strict=True))


def log_file(path):
    return Path(path) if path.endswith(".jsonl") else Path(path) / "log.jsonl"


def read_log(path):
    """(units, rows) of a run's log.jsonl: of each column, {name: unit}, and a dict of numbers for each step.

    A last line cut off in writing (the run was killed, or writes it now) is skipped with a note. FileNotFoundError, or
    ValueError that names the file and the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: a run writes it into its out_dir")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    header, *rows = [parse(line) for line in lines] or [None]
    if not header or header.get("format") != FORMAT:
        raise ValueError(f'{path}: not a log of a run: its first line should say "format": "{FORMAT}"')
    if rows and rows[-1] is None:
        print(f"note: {path}: its last line was cut off in writing and is skipped")
        rows.pop()
    for number, row in enumerate(rows, start=2):
        if row is None or "step" not in row:
            raise ValueError(f"{path}: line {number} is damaged: remove it to read the others")
    return header.get("units", {}), rows


def parse(line):
    """The line's JSON object, or None."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read_table(path, x):
    """A log as {column: (n,) float64, NaN where a row has no value}, with "x" for the axis and "units"."""
    units, rows = read_log(path)
    names = {"step", "tokens", "seconds", "val_bpb", *(c[0] for _, *columns in PANELS.values() for c in columns)}
    table = {name: np.array([row.get(name) for row in rows], dtype=float) for name in names}
    column, divisor, _ = X_AXES[x]
    return {**table, "x": table[column] / divisor, "units": UNITS | units}


def draw(tables, x):
    """The figure: a panel for each entry of PANELS with data, in two columns; of an odd number the first is wide."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plots need matplotlib: pip install -e '.[plot]'") from None

    titles = [title for title, (_, *columns) in PANELS.items() if any(has_data(tables, c[0]) for c in columns)]
    if not titles:
        raise ValueError(f"{', '.join(tables)}: nothing to draw over {x} yet")
    cells = titles[:1] * (len(titles) % 2) + titles
    rows = [cells[i : i + 2] for i in range(0, len(cells), 2)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.2 * len(rows) + 0.25 * len(tables)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        for title, ax in figure.subplot_mosaic(rows).items():
            draw_panel(ax, title, tables, x)
        handles = [matplotlib.lines.Line2D([], [], color=color, linewidth=4) for color in COLORS[: len(tables)]]
        labels = [f"{name}: {summary(table)}" for name, table in tables.items()]
        figure.legend(handles, labels, loc="outside upper left", fontsize=9)
    return figure


def draw_panel(ax, title, tables, x):
    """Each column of the panel for each run; then the axes, and a key above the panel that tells columns apart."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    label, *columns = PANELS[title]
    columns = [column for column in columns if has_data(tables, column[0])]
    # runs of several stages have several units
    units = {name: ", ".join(dict.fromkeys(table["units"][name] for table in tables.values())) for name in UNITS}
    ax.set(title=title, xlabel=X_AXES[x][2].format(**units), ylabel=label.format(**units))
    for color, table in zip(COLORS, tables.values(), strict=False):
        for name, _, kind in columns:
            draw_column(ax, *finite(table, name), kind, color)
    end = max(np.nanmax(table["x"], initial=0) for table in tables.values())
    ax.set_xlim(-0.02 * end, 1.02 * end or 1)
    ax.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=x != "hours"))
    ax.xaxis.set_major_formatter(FuncFormatter(short))
    ax.yaxis.set_major_formatter(FuncFormatter(short))
    if title == "HellaSwag":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
        ax.axhline(0.25, color=GREY, linewidth=1.2, linestyle=":")
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
        ax.annotate("chance: 25%", (1, 0.25), (0, 3), color=GREY, fontsize=9, **place)
    else:
        limit_y(ax, [finite(table, name) for table in tables.values() for name, *_ in columns], title != "Loss")
    if len(columns) > 1:
        keys = [Line2D([], [], color=GREY, **LINES[kind]) for *_, kind in columns]
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2, "ncols": 2}
        ax.legend(keys, [key for _, key, _ in columns], fontsize=9, labelcolor=GREY, **place)


def draw_column(ax, xs, ys, kind, color):
    if not len(xs):
        return
    line = dict(LINES[kind], color=color)
    if kind == "noisy":
        ax.plot(xs, ys, color=color, linewidth=0.6, alpha=0.3)
        ys = smooth(ys)
    if kind == "dots":
        every = max(1, len(xs) // 30)
        line["markevery"] = ((len(xs) - 1) % every, every)  # the last one always
    ax.plot(xs, ys, **line)


def limit_y(ax, columns, from_zero):
    """Fit the y axis to the columns, given as (xs, ys), without the fall of the first steps and without single spikes.

    Says in the panel what is cut off.
    """
    columns = [(xs, ys) for xs, ys in columns if len(xs)]
    bottom = 0 if from_zero else min(ys.min() for _, ys in columns)
    highest = max(ys.max() for _, ys in columns)
    settled = max(np.quantile(ys[xs >= 0.03 * xs[-1]], 0.99) for xs, ys in columns)
    top = bottom + 1.2 * (settled - bottom)
    if highest > bottom + 1.2 * (top - bottom):
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2}
        note, place = f"values up to {short(highest)} are cut off", {"ha": "right", "va": "top", "bbox": box}
        ax.text(0.99, 0.97, note, transform=ax.transAxes, color=GREY, fontsize=9, **place)
    else:
        top = highest
    pad = 0.05 * (top - bottom) or 0.1
    ax.set_ylim(bottom if from_zero else bottom - pad, top + pad)


def smooth(ys):
    """(n,) -> (n,): the mean around each step, with weights that fall to 0 at 1% of the run on either side."""
    triangle = np.bartlett(2 * (len(ys) // 100) + 3)[1:-1]
    return np.convolve(ys, triangle, "same") / np.convolve(np.ones(len(ys)), triangle, "same")


def finite(table, name):
    """The points of one column: (xs, ys), each (m,), without rows that lack it."""
    there = np.isfinite(table["x"]) & np.isfinite(table[name])
    return table["x"][there], table[name][there]


def has_data(tables, name):
    return any(len(finite(table, name)[1]) for table in tables.values())


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
    losses, parts = finite(table, "loss")[1], []
    if len(losses):
        parts.append(f"train loss {smooth(losses)[-1]:.4f}")
    if has_data({"": table}, "val_loss"):
        best = np.nanargmin(table["val_loss"])
        parts.append(f"best validation loss {table['val_loss'][best]:.4f} at step {table['step'][best]:,.0f}")
    parts += [f"{bpb:.3f} bits/byte" for bpb in finite(table, "val_bpb")[1][-1:]]
    parts += [f"HellaSwag acc_norm {accuracy:.1%}" for accuracy in finite(table, "hellaswag_acc_norm")[1][-1:]]
    parts.append(f"{np.nanmax(table['tokens'], initial=0):,.0f} {table['units']['tokens']}")
    seconds = np.nanmax(table["seconds"], initial=0)
    parts.append(f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes")
    return ", ".join(parts)


def main():
    plot_runs([path for path in runs.split(",") if path], out, x)


if __name__ == "__main__":
    configure(globals())
    main()
