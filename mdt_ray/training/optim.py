"""AdamW and the learning rate as a function of the step. The optimiser skips a step by itself where `found_inf` is set."""

import math

import torch

from mdt_ray.config import OptimConfig


def build_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over all parameters (paper section 5.1)."""
    return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)


def learning_rate(step: int, config: OptimConfig) -> float:
    """Rate of step 0, 1, ...: linear warm-up, then constant or a cosine to `final_lr_share` of the peak."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
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
