"""Talk to a checkpoint: a base model continues text, a finetuned one chats.

    python sample.py --checkpoint=out/shakespeare/best.pt --prompt="ROMEO:"
    python sample.py --checkpoint=out/finetune/best.pt

With --prompt or --prompt_file it answers that and ends. Without, it reads
lines: from the keyboard, or from a pipe to its end. In a chat, /reset forgets
the conversation, and /system TEXT begins a new one that stands under TEXT. At
the keyboard, Ctrl-C stops an answer and Ctrl-D leaves. It writes nothing.
"""

import codecs
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from configurator import configure

import torch

from model import load_model, pick_device
from tokenizer import Tokenizer

checkpoint = "out/fgpt_712m/best.pt"  # file of train.py, finetune.py or dpo.py
prompt = ""  # text to continue or question to answer; empty: read lines
prompt_file = ""  # a file with that text; its last line break does not count
chat = None  # True: a conversation, False: completion; None: by the stage that wrote the checkpoint
num_samples = 1  # answers to the prompt, made together
max_new_tokens = 256  # longest answer, tokens
temperature = 0.8  # 0: always the likeliest token
top_k = 50  # sample among so many likeliest tokens; 0: all
top_p = 1.0  # sample among the fewest tokens that together have this probability
seed = 1337  # the same seed gives the same text
speed = False  # print tokens/s at the end, on stderr
device = ""  # cpu, cuda, ...; empty: cuda where there is one
dtype = ""  # float32, bfloat16 or native (bfloat16 where it is fast); empty: float32 on CPUs, else native
compile = False  # torch.compile: the first answer starts later, then all go faster; for GPUs


def stream(tokenizer, generated, room=None):
    """Text pieces from an iterator of (1,) id tensors up to the end token; a character split over tokens is whole.

    room: tokens that fit into the context; when they are used up without an end token, stderr gets a note.
    """
    decoder, count = codecs.getincrementaldecoder("utf-8")(errors="replace"), 0
    for ids in generated:
        count += 1
        if (token := int(ids)) == tokenizer.eot:
            break
        yield decoder.decode(tokenizer.decode_bytes([token]))
    else:
        if count == room:
            print(" [the context is full]", end="", file=sys.stderr, flush=True)
    yield decoder.decode(b"", final=True)


def say(pieces):
    """Print pieces as they come; returns the whole text. At a keyboard, Ctrl-C ends it early."""
    text = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print(" [stopped]", end="")
    print()
    return text


def timed(generated, log):
    """The same steps; log gets (tokens, seconds) of each, without what is done with it afterwards."""
    start = time.perf_counter()
    for ids in generated:
        log.append((int((ids >= 0).sum()), time.perf_counter() - start))
        yield ids
        start = time.perf_counter()


def prompt_ids(tokenizer, text, is_chat, history=()):
    """Ids that the model is to continue: a new document's beginning, or a conversation up to the answer."""
    if not is_chat:
        return [tokenizer.eot, *tokenizer.encode(text)]
    ids, _ = tokenizer.render([*history, {"role": "user", "content": text}])
    return [*ids, tokenizer.assistant]


