"""Mask ratio of the masked pass (paper Table 3).

    mdt-ray tune imagenet256-s-2 --space mask_ratio --train.num-steps 600000 \
        --evaluate.reference VIRTUAL_imagenet256_labeled.npz
"""

metric = "fid"

_FIDS = {0.1: 51.60, 0.2: 51.44, 0.3: 50.26, 0.4: 50.88, 0.5: 51.57, 0.6: 53.20, 0.7: 52.90, 0.8: 53.73}

paper = {"column": "FID-50K of MDT-S/2 after 600k steps (Table 3)",
         "rows": [({"loss.mask_ratio": ratio}, fid) for ratio, fid in _FIDS.items()]}


def space() -> dict[str, list]:
    """The paper's eight."""
    return {"loss.mask_ratio": list(_FIDS)}
