"""The order of training: permutation, no repeats, lanes that depend on nothing but (seed, step, attempt, lane)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdt_ray.data.order import Order, lanes_of, stream_seed

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
    assert len(np.unique(images // 128)) <= 10


def test_batches_mix_classes_of_sorted_files():
    """Class histograms of batches drawn from class-sorted rows look like random draws (chi-square, p > 0.01)."""
    from scipy import stats

    num_classes, order = 10, Order((64,) * 400, 256, 64, 3)
    labels = np.arange(order.num_images) * num_classes // order.num_images
    permutation = order.permutation(0)
    statistics = []
    for n in range(order.num_images // order.batch_size):
        batch = labels[permutation[n * 256:(n + 1) * 256]]
        counts = np.bincount(batch, minlength=num_classes)
        statistics.append(stats.chisquare(counts).statistic)
    # The sum of independent chi-square statistics is one of as many degrees of freedom.
    p = stats.chi2.sf(sum(statistics), (num_classes - 1) * len(statistics))
    assert p > 0.01


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
