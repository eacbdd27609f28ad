"""The exponential moving average of the weights."""

import torch

from mdt_ray.config import EmaConfig


def ema_decay(step: int, config: EmaConfig) -> float:
    """Decay of the update after step 0, 1, ...: `decay`, or with warm-up min(decay, (1 + n) / (10 + n)), n = step + 1."""
    n = step + 1
    return min(config.decay, (1 + n) / (10 + n)) if config.warmup else config.decay


@torch.no_grad()
def update_ema(ema: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) model, in place, all parameters in one call."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
