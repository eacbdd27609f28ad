"""Coverage by balls: the bounds that skip pairs, the pairs that are left, and ADM's float16, against plain definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdt_ray.evaluation import coverage, coverage_float16
from mdt_ray.evaluation.metrics import precision_recall

DTYPES = [torch.float32, torch.bfloat16]


def _plain(ref, samples, k):
    """The definition, from differences in float64."""
    squared = lambda a, b: ((a[:, None].astype(float) - b[None].astype(float)) ** 2).sum(axis=-1)  # noqa: E731
    across = squared(ref, samples)
    inside = (across <= np.sort(squared(ref, ref), axis=1)[:, k, None]).any(axis=0)
    return inside, (across <= np.sort(squared(samples, samples), axis=1)[:, k]).any(axis=1)


def _same(found, expected) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _wide(ref: np.ndarray, samples: np.ndarray):
    return ref * 10.0 ** np.arange(-10, 10), samples * 10.0 ** np.arange(-10, 10)


# What is far from what bfloat16, or float32, can tell apart.
HARD = {
    "plain": lambda a, b: (a, b),
    "far from 0": lambda a, b: (a + 1e4, b + 1e4),
    "tight clusters": lambda a, b: ((0.01 * a + 100 * a[:5].repeat(24, 0)), (0.01 * b + 100 * a[:5].repeat(30, 0))),
    "ties": lambda a, b: (a[:, :3].round(), b[:, :3].round()),
    "copies": lambda a, b: (a[:12].repeat(10, 0), a[5:20].repeat(10, 0)),
    "one image": lambda a, b: (a, a[:1].repeat(150, 0)),
    "one point": lambda a, b: (a[:1].repeat(120, 0), a[:1].repeat(150, 0)),
    "huge and tiny": _wide,
    "one huge": lambda a, b: (a, np.where(np.arange(150)[:, None] == 7, 1e6, b)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("block_size", [3, 40, 1000])
def test_coverage_is_the_definition_s(dtype, case, block_size):
    ref, samples = HARD[case](_normal(120, 20), _normal(150, 20, seed=1))
    assert _same(coverage.coverage(ref, samples, 3, block_size, dtype), _plain(ref, samples, 3))


@settings(deadline=None, max_examples=20)
@given(k=st.integers(1, 5), block_size=st.integers(2, 50), seed=st.integers(0, 1000), bits=st.integers(0, 4),
       dtype=st.sampled_from(DTYPES))
def test_coverage_of_random_ties(k, block_size, seed, bits, dtype):
    ref, samples = (np.round(x * 2**bits) for x in (_normal(30, 4, seed=seed), _normal(40, 4, seed=seed + 1)))
    assert _same(coverage.coverage(ref, samples, k, block_size, dtype), _plain(ref, samples, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [-1.0, 2.0])
def test_pairs_at_once_and_one_by_one_agree(dtype, share, monkeypatch):
    monkeypatch.setattr(coverage, "DENSE_SHARE", share)
    ref, samples = _normal(120, 20), _normal(150, 20, seed=1)
    samples[:30] = ref[3]
    assert _same(coverage.coverage(ref, samples, 3, 64, dtype), _plain(ref, samples, 3))


@pytest.mark.parametrize("share", [-1.0, 2.0])
def test_copies_are_at_distance_zero_exactly(share, monkeypatch):
    monkeypatch.setattr(coverage, "DENSE_SHARE", share)
    points = coverage._Points(_normal(40, 300), 0, np.zeros(300), 64, torch.float32)
    rows, pairs = slice(0, 40), np.stack([np.arange(40)] * 2)
    assert not coverage._squared_distances(points, rows, points, rows, pairs).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 20, 700])
@pytest.mark.parametrize("collinear", [False, True])
def test_bounds_are_below_the_distances_and_not_far_below(dtype, width, collinear):
    a, b = _normal(200, width), _normal(300, width, seed=1)
    if collinear:  # all products of one sign: errors add up
        a, b = np.abs(a), np.abs(a[:1]) * np.linspace(0.5, 2, 300, dtype=np.float32)[:, None]
    both = [coverage._Points(x, -5, np.zeros(width), 64, dtype) for x in (a, b)]
    bounds = 2 * coverage._half_bounds(both[0], slice(0, 200), both[1], slice(0, 300)).astype(float)
    exact = ((a[:, None].astype(float) - b) ** 2).sum(axis=-1) / 4**5
    norms = ((a.astype(float) ** 2).sum(1)[:, None] + (b.astype(float) ** 2).sum(1)) / 4**5
    assert (bounds <= exact).all()
    assert (bounds >= exact - norms * (0.03 if dtype == torch.bfloat16 else 3e-4)).all()


# ADM's float16


def _adm(ref, samples, k, block):
    """numpy's own float16, one operation at a time, on blocks of `block` rows and columns."""
    def distances(a, b):
        with np.errstate(over="ignore", invalid="ignore"):
            for dtype in (np.float16, np.float32):
                u, v = a.astype(dtype), b.astype(dtype)
                norms = [(x * x).sum(axis=1, dtype=np.float32).astype(dtype) for x in (u, v)]
                products = (u[:, None].astype(np.float32) * v.astype(np.float32)).sum(axis=-1).astype(dtype)
                found = np.maximum(norms[0][:, None] - dtype(2) * products + norms[1], dtype(0))
                if np.isfinite(found).all():
                    return found.astype(np.float32)
        raise AssertionError

    def blockwise(a, b):
        cut = lambda x: np.split(x, range(block, len(x), block))  # noqa: E731
        return np.block([[distances(u, v) for v in cut(b)] for u in cut(a)])

    across = blockwise(ref, samples)
    inside = (across <= np.sort(blockwise(ref, ref), axis=1)[:, k, None]).any(axis=0)
    return inside, (across <= np.sort(blockwise(samples, samples), axis=1)[:, k]).any(axis=1)


def _short(count: int, width: int, seed: int) -> np.ndarray:
    """Not negative, in steps of 1/64: float32 adds up their products exactly, in any order."""
    return np.round(np.abs(_normal(count, width, seed=seed)) * 64) / 64


@pytest.mark.parametrize("block_size", [7, 1000])
@pytest.mark.parametrize("large", [0, 3])
def test_adm_float16_is_numpy_s(block_size, large, monkeypatch):
    monkeypatch.setattr(coverage_float16, "ADM_BLOCK", 50)
    ref, samples = _short(120, 40, 0), _short(170, 40, 1)
    samples[:large] *= 64  # squares beyond float16: these blocks, and no others, are in float32
    expected = _adm(ref, samples, 3, 50)
    assert _same(coverage_float16.coverage(ref, samples, 3, block_size), expected)
    assert 0.1 < expected[0].mean() < 0.9
    assert not _same(_plain(ref, samples, 3), expected)  # or float16 were not seen here
    if large:
        assert not _same(_adm(ref, samples, 3, 1000), expected)  # nor the blocks


def test_adm_float16_moves_the_result_a_little():
    ref, samples = (np.abs(_normal(count, 256, seed=count) @ _normal(256, 256) / 16) for count in (1500, 1600))
    exact, moved = precision_recall(ref, samples), precision_recall(ref, samples, adm_float16=True)
    assert exact != moved
    assert np.abs(np.subtract(exact, moved)).max() < 0.01
