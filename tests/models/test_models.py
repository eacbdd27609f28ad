"""MDT and DiT against the reference vectors, the paper's numbers and their own invariants."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from mdt_ray.models import MDT, DiT, Mask, layers, official, sample_mask
from tests.conftest import relative_error, with_prefix

TINY = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 48, "depth": 4, "num_heads": 4, "num_classes": 10}


ORIGINS = ("mdt_v1", "mdt_v2", "dit")
MASK_RATIO = {"mdt_v1": 0.3, "mdt_v2": 0.35}


@pytest.fixture(scope="module")
def reference_models(vectors, vector_config) -> dict[str, torch.nn.Module]:
    return {origin: official.load(with_prefix(vectors, f"{origin}.weights."), vector_config) for origin in ORIGINS}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Small random weights everywhere, so that zero-initialised layers do not hide anything."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05, generator=generator)
    return model


# Oracle


@torch.no_grad()
@pytest.mark.parametrize("origin", ORIGINS)
def test_full_pass_equals_reference(reference_models, vectors, origin):
    out = reference_models[origin](vectors["x"], vectors["t"], vectors["y"])
    assert relative_error(out, vectors[f"{origin}.out_full"]) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("origin", ["mdt_v1", "mdt_v2"])
def test_masked_pass_equals_reference(reference_models, vectors, origin):
    mask = Mask.from_noise(vectors["mask_noise"], MASK_RATIO[origin])
    out = reference_models[origin](vectors["x"], vectors["t"], vectors["y"], mask=mask)
    assert relative_error(out, vectors[f"{origin}.out_masked"]) <= 1e-4


def test_mdt_gradients_equal_reference(reference_models, vectors):
    mdt = reference_models["mdt_v1"]
    mdt.zero_grad()
    mask = Mask.from_noise(vectors["mask_noise"], 0.3)
    x, t, y = vectors["x"], vectors["t"], vectors["y"]
    loss = mdt(x, t, y).square().mean() + mdt(x, t, y, mask=mask).square().mean()
    loss.backward()
    assert relative_error(loss.detach(), vectors["mdt_v1.loss_sq"]) <= 1e-4
    expected = with_prefix(vectors, "mdt_v1.grad.")
    assert len(expected) == 7
    parameters = dict(mdt.named_parameters())
    for name, gradient in expected.items():
        ours = parameters[name.replace(".rel_pos_bias.", ".")].grad
        # The published bias tables end in 3 rows that nothing indexes, so their gradient is zero.
        assert not gradient[len(ours):].any()
        assert relative_error(ours, gradient[:len(ours)]) <= 1e-4, name


@pytest.mark.parametrize(("size", "mdt_count", "dit_count"), [
    ((384, 12, 6), 33_130_856, 32_865_056),
    ((768, 12, 12), 130_847_408, 130_315_808),
    ((1024, 24, 16), 458_733_984, None),
    ((1152, 28, 16), 675_855_072, 674_834_720),
])
def test_parameter_counts_are_the_papers(size, mdt_count, dit_count):
    width, depth, heads = size
    with torch.device("meta"):
        mdt, dit = (cls(hidden_size=width, depth=depth, num_heads=heads) for cls in (MDT, DiT))
    training_only = ("sideblocks.", "mask_token")
    assert sum(p.numel() for n, p in mdt.named_parameters() if not n.startswith(training_only)) == mdt_count
    assert dit_count in (None, sum(p.numel() for p in dit.parameters()))


def test_sincos_positions_by_hand():
    table = layers.sincos_positions(8, (2, 3))[0].double()
    row, column = 1, 2
    omega = torch.tensor([1.0, 0.01], dtype=torch.float64)
    expected = torch.cat([f(torch.tensor(place) * omega) for place in (column, row) for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(table[row * 3 + column], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("grid", [(3, 3), (2, 4)])
def test_relative_bias_depends_on_query_minus_key(grid):
    rows, columns = grid
    index = layers.relative_position_index(grid)
    for q in range(rows * columns):
        for k in range(rows * columns):
            dh, dw = q // columns - k // columns, q % columns - k % columns
            assert index[q, k] == (dh + rows - 1) * (2 * columns - 1) + dw + columns - 1
    assert index.max() == layers.num_relative_positions(grid) - 1


@pytest.mark.parametrize("num_added", [0, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_bias_by_hand(masked, num_added):
    """With the gradients of the table, also where PyTorch's own attention is not taken; and keys added change nothing."""
    torch.manual_seed(0)
    attention = layers.Attention(24, num_heads=3, num_relative_positions=layers.num_relative_positions((3, 4))).double()
    positions = layers.relative_position_index((3, 4))
    positions = sample_mask(2, 12, 0.4).pairs(positions) if masked else positions
    x = torch.randn(2, positions.shape[-1], 24, dtype=torch.float64)

    def by_hand() -> torch.Tensor:
        q, k, v = attention.qkv(x).view(2, -1, 3, 3, 8).unbind(2)  # (B, L, H, d)
        scores = torch.einsum("bihd,bjhd->bijh", q, k) / 8**0.5 + attention.relative_position_bias_table[positions]
        return attention.proj(torch.einsum("bijh,bjhd->bihd", scores.softmax(dim=2), v).flatten(2))

    parameters = list(attention.parameters())
    more = F.pad(positions, (0, num_added))
    found, expected = attention(x, more), by_hand()
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(found, parameters, weights),
                               torch.autograd.grad(expected, parameters, weights))
    with torch.no_grad():
        torch.testing.assert_close(attention(x, more), expected)


