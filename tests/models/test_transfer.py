"""Starting a model from another's weights."""

import pytest
import torch

from mdt_ray.models import MDT, DiT, layers, sample_mask
from mdt_ray.models.transfer import transfer
from tests.models.test_models import TINY, randomised

X, T, Y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 900]), torch.tensor([3, 10])


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: MDT(**TINY), lambda: MDT(**TINY, long_skips=True), lambda: DiT(**TINY)])
def test_the_same_model_is_taken_whole(make):
    source, target = randomised(make()), make()
    done = transfer(target, source)
    assert (done.interpolated, done.new, done.left) == ([], [], [])
    assert torch.equal(target(X, T, Y), source(X, T, Y))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"long_skips": True}, {"num_side_blocks": 2}, {"masking": "none"}], ids=str)
def test_an_mdt_begun_from_a_dit_computes_the_same(options):
    source, target = randomised(DiT(**TINY)), randomised(MDT(**TINY, **options))
    done = transfer(target, source)
    torch.testing.assert_close(target(X, T, Y), source(X, T, Y), atol=1e-5, rtol=1e-5)
    assert any(line.startswith("decoder_pos_embed: starts at 0") for line in done.new)
    assert len(done.taken) == len(source.state_dict())
    if target.mask_token is not None:
        assert target(X, T, Y, mask=sample_mask(2, 16, 0.5)).isfinite().all()
        assert any("mask_token: initialised" in line for line in done.new)


@torch.no_grad()
def test_a_v2_begun_from_a_v1_computes_the_same():
    source, target = randomised(MDT(**TINY)), randomised(MDT(**TINY, long_skips=True))
    transfer(target, source)
    torch.testing.assert_close(target(X, T, Y), source(X, T, Y), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_other_classes_replace_the_label_table_but_the_null_label():
    source, target = randomised(MDT(**TINY)), randomised(MDT(**TINY | {"num_classes": 3}))
    before = target.y_embedder.embedding_table.weight.clone()
    done = transfer(target, source)
    table = target.y_embedder.embedding_table.weight
    assert torch.equal(table[:3], before[:3])
    assert torch.equal(table[3], source.y_embedder.embedding_table.weight[10])
    assert done.new == ["y_embedder.embedding_table.weight: 3 classes for 10, the null label taken"]
    null = torch.tensor([10, 10])
    torch.testing.assert_close(target(X, T, torch.tensor([3, 3])), source(X, T, null))


@torch.no_grad()
def test_another_resolution_interpolates_positions_and_biases():
    source, target = randomised(MDT(**TINY)), randomised(MDT(**TINY | {"input_size": 16}))
    # A smooth table must come out as the same function on a finer grid.
    source.pos_embed.copy_(layers.sincos_positions(48, (4, 4)))
    grid = torch.linspace(-3, 3, 7)
    plane = (grid[:, None] + 2 * grid[None, :]).reshape(49, 1).expand(-1, 4)
    source.blocks[0].attn.relative_position_bias_table.copy_(plane)
    done = transfer(target, source)
    assert sum("pos_embed: (4, 4) -> (8, 8) tokens" in line for line in done.interpolated) == 2
    assert sum("bias_table" in line for line in done.interpolated) == 5
    fine = torch.linspace(-3, 3, 15)
    expected = (fine[:, None] + 2 * fine[None, :]).reshape(225, 1).expand(-1, 4)
    table = target.blocks[0].attn.relative_position_bias_table
    torch.testing.assert_close(table, expected, atol=1e-4, rtol=1e-4)
    assert target(torch.randn(1, 4, 16, 16), torch.tensor([3]), torch.tensor([2])).isfinite().all()


def test_fixed_positions_are_recomputed_for_another_grid():
    for make in (lambda **c: DiT(**TINY | c), lambda **c: MDT(**TINY | c, learnable_positions=False)):
        target = make(input_size=16)
        done = transfer(target, randomised(make()))
        assert torch.equal(target.pos_embed, layers.sincos_positions(48, (8, 8)))
        assert "pos_embed: the sine-cosine table of (8, 8) tokens" in done.new


def test_a_moved_side_interpolator_is_said():
    done = transfer(MDT(**TINY, decode_layer=1), MDT(**TINY))
    assert done.changed == ["decode_layer: 1 for 2"]
    assert "changed: decode_layer: 1 for 2" in done.lines()
    assert transfer(MDT(**TINY), MDT(**TINY)).changed == []


@torch.no_grad()
def test_a_null_label_is_added_to_the_classes():
    source, target = randomised(MDT(**TINY, class_dropout_prob=0.0)), randomised(MDT(**TINY))
    done = transfer(target, source)
    assert torch.equal(target.y_embedder.embedding_table.weight[:10], source.y_embedder.embedding_table.weight)
    assert done.new == ["y_embedder.embedding_table.weight: the classes taken, the null label new"]


def test_other_channels_are_listed_as_new():
    done = transfer(MDT(**TINY | {"in_channels": 16}), MDT(**TINY))
    assert [line.split(":")[0] for line in done.new] == [
        "x_embedder.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias"]


def test_lines_join_the_blocks():
    lines = transfer(MDT(**TINY), DiT(**TINY)).lines()
    assert lines[0].endswith("tensors taken as they are")
    assert "new: blocks.*.attn.relative_position_bias_table: starts at 0 (x4)" in lines
    back = transfer(DiT(**TINY), MDT(**TINY)).lines()
    assert any(line.startswith("left: sideblocks") for line in back)


def test_another_width_or_depth_is_refused():
    with pytest.raises(ValueError, match=r"model.depth = 4: the checkpoint to start from has 2"):
        transfer(MDT(**TINY), MDT(**TINY | {"depth": 2}))
