"""The moving averages of the weights, all kept while training: constant decays, and EDM2's power functions.

Not the averages of other lengths that are made afterwards: those are posthoc.py.
"""

import copy
import math
from typing import TypeVar

import torch
from torch import nn

from mdt_ray.config import EmaConfig

Module = TypeVar("Module", bound=nn.Module)


def ema_decay(step: int, decay: float, warmup: bool) -> float:
    """Decay of the update after step 0, 1, ...: `decay`, or with warm-up min(decay, (1 + n) / (10 + n)), n = step + 1."""
    n = step + 1
    return min(decay, (1 + n) / (10 + n)) if warmup else decay


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power function whose weights t^gamma have a standard deviation of `sigma_rel` of the length.

    The positive root of sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 (arXiv 2312.02696, section 3.1), in
    (0, 12^-1/2) -> (0, inf). With u = gamma + 2 + 1/3 the cubic has no square term, and three real roots, of which the
    largest is this cosine.
    """
    a = 1 / sigma_rel**2
    p, q = -(a + 1 / 3), 2 / 27 + 4 / 3 * a
    return 2 * math.sqrt(-p / 3) * math.cos(math.acos(3 * q / (2 * p) * math.sqrt(-3 / p)) / 3) - 7 / 3


def sigma_rel_of(gamma: float) -> float:
    """The inverse of `gamma_of`."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def power_update(step: int, gamma: float) -> float:
    """1 - beta of the update after step 0, 1, ...: beta = (1 - 1/t)^(gamma + 1), t = step + 1 (ibid., equation 9).

    The first update takes the weights as they are. At step t, those of step s then count
    (s^(gamma+1) - (s-1)^(gamma+1)) / t^(gamma+1), the integral of the power function's profile over [s - 1, s].
    """
    t = step + 1
    return 1.0 if t == 1 else -math.expm1((gamma + 1) * math.log1p(-1 / t))


def power_names(config: EmaConfig) -> dict[str, float]:
    """Names of the power-function averages, and the sigma_rel of each."""
    return {f"ema_power_{std:.3f}": std for std in config.power_stds}


def updates(step: int, config: EmaConfig) -> dict[str, float]:
    """Names of all averages (of their folders in a checkpoint), and the share of the new weights in each after a step."""
    decays = {"ema": config.decay} | {f"ema_{decay:g}": decay for decay in config.more_decays}
    return ({name: 1 - ema_decay(step, decay, config.warmup) for name, decay in decays.items()} |
            {name: power_update(step, gamma_of(std)) for name, std in power_names(config).items()})


def build_averages(model: Module, config: EmaConfig) -> dict[str, Module]:
    """Copies of a model to be averaged into, by name; `ema` is the one that is sampled from."""
    return {name: copy.deepcopy(model).eval().requires_grad_(False) for name in updates(0, config)}


@torch.no_grad()
def update_averages(averages: dict[str, nn.Module], model: nn.Module, step: int, config: EmaConfig) -> None:
    """Take the weights after step 0, 1, ... into all averages, in place, all parameters of each in one call."""
    weights = list(model.parameters())
    for name, share in updates(step, config).items():
        torch._foreach_lerp_(list(averages[name].parameters()), weights, share)
