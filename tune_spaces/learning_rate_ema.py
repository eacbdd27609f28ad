"""Learning rate x decay of the averaged weights, around the paper's 3e-4 and 0.9999.

    mdt-ray tune imagenet256-s-2 --space learning_rate_ema --train.num-steps 400000 \
        --evaluate.reference VIRTUAL_imagenet256_labeled.npz
"""

metric = "fid"


def space() -> dict[str, list]:
    """Short runs want faster averages than long ones."""
    return {"optim.lr": [1e-4, 3e-4, 1e-3], "ema.decay": [0.999, 0.9999]}
