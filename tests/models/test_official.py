"""Checkpoints of other origins: into ours and back, key by key."""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps

from mdt_ray.models import MDT, DiT, layers, official
from tests.conftest import relative_error, with_prefix

PUBLISHED = ("mdt_v1", "mdt_v2", "dit")


@pytest.fixture(scope="module")
def weights(vectors) -> dict[str, dict[str, torch.Tensor]]:
    return {origin: with_prefix(vectors, f"{origin}.weights.") for origin in PUBLISHED}


def is_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("origin", PUBLISHED)
def test_round_trip_is_bit_equal(weights, origin):
    state_dict = weights[origin]
    converted = official.convert(state_dict, official.infer_config(state_dict, num_heads=4))
    assert converted.layout == official.layout_of(state_dict) == origin
    assert is_equal(official.export(converted.model, origin, converted.spare), state_dict)
    if origin != "dit":  # without the spare rows the rest is equal, and loads again
        bare = official.export(converted.model, origin)
        again = official.convert(bare, official.infer_config(bare))
        assert is_equal(again.model.state_dict(), converted.model.state_dict())
        assert any("3 rows are indexed by nothing" in note for note in converted.notes)
        assert any("relative_position_index" in note for note in converted.notes)


@pytest.mark.parametrize("origin", PUBLISHED)
def test_config_is_read_from_the_shapes(weights, vector_config, origin):
    config = official.infer_config(weights[origin], num_heads=4 if origin == "dit" else None)
    assert {name: config[name] for name in vector_config} == vector_config
    assert config.get("decode_layer") == (2 if origin == "mdt_v2" else None)


@pytest.mark.parametrize(("origin", "width", "depth", "heads", "decode_layer"), [
    ("mdt_v1", 1152, 28, 16, 2), ("mdt_v2", 1152, 28, 16, 4), ("mdt_v2", 384, 12, 6, 6), ("dit", 1152, 28, 16, None)])
def test_published_sizes_are_told_apart(origin, width, depth, heads, decode_layer):
    """By shapes alone: tensors on the meta device, as large as the published ones."""
    config = {"hidden_size": width, "depth": depth, "num_heads": heads}
    with torch.device("meta"):
        model = DiT(**config) if origin == "dit" else MDT(**config, decode_layer=decode_layer,
                                                          long_skips=origin == "mdt_v2")
        state_dict = official.export(model, origin)
    if origin != "dit":
        table = state_dict[next(n for n in state_dict if n.endswith("bias_table"))]
        assert table.shape == (31 * 31 + 3, heads)
    found = official.infer_config(state_dict)
    assert (found["hidden_size"], found["depth"], found["num_heads"]) == (width, depth, heads)
    assert (found["input_size"], found["patch_size"], found["in_channels"], found["num_classes"]) == (32, 2, 4, 1000)
    assert found.get("decode_layer") == (decode_layer if origin == "mdt_v2" else None)


def as_published(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """diffusers spreads the timestep frequencies over 127 and 1e-5 in a norm, where DiT has 128 and 1e-6."""
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    return transformer.eval()


def with_computed_positions(dit: DiT) -> DiT:
    """The vectors' position table is random; the real ones have the sine-cosine table, which diffusers computes itself."""
    dit.pos_embed.copy_(layers.sincos_positions(dit.config.hidden_size, dit.grid))
    return dit


@torch.no_grad()
def test_diffusers_dit_there_and_back(weights, vectors, vector_config):
    dit = with_computed_positions(official.load(weights["dit"], vector_config))
    theirs = official.export(dit, "diffusers_dit")
    config = official.diffusers_config(dit)
    transformer = DiTTransformer2DModel(**config, norm_eps=1e-6)
    transformer.load_state_dict(theirs, strict=True)
    out = as_published(transformer)(vectors["x"], vectors["t"], vectors["y"]).sample
    assert relative_error(out, dit(vectors["x"], vectors["t"], vectors["y"])) <= 1e-4
    # And a model that diffusers made.
    torch.manual_seed(0)
    made = DiTTransformer2DModel(**config, norm_eps=1e-6)
    shared = made.transformer_blocks[0].norm1.emb.state_dict()
    for block in made.transformer_blocks:
        block.norm1.emb.load_state_dict(shared)
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.02)
    state_dict = made.state_dict()
    ours = official.convert(state_dict, official.infer_config(state_dict, num_heads=4, input_size=8))
    assert ours.layout == "diffusers_dit"
    assert is_equal(official.export(ours.model, "diffusers_dit"), state_dict)
    out = as_published(made)(vectors["x"], vectors["t"], vectors["y"]).sample
    assert relative_error(ours.model(vectors["x"], vectors["t"], vectors["y"]), out) <= 1e-4


