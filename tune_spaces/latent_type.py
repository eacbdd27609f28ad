"""Passes of a training step: over all tokens, over the kept ones, or both (paper Table 5d, "under aligned cost").

    mdt-ray tune imagenet256-s-2 --space latent_type --train.num-steps 600000 \
        --evaluate.reference VIRTUAL_imagenet256_labeled.npz

One pass alone is given more steps, as many as cost the same.
"""

metric = "fid"

_FIDS = {"full+masked": 50.26, "full": 52.30, "masked": 76.63}

defaults = {"equal": "flops"}
paper = {"column": "FID-50K of MDT-S/2 after 600k steps (Table 5d)",
         "rows": [({"loss.passes": passes}, fid) for passes, fid in _FIDS.items()]}


def space() -> dict[str, list]:
    """Both passes, or one."""
    return {"loss.passes": list(_FIDS)}
