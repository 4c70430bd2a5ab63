"""The bookkeeping of a training run: device, processes, log, checkpoints, resuming, signals.

Needs only torch and tqdm: copy this file where you like. A script writes its own training loop and calls `Run` for the
rest:

    run = Run("pretrain", settings, n_steps, units, labels)   # refuses an out_dir in use
    run.restore(model, optimizers, tokenizer.name, data)      # or writes the checkpoint of step 0
    while not run.over():
        ...                                                   # one step
        row = run.count(result, n_targets, n_inputs, seconds)
        run.end_step(row)                                     # log, best.pt, ckpt.pt when due
    run.finish()
"""

import atexit
import importlib
import json
import math
import os
import re
import secrets
import signal
import socket
import statistics
import sys
import time
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = None
    resource = None

FORMAT_VERSION = 1  # of checkpoint files; load_checkpoint must read files of all earlier versions too
# entries of a checkpoint: those that all have, those that some have, and those without which no run is resumed
ENTRIES = {"format_version": int, "config": dict, "model": dict, "stage": str, "tokenizer": str, "step": int}
MORE_ENTRIES = {
    "tokens": int, "settings": dict, "metrics": dict, "vocabulary": str, "state": dict, "optimizers": list,
    "sources": list, "before": list,
}  # fmt: skip
RESUMED_FROM = ("optimizers", "state", "settings", "data")
PARENT = os.getppid()  # under torchrun its process id; another one later means that it was killed
LOCK = "lock"  # the file of out_dir that a running process has locked: its process id and host
LOCKED = {}  # the locks of this process: path -> open file
STARTED_FROM = "init_from.txt"  # the file of out_dir that names the weights that a run started from
STAGE = ("stage", "step", "metrics", "settings", "sources")  # what a checkpoint says about the stage that wrote it
PREVIOUS = "ckpt_before.pt"  # what ckpt.pt was before it was last written, should that be damaged
BF16_WIDTH = 128  # on CPUs, narrower networks lose about as much by casting as their products gain
BF16_WIDTH_DECODING = 512  # token by token, where weights are read rather than multiplied
BUCKET = 2**25  # elements of gradients that are summed over processes in one call
# dense bf16 FLOP/s from NVIDIA's data sheets; the first key contained in the GPU's name wins
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12,
    "RTX 4090": 165e12,
}  # fmt: skip
# settings that may differ when a run is resumed, in every stage
ALWAYS_MAY_CHANGE = {
    "out_dir", "init_from", "overwrite", "force", "log_interval", "checkpoint_interval", "keep_every", "max_minutes",
    "tracker",
}  # fmt: skip
TRACKERS = ("", "wandb", "trackio")


# ----------------------------------------------------------------------------------------------------------------------
# the run


