"""Adan and Muon, which skip a step by themselves where `found_inf` is set. No choice of parameters or rates here.

PyTorch's own Muon, and the Adan of the kept package pytorch_optimizer, know no `found_inf`: the host would have to wait for
the device in every step to decide.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch.optim.adamw import adamw

Tensors = list[torch.Tensor]


class Skipping(torch.optim.Optimizer):
    """An optimiser with torch's convention of a skipped step: `found_inf`, a scalar tensor set before `step`. Where it is
    not 0, parameters and state stay as they are, and nothing waits for the device."""

    found_inf: torch.Tensor | None = None

    def taken(self, group: dict) -> torch.Tensor:
        """1 where the group's step is taken, 0 where it is skipped; its gradients are 0 then. A scalar tensor."""
        grads = [p.grad for p in group["params"]]
        if self.found_inf is None:
            return grads[0].new_ones(())
        skip = self.found_inf.bool()
        for grad in grads:
            grad.masked_fill_(skip, 0.0)  # what is not finite would stay so in any product with 0
        return (~skip).to(grads[0].dtype)

    def values(self, group: dict, name: str) -> Tensors:
        """A tensor of state for every parameter, zeros at first."""
        for p in group["params"]:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in group["params"]]

    def counts(self, group: dict) -> Tensors:
        """Numbers of steps taken, a scalar for every parameter. (Not `step`: torch leaves that on the CPU when it loads.)"""
        for p in group["params"]:
            if "num_updates" not in self.state[p]:
                self.state[p]["num_updates"] = torch.zeros((), device=p.device)
        return [self.state[p]["num_updates"] for p in group["params"]]


class Adan(Skipping):
    """Adaptive Nesterov momentum (arXiv 2208.06677, Algorithm 1) with the bias corrections of its authors' code.

    Args:
        betas: decays of the gradient, of its differences, and of the square of both (one less the paper's betas).
        compiled: one kernel a parameter, by torch.compile, instead of some thirty.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float = 1e-3,
                 betas: tuple[float, float, float] = (0.98, 0.92, 0.99), eps: float = 1e-8, weight_decay: float = 0.0,
                 compiled: bool = False):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.update = torch.compile(adan_update, dynamic=True) if compiled else adan_update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update. `closure` is there for torch's signature only."""
        for group in self.param_groups:
            params, taken = group["params"], self.taken(group)
            lr = torch.full_like(taken, group["lr"])  # (a number of Python's would be compiled in)
            state = [self.values(group, name) for name in ("previous_grad", "grad_avg", "diff_avg", "square_avg")]
            for count, *tensors in zip(self.counts(group), params, [p.grad for p in params], *state, strict=True):
                count += taken
                flat = [tensor.detach().view(-1) for tensor in tensors]  # (every shape of a parameter would be compiled)
                self.update(*flat, count, taken, lr, *group["betas"], group["eps"], group["weight_decay"])


def adan_update(p: torch.Tensor, grad: torch.Tensor, previous_grad: torch.Tensor, grad_avg: torch.Tensor,
                diff_avg: torch.Tensor, square_avg: torch.Tensor, count: torch.Tensor, taken: torch.Tensor, lr: torch.Tensor,
                b1: float, b2: float, b3: float, eps: float, weight_decay: float) -> None:
    """Adan's step number `count` for one parameter, everything of (N,) in place; nothing where `taken` is 0."""
    # The first difference is none: there is no gradient before.
    diff = (grad - previous_grad) * (count > 1)
    previous_grad.lerp_(grad, taken)
    grad_avg.lerp_(grad, taken * (1 - b1))
    diff_avg.lerp_(diff, taken * (1 - b2))
    square_avg.lerp_((grad + b2 * diff).square(), taken * (1 - b3))
    count = count.clamp(min=1)  # (where the first step is skipped)
    direction = grad_avg / (1 - b1**count) + b2 * diff_avg / (1 - b2**count)
    scale = (square_avg / (1 - b3**count)).sqrt() + eps
    p.sub_(lr * taken * direction / scale).div_(1 + lr * weight_decay * taken)


class Muon(Skipping):
    """Momentum whose matrices are made orthogonal (Jordan 2024), for hidden weights; AdamW for everything else.

    An update has the root mean square of AdamW's (arXiv 2502.16982, section 2.2), so that one learning rate and one weight
    decay serve both.

    Args:
        matrices: hidden weights, and of how many matrices, one on top of the other, each consists: they are made orthogonal
            one by one.
        rest: the parameters for AdamW. All parameters must have a gradient in every step.
    """

    def __init__(self, matrices: Mapping[torch.nn.Parameter, int], rest: Iterable[torch.nn.Parameter], lr: float = 1e-3,
                 momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0):
        super().__init__([{"params": list(matrices), "pieces": list(matrices.values()), "momentum": momentum},
                          {"params": list(rest), "betas": betas, "eps": eps}], {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update. `closure` is there for torch's signature only."""
        matrices, rest = self.param_groups
        self._update_matrices(matrices)
        (b1, b2), lr = rest["betas"], rest["lr"]
        params, exp_avgs, exp_avg_sqs = rest["params"], self.values(rest, "exp_avg"), self.values(rest, "exp_avg_sq")
        adamw(params, [p.grad for p in params], exp_avgs, exp_avg_sqs, [], self.counts(rest), fused=True,
              found_inf=self.found_inf, amsgrad=False, beta1=b1, beta2=b2, lr=lr, weight_decay=rest["weight_decay"],
              eps=rest["eps"], maximize=False)

    def _update_matrices(self, group: dict) -> None:
        params, momentum, lr = group["params"], group["momentum"], group["lr"]
        taken, momenta = self.taken(group), self.values(group, "momentum")
        grads = [p.grad for p in params]
        torch._foreach_mul_(momenta, torch.where(taken > 0, momentum, 1.0))
        torch._foreach_add_(momenta, grads)
        updates = torch._foreach_add(grads, momenta, alpha=momentum)  # as Nesterov's: a step ahead
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"] * taken)
        same_shape: dict[torch.Size, tuple[Tensors, Tensors]] = defaultdict(lambda: ([], []))
        for param, update, number in zip(params, updates, group["pieces"], strict=True):
            for piece, its_update in zip(param.chunk(number), update.chunk(number), strict=True):
                pieces, their_updates = same_shape[piece.shape]
                pieces.append(piece)
                their_updates.append(its_update)
        for shape, (pieces, their_updates) in same_shape.items():
            # An orthogonal matrix has entries of 1 / sqrt(its longer side) on average; AdamW's updates have about 0.2.
            factor = -lr * 0.2 * max(shape) ** 0.5 * taken
            torch._foreach_add_(pieces, list((orthogonal(torch.stack(their_updates)) * factor).unbind()))


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Matrices (N, rows, columns) with their singular values taken to about 1 (0.7 to 1.2), float32.

    Five Newton-Schulz iterations in bf16 with the coefficients of Jordan 2024, which rise fast rather than converge.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = (wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        gram = wide @ wide.mT  # (N, rows, rows)
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide if x.shape[1] <= x.shape[2] else wide.mT).float()
