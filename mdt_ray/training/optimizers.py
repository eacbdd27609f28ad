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
    not 0, parameters and state stay as they are, and nothing waits for the device. Every parameter must have a gradient in
    every step; ValueError where one has none."""

    found_inf: torch.Tensor | None = None

    def gradients(self, group: dict) -> tuple[Tensors, torch.Tensor]:
        """The group's gradients, and whether to skip the step, a scalar bool tensor."""
        grads = [p.grad for p in group["params"]]
        if any(grad is None for grad in grads):
            missing = [tuple(p.shape) for p in group["params"] if p.grad is None]
            raise ValueError(f"parameters of shapes {missing} have no gradient: must be in the loss, or not be given to "
                             f"{type(self).__name__}")
        return grads, grads[0].new_zeros((), dtype=torch.bool) if self.found_inf is None else self.found_inf.bool()

    def values(self, group: dict, name: str, scalar: bool = False) -> Tensors:
        """A tensor of state for every parameter, of its shape or a scalar, zeros at first."""
        for p in group["params"]:
            if name not in self.state[p]:
                self.state[p][name] = p.new_zeros(()) if scalar else torch.zeros_like(p)
        return [self.state[p][name] for p in group["params"]]


class Adan(Skipping):
    """Adaptive Nesterov momentum (arXiv 2208.06677, Algorithm 1) with the bias corrections of its authors' code.

    Its state is in one piece for all parameters, and a step works on CHUNK numbers at a time: few operations however many
    parameters there are, and little memory beside the state.

    Args:
        betas: decays of the gradient, of its differences, and of the square of both (one less the paper's betas).
        compiled: make one kernel of a chunk's operations, by torch.compile.
    """

    CHUNK = 2**22

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float = 1e-3,
                 betas: tuple[float, float, float] = (0.98, 0.92, 0.99), eps: float = 1e-8, weight_decay: float = 0.0,
                 compiled: bool = False):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.update = torch.compile(adan_update, dynamic=False) if compiled else adan_update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update. `closure` is there for torch's signature only."""
        for group in self.param_groups:
            params, lr = group["params"], group["lr"]
            grads, skip = self.gradients(group)
            flat = torch.cat([grad.flatten() for grad in grads])  # (N,)
            flat.masked_fill_(skip, 0.0)  # what is not finite would stay so in any product with 0
            state = self.state[params[0]]
            if not state:  # (not `step`: torch leaves that on the CPU when it loads)
                state["num_updates"] = flat.new_zeros(())
                state |= {name: torch.zeros_like(flat) for name in ADAN_STATE}
            taken = (~skip).to(flat.dtype)
            state["num_updates"] += taken
            tensors = (flat, *(state[name] for name in ADAN_STATE))
            for chunk in zip(*(tensor.split(self.CHUNK) for tensor in tensors), strict=True):
                self.update(*chunk, state["num_updates"], taken, *group["betas"], group["eps"])
            flat *= lr * taken
            sizes = [p.numel() for p in params]
            torch._foreach_sub_(params, [part.view_as(p) for part, p in zip(flat.split(sizes), params, strict=True)])
            if group["weight_decay"]:
                torch._foreach_div_(params, 1 + lr * group["weight_decay"] * taken)


ADAN_STATE = ("previous_grad", "grad_avg", "diff_avg", "square_avg")


def adan_update(grad: torch.Tensor, previous_grad: torch.Tensor, grad_avg: torch.Tensor, diff_avg: torch.Tensor,
                square_avg: torch.Tensor, count: torch.Tensor, taken: torch.Tensor, b1: float, b2: float, b3: float,
                eps: float) -> None:
    """Adan's step number `count` for (n,) numbers: makes the direction of a gradient, and updates the state, in place; where
    `taken` is 0, the state stays."""
    # The first difference is none: there is no gradient before.
    diff = (grad - previous_grad) * (count > 1)
    previous_grad.lerp_(grad, taken)
    grad_avg.lerp_(grad, taken * (1 - b1))
    diff_avg.lerp_(diff, taken * (1 - b2))
    square_avg.lerp_((grad + b2 * diff).square(), taken * (1 - b3))
    count = count.clamp(min=1)  # (where the first step is skipped)
    direction = grad_avg / (1 - b1**count) + b2 * diff_avg / (1 - b2**count)
    grad.copy_(direction / ((square_avg / (1 - b3**count)).sqrt() + eps))


class Muon(Skipping):
    """Momentum whose matrices are made orthogonal (Jordan 2024), for hidden weights; AdamW for everything else.

    An update has the root mean square of AdamW's (arXiv 2502.16982, section 2.2), so that one learning rate and one weight
    decay serve both.

    Args:
        matrices: hidden weights, and of how many matrices, one on top of the other, each consists: they are made orthogonal
            one by one.
        rest: the parameters for AdamW.
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
        (grads, _), moments = self.gradients(rest), [self.values(rest, name) for name in ("exp_avg", "exp_avg_sq")]
        counts = self.values(rest, "num_updates", scalar=True)  # (not `step`: torch leaves that on the CPU when it loads)
        adamw(rest["params"], grads, *moments, [], counts, fused=True, found_inf=self.found_inf, amsgrad=False,
              beta1=b1, beta2=b2, lr=lr, weight_decay=rest["weight_decay"], eps=rest["eps"], maximize=False)

    def _update_matrices(self, group: dict) -> None:
        params, momentum, lr = group["params"], group["momentum"], group["lr"]
        (grads, skip), momenta = self.gradients(group), self.values(group, "momentum")
        for grad in grads:
            grad.masked_fill_(skip, 0.0)
        taken = (~skip).float()
        torch._foreach_mul_(momenta, torch.where(skip, 1.0, momentum))
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
            # The root mean square is 1 / sqrt(longer side) for an orthogonal matrix, and about 0.2 for AdamW's updates.
            factor = -lr * 0.2 * max(shape) ** 0.5 * taken
            torch._foreach_add_(pieces, list(orthogonal(torch.stack(their_updates)).mul_(factor).unbind()))


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Matrices (N, rows, columns) with their singular values, but for those below 0.3% of the norm, taken to about 1 (0.7 to
    1.2); contiguous, float32.

    Five Newton-Schulz iterations in bf16 with the coefficients of Jordan 2024, which rise fast rather than converge.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = (wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        gram = wide @ wide.mT  # (N, rows, rows)
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide if x.shape[1] <= x.shape[2] else wide.mT).float().contiguous()
