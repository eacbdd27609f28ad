"""Adan and Muon: by hand, against PyTorch's own, and skipping a step whole."""

import copy
import dataclasses
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from mdt_ray.config import ModelConfig, OptimConfig
from mdt_ray.training import loop
from mdt_ray.training.optim import build_optimizer, hidden_matrices
from mdt_ray.training.optimizers import Adan, Muon, orthogonal
from mdt_ray.training.step import build_model
from tests.helpers import make_latents, tiny_training
from tests.training.test_training import assert_equal_states, poisoned, prepared, run, train

SMALL = ModelConfig(input_size=4, in_channels=4, num_classes=10, hidden_size=32, depth=3, num_heads=2, decode_layer=1,
                    patch_size=1)


def gradients(*params: nn.Parameter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


# Oracle


def test_adan_by_hand():
    """Two steps of arXiv 2208.06677 Algorithm 1 on one number, with gradients 1 and 3."""
    p = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = Adan([p], lr=0.1, betas=(0.9, 0.8, 0.7), eps=0.0, weight_decay=0.5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    first = (2.0 - 0.1 * 1.0) / 1.05  # g / |g| is 1, and there is no difference yet
    assert p.item() == pytest.approx(first)
    p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    m = (0.9 * 0.1 * 1 + 0.1 * 3) / (1 - 0.9**2)
    v = 0.2 * 2 / (1 - 0.8**2)
    n = (0.7 * 0.3 * 1 + 0.3 * (3 + 0.8 * 2) ** 2) / (1 - 0.7**2)
    assert p.item() == pytest.approx((first - 0.1 * (m + 0.8 * v) / n**0.5) / 1.05)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on CPUs")
@pytest.mark.filterwarnings("default")  # PyTorch's compiler warns of itself in many places
def test_compiled_adan_is_adan(monkeypatch):
    """Over five steps, one skipped, at a rate that changes; compiled for two lengths, not for each shape or rate."""
    monkeypatch.setattr(Adan, "CHUNK", 10_000)
    models = [build_model(SMALL), build_model(SMALL)]
    models[1].load_state_dict(models[0].state_dict())
    counters.clear()
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer = build_optimizer(model, OptimConfig(name="adan", weight_decay=0.1), compiled)
        for step in range(5):
            gradients(*model.parameters(), seed=step)
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.found_inf = torch.tensor(float(step == 1))
            optimizer.step()
        assert counters["stats"]["unique_graphs"] == 2 * compiled  # whole chunks, and the last
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_muon_is_pytorchs_and_adamw():
    """Where no matrix is cut into pieces: torch.optim.Muon and torch.optim.AdamW."""
    shapes, rest = [(8, 8), (8, 8), (24, 8), (8, 32)], nn.Parameter(torch.linspace(-1, 1, 6))
    matrices = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(7))) for shape in shapes]
    expected, expected_rest = copy.deepcopy(matrices), copy.deepcopy(rest)
    ours = Muon(dict.fromkeys(matrices, 1), [rest], lr=0.05, weight_decay=0.1)
    theirs = (torch.optim.Muon(expected, lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
              torch.optim.AdamW([expected_rest], lr=0.05, weight_decay=0.1))
    for step in range(5):
        for params, optimizers in (((*matrices, rest), (ours,)), ((*expected, expected_rest), theirs)):
            gradients(*params, seed=step)
            for optimizer in optimizers:
                optimizer.step()
    # Moments of another scale (ours are sums), rounded to bf16: an update of 0.05 differs by some 1e-4.
    assert all((a - b).abs().max() < 3e-3 for a, b in zip(matrices, expected, strict=True))
    torch.testing.assert_close(rest, expected_rest)


def test_orthogonal_matrices_keep_their_directions():
    x = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    for matrices in (x, x.mT):
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        found = orthogonal(matrices)
        assert ((torch.linalg.svdvals(found) > 0.6) & (torch.linalg.svdvals(found) < 1.25)).all()
        assert (found - u @ v).norm() < 0.3 * (u @ v).norm()


def test_stacked_matrices_are_made_orthogonal_one_by_one():
    whole = nn.Parameter(torch.zeros(24, 8))
    parts = [nn.Parameter(torch.zeros(8, 8)) for _ in range(3)]
    rest = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for params, number, other in (([whole], 3, rest[0]), (parts, 1, rest[1])):
        gradients(other, seed=0)
        gradients(*params, seed=1)
        if number == 3:
            whole.grad[:8] *= 100  # a large gradient of the first must not drown the others
        else:
            parts[0].grad = 100 * parts[0].grad
        Muon(dict.fromkeys(params, number), [other], lr=1.0).step()
    assert torch.equal(whole, torch.cat(parts))
    assert whole[8:].detach().std() == pytest.approx(0.2, rel=0.3)


def test_muon_takes_the_matrices_of_all_blocks():
    for kind, pieces in (("mdt_v1", [1, 1, 1, 3, 6]), ("mdt_v2", [1, 1, 1, 1, 3, 6]), ("dit", [1, 1, 1, 3, 6])):
        model = build_model(dataclasses.replace(SMALL, kind=kind, depth=5, decode_layer=1))
        found = hidden_matrices(model)
        assert all(p.ndim == 2 for p in found)
        assert sorted(found[p] for p in model.blocks[-1].parameters() if p in found) == pieces
        named = {name for name, p in model.named_parameters() if p in found}
        assert all("blocks." in name and name.endswith("weight") for name in named)
        assert len(named) == sum(name.endswith("weight") and "blocks." in name for name, _ in model.named_parameters())
        groups = build_optimizer(model, OptimConfig(name="muon")).param_groups
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["adan", "muon"])
def test_a_parameter_that_is_not_in_the_loss_is_refused(name):
    model = build_model(SMALL)
    gradients(*model.parameters(), seed=0)
    model.blocks[0].attn.proj.weight.grad = None
    with pytest.raises(ValueError, match=r"parameters of shapes \[\(32, 32\)\] have no gradient: must be in the loss, or"):
        build_optimizer(model, OptimConfig(name=name)).step()


