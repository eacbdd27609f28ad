"""MDT against DiT of the same size (paper Table 2, Fig. 1).

    mdt-ray tune imagenet256-s-2 --space mdt_against_dit --train.num-steps 400000 \
        --evaluate.reference VIRTUAL_imagenet256_labeled.npz --num-seeds 3

At equal steps; with --equal flops at equal cost. With --train.keep-every-steps every so many steps are judged too: how fast
each of them gets there.
"""

metric = "fid"

_FIDS = {"mdt_v1": 53.46, "dit": 68.40}

paper = {"column": "FID-50K of S/2 after 400k steps (Table 2)",
         "rows": [({"model.kind": kind}, fid) for kind, fid in _FIDS.items()]}


def space() -> dict[str, list]:
    """The paper's model and its baseline."""
    return {"model.kind": list(_FIDS)}
