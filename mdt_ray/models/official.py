"""Other people's checkpoints and ours: the authors' MDT and MDTv2, DiT, and diffusers' DiTTransformer2DModel.

State dicts in and out, key by key. Not a reader of files: that is inference/convert.py.

A layout is the naming of one origin:
    mdt_v1, mdt_v2   the authors' (blocks.* | en_inblocks.*, en_outblocks.*, de_blocks.*)
    dit              Meta's DiT
    diffusers_dit    diffusers' DiTTransformer2DModel
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from mdt_ray.models import layers
from mdt_ray.models.dit import DiT
from mdt_ray.models.mdt import MDT

Layout = Literal["mdt_v1", "mdt_v2", "dit", "diffusers_dit"]
LAYOUTS = ("mdt_v1", "mdt_v2", "dit", "diffusers_dit")
StateDict = dict[str, torch.Tensor]
NUM_SPARE_ROWS = 3
"""Rows at the end of a published bias table that nothing indexes (a class token's, in BEiT)."""
NUM_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Heads of the published widths (S, B, L, XL), for layouts whose shapes do not show them."""
DIFFUSERS_NAMES = {
    "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2", "adaLN_modulation.1": "norm1.linear"}
DIFFUSERS_TOP = {
    "x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2"}
DIFFUSERS_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table"}


@dataclass(frozen=True)
class Converted:
    """A model made from another layout, and what became of every tensor of it."""

    model: MDT | DiT
    layout: Layout
    notes: list[str] = field(default_factory=list)
    """What was left out and why, and what the shapes do not show."""
    spare: StateDict = field(default_factory=dict)
    """Tensors that ours has no place for but that a conversion back restores: the spare rows, under the published names."""


def layout_of(state_dict: StateDict) -> Layout:
    """Which layout a state dict has, by its keys. Raises ValueError if none."""
    if "en_inblocks.0.attn.qkv.weight" in state_dict:
        return "mdt_v2"
    if "blocks.0.attn.qkv.weight" in state_dict:
        return "mdt_v1" if "decoder_pos_embed" in state_dict else "dit"
    if "transformer_blocks.0.attn1.to_q.weight" in state_dict and "pos_embed.proj.weight" in state_dict:
        return "diffusers_dit"
    raise ValueError("state_dict: none of the known layouts (MDT v1 or DiT: blocks.*; MDTv2: en_inblocks.*; diffusers' DiT: "
                     f"transformer_blocks.*); its first keys are {sorted(state_dict)[:5]}")


def infer_config(state_dict: StateDict, **known: Any) -> dict[str, Any]:
    """The constructor's arguments that a state dict belongs to, read from its shapes.

    Args:
        known: arguments that the shapes do not show, or that should win: `num_heads` (of a DiT of another width than S,
            B, L or XL), `decode_layer` (of v1; 2 in all published ones), `class_dropout_prob` (0 without a null label).
    Raises ValueError if the shapes contradict each other, or do not show what is not in `known`.
    """
    layout, known = layout_of(state_dict), {name: value for name, value in known.items() if value is not None}
    diffusers = layout == "diffusers_dit"

    def tensor(name: str) -> torch.Tensor:
        if name not in state_dict:
            raise ValueError(f"state_dict: {name!r} is missing from this {layout} layout")
        return state_dict[name]

    patches = tensor("pos_embed.proj.weight" if diffusers else "x_embedder.proj.weight")  # (D, C, p, p)
    labels = state_dict.get("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight" if diffusers
                            else "y_embedder.embedding_table.weight")
    output = tensor("proj_out_2.bias" if diffusers else "final_layer.linear.bias")
    width, in_channels, patch_size, _ = patches.shape
    config = {"patch_size": patch_size, "in_channels": in_channels, "hidden_size": width}
    if output.shape[0] != 2 * in_channels * patch_size**2:
        raise ValueError(f"the final layer has {output.shape[0]} outputs: must be 2 x {in_channels} channels x "
                         f"{patch_size}^2; a model without a learned variance is not supported")
    config["class_dropout_prob"] = known.get("class_dropout_prob", 0.1)
    config["num_classes"] = 0 if labels is None else labels.shape[0] - (config["class_dropout_prob"] > 0)
    if diffusers:
        config["depth"] = _count(state_dict, "transformer_blocks")
    else:
        if layout == "mdt_v2":
            config["decode_layer"] = _count(state_dict, "de_blocks")
            config["long_skips"] = True
            config["depth"] = (_count(state_dict, "en_inblocks") + _count(state_dict, "en_outblocks")
                               + config["decode_layer"])
        else:
            config["depth"] = _count(state_dict, "blocks")
        config["input_size"] = _square(tensor("pos_embed").shape[1], "pos_embed") * patch_size
        first = "en_inblocks.0" if layout == "mdt_v2" else "blocks.0"
        config["mlp_ratio"] = tensor(f"{first}.mlp.fc1.bias").shape[0] / width
    if layout in ("mdt_v1", "mdt_v2"):
        config["num_side_blocks"] = _count(state_dict, "sideblocks")
        config["num_heads"] = tensor("sideblocks.0.attn.rel_pos_bias.relative_position_bias_table").shape[1]
    elif width in NUM_HEADS:
        config["num_heads"] = NUM_HEADS[width]
    config |= known
    for name in ("num_heads", "input_size"):
        if name not in config:
            raise ValueError(f"{name}: the shapes do not show it; name it")
    return config


def convert(state_dict: StateDict, config: dict[str, Any]) -> Converted:
    """Build our model and load every tensor of another layout into it.

    Args:
        state_dict: tensors under the names of their origin.
        config: arguments of MDT or DiT, as from infer_config.
    Raises ValueError for an unknown layout, or for missing, unexpected or misshapen tensors.
    """
    layout = layout_of(state_dict)
    config = {name: value for name, value in config.items() if value is not None}
    if layout in ("dit", "diffusers_dit"):
        config.pop("decode_layer", None)
        model = DiT(**config)
    else:
        model = MDT(**config | {"long_skips": layout == "mdt_v2"})
    converted = Converted(model=model, layout=layout)
    if layout == "mdt_v1" and "decode_layer" not in config:
        converted.notes.append("decode_layer = 2, as in all published MDT v1 models: the shapes do not show it")
    if model.config.num_classes and model.config.class_dropout_prob:
        converted.notes.append(f"the last of {model.config.num_classes + 1} labels is taken for the null label (if it is a "
                               "class, class_dropout_prob must be 0)")
    if dtypes := {t.dtype for t in state_dict.values() if t.is_floating_point()} - {torch.float32}:
        converted.notes.append(f"stored as {', '.join(map(str, dtypes))}, held here in torch.float32")
    remaining, ours = dict(state_dict), {}
    for name, theirs in _names(model, layout).items():
        if missing := [n for n in theirs if n not in remaining]:
            raise ValueError(f"state_dict: {missing[0]!r} is missing, for our {name!r}")
        ours[name] = _merge(name, theirs, [remaining.pop(n) for n in theirs])
    if layout in ("mdt_v1", "mdt_v2"):
        _account_for_bias(model, remaining, ours, converted)
    if layout == "diffusers_dit":
        ours["pos_embed"] = model.pos_embed
        converted.notes.append("pos_embed: diffusers computes it; so do we")
    if remaining:
        raise ValueError(f"state_dict: {len(remaining)} unexpected tensors: {', '.join(sorted(remaining)[:5])}")
    try:
        model.load_state_dict(ours, strict=True)
    except RuntimeError as error:
        raise ValueError(f"state_dict does not fit the config: {error}") from error
    model.eval()
    return converted


def load(state_dict: StateDict, config: dict[str, Any] | None = None) -> MDT | DiT:
    """The model of a state dict of any layout, in evaluation mode; `config` as for convert, or read from the shapes."""
    return convert(state_dict, infer_config(state_dict) if config is None else config).model


def export(model: MDT | DiT, layout: Layout, spare: StateDict | None = None) -> StateDict:
    """The inverse of convert: our model's tensors under the names of `layout`.

    Spare bias rows come from `spare` (as in Converted), else they are zeros, which nothing reads.
    Raises ValueError if that layout cannot hold the model.
    """
    if fault := _misfit(model, layout):
        raise ValueError(f"{layout}: cannot hold this {type(model).__name__}: {fault}")
    ours, theirs = model.state_dict(), {}
    for name, names in _names(model, layout).items():
        parts = ours[name].chunk(len(names)) if ".attn.qkv." in name else [ours[name]] * len(names)
        theirs |= {n: part.clone() for n, part in zip(names, parts, strict=True)}
    if layout in ("mdt_v1", "mdt_v2"):
        for name in [n for n in theirs if n.endswith("relative_position_bias_table")]:
            rows = (spare or {}).get(name, torch.zeros(NUM_SPARE_ROWS, model.config.num_heads))
            theirs[name] = torch.cat([theirs[name], rows.to(theirs[name])])
            theirs[name.removesuffix("bias_table") + "index"] = model.relative_position_index.clone()
    return theirs


def diffusers_config(model: DiT) -> dict[str, Any]:
    """The arguments of diffusers' DiTTransformer2DModel that fit our DiT."""
    c = model.config
    return {"num_attention_heads": c.num_heads, "attention_head_dim": c.hidden_size // c.num_heads,
            "in_channels": c.in_channels, "out_channels": 2 * c.in_channels, "num_layers": c.depth,
            "sample_size": c.input_size, "patch_size": c.patch_size, "num_embeds_ada_norm": c.num_classes}


def _names(model: MDT | DiT, layout: Layout) -> dict[str, tuple[str, ...]]:
    """Our name of every tensor -> theirs: one, or the three of q, k, v, or one copy for each block."""
    names = {}
    for ours in model.state_dict():
        module, _, kind = ours.rpartition(".")
        if layout != "diffusers_dit":
            names[ours] = (_published_name(ours, model, layout),)
        elif module in DIFFUSERS_TOP:
            names[ours] = (f"{DIFFUSERS_TOP[module]}.{kind}",)
        elif module in DIFFUSERS_EMBEDDERS:
            names[ours] = tuple(f"transformer_blocks.{i}.norm1.emb.{DIFFUSERS_EMBEDDERS[module]}.{kind}"
                                for i in range(model.config.depth))
        elif ours.startswith("blocks."):
            _, number, part = module.split(".", 2)
            parts = ["attn1.to_q", "attn1.to_k", "attn1.to_v"] if part == "attn.qkv" else [DIFFUSERS_NAMES[part]]
            names[ours] = tuple(f"transformer_blocks.{number}.{p}.{kind}" for p in parts)
    return names


def _published_name(ours: str, model: MDT | DiT, layout: Layout) -> str:
    ours = ours.replace(".attn.relative_position_bias_table", ".attn.rel_pos_bias.relative_position_bias_table")
    if layout != "mdt_v2" or not ours.startswith("blocks."):
        return ours
    _, number, rest = ours.split(".", 2)
    number, num_encoder = int(number), model.config.depth - model.config.decode_layer
    group, first = (("en_inblocks", 0) if number < num_encoder // 2 else
                    ("en_outblocks", num_encoder // 2) if number < num_encoder else ("de_blocks", num_encoder))
    return f"{group}.{number - first}.{rest}"


def _merge(name: str, theirs: tuple[str, ...], tensors: list[torch.Tensor]) -> torch.Tensor:
    if ".attn.qkv." in name:
        return torch.cat(tensors)
    for other, tensor in zip(theirs, tensors, strict=True):
        if not torch.equal(tensor, tensors[0]):
            raise ValueError(f"state_dict: {other!r} differs from {theirs[0]!r}: must be equal, as DiT has one {name!r} for "
                             "all blocks")
    return tensors[0]


def _account_for_bias(model: MDT, remaining: StateDict, ours: StateDict, converted: Converted) -> None:
    """The spare rows of the bias tables are cut off and kept aside; the index buffers must be the one that ours share."""
    num_rows = layers.num_relative_positions(model.grid)
    for name, (theirs,) in _names(model, converted.layout).items():
        if name.endswith("relative_position_bias_table"):
            if ours[name].shape[0] != num_rows + NUM_SPARE_ROWS:
                raise ValueError(f"state_dict[{theirs!r}] has {ours[name].shape[0]} rows: must be {num_rows} for a "
                                 f"{model.config.input_size}-wide latent and {NUM_SPARE_ROWS} spare; check input_size and "
                                 "patch_size")
            ours[name], converted.spare[theirs] = ours[name][:num_rows], ours[name][num_rows:].clone()
    index_names = [n for n in remaining if n.endswith(".rel_pos_bias.relative_position_index")]
    for name in index_names:
        if not torch.equal(remaining.pop(name).cpu(), model.relative_position_index):
            raise ValueError(f"state_dict[{name!r}]: not the relative positions of a {model.config.input_size}-wide "
                             "latent; check input_size and patch_size")
    converted.notes.append(f"{len(converted.spare)} bias tables: their last {NUM_SPARE_ROWS} rows are indexed by nothing (a "
                           "class token's, in BEiT), and are kept beside the model")
    converted.notes.append(f"{len(index_names)} relative_position_index buffers: equal to the one that our blocks share")


def _misfit(model: MDT | DiT, layout: Layout) -> str | None:
    config = model.config
    if model.grid[0] != model.grid[1]:
        return "its latent is not square"
    if layout in ("dit", "diffusers_dit"):
        if not isinstance(model, DiT):
            return ("it has learnable positions and relative biases; convert to "
                    + ("mdt_v2" if config.long_skips else "mdt_v1"))
        computed = layers.sincos_positions(config.hidden_size, model.grid)
        if layout == "diffusers_dit" and not (config.num_classes and config.class_dropout_prob and config.mlp_ratio == 4):
            return "diffusers' has classes, a null label and an MLP of 4 times the width"
        if layout == "diffusers_dit" and not torch.allclose(model.pos_embed.cpu(), computed, atol=1e-5):
            return "its positions are not the sine-cosine table that diffusers computes"
        return None
    if not isinstance(model, MDT) or config.long_skips != (layout == "mdt_v2"):
        return f"that is the naming of {'MDTv2' if layout == 'mdt_v2' else 'MDT v1'}; convert to " + (
            "mdt_v1" if layout == "mdt_v2" else "mdt_v2")
    if config.decode_layer == 0:
        return "the published code needs a decoder (decode_layer >= 1)"
    plain = {"masking": "asymmetric", "masked_shortcut": True, "decoder_positions": True, "learnable_positions": True,
             "relative_position_bias": True, "num_side_blocks": 1}
    changed = [name for name, value in plain.items() if getattr(config, name) != value]
    return f"the published code has no option for {', '.join(changed)}" if changed else None


def _count(state_dict: StateDict, group: str) -> int:
    numbers = {int(m.group(1)) for name in state_dict if (m := re.match(rf"{group}\.(\d+)\.", name))}
    if numbers != set(range(len(numbers))):
        raise ValueError(f"state_dict: {group} has the numbers {sorted(numbers)}: must run from 0 without a gap")
    return len(numbers)


def _square(length: int, name: str) -> int:
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"{name} has {length} tokens: not a square; name input_size")
    return side
