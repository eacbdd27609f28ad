"""The optimisers, which skip a step by themselves where `found_inf` is set; the learning rate as a function of the step."""

import math

import torch

from mdt_ray.config import OptimConfig


def build_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW (paper section 5.1) or Adan (MDTv2) over all parameters."""
    if config.name == "adan":
        return Adan(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)


class Adan(torch.optim.Optimizer):
    """Adaptive Nesterov momentum (arXiv 2208.06677, Algorithm 1) with the bias corrections of its authors' code.

    Args:
        betas: decays of the gradient, of its differences, and of the square of both (one less the paper's betas).
    `found_inf`, a scalar tensor, is set before `step`: where it is not 0, parameters and state stay as they are. Nothing
    waits for the device. (That is why it is ours: the one of the kept package, pytorch_optimizer, knows no `found_inf`.)
    """

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float, float] = (0.98, 0.92, 0.99), eps: float = 1e-8,
                 weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update. `closure` is there for torch's signature only."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: torch.Tensor, grad: torch.Tensor, group: dict) -> None:
        state, (b1, b2, b3), lr = self.state[parameter], group["betas"], group["lr"]
        if not state:  # (torch keeps what is called `step` on the CPU when a state is loaded)
            state["num_updates"] = torch.zeros((), device=parameter.device)
            state |= {name: torch.zeros_like(parameter) for name in ("grad_avg", "diff_avg", "square_avg", "previous_grad")}
        skip = torch.zeros((), dtype=torch.bool, device=grad.device) if self.found_inf is None else self.found_inf.bool()
        step = state["num_updates"] + 1
        # The first difference is none: there is no gradient before.
        diff = (grad - state["previous_grad"]) * (step > 1)
        new = {"num_updates": step, "previous_grad": grad,
               "grad_avg": state["grad_avg"].lerp(grad, 1 - b1),
               "diff_avg": state["diff_avg"].lerp(diff, 1 - b2),
               "square_avg": state["square_avg"].lerp((grad + b2 * diff).square(), 1 - b3)}
        direction = new["grad_avg"] / (1 - b1**step) + b2 * new["diff_avg"] / (1 - b2**step)
        scale = (new["square_avg"] / (1 - b3**step)).sqrt() + group["eps"]
        updated = (parameter - lr * direction / scale) / (1 + lr * group["weight_decay"])
        parameter.copy_(torch.where(skip, parameter, updated))
        for name, value in new.items():
            state[name].copy_(torch.where(skip, state[name], value))


def learning_rate(step: int, config: OptimConfig) -> float:
    """Rate of step 0, 1, ...: linear warm-up, then constant, a cosine to `final_lr_share` of the peak, or constant and from
    `schedule_steps` on lr sqrt(schedule_steps / step) (as EDM2, arXiv 2312.02696)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "inverse_sqrt":
        return config.lr * min(1.0, (config.schedule_steps / max(step, 1)) ** 0.5)
    progress = min(1.0, (step - config.warmup_steps) / (config.schedule_steps - config.warmup_steps))
    share = config.final_lr_share + (1 - config.final_lr_share) * (1 + math.cos(math.pi * progress)) / 2
    return config.lr * share


def clip_gradients(model: torch.nn.Module, clip_norm: float | None) -> torch.Tensor:
    """Scale the gradients to a global norm of at most `clip_norm`; returns the norm before, a scalar tensor (no sync)."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm
