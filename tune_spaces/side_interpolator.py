"""With and without the side-interpolator (paper Table 5b).

    mdt-ray tune imagenet256-s-2 --space side_interpolator --train.num-steps 600000 \
        --evaluate.reference VIRTUAL_imagenet256_labeled.npz
"""

metric = "fid"

_FIDS = {0: 51.6, 1: 50.26}

paper = {"column": "FID-50K of MDT-S/2 after 600k steps (Table 5b)",
         "rows": [({"model.num_side_blocks": value}, fid) for value, fid in _FIDS.items()]}


def space() -> dict[str, list]:
    """None, or one block."""
    return {"model.num_side_blocks": list(_FIDS)}
