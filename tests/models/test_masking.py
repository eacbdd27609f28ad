"""Which tokens a mask keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdt_ray.models import Mask, sample_mask


@given(length=st.integers(1, 300), ratio=st.floats(0, 0.99))
def test_keeps_the_smallest_noise(length, ratio):
    noise = torch.rand(2, length, generator=torch.Generator().manual_seed(length))
    num_kept = int(length * (1 - ratio))
    if num_kept == 0:
        with pytest.raises(ValueError, match="keeps none"):
            Mask.from_noise(noise, ratio)
        return
    mask = Mask.from_noise(noise, ratio)
    assert mask.ids_keep.shape == (2, num_kept)
    assert (~mask.hidden).sum(1).tolist() == [num_kept] * 2
    largest_kept = noise.gather(1, mask.ids_keep).amax(1)
    assert all((noise[i][mask.hidden[i]] >= largest_kept[i]).all() for i in range(2))


def test_number_kept_is_the_published_float_product():
    assert Mask.from_noise(torch.rand(1, 100), 0.8).ids_keep.shape[1] == 19  # 100 * (1 - 0.8) = 19.999...
    assert Mask.from_noise(torch.rand(1, 256), 0.3).ids_keep.shape[1] == 179


def test_restore_undoes_keep():
    mask = sample_mask(3, 10, 0.4, torch.Generator().manual_seed(0))
    tokens = torch.randn(3, 10, 5)
    restored = mask.restore(mask.keep(tokens), torch.full((1, 1, 5), 7.0))
    assert torch.equal(restored[~mask.hidden], tokens[~mask.hidden])
    assert (restored[mask.hidden] == 7).all()


def test_pairs_are_rows_and_columns_of_the_kept():
    mask = sample_mask(2, 6, 0.5, torch.Generator().manual_seed(0))
    table = torch.arange(36).reshape(6, 6)
    pairs = mask.pairs(table)
    for b in range(2):
        for i, q in enumerate(mask.ids_keep[b]):
            for j, k in enumerate(mask.ids_keep[b]):
                assert pairs[b, i, j] == table[q, k]


def test_same_generator_same_mask():
    a, b = (sample_mask(4, 16, 0.3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a.ids_keep, b.ids_keep)
    assert not torch.equal(a.ids_keep, sample_mask(4, 16, 0.3, torch.Generator().manual_seed(6)).ids_keep)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ValueError, match="mask ratio"):
        sample_mask(1, 16, ratio)
