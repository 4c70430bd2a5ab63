"""The network, its loss, generation with a cache, and its parameter groups. Needs torch and muon.py: copy both files.

One class, `GPT`, and two proven combinations of its flags:

    GPT(GPTConfig())                        gpt2: LayerNorm, learned positions, GELU, biases (as OpenAI's GPT-2)
    GPT(GPTConfig(**FAMILIES["modern"]))    modern: RMSNorm, rotary positions, QK-norm, SwiGLU, no biases (as Qwen3)

Shapes in comments: B batch, T positions, C = n_embd, H = n_head, D = head_dim, V = vocab_size, S positions in a cache.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from muon import Muon

IGNORE = -100  # a target that does not count
LOGITS_AT_ONCE = 2**27  # elements: the loss is computed in chunks of rows so that no more exist at once


@dataclass
class GPTConfig:
    """The defaults are the 712M model of config/fgpt_712m.py. ValueError for sizes that do not fit together."""

    block_size: int = 1024  # positions
    vocab_size: int = 50304  # rows of the embedding, padded to a multiple of 64
    n_vocab: int = 50259  # ids that exist; the rows above are never produced
    n_layer: int = 32
    n_head: int = 24
    n_embd: int = 1296
    head_dim: int = 0  # 0: n_embd / n_head
    mlp_dim: int = 0  # 0: 4 n_embd, with swiglu 8/3 n_embd rounded up to a multiple of 64
    rmsnorm: bool = False  # else LayerNorm
    rotary: bool = False  # else learned positions
    rope_theta: float = 10000.0  # base of the wavelengths of rotary positions
    qk_norm: bool = False
    swiglu: bool = False  # else GELU
    bias: bool = True
    zero_init: bool = False  # output projections start at zero: every block starts as the identity
    tied: bool = True  # the output head is the embedding

    def __post_init__(self):
        if min(self.block_size, self.n_layer, self.n_head, self.n_embd, self.n_vocab) < 1:
            raise ValueError("block_size, n_layer, n_head, n_embd and n_vocab must be at least 1")
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta must be above 0, not {self.rope_theta}")
        if self.n_vocab > self.vocab_size:
            raise ValueError(f"n_vocab {self.n_vocab} does not fit into vocab_size {self.vocab_size}")
        if self.head_dim == 0:
            if self.n_embd % self.n_head:
                raise ValueError(
                    f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: change one, or set head_dim"
                )
            self.head_dim = self.n_embd // self.n_head
        if self.mlp_dim == 0:
            self.mlp_dim = 4 * self.n_embd
            if self.swiglu:
                self.mlp_dim = round_up(8 * self.n_embd / 3, 64)
        if min(self.head_dim, self.mlp_dim) < 1:
            raise ValueError(f"head_dim {self.head_dim} and mlp_dim {self.mlp_dim} must not be negative")
        if self.rotary and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}")


FAMILIES = {
    "gpt2": dict(),
    "modern": dict(rmsnorm=True, rotary=True, qk_norm=True, swiglu=True, bias=False, zero_init=True, tied=False),
}


def family_of(config):
    """The family that a config belongs to, judged by its positions."""
    return "modern" if config.rotary else "gpt2"


def flags_unlike_family(config):
    """The flags in which a config differs from its family.

    `tied` is not one: both families may be either. Nor is zero_init: it matters only for new weights.
    """
    expected = GPTConfig(**FAMILIES[family_of(config)])
    flags = [flag for flag in FAMILIES["modern"] if flag not in ("tied", "zero_init")]
    return [flag for flag in flags if getattr(config, flag) != getattr(expected, flag)]


def round_up(number, multiple):
    """The smallest multiple of `multiple` that is at least `number`."""
    return math.ceil(number / multiple) * multiple


# ----------------------------------------------------------------------------------------------------------------------
# the network


class GPT(nn.Module):
    """The network, with new weights: ids (B, T) in; logits, a loss, or generated ids out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # True: a fifth more compute, activations of one block at a time
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.rotary:
            powers = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
            angles = torch.outer(torch.arange(config.block_size, dtype=torch.float32), config.rope_theta**-powers)
            cos = angles.cos()  # (block_size, D/2)
            sin = angles.sin()
            self.register_buffer("cos", torch.cat((cos, cos), dim=-1), persistent=False)  # (block_size, D)
            self.register_buffer("sin", torch.cat((-sin, sin), dim=-1), persistent=False)
        else:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = make_norm(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's: normal(0, 0.02), output projections smaller by sqrt(2 n_layer), or zero; biases 0, norms 1."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                std = 0.0 if self.config.zero_init else 0.02 / math.sqrt(2 * self.config.n_layer)
                p.normal_(0.0, std)
            elif p.ndim == 2:
                p.normal_(0.0, 0.02)
            elif name.endswith("bias"):
                p.zero_()

    def forward(self, idx, targets=None):
        """Without targets: logits (B, T, n_vocab). With targets (B, T): the SUM over them of -log p, in nats.

        Targets of -100 do not count. The caller divides by the number of targets in the whole global batch, so that
        accumulation over unequal micro-batches stays exact.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.logits(x)
        return cross_entropy_sum(x.flatten(0, 1), self.head, targets.flatten(), self.config.n_vocab)

    def hidden(self, idx, cache=None):
        """(B, T) ids -> (B, T, C) after the final norm. With a cache (AttentionCache), idx continues what it holds.

        ValueError when T is larger than block_size.
        """
        T = idx.shape[1]
        if cache is not None:
            positions = cache.advance(T)  # (B, T)
        elif T <= self.config.block_size:
            positions = torch.arange(T, device=idx.device)[None]  # (1, T)
        else:
            raise ValueError(f"{T} tokens do not fit into block_size {self.config.block_size}")
        return self.trunk(idx, positions, cache)

    def trunk(self, idx, positions, cache):
        """The part of `hidden` that `generate` compiles: all but the cache's bookkeeping."""
        x = self.wte(idx)  # (B, T, C)
        rope = None
        if self.config.rotary:
            rope = (self.cos[positions][:, :, None], self.sin[positions][:, :, None])  # (1 or B, T, 1, D)
        else:
            x = x + self.wpe(positions)
        for block in self.h:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, cache)
        return self.ln_f(x)

    def logits(self, hidden):
        """(..., C) -> (..., n_vocab): scores of the ids that exist, and of no padding row."""
        return F.linear(hidden, self.head)[..., : self.config.n_vocab]

    @property
    def head(self):
        """The weight of the output head, (V, C)."""
        return self.wte.weight if self.config.tied else self.lm_head.weight

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Training FLOPs per token: 6 per parameter that multiplies, and those of attention.

        Attention's are half of 12 x layers x heads x head size x context (PaLM, Chowdhery et al. 2022, appendix B), as
        it is causal.
        """
        c = self.config
        n_multiplied = self.n_params()
        if not c.tied:
            n_multiplied -= self.wte.weight.numel()
        if not c.rotary:
            n_multiplied -= self.wpe.weight.numel()
        return 6 * n_multiplied + 6 * c.n_layer * c.n_head * c.head_dim * c.block_size

    def compute_dtype(self):
        """The dtype that matrices are multiplied in: autocast's where it is on, else that of the weights."""
        device = self.wte.weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.wte.weight.dtype

    @torch.no_grad()
    def for_decoding(self):
        """Convert the weights, permanently, to what `generate` reads fastest; returns the model.

        Under autocast the weights take its dtype, so that autocast is no longer needed. On a CPU in fp32, matrices with
        more rows than columns are stored by columns: a token of a 30M-parameter model then took 0.54 of the time.
        """
        dtype = self.compute_dtype()
        by_columns = self.wte.weight.device.type == "cpu" and dtype == torch.float32
        for name, p in self.named_parameters():
            p.data = p.data.to(dtype)
            is_looked_up = name == "wpe.weight" or (name == "wte.weight" and not self.config.tied)
            if by_columns and not is_looked_up and p.ndim == 2 and p.shape[0] > p.shape[1]:
                p.data = p.data.t().contiguous().t()
        return self

    def new_cache(self, batch_size, n_positions, static=False):
        """A KVCache for this model, in the dtype that it computes in. A static one may be longer than asked."""
        if static:
            n_positions = round_up(n_positions, 256)  # so that there are few sizes to compile for
        n_positions = min(n_positions, self.config.block_size)
        return KVCache(self.config, batch_size, n_positions, self.wte.weight.device, self.compute_dtype(), static)

    @torch.inference_mode()
    def generate(
        self, prompts, max_new_tokens, temperature=1.0, top_k=0, stop=None, generator=None,
        top_p=1.0, cache=None, compile=False,
    ):  # fmt: skip
        """Continue B prompts (lists of ids, which may differ in length); each step yields (B,) ids, on the CPU.

        temperature 0 takes the most likely id, and each row is as if it were alone. top_k > 0 samples among the k most
        likely, top_p < 1 among the fewest that together have this probability. A row ends with the id `stop`, which is
        yielded, after max_new_tokens, or when it fills block_size; after that it yields -1 until all rows have ended.

        cache: a KVCache for B rows, new or from an earlier call; what the prompts share with it is not computed again.
        compile: steps of one shape (a given cache must be static), in CUDA graphs on a GPU; the first two steps are
        slow, and so are the first ones with another cache.
        ValueError for an empty or too long prompt and a cache of another size; FloatingPointError when the logits are
        not numbers.
        """
        block_size = self.config.block_size
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        if not prompts or lengths.min() < 1 or lengths.max() > block_size:
            raise ValueError(f"a prompt must have 1 to {block_size} tokens (block_size), not {lengths.tolist()}")
        room = (block_size + 1 - lengths).clamp(max=max_new_tokens)  # (B,): ids that each row can get
        n_positions = max(int((lengths + room).max()) - 1, int(lengths.max()))  # - 1: the last new id is not read
        if cache is None:
            cache = self.new_cache(len(prompts), n_positions, static=compile)
        if cache.n_positions < n_positions or len(cache.ids) != len(prompts) or (compile and not cache.static):
            kind = "static cache" if compile else "cache"
            raise ValueError(f"a {kind} of {len(prompts)} rows and at least {n_positions} positions is needed")
        trunk = torch.compile(self.trunk, mode="reduce-overhead", dynamic=False) if compile else self.trunk
        hidden = self.prefill(prompts, cache)  # (B, C)
        stopped = torch.zeros(len(prompts), dtype=torch.bool)
        for step in range(int(room.max())):
            next_ids = sample_next(self.logits(hidden).float(), temperature, top_k, top_p, generator)
            ids = next_ids.cpu()  # the one time in a step that the host waits for the device
            if ids.min() < 0:
                raise FloatingPointError(
                    "the model's logits are not numbers: training diverged; use an earlier checkpoint"
                )
            yield ids.masked_fill(stopped | (room <= step), -1)
            stopped |= ids == stop
            live = ~stopped & (room > step + 1)
            if not live.any():
                break
            cache.make_room()
            hidden = trunk(next_ids[:, None], cache.advance(1), cache)[:, -1]
            for row in live.nonzero()[:, 0].tolist():
                cache.ids[row].append(int(ids[row]))

    def prefill(self, prompts, cache):
        """Read B prompts (lists of ids) into the cache, except what it holds; (B, C) at the last id of each."""
        n_known = cache.rewind(prompts)
        device = cache.rows.device
        longest = max(len(prompt) for prompt in prompts)
        # Prompts are padded on the right: causal attention hides the padding, and as each row continues at its own
        # length, the padding is overwritten.
        padded = [prompt[n_known:] + [0] * (longest - len(prompt)) for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        hidden = self.hidden(torch.tensor(padded, device=device), cache)  # (B, T, C)
        cache.lengths = lengths
        cache.ids = [list(prompt) for prompt in prompts]
        return hidden[cache.rows[:, 0], lengths - n_known - 1]  # (B, C)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, cache=None):
        x = x + self.attn(self.ln_1(x), rope, cache)
        return x + self.mlp(self.ln_2(x))


class RMSNorm(nn.RMSNorm):
    def forward(self, x):  # the weight follows x under autocast: unequal dtypes would lose the fused kernel
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config):
    if config.rmsnorm:
        return RMSNorm(config.n_embd, eps=1e-6)
    return nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)


