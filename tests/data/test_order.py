"""The order of training: permutation, no repeats, lanes that depend on nothing but (seed, step, attempt, lane)."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mdt_ray.data.order import NUM_SLOTS, Order, lanes_of, stream_seed

orders = st.builds(
    lambda sizes, lanes, lane_size, seed: Order(tuple(sizes), lanes * lane_size, lanes, seed),
    st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 8), st.integers(1, 5), st.integers(0, 2**31))


def stream(order: Order, first: int, count: int) -> np.ndarray:
    """Images at places first .. first + count of the stream, by the definition."""
    places = np.arange(first, first + count)
    return np.array([order.permutation(p // order.num_images)[p % order.num_images] for p in places])


@settings(max_examples=60, deadline=None)
@given(order=orders, epoch=st.integers(0, 5))
def test_an_epoch_is_a_permutation(order, epoch):
    assert sorted(order.permutation(epoch)) == list(range(order.num_images))


@settings(max_examples=60, deadline=None)
@given(order=orders)
def test_every_image_occurs_once_an_epoch_also_when_the_batch_does_not_divide_it(order):
    num_steps = -(-3 * order.num_images // order.batch_size)
    places = np.concatenate([order.places(n, j) for n in range(num_steps) for j in range(order.num_lanes)])
    assert np.array_equal(places, np.arange(num_steps * order.batch_size))  # nothing dropped, nothing twice


@settings(max_examples=60, deadline=None)
@given(order=orders, world_size=st.integers(1, 8))
def test_ranks_share_the_lanes_whatever_their_number(order, world_size):
    owned = [list(lanes_of(rank, world_size, order.num_lanes)) for rank in range(world_size)]
    assert sorted(lane for lanes in owned for lane in lanes) == list(range(order.num_lanes))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


def test_another_seed_or_epoch_is_another_permutation():
    sizes = (10,) * 20
    base = Order(sizes, 8, 4, 0)
    assert np.array_equal(base.permutation(0), Order(sizes, 8, 4, 0).permutation(0))
    assert not np.array_equal(base.permutation(0), base.permutation(1))
    assert not np.array_equal(base.permutation(0), Order(sizes, 8, 4, 1).permutation(0))


def test_a_lane_touches_few_row_groups():
    """100 steps of a lane read 400 images; from a global shuffle they would lie in about 330 of the 1000 row groups."""
    order = Order((128,) * 1000, 256, 64, 0)
    permutation = order.permutation(0)
    images = np.concatenate([permutation[order.places(n, 7)] for n in range(100)])
    assert len(images) == 400
    assert len(np.unique(images // 128)) <= 2 * NUM_SLOTS
    assert len(np.unique(images[:4] // 128)) == 4, "yet neighbours come from different ones"


def test_a_lane_needs_few_row_groups_at_a_time():
    """Between the first and the last image that it reads of a group, a lane needs it."""
    order = Order((128,) * 1000, 256, 64, 0)
    permutation = order.permutation(0)
    groups = np.concatenate([permutation[order.places(n, 7)] for n in range(500)]) // 128
    needed = [np.unique(groups[:i + 1][np.isin(groups[:i + 1], groups[i:])]).size for i in range(0, len(groups), 10)]
    assert max(needed) <= NUM_SLOTS


def test_lanes_begin_new_row_groups_at_a_steady_rate():
    """Else an object store would have to bring all of them at once. Eight lanes of 64, 10,000 groups: 2 groups a step."""
    order = Order((128,) * 10_016, 2048, 64, 0)
    permutation, begun, known = order.permutation(0), [], set()
    for step in range(200):
        groups = {int(g) for lane in range(8) for g in permutation[order.places(step, lane)] // 128}
        begun.append(len(groups - known))
        known |= groups
    windows = np.convolve(begun[5:], np.ones(8), "valid")  # after the first groups of all slots
    assert 12 < windows.mean() < 20
    assert windows.max() < 48, "three times the mean"


# Shuffling. What a batch holds of each class, of files sorted by class, against random draws.


def histograms(permutation: np.ndarray, num_classes: int, size: int) -> np.ndarray:
    """Counts (windows, classes) of an epoch cut into windows of `size` images."""
    labels = np.arange(len(permutation)) * num_classes // len(permutation)
    windows = np.arange(len(permutation)) // size
    table = np.zeros((windows[-1] + 1, num_classes), int)
    np.add.at(table, (windows, labels[permutation]), 1)
    return table[:-1] if len(permutation) % size < size // 2 else table


def share_as_extreme(permutations: list[np.ndarray], num_classes: int, size: int) -> float:
    """Two-sided p of chi-square for "windows of `size` images are drawn at random from the epoch".

    An epoch is drawn without replacement, so its windows vary less than independent draws, and are correlated: given the
    sums over windows and classes, they are a contingency table of independent factors, whose statistic has (windows - 1)
    (classes - 1) degrees of freedom. Too even is as telling as too clumpy. Statistics of epochs add up.
    """
    found = [stats.chi2_contingency(histograms(p, num_classes, size), correction=False) for p in permutations]
    statistic, dof = sum(f.statistic for f in found), sum(f.dof for f in found)
    return 2 * min(stats.chi2.sf(statistic, dof), stats.chi2.cdf(statistic, dof))


IMAGENET_LIKE = (Order((128,) * 312 + (64,), 256, 64, 0), 20)
DIGITS = (Order((64,) * 26 + (43,), 96, 16, 0), 10)


@pytest.mark.parametrize("batches", [1, 2, 5])  # consecutive ones together show what lasts from batch to batch
@pytest.mark.parametrize(("order", "num_classes"), [IMAGENET_LIKE, DIGITS], ids=["40,000 rows", "digits"])
def test_batches_of_sorted_files_look_like_random_draws(order, num_classes, batches):
    """(Counts vary by 1 - 1/NUM_SLOTS, so tens of epochs would show that they are a trifle too even.)"""
    epochs = [dataclasses.replace(order, seed=seed).permutation(seed) for seed in range(4)]
    assert share_as_extreme(epochs, num_classes, batches * order.batch_size) > 0.01


def in_file_order(seed: int) -> np.ndarray:
    return np.arange(40_000)


def by_group(seed: int) -> np.ndarray:
    """Row groups shuffled, their rows not spread."""
    groups = np.random.default_rng(seed).permutation(40_000 // 128)
    return (groups[:, None] * 128 + np.arange(128)).ravel()


def by_window(seed: int) -> np.ndarray:
    """Row groups shuffled, then the rows of 64 of them at a time."""
    rng, images = np.random.default_rng(seed), by_group(seed)
    return np.concatenate([rng.permutation(part) for part in np.split(images, range(8192, len(images), 8192))])


def by_stretch(seed: int) -> np.ndarray:
    """Each lane reads a stretch of the file, at random: every batch has nearly the same histogram."""
    stretches = np.random.default_rng(seed).permuted(np.arange(64 * 624).reshape(64, 624), axis=1)
    return stretches.reshape(64, -1, 4).swapaxes(0, 1).ravel()


@pytest.mark.parametrize("bad", [in_file_order, by_group, by_window, by_stretch])
def test_bad_shuffling_is_told_from_random_draws(bad):
    assert share_as_extreme([bad(seed) for seed in range(4)], 20, 256) < 1e-6


def test_random_draws_are_not_told_from_random_draws():
    ps = [share_as_extreme([np.random.default_rng([seed, i]).permutation(40_000) for i in range(4)], 20, size)
          for seed in range(10) for size in (256, 1280)]
    assert min(ps) > 0.001
    assert sum(p < 0.1 for p in ps) <= 6


def test_streams_do_not_repeat():
    seeds = {stream_seed(s, n, a, j, name) for s in range(3) for n in range(20) for a in range(3) for j in range(8)
             for name in ("t", "eps_full", "mask")}
    assert len(seeds) == 3 * 20 * 3 * 8 * 3
    assert all(0 <= s < 2**63 for s in seeds)


def test_bad_orders_are_refused():
    with pytest.raises(ValueError, match="no training image"):
        Order((), 4, 2, 0)
    with pytest.raises(ValueError, match="num_lanes = 3"):
        Order((8,), 4, 3, 0)
