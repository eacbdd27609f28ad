"""Mask ratio x decoder depth: the two choices of the paper's Tables 3 and 4, on a small grid.

    mdt-ray tune digits --space mask_ratio_decoder_depth
"""

metric = "fid"


def space() -> dict[str, list]:
    """Around the paper's best: mask ratio 0.3 (Table 3), decoder of the last 2 blocks (Table 4)."""
    return {"loss.mask_ratio": [0.3, 0.6], "model.decode_layer": [1, 2]}
