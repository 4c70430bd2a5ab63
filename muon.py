"""Muon, an optimizer for the matrices inside a network. Needs only torch: copy this file where you like.

    optimizer = Muon([p for p in model.blocks.parameters() if p.ndim == 2], lr=0.02)

Embeddings, the output head, norms and biases belong to another optimizer, such as AdamW.
"""

import math

import torch
import torch.distributed as dist


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) with NorMuon's normalization of the neurons.

    Each step moves a matrix by its Nesterov momentum, orthogonalized, times lr * sqrt(max(1, rows / cols)) (Jordan's
    rule). Matrices of the same shape are orthogonalized together. Under torch.distributed each process orthogonalizes
    its share of them; all processes must have the same gradients.

    params: matrices (2-D), and convolution kernels (out, in, height, width), which are treated as matrices of `out`
        rows. A parameter group may set `n_split`, the number of matrices that are stacked in each of its parameters:
        3 for a fused QKV matrix.
    lr: learning rate.
    momentum: decay of the running average of the gradients.
    beta2: decay of NorMuon's running second moment (see `normalize_neurons`); 0 turns the normalization off.
    weight_decay: decoupled, as in AdamW.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, beta2=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, beta2=beta2, weight_decay=weight_decay, n_split=1))

    def add_param_group(self, group):
        """Add parameters; the constructor calls this too. ValueError for one that is neither 2-D nor 4-D."""
        params = group["params"]
        group = {**group, "params": [params] if isinstance(params, torch.Tensor) else list(params)}
        for p in group["params"]:
            if p.ndim not in (2, 4):
                raise ValueError(
                    f"Muon is for matrices (2-D) and convolution kernels (4-D): give the parameter of shape "
                    f"{tuple(p.shape)} to AdamW"
                )
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure=None):
        """Update the parameters that have gradients. closure: computes loss and gradients first; returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((p.shape, p.dtype), []).append(p)
            for params in by_shape.values():
                self.step_same_shape(params, group)
        return loss

    def step_same_shape(self, params, group):
        """Update P parameters, all of shape (n_split * rows, cols) or all kernels of the same shape."""
        n = group["n_split"]
        rows = params[0].shape[0] // n
        cols = params[0][0].numel()
        updates = torch.stack([self.update_momentum(p, group["momentum"]) for p in params])  # (P, *shape)
        updates = updates.reshape(-1, rows, cols)  # (P * n, rows, cols); view fails for kernels stored channels last
        updates = orthogonalize_distributed(updates).to(params[0].dtype)
        if group["beta2"]:
            self.normalize(params, updates, group["beta2"])
        step_size = group["lr"] * max(1, rows / cols) ** 0.5
        for p, update in zip(params, updates.split(n), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.reshape(p.shape), alpha=-step_size)

    def update_momentum(self, p, momentum):
        """Advance the running average of p's gradients; returns the gradient blended with it (Nesterov momentum)."""
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["momentum"], momentum)

    def normalize(self, params, updates, beta2):
        """Apply `normalize_neurons` to the updates of P parameters, (P * n, rows, cols), in place."""
        parts = updates.split(len(updates) // len(params))  # (n, rows, cols) of each parameter
        for p, update in zip(params, parts, strict=True):
            if "second" not in self.state[p]:
                self.state[p]["second"] = torch.zeros_like(mean_square(update))  # (n, rows, 1) or (n, 1, cols)
        moments = [self.state[p]["second"] for p in params]
        stacked = torch.cat(moments)
        normalize_neurons(updates, stacked, beta2)
        for moment, new in zip(moments, stacked.split(len(moments[0])), strict=True):
            moment.copy_(new)


def orthogonalize(G, steps=5):
    """Bring all singular values of each matrix near 1 and keep its singular vectors. G: (n, rows, cols).

    Newton-Schulz iteration with the quintic coefficients of Keller Jordan (kellerjordan.github.io/posts/muon, 2024),
    which leave all but the smallest singular values between about 0.7 and 1.2. Computes in bf16 on GPUs, as Jordan
    does, and under autocast.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    use_bf16 = G.is_cuda or torch.is_autocast_enabled(G.device.type)
    X = G.bfloat16() if use_bf16 else G
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT  # so that X @ X.mT is the small product
    norm = X.norm(dim=(-2, -1), keepdim=True).to(X.dtype)  # (n, 1, 1); autocast makes norms fp32
    X = X / (norm + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X.mT if tall else X


def orthogonalize_distributed(G):
    """`orthogonalize` with the work divided among the processes, which all hold the same G. G: (n, rows, cols)."""
    is_distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not is_distributed:
        return orthogonalize(G)
    rank = dist.get_rank()
    world = dist.get_world_size()
    share = math.ceil(len(G) / world)  # matrices per process
    mine = G[rank * share : (rank + 1) * share]
    padding = G.new_zeros(share - len(mine), *G.shape[1:])  # all_gather needs the same number from each process
    mine = orthogonalize(torch.cat((mine, padding))).contiguous()
    gathered = mine.new_empty(world * share, *G.shape[1:])
    # not all_gather_into_tensor, which torch 2.13 calls deprecated, and for which 2.9 has no other name
    dist.all_gather(list(gathered.split(share)), mine)
    return gathered[: len(G)]


def normalize_neurons(updates, second_moment, beta2):
    """Scale each row (the weights of a neuron) so that all rows have updates of about equal size, averaged over time.

    This is NorMuon (Li et al. 2025, arXiv:2510.05491), except that the columns of wide matrices are scaled: the rows of
    a wide orthogonalized matrix have equal size already. The norm of each matrix stays the same. Both are changed in
    place.
    updates: (n, rows, cols). second_moment: the running mean of `mean_square(updates)`.
    """
    second_moment.lerp_(mean_square(updates), 1 - beta2)
    norm_before = updates.norm(dim=(-2, -1), keepdim=True)  # (n, 1, 1)
    updates.div_(second_moment.sqrt().add_(1e-10))
    norm_after = updates.norm(dim=(-2, -1), keepdim=True)
    updates.mul_(norm_before / (norm_after + 1e-10))


def mean_square(updates):
    """The mean of the squared entries of each row, (n, rows, 1), or of each column of wide matrices, (n, 1, cols)."""
    _, rows, cols = updates.shape
    dim = -1 if rows >= cols else -2
    return updates.square().mean(dim=dim, keepdim=True)
