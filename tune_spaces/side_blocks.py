"""Blocks of the side-interpolator (paper Table 5f).

    mdt-ray tune imagenet256-s-2 --space side_blocks --train.num-steps 600000 \
        --evaluate.reference VIRTUAL_imagenet256_labeled.npz
"""

metric = "fid"

_FIDS = {1: 50.26, 2: 51.77, 3: 51.96}

paper = {"column": "FID-50K of MDT-S/2 after 600k steps (Table 5f)",
         "rows": [({"model.num_side_blocks": value}, fid) for value, fid in _FIDS.items()]}


def space() -> dict[str, list]:
    """One to three."""
    return {"model.num_side_blocks": list(_FIDS)}