# Invariant


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_attention_without_a_bias_is_attention(dtype, bound):
    """On CPUs in bf16 it is written out, for the fused kernel's backward pass is slow there: values and gradients."""
    torch.manual_seed(0)
    inputs = [torch.randn(3, 2, 16, 8).to(dtype).requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    weights = torch.randn(3, 2, 16, 8)
    found, expected = layers.attend(*inputs, None), F.scaled_dot_product_attention(*exact)
    for value, factor in ((found, weights.to(dtype)), (expected, weights.double())):
        (value * factor).sum().backward()
    assert relative_error(found, expected) < bound
    for x, y in zip(inputs, exact, strict=True):
        assert relative_error(x.grad, y.grad) < bound


@torch.no_grad()
def test_side_interpolator_leaves_kept_tokens_untouched():
    model = randomised(MDT(**TINY, class_dropout_prob=0.1))
    mask = sample_mask(2, 16, 0.5, torch.Generator().manual_seed(1))
    encoded = torch.randn(2, 8, 48)
    c = torch.randn(2, 48)
    out = model.interpolate(encoded, c, mask)
    kept = mask.keep(out)
    assert torch.equal(kept, encoded + mask.keep(model.decoder_pos_embed.expand(2, -1, -1)))
    filled = mask.restore(encoded, model.mask_token) + model.decoder_pos_embed
    assert not torch.isclose(out, filled)[mask.hidden].any(1).all()


@torch.no_grad()
def test_hidden_tokens_do_not_reach_the_output():
    """The masked pass must not see the pixels of hidden tokens."""
    model = randomised(MDT(**TINY, class_dropout_prob=0.1))
    mask, x, changed = with_hidden_pixels_changed()
    t, y = torch.tensor([5]), torch.tensor([3])
    assert torch.equal(model(x, t, y, mask=mask), model(changed, t, y, mask=mask))
    assert not torch.equal(model(x, t, y), model(changed, t, y))


def with_hidden_pixels_changed():
    mask, x = sample_mask(1, 16, 0.5, torch.Generator().manual_seed(2)), torch.randn(1, 4, 8, 8)
    pixels = mask.hidden.reshape(1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return mask, x, torch.where(pixels, torch.randn_like(x), x)


@torch.no_grad()
def test_long_skips_show_hidden_tokens_to_the_decoder_only():
    """MDTv2's decoder takes the embedded patches of the whole sequence, its encoder the kept ones."""
    model = randomised(MDT(**TINY, long_skips=True))
    mask, x, changed = with_hidden_pixels_changed()
    c = torch.randn(1, 48)
    encoded = [model.encode(model.x_embedder(v) + model.pos_embed, model.modulations(c), mask) for v in (x, changed)]
    assert torch.equal(*encoded)
    t, y = torch.tensor([5]), torch.tensor([3])
    assert not torch.equal(model(x, t, y, mask=mask), model(changed, t, y, mask=mask))


MODELS = {"mdt": lambda **c: MDT(**TINY, **c), "mdt v2": lambda **c: MDT(**TINY, long_skips=True, **c),
          "dit": lambda **c: DiT(**TINY, **c)}


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_a_fresh_model_predicts_zero(kind):
    assert not MODELS[kind]()(torch.randn(2, 4, 8, 8), torch.tensor([0, 999]), torch.tensor([0, 10])).any()


@torch.no_grad()
@pytest.mark.parametrize("cls", [MDT, DiT])
@pytest.mark.parametrize(("input_size", "in_channels", "patch_size"), [
    (16, 32, 1),  # VA-VAE at 256 pixels
    (32, 16, 2),  # Flux
    (32, 4, 4), (32, 4, 8), ((16, 24), 4, 2)])
def test_any_latent_shape(cls, input_size, in_channels, patch_size):
    model = randomised(cls(input_size=input_size, in_channels=in_channels, patch_size=patch_size, hidden_size=32, depth=2,
                           num_heads=2, num_classes=3, **({"decode_layer": 1} if cls is MDT else {})))
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    x = torch.randn(2, in_channels, height, width)
    out = model(x, torch.tensor([0, 999]), torch.tensor([0, 3]))
    assert out.shape == (2, 2 * in_channels, height, width)


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_an_unconditional_model_takes_no_labels(kind):
    config = TINY | {"num_classes": 0}
    model = randomised(DiT(**config) if kind == "dit" else MDT(**config, long_skips=kind == "mdt v2"))
    assert not any("y_embedder" in name for name, _ in model.named_parameters())
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 4])
    assert torch.equal(model(x, t), model(x, t, torch.tensor([5, 6])))


