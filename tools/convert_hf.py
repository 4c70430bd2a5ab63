"""Convert models to Hugging Face's format and back, without custom code there.

    python -m tools.convert_hf export --checkpoint=out/chat/best.pt --out=hf
    python -m tools.convert_hf import --model=openai-community/gpt2 --out=g.pt

Family gpt2 becomes a GPT2LMHeadModel, modern a Qwen3ForCausalLM. Export writes
a folder: weights, config, tokenizer with chat template, and a model card for
you to complete before you publish. Import reads such a folder, or a model of
the Hub (downloaded into data/models and verified), with weights in .safetensors
files, and writes a checkpoint. Names that start with hf_ are Hugging Face's.
"""

import re
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # for `python tools/convert_hf.py`

from configurator import BadInput, configure

import torch

from data import read_json, write_json
from hub import download, is_repo, list_hub
from model import FAMILIES, GPT, GPTConfig, family_of, flags_unlike_family, round_up
from run import load_model, save_checkpoint
from tokenizer import SPECIALS, Tokenizer, tokenizer_of_checkpoint, vocabulary_text

checkpoint = "out/fgpt_712m/best.pt"  # export: file of train.py, finetune.py or dpo.py
model = ""  # import: folder, or owner/name of a model on the Hub
out = ""  # export: folder to write (empty: hf_model); import: file to write (empty: ckpt.pt)
dtype = "float32"  # export: of the weights, float32 or bfloat16
overwrite = False  # replace what `out` already holds

MODELS = Path("data/models")  # where models of the Hub are kept
TOKENIZERS = {259: "bytes", 50257: "gpt2", 50259: "gpt2"}  # by number of ids; OpenAI's GPT-2 has no chat tokens

