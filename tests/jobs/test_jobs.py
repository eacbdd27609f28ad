"""The jobs on a real Ray: what they write, what they refuse, what they leave out."""

import io
import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mdt_ray import checkpoints, config_io, presets, storage
from mdt_ray.config import PrecomputeConfig, TrainConfig, VaeConfig, WorkersConfig
from mdt_ray.data import images, latents
from mdt_ray.data.vae import load_vae
from mdt_ray.jobs.precompute import Encoder, Reader, precompute
from mdt_ray.jobs.train import train
from mdt_ray.jobs.tune import grid, load_space, tune
from tests.helpers import make_latents, tiny_training

pytestmark = pytest.mark.ray


def png(size: tuple[int, int] = (40, 32), mode: str = "RGB", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "png")
    return buffer.getvalue()


def write_images(path, rows: list[tuple[bytes, int]], metadata: dict | None = None, named: bool = True) -> None:
    table = pa.table({
        "image": pa.array([{"bytes": data, "path": f"{path.stem}-{i}.png" if named else None}
                           for i, (data, _) in enumerate(rows)], pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "label": pa.array([label for _, label in rows], pa.int64())})
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=3)


def encoding(source, output, **changes) -> PrecomputeConfig:
    return config_io.override(PrecomputeConfig(), {
        "source": str(source), "output": str(output), "vae.path": "digits", "image_size": 32, "chunk_size": 4,
        "encode_batch_size": 4, "validation_share": 0.2} | changes)


# precompute


def test_precompute_writes_every_image_once(tmp_path, ray_session):
    (tmp_path / "source").mkdir()
    for name, count in (("a", 7), ("b", 5)):
        write_images(tmp_path / "source" / f"{name}.parquet", [(png(seed=i), i % 3) for i in range(count)])
    manifest = precompute(encoding(tmp_path / "source", tmp_path / "out", flip=True))
    assert (manifest.num_rows, manifest.num_classes, manifest.shape) == (12, 3, [4, 4, 4])
    assert manifest.class_counts == [5, 4, 3]
    assert [f.num_rows for f in manifest.files] == [4, 3, 4, 1]  # chunks do not span files
    rows = pa.concat_tables([pq.read_table(tmp_path / "out" / f.name) for f in manifest.files]).to_pylist()
    assert [r["id"] for r in rows] == [f"a-{i}.png" for i in range(7)] + [f"b-{i}.png" for i in range(5)]
    # The stored moments are the VAE's, of the image and of its mirror image.
    vae, pixels = load_vae(VaeConfig(path="digits")), images.center_crop(images.decode_image(png(seed=4)), 32)
    for column, picture in (("moments", pixels), ("moments_flip", pixels[:, ::-1])):
        expected = vae.encode(torch.from_numpy(images.to_unit_range(picture[None])))[0].numpy()
        found = np.frombuffer(rows[4][column], np.float16).reshape(2, 4, 4, 4)
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_bad_images_are_listed_and_the_job_goes_on(tmp_path, ray_session):
    good = png()
    write_images(tmp_path / "s.parquet", [(good, 0), (b"", 1), (good[:60], 0), (good, 1), (b"not an image", 2)])
    manifest = precompute(encoding(tmp_path / "s.parquet", tmp_path / "out"))
    assert manifest.num_rows == 2
    assert [r["id"] for r in manifest.rejected] == ["s-1.png", "s-2.png", "s-4.png"]
    assert "not a readable image" in manifest.rejected[0]["reason"]


@pytest.mark.parametrize(("label", "names", "message"), [
    (-1, None, r"image 's-1.png' has label -1: must be at least 0"),
    (None, None, r"image 's-1.png' has label None"),
    (2, ["cat", "dog"], r"image 's-1.png' has label 2: must be below the source's number of classes, 2"),
])
def test_a_label_outside_the_classes_is_refused(tmp_path, label, names, message):
    write_images(tmp_path / "s.parquet", [(png(), 0), (png(), label)])
    file = images.list_source(str(tmp_path / "s.parquet"))[0]
    with pytest.raises(ValueError, match=message):
        Reader(32, len(names) if names else None)({"chunk": 0, "file": json.dumps(asdict(file)), "start": 0, "stop": 2})