def test_it_names_what_does_not_fit(weights, vector_config):
    state_dict = weights["mdt_v1"]
    with pytest.raises(ValueError, match="none of the known layouts"):
        official.load({"foo": torch.zeros(1)}, vector_config)
    with pytest.raises(ValueError, match="'mask_token' is missing"):
        official.load({k: v for k, v in state_dict.items() if k != "mask_token"}, vector_config)
    for name in ("pos_embed", "x_embedder.proj.weight", "final_layer.linear.bias"):
        with pytest.raises(ValueError, match=f"'{name}' is missing from this mdt_v1 layout"):
            official.infer_config({k: v for k, v in state_dict.items() if k != name})
    with pytest.raises(ValueError, match="bias_table' is missing"):  # (our own naming)
        official.infer_config(official.load(state_dict, vector_config).state_dict())
    with pytest.raises(ValueError, match="1 unexpected tensors: blocks"):
        official.load(state_dict | {"blocks.0.attn.norm": torch.zeros(1)}, vector_config)
    with pytest.raises(ValueError, match="check input_size and patch_size"):
        official.load(state_dict, vector_config | {"input_size": 16})
    index = "blocks.1.attn.rel_pos_bias.relative_position_index"
    with pytest.raises(ValueError, match="not the relative positions of a 8-wide latent"):
        official.load(state_dict | {index: state_dict[index].T.contiguous()}, vector_config)
    with pytest.raises(ValueError, match="does not fit the config"):
        official.load(weights["dit"] | {"final_layer.linear.bias": torch.zeros(8)}, vector_config)
    with pytest.raises(ValueError, match=r"16 outputs: must be 2 x 4 channels x 2\^2"):
        official.infer_config(weights["dit"] | {"final_layer.linear.bias": torch.zeros(16)}, num_heads=4)
    with pytest.raises(ValueError, match="num_heads: the shapes do not show it"):
        official.infer_config(weights["dit"])
    without_one = {k: v for k, v in state_dict.items() if not k.startswith("blocks.1.")}
    with pytest.raises(ValueError, match=r"blocks has the numbers \[0, 2, 3\]"):
        official.infer_config(without_one)


def test_a_diffusers_dit_with_unlike_embedders_is_refused(weights, vector_config):
    theirs = official.export(with_computed_positions(official.load(weights["dit"], vector_config)), "diffusers_dit")
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    with pytest.raises(ValueError, match="differs from 'transformer_blocks"):
        official.load(theirs | {name: theirs[name] + 1}, vector_config)


@pytest.mark.parametrize(("options", "layout", "reason"), [
    ({"masked_shortcut": False}, "mdt_v1", "no option for masked_shortcut"),
    ({"decode_layer": 0}, "mdt_v1", "needs a decoder"),
    ({}, "mdt_v2", "the naming of MDTv2"),
    ({"long_skips": True}, "mdt_v1", "the naming of MDT v1"),
    ({}, "dit", "learnable positions and relative biases"),
])
def test_export_refuses_what_a_layout_cannot_hold(options, layout, reason):
    model = MDT(input_size=8, hidden_size=32, depth=4, num_heads=2, **options)
    with pytest.raises(ValueError, match=reason):
        official.export(model, layout)


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"class_dropout_prob": 0.0}, {"mlp_ratio": 2.0},
                                     {"input_size": (8, 16)}], ids=str)
def test_a_dit_that_diffusers_cannot_hold(options):
    with pytest.raises(ValueError, match="cannot hold this DiT"):
        official.export(DiT(**{"input_size": 8, "hidden_size": 32, "depth": 1, "num_heads": 2} | options), "diffusers_dit")


def test_another_mlp_ratio_is_read_from_the_shapes():
    model = MDT(input_size=8, hidden_size=32, depth=2, num_heads=2, mlp_ratio=2.0)
    state_dict = official.export(model, "mdt_v1")
    assert is_equal(official.load(state_dict).state_dict(), model.state_dict())


def test_moved_positions_do_not_go_to_diffusers():
    dit = DiT(input_size=8, hidden_size=32, depth=1, num_heads=2)
    dit.pos_embed.copy_(layers.sincos_positions(32, (4, 4)) * 0.5)
    with pytest.raises(ValueError, match="not the sine-cosine table"):
        official.export(dit, "diffusers_dit")
