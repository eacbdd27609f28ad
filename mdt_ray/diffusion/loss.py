"""Forward process, reverse step and hybrid loss of improved DDPM (arXiv 2102.09672), as DiT and MDT train with them.

1000 linear betas 1e-4..2e-2, noise prediction, learned-range variance. Not a sampler: that is sampling.py.

B batch, C latent channels, h x w latent size.
"""

import functools
import math
from typing import NamedTuple

import torch

from mdt_ray.config import NUM_TIMESTEPS

BETA_START, BETA_END = 1e-4, 2e-2
BIN_HALF_WIDTH = 1 / 255  # of a pixel on [-1, 1]
OPEN_BIN = 0.999  # |x| beyond which the discretised Gaussian's bin is open
MIN_PROBABILITY = 1e-12


class Schedule(NamedTuple):
    """Tables over the timestep, each (1000,) float32, computed in float64."""

    sqrt_alphas_cumprod: torch.Tensor
    sqrt_one_minus_alphas_cumprod: torch.Tensor
    sqrt_recip_alphas_cumprod: torch.Tensor
    sqrt_recipm1_alphas_cumprod: torch.Tensor
    posterior_mean_x_0: torch.Tensor
    posterior_mean_x_t: torch.Tensor
    posterior_log_variance: torch.Tensor
    log_betas: torch.Tensor