def test_a_finished_precompute_does_nothing_and_a_damaged_file_is_rebuilt(tmp_path, ray_session):
    write_images(tmp_path / "s.parquet", [(png(seed=i), i % 2) for i in range(12)])
    config = encoding(tmp_path / "s.parquet", tmp_path / "out")
    first = precompute(config)
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")}
    assert precompute(config) == first
    path = tmp_path / "out" / first.files[1].name
    path.write_bytes(path.read_bytes()[:100])
    assert precompute(config) == first
    changed = [p.name for p in (tmp_path / "out").glob("*.parquet") if times[p.name] != p.stat().st_mtime_ns]
    assert changed == [path.name]


def test_a_changed_source_or_setting_is_refused(tmp_path, ray_session):
    write_images(tmp_path / "s.parquet", [(png(), 0)] * 3)
    precompute(encoding(tmp_path / "s.parquet", tmp_path / "out"))
    with pytest.raises(ValueError, match=r"validation_share: 0.2 -> 0.3"):
        precompute(encoding(tmp_path / "s.parquet", tmp_path / "out", validation_share=0.3))
    write_images(tmp_path / "s.parquet", [(png(), 0)] * 4)
    with pytest.raises(ValueError, match=r"inputs.source: '\w+' -> '\w+'"):
        precompute(encoding(tmp_path / "s.parquet", tmp_path / "out"))


def test_names_of_classes_come_from_the_source(tmp_path):
    description = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    write_images(tmp_path / "s.parquet", [(png(), 0)], {"huggingface": json.dumps(description)})
    assert images.class_names(str(tmp_path / "s.parquet")) == ["cat", "dog"]
    write_images(tmp_path / "t.parquet", [(png(), 0)])
    assert images.class_names(str(tmp_path / "t.parquet")) is None


def test_images_without_a_path_are_named_by_file_and_row(tmp_path):
    write_images(tmp_path / "s.parquet", [(png(), 0)] * 5, named=False)
    file = images.list_source(str(tmp_path / "s.parquet"))[0]
    assert [i.id for i in images.read_images(file, 2, 5)] == ["s.parquet#2", "s.parquet#3", "s.parquet#4"]


def test_the_last_batch_does_not_change_an_image(tmp_path):
    """An encoder fills its last batch, so that an image's latents do not depend on how many follow it."""
    (tmp_path / "out").mkdir()
    found = []
    for count in (6, 5):
        write_images(tmp_path / f"{count}.parquet", [(png(seed=i), 0) for i in range(count)])
        config = encoding(tmp_path / f"{count}.parquet", tmp_path / "out" / str(count), chunk_size=6)
        file = images.list_source(config.source)[0]
        item = {"chunk": 0, "file": json.dumps(asdict(file)), "start": 0, "stop": count}
        Encoder(config_io.to_dict(config))(Reader(32)(item))
        found.append(pq.read_table(tmp_path / "out" / str(count) / "chunk-00000.parquet").column("moments").to_pylist())
    assert found[0][:5] == found[1]


@pytest.mark.parametrize("size", [(32, 32), (33, 70), (100, 64), (31, 500), (640, 480), (17, 16)])
def test_center_crop_is_adms(size):
    """An independent oracle in numpy terms: box halvings, bicubic to the short side, cut the centre."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    found, expected = images.center_crop(image, 32), image
    while min(*expected.size) >= 64:
        expected = expected.resize(tuple(x // 2 for x in expected.size), Image.BOX)
    scale = 32 / min(*expected.size)
    pixels = np.array(expected.resize(tuple(round(x * scale) for x in expected.size), Image.BICUBIC))
    y, x = (pixels.shape[0] - 32) // 2, (pixels.shape[1] - 32) // 2
    assert np.array_equal(found, pixels[y:y + 32, x:x + 32])
    assert found.shape == (32, 32, 3)


def test_a_missing_vae_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"vae.path = '.*none': no AutoencoderKL there"):
        load_vae(VaeConfig(path=str(tmp_path / "none")))


# train


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
    path.write_bytes(b"\0" * path.stat().st_size)
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