@dataclass
class Progress:
    """What a run counts; stored in its checkpoints."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # trained tokens
    seconds: float = 0.0  # training time
    log_bytes: int = 0  # length of the log
    skipped_in_a_row: int = 0  # consecutive steps that were not finite
    best_val_loss: float = math.inf
    best_step: int = 0  # of best.pt
    saved_step: int = 0  # of ckpt.pt
    tracked_as: str = ""  # the run's name on a tracker


class Run:
    """One training run: its folder out_dir, what it has counted, and when it stops; the same in all processes.

    stage: "pretrain", ... settings: the stage's, a dict, in which Run itself uses out_dir, init_from, overwrite, force,
    log_interval, checkpoint_interval, max_minutes and, where there are, keep_every and tracker. units: what the log's
    numbers are. labels: {name: what the terminal calls it}. may_change: settings that may differ on resuming, because
    they do not change the weights, or extend the run on purpose. fixed: settings that not even `force` can change,
    because the tensors would not fit. upgrade: function that changes the settings of a checkpoint by an earlier
    version, in place, to today's.

    Raises FileExistsError when out_dir would be overwritten, FileNotFoundError when a run there has no checkpoint,
    OSError when another process is using out_dir, or what is there cannot be resumed.
    """

    def __init__(self, stage, settings, n_steps, units, labels, may_change=(), fixed=(), upgrade=lambda settings: None):
        self.stage = stage
        self.settings = settings
        self.n_steps = n_steps
        self.units = units
        self.labels = labels
        self.may_change = ALWAYS_MAY_CHANGE | set(may_change)
        self.fixed = set(fixed)
        self.folder = Path(settings["out_dir"])
        self.progress = Progress()
        self.log = None
        let_printing_fail()
        self.tracker = Tracker(settings.get("tracker", ""))
        self.signalled = False  # SIGINT or SIGTERM came
        self.stopped = False
        self.stored = self.claim()  # the checkpoint to resume from, or None
        if self.stored is not None:
            upgrade(self.stored["settings"])

    @property
    def step(self):
        """Optimizer steps done."""
        return self.progress.step

    @property
    def stored_settings(self):
        """Settings of the checkpoint to resume from; {} for a new run."""
        return self.stored["settings"] if self.stored else {}

    def claim(self):
        """Lock out_dir and check that it may be used; returns the checkpoint to resume from, or None for a new run."""
        names = self.enter()
        if self.settings["init_from"] != "resume":
            self.refuse_used(names)
            return None
        if not names:  # no run yet, or one that was killed before its first checkpoint
            print(f"{self.folder} has no checkpoint yet: the run starts")
            return None
        if STARTED_FROM in names and not (self.folder / "ckpt.pt").exists():
            remedy = "start it again with its --init_from= and --overwrite=True"
            raise FileNotFoundError(f"{self.folder} has no checkpoint yet: {remedy}")
        stored = load_checkpoint(self.folder / "ckpt.pt")
        missing = [name for name in RESUMED_FROM if name not in stored]
        if missing:
            problem = f"ckpt.pt has no {', '.join(missing)} (is it a copy of best.pt?)"
            raise OSError(f"{problem}: it cannot be resumed")
        if stored["stage"] != self.stage:
            problem = f"{self.folder} holds a {stored['stage']} run, not a {self.stage} run"
            raise OSError(f"{problem}: choose another --out_dir")
        return stored

    def enter(self):
        """Lock out_dir, if it exists; returns the names of its files but unfinished ones. The same in all processes.

        OSError when another process has locked it.
        """
        holder = ""
        names = []
        if rank_and_world()[0] == 0 and self.folder.is_dir():
            holder = lock_folder(self.folder)
            names = [path.name for path in self.folder.iterdir() if path.name != LOCK and path.suffix != ".tmp"]
        holder, names = broadcast_from_first((holder, names))
        if holder:
            raise OSError(f"{self.folder} is in use by {holder}: wait until it has ended, or stop it")
        return names

    def refuse_used(self, names):
        """FileExistsError when files of these names would be overwritten unasked."""
        if not self.settings["overwrite"] and not all(map(is_kept, names)):
            raise FileExistsError(
                f"{self.folder} is in use: --init_from=resume continues, --overwrite=True starts over, or --out_dir="
            )

    def remove_stale(self):
        """Delete unfinished files, and those of an earlier run, which a later resume must not find."""
        stale = list(self.folder.glob("*.pt.tmp"))
        if self.stored is None:
            stale += [self.folder / name for name in ("ckpt.pt", PREVIOUS, "best.pt", "log.jsonl", STARTED_FROM)]
        for path in stale:
            path.unlink(missing_ok=True)

    def restore(self, model, optimizers, tokenizer, data, vocabulary="", sources=(), base=None):
        """Load the checkpoint, or write that of step 0, so that a run can be resumed from its first moment.

        model: has a `config`, a dataclass, and flops_per_token(). tokenizer: its name. data: fingerprints, by which a
        resumed run recognizes its data. vocabulary: what the tokenizer consists of, where its name is not enough.
        sources: names of what the data were made from. base: the content of the checkpoint that a new run starts from.
        OSError when resuming would change the run. From here on signals and max_minutes stop the run after a step.
        """
        rank, world = rank_and_world()
        self.model = model
        self.optimizers = optimizers
        self.device = next(model.parameters()).device
        self.peak = peak_flops(self.device)
        self.about = {
            "stage": self.stage,
            "tokenizer": tokenizer,
            "settings": self.settings,
            "data": data,
            "processes": world,
            "sources": list(sources),
            "before": [],  # the stages that the weights have been through before this run, the last one first
        }
        if vocabulary:
            self.about["vocabulary"] = vocabulary
        if base is not None:
            self.about["before"] = [{name: base[name] for name in STAGE if name in base}, *base.get("before", [])]
        elif self.stored is not None:
            self.about["before"] = self.stored.get("before", [])
        if self.stored is not None:
            self.check_same_run()
        is_new = self.stored is None
        if is_new:
            if rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
            self.refuse_used(self.enter())  # again: it may not have existed, and another run may have begun
        if rank == 0:
            self.remove_stale()
        if is_new and rank == 0 and self.settings["init_from"] not in ("scratch", "resume"):
            (self.folder / STARTED_FROM).write_text(self.settings["init_from"], encoding="utf-8")
        if not is_new:
            self.load()
        if self.progress.tracked_as:
            self.tracker.last_step = last_step_of(self.folder / "log.jsonl")
        elif self.tracker.name:
            self.progress.tracked_as = f"{self.folder.name}-{secrets.token_hex(4)}"
        if is_new:
            self.save(must=True)
        self.tracker.start(self.progress.tracked_as, self.settings)
        self.log = open_log(self.folder / "log.jsonl", self.progress.log_bytes, self.step, self.units)
        self.bar = tqdm(total=self.n_steps, initial=self.step, unit=" steps", disable=None if rank == 0 else True)
        self.first_timed_step = self.step + 2  # the first step compiles
        self.recent_seconds = deque(maxlen=20)
        self.started = time.monotonic()
        self.catch_signals(self.note_signal)
        if self.over():
            print_line(
                f"step {self.step} of {self.n_steps}: nothing left to do (increase the run's length to continue)"
            )

    def check_same_run(self):
        """OSError naming everything that would make the resumed run differ from the stored one."""
        may_change = set(self.may_change)
        if self.stored.get("processes", 1) != self.about["processes"]:
            print("warning: the number of processes has changed: results differ by rounding")
            may_change.add("batch_size")
        changed = []
        problems = []
        for name, old in self.stored["settings"].items():
            new = self.settings.get(name)
            if name not in may_change and new != old:
                changed.append(name)
                problems.append(f"{name} was {old!r}, is now {new!r}")
        if self.stored["data"] != self.about["data"]:
            problems.append("the data or the model to start from have changed")
        can_force = self.fixed.isdisjoint(changed)
        if self.stored["tokenizer"] != self.about["tokenizer"]:
            problems.append(f"the tokenizer was {self.stored['tokenizer']}, is now {self.about['tokenizer']}")
            can_force = False
        if problems and not (self.settings["force"] and can_force):
            remedy = "use the old ones, or --force=True" if can_force else "use the old ones"
            raise OSError(f"resuming would change the run ({'; '.join(problems)}): {remedy}")

    def load(self):
        """Weights, optimizer states and progress of the stored checkpoint, with the current settings."""
        self.model.load_state_dict(self.stored["model"])
        for opt, state in zip(self.optimizers, self.stored["optimizers"], strict=True):
            current = [{name: group[name] for name in group if name != "params"} for group in opt.param_groups]
            opt.load_state_dict(state)
            for group, settings in zip(opt.param_groups, current, strict=True):
                group.update(settings)  # the same as stored, unless --force changed them
        self.progress = Progress(**self.stored["state"] | {"saved_step": self.stored["step"]})
        if self.stored["data"] != self.about["data"]:  # losses on other data do not compare: best.pt starts over
            self.progress.best_val_loss = math.inf
        print(f"resuming after step {self.step}")
        self.stored = None  # free the checkpoint's memory

    def over(self):
        """Whether the run has done its steps, or was stopped; the same in all processes."""
        return self.stopped or self.step >= self.n_steps

    def count(self, result, n_targets, n_inputs, seconds):
        """Count a step that took `seconds`; returns its log row.

        result: has loss, grad_norm and applied (whether they were finite). n_targets: the number that the loss is
        averaged over. n_inputs: tokens that went through the network, padding included.
        """
        progress = self.progress
        progress.step += 1
        progress.tokens += n_targets
        progress.seconds += seconds
        progress.skipped_in_a_row = 0 if result.applied else progress.skipped_in_a_row + 1
        self.recent_seconds.append(seconds)
        row = {"step": progress.step, "tokens": progress.tokens}
        if math.isfinite(result.loss):
            row["loss"] = result.loss
        if math.isfinite(result.grad_norm):
            row["grad_norm"] = result.grad_norm
        if not result.applied:
            row["skipped"] = 1
        row["seconds"] = round(progress.seconds, 3)
        row["tokens_per_second"] = round(n_inputs / seconds)
        if self.peak:
            flops_per_second = self.model.flops_per_token() * n_inputs / seconds
            row["mfu"] = round(flops_per_second / (self.peak * rank_and_world()[1]), 4)
        memory = peak_memory(self.device)
        if memory is not None:
            row["peak_memory"] = round(memory, 3)
        return row

    def end_step(self, row):
        """Log a row, keep best.pt, stop when it is time, write ckpt.pt when due, and show the row.

        FloatingPointError after three steps in a row that were not finite.
        """
        self.record(row)
        self.stopped = self.step == self.n_steps or self.is_told_to_stop()
        is_interesting = self.stopped or "skipped" in row or "val_loss" in row or self.step == self.first_timed_step
        self.bar.set_postfix_str(f"loss {row.get('loss', math.nan):.4f}", refresh=False)
        self.bar.update()
        if is_interesting or self.step % self.settings["log_interval"] == 0:
            print_line(self.line_of(row))
        self.check_finite()
        keep_every = self.settings.get("keep_every", 0)
        if keep_every and self.step % keep_every == 0:
            self.write_weights(f"step_{self.step:08}.pt", row)
        if self.stopped or self.step % self.settings["checkpoint_interval"] == 0:
            self.save(must=self.stopped)

    def log_start(self, row):
        """Log what was measured before the first step."""
        row = {"step": 0, "tokens": 0} | row
        self.record(row)
        print_line(self.line_of(row))

    def record(self, row):
        """Write a row to the log, and best.pt when its validation loss is the lowest so far."""
        self.keep_best(row)
        self.tracker.log(row)
        write_row(self.log, row)
        self.progress.log_bytes = self.log.tell()

    def keep_best(self, row):
        """Write best.pt when the row's validation loss is the lowest so far."""
        if row.get("val_loss", math.inf) < self.progress.best_val_loss:
            # the best loss changes only if the file was written, so that the next improvement is saved
            if self.write_weights("best.pt", row):
                self.progress.best_val_loss = row["val_loss"]
                self.progress.best_step = row["step"]

    def write_weights(self, name, row):
        """Write the weights and what the row says about them, nothing to resume from; returns whether it worked."""
        metrics = {name: value for name, value in row.items() if name.startswith(("val_", "hellaswag_"))}
        return self.write(name, step=row["step"], tokens=row["tokens"], metrics=metrics)

    def is_told_to_stop(self):
        """Whether a signal came, the minutes are over, or torchrun has been killed, in any process."""
        minutes = self.settings["max_minutes"]
        too_late = minutes > 0 and time.monotonic() - self.started > 60 * minutes
        is_orphan = "LOCAL_RANK" in os.environ and os.getppid() != PARENT
        if is_orphan:
            print_line("the launcher is gone: stopping after this step (--init_from=resume continues later)")
        told = torch.tensor(float(self.signalled or too_late or is_orphan))
        return bool(sum_over_ranks(told) > 0)

    def catch_signals(self, handler):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

    def note_signal(self, number, frame):
        """SIGINT and SIGTERM stop the run after this step; a second one ends the process at once.

        Under torchrun a second one is ignored: torchrun repeats the terminal's signal, and ends its processes when they
        take longer than 30 s.
        """
        self.signalled = True
        message = "stopping after this step (--init_from=resume continues later)"
        if "LOCAL_RANK" in os.environ:
            self.catch_signals(signal.SIG_IGN)
        else:
            self.catch_signals(signal.SIG_DFL)
            message += "; once more to stop at once"
        if rank_and_world()[0] == 0:
            with suppress(OSError):  # not print, which the signal may have interrupted
                os.write(sys.stdout.fileno(), f"{message}\n".encode())

    def check_finite(self):
        """FloatingPointError after three steps in a row that were not applied."""
        if self.progress.skipped_in_a_row == 3:
            self.bar.close()  # so that the message is on a line of its own
            raise FloatingPointError(
                f"loss or gradient is not finite since step {self.step - 2}: resume from {self.folder}/ckpt.pt "
                f"(of step {self.progress.saved_step}) with a lower learning rate "
                "(--init_from=resume --force=True --learning_rate=...)"
            )

    def save(self, must=False):
        """Write ckpt.pt: everything that is needed to resume; PREVIOUS is what it was before."""
        if rank_and_world()[0] == 0:
            self.keep_previous()
        states = [opt.state_dict() for opt in self.optimizers]
        counts = {"step": self.step, "tokens": self.progress.tokens, "state": asdict(self.progress)}
        if self.write("ckpt.pt", must, optimizers=states, **counts):
            self.progress.saved_step = self.step

    def keep_previous(self):
        """Give ckpt.pt its second name, which the file keeps when a new one takes the first.

        The file that had it goes now: so the disk needs room for two, of which one is being written.
        """
        previous = self.folder / PREVIOUS
        previous.unlink(missing_ok=True)
        with suppress(OSError):  # no ckpt.pt yet, or a file system without hard links
            os.link(self.folder / "ckpt.pt", previous)

    def write(self, name, must=False, **entries):
        """Write a checkpoint, from the first process; returns whether it worked. OSError only if it `must` work."""
        path = self.folder / name
        try:
            if rank_and_world()[0] == 0:
                if self.log is not None:  # it must be on disk before the checkpoint that stores its length
                    self.log.flush()
                    os.fsync(self.log.fileno())
                save_checkpoint(path, self.model, **entries, **self.about)
            return True
        except OSError as error:
            if must:
                raise
            print_line(f"warning: no new {path} ({error}); training continues")
            return False

    def line_of(self, row):
        """What the terminal shows of a log row."""
        parts = [f"step {row['step']}/{self.n_steps}"]
        if "skipped" in row:
            parts.append("NOT FINITE, skipped")
        parts += [f"{label} {row[name]:.4f}" for name, label in self.labels.items() if name in row]
        if "tokens_per_second" in row:
            left = timedelta(seconds=int((self.n_steps - row["step"]) * statistics.median_low(self.recent_seconds)))
            if "learning_rate" in row:
                parts.append(f"lr {row['learning_rate']:.2e}")
            parts.append(f"{row['tokens_per_second']:,} tok/s")
            if "mfu" in row:
                parts.append(f"MFU {row['mfu']:.1%}")
            parts.append(f"{left} left")
        return " | ".join(parts)

    def finish(self, also=""):
        """Close the log, and say which weights out_dir holds; also: names of further files there."""
        self.log.close()
        self.bar.close()
        self.tracker.call("finish")
        progress = self.progress
        if progress.best_val_loss == math.inf:
            best = "no best.pt, as nothing was validated"
        else:
            best = f"best.pt of step {progress.best_step} (validation loss {progress.best_val_loss:.4f})"
            if progress.best_step == 0 < progress.step:
                best += ": NOT TRAINED by this run, as no later validation has improved on it; ckpt.pt is trained"
        files = f"ckpt.pt of step {progress.step}, {best}"
        kept = sorted(path.name for path in self.folder.iterdir() if is_kept(path.name))
        if kept:
            files += f"; kept: {', '.join(kept)}"
        if also:
            files += f"; {also}"
        print(f"{self.folder}: {files}")
        unlock_folders()
        leave_processes()


