"""The diffusion maths, guidance and sampling chains against the reference vectors and their own invariants."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from mdt_ray.diffusion import guidance_scale, q_sample, sampling, training_losses
from mdt_ray.diffusion.guidance import guided
from mdt_ray.diffusion.loss import p_mean_variance
from mdt_ray.models import official
from tests.conftest import relative_error, with_prefix

GUIDANCE = {999: 1.0, 750: 1.000105, 500: 1.026901, 400: 1.114446, 300: 1.379745, 250: 1.636545, 200: 2.007723,
            150: 2.496711, 100: 3.059374, 50: 3.568937, 0: 3.8}


@pytest.fixture
def toy(vectors):
    """The toy denoiser of the reference chains."""
    weights = vectors["chain.W"]
    return lambda x, t, y: torch.tanh(torch.einsum("oc,bchw->bohw", weights, x) + t[:, None, None, None].float() / 1000)


# Oracle


def test_losses_equal_reference(vectors):
    x_0, eps, t = vectors["diff.x0"], vectors["diff.eps"], vectors["t"]
    assert 0 in t, "the vectors must reach the discretised likelihood"
    x_t = q_sample(x_0, t, eps)
    assert relative_error(x_t, vectors["diff.x_t"]) <= 1e-4
    losses = training_losses(vectors["diff.model_output"], x_0, x_t, eps, t)
    for name in ("mse", "vb", "loss"):
        assert losses[name].shape == (4,)
        torch.testing.assert_close(losses[name], vectors[f"diff.loss_{name}"], rtol=1e-4, atol=1e-6)


def test_reverse_step_equals_reference(vectors):
    # These vectors were made with x_0 in the place of x_t.
    step = p_mean_variance(vectors["diff.model_output"], vectors["diff.x0"], vectors["t"])
    assert relative_error(step["mean"], vectors["diff.p_mean"]) <= 1e-4
    assert relative_error(step["log_variance"], vectors["diff.p_log_variance"]) <= 1e-4
    assert relative_error(step["x_0"], vectors["diff.p_pred_xstart"]) <= 1e-4


def test_ddpm_chain_equals_reference(vectors, toy, monkeypatch):
    noise = iter(vectors["chain.noise"])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: next(noise))
    out = sampling.sample(toy, vectors["chain.z"], torch.zeros(2, dtype=torch.long), sampling.make_scheduler("ddpm"), 10)
    assert relative_error(out, vectors["chain.ddpm10"]) <= 1e-4


def test_ddim_chain_equals_reference(vectors, toy):
    out = sampling.sample(toy, vectors["chain.z"], torch.zeros(2, dtype=torch.long), sampling.make_scheduler("ddim"), 10)
    assert relative_error(out, vectors["chain.ddim10_eta0"]) <= 1e-4


@pytest.mark.parametrize("num_steps", [50, 250])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_timesteps_are_the_reference_ones(vectors, sampler, num_steps):
    timesteps = sampling.ready(sampling.make_scheduler(sampler), num_steps).timesteps
    assert torch.equal(timesteps.flip(0), vectors[f"diff.respaced_{num_steps}.timestep_map"])


def test_guidance_table():
    for t, expected in GUIDANCE.items():
        assert guidance_scale(t, 3.8, 4).item() == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("origin", ["mdt_v1", "mdt_v2"])
def test_guided_forward_equals_reference(vectors, vector_config, origin):
    model = official.load(with_prefix(vectors, f"{origin}.weights."), vector_config)
    out = guided(model, 10, 3.8, 4, channels=3)(vectors["x"], vectors["t"], vectors["y"])
    assert relative_error(out, vectors[f"{origin}.out_cfg_3.8_pow4"][:4]) <= 1e-4


def test_min_snr_weighs_the_squared_error_only(vectors):
    x_0, eps, output = vectors["diff.x0"], vectors["diff.eps"], vectors["diff.model_output"]
    t = torch.tensor([0, 200, 500, 999])
    x_t = q_sample(x_0, t, eps)
    plain, weighed = (training_losses(output, x_0, x_t, eps, t, min_snr_gamma=gamma) for gamma in (None, 5.0))
    assert torch.equal(plain["mse"], weighed["mse"])
    assert torch.equal(plain["vb"], weighed["vb"])
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)
    snr = (alphas_cumprod / (1 - alphas_cumprod))[t]
    expected = torch.tensor([min(s, 5) / s for s in snr.tolist()])
    torch.testing.assert_close((weighed["loss"] - weighed["vb"]) / weighed["mse"], expected, rtol=1e-4, atol=1e-6)
    assert expected[0] < 1e-3  # nearly clean: weighs little
    assert expected[3] == 1.0


def test_losses_over_chosen_pixels(vectors):
    x_0, eps, output, t = vectors["diff.x0"], vectors["diff.eps"], vectors["diff.model_output"], vectors["t"]
    x_t = q_sample(x_0, t, eps)
    everywhere = training_losses(output, x_0, x_t, eps, t)
    where = torch.zeros(4, 1, 8, 8, dtype=torch.bool)
    where[:, :, :, :4] = True
    left, right = (training_losses(output, x_0, x_t, eps, t, where=w) for w in (where, ~where))
    for name in ("mse", "vb", "loss"):
        torch.testing.assert_close((left[name] + right[name]) / 2, everywhere[name])
    cut = training_losses(output[..., :4], x_0[..., :4], x_t[..., :4], eps[..., :4], t)
    torch.testing.assert_close(left["loss"], cut["loss"])


def test_gradients_of_the_variational_term_do_not_reach_the_noise(vectors):
    output = vectors["diff.model_output"].clone().requires_grad_()
    x_0, x_t, eps, t = vectors["diff.x0"], vectors["diff.x_t"], vectors["diff.eps"], vectors["t"]
    training_losses(output, x_0, x_t, eps, t)["vb"].sum().backward()
    assert not output.grad[:, :4].any()
    assert output.grad[:, 4:].any()


# Invariant


def test_perfect_noise_prediction_has_no_mse_and_recovers_x_0():
    x_0, eps, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([1, 400, 999])
    x_t = q_sample(x_0, t, eps)
    output = torch.cat([eps, torch.zeros_like(eps)], dim=1)
    losses = training_losses(output, x_0, x_t, eps, t)
    assert not losses["mse"].any()
    assert (losses["vb"] > 0).all()
    torch.testing.assert_close(p_mean_variance(output, x_t, t)["x_0"][:2], x_0[:2], atol=1e-3, rtol=1e-3)


def test_scale_one_is_the_conditional_prediction(toy):
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 1])
    labelled = lambda x, t, y: toy(x, t, y) + y[:, None, None, None]  # noqa: E731
    torch.testing.assert_close(guided(labelled, 10, 1.0)(x, t, y), labelled(x, t, y))
    assert not torch.allclose(guided(labelled, 10, 2.0)(x, t, y), labelled(x, t, y))


def test_guidance_in_an_interval_skips_the_other_pass_outside(toy):
    """Samples in and out of it in one batch, then none in it: the model sees each sample twice, then once."""
    sizes = []

    def labelled(x, t, y):
        sizes.append(len(x))
        return toy(x, t, y) + y[:, None, None, None]

    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([99, 100, 300, 301]), torch.tensor([0, 1, 2, 3])
    partly = guided(labelled, 10, 3.0, interval=(100, 300))
    found, everywhere, cond = partly(x, t, y), guided(labelled, 10, 3.0)(x, t, y), labelled(x, t, y)
    torch.testing.assert_close(found[1:3], everywhere[1:3])
    torch.testing.assert_close(found[[0, 3]], cond[[0, 3]])
    assert not torch.allclose(everywhere[0], cond[0])
    sizes.clear()
    assert torch.equal(partly(x, torch.full((4,), 500), y), labelled(x, torch.full((4,), 500), y))
    assert sizes == [4, 4]
    partly(x, t, y)
    assert sizes[2:] == [8]


def test_a_guide_takes_the_place_of_the_unconditional_prediction(toy):
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 1])
    labelled = lambda x, t, y: toy(x, t, y) + y[:, None, None, None]  # noqa: E731
    worse = lambda x, t, y: 0.5 * labelled(x, t, y)  # noqa: E731
    found, good, bad = guided(labelled, 10, 3.0, guide=worse)(x, t, y), labelled(x, t, y), worse(x, t, y)
    torch.testing.assert_close(found[:, :4], (bad + 3 * (good - bad))[:, :4])
    assert torch.equal(found[:, 4:], good[:, 4:])
    torch.testing.assert_close(guided(labelled, 10, 3.0, guide=labelled)(x, t, y), good)


def test_unguided_channels_come_from_the_conditional_half(toy):
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 1])
    labelled = lambda x, t, y: toy(x, t, y) + y[:, None, None, None]  # noqa: E731
    out, cond = guided(labelled, 10, 3.0, channels=3)(x, t, y), labelled(x, t, y)
    torch.testing.assert_close(out[:, 3:], cond[:, 3:])
    assert not torch.allclose(out[:, :3], cond[:, :3])


# Determinism


def test_a_sample_does_not_depend_on_its_batch(toy):
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(3, dtype=torch.long)

    def draw(rows: slice) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(3)][rows]
        return sampling.sample(toy, noise[rows], y[rows], sampling.make_scheduler("ddpm"), 10, generators)

    together = draw(slice(0, 3))
    for i in range(3):
        torch.testing.assert_close(draw(slice(i, i + 1)), together[i:i + 1], atol=1e-5, rtol=1e-5)


# Behaviour


def test_samplers_recover_a_known_gaussian():
    """With the exact denoiser of N(0, s^2), samples have standard deviation s."""
    s = 0.5
    alphas_cumprod = DDPMScheduler(1000, 1e-4, 0.02, "linear").alphas_cumprod

    def denoise(x, t, y):
        if t.dtype != torch.float32:
            a = alphas_cumprod[t][:, None, None, None]
        else:  # Euler steps between the timesteps, linearly in sigma
            sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().numpy()
            a = 1 / (1 + torch.from_numpy(np.interp(t.numpy(), np.arange(1000), sigmas)).float() ** 2)[:, None, None, None]
        eps = x * (1 - a).sqrt() / (a * s**2 + 1 - a)
        return torch.cat([eps, torch.zeros_like(eps)], dim=1)

    noise = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(i) for i in range(64)]
    ddpm = sampling.make_scheduler("ddpm")
    schedulers = [(ddpm, 250), (sampling.make_scheduler("ddim"), 100), (sampling.make_scheduler("dpm-solver++"), 25)]
    # As a user of diffusers swaps them: made from the config of the one that learns its variance.
    schedulers += [(cls.from_config(ddpm.config), 200) for cls in (
        DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler, HeunDiscreteScheduler)]
    for scheduler, num_steps in schedulers:
        config = dict(scheduler.config)
        out = sampling.sample(denoise, noise, torch.zeros(64, dtype=torch.long), scheduler, num_steps, generators)
        assert out.shape == noise.shape
        assert out.std().item() == pytest.approx(s, rel=0.04), type(scheduler).__name__
        assert out[:, 3].std().item() == pytest.approx(s, rel=0.06)  # the fourth channel is denoised like the others
        assert dict(scheduler.config) == config


# Bad input


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"sampler = 'euler'"):
        sampling.make_scheduler("euler")
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="twice the channels"):
        training_losses(x, x, x, x, torch.tensor([0]))
