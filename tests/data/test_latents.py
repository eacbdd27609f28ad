"""Latents on disk and the batches read from them."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mdt_ray import storage
from mdt_ray.data import latents
from mdt_ray.data.latent_reader import LatentReader
from mdt_ray.data.loader import Loader, LoaderConfig
from tests.helpers import make_latents

CONFIG = LoaderConfig(batch_size=24, num_lanes=12, seed=0, num_classes=10, class_dropout_prob=0.5, num_tokens=16)


@pytest.fixture
def folder(tmp_path):
    make_latents(tmp_path, num_images=130, num_files=3)
    return tmp_path


def loader(folder, rank=0, world_size=1, config=CONFIG) -> Loader:
    return Loader(str(folder), latents.open_manifest(str(folder)), config, rank, world_size)


def lanes(batch, rank, world_size, num_lanes=12) -> dict[int, dict[str, torch.Tensor]]:
    """A rank's batch cut into its lanes."""
    owned = range(rank, num_lanes, world_size)
    names = ("images", "x_0", "t", "eps_full", "eps_masked", "y_full", "y_masked", "mask_noise")
    return {lane: {n: getattr(batch, n).chunk(len(owned))[i] for n in names} for i, lane in enumerate(owned)}


# Format


def test_plain_pyarrow_reads_the_format(folder):
    table = pq.read_table(folder / "chunk-00000.parquet")
    assert table.schema.names == ["id", "label", "split", "moments"]
    assert (table.schema.field("label").type, table.schema.field("moments").type) == (pa.int32(), pa.binary())
    row = np.frombuffer(table.column("moments")[0].as_py(), np.float16).reshape(2, 4, 4, 4)
    ours = latents.read_group(str(folder), latents.open_manifest(str(folder)).files[0], 0, [4, 4, 4], flip=False)
    assert np.array_equal(row, ours["moments"][0])


def test_row_groups_and_no_compression(folder):
    metadata = pq.read_metadata(folder / "chunk-00000.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [16, 16, 12]
    column = metadata.row_group(0).column(3)
    assert (column.compression, column.has_dictionary_page) == ("UNCOMPRESSED", False)


def test_the_same_rows_give_the_same_bytes(tmp_path):
    for name in "ab":
        make_latents(tmp_path / name)
    a, b = (latents.open_manifest(str(tmp_path / name)) for name in "ab")
    assert [f.sha256 for f in a.files] == [f.sha256 for f in b.files]
    assert a.content == b.content


def test_the_split_is_a_fixed_share_of_ids():
    ids = [f"n{i}" for i in range(20_000)]
    held_out = [i for i in ids if latents.split_of(i, 0.05) == "validation"]
    assert 0.04 < len(held_out) / len(ids) < 0.06
    assert set(held_out) <= {i for i in ids if latents.split_of(i, 0.1) == "validation"}


# Reading


def test_validation_rows_are_never_trained_on(folder):
    manifest = latents.open_manifest(str(folder))
    assert 0 < manifest.num_train < manifest.num_rows == 130
    reader = LatentReader(str(folder), manifest, max_groups=3)
    moments, labels = reader.read(np.arange(manifest.num_train))
    rows = pa.concat_tables([pq.read_table(folder / f.name) for f in manifest.files])
    train = rows.filter(pa.compute.equal(rows.column("split"), "train"))
    assert np.array_equal(labels, train.column("label").to_numpy())
    expected = np.stack([np.frombuffer(b.as_py(), np.float16).reshape(2, 4, 4, 4) for b in train.column("moments")])
    assert np.array_equal(moments, expected)
    assert len(reader._held) <= 3


@pytest.mark.parametrize("world_size", [2, 3, 4, 12])
def test_lanes_do_not_depend_on_the_number_of_ranks(folder, world_size):
    for step in (0, 7):
        alone = lanes(loader(folder).batch(step), 0, 1)
        shared = {}
        for rank in range(world_size):
            shared |= lanes(loader(folder, rank, world_size).batch(step), rank, world_size)
        assert alone.keys() == shared.keys()
        for lane in alone:
            assert all(torch.equal(alone[lane][name], shared[lane][name]) for name in alone[lane])


def test_lanes_and_streams_share_no_noise(folder):
    batch = loader(folder).batch(0)
    draws = torch.cat([batch.eps_full, batch.eps_masked]).flatten(1)
    assert len(torch.unique(draws, dim=0)) == 48
    assert not torch.equal(batch.y_full, batch.y_masked)
    assert (batch.y_full == 10).any()


def test_an_attempt_draws_afresh_but_reads_the_same_images(folder):
    first, second = (loader(folder).batch(3, attempt) for attempt in (0, 1))
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.eps_full, second.eps_full)
    assert not torch.equal(first.t, second.t)


