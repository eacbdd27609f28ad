"""The choices of the paper's Tables 4 and 5: each changes the forward pass where it says, and nothing else.

Every model here copies the parameters that it shares with the default one, so that outputs can be compared.
"""

import pytest
import torch

from mdt_ray.models import MDT, layers, sample_mask
from tests.models.test_models import TINY, randomised

T, Y = torch.tensor([5, 900]), torch.tensor([3, 10])
MASK = sample_mask(2, 16, 0.5, torch.Generator().manual_seed(1))
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
C = torch.randn(2, 48, generator=torch.Generator().manual_seed(2))
DEFAULT = randomised(MDT(**TINY))


def variant(**options) -> MDT:
    """The default model with other options and the same weights, as far as both have them."""
    model = randomised(MDT(**TINY, **options))
    missing, _ = model.load_state_dict(DEFAULT.state_dict(), strict=False)
    assert all(name.startswith("sideblocks.") for name in missing)
    return model


def parameter_names(model: MDT) -> set[str]:
    return {name for name, _ in model.named_parameters()}


@torch.no_grad()
def full(model: MDT) -> torch.Tensor:
    return model(X, T, Y)


@torch.no_grad()
def masked(model: MDT) -> torch.Tensor:
    return model(X, T, Y, mask=MASK)


@torch.no_grad()
def filled(model: MDT) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters the side-interpolator and what leaves it, for the encoder's output of the kept tokens."""
    encoded = model.encode(model.x_embedder(X) + model.pos_embed, model.modulations(C), MASK)
    entering = MASK.restore(encoded, model.mask_token) if encoded.shape[1] < 16 else encoded
    if model.decoder_pos_embed is not None:
        entering = entering + model.decoder_pos_embed
    return entering, model.interpolate(encoded, C, MASK)


OPTIONS = [
    {"masking": "symmetric"}, {"masking": "none"}, {"num_side_blocks": 0}, {"num_side_blocks": 2}, {"num_side_blocks": 3},
    {"masked_shortcut": False}, {"decoder_positions": False}, {"learnable_positions": False},
    {"relative_position_bias": False}, *({"decode_layer": n} for n in (0, 1, 4))]


PAIRED = [options | {"long_skips": True} for options in OPTIONS if options.get("decode_layer") != 1]


@pytest.mark.parametrize("options", OPTIONS + PAIRED, ids=str)
def test_no_parameter_is_left_unused(options):
    model = randomised(MDT(**TINY, **options))
    loss = model(X, T, Y).square().mean()
    if model.mask_token is not None:
        loss = loss + model(X, T, Y, mask=MASK).square().mean()
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_symmetric_masking_keeps_all_tokens_in_the_encoder():
    """Table 5a: the hidden tokens are mask tokens in their places; the full pass is untouched."""
    model = variant(masking="symmetric")
    assert parameter_names(model) == parameter_names(DEFAULT)
    assert torch.equal(full(model), full(DEFAULT))
    assert not torch.allclose(masked(model), masked(DEFAULT))
    patches = model.x_embedder(X) + model.pos_embed
    assert model.encode(patches, model.modulations(C), MASK).shape == (2, 16, 48)
    hidden = MASK.hidden[:, :, None]
    by_hand = torch.where(hidden, (model.mask_token + model.pos_embed).expand(2, -1, -1), patches)
    assert torch.equal(model.encode(patches, model.modulations(C), MASK), model.encode(by_hand, model.modulations(C), None))
    # Pixels of hidden tokens stay unseen.
    elsewhere = torch.where(hidden, torch.randn_like(patches), patches)
    modulations = model.modulations(C)
    assert torch.equal(model.encode(elsewhere, modulations, MASK), model.encode(patches, modulations, MASK))


def test_no_masking_is_the_full_pass_alone():
    """Table 5d, full: no mask token, no side blocks, and a mask is refused."""
    model = variant(masking="none")
    gone = parameter_names(DEFAULT) - parameter_names(model)
    assert gone == {"mask_token"} | {n for n in parameter_names(DEFAULT) if n.startswith("sideblocks.")}
    assert torch.equal(full(model), full(DEFAULT))
    with pytest.raises(ValueError, match="no masked pass"):
        masked(model)


def test_without_a_side_interpolator_the_decoder_gets_mask_tokens():
    """Table 5b."""
    model = variant(num_side_blocks=0)
    assert parameter_names(DEFAULT) - parameter_names(model) == {
        n for n in parameter_names(DEFAULT) if n.startswith("sideblocks.")}
    assert torch.equal(full(model), full(DEFAULT))
    entering, leaving = filled(model)
    assert torch.equal(entering, leaving)
    assert not torch.allclose(masked(model), masked(DEFAULT))


@pytest.mark.parametrize("num_side_blocks", [2, 3])
def test_more_side_blocks_follow_each_other(num_side_blocks):
    """Table 5f."""
    model = variant(num_side_blocks=num_side_blocks)
    assert torch.equal(full(model), full(DEFAULT))
    entering, leaving = filled(model)
    by_hand = entering
    with torch.no_grad():
        for block in model.sideblocks:
            by_hand = block(by_hand, block.adaLN_modulation(C), model.relative_position_index)
    assert torch.equal(leaving, torch.where(MASK.hidden[:, :, None], by_hand, entering))


def test_without_the_shortcut_kept_tokens_are_changed_too():
    """Table 5c."""
    model = variant(masked_shortcut=False)
    assert parameter_names(model) == parameter_names(DEFAULT)
    assert torch.equal(full(model), full(DEFAULT))
    (entering, leaving), (_, default) = filled(model), filled(DEFAULT)
    hidden = MASK.hidden
    assert torch.equal(leaving[hidden], default[hidden])
    assert torch.equal(default[~hidden], entering[~hidden])
    assert not torch.isclose(leaving[~hidden], entering[~hidden]).all(1).any()


