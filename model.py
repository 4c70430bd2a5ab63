"""The network, its optimizers, generation, and checkpoint files. Needs only torch: copy this file where you like.

One class, `GPT`, and two proven combinations of its flags:

    GPT(GPTConfig())                        gpt2: LayerNorm, learned positions, GELU, biases (as OpenAI's GPT-2)
    GPT(GPTConfig(**FAMILIES["modern"]))    modern: RMSNorm, rotary positions, QK-norm, SwiGLU, no biases (as Qwen3)

Shapes in comments: B batch, T positions, C = n_embd, H = n_head, D = head_dim, V = vocab_size, S positions in a cache.
"""

import math
import os
import sys
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

FORMAT_VERSION = 1  # of checkpoint files: whoever raises it teaches load_checkpoint to read the earlier ones
IGNORE = -100  # a target that does not count
ATTENTION_IN_FP32 = {"cpu"}  # devices where it is faster than in bf16, which took 1.7 times as long
LOGITS_AT_ONCE = 2**27  # elements: the loss is computed in chunks of rows so that no more exist together


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

    def __post_init__(self):
        if min(self.block_size, self.n_layer, self.n_head, self.n_embd, self.n_vocab) < 1:
            raise ValueError("block_size, n_layer, n_head, n_embd and n_vocab must be at least 1")
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta must be above 0, not {self.rope_theta}")
        if self.n_vocab > self.vocab_size:
            raise ValueError(f"n_vocab {self.n_vocab} does not fit into vocab_size {self.vocab_size}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: change one, or set head_dim"
            )
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.rotary and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}")
        self.mlp_dim = self.mlp_dim or (-(-8 * self.n_embd // 3 // 64) * 64 if self.swiglu else 4 * self.n_embd)
        if min(self.head_dim, self.mlp_dim) < 1:
            raise ValueError(f"head_dim {self.head_dim} and mlp_dim {self.mlp_dim} must not be negative")


FAMILIES = {
    "gpt2": dict(),
    "modern": dict(rmsnorm=True, rotary=True, qk_norm=True, swiglu=True, bias=False, zero_init=True),
}


class RMSNorm(nn.RMSNorm):
    def forward(self, x):  # the weight follows x under autocast: unequal dtypes would lose the fused kernel
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config):
    if config.rmsnorm:
        return RMSNorm(config.n_embd, eps=1e-6)
    return nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021), half-split layout. x (B, H, T, D); cos, sin (B or 1, 1, T, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention: (B, T, C) -> (B, T, C).

    rope: (cos, sin) of the positions, see `rotate`. cache: keeps earlier keys and values and says who sees what.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.head_dim, self.layer = config.n_head, config.head_dim, layer
        width = config.n_head * config.head_dim
        self.c_attn = nn.Linear(config.n_embd, 3 * width, bias=config.bias)  # queries, keys, values
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else None

    def forward(self, x, rope=None, cache=None):
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, self.head_dim).permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms and rotation may have come out in fp32
        if cache is not None:
            k, v, mask = cache.extend(self.layer, k, v)  # (B, H, S, D or more) twice, (B, 1, T, S)
            q = F.pad(q, (0, k.shape[-1] - self.head_dim))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.head_dim**-0.5)
            y = y[..., : self.head_dim]
        elif x.device.type in ATTENTION_IN_FP32:
            with torch.autocast(x.device.type, enabled=False):
                y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True).to(v.dtype)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


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


