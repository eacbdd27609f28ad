"""A sweep's lines on the terminal."""

from mdt_ray.tuning.lines import file_name, header, line, named

POINT = {"loss.mask_ratio": 0.3, "model.decode_layer": 2}


def test_a_table_has_aligned_columns():
    keys, metric = list(POINT), "fid_digits_300"
    ended = {"status": "finished", "point": POINT, "seed": 1, "metrics": {metric: 12.345678}, "curve": [{"loss": 0.75}],
             "seconds": 41.3}
    assert header(keys, metric) == "mask_ratio  decode_layer  seed  fid_digits_300        loss     seconds"
    assert line(ended, keys, metric) == "       0.3             2     1           12.35      0.7500          41"
    failed = {"status": "failed", "point": {"optim.lr": 1e30}, "seed": 0, "reason": "TrainingDiverged: gone"}
    assert line(failed, keys, metric) == "         -             -     0  failed: TrainingDiverged: gone"


def test_points_have_names():
    assert named(POINT) == "mask_ratio 0.3, decode_layer 2"
    assert file_name(POINT) == "mask_ratio-0.3_decode_layer-2_"
    assert file_name({"train.name": "../a b"}) == "name-..-a-b_", "no path leaves the folder"
