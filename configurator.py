"""Settings for a stage script: Python config files and --name=value arguments over its module-level names.

A script ends with `configure(globals()); main()`. Its settings are its lower-case module-level names that hold a
plain value. The command line changes them from left to right; the last value wins:

    python train.py config/shakespeare.py --learning_rate=1e-3 --out_dir=out/try

A config file is Python. It sees the current settings and may compute with them. It is code: run only those you trust.
Names that start with `_`, modules, functions and classes in it are not taken for settings.
"""

import ast
import difflib
import os
import re
import sys
import textwrap
import traceback
import types
from pathlib import Path

# PyTorch's CPU threads spin while they wait for each other. When another process needs the core, that makes a step of a
# small model up to 50 times slower, so let them spin briefly, then sleep. The variable must be set before torch is
# imported: scripts import this file first.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

PLAIN = (bool, int, float, str, tuple, list, type(None))  # types that a setting may have

# What to suggest for settings that people know from nanoGPT and other projects.
RENAMED = {  # their name: our names for it; the first one that the script has is suggested
    "max_iters": ("max_steps", "epochs"),
    "max_steps": ("epochs",),
    "num_epochs": ("epochs",),
    "warmup_iters": ("warmup_steps",),
    "lr": ("learning_rate",),
    "save_interval": ("checkpoint_interval",),
    "checkpoint_dir": ("out_dir",),
    "dataset": ("data_dir", "source"),
    "context_length": ("block_size",),
    "model_type": ("family",),
    "precision": ("dtype",),
    "resume": ("init_from",),
    "out_dir": ("checkpoint",),
    "start": ("prompt",),
    "total_batch_size": ("tokens_per_step", "rows_per_step", "pairs_per_step"),
    "gradient_accumulation_steps": ("tokens_per_step", "rows_per_step", "pairs_per_step"),
    "wandb_log": ("tracker",),
}
NO_COUNTERPART = {  # their name: (a setting of ours, the hint to give in scripts that have this setting)
    "dropout": ("max_steps", "there is no dropout; best.pt keeps the weights with the lowest validation loss"),
    "bias": ("family", "the family decides: gpt2 has biases, modern has none"),
    "vocab_size": ("family", "the tokenizer decides"),
    "always_save_checkpoint": ("out_dir", "ckpt.pt is always written, best.pt at the lowest validation loss"),
    "min_lr": ("final_lr_fraction", "use final_lr_fraction, a share of learning_rate"),
    "lr_decay_iters": ("decay_fraction", "use decay_fraction, the share of the run in which the rate decays"),
    "decay_lr": ("decay_fraction", "decay_fraction=0 keeps the rate constant"),
    "eval_iters": ("eval_tokens", "use eval_tokens, a number of tokens"),
    "eval_only": ("out_dir", "hellaswag.py scores a checkpoint"),
    "max_new_tokens": ("sample_interval", "sample.py has it"),
    "beta1": ("learning_rate", "it is 0.9 for AdamW"),
    "backend": ("device", "NCCL is used on GPUs, gloo on CPUs"),
    "wandb_project": ("tracker", "tracker uses the project fgpt"),
    "wandb_run_name": ("tracker", "tracker names the run after out_dir"),
}


class BadInput(ValueError):
    """A person has to fix something: an argument, a setting, a file. Shown as one line that says what to do."""


def configure(namespace):
    """Apply sys.argv to the settings in `namespace` (a script's globals()), in place.

    Prints the settings and exits 0 on --help; prints one line to stderr and exits 2 when an argument is wrong.
    Also installs `one_line_errors`, so that bad input that the script finds later is shown as one line too.
    """
    sys.excepthook = one_line_errors
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show is a question mark, not an error
    settings = settings_of(namespace)
    if "--help" in sys.argv[1:] or "-h" in sys.argv[1:]:
        print(help_text(namespace, settings))
        raise SystemExit(0)
    defaults = dict(settings)
    problems = []
    for argument in sys.argv[1:]:
        try:
            apply_argument(argument, settings, defaults)
        except (BadInput, OSError) as error:
            problems.append(one_line(error))
    if problems:
        print(f"{Path(sys.argv[0]).name}: {'; '.join(problems)}", file=sys.stderr)
        raise SystemExit(2)
    namespace.update(settings)


def settings_of(namespace):
    """The settings among a script's globals(): lower-case names with plain values, as a dict."""
    settings = {}
    for name, value in namespace.items():
        if name.islower() and not name.startswith("_") and isinstance(value, PLAIN):
            settings[name] = value
    return settings


def apply_argument(argument, settings, defaults):
    """Change `settings` by one command-line argument: a config file's path, --name=value, or --flag."""
    if not argument.startswith("--"):
        apply_file(expand_home(argument), settings, defaults)
        return
    name, has_value, text = argument[2:].partition("=")
    check_known(name, defaults)
    default = defaults[name]
    if not has_value and not isinstance(default, bool | None):
        raise BadInput(f"--{name} needs a value, without a space: --{name}=...")
    if not has_value:
        value = True  # a flag, such as --overwrite
    elif isinstance(default, str):
        value = text
    else:
        value = parse_literal(text)
    settings[name] = to_setting(name, value, default)


