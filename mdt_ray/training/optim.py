"""Which optimiser a model gets, the learning rate as a function of the step, and the clipping of gradients."""

import math

import torch
from torch import nn

from mdt_ray.config import OptimConfig
from mdt_ray.models.layers import Block
from mdt_ray.training.optimizers import Adan, Muon

STACKED = {"attn.qkv": 3, "adaLN_modulation.1": 6}
"""Linear layers of a block whose weight is several matrices on top of each other: q, k, v; a shift, scale and gate for
attention and for the MLP."""


def build_optimizer(model: nn.Module, config: OptimConfig, compiled: bool = False) -> torch.optim.Optimizer:
    """Fused AdamW (paper section 5.1) or Adan (MDTv2) over all parameters, or Muon for the matrices of the blocks and AdamW
    for the rest. Each skips a step by itself where its attribute `found_inf` is a tensor that is not 0.

    `compiled` makes few kernels of Adan's many; the other two have few.
    """
    if config.name == "adan":
        return Adan(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, compiled=compiled)
    if config.name == "muon":
        matrices = hidden_matrices(model)
        rest = [p for p in model.parameters() if p not in matrices]
        return Muon(matrices, rest, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    """Weights of all linear layers inside blocks, and how many matrices each of them is."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    layers = [(name, layer) for block in blocks for name, layer in block.named_modules() if isinstance(layer, nn.Linear)]
    return {layer.weight: STACKED.get(name, 1) for name, layer in layers}


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


def clip_gradients(model: nn.Module, clip_norm: float | None) -> torch.Tensor:
    """Scale the gradients to a global norm of at most `clip_norm`; returns the norm before, a scalar tensor (no sync)."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm
