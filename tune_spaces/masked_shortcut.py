"""The masked shortcut: whether kept tokens pass the side-interpolator unchanged (paper Table 5c).

    mdt-ray tune imagenet256-s-2 --space masked_shortcut --train.num-steps 600000 \
        --evaluate.reference VIRTUAL_imagenet256_labeled.npz
"""

metric = "fid"

_FIDS = {False: 50.91, True: 50.26}

paper = {"column": "FID-50K of MDT-S/2 after 600k steps (Table 5c)",
         "rows": [({"model.masked_shortcut": value}, fid) for value, fid in _FIDS.items()]}


def space() -> dict[str, list]:
    """Without and with it."""
    return {"model.masked_shortcut": list(_FIDS)}