class KVCache:
    """Keys and values of the positions seen so far, for B sequences that may differ in length.

    Preallocated, (B, H, S, D) a layer, D rounded up to a multiple of 8 with zeros: fused kernels want that. `lengths`
    (B,) counts the filled positions of each sequence, `ids` lists the tokens that stand there; `end` is an upper bound
    of the lengths that the host knows without asking the device.
    Its life: `rewind` to what new prompts share with it; `begin` says how many positions come next, `extend` takes
    their keys and values layer by layer; before each further token `make_room`, and again `begin` and `extend`.
    Attention reads up to `end`, and with `static` all S positions: each step has the same shapes, for torch.compile.
    """

    def __init__(self, config, batch_size, n_positions, device, dtype, static=False):
        shape = (batch_size, config.n_head, n_positions, -(-config.head_dim // 8) * 8)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.rows = torch.arange(batch_size, device=device)[:, None]  # (B, 1)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.ids, self.end, self.n_positions, self.static = [[] for _ in range(batch_size)], 0, n_positions, static
        if static:  # tells CUDA graphs to write into these tensors, not into copies of them
            for tensor in self.k + self.v:
                torch._dynamo.mark_static_address(tensor, guard=False)

    def rewind(self, prompts):
        """Forget all but what every prompt begins with, its last id excepted; returns how many positions that is."""
        self.end = min(len(os.path.commonprefix([ids, p[:-1]])) for ids, p in zip(self.ids, prompts, strict=True))
        self.ids = [ids[: self.end] for ids in self.ids]
        self.lengths.fill_(self.end)
        return self.end

    def begin(self, n_new):
        """Room for n_new positions a sequence; returns their absolute positions (B, n_new)."""
        self.end += n_new
        if self.end > self.n_positions:
            raise ValueError(f"{self.end} positions do not fit into a cache of {self.n_positions}")
        self.n_read = self.n_positions if self.static else self.end
        self.positions = self.lengths[:, None] + torch.arange(n_new, device=self.lengths.device)
        seen = torch.arange(self.n_read, device=self.lengths.device)
        self.mask = (seen <= self.positions[:, :, None])[:, None]  # (B, 1, T, S)
        self.lengths += n_new
        return self.positions

    def make_room(self):
        """For one more position: where all is full, of a row that has ended, its last one will be overwritten."""
        if self.end == self.n_positions:
            self.end -= 1
            self.lengths.clamp_(max=self.end)

    def extend(self, layer, k, v):
        """Store k, v (B, H, T, D) of the new positions; return all keys and values and the mask of who sees what."""
        all_k, all_v = self.k[layer], self.v[layer]
        D = k.shape[-1]
        all_k[self.rows, :, self.positions, :D] = k.transpose(1, 2).to(all_k.dtype)
        all_v[self.rows, :, self.positions, :D] = v.transpose(1, 2).to(all_v.dtype)
        return all_k[:, :, : self.n_read].to(k.dtype), all_v[:, :, : self.n_read].to(v.dtype), self.mask


class GPT(nn.Module):
    """The network, with new weights: ids (B, T) in; logits, a loss, or generated ids out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # True: a third more compute, activations of one block at a time
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output head: tied
        if config.rotary:
            powers = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
            angles = torch.outer(torch.arange(config.block_size, dtype=torch.float32), config.rope_theta**-powers)
            self.register_buffer("cos", angles.cos(), persistent=False)  # (block_size, D/2)
            self.register_buffer("sin", angles.sin(), persistent=False)
        else:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = make_norm(config)
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

    def hidden(self, idx, cache=None):
        """(B, T) ids -> (B, T, C) after the final norm. With a cache, idx continues what the cache holds.

        cache: a KVCache, or another object with its `begin` and `extend`, as hellaswag.py has. ValueError for too long.
        """
        B, T = idx.shape
        if cache is None and T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size {self.config.block_size}")
        positions = torch.arange(T, device=idx.device)[None] if cache is None else cache.begin(T)  # (1 or B, T)
        return self.trunk(idx, positions, cache)

    def trunk(self, idx, positions, cache):
        """`hidden` without the cache's bookkeeping, which `generate` does not compile."""
        x, rope = self.wte(idx), None  # (B, T, C)
        if self.config.rotary:
            rope = self.cos[positions][:, None], self.sin[positions][:, None]  # (1 or B, 1, T, D/2)
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
        return F.linear(hidden, self.wte.weight[: self.config.n_vocab])

    def forward(self, idx, targets=None):
        """Without targets: logits (B, T, vocab_size). With targets (B, T): the SUM over them of -log p, in nats.

        Targets of -100 do not count. The caller divides, by the number of targets in the whole global batch, so that
        accumulation over unequal micro-batches stays exact.
        """
        x = self.hidden(idx)
        if targets is None:
            return F.linear(x, self.wte.weight)
        return cross_entropy_sum(x.flatten(0, 1), self.wte.weight, targets.flatten())

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Training FLOPs per token: 6 per parameter that multiplies, and those of attention.

        Attention's are half of 12 x layers x heads x head size x context (PaLM, Chowdhery et al. 2022, appendix B), as
        it is causal.
        """
        c = self.config
        n_multiplied = self.n_params() - (0 if c.rotary else self.wpe.weight.numel())
        return 6 * n_multiplied + 6 * c.n_layer * c.n_head * c.head_dim * c.block_size

    def compute_dtype(self):
        """The dtype that matrices are multiplied in: autocast's where it is on, else that of the weights."""
        device = self.wte.weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.wte.weight.dtype

    @torch.no_grad()
    def for_decoding(self):
        """Change the weights, for good, into what `generate` reads fastest; returns the model.

        Called under autocast, they take its dtype, and autocast is not needed any more. On a CPU in fp32, matrices with
        more rows than columns are stored by columns: a token of a 30M-parameter model then took 0.54 of the time.
        """
        dtype = self.compute_dtype()
        for p in self.parameters():
            p.data = p.data.to(dtype)
            if p.ndim == 2 and p.shape[0] > p.shape[1] and p.device.type == "cpu" and dtype == torch.float32:
                p.data = p.data.t().contiguous().t()
        return self

    def new_cache(self, batch_size, n_positions, static=False):
        """A KVCache for this model, in the dtype that it computes in. A static one may be longer than asked."""
        if static:
            n_positions = -(-n_positions // 256) * 256  # few sizes to compile for
        n_positions = min(n_positions, self.config.block_size)
        return KVCache(self.config, batch_size, n_positions, self.wte.weight.device, self.compute_dtype(), static)

    def prefill(self, prompts, cache):
        """Read B prompts (lists of ids) into the cache, but for what it knows; (B, C) at the last id of each."""
        n_known, longest, device = cache.rewind(prompts), max(map(len, prompts)), cache.rows.device
        # Prompts are padded on the right: causal attention keeps the padding out of sight, and as each row goes on at
        # its own length, the padding is overwritten.
        idx = torch.tensor([p[n_known:] + [0] * (longest - len(p)) for p in prompts], device=device)  # (B, T)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        hidden = self.hidden(idx, cache)[cache.rows[:, 0], lengths - n_known - 1]
        cache.lengths, cache.ids = lengths, [list(prompt) for prompt in prompts]
        return hidden

    @torch.inference_mode()
    def generate(
        self, prompts, max_new_tokens, temperature=1.0, top_k=0, stop=None, generator=None,
        top_p=1.0, cache=None, compile=False,
    ):  # fmt: skip
        """Continue B prompts (lists of ids, which may differ in length); a step yields (B,) ids, on the CPU.

        temperature 0 takes the likeliest id, and each row is as if it were alone. top_k > 0 samples among the k
        likeliest, top_p < 1 among the fewest that together have this probability. A row ends with the id `stop`, which
        is yielded, after max_new_tokens, or when it fills block_size; then it yields -1 until all have ended.
        `ends = yield from model.generate(...)` tells which of "stop", "max_new_tokens" and "block_size" ended each.

        cache: a KVCache for B rows, new or of an earlier call; what the prompts share with that is not read again.
        compile: steps of one shape (a given cache must be static), in CUDA graphs on a GPU; the first two take long, as
        may those with another cache.
        ValueError for an empty or too long prompt, a cache of another size, and logits that are not numbers.
        """
        block_size, lengths = self.config.block_size, torch.tensor([len(prompt) for prompt in prompts])
        if not prompts or lengths.min() < 1 or lengths.max() > block_size:
            raise ValueError(f"a prompt must have 1 to {block_size} tokens (block_size), not {lengths.tolist()}")
        room = (block_size + 1 - lengths).clamp(max=max_new_tokens)  # ids a row can get: the last one is not read
        n_positions = max(int((lengths + room).max()) - 1, int(lengths.max()))
        cache = self.new_cache(len(prompts), n_positions, static=compile) if cache is None else cache
        if cache.n_positions < n_positions or len(cache.ids) != len(prompts) or cache.static < compile:
            kind = "be static and " * compile
            raise ValueError(f"the cache must {kind}have {len(prompts)} rows of at least {n_positions} positions")
        trunk = torch.compile(self.trunk, mode="reduce-overhead", dynamic=False) if compile else self.trunk
        hidden, stopped = self.prefill(prompts, cache), torch.zeros(len(prompts), dtype=torch.bool)
        for step in range(int(room.max())):
            next_ids = sample_next(self.logits(hidden).float(), temperature, top_k, top_p, generator)
            ids = next_ids.cpu()  # here, once a step, the host waits for the device
            if ids.min() < 0:
                raise ValueError("the model's logits are not numbers: training diverged; use an earlier checkpoint")
            yield ids.masked_fill(stopped | (room <= step), -1)
            stopped |= (room > step) & (ids == stop)
            live = ~stopped & (room > step + 1)
            if not live.any():
                break
            cache.make_room()
            hidden = trunk(next_ids[:, None], cache.begin(1), cache)[:, -1]
            for row in live.nonzero()[:, 0].tolist():
                cache.ids[row].append(int(ids[row]))
        ends = ["block_size" if r < max_new_tokens else "max_new_tokens" for r in room]
        return ["stop" if row_stopped else end for row_stopped, end in zip(stopped, ends, strict=True)]


def sample_next(logits, temperature, top_k=0, top_p=1.0, generator=None):
    """(B, n_vocab) logits -> (B,) ids; -1 where the logits are not numbers. The host waits for nothing here."""
    best, ids = logits.max(dim=-1)  # nan is the greatest
    if temperature > 0:
        order = None
        if 0 < top_k < logits.shape[-1] or top_p < 1:
            logits, order = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1)  # (B, k), falling
        probs = (logits / temperature).softmax(dim=-1)
        if top_p < 1:
            probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0)  # what comes before is enough already
        # A race: with arrival times exponential of rate p, the first is i with probability p_i. torch.multinomial draws
        # like this as well, but checks its input on the host.
        ids = (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(dim=-1)
        ids = ids if order is None else order.gather(-1, ids[:, None])[:, 0]
    return ids.masked_fill(~best.isfinite(), -1)


def cross_entropy_sum(x, weight, targets):
    """Sum of -log softmax(x @ weight.T)[target] over targets that are not -100. x (N, C), weight (V, C), targets (N,).

    Beyond LOGITS_AT_ONCE logits, a chunk of rows at a time, whose logits are computed again for the backward pass:
    16 x 1024 rows of 50,304 fp32 logits and their gradient would be 6.6 GB.
    """

    def loss_of(x, weight, targets):
        return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=IGNORE, reduction="sum")

    rows = max(1, LOGITS_AT_ONCE // weight.shape[0])
    if len(x) <= rows:
        return loss_of(x, weight, targets)
    chunks = zip(x.split(rows), targets.split(rows), strict=True)
    return sum(checkpoint(loss_of, x_, weight, t, use_reentrant=False) for x_, t in chunks)


# ----------------------------------------------------------------------------------------------------------------------
# the machine: its device, one process or many


def pick_device(device="", dtype="", deterministic=False):
    """(torch.device, maker of its autocast context) for two settings that may be empty. ValueError for unusable ones.

    Empty is cuda where there is one, and bfloat16 on GPUs that have it, else float32. The dtype "native" is bfloat16
    on CPUs too, where they multiply it themselves: elsewhere it would be emulated, and slower than float32.
    deterministic: from here on, only kernels that give the same bits each time.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):  # torch raises the latter where it was built without CUDA
        raise ValueError(f"device {device!r} cannot be used here: try --device=cpu") from None
    if dtype in ("", "native"):
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cpu" and dtype == "native":  # PyTorch has no public name for it
            native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        dtype = "bfloat16" if native else "float32"
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32, bfloat16 or native, not {dtype!r}")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # what stays in fp32 may use TF32
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic needs of cuBLAS
    torch.use_deterministic_algorithms(deterministic)
    return device, partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def join_processes(device=""):
    """Under torchrun: join the other processes and take this one's GPU; from here on only the first one prints.

    Returns rank_and_world(). ValueError when there are more processes than GPUs, or all would take the same.
    """
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        local_rank, on_gpu = int(os.environ["LOCAL_RANK"]), device != "cpu" and torch.cuda.is_available()
        if ":" in device:
            raise ValueError(f"--device={device} under torchrun would be the same for all: leave the number out")
        if on_gpu and local_rank >= torch.cuda.device_count():
            n = torch.cuda.device_count()
            raise ValueError(f"torchrun started more processes than this machine has GPUs: --nproc_per_node={n}")
        if on_gpu:
            torch.cuda.set_device(local_rank)
        # small messages between hosts go through gloo: they do not wait for the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return rank_and_world()


def leave_processes():
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank_and_world():
    """(number of this process, number of processes): (0, 1) unless torchrun started several and they have joined."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def sum_over_ranks(tensor):
    """The tensor, its elements summed over all processes, in place."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


# ----------------------------------------------------------------------------------------------------------------------
# optimizers


def orthogonalize(G, steps=5):
    """Bring all singular values of each matrix near 1, keeping its singular vectors. G (n, rows, cols).

    Newton-Schulz iteration with the quintic coefficients of Keller Jordan (kellerjordan.github.io/posts/muon, 2024),
    which leave all but the smallest singular values between about 0.7 and 1.2. In bf16 on GPUs, as there, and under
    autocast.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16() if G.is_cuda or torch.is_autocast_enabled(G.device.type) else G
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X  # so that X @ X.mT is the small product
    X = X / (X.norm(dim=(-2, -1), keepdim=True).to(X.dtype) + 1e-7)  # autocast makes norms fp32
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # bA + cAA
        X = torch.baddbmm(X, B, X, beta=a)  # aX + BX
    return X.mT if tall else X


def orthogonalize_shared(G):
    """`orthogonalize`, the work shared between processes, which must all hold the same G (n, rows, cols)."""
    rank, world = rank_and_world()
    if world == 1:
        return orthogonalize(G)
    share = -(-len(G) // world)
    mine = G[rank * share : (rank + 1) * share]
    mine = orthogonalize(torch.cat((mine, G.new_zeros(share - len(mine), *G.shape[1:])))).contiguous()
    shares = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(shares, mine)
    return torch.cat(shares)[: len(G)]


def normalize_neurons(update, second_moment, beta2):
    """Give the neurons of each orthogonalized matrix equal steps (NorMuon, Li et al. 2025, arXiv:2510.05491).

    update (n, rows, cols); second_moment (n, rows, 1) or (n, 1, cols): running mean of the squared entries of each row
    or column, changed in place. Each matrix keeps its norm. The paper takes rows always, but those of a wide
    orthogonalized matrix are equal already: there we take the columns.
    """
    norm = update.norm(dim=(-2, -1), keepdim=True)
    second_moment.lerp_(update.square().mean(dim=-1 if second_moment.shape[-1] == 1 else -2, keepdim=True), 1 - beta2)
    update = update / (second_moment.sqrt() + 1e-10)
    return update * (norm / (update.norm(dim=(-2, -1), keepdim=True) + 1e-10))


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024), for matrices inside the network; not for embeddings.

    The step is lr * sqrt(max(1, rows / cols)) (Jordan's rule) times the orthogonalized Nesterov momentum, its neurons
    normalized by a second moment of decay beta2 (0: not); weight decay is decoupled. A parameter group's `n_split` says
    into how many matrices its parameters are cut first, by rows: a fused QKV matrix is three. Matrices of one shape are
    orthogonalized together. Under torchrun every process keeps the momentum and orthogonalizes its share of the
    matrices; gradients must be the same on all.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, beta2=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, beta2=beta2, weight_decay=weight_decay, n_split=1))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])
                same_shape.setdefault(p.shape, []).append((p, update))
            for shape, pairs in same_shape.items():
                n, rows, cols = group["n_split"], shape[0] // group["n_split"], shape[1]
                updates = torch.stack([update for _, update in pairs])
                updates = orthogonalize_shared(updates.view(-1, rows, cols)).split(n)
                step_size = group["lr"] * max(1, rows / cols) ** 0.5
                for (p, _), update in zip(pairs, updates, strict=True):
                    update = update.to(p.dtype)
                    if group["beta2"]:
                        if "second" not in self.state[p]:
                            lines = (rows, 1) if rows >= cols else (1, cols)
                            self.state[p]["second"] = update.new_zeros(n, *lines)
                        update = normalize_neurons(update, self.state[p]["second"], group["beta2"])
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.reshape(shape), alpha=-step_size)


