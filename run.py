"""The bookkeeping of a training run: device, processes, log, checkpoints, resuming, signals.

Needs only torch and tqdm: copy this file where you like. A script writes its own training loop and calls `Run` for the
rest:

    run = Run("pretrain", settings, n_steps, units, labels)   # refuses an out_dir in use
    run.restore(model, optimizers, tokenizer.name, data)      # or writes the checkpoint of step 0
    while not run.is_over:
        ...                                                   # one step
        row = run.count(result, n_targets, n_inputs, seconds)
        run.end_step(row)                                     # log, best.pt, ckpt.pt when due
    run.finish()
"""

import atexit
import ctypes
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
import warnings
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

# checkpoints
FORMAT_VERSION = 1  # of checkpoint files; load_checkpoint must read files of all earlier versions too
REQUIRED_ENTRIES = {"format_version": int, "config": dict, "model": dict, "stage": str, "tokenizer": str, "step": int}
OPTIONAL_ENTRIES = {
    "tokens": int, "settings": dict, "metrics": dict, "vocabulary": str, "state": dict, "optimizers": list,
    "sources": list, "before": list,
}  # fmt: skip
RESUME_ENTRIES = ("optimizers", "state", "settings", "data")  # only checkpoints that have these can be resumed
STAGE_ENTRIES = ("stage", "step", "metrics", "settings", "sources")  # how the weights were trained
# files of out_dir
PREVIOUS = "ckpt_before.pt"  # the ckpt.pt before the current one, in case the current one is damaged
STARTED_FROM = "init_from.txt"  # which weights a new run started from
LOCK = "lock"  # process id and host of the running process, which has locked this file
# runs
PARENT = os.getppid()  # process id of torchrun, if that started us; when it changes, torchrun was killed
LOCKED = {}  # the lock files of this process: path -> open file
MAX_SKIPPED = 3  # steps in a row that were not finite, after which a run fails
TRACKERS = ("", "wandb", "trackio")
ALWAYS_MAY_CHANGE = {  # settings that may differ when a run is resumed, in every stage
    "out_dir", "init_from", "overwrite", "force", "log_interval", "checkpoint_interval", "keep_every", "max_minutes",
    "tracker",
}  # fmt: skip
# the machine
BF16_WIDTH = 128  # from this n_embd on, bf16 gains more on CPUs than the casts cost
BF16_WIDTH_DECODING = 512  # the same for decoding token by token, where reading the weights takes most of the time
BUCKET = 2**25  # gradient elements that are summed over the processes in one call
# dense bf16 FLOP/s from NVIDIA's data sheets; the first key contained in the GPU's name is used
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12, "A100": 312e12,
    "L40S": 362e12, "RTX 4090": 165e12,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# the run


