"""Text to token ids and back, and the rendering of conversations. Needs numpy and tiktoken: copy this file.

Three tokenizers with one interface: `gpt2` (GPT-2's byte-pair encoding, by tiktoken), `bytes` (UTF-8 bytes, which need
no vocabulary file), and byte-pair encoding with a vocabulary of your own, made by tools/train_tokenizer.py. All have
three control tokens after their ordinary ones:

    <|endoftext|>   starts a document, and ends an answer
    <|user|>        starts a user's turn
    <|assistant|>   starts an answer

Text is always encoded as ordinary text: an "<|endoftext|>" that somebody typed never becomes a control token.
"""

import base64
import hashlib
from pathlib import Path

import numpy as np

BUILT_IN = ("gpt2", "bytes")
SPECIALS = ("<|endoftext|>", "<|user|>", "<|assistant|>")
VOCABULARY = "vocabulary.tiktoken"  # the file of a vocabulary of your own: a line for each token, in base64, and its id


class BadConversation(ValueError):
    """The roles of a conversation are not user, assistant, user, ..."""


class Tokenizer:
    """`Tokenizer("gpt2")`, `Tokenizer("bytes")`, or `Tokenizer("data/tok")`: a folder or file with your own vocabulary,
    or a checkpoint (.pt), which names its tokenizer and holds your own vocabulary.

    name: gpt2, bytes, or bpe- and a checksum of the vocabulary. vocabulary: the text of its file, "" for the other two.
    n_vocab: number of ids that exist (50,259, 259, or three more than the vocabulary has). eot, user, assistant: ids of
    the control tokens. FileNotFoundError where there is no vocabulary, OSError for a file that is none, and when
    tiktoken cannot get GPT-2's.
    """

    def __init__(self, name, vocabulary=""):
        if str(name).endswith(".pt"):
            name, vocabulary = read_checkpoint(name)
        self.name = name
        self.vocabulary = vocabulary
        self.bpe = None
        if name == "gpt2":
            self.bpe = load_gpt2()
        elif name != "bytes":
            self.vocabulary = vocabulary or read_vocabulary(name)
            self.name = f"bpe-{hashlib.sha256(self.vocabulary.encode()).hexdigest()[:8]}"
            self.bpe = load_vocabulary(self.vocabulary, name)
        n_ordinary = self.bpe.n_vocab - len(SPECIALS) if self.bpe else 256
        self.eot, self.user, self.assistant = range(n_ordinary, n_ordinary + len(SPECIALS))
        self.n_vocab = n_ordinary + len(SPECIALS)

    def encode(self, text):
        """List of ids, never those of control tokens."""
        if self.bpe:
            return self.bpe.encode_ordinary(text)
        return list(text.encode("utf-8", errors="replace"))

    def encode_document(self, text):
        """(n,) uint16 array: the end token, then the ids of `encode`. Faster, because it makes no Python list."""
        if self.bpe:
            ids = self.bpe.encode_to_numpy(text, disallowed_special=())
        else:
            ids = np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8)
        return np.concatenate(([self.eot], ids), dtype=np.uint16, casting="unsafe")

    def decode(self, ids):
        """Text of the ids."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):
        """UTF-8 bytes of the ids. A character may be split between tokens, so join bytes before decoding them."""
        if self.bpe:
            return self.bpe.decode_bytes(ids)
        return b"".join(bytes([i]) if i < 256 else SPECIALS[i - 256].encode() for i in ids)

    def token_bytes(self):
        """(n_vocab,) int64: how many bytes of text each token stands for; control tokens stand for none."""
        lengths = np.array([len(self.decode_bytes([i])) for i in range(self.n_vocab)])
        lengths[self.eot :] = 0
        return lengths

    def render(self, messages):
        """A conversation as (ids, mask): `<|user|>question<|assistant|>answer<|endoftext|>`, repeated for more turns.

        messages: dicts with `role` and `content`. User and assistant take turns, the user starts; one system message
        may come first and is prepended to the first question. mask is 1 exactly on each answer and its end token, but
        0 on an answer with `train` False. To ask for an answer, end with the user's turn and append `assistant`.
        BadConversation for another order.
        """
        turns = list(messages)
        if turns and turns[0]["role"] == "system":
            system = turns.pop(0)["content"]
            if turns:
                turns[0] = {**turns[0], "content": system + "\n\n" + turns[0]["content"]}
        ids = []
        mask = []
        for position, message in enumerate(turns):
            if message["role"] != ("user", "assistant")[position % 2]:
                roles = ", ".join(m["role"] for m in messages)
                raise BadConversation(f"a conversation is user, assistant, user, ... (one system first), not {roles}")
            text = self.encode(message["content"])
            if message["role"] == "user":
                ids += [self.user, *text]
                mask += [0] * (1 + len(text))
            else:
                ids += [self.assistant, *text, self.eot]
                mask += [0] + [int(message.get("train", True))] * (len(text) + 1)
        return ids, mask


def tokenizer_of(stored):
    """The tokenizer of a checkpoint, which holds a vocabulary of your own itself."""
    return Tokenizer(stored["tokenizer"], stored.get("vocabulary", ""))


def tokenizer_in(folder, name):
    """The tokenizer of this name that a folder of token shards was made with; it holds a vocabulary of your own.

    OSError when that is lost or another one.
    """
    if name in BUILT_IN:
        return Tokenizer(name)
    path = Path(folder, VOCABULARY)
    tokenizer = Tokenizer(str(path)) if path.is_file() else None
    if tokenizer is None or tokenizer.name != name:
        raise OSError(f"{path}: must be the vocabulary of {name}, with which the shards were made: copy it there")
    return tokenizer


def read_checkpoint(path):
    """(name of the tokenizer, text of a vocabulary of your own or "") of a checkpoint. OSError when it has none."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content["tokenizer"], content.get("vocabulary", "")
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged file raises
        raise OSError(f"{path}: not a checkpoint that names its tokenizer ({type(error).__name__})") from None


