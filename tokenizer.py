"""Text to token ids and back, and the rendering of conversations. Needs numpy and tiktoken: copy this file.

Two tokenizers with one interface: `gpt2` (GPT-2's byte-pair encoding, by tiktoken) and `bytes` (UTF-8 bytes, which need
no vocabulary file). Both have three control tokens after their ordinary ones:

    <|endoftext|>   starts a document, and ends an answer
    <|user|>        starts a user's turn
    <|assistant|>   starts an answer

Text is always encoded as ordinary text: an "<|endoftext|>" that somebody typed never becomes a control token.
"""

import numpy as np

SPECIALS = ("<|endoftext|>", "<|user|>", "<|assistant|>")


class BadConversation(ValueError):
    """The roles of a conversation are not user, assistant, user, ..."""


class Tokenizer:
    """`Tokenizer("gpt2")` or `Tokenizer("bytes")`.

    name: as given. n_vocab: number of ids that exist (50,259 or 259). eot, user, assistant: ids of the control tokens.
    FileNotFoundError for another name, OSError when tiktoken cannot get GPT-2's vocabulary.
    """

    def __init__(self, name):
        if name not in ("gpt2", "bytes"):
            raise FileNotFoundError(f"tokenizer must be 'gpt2' or 'bytes', not {name!r}")
        self.name = name
        self.bpe = load_gpt2() if name == "gpt2" else None
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
        may come first and is prepended to the first question. mask is 1 exactly on each answer and its end token.
        To ask for an answer, end with the user's turn and append `assistant`. BadConversation for another order.
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
                mask += [0] + [1] * (len(text) + 1)
        return ids, mask


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