@dataclass
class Progress:
    """How far a run has come; stored in its checkpoints."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # trained tokens
    seconds: float = 0.0  # training time, without evaluation
    log_bytes: int = 0  # length of the log
    skipped_in_a_row: int = 0  # consecutive steps that were not finite
    best_val_loss: float = math.inf  # of best.pt, in the stage's unit
    best_step: int = 0  # of best.pt
    saved_step: int = 0  # of ckpt.pt
    tracked_as: str = ""  # the run's name on a tracker


class Run:
    """One training run: its folder out_dir, its progress, and when it stops; the same in all processes.

    stage: "pretrain", ... settings: dict of the stage's settings. Run itself uses out_dir, init_from, overwrite, force,
    log_interval, checkpoint_interval, max_minutes and, if present, keep_every and tracker. units: {name of a number in
    the log: its unit}. labels: {name of a number to print: its label in the terminal}. may_change: settings that may
    differ on resuming, because they do not affect the weights or only lengthen the run. fixed: settings that not even
    `force` can change, because the stored tensors would not fit. upgrade: function that converts the settings of a
    checkpoint of an earlier version, in place.

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
        self.got_signal = False  # SIGINT or SIGTERM, in this process
        self.is_over = False  # all steps are done, or the run was stopped; the same in all processes
        self.recent_seconds = deque(maxlen=20)  # of the last steps
        # restore adds model, optimizers, device, common_entries (of all checkpoints), bar (progress) and started (s)
        self.log = None  # log.jsonl, once restore has opened it
        make_printing_safe()
        self.tracker = Tracker(settings.get("tracker", ""))
        self.stored = self.claim_folder()  # the checkpoint to resume from, or None
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

    def claim_folder(self):
        """Lock out_dir and check that it may be used. Returns the checkpoint to resume from, or None for a new run."""
        names = self.lock_and_list()
        if self.settings["init_from"] != "resume":
            self.refuse_to_overwrite(names)
            return None
        if not names:  # no run yet, or one that was killed before its first checkpoint
            print(f"{self.folder} has no checkpoint yet: the run starts")
            return None
        if STARTED_FROM in names and not (self.folder / "ckpt.pt").exists():
            remedy = "start it again with its --init_from= and --overwrite=True"
            raise FileNotFoundError(f"{self.folder} has no checkpoint yet: {remedy}")
        stored = load_checkpoint(self.folder / "ckpt.pt")
        missing = [name for name in RESUME_ENTRIES if name not in stored]
        if missing:
            raise OSError(f"ckpt.pt has no {', '.join(missing)} (is it a copy of best.pt?): it cannot be resumed")
        if stored["stage"] != self.stage:
            problem = f"{self.folder} holds a {stored['stage']} run, not a {self.stage} run"
            raise OSError(f"{problem}: choose another --out_dir")
        return stored

    def lock_and_list(self):
        """Lock out_dir, if it exists. Returns the names of its files, except unfinished ones, in all processes.

        OSError when another process has locked it.
        """
        holder = ""
        names = []
        if is_first_process() and self.folder.is_dir():
            holder = lock_folder(self.folder)
            names = [path.name for path in self.folder.iterdir() if path.name != LOCK and path.suffix != ".tmp"]
        holder, names = broadcast_from_first((holder, names))
        if holder:
            raise OSError(f"{self.folder} is in use by {holder}: wait until it has ended, or stop it")
        return names

    def refuse_to_overwrite(self, names):
        """FileExistsError if out_dir has files of these names and may not be overwritten."""
        if not self.settings["overwrite"] and not all(map(is_kept, names)):
            raise FileExistsError(
                f"{self.folder} is not empty: --init_from=resume continues, --overwrite=True starts over, or --out_dir="
            )

    def restore(self, model, optimizers, tokenizer, data, vocabulary="", sources=(), base=None):
        """Load the stored checkpoint, or write the checkpoint of step 0, so that a run can always be resumed.

        model: has a `config`, a dataclass, and flops_per_token(). tokenizer: its name. data: fingerprints, by which a
        resumed run recognizes its data. vocabulary: the text of a custom vocabulary. sources: names of what the data
        was made from. base: content of the checkpoint that a new run starts from.
        OSError when resuming would change the run. After this call, signals and max_minutes stop the run after a step.
        """
        self.model = model
        self.optimizers = optimizers
        self.device = next(model.parameters()).device
        self.common_entries = {
            "stage": self.stage,
            "tokenizer": tokenizer,
            "settings": self.settings,
            "data": data,
            "processes": n_processes(),
            "sources": list(sources),
        }
        self.common_entries["before"] = self.earlier_stages(base)
        if vocabulary:
            self.common_entries["vocabulary"] = vocabulary
        is_new = self.stored is None
        if is_new:
            self.prepare_folder()
        else:
            self.check_same_run()
            self.load()
        if is_first_process():
            for unfinished in self.folder.glob("*.pt.tmp"):
                unfinished.unlink()
        if self.progress.tracked_as:
            self.tracker.last_step = last_step_of(self.folder / "log.jsonl")
        elif self.tracker.name:
            self.progress.tracked_as = f"{self.folder.name}-{secrets.token_hex(4)}"
        if is_new:
            self.save_ckpt(required=True)
        self.tracker.start(self.progress.tracked_as, self.settings)
        self.log = open_log(self.folder / "log.jsonl", self.progress.log_bytes, self.step, self.units)
        hide_bar = None if is_first_process() else True  # None: hide it if stderr is not a terminal
        self.bar = tqdm(total=self.n_steps, initial=self.step, unit=" steps", disable=hide_bar)
        self.started = time.monotonic()
        self.handle_signals(self.on_signal)
        self.is_over = self.step >= self.n_steps
        if self.is_over:
            print_line(
                f"step {self.step} of {self.n_steps}: nothing left to do (increase the run's length to continue)"
            )

    def earlier_stages(self, base):
        """What the weights were trained on before this run: a dict of STAGE_ENTRIES per stage, the latest one first."""
        if base is not None:
            latest = {name: base[name] for name in STAGE_ENTRIES if name in base}
            return [latest, *base.get("before", [])]
        if self.stored is None:
            return []
        before = self.stored.get("before", [])
        if self.stored["data"] != self.common_entries["data"]:  # resumed on other data, with --force=True
            before = [{name: self.stored[name] for name in STAGE_ENTRIES if name in self.stored}, *before]
        return before

    def prepare_folder(self):
        """Create out_dir for a new run, or remove an earlier run from it."""
        if is_first_process():
            self.folder.mkdir(parents=True, exist_ok=True)
        self.refuse_to_overwrite(self.lock_and_list())  # again: meanwhile another run may have created it
        if is_first_process():
            for name in ("ckpt.pt", PREVIOUS, "best.pt", "log.jsonl", STARTED_FROM):
                (self.folder / name).unlink(missing_ok=True)
            if self.settings["init_from"] not in ("scratch", "resume"):
                (self.folder / STARTED_FROM).write_text(self.settings["init_from"], encoding="utf-8")

    def check_same_run(self):
        """OSError naming everything that would make the resumed run differ from the stored one."""
        may_change = set(self.may_change)
        if self.stored.get("processes", 1) != self.common_entries["processes"]:
            print("warning: the number of processes has changed: results differ by rounding")
            may_change.add("batch_size")
        changed = []
        problems = []
        for name, old in self.stored["settings"].items():
            new = self.settings.get(name)
            if name not in may_change and new != old:
                changed.append(name)
                problems.append(f"{name} was {old!r}, is now {new!r}")
        if self.stored["data"] != self.common_entries["data"]:
            problems.append("the data or the model to start from have changed")
        can_force = self.fixed.isdisjoint(changed)
        if self.stored["tokenizer"] != self.common_entries["tokenizer"]:
            old, new = self.stored["tokenizer"], self.common_entries["tokenizer"]
            problems.append(f"the tokenizer was {old}, is now {new}")
            can_force = False
        if problems and not (self.settings["force"] and can_force):
            remedy = "use the old ones, or --force=True" if can_force else "use the old ones"
            raise OSError(f"resuming would change the run ({'; '.join(problems)}): {remedy}")

    def load(self):
        """Load weights, optimizer states and progress of the stored checkpoint; the current settings stay."""
        # pop, so that the checkpoint's tensors leave memory as soon as they are copied
        self.model.load_state_dict(self.stored.pop("model"))
        for opt, state in zip(self.optimizers, self.stored.pop("optimizers"), strict=True):
            current = [{name: group[name] for name in group if name != "params"} for group in opt.param_groups]
            opt.load_state_dict(state)
            for group, settings in zip(opt.param_groups, current, strict=True):
                group.update(settings)  # the same as stored, unless --force changed them
        self.progress = Progress(**self.stored["state"] | {"saved_step": self.stored["step"]})
        if self.stored["data"] != self.common_entries["data"]:  # losses on other data cannot be compared
            self.progress.best_val_loss = math.inf
        print(f"resuming after step {self.step}")
        self.stored = None

    def log_step_0(self, row):
        """Log and print what was measured before the first step."""
        row = {"step": 0, "tokens": 0} | row
        self.log_row(row)
        print_line(self.terminal_line(row))

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
        peak = peak_flops(self.device)
        if peak is not None:
            flops_per_second = self.model.flops_per_token() * n_inputs / seconds
            row["mfu"] = round(flops_per_second / (peak * n_processes()), 4)
        memory = peak_memory(self.device)
        if memory is not None:
            row["peak_memory"] = round(memory, 3)
        return row

    def end_step(self, row):
        """Log a row, update best.pt, print the row and write ckpt.pt when due, and decide whether the run is over.

        FloatingPointError after MAX_SKIPPED steps in a row that were not finite.
        """
        self.log_row(row)
        self.is_over = self.step >= self.n_steps or self.must_stop()
        self.bar.set_postfix_str(f"loss {row.get('loss', math.nan):.4f}", refresh=False)
        self.bar.update()
        is_second_step = len(self.recent_seconds) == 2  # the first one whose speed is typical: the one before compiles
        is_special = self.is_over or "skipped" in row or "val_loss" in row or is_second_step
        if is_special or self.step % self.settings["log_interval"] == 0:
            print_line(self.terminal_line(row))
        self.check_finite()
        keep_every = self.settings.get("keep_every", 0)
        if keep_every and self.step % keep_every == 0:
            self.save_weights(f"step_{self.step:08}.pt", row)
        if self.is_over or self.step % self.settings["checkpoint_interval"] == 0:
            self.save_ckpt(required=self.is_over)

    def log_row(self, row):
        """Write a row to the log and the tracker, after best.pt if its validation loss is the lowest so far."""
        if row.get("val_loss", math.inf) < self.progress.best_val_loss:
            is_saved = self.save_weights("best.pt", row)
            if is_saved:  # else best_val_loss stays that of the file on disk
                self.progress.best_val_loss = row["val_loss"]
                self.progress.best_step = row["step"]
        self.tracker.log(row)
        with suppress(OSError):  # full disk: the row stays in the buffer, and saving a checkpoint reports the problem
            self.log.write(json.dumps(row).encode() + b"\n")
            self.log.flush()
        self.progress.log_bytes = self.log.tell()

    def must_stop(self):
        """Whether any process got a signal, max_minutes are over, or torchrun was killed."""
        minutes = self.settings["max_minutes"]
        is_late = minutes > 0 and time.monotonic() - self.started > 60 * minutes
        is_orphan = "LOCAL_RANK" in os.environ and os.getppid() != PARENT
        if is_orphan:
            print_line("the launcher is gone: stopping after this step (--init_from=resume continues later)")
        n_stopping = sum_over_ranks(torch.tensor(float(self.got_signal or is_late or is_orphan)))
        return bool(n_stopping > 0)

    def terminal_line(self, row):
        """A log row as one line for the terminal."""
        parts = [f"step {row['step']}/{self.n_steps}"]
        if "skipped" in row:
            parts.append("NOT FINITE, skipped")
        parts += [f"{label} {row[name]:.4f}" for name, label in self.labels.items() if name in row]
        if "learning_rate" in row:
            parts.append(f"lr {row['learning_rate']:.2e}")
        if "tokens_per_second" in row:
            parts.append(f"{row['tokens_per_second']:,} tok/s")
        if "mfu" in row:
            parts.append(f"MFU {row['mfu']:.1%}")
        if self.recent_seconds:
            seconds_left = (self.n_steps - row["step"]) * statistics.median_low(self.recent_seconds)
            parts.append(f"{timedelta(seconds=int(seconds_left))} left")
        return " | ".join(parts)

    def check_finite(self):
        """FloatingPointError after MAX_SKIPPED steps in a row that were not applied."""
        if self.progress.skipped_in_a_row == MAX_SKIPPED:
            self.bar.close()  # so that the message is on a line of its own
            raise FloatingPointError(
                f"loss or gradient is not finite since step {self.step - MAX_SKIPPED + 1}: resume from "
                f"{self.folder}/ckpt.pt (of step {self.progress.saved_step}) with a lower learning rate "
                "(--init_from=resume --force=True --learning_rate=...)"
            )

    def handle_signals(self, handler):
        """Let `handler` handle SIGINT, SIGTERM, and SIGHUP (a closed terminal) unless nohup has switched that off."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
            numbers.append(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, handler)

    def on_signal(self, number, frame):
        """Stop the run after this step; a second signal ends the process at once.

        Under torchrun a second one is ignored: torchrun repeats the terminal's signal, and kills its processes when
        they take longer than 30 s.
        """
        self.got_signal = True
        message = "stopping after this step (--init_from=resume continues later)"
        if "LOCAL_RANK" in os.environ:
            self.handle_signals(signal.SIG_IGN)
        else:
            self.handle_signals(signal.SIG_DFL)
            message += "; once more to stop at once"
        if is_first_process():
            with suppress(OSError):  # not print, which the signal may have interrupted
                os.write(sys.stdout.fileno(), f"{message}\n".encode())

    def save_weights(self, name, row):
        """Write the weights and the row's metrics, without what is needed to resume. Returns whether it worked."""
        metrics = {key: value for key, value in row.items() if key.startswith(("val_", "hellaswag_"))}
        return self.write_checkpoint(name, step=row["step"], tokens=row["tokens"], metrics=metrics)

    def save_ckpt(self, required=False):
        """Write ckpt.pt, with everything that is needed to resume; the file before it remains, as PREVIOUS."""
        if is_first_process():
            previous = self.folder / PREVIOUS
            previous.unlink(missing_ok=True)  # now, so that the disk needs room for only two, one of them unfinished
            with suppress(OSError):  # no ckpt.pt yet, or a file system without hard links
                os.link(self.folder / "ckpt.pt", previous)
        states = [opt.state_dict() for opt in self.optimizers]
        counts = {"step": self.step, "tokens": self.progress.tokens, "state": asdict(self.progress)}
        if self.write_checkpoint("ckpt.pt", required, optimizers=states, **counts):
            self.progress.saved_step = self.step

    def write_checkpoint(self, name, required=False, **entries):
        """Write a checkpoint, from the first process. Returns whether it worked; OSError if a required one did not."""
        path = self.folder / name
        try:
            if is_first_process():
                if self.log is not None:  # it must be on disk before the checkpoint that stores its length
                    self.log.flush()
                    os.fsync(self.log.fileno())
                save_checkpoint(path, self.model, **entries, **self.common_entries)
            return True
        except OSError as error:
            if required:
                raise
            print_line(f"warning: no new {path} ({error}); training continues")
            return False

    def finish(self, other_files=""):
        """Close the log and print which weights out_dir holds. other_files: names of files that the stage wrote."""
        self.log.close()
        self.bar.close()
        self.tracker.call("finish")
        files = [f"ckpt.pt of step {self.step}, {self.describe_best()}"]
        kept = sorted(path.name for path in self.folder.iterdir() if is_kept(path.name))
        if kept:
            files.append(f"kept: {', '.join(kept)}")
        if other_files:
            files.append(other_files)
        print(f"{self.folder}: {'; '.join(files)}")
        unlock_folders()
        leave_processes()

    def describe_best(self):
        """One line about best.pt."""
        progress = self.progress
        if progress.best_val_loss == math.inf:
            return "no best.pt, as nothing was validated"
        text = f"best.pt of step {progress.best_step} (validation loss {progress.best_val_loss:.4f})"
        if progress.best_step == 0 < progress.step:
            text += ": NOT TRAINED by this run, as no later validation has improved on it; ckpt.pt is trained"
        return text