MODEL_TYPES = {"gpt2": "gpt2", "modern": "qwen3"}
ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "modern": "Qwen3ForCausalLM"}
PREFIXES = {"gpt2": "transformer.", "modern": "model."}  # of the weights' names; OpenAI's own files have none
HF_SIZES = {  # our names of the sizes: Hugging Face's
    "gpt2": dict(
        block_size="n_positions", n_vocab="vocab_size", n_layer="n_layer", n_head="n_head", n_embd="n_embd",
        mlp_dim="n_inner",
    ),
    "modern": dict(
        block_size="max_position_embeddings", n_vocab="vocab_size", n_layer="num_hidden_layers",
        n_head="num_attention_heads", n_embd="hidden_size", head_dim="head_dim", mlp_dim="intermediate_size",
    ),
}  # fmt: skip
HF_CONSTANTS = {  # settings with which transformers computes what a family computes; import refuses other values
    "gpt2": dict(
        activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False, add_cross_attention=False,
    ),
    "modern": dict(
        hidden_act="silu", rms_norm_eps=1e-6, attention_bias=False, use_sliding_window=False, rope_scaling=None,
        rope_type="default",
    ),
}  # fmt: skip
# GPT-2's published files write each byte as a letter: printable bytes as themselves, the others as U+0100, U+0101, ...
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
LETTERS = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
BYTES = {letter: byte for byte, letter in LETTERS.items()}
# the structure of the parts of a tokenizer.json that import reads
TOKENIZER_JSON = {"added_tokens": [{"content": str, "id": int}], "model": {"vocab": dict}}
GPT2_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as (in, out) in GPT-2's files
QWEN3_MODULES = {  # our modules: Qwen3's, which has separate ones for queries, keys and values
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
    "lm_head": ["lm_head"],
}
# Where the answer is in the text of a conversation; without this, the server of transformers would assume Qwen3's form.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": SPECIALS[2],
    "fields": {"content": {"close": SPECIALS[0], "content": "text"}},
}
# Renders the same text as Tokenizer.render. transformers reads control tokens in messages as control tokens unless
# sanitize_control_tokens=True. A template cannot see this option, so it refuses messages with control tokens unless the
# caller also passes sanitized=True. In versions of transformers that are too old to have the option, the template does
# see it, as an unknown argument, and refuses the messages.
CHAT_TEMPLATE = """
{%- set are_text = sanitized and not sanitize_control_tokens -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] + '\n\n' -%}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
  {%- set text = (system or '' if loop.first else '') + message['content'] -%}
  {%- for token in ['<|endoftext|>', '<|user|>', '<|assistant|>'] if token in text and not are_text -%}
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


def main(command):
    if command == "export":
        export_model(checkpoint, Path(out or "hf_model"), dtype, overwrite)
    elif command == "import":
        import_model(model, Path(out or "ckpt.pt"), overwrite)
    else:
        raise BadInput(f"python -m tools.convert_hf export or import: not {command!r}")


def import_safetensors():
    """The module safetensors.torch. BadInput if it is not installed: it is optional."""
    try:
        import safetensors.torch
    except ImportError:
        raise BadInput("safetensors is not installed: pip install -e '.[hf]'") from None
    return safetensors.torch


# ----------------------------------------------------------------------------------------------------------------------
# export


def export_model(checkpoint, folder, dtype, overwrite):
    """Write the folder of an export. config.json comes last: an unfinished export has none and cannot be loaded."""
    if dtype not in ("float32", "bfloat16"):
        raise BadInput(f"dtype must be float32 or bfloat16, not {dtype!r}")
    save = import_safetensors().save
    gpt, stored = load_model(checkpoint)
    tokenizer = tokenizer_of_checkpoint(stored)
    config = config_to_hf(gpt.config, tokenizer.eot, stored["stage"], dtype)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} exists and is not empty: choose another --out, or --overwrite=True")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    weights = weights_to_hf(gpt, getattr(torch, dtype))
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    tokenizer_json, tokenizer_config = tokenizer_to_hf(tokenizer, gpt.config)
    write_json(folder / "tokenizer.json", tokenizer_json)
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    ids = dict(bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot, pad_token_id=tokenizer.eot)
    write_json(folder / "generation_config.json", ids)
    (folder / "README.md").write_text(model_card(gpt, stored, folder.name), encoding="utf-8")
    write_json(folder / "config.json", config)
    print(f"{folder}: {config['architectures'][0]}, {gpt.config.n_vocab:,} tokens, {dtype}; complete its README.md")


def config_to_hf(config, eot, stage, dtype):
    """The content of config.json, with every value that matters: transformers may change its defaults."""
    check_family(config)
    family = family_of(config)
    hf = {"model_type": MODEL_TYPES[family], "architectures": [ARCHITECTURES[family]], **HF_CONSTANTS[family]}
    hf |= {hf_name: getattr(config, name) for name, hf_name in HF_SIZES[family].items()}
    hf["tie_word_embeddings"] = config.tied
    if family == "gpt2":
        hf |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        hf["n_ctx"] = config.block_size  # another name of n_positions, which llama.cpp's converter reads
    else:
        hf |= dict(attention_dropout=0.0, num_key_value_heads=config.n_head, rope_theta=config.rope_theta)
        hf["rope_parameters"] = dict(rope_type=hf.pop("rope_type"), rope_theta=config.rope_theta)  # transformers 5
    hf |= dict(torch_dtype=dtype, dtype=dtype)  # for transformers 4 and 5
    return hf | dict(bos_token_id=eot, eos_token_id=eot, use_cache=True, fgpt_stage=stage)


def check_family(config):
    """BadInput unless transformers can compute a model with this config."""
    family = family_of(config)
    flags = flags_unlike_family(config)
    if family == "gpt2" and config.n_head * config.head_dim != config.n_embd:
        flags.append("head_dim")  # must be n_embd / n_head there
    if flags:
        values = ", ".join(f"{flag}={getattr(config, flag)}" for flag in flags)
        raise BadInput(f"transformers has no counterpart of a {family} model with {values}")


def weights_to_hf(gpt, dtype):
    """The weights as {hf_name: tensor}, without padding rows, and without a head that is the embedding."""
    family = family_of(gpt.config)
    weights = {}
    for name, p in gpt.state_dict().items():
        if name in ("wte.weight", "lm_head.weight"):
            p = p[: gpt.config.n_vocab]
        prefix = "" if name == "lm_head.weight" else PREFIXES[family]
        hf_names, is_transposed = hf_weights_of(name, family)
        for hf_name, part in zip(hf_names, p.chunk(len(hf_names)), strict=True):
            if is_transposed:
                part = part.T
            weights[prefix + hf_name] = part.to(dtype).contiguous()
    return weights


def hf_weights_of(name, family):
    """(hf_names, is_transposed) of a weight of ours, which is Hugging Face's of these names (no prefix), stacked."""
    if family == "gpt2":
        return [name], name.endswith(GPT2_TRANSPOSED)
    layer, module = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)\.weight", name).groups()
    prefix = f"layers.{layer}." if layer else ""
    return [f"{prefix}{hf_module}.weight" for hf_module in QWEN3_MODULES[module]], False


