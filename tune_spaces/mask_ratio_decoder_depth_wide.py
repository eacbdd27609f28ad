"""Mask ratio x decoder depth over most of the range of the paper's Tables 3 and 4.

    mdt-ray tune fashion --space mask_ratio_decoder_depth_wide
"""

metric = "fid"


def space() -> dict[str, list]:
    """Four ratios, three depths."""
    return {"loss.mask_ratio": [0.15, 0.3, 0.5, 0.7], "model.decode_layer": [1, 2, 4]}
