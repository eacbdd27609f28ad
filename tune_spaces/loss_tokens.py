"""Which tokens count in the loss of the masked pass (paper Table 5e).

    mdt-ray tune imagenet256-s-2 --space loss_tokens --train.num-steps 600000 \
        --evaluate.reference VIRTUAL_imagenet256_labeled.npz
"""

metric = "fid"

_FIDS = {"all": 50.26, "masked": 58.35}

paper = {"column": "FID-50K of MDT-S/2 after 600k steps (Table 5e)",
         "rows": [({"loss.tokens": value}, fid) for value, fid in _FIDS.items()]}


def space() -> dict[str, list]:
    """All, or the hidden ones alone."""
    return {"loss.tokens": list(_FIDS)}
