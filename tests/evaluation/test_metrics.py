"""Frechet distance, Inception Score, precision and recall against the reference's numbers and few-line oracles."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mdt_ray.evaluation import metrics
from mdt_ray.evaluation.metrics import frechet_distance, inception_score, precision_recall
from mdt_ray.evaluation.statistics import FeatureStatistics

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    return load_file(DATA / "evaluation_a.safetensors")


def _gaussian(num_samples: int, width: int, seed: int):
    """Mean, covariance and the factor (D, N) whose square is that covariance; singular if num_samples <= width."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_samples, width)) * np.exp(rng.normal(size=width)) + rng.normal(size=width)
    factor = (x - x.mean(axis=0)).T / np.sqrt(num_samples - 1)
    return x.mean(axis=0), factor @ factor.T, factor


# Frechet distance


def test_fid_of_the_vectors(vectors):
    ref = FeatureStatistics(24).update(vectors["ref"])
    samples = FeatureStatistics(24).update(vectors["samples"])
    fid = frechet_distance(ref.mean, ref.covariance, samples.mean, samples.covariance)
    assert fid == pytest.approx(vectors["fid"].item(), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_frechet_agrees_with_the_eigenvalues_of_the_plain_product(seed):
    mu1, sigma1, _ = _gaussian(100, 20, seed)
    mu2, sigma2, _ = _gaussian(80, 20, seed + 100)
    roots = np.sqrt(scipy.linalg.eigvals(sigma1 @ sigma2).astype(complex)).real.sum()
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * roots
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("num_1", "num_2"), [(10, 10), (10, 12), (10, 100), (100, 10), (2, 2)])
def test_frechet_of_singular_covariances(num_1, num_2):
    # With sigma_i = F_i F_i^T the trace of the root is the nuclear norm of F_1^T F_2: no squares, full precision.
    mu1, sigma1, factor1 = _gaussian(num_1, 40, 1)
    mu2, sigma2, factor2 = _gaussian(num_2, 40, 2)
    roots = scipy.linalg.svdvals(factor1.T @ factor2).sum()
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * roots
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-8)
    plain = np.sqrt(scipy.linalg.eigvals(sigma1 @ sigma2).astype(complex)).real.sum()
    assert roots == pytest.approx(plain, rel=1e-5)  # the oracle itself, as far as the plain product goes


@pytest.mark.parametrize("num_samples", [100, 10])
def test_frechet_is_zero_for_identical_and_symmetric(num_samples):
    mu1, sigma1, _ = _gaussian(num_samples, 30, 1)
    mu2, sigma2, _ = _gaussian(90, 30, 2)
    assert 0 <= frechet_distance(mu1, sigma1, mu1, sigma1) < 1e-6 * np.trace(sigma1)
    there, back = frechet_distance(mu1, sigma1, mu2, sigma2), frechet_distance(mu2, sigma2, mu1, sigma1)
    assert there == pytest.approx(back, rel=1e-9)


@pytest.mark.parametrize("num_samples", [100, 10])
def test_frechet_is_invariant_to_rotation_and_quadratic_in_scale(num_samples):
    mu1, sigma1, _ = _gaussian(num_samples, 30, 1)
    mu2, sigma2, _ = _gaussian(90, 30, 2)
    plain = frechet_distance(mu1, sigma1, mu2, sigma2)
    q = np.linalg.qr(np.random.default_rng(3).normal(size=(30, 30)))[0]
    rotated = frechet_distance(q @ mu1, q @ sigma1 @ q.T, q @ mu2, q @ sigma2 @ q.T)
    assert rotated == pytest.approx(plain, rel=1e-8)
    scaled = frechet_distance(3 * mu1, 9 * sigma1, 3 * mu2, 9 * sigma2)
    assert scaled == pytest.approx(9 * plain, rel=1e-8)