def tokenizer_to_hf(tokenizer, config):
    """Contents of tokenizer.json and tokenizer_config.json, with the control tokens that the model has."""
    ids = ordinary_ids(tokenizer)
    vocab = {bytes_to_letters(token): i for token, i in ids.items()} | {SPECIALS[0]: tokenizer.eot}
    merges = [last_merge(token, ids) for token in sorted(ids, key=ids.get) if len(token) > 1]
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    specials = list(enumerate(SPECIALS, tokenizer.eot))[: config.n_vocab - tokenizer.eot]
    added = [{"id": i, "content": text, **plain} for i, text in specials]
    model = dict(
        type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False,
        byte_fallback=False, vocab=vocab, merges=[f"{bytes_to_letters(a)} {bytes_to_letters(b)}" for a, b in merges],
    )  # fmt: skip
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=True)
    tokenizer_json = dict(
        version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None, pre_tokenizer=byte_level,
        post_processor=None, decoder=byte_level, model=model,
    )  # fmt: skip
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=SPECIALS[0], eos_token=SPECIALS[0],
        unk_token=SPECIALS[0],  # as OpenAI's: no text needs it, since each byte has a token, but CTranslate2 reads it
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 adds token_type_ids, which GPT-2 uses
        model_max_length=config.block_size, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    if len(added) == len(SPECIALS):
        settings["chat_template"] = CHAT_TEMPLATE
        settings["response_template"] = RESPONSE_TEMPLATE
    return tokenizer_json, settings


def ordinary_ids(tokenizer):
    """{bytes of a token: its id}, without control tokens; a lower id is also merged first."""
    if tokenizer.bpe:
        return tokenizer.bpe._mergeable_ranks
    return {bytes([byte]): byte for byte in range(256)}


def bytes_to_letters(token):
    """A token's bytes as the letters that GPT-2's published files write for them."""
    return "".join(LETTERS[byte] for byte in token)


def letters_to_bytes(text):
    """The bytes of a token that is written as in GPT-2's published files."""
    return bytes(BYTES[letter] for letter in text)


def last_merge(token, ids):
    """The two tokens that byte-pair encoding merges into this one, after it has merged pairs with lower ids."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pair_ids = [ids.get(a + b, len(ids)) for a, b in zip(parts, parts[1:], strict=False)]
        i = pair_ids.index(min(pair_ids))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


# ----------------------------------------------------------------------------------------------------------------------
# the model card of an export

LICENSES = {  # of data sources, by the names that prepare_fineweb.py and prepare_instruct.py record
    "HuggingFaceFW/fineweb-edu": "ODC-By 1.0",
    "kjj0/finewebedu10B-gpt2": "ODC-By 1.0, as its text is FineWeb-Edu's",
    "karpathy/climbmix-400b-shuffle": "CC BY-NC 4.0, as NVIDIA's ClimbMix, of which it is a copy",
    "raschka": "Apache 2.0",
    "alpaca": "CC BY-NC 4.0, not for commercial use, as Stanford's Alpaca; the cleaned copy's page says CC BY 4.0",
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
{inputs}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

transformers reads control tokens in a text, such as `<|endoftext|>`, as tokens. `tokenizer(text,
split_special_tokens=True)` reads them as text. The chat template refuses messages that contain one, unless
`apply_chat_template(messages, sanitize_control_tokens=True, sanitized=True)` reads them as text (transformers
5.23 can do this).
"""
BASE_INPUTS = """inputs = tokenizer("<|endoftext|>Once upon a time", return_tensors="pt")"""
CHAT_INPUTS = """messages = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""


def model_card(gpt, stored, name):
    """The text of an export's README.md."""
    config = gpt.config
    n_tables = 1 if config.tied else 2
    n_padding = n_tables * (config.vocab_size - config.n_vocab) * config.n_embd  # weights that are not exported
    n_params = gpt.n_params() - n_padding
    architecture = ARCHITECTURES[family_of(config)]
    inputs = BASE_INPUTS if stored["stage"] == "pretrain" else CHAT_INPUTS
    text = CARD.format(name=name, n_params=n_params, architecture=architecture, inputs=inputs, **vars(config))
    return text + "\n".join(describe_stages(stored)) + "\n"