class Tracker:
    """A run on Weights & Biases ("wandb") or trackio, shown by the first process; with the name "" it does nothing.

    When the service fails, it warns once, and training continues without it. OSError if the package is not installed.
    """

    def __init__(self, name):
        self.name = name
        self.module = None  # the package, while it works
        self.last_step = -1  # of the rows that it has already; -1: none
        if name and is_first_process():
            try:
                self.module = importlib.import_module(name)
            except ImportError:
                raise OSError(f"{name} is not installed: pip install {name}, or leave --tracker= out") from None
            except Exception as error:  # a broken package may raise anything
                self.give_up(error)

    def start(self, run_name, settings):
        """Begin the tracked run of this name, or continue it."""
        run_id = {"id": run_name} if self.name == "wandb" else {}  # trackio identifies a run by its name
        self.call("init", project="fgpt", name=run_name, config=settings, resume="allow", **run_id)

    def log(self, row):
        """Log a row, unless it is there already: a resumed run repeats the steps after its checkpoint."""
        if row["step"] > self.last_step:
            numbers = {name: value for name, value in row.items() if name != "step"}
            self.call("log", numbers, step=row["step"])

    def call(self, function, *arguments, **keywords):
        """Call a function of the package: init, log or finish."""
        if self.module is None:
            return
        try:
            getattr(self.module, function)(*arguments, **keywords)
        except (Exception, SystemExit) as error:  # a service may raise anything
            self.give_up(error)

    def give_up(self, error):
        """Warn, and do nothing from now on."""
        reason = one_line(f"{type(error).__name__}: {error}")
        print_line(f"warning: {self.name} failed ({reason:.200}); training continues without it")
        self.module = None