class Tracker:
    """A run on Weights & Biases ("wandb") or trackio, from the first process; "" is none.

    What fails there is a warning, once, and training goes on without it. OSError when the package is not installed.
    """

    def __init__(self, name):
        self.name = name
        self.module = None
        self.last_step = -1  # of the rows that are there already
        if name and rank_and_world()[0] == 0:
            try:
                self.module = importlib.import_module(name)
            except ImportError:
                raise OSError(f"{name} is not installed: pip install {name}, or leave --tracker= out") from None
            except Exception as error:  # whatever is wrong with it
                self.give_up(error)

    def start(self, run_name, settings):
        """Begin the tracked run of this name, or continue it."""
        more = {"id": run_name} if self.name == "wandb" else {}  # trackio knows a run by its name
        self.call("init", project="fgpt", name=run_name, config=settings, resume="allow", **more)

    def log(self, row):
        """Log a row of the log at its step, unless it is there already: a resumed run repeats a few steps."""
        if row["step"] > self.last_step:
            figures = {name: value for name, value in row.items() if name != "step"}
            self.call("log", figures, step=row["step"])

    def call(self, function, *arguments, **more):
        """One of the tracker's functions init, log, finish."""
        if self.module is None:
            return
        try:
            getattr(self.module, function)(*arguments, **more)
        except (Exception, SystemExit) as error:  # whatever a service raises
            self.give_up(error)

    def give_up(self, error):
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print_line(f"warning: {self.name} failed ({reason:.200}); training goes on without it")
        self.module = None