def describe_stages(stored):
    """Lines of Markdown on how a checkpoint was trained: its stage, then the earlier ones, the latest first."""
    lines = []
    stages = [stored, *stored.get("before", [])]
    for stage in stages:
        settings = stage.get("settings", {})
        if "model" in settings:
            lines += ["", f"## Imported from {settings['model']}", "", "- data and license: see there"]
            continue
        lines += ["", f"## Stage {stage['stage']}, step {stage['step']:,}", ""]
        lines += [f"- {name}: {value:.4f}" for name, value in stage.get("metrics", {}).items()]
        lines += [f"- data: {source} ({license_of(source)})" for source in stage.get("sources", [])]
        lines.append("- settings: " + ", ".join(f"`{name}={value!r}`" for name, value in settings.items()))
    base = stages[-1].get("settings", {}).get("checkpoint")
    if base:  # a checkpoint of an earlier version does not contain the earlier stages
        lines += ["", f"It started from {base}: add that model's data and settings."]
    return lines


def license_of(source):
    """The license of a data source; a source may also be a file or folder of a dataset."""
    for name, license_name in LICENSES.items():
        if f"{source}/".startswith(f"{name}/"):
            return license_name
    return "license not known here: look it up"


# ----------------------------------------------------------------------------------------------------------------------
# import


def import_model(model, path, overwrite):
    """Write a checkpoint. model: a folder of Hugging Face's format, or owner/name of a model on the Hub."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another --out, or --overwrite=True")
    folder = Path(model)
    if not model or not folder.is_dir():
        folder = fetch_model(model)
    hf = read_json(folder / "config.json", dict)
    try:
        config = config_from_hf(hf)
        tokenizer = tokenizer_from_hf(folder, config.n_vocab)
        with torch.device("meta"):  # the weights come from the files
            gpt = GPT(config)
        gpt.load_state_dict(weights_from_hf(read_weights(folder), gpt), assign=True)
    except BadInput as error:
        raise BadInput(f"{model}: {error}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = dict(tokenizer=tokenizer.name, stage=hf.get("fgpt_stage", "pretrain"), settings={"model": model})
    if tokenizer.vocabulary:
        entries["vocabulary"] = tokenizer.vocabulary
    save_checkpoint(path, gpt, step=0, tokens=0, metrics={}, **entries)
    print(f"{path}: {config.n_layer} layers of width {config.n_embd}, {config.n_vocab:,} tokens")


def fetch_model(repo):
    """Download and verify a model of the Hub; returns its folder."""
    if not is_repo(repo):
        raise FileNotFoundError(f"--model={repo}: no such folder (a model of the Hub is owner/name)")
    folder = MODELS / repo
    needed = re.compile(r"(config|tokenizer|vocab)\.json|model[^/]*\.safetensors")
    for file in list_hub(repo, wanted=needed.fullmatch, kind="models"):
        download(file, folder)
    return folder


def config_from_hf(hf):
    """The GPTConfig for a config.json. BadInput, naming the value, for a model that fgpt cannot compute."""
    families = {model_type: family for family, model_type in MODEL_TYPES.items()}
    model_type = hf.get("model_type")
    if model_type not in families:
        raise BadInput(f"model_type is {model_type!r}; fgpt has counterparts of {' and '.join(families)}")
    family = families[model_type]
    constants = dict(HF_CONSTANTS[family])
    values = dict(tied=bool(hf.get("tie_word_embeddings", family == "gpt2")))  # transformers' defaults
    if family == "modern":
        defaults = dict(head_dim=128, rope_theta=10000.0)  # of transformers
        rope = hf.get("rope_parameters") or {}  # contains rope_theta in transformers 5; in 4 it is a value of its own
        hf = defaults | hf | rope
        constants["num_key_value_heads"] = hf.get("num_attention_heads")  # grouped-query attention has fewer
        values["rope_theta"] = float(hf["rope_theta"])
    for name, value in constants.items():
        if hf.get(name, value) != value:
            raise BadInput(f"{name} is {hf[name]!r}; fgpt's models have {value!r}")
    values |= {name: hf.get(hf_name) or 0 for name, hf_name in HF_SIZES[family].items()}
    n_vocab = values["n_vocab"]
    try:
        return GPTConfig(vocab_size=round_up(n_vocab, 64), **FAMILIES[family] | values)
    except ValueError as error:
        raise BadInput(str(error)) from None


def tokenizer_from_hf(folder, n_vocab):
    """The tokenizer of a folder: bytes, gpt2, or a custom vocabulary that fgpt exported. BadInput for any other.

    The number of ids does not decide: many models have as many as GPT-2.
    """
    if n_vocab in TOKENIZERS:
        tokenizer = Tokenizer(TOKENIZERS[n_vocab])
        if has_same_ids(folder, tokenizer):
            return tokenizer
    path = folder / "tokenizer.json"
    if path.exists():
        tokenizer = Tokenizer("custom", vocabulary_from_hf(read_json(path, TOKENIZER_JSON), n_vocab))
        if has_same_ids(folder, tokenizer):
            return tokenizer
    known = ", ".join(map(str, TOKENIZERS))
    raise BadInput(f"the {n_vocab} ids are not those of a tokenizer of fgpt ({known}), nor of one that it exported")


def has_same_ids(folder, tokenizer):
    """Whether the vocabulary files of a folder, if it has any, give all ordinary tokens the ids of this tokenizer."""
    vocabularies = []
    if (folder / "tokenizer.json").exists():
        vocabularies.append(read_json(folder / "tokenizer.json", {"model": {"vocab": dict}})["model"]["vocab"])
    if (folder / "vocab.json").exists():
        vocabularies.append(read_json(folder / "vocab.json", dict))
    expected = {bytes_to_letters(token): i for token, i in ordinary_ids(tokenizer).items()}
    return all(vocab.get(token) == i for vocab in vocabularies for token, i in expected.items())


def vocabulary_from_hf(tokenizer_json, n_vocab):
    """The text of a custom vocabulary, from the tokenizer.json of its export. BadInput for any other file."""
    specials = {entry["content"]: entry["id"] for entry in tokenizer_json["added_tokens"]}
    n_ordinary = n_vocab - len(SPECIALS)
    if specials != {text: n_ordinary + i for i, text in enumerate(SPECIALS)}:
        raise BadInput(f"the {n_vocab} ids of tokenizer.json are not those of a tokenizer that fgpt exported")
    vocab = tokenizer_json["model"]["vocab"]
    tokens = sorted((text for text in vocab if text not in specials), key=vocab.get)
    return vocabulary_text(map(letters_to_bytes, tokens))


def read_weights(folder):
    """All weights of a folder's model*.safetensors, {hf_name: tensor}. OSError if there is none, or one is damaged."""
    load_file = import_safetensors().load_file
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise FileNotFoundError(
            f"{folder}: no model.safetensors there (a pytorch_model.bin may hold code and is not read: "
            "save_pretrained of transformers writes .safetensors)"
        )
    weights = {}
    for path in paths:
        try:
            weights |= load_file(path)
        except Exception as error:  # safetensors raises its own kinds
            raise OSError(f"{path}: damaged ({error}): download it again") from None
    return weights


