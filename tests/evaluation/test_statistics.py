"""FeatureStatistics against np.cov, and its promises on splits, order, offsets and bad input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdt_ray.evaluation.statistics import FeatureStatistics


def _features(count: int = 200, width: int = 7, seed: int = 0) -> np.ndarray:
    """Correlated features with a mean away from zero, float32 as an extractor gives them."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + 0.4).astype(np.float32)


def _same_bits(a: FeatureStatistics, b: FeatureStatistics) -> bool:
    return all(a.to_dict()[key].tobytes() == b.to_dict()[key].tobytes() for key in a.to_dict())


# Oracle


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_mean_and_covariance_are_numpys(dtype):
    features = _features().astype(dtype)
    statistics = FeatureStatistics(7).update(features)
    np.testing.assert_allclose(statistics.mean, features.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.T.astype(np.float64)), rtol=1e-9, atol=1e-12)
    assert statistics.mean.dtype == statistics.covariance.dtype == np.float64


@pytest.mark.parametrize("width", [1, 3])
def test_many_rows_at_once(width):
    features = _features(5000, width)  # more than are held in float64 at a time
    statistics = FeatureStatistics(width, features[0]).update(features).update(features[:10])
    rows = np.concatenate([features, features[:10]]).astype(np.float64)
    np.testing.assert_allclose(statistics.covariance, np.cov(rows.T).reshape(width, width), rtol=1e-9)
    np.testing.assert_allclose(statistics.outer, (rows - rows[0]).T @ (rows - rows[0]), rtol=1e-12)


# Determinism


@settings(deadline=None, max_examples=50)
@given(
    cuts=st.lists(st.integers(0, 60), max_size=8),
    workers=st.lists(st.integers(0, 3), min_size=9, max_size=9),
    centred=st.booleans(),
)
def test_any_split_over_workers_agrees(cuts, workers, centred):
    features = _features(60)
    centre = features.mean(axis=0) if centred else None
    parts = [FeatureStatistics(7, centre) for _ in range(4)]
    edges = [0, *sorted(cuts), 60]  # empty pieces included
    for start, stop, worker in zip(edges[:-1], edges[1:], workers, strict=False):
        parts[worker].update(features[start:stop])
    total = FeatureStatistics(7, centre)
    for part in parts:
        total.merge(part)
    whole = FeatureStatistics(7, centre).update(features)
    assert total.count == 60
    np.testing.assert_allclose(total.mean, whole.mean, rtol=1e-9)
    np.testing.assert_allclose(total.covariance, whole.covariance, rtol=1e-9, atol=1e-11)


def test_same_chunks_merged_in_index_order_give_the_same_bits():
    chunks = np.array_split(_features(300), 13)

    def run(order) -> FeatureStatistics:
        done = {index: FeatureStatistics(7).update(chunks[index]).to_dict() for index in order}
        total = FeatureStatistics(7)
        for index in range(len(chunks)):
            total.merge(FeatureStatistics.from_dict(done[index]))
        return total

    first = run(range(13))
    arrival = np.random.default_rng(1).permutation(13).tolist()
    assert _same_bits(first, run(arrival))


def test_npz_round_trip_is_bit_equal(tmp_path):
    statistics = FeatureStatistics(7, np.arange(7.0)).update(_features())
    np.savez(tmp_path / "statistics.npz", **statistics.to_dict())
    with np.load(tmp_path / "statistics.npz", allow_pickle=False) as arrays:
        back = FeatureStatistics.from_dict(arrays)
    assert _same_bits(statistics, back)
    assert isinstance(back.count, int)


# Invariants


def test_a_centre_keeps_precision_under_a_large_offset():
    features = _features().astype(np.float64)
    shifted = features + 1e4  # what the offset rounds away is the same for both sides below
    centred = FeatureStatistics(7, np.full(7, 1e4)).update(shifted)
    expected = np.cov((shifted - 1e4).T)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert (np.abs(centred.covariance - expected) / scale).max() < 1e-12
    np.testing.assert_allclose(centred.mean, shifted.mean(axis=0), rtol=1e-12)
    plain = FeatureStatistics(7).update(shifted)
    assert (np.abs(plain.covariance - expected) / scale).max() > 1e-12  # so the centre does matter