def lock_folder(folder):
    """Keep other processes out of a folder until unlock_folders; returns who is there already, or "".

    A flock ends with its process, however that ends: a file LOCK that was left behind means nothing. Windows has none.
    """
    path = (folder / LOCK).resolve()
    if fcntl is None or path in LOCKED:  # locked by an earlier run of this process
        return ""
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        number, _, host = file.read().partition(" ")
        file.close()
        if not number:
            return "another process"
        return f"process {number}" if host == socket.gethostname() else f"process {number} on {host}"
    except OSError as error:  # some network disks have no locks
        print(f"warning: {folder} cannot be locked ({error}): start no second process there")
    if os.fstat(file.fileno()).st_nlink == 0:  # its owner has removed it since it was opened
        file.close()
        return lock_folder(folder)
    LOCKED[path] = file
    with suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}")
        file.flush()
    return ""


def unlock_folders():
    """Remove the locks of this process."""
    for path in LOCKED:
        path.unlink(missing_ok=True)  # before it is closed: then it may be another process's
    forget_locks()


def forget_locks():
    for file in LOCKED.values():
        file.close()
    LOCKED.clear()


atexit.register(unlock_folders)
if fcntl is not None:
    os.register_at_fork(after_in_child=forget_locks)  # or a child would keep them after this process's death


