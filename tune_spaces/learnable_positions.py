"""Learnable position embeddings (paper Table 5h).

    mdt-ray tune imagenet256-s-2 --space learnable_positions --train.num-steps 600000 \
        --evaluate.reference VIRTUAL_imagenet256_labeled.npz
"""

metric = "fid"

_FIDS = {False: 50.8, True: 50.26}

paper = {"column": "FID-50K of MDT-S/2 after 600k steps (Table 5h)",
         "rows": [({"model.learnable_positions": value}, fid) for value, fid in _FIDS.items()]}


def space() -> dict[str, list]:
    """Fixed or trained."""
    return {"model.learnable_positions": list(_FIDS)}
