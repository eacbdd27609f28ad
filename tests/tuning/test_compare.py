"""Means, intervals and paired differences of trials: against numbers worked out otherwise, and by what they are for."""

import numpy as np
import pytest
import scipy.stats

from mdt_ray.tuning.compare import Estimate, difference, estimate, importance, ranked, reached


def result(value, seed=0, **point):
    return {"point": point, "seed": seed, "metrics": {"fid_300": value}}


def test_the_interval_is_students():
    values = [3.0, 4.5, 2.0, 3.7]
    low, high = scipy.stats.t.interval(0.95, 3, loc=np.mean(values), scale=scipy.stats.sem(values))
    found = estimate(values)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high), rel=1e-12)
    assert estimate([3.0]) == Estimate(3.0, None, 1)
    assert estimate([3.0]).is_noise is None


def test_the_interval_holds_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    found = [estimate(generator.normal(size=3)) for _ in range(2000)]
    assert 0.93 < np.mean([f.is_noise for f in found]) < 0.97


def test_pairs_take_out_what_the_seed_does_to_both():
    """Seeds differ by far more than the settings do; the difference is still seen."""
    generator = np.random.default_rng(0)
    seeds = dict(enumerate(generator.normal(50, 10, size=3)))
    better = {k: v + generator.normal(0, 0.01) for k, v in seeds.items()}
    worse = {k: v + 1 + generator.normal(0, 0.01) for k, v in seeds.items()}
    found = difference(worse, better)
    assert found.mean == pytest.approx(1, abs=0.05)
    assert not found.is_noise
    assert estimate(list(worse.values())).half_width > 5
    assert difference({0: 1.0}, {1: 2.0}) is None
    assert difference({0: 3.0, 1: 9.0}, {0: 1.0, 2: 5.0}) == Estimate(2.0, None, 1)


def test_points_are_ranked_by_their_means_over_seeds():
    results = [result(5.0, 0, a=1), result(9.0, 0, a=2), result(1.0, 1, a=2), result(4.0, 1, a=1), result(4.5, 0, a=3)]
    best, second, third = ranked(results, "fid_300", "min")
    assert [best.point, second.point, third.point] == [{"a": 1}, {"a": 3}, {"a": 2}], "equal means as they came"
    assert best.to_best is None
    assert second.to_best == Estimate(-0.5, None, 1), "by the seed that both have"
    assert third.values == {0: 9.0, 1: 1.0}
    assert third.to_best.mean == pytest.approx(0.5)
    assert third.to_best.is_noise
    assert [row.point["a"] for row in ranked(results, "fid_300", "max")] == [2, 1, 3]


def test_importance_is_the_variance_that_a_setting_explains():
    rows = [({"a": a, "b": b, "c": 7}, 10.0 * a + b) for a in (0, 1) for b in (0, 1)]
    assert importance(rows) == pytest.approx({"a": 100 / 101, "b": 1 / 101})
    assert list(importance(rows)) == ["a", "b"]
    both = [({"a": a, "b": b}, float(a ^ b)) for a in (0, 1) for b in (0, 1)]
    assert importance(both) == {"a": 0.0, "b": 0.0}, "what two settings do together counts for neither"
    assert importance([({"a": 1}, 3.0), ({"a": 2}, 3.0)]) == {"a": 0.0}


def test_importance_of_draws_from_a_range():
    """Every value is another one: that each explains itself says nothing."""
    generator = np.random.default_rng(0)
    draws = [{"a": float(a), "b": float(b)} for a, b in generator.random((200, 2))]
    found = importance([(point, 3 * point["a"] + generator.normal(0, 0.1)) for point in draws])
    assert 0.85 < found["a"] < 0.97, "15/16 of a line's variance lies between its quarters"
    assert found["b"] < 0.05


def test_a_level_is_reached_between_two_points_of_a_curve():
    assert reached([10, 20, 30], [5.0, 3.0, 1.0], 3.0) == 20
    assert reached([10, 20, 30], [5.0, 3.0, 1.0], 2.5) == 22.5
    assert reached([10, 20, 30], [5.0, 3.0, 1.0], 9.0) == 10, "where the curve begins, which may be late"
    assert reached([10, 20, 30], [5.0, 3.0, 1.0], 0.5) is None
    assert reached([10, 20, 30], [5.0, 3.0, 4.0], 3.5) == 17.5, "the first time"
    assert reached([10, 20], [0.1, 0.3], 0.2, "max") == 15