def test_the_centre_changes_nothing_but_rounding():
    features = _features()
    plain = FeatureStatistics(7).update(features)
    centred = FeatureStatistics(7, np.linspace(-3, 3, 7)).update(features)
    np.testing.assert_allclose(plain.mean, centred.mean, rtol=1e-9)
    np.testing.assert_allclose(plain.covariance, centred.covariance, rtol=1e-9, atol=1e-11)


def test_covariance_is_symmetric_and_positive_semidefinite():
    covariance = FeatureStatistics(30).update(_features(12, 30)).covariance  # singular: fewer samples than D
    assert np.array_equal(covariance, covariance.T)
    eigenvalues = np.linalg.eigvalsh(covariance)
    assert eigenvalues.min() > -1e-12 * eigenvalues.max()


# Behaviour


def test_merging_leaves_the_other_alone_and_empty_ones_change_nothing():
    a, b = FeatureStatistics(7).update(_features(20, seed=1)), FeatureStatistics(7).update(_features(30, seed=2))
    b_before, a_before = b.to_dict(), a.to_dict()
    a.merge(FeatureStatistics(7)).update(np.zeros((0, 7)))
    assert _same_bits(a, FeatureStatistics.from_dict(a_before))
    a.merge(b).update(_features(5))
    assert a.count == 55
    assert _same_bits(b, FeatureStatistics.from_dict(b_before))


def test_the_callers_arrays_are_not_shared():
    centre = np.zeros(2)
    statistics = FeatureStatistics(2, centre).update([[1, 2], [3, 5]])
    centre += 1
    statistics.to_dict()["sum"][:] = 0
    np.testing.assert_array_equal(statistics.mean, [2, 3.5])


def test_non_finite_features_are_counted_and_leave_no_trace():
    statistics = FeatureStatistics(7).update(_features())
    before = statistics.to_dict()
    bad = _features(10)
    bad[3, :2], bad[8, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"features: 3 of 70 values are not finite, in 2 of 10 rows \(first: row 3\)"):
        statistics.update(bad)
    assert _same_bits(statistics, FeatureStatistics.from_dict(before))


def test_too_few_features():
    statistics = FeatureStatistics(2)
    with pytest.raises(ValueError, match="count: got 0"):
        _ = statistics.mean
    statistics.update([[1.0, 2.0]])
    np.testing.assert_array_equal(statistics.mean, [1, 2])
    with pytest.raises(ValueError, match=r"count: got 1 .* at least 2"):
        _ = statistics.covariance


@pytest.mark.parametrize("features", [np.zeros(7), np.zeros((2, 6)), np.zeros((2, 7), complex), [["a"] * 7]])
def test_bad_features(features):
    with pytest.raises(ValueError, match="features: got"):
        FeatureStatistics(7).update(features)


def test_bad_construction_and_merge():
    with pytest.raises(ValueError, match="num_features: got 0"):
        FeatureStatistics(0)
    for centre in (np.zeros(3), np.array([0, np.nan])):
        with pytest.raises(ValueError, match="centre: got shape"):
            FeatureStatistics(2, centre)
    for other in (FeatureStatistics(2, [0.0, 1e-9]), FeatureStatistics(3)):
        with pytest.raises(ValueError, match="centres must be equal"):
            FeatureStatistics(2).merge(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outer": np.zeros((2, 3))}, r"outer: got shape \(2, 3\)"),
        ({"sum": np.array([np.nan, 0])}, "sum: .* finite"),
        ({"count": np.array([3])}, "count: got shape"),
        ({"count": np.array(-1)}, "count: got -1"),
        ({"extra": np.zeros(2)}, "arrays: got keys"),
    ],
)
def test_damaged_dict(change, message):
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.from_dict(FeatureStatistics(2).to_dict() | change)