@functools.cache
def schedule(device: torch.device) -> Schedule:
    """The tables on a device (DDPM eq. 7 for the posterior)."""
    betas = torch.linspace(BETA_START, BETA_END, NUM_TIMESTEPS, dtype=torch.float64)
    alphas_cumprod = (1 - betas).cumprod(0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    posterior_variance[0] = posterior_variance[1]  # it is 0, and its logarithm is needed
    tables = Schedule(
        sqrt_alphas_cumprod=alphas_cumprod.sqrt(),
        sqrt_one_minus_alphas_cumprod=(1 - alphas_cumprod).sqrt(),
        sqrt_recip_alphas_cumprod=(1 / alphas_cumprod).sqrt(),
        sqrt_recipm1_alphas_cumprod=(1 / alphas_cumprod - 1).sqrt(),
        posterior_mean_x_0=betas * previous.sqrt() / (1 - alphas_cumprod),
        posterior_mean_x_t=(1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
        posterior_log_variance=posterior_variance.log(),
        log_betas=betas.log(),
    )
    return Schedule(*(table.float().to(device) for table in tables))


def _at(table: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return table[t][:, None, None, None]  # (B, 1, 1, 1)


def q_sample(x_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Noisy latents x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; x_0 and eps (B, C, h, w), t (B,)."""
    s = schedule(x_0.device)
    return _at(s.sqrt_alphas_cumprod, t) * x_0 + _at(s.sqrt_one_minus_alphas_cumprod, t) * eps


def p_mean_variance(model_output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """The reverse step p(x_{t-1} | x_t) of a model with learned-range variance (arXiv 2102.09672 eq. 15).

    Args: model_output (B, 2C, h, w), x_t (B, C, h, w), t (B,).
    Returns: mean, log_variance, x_0 (the predicted one), each (B, C, h, w).
    """
    s = schedule(x_t.device)
    eps, v = model_output.chunk(2, dim=1)  # 2 x (B, C, h, w)
    share = (v + 1) / 2
    log_variance = share * _at(s.log_betas, t) + (1 - share) * _at(s.posterior_log_variance, t)
    x_0 = _at(s.sqrt_recip_alphas_cumprod, t) * x_t - _at(s.sqrt_recipm1_alphas_cumprod, t) * eps
    return {"mean": _posterior_mean(x_0, x_t, t), "log_variance": log_variance, "x_0": x_0}


def training_losses(model_output: torch.Tensor, x_0: torch.Tensor, x_t: torch.Tensor, eps: torch.Tensor, t: torch.Tensor,
                    min_snr_gamma: float | None = None, where: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The hybrid loss of each sample: mean squared error of the noise plus the variational term in bits per dimension.

    Args:
        model_output: (B, 2C, h, w), noise then variance interpolation.
        x_0, x_t, eps: clean latents, noisy latents, the noise, (B, C, h, w).
        t: timesteps (B,), 0..999.
        min_snr_gamma: weigh the squared error by min(snr, gamma) / snr (arXiv 2303.09556, for noise prediction; MDTv2: 5).
        where: means are taken over these latent pixels only, (B, 1, h, w) bool with at least one True a sample; None: all.
    Returns: mse, vb, loss = weight mse + vb, each (B,) float32. The variational term does not reach the predicted noise.
    Raises ValueError if the output does not have twice the channels of x_0.
    """
    if model_output.shape[1] != 2 * x_0.shape[1] or model_output.shape[2:] != x_0.shape[2:]:
        raise ValueError(f"model_output has shape {tuple(model_output.shape)}: must be x_0's {tuple(x_0.shape)} with twice "
                         "the channels")
    model_output = model_output.float()
    predicted, v = model_output.chunk(2, dim=1)
    mse = _mean((predicted - eps).square(), where)  # (B,)
    bound = _variational_bound(torch.cat([predicted.detach(), v], dim=1), x_0, x_t, t)  # (B, C, h, w)
    vb = _mean(bound, where)  # (B,)
    weight = 1.0 if min_snr_gamma is None else min_snr_weight(t, min_snr_gamma)
    return {"mse": mse, "vb": vb, "loss": weight * mse + vb}


def min_snr_weight(t: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(snr, gamma) / snr with snr = abar_t / (1 - abar_t), of t's shape, float32 (arXiv 2303.09556 eq. 5)."""
    s = schedule(t.device)
    snr = (s.sqrt_alphas_cumprod[t] / s.sqrt_one_minus_alphas_cumprod[t]).square()
    return snr.clamp(max=gamma) / snr


def _mean(values: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
    """Mean of each sample over all, or the chosen, latent pixels. (B, C, h, w) -> (B,)"""
    if where is None:
        return values.mean(dim=(1, 2, 3))
    return (values * where).sum(dim=(1, 2, 3)) / (where.sum(dim=(1, 2, 3)) * values.shape[1])


def _posterior_mean(x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    s = schedule(x_t.device)
    return _at(s.posterior_mean_x_0, t) * x_0 + _at(s.posterior_mean_x_t, t) * x_t


def _variational_bound(model_output: torch.Tensor, x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """KL(q(x_{t-1} | x_t, x_0) || p), or at t = 0 the negative log-likelihood of x_0, in bits. (B, C, h, w)"""
    p = p_mean_variance(model_output, x_t, t)
    q_mean = _posterior_mean(x_0, x_t, t)
    q_log_variance = _at(schedule(x_t.device).posterior_log_variance, t)
    kl = 0.5 * (p["log_variance"] - q_log_variance - 1 + (q_log_variance - p["log_variance"]).exp()
                + (q_mean - p["mean"]).square() * (-p["log_variance"]).exp())
    nll = -_discretised_log_likelihood(x_0, p["mean"], 0.5 * p["log_variance"])
    bound = torch.where(t[:, None, None, None] == 0, nll, kl)
    return bound / math.log(2)


def _discretised_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Log-probability of x's bin of half-width 1/255 under a Gaussian (DDPM section 3.3)."""
    inverse_scale = (-log_scale).exp()
    upper = _normal_cdf((x - mean + BIN_HALF_WIDTH) * inverse_scale)
    lower = _normal_cdf((x - mean - BIN_HALF_WIDTH) * inverse_scale)
    probability = torch.where(x < -OPEN_BIN, upper, torch.where(x > OPEN_BIN, 1 - lower, upper - lower))
    return probability.clamp(min=MIN_PROBABILITY).log()


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation that the published losses use; the exact one differs by up to 2e-4."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