def test_without_decoder_positions_nothing_is_added():
    """Table 5g: neither before the side-interpolator nor, without a mask, before the decoder."""
    model = variant(decoder_positions=False)
    assert parameter_names(DEFAULT) - parameter_names(model) == {"decoder_pos_embed"}
    encoded = torch.randn(2, 16, 48)
    assert torch.equal(model.interpolate(encoded, C, None), encoded)
    zero = variant()
    zero.decoder_pos_embed.data.zero_()
    assert torch.equal(full(model), full(zero))
    assert torch.equal(masked(model), masked(zero))
    assert not torch.allclose(full(model), full(DEFAULT))


def test_fixed_positions_are_the_sine_cosine_table():
    """Table 5h: not parameters, saved with the model all the same."""
    model = MDT(**TINY, learnable_positions=False)
    assert parameter_names(DEFAULT) - parameter_names(model) == {"pos_embed", "decoder_pos_embed"}
    table = layers.sincos_positions(48, (4, 4))
    assert torch.equal(model.pos_embed, table)
    assert torch.equal(model.decoder_pos_embed, table)
    assert torch.equal(full(variant(learnable_positions=False)), full(DEFAULT))
    assert torch.equal(MDT(**TINY).pos_embed, table)  # the learnable ones start there


def test_without_relative_bias_attention_is_plain():
    """Table 5i."""
    model = variant(relative_position_bias=False)
    tables = {n for n in parameter_names(DEFAULT) if n.endswith("relative_position_bias_table")}
    assert parameter_names(DEFAULT) - parameter_names(model) == tables
    assert len(tables) == 5
    zero = variant()
    for name, parameter in zero.named_parameters():
        if name in tables:
            parameter.data.zero_()
    torch.testing.assert_close(full(model), full(zero))
    torch.testing.assert_close(masked(model), masked(zero))
    assert not torch.allclose(full(model), full(DEFAULT))


@torch.no_grad()
@pytest.mark.parametrize("decode_layer", range(7))
def test_decoder_depth_moves_the_side_interpolator(decode_layer):
    """Table 4: both passes by hand, block after block, with the hidden tokens filled in before the last N2."""
    published = randomised(MDT(**TINY | {"depth": 8}, decode_layer=2))
    model = randomised(MDT(**TINY | {"depth": 8}, decode_layer=decode_layer))
    assert parameter_names(model) == parameter_names(published)
    model.load_state_dict(published.state_dict())
    c, index = layers.condition(model, T, Y), model.relative_position_index
    for mask in (None, MASK):
        x = model.x_embedder(X) + model.pos_embed
        x, positions = (x, index) if mask is None else (mask.keep(x), mask.pairs(index))
        for i, block in enumerate(model.blocks):
            if i == 8 - decode_layer:
                x = model.interpolate(x, c, mask)
            x = block(x, block.adaLN_modulation(c), positions if i < 8 - decode_layer else index)
        if decode_layer == 0:
            x = model.interpolate(x, c, mask)
        expected = layers.unpatchify(model.final_layer(x, c), (4, 4), 2)
        assert torch.equal(model(X, T, Y, mask=mask), expected)
    assert (decode_layer == 2) == torch.equal(masked(model), masked(published))


@torch.no_grad()
@pytest.mark.parametrize("options", [o for o in OPTIONS if "decode_layer" not in o], ids=str)
def test_choices_change_mdtv2_where_they_change_v1(options):
    """The full pass differs only where a position or bias goes, the masked pass by every choice of it."""
    plain, model = randomised(MDT(**TINY, long_skips=True)), randomised(MDT(**TINY, long_skips=True, **options))
    model.load_state_dict(plain.state_dict(), strict=False)
    same_full = options.keys() & {"masking", "num_side_blocks", "masked_shortcut", "learnable_positions"}
    assert torch.equal(full(model), full(plain)) == bool(same_full)
    if model.mask_token is not None:
        assert torch.equal(masked(model), masked(plain)) == ("learnable_positions" in options)


@pytest.mark.parametrize("long_skips", [False, True])
def test_the_masked_pass_alone_uses_every_parameter(long_skips):
    """Table 5d, masked."""
    model = randomised(MDT(**TINY, long_skips=long_skips))
    model(X, T, Y, mask=MASK).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_long_skips_join_first_and_last():
    """MDTv2: block i of the encoder's first half feeds block N1 - 1 - i; the decoder takes the embedded patches."""
    model = randomised(MDT(**TINY | {"depth": 6}, long_skips=True))
    assert [block.skip_linear is not None for block in model.blocks] == [False, False, True, True, True, True]
    assert model.sideblocks[0].skip_linear is None
    c = layers.condition(model, T, Y)
    patches = x = model.x_embedder(X) + model.pos_embed
    index, outputs = model.relative_position_index, []
    for block in model.blocks[:2]:
        x = block(x, block.adaLN_modulation(c), index)
        outputs.append(x)
    x = model.blocks[2](x, model.modulations(c)[2], index, outputs[1])
    x = model.blocks[3](x, model.modulations(c)[3], index, outputs[0])
    x = x + model.decoder_pos_embed
    for block in model.blocks[4:]:
        x = block(x, block.adaLN_modulation(c), index, patches)
    assert torch.equal(full(model), layers.unpatchify(model.final_layer(x, c), (4, 4), 2))
