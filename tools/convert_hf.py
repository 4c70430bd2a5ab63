"""Hugging Face models, out and in, without custom code on either side.

    python -m tools.convert_hf export --checkpoint=out/chat/best.pt --out=hf
    python -m tools.convert_hf import --model=openai-community/gpt2 --out=g.pt

Family gpt2 is GPT2LMHeadModel there, modern is Qwen3ForCausalLM. Export writes
a folder: weights, config, tokenizer with chat template, and a model card to
complete before you publish. Import takes such a folder, or a model of the Hub
(fetched into data/models, verified), whose weights are .safetensors files, and
writes one checkpoint.
"""

import re
import sys
from pathlib import Path

from configurator import configure

import torch

from hub import download, is_repo, list_hub
from model import FAMILIES, GPT, GPTConfig, load_checkpoint, load_model, save_checkpoint
from prepare_fineweb import read_json, write_json
from tokenizer import SPECIALS, Tokenizer

checkpoint = "out/fgpt_712m/best.pt"  # export: file of train.py, finetune.py or dpo.py
model = ""  # import: folder, or owner/name of a model on the Hub
out = ""  # export: folder to write (empty: hf_model); import: file to write (empty: ckpt.pt)
dtype = "float32"  # export: of the weights, float32 or bfloat16
overwrite = False  # write over what `out` holds