def lock_folder(folder):
    """Lock a folder against other processes until unlock_folders. Returns "", or which process has locked it already.

    The system releases a flock when its process ends, however it ends, so a LOCK file that was left behind does not
    matter. Windows has no flock: there nothing is locked.
    """
    path = (folder / LOCK).resolve()
    if fcntl is None or path in LOCKED:  # the latter: by an earlier run of this process
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
        if host == socket.gethostname():
            return f"process {number}"
        return f"process {number} on {host}"
    except OSError as error:  # some network disks have no locks
        print(f"warning: {folder} cannot be locked ({error}): start no second process there")
    if os.fstat(file.fileno()).st_nlink == 0:  # the process that had it has deleted it since we opened it
        file.close()
        return lock_folder(folder)
    LOCKED[path] = file
    with suppress(OSError):  # on a full disk it stays empty
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}")
        file.flush()
    return ""


def unlock_folders():
    """Remove the locks of this process."""
    for path in LOCKED:
        path.unlink(missing_ok=True)  # before it is closed: afterwards another process may lock it
    close_lock_files()


def close_lock_files():
    """Close the lock files of this process, which gives up its locks."""
    for file in LOCKED.values():
        file.close()
    LOCKED.clear()


atexit.register(unlock_folders)
if fcntl is not None:
    os.register_at_fork(after_in_child=close_lock_files)  # else a child would keep the locks after this process died