def read_vocabulary(path):
    """The text of a vocabulary's file, or of the one in a folder. FileNotFoundError where there is none."""
    file = Path(path)
    if file.is_dir():
        file = file / VOCABULARY
    if not file.is_file():
        raise FileNotFoundError(
            f"tokenizer must be gpt2, bytes, a folder with the {VOCABULARY} of tools.train_tokenizer, or a checkpoint, "
            f"not {path!r}"
        )
    return file.read_text(encoding="ascii", errors="replace")


def vocabulary_text(tokens):
    """The text of a vocabulary's file, of tokens (bytes) in the order in which they are merged."""
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


def load_vocabulary(text, where):
    """A tiktoken encoding that splits text as GPT-2's does. OSError when the text is not a vocabulary."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = {}
    try:
        for line in text.splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        ranks = {}
    is_whole = sorted(ranks.values()) == list(range(len(ranks))) and all(bytes([i]) in ranks for i in range(256))
    if not is_whole:
        raise OSError(f"{where}: not a vocabulary in tiktoken's form: make it with python -m tools.train_tokenizer")
    if len(ranks) + len(SPECIALS) > 2**16:
        raise OSError(f"{where}: has {len(ranks):,} tokens; with the control tokens, token shards hold at most 65,536")
    specials = {special: len(ranks) + i for i, special in enumerate(SPECIALS)}
    return tiktoken.Encoding(name="own", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=specials)


def load_gpt2():
    """tiktoken's GPT-2 encoding with the chat tokens added. OSError, with what to do, when it cannot be had."""
    import tiktoken

    try:
        base = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the download raises
        raise OSError(
            "tiktoken cannot get GPT-2's vocabulary: connect to the network once, or point TIKTOKEN_CACHE_DIR at a "
            f"folder that holds it, or start with --tokenizer=bytes at prepare_fineweb.py ({type(error).__name__})"
        ) from None
    specials = {text: base.n_vocab - 1 + i for i, text in enumerate(SPECIALS)}
    return tiktoken.Encoding(
        name="gpt2_chat", pat_str=base._pat_str, mergeable_ranks=base._mergeable_ranks, special_tokens=specials
    )
