"""Muon: momentum, orthogonalized, for the matrices inside a network. Needs only torch: copy this file where you like.

    optimizer = Muon([p for p in model.blocks.parameters() if p.ndim == 2], lr=0.02)

Embeddings, the output head, norms and biases belong to another optimizer, such as AdamW.
"""

import torch
import torch.distributed as dist


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024, kellerjordan.github.io/posts/muon), with equal steps for neurons.

    The update is the Nesterov momentum, orthogonalized, times lr * sqrt(max(1, rows / cols)) (Jordan's rule). Its rows
    or columns are normalized by a running second moment of decay beta2 (NorMuon; 0: off). Weight decay is decoupled.
    A parameter group may set `n_split`, the number of matrices that each of its parameters holds, one below the other:
    a fused QKV matrix is three. Convolution kernels (out, in, height, width) are matrices of `out` rows. Matrices of
    the same shape are orthogonalized together. In several processes (torch.distributed) each one orthogonalizes its
    share; the gradients must be the same in all.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, beta2=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, beta2=beta2, weight_decay=weight_decay, n_split=1))

    def add_param_group(self, group):
        """ValueError for a parameter that is neither a matrix nor a kernel (4-D). The constructor calls this, too."""
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
        """One update. closure: computes the loss and its gradients first, as in torch.optim; returns that loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                self.step_same_shape(params, group)
        return loss

    def step_same_shape(self, params, group):
        """Update parameters of one shape (n_split * rows, cols), or of convolution kernels."""
        n = group["n_split"]
        rows, cols = params[0].shape[0] // n, params[0][0].numel()
        updates = torch.stack([self.nesterov(p, group["momentum"]) for p in params])
        updates = orthogonalize_shared(updates.reshape(-1, rows, cols))  # a kernel may be stored channels last
        step_size = group["lr"] * max(1, rows / cols) ** 0.5
        for p, update in zip(params, updates.split(n), strict=True):
            update = update.to(p.dtype)  # (n, rows, cols)
            if group["beta2"]:
                update = normalize_neurons(update, self.second_moment(p, update), group["beta2"])
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.reshape(p.shape), alpha=-step_size)

    def nesterov(self, p, momentum):
        """Nesterov momentum: the gradient blended with its running average."""
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["momentum"], momentum)

    def second_moment(self, p, update):
        """(n, rows, 1) or (n, 1, cols): the running mean that `normalize_neurons` keeps for a parameter."""
        state = self.state[p]
        if "second" not in state:
            n, rows, cols = update.shape
            shape = (n, rows, 1) if rows >= cols else (n, 1, cols)
            state["second"] = update.new_zeros(shape)
        return state["second"]


def orthogonalize(G, steps=5):
    """Bring all singular values of each matrix near 1 and keep its singular vectors. G: (n, rows, cols).

    Newton-Schulz iteration with the quintic coefficients of Keller Jordan (kellerjordan.github.io/posts/muon, 2024),
    which leave all but the smallest singular values between about 0.7 and 1.2. Computed in bf16 on GPUs, as there, and
    under autocast.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    use_bf16 = G.is_cuda or torch.is_autocast_enabled(G.device.type)
    X = G.bfloat16() if use_bf16 else G
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT  # so that X @ X.mT is the small product
    X = X / (X.norm(dim=(-2, -1), keepdim=True).to(X.dtype) + 1e-7)  # autocast makes norms fp32
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # bA + cAA
        X = torch.baddbmm(X, B, X, beta=a)  # aX + BX
    return X.mT if tall else X


def orthogonalize_shared(G):
    """`orthogonalize`, shared between the processes, which all hold the same G (n, rows, cols)."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return orthogonalize(G)
    rank, world = dist.get_rank(), dist.get_world_size()
    share = -(-len(G) // world)  # matrices for each process; the last ones get zeros to fill up theirs
    mine = G[rank * share : (rank + 1) * share]
    padding = G.new_zeros(share - len(mine), *G.shape[1:])
    mine = orthogonalize(torch.cat((mine, padding))).contiguous()
    every = mine.new_empty(world * share, *G.shape[1:])
    dist.all_gather(list(every.split(share)), mine)
    return every[: len(G)]


def normalize_neurons(update, second_moment, beta2):
    """Give the neurons of each orthogonalized matrix equal steps (NorMuon, Li et al. 2025, arXiv:2510.05491).

    update: (n, rows, cols). second_moment: (n, rows, 1) or (n, 1, cols), the running mean of the squared entries of
    each row or column, changed in place. Each matrix keeps its norm. The paper always takes rows, but the rows of a
    wide orthogonalized matrix are equal already, so there we take the columns.
    """
    over = -1 if second_moment.shape[-1] == 1 else -2
    norm = update.norm(dim=(-2, -1), keepdim=True)
    second_moment.lerp_(update.square().mean(dim=over, keepdim=True), 1 - beta2)
    update = update / (second_moment.sqrt() + 1e-10)
    return update * (norm / (update.norm(dim=(-2, -1), keepdim=True) + 1e-10))
