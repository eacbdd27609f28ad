"""Guidance x sampling steps of one training, which all trials share.

    mdt-ray tune imagenet256-s-2 --space sampling --train.num-steps 400000 \
        --evaluate.reference VIRTUAL_imagenet256_labeled.npz

Of a checkpoint that is there, `mdt-ray evaluate sweep` tries more of them in one job.
"""

metric = "fid"


def space() -> dict[str, list]:
    """Without guidance and with; few steps and many."""
    return {"evaluate.sampling.cfg_scale": [1.0, 1.5, 2.5], "evaluate.sampling.num_sampling_steps": [25, 100]}
