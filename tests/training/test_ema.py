"""The averages of the weights: what each is by hand, and that one of another length can be made of those stored."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from mdt_ray import checkpoints, config_io, storage
from mdt_ray.config import EmaConfig
from mdt_ray.data import latents
from mdt_ray.data.loader import Loader
from mdt_ray.models import MDT
from mdt_ray.run_folder import TakenOver
from mdt_ray.training import posthoc, snapshots
from mdt_ray.training import run as training
from mdt_ray.training.contract import resolve_model
from mdt_ray.training.ema import build_averages, ema_decay, gamma_of, power_update, sigma_rel_of, update_averages
from mdt_ray.training.posthoc import Profile
from mdt_ray.training.run import run_rank
from tests.helpers import make_latents, tiny_training

ALL = EmaConfig(decay=0.99, warmup=True, more_decays=(0.5, 0.9), power_stds=(0.05, 0.1), snapshot_every_steps=4)
NAMES = ["ema", "ema_0.5", "ema_0.9", "ema_power_0.050", "ema_power_0.100"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    make_latents(folder, num_images=130)
    return folder


def run(config, **arguments):
    manifest = latents.open_manifest(config.latents)
    config = dataclasses.replace(config, model=resolve_model(config.model, manifest))
    return run_rank(config, manifest, {"config": config_io.to_dict(config)}, **arguments)


def closed_form(gamma: float, step: int) -> np.ndarray:
    """Weights of steps 1..step in the power-function average: the profile's integral over each step."""
    edges = (np.arange(step + 1) / step) ** (gamma + 1)
    return np.diff(edges)


# By hand


def test_sigma_rel_and_gamma():
    """sigma_rel is the standard deviation of a variable on [0, 1] with density (gamma + 1) t^gamma."""
    assert gamma_of(sigma_rel_of(1.0)) == pytest.approx(1.0)
    assert sigma_rel_of(1.0) == pytest.approx((1 / 2 - (2 / 3) ** 2) ** 0.5)
    assert sigma_rel_of(0.0) == pytest.approx(12**-0.5)
    assert (gamma_of(0.05), gamma_of(0.1)) == pytest.approx((16.97, 6.94), abs=5e-3)  # the paper's two, section 3.1
    for sigma_rel in (0.001, 0.05, 0.1, 0.25, 0.2886):
        assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)


def test_constant_decays_by_hand():
    averages, model = build_averages(a := torch.nn.Linear(2, 2), ALL), torch.nn.Linear(2, 2)
    assert list(averages) == NAMES
    assert not any(p.requires_grad for average in averages.values() for p in average.parameters())
    update_averages(averages, model, 10_000, ALL)
    for name, decay in {"ema": 0.99, "ema_0.5": 0.5, "ema_0.9": 0.9}.items():
        torch.testing.assert_close(averages[name].weight, decay * a.weight + (1 - decay) * model.weight)
    assert ema_decay(0, 0.998, warmup=True) == pytest.approx(2 / 11)
    assert ema_decay(10_000, 0.998, warmup=True) == 0.998
    assert ema_decay(0, 0.9999, warmup=False) == 0.9999


@pytest.mark.parametrize("gamma", [0.0, 0.5, 6.94, 16.97, 200.0])
def test_the_recursion_is_the_closed_form(gamma):
    """beta_t = (1 - 1/t)^(gamma + 1) weighs step s by (s^(gamma+1) - (s-1)^(gamma+1)) / t^(gamma+1)."""
    values = np.random.default_rng(0).normal(size=300)
    average = 123.0  # of no account: the first update takes its place
    for step, value in enumerate(values):
        average += power_update(step, gamma) * (value - average)
    assert average == pytest.approx(closed_form(gamma, 300) @ values, rel=1e-12)
    mean_step = closed_form(gamma, 300) @ np.arange(1, 301)
    assert mean_step / 300 == pytest.approx((gamma + 1) / (gamma + 2), abs=2 / 300)


def test_power_averages_follow_the_closed_form(folder):
    config = dataclasses.replace(ALL, power_stds=(0.05, 0.2))
    model = torch.nn.Linear(3, 3)
    averages, seen = build_averages(model, config), []
    for step in range(50):
        torch.nn.init.normal_(model.weight)
        seen.append(model.weight.detach().double().numpy().copy())
        update_averages(averages, model, step, config)
    for std in config.power_stds:
        expected = np.tensordot(closed_form(gamma_of(std), 50), np.stack(seen), 1)
        assert averages[f"ema_power_{std:.3f}"].weight.numpy() == pytest.approx(expected, abs=1e-6)


# The fit