def is_kept(name):
    """Whether a file of out_dir has weights kept by --keep_every, which no run deletes."""
    return re.fullmatch(r"step_\d{8,}\.pt", name) is not None


def prefetch(batch_at, step, device):
    """Yield batch_at(step), batch_at(step + 1), ...: the next batch is read while this one is trained on.

    For a GPU in pinned memory, so that the copy to it runs while it computes.
    """

    def fetch(step):
        batch = batch_at(step)
        if device.type == "cuda":
            batch = [part.contiguous().pin_memory() for part in batch]
        return batch

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(fetch, step)
        while True:
            batch = coming.result()
            step += 1
            coming = reader.submit(fetch, step)
            yield batch


def due(step, interval, n_steps):
    """Whether what happens every `interval` steps (0: never), and at the end, happens at this step."""
    return interval > 0 and (step % interval == 0 or step == n_steps)


def open_log(path, n_bytes, step, units):
    """The log, ready to append to what it was at a checkpoint: n_bytes long, its last row that of `step`.

    A new log starts with the line of units. If the disk is full, rows wait in the file's buffer (about 100,000 of
    them).
    """
    if rank_and_world()[0] > 0:
        return open(os.devnull, "ab")
    old = path.read_bytes() if path.exists() else b""
    kept = old[:n_bytes]
    lines, _, rest = kept.rpartition(b"\n")
    is_as_it_was = len(kept) == n_bytes and not rest and row_of(lines.rpartition(b"\n")[2]).get("step") == step
    if n_bytes > 0 and not is_as_it_was:
        kept = repair_log(path, old, step, units)
    log = open(path, "ab", buffering=1 << 26)
    log.truncate(len(kept))
    log.seek(0, os.SEEK_END)
    if n_bytes == 0:
        log.write(header_of(units))
    return log


