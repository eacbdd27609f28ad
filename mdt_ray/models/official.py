"""Published checkpoints (the authors' MDT v1, and DiT) into our models. Not a downloader: it takes a state dict."""

from typing import Any

import torch

from mdt_ray.models.dit import DiT
from mdt_ray.models.mdt import MDT


def load(state_dict: dict[str, torch.Tensor], config: dict[str, Any]) -> MDT | DiT:
    """Build the model that a published state dict belongs to, told apart by its keys, and load every tensor of it.

    Args:
        state_dict: tensors under the published names.
        config: `input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes, class_dropout_prob`, and
            `decode_layer` where it is not 2.
    Raises ValueError for an unknown layout, or for missing, unexpected or misshapen tensors.
    """
    config = {key: value for key, value in config.items() if value is not None}
    if "decoder_pos_embed" in state_dict and "blocks.0.attn.qkv.weight" in state_dict:
        model = MDT(**config)
        state_dict = _translate_mdt_v1(state_dict, model)
    elif "decoder_pos_embed" not in state_dict and "blocks.0.attn.qkv.weight" in state_dict:
        config.pop("decode_layer", None)
        model = DiT(**config)
    else:
        raise ValueError("state_dict: neither the published MDT v1 layout (blocks.*, decoder_pos_embed) nor DiT's "
                         f"(blocks.*); its first keys are {sorted(state_dict)[:5]}")
    _load_strictly(model, state_dict)
    return model.eval()


def _translate_mdt_v1(state_dict: dict[str, torch.Tensor], model: MDT) -> dict[str, torch.Tensor]:
    """Our names and shapes. The published tables end in 3 rows that nothing indexes (a class token's, in BEiT), and each
    block carries the index that all of ours share."""
    num_rows = (2 * (model.config.input_size // model.config.patch_size) - 1) ** 2
    translated = {}
    for name, tensor in state_dict.items():
        if name.endswith(".rel_pos_bias.relative_position_index"):
            if not torch.equal(tensor.cpu(), model.relative_position_index):
                raise ValueError(f"state_dict[{name!r}]: not the relative positions of a "
                                 f"{model.config.input_size}-wide latent; check input_size and patch_size")
            continue
        if name.endswith(".rel_pos_bias.relative_position_bias_table"):
            name, tensor = name.replace(".rel_pos_bias.", "."), tensor[:num_rows]
        translated[name] = tensor
    return translated


def _load_strictly(model: torch.nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    try:
        model.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        raise ValueError(f"state_dict does not fit the config: {error}") from error