def weights_from_hf(weights, gpt):
    """The model's state dict, fp32, from {hf_name: tensor}. BadInput where weights are missing, unknown, or do not fit.

    New rows of embedding and head (padding, and the chat tokens of OpenAI's GPT-2) get the mean of the other rows: a
    row of zeros would have logit 0, which is far more than GPT-2 gives to most tokens.
    """
    config = gpt.config
    family = family_of(config)
    weights = {hf_name.removeprefix(PREFIXES[family]): p for hf_name, p in weights.items()}
    is_mask = re.compile(r"\.attn\.(masked_)?bias$").search  # GPT-2's files contain the masks of attention
    weights = {hf_name: p for hf_name, p in weights.items() if not is_mask(hf_name)}
    head = weights.pop("lm_head.weight", None) if config.tied else None
    state = {}
    for name, p in gpt.state_dict().items():
        hf_names, is_transposed = hf_weights_of(name, family)
        missing = [hf_name for hf_name in hf_names if hf_name not in weights]
        if missing:
            raise BadInput(f"no weight {missing[0]}: is a file missing?")
        parts = [weights.pop(hf_name) for hf_name in hf_names]
        if name == "wte.weight" and head is not None and not torch.equal(head, parts[0]):
            raise BadInput("its head is not its embedding, although config.json says tie_word_embeddings")
        if name in ("wte.weight", "lm_head.weight"):
            n_new = config.vocab_size - config.n_vocab
            parts.append(parts[0].float().mean(dim=0).expand(n_new, -1))
        if is_transposed:
            parts = [part.T for part in parts]
        state[name] = torch.cat(parts).float()
        if state[name].shape != p.shape:
            raise BadInput(f"weight {hf_names[0]} is {tuple(parts[0].shape)}, which does not fit config.json")
    if weights:
        raise BadInput(f"weight {next(iter(weights))} has no counterpart in fgpt")
    return state


if __name__ == "__main__":
    _command = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    configure(globals())
    main(_command)
