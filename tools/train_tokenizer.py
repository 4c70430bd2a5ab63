"""Train a tokenizer on your own text: byte-pair encoding, for languages that
GPT-2's vocabulary splits into too many tokens.

    python -m tools.train_tokenizer --source=data/texts --out=data/tok
    python prepare_fineweb.py --source=data/texts --tokenizer=data/tok

Reads the local files that prepare_fineweb.py reads, writes
out/vocabulary.tiktoken, and says how many bytes of the text a token stands for.
Shards, checkpoints, Spaces and exports hold a copy of the vocabulary.
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
from tools.convert_hf import unspell

source = ""  # local file, folder or glob; several separated by commas
text_field = "text"  # parquet column or JSON field with the text of a document
vocab_size = 8192  # ids, the three control tokens included: a multiple of 64 wastes no rows
max_documents = 100000  # learn from the first ones; 0: from all
out = "data/tok"  # folder to write
overwrite = False  # replace the vocabulary there

LEAST = 256 + len(SPECIALS)  # the bytes and the control tokens
LARGEST = 2**16  # ids of token shards are uint16


def main():
    between = LEAST <= vocab_size <= LARGEST
    rules = [(between, f"vocab_size must be {LEAST} to {LARGEST}, not {vocab_size}"), (source, "source is needed")]
    check_settings(settings_of(globals()), rules=rules)
    path = Path(out) / VOCABULARY
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another --out, or --overwrite=True")
    ignored = Counter()
    files = [file for file in find_all(source, refuse_dataset, ignored) if not is_shard(file)]
    if ignored:
        print(describe_ignored(ignored))
    if not files:
        raise BadInput(f"source={source!r} has only token shards: name the text that they were made from")
    check_texts(files)
    files = [file["path"] for file in files]
    text = train_vocabulary(documents_of(files), vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    own = Tokenizer(str(path))
    per_token = bytes_per_token(own, documents_of(files))
    print(f"{path}: tokenizer {own.name}, {own.n_vocab:,} ids, {per_token:.2f} bytes of the text per token")
    if own.n_vocab < vocab_size:
        print(f"warning: the text has only {own.n_vocab:,} different tokens: give more text, or a smaller --vocab_size")


def refuse_dataset(repo):
    """BadInput: a vocabulary is trained on local files."""
    raise BadInput(f"{repo}: no such file or folder (download a dataset of the Hub first)")


def documents_of(files):
    """The texts of the files, at most max_documents."""
    documents = (text for path in files for _, text in read_documents(path, text_field, split_blank_lines=False))
    return islice(filter(None, documents), max_documents or None)


def train_vocabulary(texts, size):
    """The text of a vocabulary of `size` ids, the control tokens included, or fewer where the texts have no more."""
    try:
        import tokenizers
    except ImportError:
        raise BadInput("tokenizers is not installed: pip install -e '.[hf]'") from None
    splits = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # as GPT-2 does
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = splits
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size - len(SPECIALS), initial_alphabet=splits.alphabet())
    bpe.train_from_iterator(texts, trainer)
    vocab = bpe.get_vocab()
    return vocabulary_text(unspell(token) for token in sorted(vocab, key=vocab.get))


def bytes_per_token(tokenizer, texts):
    """UTF-8 bytes of the texts over the number of their tokens."""
    n_bytes = 0
    n_tokens = 0
    for text in texts:
        n_bytes += len(text.encode("utf-8", errors="replace"))
        n_tokens += len(tokenizer.encode(text))
    return n_bytes / max(1, n_tokens)


if __name__ == "__main__":
    configure(globals())
    main()