def test_frechet_of_points_and_commuting_covariances():
    zero = np.zeros((2, 2))
    assert frechet_distance([0, 0], zero, [3, 4], zero) == 25  # constant images: no covariance at all
    # Diagonal: sum of (difference of standard deviations)^2.
    assert frechet_distance([1, 1], np.diag([4.0, 9.0]), [1, 1], np.diag([1.0, 25.0])) == pytest.approx(1 + 4)
    assert frechet_distance([1, 1], np.diag([4.0, 0.0]), [1, 1], np.diag([0.0, 25.0])) == pytest.approx(4 + 25)


def test_frechet_repeats_to_the_bit_and_leaves_its_arguments():
    arguments = (*_gaussian(50, 20, 1)[:2], *_gaussian(50, 20, 2)[:2])
    copies = [a.copy() for a in arguments]
    assert frechet_distance(*arguments) == frechet_distance(*arguments)
    assert all(np.array_equal(a, b) for a, b in zip(arguments, copies, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu1": np.zeros((1, 3))}, r"mu1: got shape \(1, 3\)"),
        ({"mu1": np.array([0, np.nan, 0])}, "mu1: 1 of 3 values are not finite"),
        ({"mu1": np.zeros(4)}, r"sigma1: got shape \(3, 3\), but it must be \(4, 4\)"),
        ({"sigma2": np.full((3, 3), np.inf)}, "sigma2: 9 of 9 values are not finite"),
        ({"sigma2": np.zeros(3)}, r"sigma2: got shape \(3,\)"),
        ({"mu2": np.zeros(4), "sigma2": np.eye(4)}, "mu2: got width 4, but it must be that of mu1, 3"),
        ({"sigma1": np.triu(np.ones((3, 3)))}, "sigma1: differs from its transpose"),
        ({"sigma1": np.diag([1.0, 1.0, -1.0])}, "sigma1: has a negative eigenvalue"),
        ({"sigma2": np.diag([1.0, 1.0, -1.0])}, "sigma2: has a negative eigenvalue"),
    ],
)
def test_frechet_bad_input(change, message):
    arguments = {"mu1": np.zeros(3), "sigma1": np.eye(3), "mu2": np.zeros(3), "sigma2": np.eye(3)}
    with pytest.raises(ValueError, match=message):
        frechet_distance(**(arguments | change))


# Inception Score


def test_inception_score_of_the_vectors(vectors):
    assert inception_score(vectors["probs"]) == pytest.approx(vectors["inception_score"].item(), rel=1e-9)


def test_inception_score_bounds():
    assert inception_score(np.full((70, 10), 0.1), split_size=30) == pytest.approx(1, abs=1e-12)
    one_hot = np.eye(10)[np.arange(200) % 10]
    assert inception_score(one_hot, split_size=50) == pytest.approx(10, rel=1e-12)
    assert inception_score(one_hot[:1]) == pytest.approx(1)


def test_inception_score_counts_a_shorter_last_split_like_the_others():
    probs = np.random.default_rng(0).dirichlet(np.full(6, 0.3), size=250)
    pieces = [inception_score(probs[start : start + 100]) for start in (0, 100, 200)]
    assert inception_score(probs, split_size=100) == pytest.approx(np.mean(pieces), rel=1e-12)


def test_inception_score_against_entropies():
    # Mean KL = entropy of the mean minus the mean entropy.
    probs = np.random.default_rng(0).dirichlet(np.ones(6), size=80)
    entropy = lambda p: -(p * np.log(p)).sum(axis=-1)  # noqa: E731
    expected = np.exp(entropy(probs.mean(axis=0)) - entropy(probs).mean())
    assert inception_score(probs) == pytest.approx(expected, rel=1e-12)


def test_inception_score_depends_on_order_over_splits_only():
    classes = np.eye(10)[np.arange(100) % 10]
    assert inception_score(classes, split_size=10) == pytest.approx(10)
    by_class = np.eye(10)[np.sort(np.arange(100) % 10)]
    assert inception_score(by_class, split_size=10) == pytest.approx(1)  # class-sorted order ruins it
    assert inception_score(by_class, split_size=100) == pytest.approx(10)