# Skips and resumes


@pytest.mark.parametrize("name", ["adan", "muon"])
def test_learns_resumes_and_skips(tmp_path, name):
    folder, optim = tmp_path / "latents", OptimConfig(name=name, lr=2e-3, clip_norm=1.0)
    make_latents(folder, num_images=130)
    straight = run(tiny_training(folder, tmp_path / "straight", optim=optim))
    run(tiny_training(folder, tmp_path / "resumed", num_steps=10, optim=optim))
    assert_equal_states(straight, run(tiny_training(folder, tmp_path / "resumed", optim=optim)))
    assert straight.history[-1]["loss"] < 0.9 * straight.history[0]["loss"]
    config, state, module, loader = prepared(folder, tmp_path / "skip", num_steps=2, optim=optim)
    before = copy.deepcopy(state.model.state_dict())
    with pytest.raises(loop.NonFiniteSteps, match="in the last 1 steps, at step 1"):  # no run ends with a skipped step
        train(dataclasses.replace(config, num_steps=1), state, module, poisoned([loader.batch(0)], {0}))
    assert all(torch.equal(before[name], value) for name, value in state.model.state_dict().items())
    assert all(not value.any() for values in state.optimizer.state.values() for value in values.values())


@pytest.mark.parametrize("name", ["adan", "muon"])
def test_a_skipped_step_leaves_all_as_it_was(name):
    """Weights and state after steps 0, (1), 2 are those after 0, 2."""
    found = []
    for steps in ((0, 1, 2), (0, 2)):
        model = build_model(SMALL)
        model.load_state_dict({k: torch.linspace(-1, 1, v.numel()).reshape(v.shape) for k, v in model.state_dict().items()})
        optimizer = build_optimizer(model, OptimConfig(name=name, weight_decay=0.1))
        for step in steps:
            gradients(*model.parameters(), seed=step)
            optimizer.found_inf = torch.tensor(float(step == 1))
            if step == 1:
                next(model.parameters()).grad.fill_(float("nan"))
            optimizer.step()
        found.append([*model.parameters(), *(v for state in optimizer.state.values() for v in state.values())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.isfinite(found[0][0]).all()
