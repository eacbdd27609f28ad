"""The position embedding before the side-interpolator (paper Table 5g).

    mdt-ray tune imagenet256-s-2 --space decoder_positions --train.num-steps 600000 \
        --evaluate.reference VIRTUAL_imagenet256_labeled.npz
"""

metric = "fid"

_FIDS = {False: 51.58, True: 50.26}

paper = {"column": "FID-50K of MDT-S/2 after 600k steps (Table 5g)",
         "rows": [({"model.decoder_positions": value}, fid) for value, fid in _FIDS.items()]}


def space() -> dict[str, list]:
    """Without and with it."""
    return {"model.decoder_positions": list(_FIDS)}
