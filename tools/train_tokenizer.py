"""Train a tokenizer on your own text: byte-pair encoding, for languages that
GPT-2's vocabulary splits into too many tokens.

    python -m tools.train_tokenizer --source=data/texts --out=data/tok
    python prepare_fineweb.py --source=data/texts --tokenizer=data/tok

Reads the same kinds of local files as prepare_fineweb.py, writes
vocabulary.tiktoken into --out, and prints how many bytes of the text a token
has on average. Shards, checkpoints, Spaces and exports contain a copy of the
vocabulary.
"""

import sys
from collections import Counter
from itertools import islice
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # for `python tools/train_tokenizer.py`

from configurator import BadInput, check_settings, configure, settings_of

from data import write_text
from prepare_fineweb import check_texts, describe_ignored, find_all, is_shard, read_documents
from tokenizer import SPECIALS, VOCABULARY, Tokenizer, vocabulary_text
from tools.convert_hf import letters_to_bytes

source = ""  # local file, folder or glob; several separated by commas
text_field = "text"  # parquet column or JSON field with the text of a document
vocab_size = 8192  # ids, including the three control tokens; a multiple of 64 needs no padding rows in a model
max_documents = 100000  # learn from this many, the first ones; 0: from all
out = "data/tok"  # folder to write
overwrite = False  # replace the vocabulary there

MIN_VOCAB_SIZE = 256 + len(SPECIALS)  # the bytes and the control tokens
MAX_VOCAB_SIZE = 2**16  # ids of token shards are uint16


def main():
    rules = [
        (
            MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE,
            f"vocab_size must be {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}, not {vocab_size}",
        ),
        (source, "source is needed"),
    ]
    check_settings(settings_of(globals()), rules=rules)
    path = Path(out) / VOCABULARY
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another --out, or --overwrite=True")
    paths = find_texts()
    vocabulary = train_vocabulary(read_texts(paths), vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, vocabulary)
    tokenizer = Tokenizer(str(path))
    n_vocab = tokenizer.n_vocab
    per_token = bytes_per_token(tokenizer, read_texts(paths))
    print(f"{path}: tokenizer {tokenizer.name}, {n_vocab:,} ids, {per_token:.2f} bytes of the text per token")
    if n_vocab < vocab_size:
        print(f"warning: the text has only {n_vocab:,} different tokens: give more text, or a smaller --vocab_size")


def find_texts():
    """Paths of the text files of `source`. BadInput when there is none."""
    ignored = Counter()
    files = [file for file in find_all(source, refuse_dataset, ignored) if not is_shard(file)]
    if ignored:
        print(describe_ignored(ignored))
    if not files:
        raise BadInput(f"source={source!r} has only token shards: name the text that they were made from")
    check_texts(files)
    return [file["path"] for file in files]


def refuse_dataset(repo):
    """BadInput for a dataset of the Hub: a vocabulary is trained on local files."""
    raise BadInput(f"{repo}: no such file or folder (download a dataset of the Hub first)")


def read_texts(paths):
    """Yield the documents of the files that are not empty, at most max_documents."""
    documents = (text for path in paths for _, text in read_documents(path, text_field, split_blank_lines=False))
    return islice(filter(None, documents), max_documents or None)


def train_vocabulary(texts, size):
    """The text of a vocabulary file with `size` ids, including the control tokens; fewer if the texts have no more."""
    try:
        import tokenizers
    except ImportError:
        raise BadInput("tokenizers is not installed: pip install -e '.[hf]'") from None
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits text into words as GPT-2 does
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = byte_level
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size - len(SPECIALS), initial_alphabet=byte_level.alphabet())
    bpe.train_from_iterator(texts, trainer)
    id_of_token = bpe.get_vocab()
    return vocabulary_text(letters_to_bytes(token) for token in sorted(id_of_token, key=id_of_token.get))


def bytes_per_token(tokenizer, texts):
    """UTF-8 bytes of the texts divided by the number of their tokens."""
    n_bytes = 0
    n_tokens = 0
    for text in texts:
        n_bytes += len(text.encode("utf-8", errors="replace"))
        n_tokens += len(tokenizer.encode(text))
    return n_bytes / max(1, n_tokens)


if __name__ == "__main__":
    configure(globals())
    main()
