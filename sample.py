"""Generate text: a pretrained model continues text, a finetuned one chats.

    python sample.py --checkpoint=out/shakespeare/best.pt --prompt="ROMEO:"
    python sample.py --checkpoint=out/finetune/best.pt

With --prompt or --prompt_file it answers that and exits. Without, it answers
each line that you type, or that comes through a pipe; but a pretrained model
with --num_samples=3 writes three documents that start from no text. In a chat,
/reset starts a new conversation, and /system TEXT starts one with TEXT as the
system message. At the keyboard, Ctrl-C stops an answer and Ctrl-D exits. Writes
no files.
"""

import codecs
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from configurator import BadInput, check_settings, configure, settings_of

import torch

from run import BF16_WIDTH_DECODING, autocast_for, load_model, pick_device, pick_dtype
from tokenizer import tokenizer_of_checkpoint

checkpoint = "out/fgpt_712m/best.pt"  # file of train.py, finetune.py or dpo.py
prompt = ""  # text to continue or question to answer; empty: read lines
prompt_file = ""  # a file with that text; a line break at its end is ignored
chat = None  # True: a conversation, False: completion; None: by the stage that wrote the checkpoint
num_samples = 1  # answers to the prompt, generated together; above 1 without a prompt: new documents
max_new_tokens = 256  # longest answer, tokens
temperature = 0.8  # 0: always the most likely token
top_k = 50  # sample among this many most likely tokens; 0: all
top_p = 1.0  # sample among the fewest tokens that together have this probability
seed = 1337  # the same seed gives the same text
speed = False  # print tokens/s at the end, on stderr
device = ""  # cpu, cuda, ...; empty: cuda where there is one
dtype = ""  # float32 or bfloat16; empty: bfloat16 where it was measured to be faster
compile = None  # torch.compile: the first answer starts later, then all are faster; None: on a GPU that reads lines


def main():
    settings = settings_of(globals())
    check(settings)
    text = read_prompt()
    device = pick_device(settings["device"])
    model, stored = load_for_decoding(settings, device)
    tokenizer = tokenizer_of_checkpoint(stored)
    block_size = model.config.block_size
    is_chat = chat
    if chat is None:
        is_chat = stored["stage"] != "pretrain"
    reads_lines = not text and num_samples == 1
    if is_chat and not text and not reads_lines:
        raise BadInput("num_samples needs a prompt in a chat")
    compiled = compile
    if compile is None:
        compiled = reads_lines and device.type == "cuda"  # one graph a token instead of hundreds of launches
    if compiled:
        print("compiling: the first answer starts later, then all are faster (--compile=False)", file=sys.stderr)
    cache = None
    if reads_lines:  # one cache for all lines, so that a conversation is not computed again for each question
        cache = model.new_cache(1, block_size, static=compiled)
    generator = torch.Generator(device).manual_seed(seed)
    stopwatch = Stopwatch()

    def generate(ids):
        """The steps of GPT.generate: the next id of each sample, a tensor (num_samples,) per step."""
        steps = model.generate(
            [ids] * num_samples, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            stop=tokenizer.eot, generator=generator, cache=cache, compile=compiled,
        )  # fmt: skip
        return stopwatch.measure(steps)

    answer = partial(print_answer, generate, tokenizer, block_size)
    shown_prompt = "" if is_chat else text  # a text that is continued is printed from its beginning
    if reads_lines and is_chat:
        converse(answer, tokenizer, block_size, max_new_tokens)
    elif reads_lines:
        continue_lines(answer, tokenizer)
    elif num_samples == 1:
        answer(prompt_ids(tokenizer, text, is_chat), shown_prompt)
    else:
        print_samples(generate, tokenizer, block_size, prompt_ids(tokenizer, text, is_chat), shown_prompt)
    if speed and stopwatch.tokens:
        rate = stopwatch.tokens / stopwatch.seconds
        print(f"{stopwatch.tokens:,} tokens in {stopwatch.seconds:.2f} s: {rate:.1f} tokens/s", file=sys.stderr)


def check(settings):
    """BadInput that names every setting that cannot be used."""
    rules = [
        (chat in (None, True, False), "chat must be None, True or False"),
        (compile in (None, True, False), "compile must be None, True or False"),
        (0 < top_p <= 1, "top_p must be above 0 and at most 1"),
        (not (prompt and prompt_file), "prompt and prompt_file exclude each other"),
    ]
    check_settings(settings, ("max_new_tokens", "num_samples"), rules)


def read_prompt():
    """The text of the prompt; "" when there is none. OSError for an unreadable file, BadInput for one without text."""
    if not prompt_file:
        return prompt
    text = Path(prompt_file).read_text(encoding="utf-8-sig", errors="replace")
    if not text.strip():
        raise BadInput(f"--prompt_file={prompt_file} is empty")
    if "\0" in text:
        raise BadInput(f"--prompt_file={prompt_file} is not a text")
    return text.removesuffix("\n")


def load_for_decoding(settings, device):
    """(model, other entries of its checkpoint), with the weights in the dtype and layout that decode fastest."""
    model, stored = load_model(settings["checkpoint"], device)
    dtype = pick_dtype(settings["dtype"], device, model.config.n_embd, BF16_WIDTH_DECODING)
    with autocast_for(device, dtype)():
        model.for_decoding()
    return model, stored