class Attention(nn.Module):
    """Causal self-attention: (B, T, C) -> (B, T, C).

    rope: (cos, sin) of the positions, see `rotate`. cache: an AttentionCache.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.n_head = config.n_head
        self.head_dim = config.head_dim
        self.layer = layer
        width = config.n_head * config.head_dim
        self.c_attn = nn.Linear(config.n_embd, 3 * width, bias=config.bias)  # queries, keys, values
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else None

    def forward(self, x, rope=None, cache=None):
        B, T, _ = x.shape
        in_fp32 = cache is None and x.device.type == "cpu"  # in bf16 attention took 1.7 times as long there
        qkv = self.c_attn(x)  # (B, T, 3 H D)
        dtype = torch.float32 if in_fp32 else qkv.dtype
        q, k, v = (part.view(B, T, self.n_head, -1).to(dtype) for part in qkv.chunk(3, -1))  # (B, T, H, D)
        if self.q_norm is not None:
            q = self.q_norm(q)
            k = self.k_norm(k)
        if rope is not None:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        # under autocast norms and rotation may have produced fp32
        q, k, v = (part.to(dtype).transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
        scale = self.head_dim**-0.5
        if cache is not None:
            k, v, mask = cache.extend(self.layer, k, v)  # (B, H, S, D or more) twice, (B, 1, T, S)
            q = F.pad(q, (0, k.shape[-1] - self.head_dim))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[..., : self.head_dim]
        elif in_fp32:
            with torch.autocast(x.device.type, enabled=False):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            pad = (0, -self.head_dim % 8)  # cuDNN's attention needs multiples of 8, others pad on their own
            q, k, v = (F.pad(part, pad) for part in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., : self.head_dim]
        y = y.transpose(1, 2).to(qkv.dtype)  # (B, T, H, D)
        return self.c_proj(y.reshape(B, T, -1))  # (B, T, C)


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021): turns each pair (x[i], x[i + D/2]) by the angle of its position.

    x (B, T, H, D); cos, sin (B or 1, T, 1, D), where the first half of sin is negative.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_gate = nn.Linear(config.n_embd, config.mlp_dim, bias=config.bias) if config.swiglu else None
        self.c_fc = nn.Linear(config.n_embd, config.mlp_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_dim, config.n_embd, bias=config.bias)

    def forward(self, x):
        if self.c_gate is not None:  # SwiGLU (Shazeer 2020)
            return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # OpenAI's gelu_new


def cross_entropy_sum(x, weight, targets, n_vocab):
    """Sum of -log softmax(x @ weight[:n_vocab].T)[target] over targets that are not -100.

    x (N, C), weight (V, C), targets (N,). The padding rows are multiplied too, as GPUs are slow at odd widths.
    Above LOGITS_AT_ONCE logits, one chunk of rows at a time, whose logits are computed again for the backward pass:
    16 x 1024 rows of 50,304 fp32 logits and their gradient would be 6.6 GB. A compiled model keeps them in bf16, so
    computing them twice, 3% of a step's products, would save too little.
    """
    rows = max(1, LOGITS_AT_ONCE // weight.shape[0])
    if len(x) <= rows or torch.compiler.is_compiling():
        return chunk_loss(x, weight, targets, n_vocab)
    chunks = zip(x.split(rows), targets.split(rows), strict=True)
    return sum(checkpoint(chunk_loss, x_, weight, targets_, n_vocab, use_reentrant=False) for x_, targets_ in chunks)


def chunk_loss(x, weight, targets, n_vocab):
    logits = F.linear(x, weight)[:, :n_vocab].float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


# ----------------------------------------------------------------------------------------------------------------------
# generation


class AttentionCache(Protocol):
    """What `GPT.hidden` needs of a cache: KVCache here, and the shared beginnings of hellaswag.py.

    For each call of `hidden`, `advance` is called once, then `extend` once per layer.
    """

    def advance(self, n_new):
        """Announce the next n_new tokens of each sequence; returns their absolute positions (B, n_new)."""

    def extend(self, layer, k, v):
        """Take keys and values (B, H, n_new, D) of these tokens in a layer; returns what their queries read.

        These are all keys and values, (B, H, S, D rounded up to a multiple of 8), and the mask (B, 1, n_new, S) of who
        sees whom.
        """


class KVCache:
    """An AttentionCache: keys and values of the positions seen so far, of B sequences that may differ in length.

    Preallocated, (B, H, S, D) a layer, D rounded up to a multiple of 8 with zeros, as fused kernels need it. `lengths`
    (B,) counts the filled positions of each sequence, `ids` lists their tokens; `end` is an upper bound of the lengths
    that the host knows without asking the device. Attention reads up to `end`, or with `static` all S positions, so
    that every step has the same shapes, for torch.compile.
    Use: `rewind` to what new prompts share with it, `advance` and `extend` for the rest of the prompts; then for each
    further token `make_room`, `advance` and `extend`.
    """

    def __init__(self, config, batch_size, n_positions, device, dtype, static=False):
        shape = (batch_size, config.n_head, n_positions, round_up(config.head_dim, 8))
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.rows = torch.arange(batch_size, device=device)[:, None]  # (B, 1)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.ids = [[] for _ in range(batch_size)]
        self.end = 0
        self.n_positions = n_positions
        self.static = static
        if static:  # so that CUDA graphs write into these tensors, not into copies of them
            for tensor in self.k + self.v:
                torch._dynamo.mark_static_address(tensor, guard=False)

    def rewind(self, prompts):
        """Keep the beginning that each prompt shares with its row, the shortest of all rows; returns its length.

        A prompt's last id never counts, as the output at its position is needed.
        """
        shared = [n_shared([ids, prompt[:-1]]) for ids, prompt in zip(self.ids, prompts, strict=True)]
        self.end = min(shared)
        self.ids = [ids[: self.end] for ids in self.ids]
        self.lengths.fill_(self.end)
        return self.end

    def make_room(self):
        """For one more position: in a full cache the last one, which belongs to a finished row, is overwritten."""
        if self.end == self.n_positions:
            self.end -= 1
            self.lengths.clamp_(max=self.end)

    def advance(self, n_new):
        """See AttentionCache. ValueError when the cache is full."""
        self.end += n_new
        if self.end > self.n_positions:
            raise ValueError(f"{self.end} positions do not fit into a cache of {self.n_positions}")
        self.n_read = self.n_positions if self.static else self.end
        self.positions = self.lengths[:, None] + torch.arange(n_new, device=self.lengths.device)
        seen = torch.arange(self.n_read, device=self.lengths.device)
        self.mask = (seen <= self.positions[:, :, None])[:, None]  # (B, 1, T, S)
        self.lengths += n_new
        return self.positions

    def extend(self, layer, k, v):
        """See AttentionCache."""
        all_k = self.k[layer]
        all_v = self.v[layer]
        D = k.shape[-1]
        # rows (B, 1) and positions (B, T) index together, and their dimensions come first: (B, T, H, D)
        all_k[self.rows, :, self.positions, :D] = k.transpose(1, 2).to(all_k.dtype)
        all_v[self.rows, :, self.positions, :D] = v.transpose(1, 2).to(all_v.dtype)
        return all_k[:, :, : self.n_read].to(k.dtype), all_v[:, :, : self.n_read].to(v.dtype), self.mask


def n_shared(lists):
    """How many ids the lists have in common at their beginning."""
    n = 0
    for column in zip(*lists, strict=False):
        if len(set(column)) > 1:
            break
        n += 1
    return n


def sample_next(logits, temperature, top_k=0, top_p=1.0, generator=None):
    """(B, n_vocab) logits -> (B,) ids; -1 where the logits are not numbers. Does not wait for the device."""
    best, ids = logits.max(dim=-1)  # nan counts as the greatest
    if temperature > 0:
        ids = sample_ids(logits, temperature, top_k, top_p, generator)
    return ids.masked_fill(~best.isfinite(), -1)


def sample_ids(logits, temperature, top_k, top_p, generator):
    """(B, n_vocab) logits -> (B,) ids, drawn from softmax(logits / temperature), cut by top_k and top_p."""
    n_vocab = logits.shape[-1]
    order = None
    if 0 < top_k < n_vocab or top_p < 1:
        logits, order = logits.topk(min(top_k or n_vocab, n_vocab), dim=-1)  # (B, k), descending
    probs = (logits / temperature).softmax(dim=-1)
    if top_p < 1:  # drop the tokens after the cumulative probability reached top_p
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0)
    # With E_i from Exp(1), E_i / p_i is the smallest with probability p_i, so p_i / E_i the largest. torch.multinomial
    # draws like this too, but it waits for the device to check its input.
    ids = (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(dim=-1)
    if order is not None:
        ids = order.gather(-1, ids[:, None])[:, 0]
    return ids


# ----------------------------------------------------------------------------------------------------------------------
# parameter groups


OPTIMIZERS = ("muon", "adamw")


def make_optimizers(
    model, optimizer="muon", learning_rate=3e-3, muon_learning_rate=0.02, weight_decay=0.01, beta2=0.95
):
    """[AdamW] or [AdamW, Muon], whose groups (each with a `name`) hold every parameter of the model exactly once.

    Muon gets the matrices of the blocks, AdamW the embeddings, an untied head, norms and biases, or everything with
    optimizer="adamw". Weight decay applies to all but norms and biases. ValueError for another optimizer.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {optimizer!r}")
    embeddings, head, vectors, qkv, matrices = [], [], [], [], []
    for name, p in model.named_parameters():
        if p.ndim < 2:
            vectors.append(p)
        elif name == "lm_head.weight":
            head.append(p)
        elif not name.startswith("h."):
            embeddings.append(p)
        elif name.endswith("c_attn.weight"):
            qkv.append(p)
        else:
            matrices.append(p)
    other_groups = [
        dict(name="embeddings", params=embeddings, weight_decay=weight_decay),
        dict(name="norms and biases", params=vectors, weight_decay=0.0),
    ]
    if head:
        other_groups.append(dict(name="head", params=head, weight_decay=weight_decay))
    qkv_group = dict(name="attention QKV", params=qkv, weight_decay=weight_decay)
    matrix_groups = [qkv_group, dict(name="other matrices", params=matrices, weight_decay=weight_decay)]
    has_fused = embeddings[0].device.type in ("cpu", "cuda", "mps", "xpu")
    adamw = dict(lr=learning_rate, betas=(0.9, beta2), eps=1e-8, fused=has_fused)
    if optimizer == "adamw":
        optimizers = [torch.optim.AdamW(other_groups + matrix_groups, **adamw)]
    else:
        qkv_group["n_split"] = 3  # queries, keys and values
        optimizers = [torch.optim.AdamW(other_groups, **adamw), Muon(matrix_groups, lr=muon_learning_rate)]
    groups = [group for opt in optimizers for group in opt.param_groups]
    placed = sorted(id(p) for group in groups for p in group["params"])
    assert placed == sorted(id(p) for p in model.parameters()), "every parameter must be in exactly one group"
    for group in groups:
        group["initial_lr"] = group["lr"]  # the schedule multiplies this
    return optimizers
