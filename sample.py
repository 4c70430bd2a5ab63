"""Talk to a checkpoint: a base model continues text, a finetuned one chats in one or more turns (the last stage).

    python sample.py --checkpoint=out/shakespeare/best.pt --prompt="ROMEO:" --num_samples=2
    python sample.py --checkpoint=out/finetune/best.pt

With --prompt it answers once and ends. Without, it reads lines: from the keyboard, or from a pipe until its end. In a
chat, /reset forgets the conversation, Ctrl-C stops an answer and Ctrl-D leaves. It writes nothing.
"""

import codecs
import sys
from functools import partial

from configurator import configure

import torch

from model import load_model, pick_device
from tokenizer import Tokenizer

checkpoint = "out/fgpt_712m/best.pt"  # file of train.py, finetune.py or dpo.py
prompt = ""  # text to continue or question to answer; empty: read lines
chat = None  # True: a conversation, False: completion; None: by the stage that wrote the checkpoint
num_samples = 1  # answers to --prompt
max_new_tokens = 256  # longest answer, tokens
temperature = 0.8  # 0: always the likeliest token
top_k = 50  # sample among so many likeliest tokens; 0: all
seed = 1337  # the same seed gives the same text
device = ""  # cpu, cuda, ...; empty: cuda where there is one
dtype = ""  # float32 or bfloat16; empty: bfloat16 on GPUs that have it


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
    """Print pieces as they come; returns the whole text. Ctrl-C ends it early."""
    text = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return text


def prompt_ids(tokenizer, text, is_chat, history=()):
    """Ids that the model is to continue: a new document's beginning, or a conversation up to the answer."""
    if not is_chat:
        return [tokenizer.eot, *tokenizer.encode(text)]
    ids, _ = tokenizer.render([*history, {"role": "user", "content": text}])
    return [*ids, tokenizer.assistant]


def fit_into_context(tokenizer, text, history, block_size, room):
    """(ids, history) with the oldest whole turns dropped until `room` tokens are left for the answer.

    ValueError if the question alone is too long.
    """
    room = min(room, block_size // 4)
    while len(ids := prompt_ids(tokenizer, text, True, history)) > block_size - room:
        if not history:
            raise ValueError(f"that is {len(ids)} tokens; with an answer only {block_size - room} fit into the context")
        history = history[2:]
    return ids, history


def read_lines(label):
    """Lines from the keyboard or a pipe, until Ctrl-D or its end."""
    label = label if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(label)
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line


def converse(answer, tokenizer, block_size, room):
    """Chat until the input ends. answer(ids) prints and returns the text that follows the ids."""
    history = []
    for line in read_lines("you: "):
        if line.strip() == "/reset":
            history = []
            print("[the conversation is forgotten]")
            continue
        try:
            ids, kept = fit_into_context(tokenizer, line, history, block_size, room)
        except ValueError as error:
            print(f"[{error}]")
            continue
        if len(kept) < len(history):
            print(f"[the context is full: oldest turns dropped: {(len(history) - len(kept)) // 2}]")
        text = answer(ids)
        history = [*kept, {"role": "user", "content": line}, {"role": "assistant", "content": text}]


def main():
    if chat not in (None, True, False) or temperature < 0 or max_new_tokens < 1:
        raise ValueError("chat must be None, True or False, temperature at least 0 and max_new_tokens at least 1")
    compute, autocast = pick_device(device, dtype)
    model, stored = load_model(checkpoint, compute)
    tokenizer = Tokenizer(stored["tokenizer"])
    is_chat = stored["stage"] != "pretrain" if chat is None else chat
    generator = torch.Generator(compute).manual_seed(seed)
    generate = partial(model.generate, temperature=temperature, top_k=top_k, stop=tokenizer.eot, generator=generator)

    def answer(ids):
        with autocast():
            room = model.config.block_size - len(ids) + 1
            return say(stream(tokenizer, generate([ids], max_new_tokens), room))

    if prompt:
        for _ in range(num_samples):
            print("" if is_chat else prompt, end="")
            answer(prompt_ids(tokenizer, prompt, is_chat))
    elif is_chat:
        converse(answer, tokenizer, model.config.block_size, max_new_tokens)
    else:
        for line in read_lines("text to continue: "):
            try:
                answer(prompt_ids(tokenizer, line, False))
            except ValueError as error:
                print(f"[{error}]")


if __name__ == "__main__":
    configure(globals())
    main()
