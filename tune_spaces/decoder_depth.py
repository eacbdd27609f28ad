"""Blocks after the side-interpolator, which form the decoder (paper Table 4, "decoder position").

    mdt-ray tune imagenet256-s-2 --space decoder_depth --train.num-steps 600000 \
        --evaluate.reference VIRTUAL_imagenet256_labeled.npz
"""

metric = "fid"

_FIDS = {0: 51.05, 1: 50.96, 2: 50.26, 4: 51.67, 6: 52.64}

paper = {"column": "FID-50K of MDT-S/2 after 600k steps (Table 4)",
         "rows": [({"model.decode_layer": depth}, fid) for depth, fid in _FIDS.items()]}


def space() -> dict[str, list]:
    """The paper's five; of 12 blocks there, so that the model needs six at least."""
    return {"model.decode_layer": list(_FIDS)}