@pytest.mark.parametrize(
    ("probs", "split_size", "message"),
    [
        (np.zeros((0, 3)), 5, "probs: got 0 rows"),
        (np.ones(3) / 3, 5, r"probs: got shape \(3,\)"),
        (np.array([[0.5, np.nan]]), 5, "probs: 1 of 2 values"),
        (np.array([[0.5, 0.5], [2.0, 1.0]]), 1, "probs: row 1 has minimum 1 and sum 3"),
        (np.array([[1.5, -0.5]]), 5, "probs: row 0 has minimum -0.5"),
        (np.ones((2, 1)), 0, "split_size: got 0"),
        (np.ones((2, 1)), 2.0, "split_size: got 2.0"),
    ],
)
def test_inception_score_bad_input(probs, split_size, message):
    with pytest.raises(ValueError, match=message):
        inception_score(probs, split_size)


# Precision and recall


def _brute_force(ref, samples, k):
    """The definition, from differences in float64: no expansion, no blocks."""
    squared = lambda a, b: ((a[:, None].astype(float) - b[None].astype(float)) ** 2).sum(axis=-1)  # noqa: E731
    across = squared(ref, samples)
    inside_ref = across <= np.sort(squared(ref, ref), axis=1)[:, k, None]
    inside_samples = across <= np.sort(squared(samples, samples), axis=1)[:, k]
    return inside_ref.any(axis=0).mean(), inside_samples.any(axis=1).mean()


def _clouds(num_ref, num_samples, width, seed):
    rng = np.random.default_rng(seed)
    ref = rng.normal(size=(num_ref, width)).astype(np.float32)
    return ref, (0.8 * rng.normal(size=(num_samples, width)) + 0.3).astype(np.float32)


def test_fid_has_the_same_bits_whatever_the_threads():
    generator = np.random.default_rng(0)
    sets = [FeatureStatistics(128).update(generator.normal(size=(500, 128)) * scale) for scale in (1, 1.3)]
    before, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.add(frechet_distance(sets[0].mean, sets[0].covariance, sets[1].mean, sets[1].covariance))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_precision_recall_of_the_vectors(vectors):
    precision, recall = precision_recall(vectors["ref"], vectors["samples"])
    assert (precision, recall) == (130 / 537, 65 / 400)
    assert np.array_equal([precision, recall], [vectors["precision"].item(), vectors["recall"].item()])


@settings(deadline=None, max_examples=40)
@given(
    num_ref=st.integers(6, 40),
    num_samples=st.integers(6, 40),
    width=st.integers(1, 12),
    k=st.integers(1, 5),
    block_size=st.integers(1, 50),
    seed=st.integers(0, 1000),
    integers=st.booleans(),
)
def test_precision_recall_against_brute_force(num_ref, num_samples, width, k, block_size, seed, integers):
    ref, samples = _clouds(num_ref, num_samples, width, seed)
    if integers:  # ties and copies in plenty
        ref, samples = ref.round(), samples.round()
    expected = _brute_force(ref, samples, k)
    assert precision_recall(ref, samples, k, block_size=block_size) == expected


@pytest.mark.parametrize("width", [3, 64, 300])
def test_precision_recall_does_not_depend_on_the_block_size(width):
    ref, samples = _clouds(150, 190, width, 0)
    samples[::9] = ref[3]
    results = {precision_recall(ref, samples, block_size=size) for size in (3, 7, 50, 64, 149, 190, 4096)}
    assert results == {_brute_force(ref, samples, 3)}


@pytest.mark.parametrize("block_size", [1, 7, 64, 4096])
def test_balls_of_radius_zero_hold_the_copies_of_their_centre(block_size):
    # Four copies of a point have no neighbour away from it: were rounding not taken out, it alone would decide here.
    points, far = _clouds(20, 20, 300, 0)
    ref = np.repeat(points, 4, axis=0)
    samples = np.concatenate([points, far + 100])
    assert precision_recall(ref, samples, block_size=block_size) == (0.5, 1.0)
    assert precision_recall(ref, np.random.default_rng(0).permutation(ref), block_size=block_size) == (1.0, 1.0)


