"""Start a model from another one's weights: other classes, another resolution, a DiT into an MDT.

What fits is taken, what depends on the grid is interpolated, the rest is new. Where a part has no counterpart, its start
leaves the function unchanged: an MDT begun from a DiT computes, in its full pass, what the DiT did.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from mdt_ray.models.dit import DiT
from mdt_ray.models.layers import Grid
from mdt_ray.models.mdt import MDT

ALIKE = ("hidden_size", "depth", "num_heads", "mlp_ratio")
"""What two models must share."""
MOVING = ("decode_layer", "decoder_positions")
"""What an MDT may change against the MDT that it starts from, but not without changing what it computes."""
FIXED_OR_LEARNED = ("pos_embed", "decoder_pos_embed")
BIAS_TABLE = "relative_position_bias_table"
LABEL_TABLE = "y_embedder.embedding_table.weight"


@dataclass
class Transfer:
    """Names of our model's tensors by what became of them; all but the first are lists of `name: reason`."""

    taken: list[str] = field(default_factory=list)
    interpolated: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    """Settings that make the same weights compute something else."""

    def lines(self) -> list[str]:
        """For people: a count of what was taken, and every exception, block numbers joined."""
        joined = [line for kind in ("interpolated", "new", "left", "changed") for line in _join(kind, getattr(self, kind))]
        return [f"{len(self.taken)} tensors taken as they are", *joined]


@torch.no_grad()
def transfer(target: MDT | DiT, source: MDT | DiT) -> Transfer:
    """Copy the weights of `source` into a fresh `target`, in place.

    Raises ValueError if the two differ in width, depth, heads or MLP ratio.
    """
    for name in ALIKE:
        ours, theirs = getattr(target.config, name), getattr(source.config, name)
        if ours != theirs:
            raise ValueError(f"model.{name} = {ours}: the checkpoint to start from has {theirs}")
    done, given = Transfer(), dict(source.state_dict())
    learnable, learned = ({name for name, _ in model.named_parameters()} for model in (target, source))
    if isinstance(source, MDT):
        for name in MOVING:
            ours, theirs = getattr(target.config, name, None), getattr(source.config, name)
            if ours != theirs:
                done.changed.append(f"{name}: {ours} for {theirs}")
    for name, ours in target.state_dict().items():
        theirs = given.pop(name, None)
        if theirs is None:
            done.new.append(f"{name}: {_start(target, name, ours)}")
        elif name in FIXED_OR_LEARNED and name not in learnable and (name in learned or source.grid != target.grid):
            done.new.append(f"{name}: the sine-cosine table of {target.grid} tokens")
        elif name in FIXED_OR_LEARNED and source.grid != target.grid:
            ours.copy_(_resize_positions(theirs, source.grid, target.grid))
            done.interpolated.append(f"{name}: {source.grid} -> {target.grid} tokens")
        elif name.endswith(BIAS_TABLE) and source.grid != target.grid:
            ours.copy_(_resize_bias(theirs, source.grid, target.grid))
            done.interpolated.append(f"{name}: {source.grid} -> {target.grid} tokens")
        elif name == LABEL_TABLE and (source.config.num_classes != target.config.num_classes or ours.shape != theirs.shape):
            done.new.append(f"{name}: {_take_labels(target, source, ours, theirs)}")
        elif theirs.shape != ours.shape:
            done.new.append(f"{name}: shape {tuple(ours.shape)} for {tuple(theirs.shape)}")
        else:
            ours.copy_(theirs)
            done.taken.append(name)
    done.left += [f"{name}: no place for it" for name in given]
    return done


def _start(target: MDT | DiT, name: str, ours: torch.Tensor) -> str:
    """Set a tensor without a counterpart so that it changes nothing, where that can be."""
    if name.endswith(BIAS_TABLE) and not name.startswith("sideblocks."):
        ours.zero_()
        return "starts at 0"
    if name == "decoder_pos_embed":
        ours.zero_()
        return "starts at 0"
    if name.endswith("skip_linear.weight"):
        width = target.config.hidden_size
        ours.copy_(torch.eye(width, 2 * width))
        return "starts by passing its block's input on"
    if name.endswith("skip_linear.bias"):
        ours.zero_()
        return "starts at 0"
    return "initialised"


def _take_labels(target: MDT | DiT, source: MDT | DiT, ours: torch.Tensor, theirs: torch.Tensor) -> str:
    """Rows of the label table: of the classes if these are as many, and of the null label if both have one."""
    num_ours, num_theirs = target.config.num_classes, source.config.num_classes
    text = f"{num_ours} classes for {num_theirs}"
    if num_ours == num_theirs:
        ours[:num_ours].copy_(theirs[:num_ours])
        text = "the classes taken, the null label new"
    elif target.config.class_dropout_prob and source.config.class_dropout_prob:
        ours[-1].copy_(theirs[-1])
        text += ", the null label taken"
    return text


def _resize_positions(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    """(1, L, D) of one grid to (1, L', D) of another, bicubic."""
    image = table.float().reshape(1, *old, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    return F.interpolate(image, new, mode="bicubic").permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1)


def _resize_bias(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    """((2r-1)(2c-1), H) to the table of another grid, bilinear: offsets are stretched, the farthest stay the farthest."""
    image = table.float().T.reshape(1, -1, 2 * old[0] - 1, 2 * old[1] - 1)  # (1, H, 2r-1, 2c-1)
    size = (2 * new[0] - 1, 2 * new[1] - 1)
    return F.interpolate(image, size, mode="bilinear", align_corners=True).flatten(2)[0].T


def _join(kind: str, entries: list[str]) -> list[str]:
    """One line for all blocks: `new: blocks.*.attn.bias (x12): starts at 0`."""
    grouped: dict[str, int] = {}
    for entry in entries:
        parts = entry.split(".")
        key = ".".join("*" if part.isdigit() else part for part in parts[:3]) + entry[len(".".join(parts[:3])):]
        grouped[key] = grouped.get(key, 0) + 1
    return [f"{kind}: {key}" + (f" (x{count})" if count > 1 else "") for key, count in grouped.items()]