def last_step_of(path):
    """The step of the last row of a log, before it is cut to a checkpoint; -1 where there is none."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return max((row_of(line).get("step", -1) for line in lines[-1:]), default=-1)


def repair_log(path, old, step, units):
    """Start a log over with the rows up to a step; the old one is kept under another name. Returns the content."""
    rows = {}
    for line in old.split(b"\n"):
        number = row_of(line).get("step")
        if isinstance(number, int) and number <= step:
            rows[number] = line + b"\n"
    kept = header_of(units) + b"".join(rows[number] for number in sorted(rows))
    message = f"warning: {path} is not what it was at step {step}: {len(rows)} of its rows are kept"
    if old not in (b"", kept):
        number = 1
        while (copy := path.with_stem(f"{path.stem}_{number}")).exists():
            number += 1
        copy.write_bytes(old)
        message += f", all of it is in {copy}"
    print(message)
    with whole_file(path) as file:
        file.write(kept)
    return kept


def row_of(line):
    """What a line of a log holds; {} if that is not a row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def header_of(units):
    return json.dumps({"format": "fgpt log 1", "units": units}).encode() + b"\n"


def write_row(log, row):
    with suppress(OSError):  # a full disk: saving a checkpoint will report it
        log.write((json.dumps(row) + "\n").encode())
        log.flush()


