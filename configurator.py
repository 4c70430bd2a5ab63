"""Settings for a stage script: Python config files and --name=value arguments over its module-level names.

A script ends with `configure(globals()); main()`. Its settings are its lower-case module-level names that hold a
plain value; the command line changes them in order, the last one wins:

    python train.py config/shakespeare.py --learning_rate=1e-3 --out_dir=out/try

A config file is Python that is executed with the current settings visible, so it may compute. It is code: run only
those you trust. Names in it that start with `_`, modules, functions and classes are its own business.
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

# PyTorch's CPU threads spin while they wait for one another. When another process wants the core, that made a step of a
# small model 50 times slower: spin briefly, then sleep. It has to be set before torch is imported, so scripts import
# this file first.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

PLAIN = (bool, int, float, str, tuple, list, type(None))


def configure(namespace):
    """Apply sys.argv to the settings in `namespace` (a script's globals()), in place.

    Prints the settings and exits 0 on --help; prints one line to stderr and exits 2 when an argument is wrong.
    From here on, bad input found by the script is one line as well (see `one_line_errors`).
    """
    sys.excepthook = one_line_errors
    settings = settings_of(namespace)
    if "--help" in sys.argv[1:] or "-h" in sys.argv[1:]:
        print(help_text(namespace, settings))
        raise SystemExit(0)
    defaults = dict(settings)
    try:
        for argument in sys.argv[1:]:
            apply_argument(argument, settings, defaults)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    namespace.update(settings)


def settings_of(namespace):
    """The settings among a script's globals(): lower-case names with plain values, as a dict."""
    return {n: v for n, v in namespace.items() if n.islower() and not n.startswith("_") and isinstance(v, PLAIN)}


def apply_argument(argument, settings, defaults):
    """Change `settings` by one command-line argument: a config file's path, --name=value, or --flag."""
    if not argument.startswith("--"):
        return apply_file(argument, settings, defaults)
    name, has_value, text = argument[2:].partition("=")
    check_known(name, defaults)
    default = defaults[name]
    if not has_value:
        if not isinstance(default, bool):
            raise ValueError(f"--{name} needs a value: --{name}={default!r}")
        value = True
    elif isinstance(default, str):
        value = text
    else:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
    settings[name] = check_type(name, value, default)


def apply_file(path, settings, defaults):
    if not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(f"{path}: no such config file (settings are --name=value, config files end in .py)")
    names = dict(settings)
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), names)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = lines[-1] if lines else getattr(error, "lineno", "?")
        raise ValueError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    for name, value in names.items():
        own = name.startswith("_") or callable(value) or isinstance(value, types.ModuleType)
        if name in settings or not own:
            try:
                check_known(name, defaults)
                settings[name] = check_type(name, value, defaults[name])
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None


def check_known(name, defaults):
    if name not in defaults:
        near = difflib.get_close_matches(name, defaults, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the settings"
        raise ValueError(f"unknown setting {name}: {hint}")


def check_type(name, value, default):
    """The value to store, or ValueError. An int is fine for a float; a default of None accepts anything."""
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if default is not None and type(value) is not type(default):
        raise ValueError(f"{name} must be {type(default).__name__} (default {default!r}), not {value!r}")
    return value


def help_text(namespace, settings):
    """The script's docstring, then name, default and comment of every setting, in 80 columns."""
    lines = [(namespace.get("__doc__") or "").strip(), "", "settings (--name=value):"]
    source = Path(namespace["__file__"]).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^(\w+) = [^\n]*?  # ([^\n]*)$", source, flags=re.MULTILINE))
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
    """sys.excepthook: bad input is one line on stderr; a bug keeps its traceback.

    Bad input is any OSError, and a ValueError that this folder's code raised itself; a GPU whose memory is full gets a
    line as well. FGPT_TRACEBACK=1 shows all.
    """
    if kind is KeyboardInterrupt:
        return print("\nstopped", file=sys.stderr)
    frames = traceback.extract_tb(trace)
    file = Path(frames[-1].filename).resolve() if frames else Path()
    raised_here = file.is_relative_to(Path(__file__).resolve().parent) and "site-packages" not in file.parts
    out_of_memory = kind.__name__ == "OutOfMemoryError"  # torch's, which is not imported here
    bad_input = issubclass(kind, OSError) or (issubclass(kind, ValueError) and raised_here) or out_of_memory
    if out_of_memory:
        text = (
            "the GPU's memory is full: use a smaller batch or --activation_checkpointing=True (--force=True to resume)"
        )
    else:
        text = " ".join(str(error).split())
    if bad_input and not os.environ.get("FGPT_TRACEBACK"):
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