def parse_literal(text):
    """The text parsed as a Python literal; the text itself if it is not one."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def apply_file(path, settings, defaults):
    """Execute a config file and change `settings` by the names that it defines."""
    if not path.endswith(".py") or not Path(path).is_file():
        raise BadInput(f"{path}: no such config file (settings are --name=value, config files end in .py)")
    names = {**settings, "__file__": path}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8-sig"), path, "exec"), names)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = lines[-1] if lines else getattr(error, "lineno", "?")
        raise BadInput(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    problems = []
    for name, value in names.items():
        is_for_the_file = name.startswith("_") or callable(value) or isinstance(value, types.ModuleType)
        if is_for_the_file and name not in settings:  # a setting that was set to a function is an error
            continue
        try:
            check_known(name, defaults)
            settings[name] = to_setting(name, value, defaults[name])
        except BadInput as error:
            problems.append(str(error))
    if problems:
        raise BadInput(f"{path}: {'; '.join(problems)}")


def check_known(name, defaults):
    """BadInput for a name that is not a setting, with a hint at the setting that was probably meant."""
    if name in defaults:
        return
    renamed = [known for known in RENAMED.get(name, ()) if known in defaults]
    needed, answer = NO_COUNTERPART.get(name, ("", ""))
    similar = difflib.get_close_matches(name, defaults, n=1, cutoff=0.75)
    if renamed:
        hint = f"use {renamed[0]}"
    elif needed in defaults:
        hint = answer
    elif similar and not answer:
        hint = f"did you mean {similar[0]}?"
    else:
        hint = "--help lists the settings"
    raise BadInput(f"unknown setting {name}: {hint}")


def to_setting(name, value, default):
    """The value as the setting stores it: a float where the default is one, ~ expanded in paths. BadInput if unfit."""
    check_type(name, value, default)
    if isinstance(default, float):
        return float(value)
    if isinstance(default, str) and name not in ("prompt", "sample_prompt"):
        return expand_home(value)
    return value


def check_type(name, value, default):
    """BadInput for a value of another type than the default's; a default of None takes anything, a float an int too.

    A float must be finite: with NaN all comparisons are false, and a rate or a time limit is never infinite.
    """
    is_int_for_float = type(value) is int and type(default) is float
    if default is not None and type(value) is not type(default) and not is_int_for_float:
        raise BadInput(f"{name} must be {type(default).__name__} (default {default!r}), not {value!r}")
    if type(default) is float and not -sys.float_info.max <= value <= sys.float_info.max:
        raise BadInput(f"{name} must be a finite number, not {value}")


def expand_home(text):
    """Replace ~ at the beginning of a path, or of each of several with commas between: shells do not after `=`."""
    return re.sub(r"(^|,\s*)~(?=/|,|$)", lambda found: f"{found[1]}{Path.home()}", text)


def check_settings(settings, at_least_1=(), rules=()):
    """BadInput that lists everything that is wrong with a script's settings.

    Numbers must be at least 0, those named in at_least_1 at least 1. rules: (whether it holds, what must hold) pairs.
    """
    problems = []
    for name, value in settings.items():
        least = 1 if name in at_least_1 else 0
        if isinstance(value, int | float) and not value >= least:
            problems.append(f"{name} must be at least {least}, not {value}")
    problems += [text for holds, text in rules if not holds]
    if problems:
        raise BadInput("; ".join(problems))


def help_text(namespace, settings):
    """The script's docstring, then name, default and comment of every setting, in 80 columns."""
    lines = [(namespace.get("__doc__") or "").strip(), "", "settings (--name=value):"]
    source = Path(namespace["__file__"]).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^(\w+) = .*?  # (.*)$", source, flags=re.MULTILINE))  # name = value  # comment
    for name, value in settings.items():
        head = f"  --{name}={value if isinstance(value, str) else repr(value)}"
        body = textwrap.wrap(comments.get(name, ""), 80 - 34) or [""]
        if len(head) > 32:
            lines.append(head)
            head = ""
        lines.append(f"{head:<34}{body[0]}".rstrip())
        lines.extend(" " * 34 + text for text in body[1:])
    return "\n".join(lines)


def one_line_errors(kind, error, trace):
    """sys.excepthook: what a person has to fix is one line on stderr; a bug keeps its traceback.

    Besides BadInput these are OSError (files, network, devices), FloatingPointError (a model that has diverged), and a
    GPU whose memory is full. FGPT_TRACEBACK=1 shows the traceback of these too.
    """
    script = Path(sys.argv[0]).name
    out_of_memory = kind.__name__ == "OutOfMemoryError"  # torch's, which is not imported here
    if kind is KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
    elif kind is BrokenPipeError:  # the program that reads the output, such as `head`, has closed the pipe
        # Python flushes stdout when it exits, which would raise this error again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif os.environ.get("FGPT_TRACEBACK"):
        sys.__excepthook__(kind, error, trace)
    elif out_of_memory:
        remedy = "use a smaller batch, or in train.py --activation_checkpointing=True (with --force=True to resume)"
        print(f"{script}: the GPU's memory is full: {remedy}", file=sys.stderr)
    elif issubclass(kind, BadInput | OSError | FloatingPointError):
        print(f"{script}: {one_line(error)}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def one_line(error):
    """An exception's message without line breaks."""
    return " ".join(str(error).split())