MODELS = Path("data/models")  # where models of the Hub are kept
TOKENIZERS = {259: "bytes", 50257: "gpt2", 50259: "gpt2"}  # by vocabulary; OpenAI's GPT-2 has no chat tokens
TYPES = {"gpt2": "gpt2", "modern": "qwen3"}
CLASSES = {"gpt2": "GPT2LMHeadModel", "modern": "Qwen3ForCausalLM"}
BASE = {"gpt2": "transformer.", "modern": "model."}  # begins their weights' names, but not in OpenAI's own files
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's, which are kept transposed
QWEN3 = {  # our modules to theirs, which keep queries, keys and values apart
    "wte": ["embed_tokens"],
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_gate": ["mlp.gate_proj"],
    "mlp.c_fc": ["mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
    "ln_f": ["norm"],
}
SIZES = {  # our names to theirs
    "gpt2": dict(
        block_size="n_positions", n_vocab="vocab_size", n_layer="n_layer", n_head="n_head", n_embd="n_embd",
        mlp_dim="n_inner",
    ),
    "modern": dict(
        block_size="max_position_embeddings", n_vocab="vocab_size", n_layer="num_hidden_layers",
        n_head="num_attention_heads", n_embd="hidden_size", head_dim="head_dim", mlp_dim="intermediate_size",
    ),
}  # fmt: skip
FIXED = {  # what the families compute: export writes it, import refuses anything else
    "gpt2": dict(
        activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True, tie_word_embeddings=True,
        scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False, add_cross_attention=False,
    ),
    "modern": dict(
        hidden_act="silu", rms_norm_eps=1e-6, attention_bias=False, tie_word_embeddings=True, use_sliding_window=False,
        rope_scaling=None, rope_type="default",
    ),
}  # fmt: skip
# Renders what Tokenizer.render does. transformers reads control tokens in messages as such, unless it is told to
# sanitize them; a template cannot see whether it was, so it refuses them unless told that too.
CHAT_TEMPLATE = """
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] + '\n\n' -%}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
  {%- set text = (system or '' if loop.first else '') + message['content'] -%}
  {%- for token in ['<|endoftext|>', '<|user|>', '<|assistant|>'] if token in text and not sanitized -%}
    {{- raise_exception('a message holds ' + token + ', which would be read as a control token') -}}
  {%- endfor -%}
  {%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] -%}
    {{- raise_exception('a conversation is user, assistant, user, ... (one system first)') -}}
  {%- elif message['role'] == 'user' -%}
    {{- '<|user|>' + text -}}
  {%- else -%}
    {{- '<|assistant|>' -}}{%- generation -%}{{- text + '<|endoftext|>' -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
""".strip()


def safetensors():
    """The module safetensors.torch. ValueError where it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("safetensors is not installed: pip install -e '.[hf]'") from None
    return safetensors.torch


# ----------------------------------------------------------------------------------------------------------------------
# weights and config, both ways


def counterpart(name, family):
    """(names of the weights there, without BASE, that one after the other are ours; whether they are transposed)."""
    if family == "gpt2":
        return [name], name.endswith(CONV1D)
    layer, module = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)\.weight", name).groups()
    return [f"layers.{layer}.{theirs}.weight" if layer else f"{theirs}.weight" for theirs in QWEN3[module]], False


def family_of(config):
    """The family of a model, by its flags. ValueError for one that is of neither, with what differs."""
    family = "modern" if config.rotary else "gpt2"
    theirs = GPTConfig(**FAMILIES[family])
    flags = [f for f in ("rmsnorm", "qk_norm", "swiglu", "bias") if getattr(config, f) != getattr(theirs, f)]
    if family == "gpt2" and config.n_head * config.head_dim != config.n_embd:
        flags.append("head_dim")  # has to be n_embd / n_head there
    if flags:
        said = ", ".join(f"{flag}={getattr(config, flag)}" for flag in flags)
        raise ValueError(f"transformers has no counterpart of a {family} model with {said}")
    return family


def weights_to_hf(gpt, dtype):
    """Their names to tensors: without padding rows, and without a head, which is the embedding."""
    family, weights = family_of(gpt.config), {}
    for name, p in gpt.state_dict().items():
        p = p[: gpt.config.n_vocab] if name == "wte.weight" else p
        theirs, transposed = counterpart(name, family)
        for their_name, part in zip(theirs, p.chunk(len(theirs)), strict=True):
            weights[BASE[family] + their_name] = (part.T if transposed else part).to(dtype).contiguous()
    return weights


def weights_from_hf(weights, gpt):
    """The model's state dict, fp32. ValueError where weights are missing, unknown, or do not fit it.

    Rows that they do not have (padding, and GPT-2's chat tokens) get the mean of theirs: a row of zeros would have
    logit 0, which is far more than GPT-2 gives to most tokens.
    """
    config, family, state = gpt.config, family_of(gpt.config), {}
    weights = {name.removeprefix(BASE[family]): p for name, p in weights.items()}
    weights = {name: p for name, p in weights.items() if not re.search(r"\.attn\.(masked_)?bias$", name)}  # masks
    head = weights.pop("lm_head.weight", None)
    for name, p in gpt.state_dict().items():
        theirs, transposed = counterpart(name, family)
        missing = [their_name for their_name in theirs if their_name not in weights]
        if missing:
            raise ValueError(f"no weight {missing[0]}: is a file missing?")
        parts = [weights.pop(their_name) for their_name in theirs]
        if name == "wte.weight":
            if head is not None and not torch.equal(head, parts[0]):
                raise ValueError("its head is not its embedding; fgpt's models are tied")
            n_new = config.vocab_size - config.n_vocab
            parts.append(parts[0].float().mean(dim=0).expand(n_new, -1))
        state[name] = torch.cat([part.T if transposed else part for part in parts]).float()
        if state[name].shape != p.shape:
            raise ValueError(f"weight {theirs[0]} is {tuple(parts[0].shape)}, which does not fit config.json")
    if weights:
        raise ValueError(f"weight {next(iter(weights))} has no counterpart in fgpt")
    return state


def config_to_hf(config, eot, stage, dtype):
    """Their config.json: every value that counts is written, none left to a default."""
    family = family_of(config)
    hf = {"model_type": TYPES[family], "architectures": [CLASSES[family]], **FIXED[family]}
    hf |= {theirs: getattr(config, ours) for ours, theirs in SIZES[family].items()}
    if family == "gpt2":
        hf |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    else:
        hf |= dict(attention_dropout=0.0, num_key_value_heads=config.n_head, rope_theta=config.rope_theta)
        hf["rope_parameters"] = dict(rope_type=hf.pop("rope_type"), rope_theta=config.rope_theta)  # transformers 5
    hf |= dict(torch_dtype=dtype, dtype=dtype)  # for transformers 4 and 5
    return hf | dict(bos_token_id=eot, eos_token_id=eot, use_cache=True, fgpt_stage=stage)


def config_from_hf(hf):
    """The GPTConfig. ValueError for a model that fgpt cannot compute, with the value that differs."""
    families = [family for family, model_type in TYPES.items() if model_type == hf.get("model_type")]
    if not families:
        raise ValueError(f"model_type is {hf.get('model_type')!r}; fgpt has counterparts of gpt2 and qwen3")
    family, fixed, more = families[0], dict(FIXED[families[0]]), {}
    if family == "modern":
        # what transformers takes where config.json is silent; version 5 has rope_parameters, 4 has rope_theta
        hf = dict(tie_word_embeddings=False, head_dim=128, rope_theta=10000.0) | hf | (hf.get("rope_parameters") or {})
        fixed["num_key_value_heads"] = hf.get("num_attention_heads")  # grouped-query attention has fewer
        more["rope_theta"] = float(hf["rope_theta"])
    for name, value in fixed.items():
        if hf.get(name, value) != value:
            raise ValueError(f"{name} is {hf[name]!r}; fgpt's models have {value!r}")
    sizes = {ours: hf.get(theirs) or 0 for ours, theirs in SIZES[family].items()}
    if sizes["n_vocab"] not in TOKENIZERS:
        known = ", ".join(map(str, TOKENIZERS))
        raise ValueError(f"vocab_size is {sizes['n_vocab']}; fgpt's tokenizers have {known} ids")
    rows = -(-sizes["n_vocab"] // 64) * 64
    return GPTConfig(vocab_size=rows, **FAMILIES[family], **sizes, **more)


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer


def letters_of_bytes():
    """The letter for each byte in GPT-2's published files: printable ones are themselves, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


LETTERS = letters_of_bytes()


def spell(token):
    return "".join(LETTERS[byte] for byte in token)


def ranks_of(coder):
    """{bytes of an ordinary token: its id}, in the order in which they are merged."""
    return coder.bpe._mergeable_ranks if coder.bpe else {bytes([byte]): byte for byte in range(256)}


def merge_of(token, ranks):
    """The two tokens of which byte-pair encoding makes this one, by merging those of the lowest rank first."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        i = pair_ranks.index(min(pair_ranks))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def tokenizer_to_hf(coder, config):
    """Contents of tokenizer.json and tokenizer_config.json, with the control tokens that the model has."""
    ranks = ranks_of(coder)
    merges = [merge_of(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    specials = list(enumerate(SPECIALS, coder.eot))[: config.n_vocab - coder.eot]
    added = [{"id": i, "content": text, **plain} for i, text in specials]
    model = dict(
        type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False,
        byte_fallback=False, vocab={spell(token): i for token, i in ranks.items()} | {SPECIALS[0]: coder.eot},
        merges=[f"{spell(a)} {spell(b)}" for a, b in merges],
    )  # fmt: skip
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=True)
    parts = dict(normalizer=None, pre_tokenizer=byte_level, post_processor=None, decoder=byte_level, model=model)
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=SPECIALS[0], eos_token=SPECIALS[0],
        model_max_length=config.block_size, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    if len(added) == len(SPECIALS):
        settings["chat_template"] = CHAT_TEMPLATE
    return dict(version="1.0", truncation=None, padding=None, added_tokens=added, **parts), settings


# ----------------------------------------------------------------------------------------------------------------------
# model card

LICENCES = {  # of data, by the names that prepare_fineweb.py and prepare_instruct.py note
    "HuggingFaceFW/fineweb-edu": "ODC-By 1.0",
    "kjj0/finewebedu10B-gpt2": "ODC-By 1.0, that of FineWeb-Edu, whose text it is",
    "raschka": "Apache 2.0",
    "alpaca": "CC BY-NC 4.0, not for commercial use: of Stanford's Alpaca; the cleaned copy's page says CC BY 4.0",
    "smoltalk": "Apache 2.0",
}

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A language model of {n_params:,} parameters, exported from fgpt: {architecture}, {n_layer} layers of width {n_embd}, a
context of {block_size:,} tokens. Complete this card before you publish it: it names your folders.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
{example}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

transformers reads control tokens that stand in a text, such as `<|endoftext|>`, as tokens. `tokenizer(text,
split_special_tokens=True)` keeps them text. The chat template refuses messages that hold one, unless
`apply_chat_template(messages, sanitize_control_tokens=True, sanitized=True)` keeps them text (transformers 5.23 can).
"""
CHAT_EXAMPLE = """messages = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
BASE_EXAMPLE = (
    """inputs = tokenizer("<|endoftext|>Once upon a time", return_tensors="pt")  # a document begins with this token"""
)


def sources_of(folder):
    """Names of what a stage's data_dir was made from, of many files their folders; the data_dir where nothing says."""
    path = Path(folder) / "meta.json"
    names = read_json(path).get("sources", []) if path.exists() else []
    return sorted({name.rpartition("/")[0] or name if len(names) > 3 else name for name in names}) or [str(folder)]


def licence_of(source):
    """The licence of a source, or of the dataset of the Hub that it is a file or folder of."""
    known = [licence for name, licence in LICENCES.items() if f"{source}/".startswith(f"{name}/")]
    return known[0] if known else "licence not known here: look it up"


def stages_of(stored):
    """Markdown of how a checkpoint came about: its stage, and before it those of the checkpoints it began with."""
    settings = stored["settings"]
    lines = ["", f"## Stage {stored['stage']}, step {stored['step']:,}", ""]
    lines += [f"- {name}: {value:.4f}" for name, value in stored.get("metrics", {}).items()]
    if "data_dir" in settings:
        lines += [f"- data: {source} ({licence_of(source)})" for source in sources_of(settings["data_dir"])]
    lines += ["- settings: " + ", ".join(f"`{name}={value!r}`" for name, value in settings.items())]
    base = settings.get("checkpoint")
    if base and Path(base).is_file():
        lines += stages_of(load_checkpoint(base))
    elif base:
        lines += ["", f"It began with {base}, which is not on this machine: add that model's data and settings."]
    return lines


def count_params(gpt):
    """Without padding rows."""
    return gpt.n_params() - (gpt.config.vocab_size - gpt.config.n_vocab) * gpt.config.n_embd


def card(gpt, stored, config, name):
    """The README.md of an export."""
    text = CARD.format(
        name=name, n_params=count_params(gpt), architecture=config["architectures"][0], n_layer=gpt.config.n_layer,
        n_embd=gpt.config.n_embd, block_size=gpt.config.block_size,
        example=BASE_EXAMPLE if stored["stage"] == "pretrain" else CHAT_EXAMPLE,
    )  # fmt: skip
    return text + "\n".join(stages_of(stored)) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# the commands


def export_model(checkpoint, folder, dtype, overwrite):
    """Write the folder; config.json last, without which it cannot be loaded."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype!r}")
    save_file, (gpt, stored) = safetensors().save_file, load_model(checkpoint)
    coder = Tokenizer(stored["tokenizer"])
    config = config_to_hf(gpt.config, coder.eot, stored["stage"], dtype)
    if folder.exists() and not folder.is_dir() or folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} is there and not empty: choose another --out, or --overwrite=True")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    weights = weights_to_hf(gpt, getattr(torch, dtype))
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except Exception as error:  # its own kinds
        raise OSError(f"{folder}/model.safetensors could not be written (disk full?): {error}") from None
    tokenizer, tokenizer_config = tokenizer_to_hf(coder, gpt.config)
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    ids = dict(bos_token_id=coder.eot, eos_token_id=coder.eot, pad_token_id=coder.eot)
    write_json(folder / "generation_config.json", ids)
    (folder / "README.md").write_text(card(gpt, stored, config, folder.name), encoding="utf-8")
    write_json(folder / "config.json", config)
    print(f"{folder}: {config['architectures'][0]}, {gpt.config.n_vocab:,} tokens, {dtype}; complete its README.md")


def fetch_model(repo):
    """The folder of a model of the Hub, fetched and verified."""
    folder = MODELS / repo
    needed = re.compile(r"(config|tokenizer|vocab)\.json|model[^/]*\.safetensors")
    for file in list_hub(repo, wanted=needed.fullmatch, kind="models"):
        download(file, folder)
    return folder


def read_weights(folder):
    """Names to tensors of a folder's model*.safetensors. FileNotFoundError or ValueError, one line."""
    paths, load_file, weights = sorted(folder.glob("model*.safetensors")), safetensors().load_file, {}
    if not paths:
        raise FileNotFoundError(
            f"{folder}: no model.safetensors there (a pytorch_model.bin may hold code and is not read: "
            "save_pretrained of transformers writes .safetensors)"
        )
    for path in paths:
        try:
            weights |= load_file(path)
        except Exception as error:  # its own kinds
            raise ValueError(f"{path}: damaged ({error}): get it again") from None
    return weights


def check_vocabulary(folder, coder):
    """ValueError when the folder's tokenizer has other ids than ours; most models have as many as GPT-2."""
    ours = {spell(token): i for token, i in ranks_of(coder).items()}
    for name in ("tokenizer.json", "vocab.json"):
        if (folder / name).exists():
            theirs = read_json(folder / name)
            theirs = theirs["model"]["vocab"] if name == "tokenizer.json" else theirs
            if any(theirs.get(token) != i for token, i in ours.items()):
                raise ValueError(f"{name} is not the vocabulary of fgpt's {coder.name} tokenizer")


def import_model(model, path, overwrite):
    """Write a checkpoint from a folder or a model of the Hub."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there: choose another --out, or --overwrite=True")
    folder = Path(model)
    if not model or not folder.is_dir():
        if not is_repo(model):
            raise FileNotFoundError(f"--model={model}: no such folder (a model of the Hub is owner/name)")
        folder = fetch_model(model)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder}: no config.json there: not a folder of save_pretrained")
    hf = read_json(folder / "config.json")
    try:
        config = config_from_hf(hf)
        coder = Tokenizer(TOKENIZERS[config.n_vocab])
        check_vocabulary(folder, coder)
        with torch.device("meta"):  # its weights come from there
            gpt = GPT(config)
        gpt.load_state_dict(weights_from_hf(read_weights(folder), gpt), assign=True)
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = dict(tokenizer=coder.name, stage=hf.get("fgpt_stage", "pretrain"), settings={"model": model})
    save_checkpoint(path, gpt, step=0, tokens=0, metrics={}, **entries)
    print(f"{path}: {count_params(gpt):,} parameters, {config.n_vocab:,} tokens")


def main(command):
    if command == "export":
        export_model(checkpoint, Path(out or "hf_model"), dtype, overwrite)
    elif command == "import":
        import_model(model, Path(out or "ckpt.pt"), overwrite)
    else:
        raise ValueError(f"python -m tools.convert_hf export or import: not {command!r}")


if __name__ == "__main__":
    _command = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    configure(globals())
    main(_command)