def is_kept(name):
    """Whether a file of out_dir has this name because of --keep_every; no run deletes such files."""
    return re.fullmatch(r"step_\d{8,}\.pt", name) is not None


def prefetch(batch_at, step, device):
    """Yield batch_at(step), batch_at(step + 1), ...; a thread prepares the next batch while this one is trained on.

    batch_at(step): a tuple of tensors. They are put into pinned memory, from which a GPU copies while it computes.
    """

    def fetch(step):
        batch = batch_at(step)
        if device.type == "cuda":
            batch = [part.contiguous().pin_memory() for part in batch]
        return batch

    with ThreadPoolExecutor(1) as thread:
        next_batch = thread.submit(fetch, step)
        while True:
            batch = next_batch.result()
            step += 1
            next_batch = thread.submit(fetch, step)
            yield batch


def due(step, interval, n_steps):
    """Whether something that is done every `interval` steps (0: never) and at the end is due at this step."""
    return interval > 0 and (step % interval == 0 or step == n_steps)


def open_log(path, n_bytes, step, units):
    """The log, opened for appending, cut to what it was at a checkpoint: n_bytes long, its last row that of `step`.

    A new log (n_bytes 0) starts with the line of units. A log that was changed since is repaired.
    """
    if not is_first_process():
        return open(os.devnull, "ab")
    old = path.read_bytes() if path.exists() else b""
    kept = old[:n_bytes]
    lines, _, after_last_newline = kept.rpartition(b"\n")
    last_row = row_of(lines.rpartition(b"\n")[2])
    is_unchanged = len(kept) == n_bytes and not after_last_newline and last_row.get("step") == step
    header = json.dumps({"format": "fgpt log 1", "units": units}).encode() + b"\n"
    if n_bytes > 0 and not is_unchanged:
        kept = repair_log(path, old, step, header)
    log = open(path, "ab", buffering=1 << 26)  # bytes: while the disk is full, about 100,000 rows wait in this buffer
    log.truncate(len(kept))
    log.seek(0, os.SEEK_END)
    if n_bytes == 0:
        log.write(header)
    return log