def test_inner_products_by_numerical_integration():
    profiles = [Profile(6.94, 1.0), Profile(16.97, 0.7), Profile(0.4, 0.7), Profile(2.0, 0.31)]
    t = (np.arange(400_000) + 0.5) / 400_000
    values = np.stack([np.where(t <= p.step, (p.gamma + 1) * t**p.gamma / p.step ** (p.gamma + 1), 0) for p in profiles])
    assert posthoc.inner_products(profiles, profiles) == pytest.approx(values @ values.T / len(t), rel=1e-4)
    large = [Profile(500.0, 1e6), Profile(0.1, 1.0)]
    assert np.isfinite(posthoc.inner_products(large, large)).all()


def profiles_at(steps, stds=(0.05, 0.1)) -> list[Profile]:
    return [Profile(gamma_of(std), step) for step in steps for std in stds]


def test_a_stored_average_is_found_again():
    stored = profiles_at(range(100, 1601, 100))
    fit = posthoc.fit(stored, Profile(gamma_of(0.1), 1600))
    assert fit.error < 1e-6
    assert fit.coefficients == pytest.approx(np.eye(32)[31], abs=1e-6)
    assert posthoc.fit(stored[:20], stored[18]).coefficients == pytest.approx(np.eye(20)[18], abs=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.25])
def test_more_snapshots_err_less(sigma_rel):
    errors = []
    for count in (4, 8, 16, 32, 64, 256):
        fit = posthoc.fit(profiles_at(np.arange(1, count + 1) * 1000), Profile(gamma_of(sigma_rel), count * 1000))
        assert fit.coefficients.sum() == pytest.approx(1, abs=1e-12)
        errors.append(fit.error)
    assert all(later < 0.7 * earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 3e-3


def test_the_error_is_the_distance_of_the_profiles():
    """Relative L2 distance, by numerical integration; no other sum of 1 comes nearer."""
    stored, wanted = profiles_at([0.25, 0.5, 0.75, 1.0]), Profile(gamma_of(0.07), 1.0)
    t = (np.arange(200_000) + 0.5) / 200_000

    def values(p):
        return np.where(t <= p.step, (p.gamma + 1) * t**p.gamma / p.step ** (p.gamma + 1), 0)

    def distance(coefficients):
        rest = values(wanted) - coefficients @ np.stack([values(p) for p in stored])
        return np.sqrt((rest**2).mean() / (values(wanted) ** 2).mean())

    fit = posthoc.fit(stored, wanted)
    assert fit.error == pytest.approx(distance(fit.coefficients), rel=1e-3)
    for seed in range(5):
        change = np.random.default_rng(seed).normal(size=8) * 0.01
        assert distance(fit.coefficients + change - change.mean()) > fit.error


def test_steps_that_nearly_coincide_do_no_harm():
    """A last snapshot one step after another one: no large coefficients, whose terms cancel but for their rounding."""
    fit = posthoc.fit(profiles_at([*range(50_000, 1_000_001, 50_000), 1_000_001]), Profile(gamma_of(0.075), 1_000_001))
    assert np.abs(fit.coefficients).max() < 1
    assert fit.error < 3e-3
    fit = posthoc.fit(profiles_at(range(999_900, 1_000_001)), Profile(gamma_of(0.02), 1_000_000))
    assert np.abs(fit.coefficients).max() < 10


@pytest.mark.parametrize(("sigma_rel", "count", "bound"), [(0.03, 16, 0.03), (0.075, 8, 0.01), (0.075, 16, 3e-3),
                                                           (0.15, 16, 3e-3), (0.2, 32, 3e-3)])
def test_a_random_walk_is_averaged_as_if_tracked(sigma_rel, count, bound):
    """Weights that drift from a start: the reconstruction against the average of that length, kept all along."""
    num_steps = 4000
    rng = np.random.default_rng(0)
    weights = 5 * rng.normal(size=200) + 0.02 * rng.normal(size=(num_steps, 200)).cumsum(0)  # (T, W)
    steps = np.arange(1, count + 1) * num_steps // count
    stored = profiles_at(steps)
    averages = np.stack([closed_form(p.gamma, p.step) @ weights[:p.step] for p in stored])
    fit = posthoc.fit(stored, Profile(gamma_of(sigma_rel), num_steps))
    expected = closed_form(gamma_of(sigma_rel), num_steps) @ weights
    moved = np.linalg.norm(expected - weights[-1])
    assert np.linalg.norm(fit.coefficients @ averages - expected) < bound * moved


# In a training run


def test_straight_equals_resumed_with_all_averages(folder, tmp_path):
    straight = run(tiny_training(folder, tmp_path / "straight", ema=ALL))
    run(tiny_training(folder, tmp_path / "resumed", num_steps=10, ema=ALL))
    resumed = run(tiny_training(folder, tmp_path / "resumed", ema=ALL))
    assert list(straight.averages) == list(resumed.averages) == NAMES
    for name in NAMES:
        for a, b in zip(straight.averages[name].parameters(), resumed.averages[name].parameters(), strict=True):
            assert torch.equal(a, b), name
    uri = checkpoints.latest(str(tmp_path / "resumed"))
    opened, kept = MDT.from_pretrained(f"{uri}/ema_0.5", low_cpu_mem_usage=False), straight.more_ema["ema_0.5"]
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), kept.parameters(), strict=True))
    assert not torch.equal(opened.final_layer.linear.weight, straight.ema.final_layer.linear.weight)