def fit_into_context(tokenizer, text, history, block_size, room):
    """(ids, history) with the oldest whole turns dropped until `room` tokens are left for the answer.

    A quarter of the context is room enough. A system message stays. ValueError if the question is too long even alone.
    """
    room, n_system = min(room, block_size // 4), sum(message["role"] == "system" for message in history)
    system, turns = history[:n_system], history[n_system:]
    while len(ids := prompt_ids(tokenizer, text, True, [*system, *turns])) > block_size - room:
        if not turns:
            raise ValueError(f"that is {len(ids)} tokens; with an answer only {block_size - room} fit into the context")
        turns = turns[2:]
    return ids, [*system, *turns]


def read_lines(label):
    """Lines from the keyboard or a pipe, until Ctrl-D or its end. Ctrl-C at the keyboard drops a line."""
    keyboard = sys.stdin.isatty()
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  (arrow keys work in input)
    while True:
        try:
            line = input(label if keyboard else "")
        except KeyboardInterrupt:
            if not keyboard:
                raise
            print("\n[Ctrl-D leaves]")
            continue
        except EOFError:
            return print() if keyboard else None
        if line.strip():
            yield line


def converse(answer, tokenizer, block_size, room):
    """Chat until the input ends. answer(ids) prints and returns the text that follows the ids."""
    history = []
    if sys.stdin.isatty():
        print("[/reset: a new conversation, /system TEXT: one under TEXT, Ctrl-C: stop an answer, Ctrl-D: leave]")
    for line in read_lines("you: "):
        command, _, text = line.strip().partition(" ")
        if command == "/reset":
            history = [message for message in history if message["role"] == "system"]
            print("[the conversation is forgotten]")
        elif command == "/system":
            history = [{"role": "system", "content": text.strip()}] if text.strip() else []
            print(f"[a new conversation, {'under that' if history else 'with no system message'}]")
        else:
            try:
                ids, kept = fit_into_context(tokenizer, line, history, block_size, room)
            except ValueError as error:
                print(f"[{error}]")
                continue
            if len(kept) < len(history):
                print(f"[the context is full: oldest turns dropped: {(len(history) - len(kept)) // 2}]")
            history = [*kept, {"role": "user", "content": line}, {"role": "assistant", "content": answer(ids)}]


def answer_once(text, n, generate, tokenizer, block_size, is_chat, log):
    """Print n answers to a prompt, each under a line of its own if there are several. ValueError if it is too long."""
    ids = prompt_ids(tokenizer, text, is_chat)
    if len(ids) > block_size:
        raise ValueError(f"the prompt has {len(ids)} tokens, into the context fit {block_size}")
    generated = timed(generate([ids] * n), log)
    # the pieces of one answer come as they are made, several answers when all are there
    rows = [generated] if n == 1 else [row[row >= 0, None] for row in torch.stack([*generated], dim=1)]
    for number, row in enumerate(rows, 1):
        if n > 1:
            print(f"--- {number} of {n}")
        print("" if is_chat else text, end="", flush=True)
        say(stream(tokenizer, row, block_size - len(ids) + 1))


def read_prompt():
    """The text of the prompt. ValueError for settings that cannot be used, OSError for a missing file."""
    problems = {
        "chat must be None, True or False": chat not in (None, True, False),
        "temperature must be at least 0": temperature < 0,
        "top_k must be at least 0": top_k < 0,
        "top_p must be above 0 and at most 1": not 0 < top_p <= 1,
        "max_new_tokens must be at least 1": max_new_tokens < 1,
        "num_samples must be at least 1": num_samples < 1,
        "prompt and prompt_file exclude one another": prompt and prompt_file,
        "num_samples needs a prompt": num_samples > 1 and not (prompt or prompt_file),
    }
    if any(problems.values()):
        raise ValueError("; ".join(problem for problem, is_there in problems.items() if is_there))
    if prompt_file and (not Path(prompt_file).exists() or Path(prompt_file).is_dir()):
        raise FileNotFoundError(f"--prompt_file={prompt_file}: no such file")
    text = prompt or (prompt_file and Path(prompt_file).read_text(encoding="utf-8", errors="replace"))
    if prompt_file and (not text.strip() or "\0" in text):
        raise ValueError(f"--prompt_file={prompt_file} {'is not a text' if text.strip() else 'is empty'}")
    return text.removesuffix("\n") if prompt_file else text


def main():
    text, log = read_prompt(), []
    for file in (sys.stdin, sys.stdout):
        if hasattr(file, "reconfigure"):  # whatever bytes come in or can go out, it is not the end
            file.reconfigure(errors="replace")
    compute, autocast = pick_device(device, dtype)
    model, stored = load_model(checkpoint, compute)
    with autocast():
        model.for_decoding()
    tokenizer = Tokenizer(stored["tokenizer"])
    is_chat = stored["stage"] != "pretrain" if chat is None else chat
    block_size = model.config.block_size
    # one cache for all that is typed: what a question has in common with the one before, its conversation, stays
    cache = None if text else model.new_cache(1, block_size, static=compile)
    generate = partial(
        model.generate, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        stop=tokenizer.eot, generator=torch.Generator(compute).manual_seed(seed), cache=cache, compile=compile,
    )  # fmt: skip

    def answer(ids):
        return say(stream(tokenizer, timed(generate([ids]), log), block_size - len(ids) + 1))

    if text:
        answer_once(text, num_samples, generate, tokenizer, block_size, is_chat, log)
    elif is_chat:
        converse(answer, tokenizer, block_size, max_new_tokens)
    else:
        for line in read_lines("text to continue: "):
            try:
                answer(prompt_ids(tokenizer, line, False))
            except ValueError as error:
                print(f"[{error}]")
    if speed and log:
        n, seconds = (sum(column) for column in zip(*log, strict=True))
        print(f"{n:,} tokens in {seconds:.2f} s: {n / seconds:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    configure(globals())
    main()