def test_identical_sets_give_one_and_disjoint_ones_zero():
    ref, samples = _clouds(100, 80, 16, 0)
    assert precision_recall(ref, ref) == (1.0, 1.0)
    assert precision_recall(ref, np.random.default_rng(0).permutation(ref)) == (1.0, 1.0)
    assert precision_recall(ref, samples + 1000) == (0.0, 0.0)


def test_swapping_the_sets_swaps_precision_and_recall():
    ref, samples = _clouds(100, 80, 4, 0)
    assert precision_recall(ref, samples) == precision_recall(samples, ref)[::-1]


def test_collapsed_samples_are_precise_but_recall_little():
    ref, _ = _clouds(100, 1, 4, 0)
    precision, recall = precision_recall(ref, np.repeat(ref[:2], 10, axis=0))
    assert precision == 1.0
    assert recall == 2 / 100


def test_the_boundary_of_a_ball_counts_as_inside():
    # k = 3: the ball of reference 3 reaches to reference 0, so to 6 on the other side.
    ref = np.arange(4.0)[:, None]
    far = np.array([[100.0], [200], [300], [400]])
    for position, expected in ((6.0, 1 / 5), (6.001, 0.0)):
        assert precision_recall(ref, np.concatenate([[[position]], far]))[0] == expected


@pytest.mark.parametrize("scale", [2.0**-100, 1e-25, 1e30, 2.0**100])
def test_precision_recall_is_invariant_to_scale(scale):
    ref, samples = (x.astype(np.float64) for x in _clouds(60, 70, 8, 0))
    assert precision_recall(ref * scale, samples * scale) == precision_recall(ref, samples)


def test_precision_recall_memory_is_bounded_by_the_block():
    ref, samples = _clouds(3000, 2000, 8, 0)  # whole float64 matrices would take 72 MB
    tracemalloc.start()
    try:
        precision_recall(ref, samples, block_size=256)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref": np.zeros((5, 3))}, "samples: got width 2, but it must be that of ref, 3"),
        ({"ref": np.zeros((3, 2))}, "ref: got 3 rows, but k = 3 needs at least 4"),
        ({"samples": np.zeros((3, 2))}, "samples: got 3 rows"),
        ({"samples": np.full((5, 2), np.nan)}, "samples: 10 of 10 values are not finite"),
        ({"samples": np.zeros(5)}, r"samples: got shape \(5,\)"),
        ({"k": 0}, "k: got 0"),
        ({"block_size": 0}, "block_size: got 0"),
    ],
)
def test_precision_recall_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(**({"ref": np.zeros((5, 2)), "samples": np.zeros((5, 2))} | change))


# KID


def test_kernel_distance_by_hand():
    """Two points each: k(x, y) = (x . y / 2 + 1)^3."""
    ref, samples = np.array([[0.0, 0.0], [2.0, 0.0]]), np.array([[2.0, 2.0], [0.0, 2.0]])
    cross = np.mean([1.0, 1.0, 3.0**3, 1.0])  # 0, 0; 2 . 2 / 2 + 1 = 3; 0
    found = metrics.kernel_distance(ref, samples)
    assert found.value == pytest.approx(1.0 + 3.0**3 - 2 * cross)
    assert np.isnan([found.low, found.high]).all()


def test_kernel_distance_is_zero_on_average_and_its_interval_covers_it():
    """95% of intervals hold the true value, 0 for one distribution; and none does for another one."""
    covered, values = 0, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        a, b = rng.normal(size=(2, 400, 8))
        found = metrics.kernel_distance(a, b, block_size=50)
        covered += found.low <= 0 <= found.high
        values.append(found.value)
        assert metrics.kernel_distance(a, b + 0.5, block_size=50).low > 0
    assert covered >= 52
    assert abs(np.mean(values)) < 3 * np.std(values) / 60**0.5


def test_kernel_distance_refuses():
    with pytest.raises(ValueError, match="use one extractor"):
        metrics.kernel_distance(np.ones((5, 2)), np.ones((5, 3)))
    with pytest.raises(ValueError, match="samples: got 1 rows, but at least 2 are needed"):
        metrics.kernel_distance(np.ones((5, 2)), np.ones((1, 2)))
