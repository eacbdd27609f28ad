"""Asymmetric or symmetric masking: whether the encoder sees the kept tokens only (paper Table 5a).

    mdt-ray tune imagenet256-s-2 --space masking --train.num-steps 600000 \
        --evaluate.reference VIRTUAL_imagenet256_labeled.npz
"""

metric = "fid"

_FIDS = {"symmetric": 51.56, "asymmetric": 50.26}

paper = {"column": "FID-50K of MDT-S/2 after 600k steps (Table 5a)",
         "rows": [({"model.masking": value}, fid) for value, fid in _FIDS.items()]}


def space() -> dict[str, list]:
    """The encoder sees the kept tokens, or all with mask tokens in the hidden places."""
    return {"model.masking": list(_FIDS)}
