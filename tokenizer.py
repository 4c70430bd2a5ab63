"""Text to token ids and back, and the rendering of conversations. Needs numpy and tiktoken: copy this file.

Three tokenizers with one interface: `gpt2` (GPT-2's byte-pair encoding, by tiktoken), `bytes` (each UTF-8 byte is a
token, no file is needed), and byte-pair encoding with a custom vocabulary, made by tools/train_tokenizer.py. The ids of
the ordinary tokens come first, then those of three control tokens:

    <|endoftext|>   starts a document, and ends an answer
    <|user|>        starts a user's turn
    <|assistant|>   starts an answer

Text is always encoded as ordinary text: if a user types "<|endoftext|>", it does not become a control token.
"""

import base64
import hashlib
from pathlib import Path

import numpy as np

BUILT_IN = ("gpt2", "bytes")
SPECIALS = ("<|endoftext|>", "<|user|>", "<|assistant|>")
VOCABULARY = "vocabulary.tiktoken"  # file of a custom vocabulary: a line per token, its bytes in base64 and its id


class BadConversation(ValueError):
    """The roles of a conversation are not user, assistant, user, ..."""


class Tokenizer:
    """Encodes text as ids and decodes ids.

    source: "gpt2", "bytes", the folder or file of a custom vocabulary, or a checkpoint (.pt), whose tokenizer is used.
    vocabulary: the text of a custom vocabulary, if you have it already; then no file is read.

    Attributes: name, which is gpt2, bytes, or bpe- and a checksum of the custom vocabulary; vocabulary, the text of
    that, else ""; n_vocab, the number of ids (gpt2: 50,259, bytes: 259, else the tokens of the vocabulary plus 3); eot,
    user and assistant, the ids of the control tokens; bpe, tiktoken's encoding, None for bytes.

    Raises FileNotFoundError if there is no vocabulary file, OSError if it is not valid, or tiktoken cannot get GPT-2's.
    """

    def __init__(self, source, vocabulary=""):
        if str(source).endswith(".pt"):
            source, vocabulary = read_checkpoint(source)
        self.name = source
        self.vocabulary = ""
        self.bpe = None
        n_ordinary = 256
        if source == "gpt2":
            self.bpe = load_gpt2()
        elif source != "bytes":
            self.vocabulary = vocabulary or read_vocabulary(source)
            self.name = f"bpe-{hashlib.sha256(self.vocabulary.encode()).hexdigest()[:8]}"
            self.bpe = load_vocabulary(self.vocabulary, source)
        if self.bpe:
            n_ordinary = self.bpe.n_vocab - len(SPECIALS)
        self.eot, self.user, self.assistant = range(n_ordinary, n_ordinary + len(SPECIALS))
        self.n_vocab = n_ordinary + len(SPECIALS)

    def encode(self, text):
        """The ids of a text, as a list; never those of control tokens."""
        if self.bpe:
            return self.bpe.encode_ordinary(text)
        return list(text.encode("utf-8", errors="replace"))

    def encode_document(self, text):
        """(n,) uint16 array: <|endoftext|>, then the ids of the text. Faster than `encode`: makes no Python list."""
        if self.bpe:
            ids = self.bpe.encode_to_numpy(text, disallowed_special=())
        else:
            ids = np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8)
        return np.concatenate(([self.eot], ids), dtype=np.uint16, casting="unsafe")

    def decode(self, ids):
        """The text of a list of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):
        """The UTF-8 bytes of a list of ids. A token may end inside a character: join bytes before you decode them."""
        if self.bpe:
            return self.bpe.decode_bytes(ids)
        return b"".join(bytes([i]) if i < 256 else SPECIALS[i - 256].encode() for i in ids)

    def token_bytes(self):
        """(n_vocab,) int64: the number of bytes that each token decodes to, 0 for control tokens."""
        lengths = np.array([len(self.decode_bytes([i])) for i in range(self.n_vocab)])
        lengths[self.eot :] = 0
        return lengths

    def render(self, messages):
        """Encode a conversation: `<|user|>question<|assistant|>answer<|endoftext|>`, repeated for each pair of turns.

        messages: dicts with `role` and `content`. User and assistant take turns, the user starts. One system message
        may come first; it is prepended to the first question. An answer with `train` False is not to be learned.
        Returns (ids, mask), two lists; the mask is 1 on the answers to be learned and their <|endoftext|>, else 0.
        To ask a model for an answer, end with a question and append the id `assistant`.
        BadConversation if the roles are in another order.
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


def tokenizer_of_checkpoint(stored):
    """The tokenizer of a loaded checkpoint, which contains its custom vocabulary."""
    return Tokenizer(stored["tokenizer"], stored.get("vocabulary", ""))


def tokenizer_of_shards(folder, name):
    """The tokenizer with this `name` that a folder of token shards was made with; a custom vocabulary is a file there.

    OSError when that file is missing or is another vocabulary.
    """
    if name in BUILT_IN:
        return Tokenizer(name)
    path = Path(folder, VOCABULARY)
    tokenizer = Tokenizer(str(path)) if path.is_file() else None
    if tokenizer is None or tokenizer.name != name:
        raise OSError(f"{path}: must be the vocabulary of {name}, with which the shards were made: copy it there")
    return tokenizer


def read_checkpoint(path):
    """Two entries of a checkpoint file: tokenizer, vocabulary ("" without a custom one). OSError when it has none."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content["tokenizer"], content.get("vocabulary", "")
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged file
        raise OSError(f"{path}: not a checkpoint that names its tokenizer ({type(error).__name__})") from None


def read_vocabulary(path):
    """The text of a vocabulary file; path: the file or its folder. FileNotFoundError where there is none."""
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
    """The text of a vocabulary file. tokens: the bytes of each token, in the order of their ids."""
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


def load_vocabulary(text, source):
    """A tiktoken encoding from the text of a vocabulary file. OSError, naming its `source`, when it is not valid.

    The text to encode is split into words as GPT-2 does, before bytes are merged.
    """
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
        raise OSError(f"{source}: not a vocabulary in tiktoken's form: make it with python -m tools.train_tokenizer")
    if len(ranks) + len(SPECIALS) > 2**16:
        raise OSError(f"{source}: has {len(ranks):,} tokens; with the control tokens, token shards hold at most 65,536")
    specials = {special: len(ranks) + i for i, special in enumerate(SPECIALS)}
    return tiktoken.Encoding(name="custom", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=specials)


def load_gpt2():
    """tiktoken's GPT-2 encoding with the chat tokens added. OSError when its vocabulary cannot be downloaded."""
    import tiktoken

    try:
        base = tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests raises many kinds when a download fails
        raise OSError(
            "tiktoken cannot get GPT-2's vocabulary: connect to the network once, or point TIKTOKEN_CACHE_DIR at a "
            f"folder that holds it, or start with --tokenizer=bytes at prepare_fineweb.py ({type(error).__name__})"
        ) from None
    specials = {text: base.n_vocab - 1 + i for i, text in enumerate(SPECIALS)}  # GPT-2's last id is <|endoftext|>
    return tiktoken.Encoding(
        name="gpt2_chat", pat_str=base._pat_str, mergeable_ranks=base._mergeable_ranks, special_tokens=specials
    )