def make_optimizers(model, optimizer="muon", learning_rate=3e-3, muon_learning_rate=0.02, weight_decay=0.1, beta2=0.95):
    """[AdamW] or [AdamW, Muon], whose groups (each with a `name`) hold every parameter of the model exactly once.

    Muon gets the matrices of the blocks, AdamW the embeddings, norms and biases, or all with optimizer="adamw".
    Weight decay: matrices and embeddings. ValueError for another optimizer.
    """
    if optimizer not in ("muon", "adamw"):
        raise ValueError(f"optimizer must be 'muon' or 'adamw', not {optimizer!r}")
    named = list(model.named_parameters())
    qkv = [p for n, p in named if n.endswith("c_attn.weight")]
    matrices = [p for n, p in named if n.startswith("h.") and p.ndim == 2 and not n.endswith("c_attn.weight")]
    embeddings = [p for n, p in named if not n.startswith("h.") and p.ndim == 2]
    vectors = [p for _, p in named if p.ndim < 2]
    groups = [
        dict(name="embeddings", params=embeddings, weight_decay=weight_decay),
        dict(name="norms and biases", params=vectors, weight_decay=0.0),
    ]
    hidden = [
        dict(name="attention QKV", params=qkv, weight_decay=weight_decay),
        dict(name="other matrices", params=matrices, weight_decay=weight_decay),
    ]
    placed = [id(p) for group in groups + hidden for p in group["params"]]
    assert sorted(placed) == sorted(id(p) for _, p in named), "every parameter must be in exactly one group"
    adamw = dict(lr=learning_rate, betas=(0.9, beta2), eps=1e-8, fused=True)
    if optimizer == "adamw":
        optimizers = [torch.optim.AdamW(groups + hidden, **adamw)]
    else:
        hidden[0]["n_split"] = 3
        optimizers = [torch.optim.AdamW(groups, **adamw), Muon(hidden, lr=muon_learning_rate)]
    for group in (group for opt in optimizers for group in opt.param_groups):
        group["initial_lr"] = group["lr"]  # the schedule multiplies this
    return optimizers