def test_every_image_once_an_epoch_across_batches(folder):
    reader = loader(folder)
    count = reader.order.num_images
    images = torch.cat([reader.batch(step).images for step in range(-(-2 * count // 24))])
    assert sorted(images[:count].tolist()) == list(range(count))
    assert sorted(images[count:2 * count].tolist()) == list(range(count))


def test_batches_read_ahead_are_the_same_batches(folder):
    with loader(folder) as reader:
        ahead = reader.batches(5)
        for step in range(5, 9):
            (batch,), expected = next(ahead), reader.batch(step)
            assert batch.step == step
            assert torch.equal(batch.x_0, expected.x_0)


def test_x_0_is_a_scaled_draw_from_the_posterior(folder):
    reader = loader(folder)
    reader.scale, reader.shift = 2.0, 0.5
    batch = reader.batch(0)
    moments, _ = reader.reader.read(batch.images.numpy())
    z = (batch.x_0 / 2.0 + 0.5 - torch.from_numpy(moments[:, 0]).float()) / torch.from_numpy(moments[:, 1]).float()
    assert abs(z.mean().item()) < 0.1
    assert abs(z.std().item() - 1) < 0.1


# Bad input


def test_missing_and_truncated_files_are_named(folder):
    path = folder / "chunk-00001.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"chunk-00001.parquet: \d+ bytes, must be \d+ .*mdt-ray precompute"):
        latents.open_manifest(str(folder))
    path.unlink()
    with pytest.raises(ValueError, match=r"chunk-00001.parquet: missing"):
        latents.open_manifest(str(folder))
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest.json"):
        latents.open_manifest(str(folder))


@pytest.mark.parametrize(("change", "text"), [
    (lambda m: [], r"manifest.json is damaged \(a list\); delete it, and run the same `mdt-ray precompute` again"),
    (lambda m: {"schema_version": 2}, "manifest.json is damaged"),
    (lambda m: m | {"files": [{}]}, "manifest.json is damaged"), (lambda m: m | {"more": 1}, "manifest.json is damaged"),
    (lambda m: m | {"files": [m["files"][0] | {"name": "../secret.parquet"}]}, r"names '\.\./secret\.parquet', which is no"),
    (lambda m: m | {"files": [m["files"][0] | {"name": "/etc/passwd"}]}, "names '/etc/passwd', which is no")])
def test_a_manifest_that_is_none_or_leads_elsewhere_is_refused(tmp_path, change, text):
    make_latents(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=text):
        latents.open_manifest(str(tmp_path))


def test_a_file_damaged_while_training_is_named(folder):
    reader = loader(folder)
    path = folder / "chunk-00001.parquet"
    path.write_bytes(b"\0" * path.stat().st_size)
    with reader, pytest.raises(ValueError, match=r"chunk-00001.parquet: row group \d is not readable"):
        list(itertools.islice(reader.batches(0), 20))


@pytest.mark.parametrize(("rows", "options", "text"), [
    ([bytes(2**16)] * 900, {"use_dictionary": True}, "is packed: not read"),
    ([bytes(256)] * 9, {"compression": "zstd"}, "is packed: not read"),
    ([bytes(256)] * 9, {"column_encoding": {"moments": "DELTA_BYTE_ARRAY"}}, "holds texts as differences"),
    ([bytes(256), bytes(2**16)], {}, "moments: its rows are not of 256 bytes"),
    ([bytes(256), None], {}, "moments: its rows are not of 256 bytes"),
    (["a" * 256], {}, "moments: is of type string"),
    (pa.nulls(900, pa.binary(2**16)), {}, r"its column moments is of type fixed_size_binary\[65536\]: not read")])
def test_latents_that_unpack_to_any_size_or_have_another_shape_are_not_read(tmp_path, rows, options, text):
    pq.write_table(pa.table({"label": [0] * len(rows), "moments": rows}), tmp_path / "chunk-00000.parquet",
                   **{"compression": "none", "use_dictionary": False} | options)
    data = (tmp_path / "chunk-00000.parquet").read_bytes()
    file = latents.LatentFile(name="chunk-00000.parquet", num_rows=len(rows), num_bytes=len(data),
                              sha256=storage.sha256(data), rows_per_group=len(rows), validation_rows=[])
    with pytest.raises(ValueError, match=rf"chunk-00000.parquet: .*{text}.*precompute"):
        latents.read_group(str(tmp_path), file, 0, [4, 4, 4], flip=False)


def test_missing_mirror_images_are_an_error(folder, tmp_path):
    file = latents.open_manifest(str(folder)).files[0]
    with pytest.raises(ValueError, match="has no moments_flip"):
        latents.read_group(str(folder), file, 0, [4, 4, 4], flip=True)
    manifest = make_latents(tmp_path / "flipped", flip=True)
    assert "moments_flip" in latents.read_group(str(tmp_path / "flipped"), manifest.files[0], 0, [4, 4, 4], flip=True)


def test_another_schema_version_is_refused(folder):
    uri = str(folder / "manifest.json")
    storage.write_json(uri, storage.read_json(uri) | {"schema_version": 99})
    with pytest.raises(ValueError, match="schema_version = 99"):
        latents.open_manifest(str(folder))