class LossyStream:
    """sys.stdout or sys.stderr of a run, which a full disk, a closed pipe or a strange character must not end."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with suppress(OSError, ValueError):  # the latter when it is closed
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def let_printing_fail():
    """From here on, what cannot be printed is lost, and nothing else; characters that cannot are question marks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # None where it was closed
        if not isinstance(stream, LossyStream):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
            setattr(sys, name, LossyStream(stream))


def print_line(line):
    """Print a line above the progress bar, and at once also into a pipe."""
    with tqdm.external_write_mode():
        print(line, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# checkpoint files: dicts of tensors, numbers and strings, read with weights_only=True; never code


def save_checkpoint(path, model, **entries):
    """Write the model's weights and config, and `entries`, so that at any moment `path` holds a complete file.

    It is read back before it takes its name. OSError when it cannot be written; what `path` held before is still there.
    """
    content = {"format_version": FORMAT_VERSION, "config": asdict(model.config), "model": model.state_dict(), **entries}
    with whole_file(path) as file:
        torch.save(content, file)
        file.flush()
        if not is_whole(file.name):
            raise OSError("what was written reads back otherwise")


@contextmanager
def whole_file(path):
    """A binary file to write, which becomes `path` once all of it is on the disk.

    OSError when it cannot be written; what `path` held before is still there.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        raise OSError(f"{path} could not be written (disk full?), an earlier one is untouched: {error}") from None
    os.replace(temporary, path)
    if os.name == "posix":  # Windows opens no folders
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        os.fsync(folder)  # the new name itself must survive a power cut
        os.close(folder)


def is_whole(path):
    """Whether all parts of a file by torch.save have the checksums (CRC-32) that are stored with them.

    torch.load does not compare them: a damaged weight would be loaded like any other.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # it raises many kinds for a damaged file
        return False


def load_checkpoint(path, device="cpu"):
    """The checkpoint's dict, tensors on `device`. OSError for a missing or damaged file, or one that is none."""
    try:
        open(path, "rb").close()  # what may not be read is not damaged
    except (FileNotFoundError, IsADirectoryError):
        problem = "a folder, not a checkpoint" if os.path.isdir(path) else "no such checkpoint"
        raise FileNotFoundError(f"{path}: {problem}; a run writes best.pt and ckpt.pt into its out_dir") from None
    if not is_whole(path):
        raise OSError(f"{path} is damaged or not a checkpoint: {what_else(Path(path))}")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a file by somebody else
        raise OSError(f"{path} is not a checkpoint ({type(error).__name__})") from None
    if not isinstance(content, dict):
        content = {}
    version = content.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise OSError(
            f"{path} has checkpoint format {version}, of a newer fgpt; this one reads up to {FORMAT_VERSION}: update it"
        )
    wrong = [name for name, kind in ENTRIES.items() if not isinstance(content.get(name), kind)]
    wrong += [name for name, kind in MORE_ENTRIES.items() if name in content and not isinstance(content[name], kind)]
    if not wrong and not all(torch.is_tensor(p) for p in content["model"].values()):
        wrong = ["model"]
    if wrong:
        raise OSError(f"{path} is not a checkpoint of fgpt: it has no valid {', '.join(wrong)}")
    return content


def what_else(path):
    """What to do about a damaged checkpoint: use another file of its run, the last one first."""
    others = [path.with_name(name) for name in ("ckpt.pt", PREVIOUS, "best.pt") if name != path.name]
    found = [other for other in others if other.exists()]
    if not found:
        return "copy or train it again"
    hint = " (to resume from it, rename it to ckpt.pt)" if found[0].name == PREVIOUS else ""
    return f"use {found[0]}{hint}"


def load_model(path, device="cpu"):
    """(model in eval mode on `device`, the checkpoint's dict without tensors). Needs model.py.

    OSError when weights and config do not fit together. Warns on stderr about a run's weights of step 0.
    """
    from model import GPT, GPTConfig

    content = load_checkpoint(path)
    weights = content.pop("model")
    try:
        config = GPTConfig(**content["config"])
        wrong = [field.name for field in fields(config) if not isinstance(getattr(config, field.name), field.type)]
    except (TypeError, ValueError) as error:
        wrong = [str(error)]
    if wrong:
        raise OSError(f"{path}: its config is not one of this version ({', '.join(wrong)})")
    if n_weights_at_least(config) > sum(p.numel() for p in weights.values()):  # no memory is taken for wrong sizes
        raise OSError(f"{path}: its weights do not match its config, they are fewer")
    model = GPT(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{path}: its weights do not match its config ({reason:.200})") from None
    content.pop("optimizers", None)
    is_of_a_run = content["stage"] == "pretrain" and "data" in content  # an imported model has no data
    if is_of_a_run and not content.get("before") and content["step"] == 0:
        print(f"warning: {path} is NOT TRAINED, of step 0; try ckpt.pt in the same folder", file=sys.stderr)
    return model.to(device).eval(), content


def n_weights_at_least(config):
    """Elements of the embedding, and of one matrix in and one out of each block's attention and MLP."""
    widths = config.n_head * config.head_dim + config.mlp_dim
    return config.n_embd * (config.vocab_size + 2 * config.n_layer * widths)


# ----------------------------------------------------------------------------------------------------------------------
# the machine: its device, one process or many


def pick_device(name="", deterministic=False):
    """The torch.device of a setting; empty: cuda where there is one. OSError for one that cannot be used.

    deterministic: from here on, only kernels that give the same bits every time.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # torch raises the latter where it was built without CUDA
        raise OSError(f"device {name!r} cannot be used here: try --device=cpu") from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # what stays in fp32 may use TF32
        torch.backends.cuda.enable_cudnn_sdp(False)  # see fixed_shapes
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic needs of cuBLAS
    torch.use_deterministic_algorithms(deterministic)
    return device


@contextmanager
def fixed_shapes():
    """Allow cuDNN's attention inside: on GPUs the fastest, but it takes 0.4 s to plan for each new shape."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def pick_dtype(name, device, n_embd, least_width=BF16_WIDTH):
    """The dtype to multiply in, "float32" or "bfloat16", of a setting that may be empty. OSError for another name.

    Empty is bfloat16 where it was measured to be faster: on GPUs that have it, and on CPUs that multiply it natively if
    the network is at least least_width wide.
    """
    if name not in ("", "float32", "bfloat16"):
        raise OSError(f"dtype {name!r} cannot be used: set float32 or bfloat16, or leave it out")
    if name:
        return name
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":  # PyTorch has no public name for it
        is_fast = n_embd >= least_width and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    else:
        is_fast = False
    return "bfloat16" if is_fast else "float32"


def autocast_for(device, dtype):
    """A function that makes the context in which a network computes in this dtype."""
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def peak_flops(device):
    """Dense bf16 peak of the GPU in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory(device):
    """Largest memory of this process so far, GB: allocated on an NVIDIA GPU, else resident; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def is_out_of_memory(error):
    """Whether a RuntimeError means that: those of CPUs and of cuBLAS have no exception class of their own."""
    return any(words in str(error) for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED"))


def join_processes(device_name=""):
    """Under torchrun: join the other processes and take this one's GPU; from here on only the first one prints.

    OSError when there are more processes than GPUs, or all would take the same one.
    """
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if ":" in device_name:
        raise OSError(f"--device={device_name} under torchrun would be the same for all: leave the number out")
    on_gpu = device_name != "cpu" and torch.cuda.is_available()
    if on_gpu:
        n_gpus = torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise OSError(f"torchrun started more processes than this machine has GPUs: --nproc_per_node={n_gpus}")
        torch.cuda.set_device(local_rank)
    # small messages between hosts go through gloo: they do not wait for the GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")


def leave_processes():
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank_and_world():
    """(number of this process, number of processes): (0, 1) unless torchrun started several and they have joined."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(tensor):
    """The tensor, its elements summed over all processes, in place."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters):
    """Sum the gradients over all processes, in a few large calls; a process that had no rows contributes zeros."""
    if rank_and_world()[1] == 1:
        return
    bucket = []
    n = 0  # elements in the bucket
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        bucket.append(p.grad)
        n += p.numel()
        if n >= BUCKET:
            sum_bucket(bucket)
            bucket = []
            n = 0
    if bucket:
        sum_bucket(bucket)


def sum_bucket(tensors):
    """Sum each tensor over all processes, in place, with one call: a small call costs as much time as a large one."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def broadcast_from_first(value):
    """The first process's value, in every process."""
    if rank_and_world()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]