# ----------------------------------------------------------------------------------------------------------------------
# checkpoint files: dicts of tensors, numbers and strings, read with weights_only=True; never code


def save_checkpoint(path, model, **entries):
    """Write the model's weights and config, and `entries`, so that at any moment `path` holds a whole file.

    OSError when it cannot be written; what `path` held before is still there.
    """
    temporary = f"{path}.tmp"
    content = {"format_version": FORMAT_VERSION, "config": asdict(model.config), "model": model.state_dict(), **entries}
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        raise OSError(f"{path} could not be written (disk full?), an earlier one is untouched: {error}") from None
    os.replace(temporary, path)
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    os.fsync(folder)  # the new name itself must survive a power cut
    os.close(folder)


def load_checkpoint(path, device="cpu"):
    """The checkpoint's dict, tensors on `device`. FileNotFoundError, or ValueError for a file that is not one."""
    if not os.path.isfile(path):
        what = "a folder, not a checkpoint" if os.path.isdir(path) else "no such checkpoint"
        raise FileNotFoundError(f"{path}: {what}; a run writes best.pt and ckpt.pt into its out_dir")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{path} is damaged or not a checkpoint ({type(error).__name__})") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{path} is not a checkpoint of fgpt: it has no format_version")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has checkpoint format {version}, of a newer fgpt; this one reads up to {FORMAT_VERSION}: update it"
        )
    return content


def load_model(path, device="cpu"):
    """(model in eval mode on `device`, the checkpoint's dict without tensors). ValueError if its parts do not fit.

    Warns on stderr of the weights that a training run began with.
    """
    content = load_checkpoint(path)
    try:
        model = GPT(GPTConfig(**content["config"]))
        model.load_state_dict(content.pop("model"))
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: its weights and config make no model of this version ({reason:.200})") from None
    content.pop("optimizers", None)
    if content.get("stage") == "pretrain" and content.get("step") == 0 and "data" in content:  # of a run, not imported
        print(f"warning: {path} is of step 0, NOT TRAINED; ckpt.pt beside it may be", file=sys.stderr)
    return model.to(device).eval(), content
