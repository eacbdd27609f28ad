"""The relative position bias of attention (paper Table 5i).

    mdt-ray tune imagenet256-s-2 --space relative_bias --train.num-steps 600000 \
        --evaluate.reference VIRTUAL_imagenet256_labeled.npz
"""

metric = "fid"

_FIDS = {False: 53.56, True: 50.26}

paper = {"column": "FID-50K of MDT-S/2 after 600k steps (Table 5i)",
         "rows": [({"model.relative_position_bias": value}, fid) for value, fid in _FIDS.items()]}


def space() -> dict[str, list]:
    """Without and with it."""
    return {"model.relative_position_bias": list(_FIDS)}