def last_step_of(path):
    """The step of the last row of a log; -1 where there is none."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return row_of(lines[-1]).get("step", -1) if lines else -1


def repair_log(path, old, step, header):
    """Write the log again with the header and the old rows up to a step; returns that. Another file keeps `old`."""
    rows = {}
    for line in old.split(b"\n"):
        number = row_of(line).get("step")
        if isinstance(number, int) and number <= step:
            rows[number] = line + b"\n"
    kept = header + b"".join(rows[number] for number in sorted(rows))
    message = f"warning: {path} is not what it was at step {step}: {len(rows)} of its rows are kept"
    if old not in (b"", kept):
        number = 1
        while path.with_stem(f"{path.stem}_{number}").exists():
            number += 1
        copy = path.with_stem(f"{path.stem}_{number}")
        copy.write_bytes(old)
        message += f", all of it is in {copy}"
    print(message)
    with whole_file(path) as file:
        file.write(kept)
    return kept


def row_of(line):
    """The row in a line of a log, a dict; {} if there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


class LossyStream:
    """Wraps sys.stdout or sys.stderr: what cannot be written, as the disk is full or the pipe closed, is dropped."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with suppress(OSError, ValueError):  # ValueError: it is closed
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def make_printing_safe():
    """Replace stdout and stderr, so that printing never raises; characters that a terminal lacks become "?"."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # None: it was closed before Python started
        if not isinstance(stream, LossyStream):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
            setattr(sys, name, LossyStream(stream))