@pytest.mark.parametrize("kind", ["mdt", "mdt v2"])
def test_every_parameter_gets_a_gradient(kind):
    """DDP refuses unused ones."""
    model = randomised(MODELS[kind]())
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 10])
    (model(x, t, y).square().mean() + model(x, t, y, mask=sample_mask(2, 16, 0.3)).square().mean()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"long_skips": True}, {"masking": "symmetric"}, {"num_side_blocks": 0},
                                     {"decode_layer": 0}, {"decode_layer": 4}, {"num_classes": 0}])
def test_both_passes_at_once_are_the_two_passes(options):
    model = randomised(MDT(**TINY | options)).double()
    x, t = torch.randn(6, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 20, 300] * 2)
    y = torch.tensor([0, 10, 2, 3, 4, 10])
    mask = sample_mask(3, 16, 0.3)
    pairs = mock.Mock(wraps=mask.pairs)
    with mock.patch.object(Mask, "pairs", lambda mask, table: pairs(table)):
        found = model.both_passes(x, t, y, mask)
    assert pairs.call_count == (model.config.masking == "asymmetric" and model.config.relative_position_bias)  # once for all
    torch.testing.assert_close(found[:3], model(x[:3], t[:3], y[:3]))
    torch.testing.assert_close(found[3:], model(x[3:], t[3:], y[3:], mask))


def test_null_label_exists_only_with_label_dropout():
    assert MDT(**TINY, class_dropout_prob=0.1).y_embedder.embedding_table.num_embeddings == 11
    assert MDT(**TINY, class_dropout_prob=0.0).y_embedder.embedding_table.num_embeddings == 10


# Determinism


def test_save_and_load_is_bit_equal(tmp_path):
    for kind, make in MODELS.items():
        model, folder = randomised(make()), tmp_path / kind
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, low_cpu_mem_usage=False)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items())
        x, t, y = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.tensor([1])
        # Kernels round by memory alignment, which loading changes.
        torch.testing.assert_close(loaded.eval()(x, t, y), model.eval()(x, t, y), rtol=1e-5, atol=1e-6)


# Bad input


def test_wrong_shapes_are_named():
    model = MDT(**TINY)
    with pytest.raises(ValueError, match=r"x has shape \(1, 3, 8, 8\)"):
        model(torch.zeros(1, 3, 8, 8), torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"y has shape \(2,\)"):
        model(torch.zeros(1, 4, 8, 8), torch.tensor([0]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="patch_size = 3: must divide the latent size 8"):
        MDT(**{**TINY, "patch_size": 3})
    with pytest.raises(ValueError, match="y = None: the model has 10 classes"):
        model(torch.zeros(1, 4, 8, 8), torch.tensor([0]))
    with pytest.raises(ValueError, match="decode_layer = 5"):
        MDT(**TINY, decode_layer=5)
    with pytest.raises(ValueError, match=r"depth - decode_layer = 3 must be even"):
        MDT(**TINY, decode_layer=1, long_skips=True)
    with pytest.raises(ValueError, match="DiT has no masked pass"):
        DiT(**TINY)(torch.zeros(1, 4, 8, 8), torch.tensor([0]), torch.tensor([0]), mask=sample_mask(1, 16, 0.5))