def steps_of(output) -> list[int]:
    return [checkpoints.step_of(uri) for uri in checkpoints.list_finished(str(output), checkpoints.SNAPSHOTS)]


def sums_of(output, step) -> dict:
    return storage.read_json(f"{output}/ema_snapshots/{checkpoints.name(step)}/checksums.json")


class Killed(Exception):
    """Stands for the end of a process."""


def test_snapshots_are_of_one_run_of_steps(folder, tmp_path):
    """A resume goes back to step 10; the snapshot of 12 is written again, with the same bytes, that of 8 is not."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(tiny_training(folder, whole, ema=ALL))
    assert steps_of(whole) == [4, 8, 12, 16, 20]

    def die(row):
        if row["step"] == 14:
            raise Killed

    with pytest.raises(Killed):
        run(tiny_training(folder, killed, ema=ALL), report=die)
    assert steps_of(killed) == [4, 8, 12]
    marks = {step: killed / "ema_snapshots" / checkpoints.name(step) / "mark" for step in (8, 12)}
    for mark in marks.values():
        mark.touch()
    leftover = killed / "ema_snapshots" / "step-00000016.tmp-1"
    leftover.mkdir()
    run(tiny_training(folder, killed, ema=ALL))
    assert marks[8].exists()
    assert not marks[12].exists()
    assert not leftover.exists()
    for step in (4, 8, 12, 16, 20):
        assert sums_of(whole, step) == sums_of(killed, step)
        assert checkpoints.damage(f"{killed}/ema_snapshots/{checkpoints.name(step)}") is None


def test_a_return_to_a_checkpoint_drops_the_snapshots_beyond(folder, tmp_path, monkeypatch):
    """Steps from 12 on are non-finite at first, those before are kept; all that follow are of the second attempt."""

    class Poisoned(Loader):
        def batches(self, first_step, attempt=0):
            for parts in super().batches(first_step, attempt):
                factor = float("nan") if parts[0].step >= 12 and not attempt else 1.0
                yield tuple(dataclasses.replace(part, x_0=part.x_0 * factor) for part in parts)

    monkeypatch.setattr(training, "Loader", Poisoned)
    seen = {}
    state = run(tiny_training(folder, tmp_path, num_steps=33, ema=ALL),
                report=lambda row: seen.setdefault((row["attempt"], row["step"]), steps_of(tmp_path)))
    assert state.attempt == 1
    assert 16 in seen[0, 32]
    assert seen[1, 11] == [4, 8]
    assert steps_of(tmp_path) == [*range(4, 33, 4), 33]


def test_the_last_step_is_stored_and_an_existing_snapshot_kept(folder, tmp_path):
    state = run(tiny_training(folder, tmp_path, num_steps=6, ema=ALL))
    assert steps_of(tmp_path) == [4, 6]
    mark = tmp_path / "ema_snapshots" / "step-00000006" / "mark"
    mark.touch()
    snapshots.save_snapshot(state, str(tmp_path), ALL, {})()
    assert mark.exists()
    opened = MDT.from_pretrained(mark.parent / "ema_power_0.050", low_cpu_mem_usage=False)
    kept = state.more_ema["ema_power_0.050"]
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), kept.parameters(), strict=True))
    assert {p.dtype for p in opened.parameters()} == {torch.float32}


def test_without_power_stds_nothing_is_stored(folder, tmp_path):
    run(tiny_training(folder, tmp_path, num_steps=4, ema=EmaConfig(more_decays=(0.9,))))
    assert not (tmp_path / "ema_snapshots").exists()


def test_a_run_that_lost_its_folder_writes_no_snapshot(folder, tmp_path):
    answers = iter([True, True, False])  # the start, the checkpoint of step 0, the snapshot of step 4
    with pytest.raises(TakenOver, match="another run has taken over"):
        run(tiny_training(folder, tmp_path, ema=ALL), may_write=lambda: next(answers))
    assert steps_of(tmp_path) == []
