"""train and tune on a real Ray: what they write, what they refuse, what they leave out."""


import pytest

from mdt_ray import checkpoints, config_io, presets, storage
from mdt_ray.config import TrainConfig, WorkersConfig
from mdt_ray.data import latents
from mdt_ray.jobs.train import train
from mdt_ray.jobs.tune import grid, load_space, tune
from tests.helpers import make_latents, tiny_training

pytestmark = pytest.mark.ray


# train


@pytest.mark.slow
def test_workers_agree_whatever_their_number(tmp_path, ray_session):
    """1 worker, and 3 that own 4 of 12 lanes each: same images, same losses to 1e-5 in float32."""
    make_latents(tmp_path / "latents", num_images=130)
    rows = []
    for count in (1, 3):
        config = tiny_training(tmp_path / "latents", tmp_path / str(count), num_steps=10,
                               workers=WorkersConfig(num_workers=count, cpus_per_worker=0.5))
        uri = train(config)
        rows.append(checkpoints.read_metrics(storage.join(uri, "metrics.parquet")))
    for one, three in zip(*rows, strict=True):
        assert one["loss_full"] == pytest.approx(three["loss_full"], rel=1e-5)
        assert one["loss_masked"] == pytest.approx(three["loss_masked"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(three["grad_norm"], rel=1e-4)


def test_an_error_in_a_worker_reaches_the_caller_as_itself(tmp_path, ray_session):
    manifest = make_latents(tmp_path / "latents")
    path = tmp_path / "latents" / manifest.files[0].name
    data = path.read_bytes()
    path.write_bytes(b"\0" * (len(data) // 2) + data[len(data) // 2:])  # its index is whole: only a worker finds out
    config = tiny_training(tmp_path / "latents", tmp_path / "out")
    with pytest.raises(ValueError, match=r"chunk-00000.parquet: row group \d is not readable"):
        train(config)
    assert not (tmp_path / "out" / "lock.json").exists()


# tune


def test_every_key_of_every_space_is_a_setting():
    for name in ("mask_ratio_decoder_depth",):
        space = load_space(name)
        assert space.mode in ("min", "max")
        for point in grid(space.space()):
            changed = config_io.override(presets.digits().tune.train, point)
            assert isinstance(changed, TrainConfig)
            assert config_io.identity_fields(changed) != {}


def test_bad_spaces_are_refused_before_anything_starts(tmp_path):
    make_latents(tmp_path / "latents")
    config = config_io.override(presets.digits().tune, {"output": str(tmp_path / "out"),
                                                        "train.latents": str(tmp_path / "latents")})

    def with_space(text: str):
        (tmp_path / "space.py").write_text(f"metric, mode = 'fid', 'min'\ndef space():\n    return {text}\n")
        return config_io.override(config, {"space": str(tmp_path / "space.py")})

    with pytest.raises(ValueError, match=r"unknown setting 'loss.mask_ration'; did you mean 'mask_ratio'"):
        tune(with_space("{'loss.mask_ration': [0.3]}"))
    with pytest.raises(ValueError, match=r"space\['loss.mask_ratio'\] = \[\]: must be a list of at least one value"):
        tune(with_space("{'loss.mask_ratio': []}"))
    with pytest.raises(ValueError, match=r"loss.mask_ratio = 1.5"):
        tune(with_space("{'loss.mask_ratio': [0.3, 1.5]}"))
    with pytest.raises(ValueError, match="no such file"):
        tune(config_io.override(config, {"space": str(tmp_path / "none.py")}))
    with pytest.raises(ValueError, match="a trial is one process"):
        tune(config_io.override(config, {"train.workers.num_workers": 2}))
    assert not (tmp_path / "out").exists()


def test_latents_round_trip_through_the_manifest(tmp_path):
    manifest = make_latents(tmp_path)
    assert latents.open_manifest(str(tmp_path)) == manifest