def print_line(line):
    """Print a line above the progress bar, without buffering."""
    with tqdm.external_write_mode():
        print(line, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# checkpoint files: dicts of tensors, numbers and strings, read with weights_only=True; never code


def save_checkpoint(path, model, **entries):
    """Write the model's weights and config, and `entries`, so that `path` is a complete file at any moment.

    The file is read back before it gets its name. OSError when it cannot be written; an earlier file at `path` remains.
    """
    content = {"format_version": FORMAT_VERSION, "config": asdict(model.config), "model": model.state_dict(), **entries}
    with whole_file(path) as file:
        torch.save(content, file)
        file.flush()
        if not is_whole(file.name):
            raise OSError("the disk did not return what was written")


@contextmanager
def whole_file(path):
    """Open a temporary binary file for writing; it is renamed to `path` once all of it is on the disk.

    OSError when it cannot be written; an earlier file at `path` remains.
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
    if os.name == "posix":  # Windows cannot open folders
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        os.fsync(folder)  # so that the new name survives a power cut
        os.close(folder)


def is_whole(path):
    """Whether a file of torch.save, a zip file, is undamaged, by the checksums (CRC-32) that it contains.

    torch.load does not compare them, and would load damaged weights.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # zipfile raises many kinds for a damaged file
        return False


def load_checkpoint(path, device="cpu"):
    """The checkpoint's dict, with tensors on `device`. OSError for a missing, damaged or foreign file."""
    try:
        open(path, "rb").close()  # so that a file without read permission is not called damaged
    except (FileNotFoundError, IsADirectoryError):
        problem = "a folder, not a checkpoint" if os.path.isdir(path) else "no such checkpoint"
        remedy = other_checkpoint(Path(path), "a run writes best.pt and ckpt.pt into its out_dir")
        raise FileNotFoundError(f"{path}: {problem}; {remedy}") from None
    if not is_whole(path):
        raise OSError(
            f"{path} is damaged or not a checkpoint: {other_checkpoint(Path(path), 'copy or train it again')}"
        )
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for files of other programs
        raise OSError(f"{path} is not a checkpoint ({type(error).__name__})") from None
    check_entries(content, path)
    return content


def other_checkpoint(path, otherwise):
    """What to do about a damaged or missing checkpoint: use the latest other file of its run, else `otherwise`."""
    others = [path.with_name(name) for name in ("ckpt.pt", PREVIOUS, "best.pt") if name != path.name]
    found = [other for other in others if other.exists() and is_whole(other)]
    if not found:
        return otherwise
    hint = " (to resume from it, rename it to ckpt.pt)" if found[0].name == PREVIOUS else ""
    return f"use {found[0]}{hint}"


def check_entries(content, path):
    """OSError unless the content of a file has the entries of a checkpoint, in a format that this version reads."""
    if not isinstance(content, dict):
        content = {}
    version = content.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise OSError(
            f"{path} has checkpoint format {version}, of a newer fgpt; this one reads up to {FORMAT_VERSION}: update it"
        )
    expected = REQUIRED_ENTRIES | {name: kind for name, kind in OPTIONAL_ENTRIES.items() if name in content}
    wrong = [name for name, kind in expected.items() if not isinstance(content.get(name), kind)]
    if not wrong and not all(torch.is_tensor(p) for p in content["model"].values()):
        wrong = ["model"]
    if wrong:
        raise OSError(f"{path} is not a checkpoint of fgpt: it has no valid {', '.join(wrong)}")


def load_model(path, device="cpu"):
    """(model in eval mode on `device`, the checkpoint's other entries, without optimizer states). Needs model.py.

    OSError when weights and config do not fit together. Warns on stderr when the weights are untrained.
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
    if least_n_weights(config) > sum(p.numel() for p in weights.values()):  # before memory is allocated for them
        raise OSError(f"{path}: its weights do not match its config, they are fewer")
    model = GPT(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise OSError(f"{path}: its weights do not match its config ({one_line(error):.200})") from None
    content.pop("optimizers", None)
    is_pretrained_here = content["stage"] == "pretrain" and "data" in content  # an imported model has no data
    if is_pretrained_here and not content.get("before") and content["step"] == 0:
        print(f"warning: {path} is NOT TRAINED, of step 0; try ckpt.pt in the same folder", file=sys.stderr)
    return model.to(device).eval(), content


def least_n_weights(config):
    """A lower bound of the number of weights: the embedding, and two matrices of each block's attention and MLP."""
    widths = config.n_head * config.head_dim + config.mlp_dim
    return config.n_embd * (config.vocab_size + 2 * config.n_layer * widths)


def one_line(text):
    """A message, or that of an exception, without line breaks."""
    return " ".join(str(text).split())


# ----------------------------------------------------------------------------------------------------------------------
# the machine: its device, one process or many


def pick_device(name="", deterministic=False):
    """The torch.device for a setting; empty: cuda where there is one. OSError for one that cannot be used.

    Also changes the whole process: TF32 on GPUs, `keep_freed_memory` on CPUs, and with `deterministic` only kernels
    that compute the same bits every time.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # AssertionError: this torch was built without CUDA
        raise OSError(f"device {name!r} cannot be used here: try --device=cpu") from None
    if device.type == "cuda":
        with warnings.catch_warnings():  # torch 2.9 recommends fp32_precision, after which parts of its compiler fail
            warnings.simplefilter("ignore")
            torch.set_float32_matmul_precision("high")  # TF32 for products that stay in fp32
        torch.backends.cuda.enable_cudnn_sdp(False)  # see fixed_shapes
    if device.type == "cpu":
        keep_freed_memory()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    if deterministic != torch.are_deterministic_algorithms_enabled():  # else the call would cost a second of imports
        torch.use_deterministic_algorithms(deterministic)
    return device


def keep_freed_memory():
    """On Linux, let the C library keep what tensors free for the next ones, instead of asking the system each time.

    Getting large tensors from the system took two thirds of the time of a step of config/small.py.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc's
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping for a single large allocation
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes: give nothing back below it


@contextmanager
def fixed_shapes():
    """Allow cuDNN's attention inside: meant for GPUs and one shape, as it plans again for each new shape.

    Users of PyTorch report 0.4 s for a plan; neither that nor its speed was measured here.
    """
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def pick_dtype(name, device, n_embd, least_width=BF16_WIDTH):
    """The dtype of matrix products for a setting: "float32" or "bfloat16". OSError for another name.

    An empty name is bfloat16 where that was measured to be faster: on GPUs that have it, and on CPUs that multiply it
    natively if n_embd is at least least_width.
    """
    if name not in ("", "float32", "bfloat16"):
        raise OSError(f"dtype {name!r} cannot be used: set float32 or bfloat16, or leave it out")
    if name:
        return name
    is_fast = False
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":  # torch has no public function for this
        is_fast = n_embd >= least_width and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bfloat16" if is_fast else "float32"


def autocast_for(device, dtype):
    """A function that returns a context manager: within it, matrix products are computed in this dtype."""
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def peak_flops(device):
    """Dense bf16 peak of the GPU in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    gpu = torch.cuda.get_device_name(device)
    return next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), None)


def peak_memory(device):
    """Largest memory of this process so far, in GB: allocated on an NVIDIA GPU, else resident; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def is_out_of_memory(error):
    """Whether a RuntimeError means that memory is full; on CPUs and in cuBLAS only its message says so."""
    return any(words in str(error) for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED"))


def join_processes(device_name=""):
    """Under torchrun: join the other processes, select this one's GPU, and let only the first process print.

    OSError when there are more processes than GPUs, or all would use the same one.
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
    # CPU tensors are sent with gloo, also on GPU machines: such messages do not wait for the GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    if not is_first_process():
        sys.stdout = open(os.devnull, "w")


def leave_processes():
    """Undo join_processes at the end of a script."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank_and_world():
    """(number of this process, number of processes): (0, 1) unless torchrun started several and they have joined."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first_process():
    """Whether this process is the one that writes files."""
    return rank_and_world()[0] == 0


def n_processes():
    """Number of processes that train together."""
    return rank_and_world()[1]


def sum_over_ranks(tensor):
    """Sum each element of a tensor over all processes, in place; returns the tensor."""
    if n_processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters):
    """Sum the gradients over all processes, in a few large calls; a process that had no rows contributes zeros."""
    if n_processes() == 1:
        return
    bucket = []
    n_elements = 0  # in the bucket
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        bucket.append(p.grad)
        n_elements += p.numel()
        if n_elements >= BUCKET:
            sum_bucket(bucket)
            bucket = []
            n_elements = 0
    if bucket:
        sum_bucket(bucket)


def sum_bucket(tensors):
    """Sum each tensor over all processes, in place, in one call: a small call takes as long as a large one."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def broadcast_from_first(value):
    """Return the first process's value in every process."""
    if n_processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]