@dataclass
class Stopwatch:
    """Counts tokens and the seconds that it took to generate them; printing them is not timed."""

    tokens: int = 0
    seconds: float = 0.0

    def measure(self, steps):
        """Yield the same steps, counting and timing them."""
        start = time.perf_counter()
        for ids in steps:
            self.tokens += int((ids >= 0).sum())
            self.seconds += time.perf_counter() - start
            yield ids
            start = time.perf_counter()


# ----------------------------------------------------------------------------------------------------------------------
# a chat, or lines to continue


def converse(answer, tokenizer, block_size, max_new_tokens):
    """Chat until the input ends. answer(ids): prints and returns the text that follows the ids."""
    history = []
    if sys.stdin.isatty():
        print("[/reset: new conversation, /system TEXT: one with this system message, Ctrl-C: stop, Ctrl-D: exit]")
    for line in read_lines("you: "):
        command, _, text = line.strip().partition(" ")
        if command == "/reset":
            history = [message for message in history if message["role"] == "system"]
            print("[new conversation]")
        elif command == "/system":
            history = []
            if text.strip():
                history.append({"role": "system", "content": text.strip()})
            print("[new conversation]")
        else:
            try:
                ids, kept = fit_into_context(tokenizer, line, history, block_size, max_new_tokens)
            except BadInput as error:
                print(f"[{error}]")
                continue
            if len(kept) < len(history):
                print(f"[the context is full: oldest turns dropped: {(len(history) - len(kept)) // 2}]")
            history = [*kept, {"role": "user", "content": line}, {"role": "assistant", "content": answer(ids)}]


def continue_lines(answer, tokenizer):
    """Continue each line of the input as a separate text. answer(ids): prints the text that follows the ids."""
    for line in read_lines("text to continue: "):
        try:
            answer(prompt_ids(tokenizer, line, is_chat=False))
        except BadInput as error:
            print(f"[{error}]")


def read_lines(label):
    """Yield lines that are not empty, from the keyboard or a pipe, until it ends. Ctrl-C discards a typed line."""
    is_keyboard = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8 are no error
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  (makes the arrow keys work in input)
    while True:
        try:
            line = input(label if is_keyboard else "")
        except KeyboardInterrupt:
            if not is_keyboard:
                raise
            print("\n[Ctrl-D exits]")
            continue
        except EOFError:
            if is_keyboard:
                print()
            return
        if line.strip():
            yield line


# ----------------------------------------------------------------------------------------------------------------------
# from text to ids


def prompt_ids(tokenizer, text, is_chat, history=()):
    """The ids for the model to continue: the beginning of a document, or a conversation up to the answer."""
    if not is_chat:
        return [tokenizer.eot, *tokenizer.encode(text)]
    ids, _ = tokenizer.render([*history, {"role": "user", "content": text}])
    return [*ids, tokenizer.assistant]


def fit_into_context(tokenizer, text, history, block_size, max_new_tokens):
    """(ids of a conversation with the question `text`, the messages of `history` that are kept in it).

    Drops the oldest questions, with their answers, until max_new_tokens, or a quarter of the context if that is less,
    are left for the answer. Keeps system messages. BadInput if the question alone is too long.
    """
    longest = block_size - min(max_new_tokens, block_size // 4)
    system = [message for message in history if message["role"] == "system"]
    turns = [message for message in history if message["role"] != "system"]
    while True:
        ids = prompt_ids(tokenizer, text, True, [*system, *turns])
        if len(ids) <= longest:
            return ids, [*system, *turns]
        if not turns:
            raise BadInput(f"that is {len(ids)} tokens; with an answer only {longest} fit into the context")
        turns = turns[2:]  # without the oldest question and answer


# ----------------------------------------------------------------------------------------------------------------------
# from ids to text


def print_answer(generate, tokenizer, block_size, ids, before=""):
    """Print what follows the ids as it is generated; returns that text. before: text to print before it."""
    check_length(ids, block_size)
    print(before, end="", flush=True)
    return print_pieces(decode_stream(tokenizer, generate(ids), max_tokens=block_size + 1 - len(ids)))


def print_samples(generate, tokenizer, block_size, ids, before=""):
    """Print num_samples texts that follow the ids, with headings, when all are complete. before: as in print_answer."""
    check_length(ids, block_size)
    rows = torch.stack(list(generate(ids)), dim=1)  # (num_samples, number of steps), -1 after the end of each
    for number, row in enumerate(rows, 1):
        print(f"--- {number} of {num_samples}")
        print(before, end="", flush=True)
        print_pieces(decode_stream(tokenizer, row[row >= 0], max_tokens=block_size + 1 - len(ids)))


def check_length(ids, block_size):
    """BadInput if a prompt does not fit into the context."""
    if len(ids) > block_size:
        raise BadInput(f"the prompt has {len(ids)} tokens, the context holds {block_size}")


def decode_stream(tokenizer, generated, max_tokens=None):
    """Yield the text of generated ids, an iterator of tensors with one id, until the end token; splits no character.

    max_tokens: how many fit into the context; if no end token came until then, a note goes to stderr.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # keeps the bytes of an incomplete character
    for count, next_id in enumerate(generated, 1):
        if int(next_id) == tokenizer.eot:
            break
        yield decoder.decode(tokenizer.decode_bytes([int(next_id)]))
        if count == max_tokens:
            print(" [the context is full]", end="", file=sys.stderr, flush=True)
    yield decoder.decode(b"", final=True)


def print_pieces(pieces):
    """Print pieces of text as they come; returns the whole text. At the keyboard, Ctrl-C stops it early."""
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


if __name__ == "__main__":
    configure(globals())
    main()
