"""`latents inspect`, `latents verify` and `plan precompute`: what they say, what they find, what happens next."""

import dataclasses
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mdt_ray import storage
from mdt_ray.config import InspectConfig, VerifyConfig
from mdt_ray.data import latents, listings, sources
from mdt_ray.jobs.latents import inspect, verify
from mdt_ray.jobs.plan import plan_precompute
from mdt_ray.jobs.precompute import precompute
from tests.data.pictures import encoded, write_folder
from tests.helpers import make_latents
from tests.jobs.test_precompute import encoding


def check(folder, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(VerifyConfig(folder=str(folder)))


@pytest.fixture
def folder(tmp_path):
    make_latents(tmp_path / "latents", num_images=100, num_files=4)
    return tmp_path / "latents"


def test_whole_latents_are_said_to_be_whole(folder):
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert verify(VerifyConfig(folder=str(folder))) == "100 latents in 4 files are whole"
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_damaged_and_missing_files_are_named_and_set_aside(folder):
    path = folder / "chunk-00002.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (folder / "chunk-00001.parquet").unlink()
    with pytest.raises(ValueError, match="2 problems") as error:
        verify(VerifyConfig(folder=str(folder)))
    assert "chunk-00001.parquet: missing\n" in str(error.value)
    assert "chunk-00002.parquet: checksum differs: its bytes have changed; renamed to chunk-00002.parquet.damaged" in str(
        error.value)
    assert "run the same `mdt-ray precompute` again, which rebuilds just the damaged files" in str(error.value)
    assert (folder / "chunk-00002.parquet.damaged").read_bytes() == data
    with pytest.raises(ValueError, match=r"chunk-00001.parquet: missing"):
        latents.open_manifest(str(folder))


def rewrite(folder, change) -> None:
    """Replace file 0 by a changed table, and its entry in the manifest by one that fits it."""
    manifest = latents.read_manifest(str(folder))
    name = manifest.files[0].name
    file = latents.write_file(str(folder), name, change(pq.read_table(folder / name)), 16)
    files = [dataclasses.replace(file, validation_rows=manifest.files[0].validation_rows), *manifest.files[1:]]
    latents.write_manifest(str(folder), dataclasses.replace(manifest, files=files))


def with_moments(table: pa.Table, row: int, data: bytes) -> pa.Table:
    rows = table["moments"].to_pylist()
    rows[row] = data
    return table.set_column(table.column_names.index("moments"), "moments", pa.array(rows, pa.binary()))


def test_values_that_are_not_finite_are_named(folder):
    bad = np.full((2, 4, 4, 4), np.nan, np.float16).tobytes()
    rewrite(folder, lambda table: with_moments(table, 3, bad))
    check(folder, r"chunk-00000.parquet: 1 rows of moments are not finite, such as 'image-00003'\ndelete the folder")
    assert (folder / "chunk-00000.parquet").exists(), "its bytes are those that were written"


def test_rows_of_a_wrong_size_and_missing_columns_are_named(folder):
    rewrite(folder, lambda table: with_moments(table, 5, b"short"))
    check(folder, r"chunk-00000.parquet: row 5 of moments has 5 bytes, must be 256")
    rewrite(folder, lambda table: table.drop_columns("moments"))
    check(folder, r"chunk-00000.parquet: has no column moments")


def test_a_file_that_is_not_read_is_named(folder):
    rewrite(folder, lambda table: table.append_column("extra", pa.array([[1]] * table.num_rows)))
    check(folder, r"1 problem:\n  chunk-00000.parquet: its column extra is of type list<element: int64>: not read")


def test_counts_ids_and_splits_are_compared_with_the_manifest(folder):
    rewrite(folder, lambda table: table.set_column(1, "label", pa.array([0] * table.num_rows, pa.int32())))
    check(folder, r"manifest.json: 10 classes have other counts than the files, such as class 0: 10, in the files")
    rewrite(folder, lambda table: table.set_column(0, "id", pa.array(["same"] * table.num_rows)))
    check(folder, r"1 ids occur twice, such as 'same'")
    rewrite(folder, lambda table: table.set_column(2, "split", pa.array(["validation"] * table.num_rows)))
    check(folder, r"chunk-00000.parquet: its held-out rows are not those of the manifest")
    latents.write_rejected(str(folder), [{"id": "x", "reason": "y"}])
    check(folder, r"rejected.parquet: lists 1 images, the manifest 0")


def test_inspect_says_what_there_is(folder):
    manifest = latents.read_manifest(str(folder))
    latents.write_rejected(str(folder), [{"id": f"bad-{i}", "reason": "no bytes"} for i in range(12)])
    latents.write_manifest(str(folder), dataclasses.replace(
        manifest, num_rejected=12, statistics={"mean": [0.1] * 4, "std": [2.0] * 4}))
    text = inspect(InspectConfig(folder=str(folder)))
    for line in ("100 in 4 files", "12 rejected", "4 x 4 x 4, mean and std in float16, of 32 x 32 pixels, without mirror",
                 "schema 2, row groups of 16", "digits, weights none, encoded in fp32; scale 1, shift 0",
                 "0.1000 0.1000 0.1000 0.1000", "       10  7", "rejected: bad-0: no bytes",
                 "and 2 more in rejected.parquet"):
        assert line in text, line
    (folder / "chunk-00002.parquet").unlink()
    text = inspect(InspectConfig(folder=str(folder)))
    assert "chunk-00002.parquet: missing; run the same `mdt-ray precompute` again" in text
    with pytest.raises(ValueError, match="no finished latents"):
        inspect(InspectConfig(folder=str(folder / "none")))


def test_inspect_says_how_far_an_unfinished_job_is(folder):
    source = sources.open_source("digits")
    listings.write_parts(str(folder / "plan.parquet"), listings.list_images(source), np.array_split(np.arange(1797), 7))
    (folder / "manifest.json").unlink()
    (folder / "chunks").mkdir()
    for k in range(3):
        (folder / "chunks" / f"{k:05d}.json").write_text("{}")
    with pytest.raises(ValueError, match=r"unfinished, 3 of 7 files are written; the same `mdt-ray precompute` goes on"):
        inspect(InspectConfig(folder=str(folder)))


# With the job


@pytest.mark.ray
@pytest.mark.slow
def test_a_damaged_file_is_rebuilt_alone_and_decodes_to_its_pictures(tmp_path, ray_session):
    write_folder(tmp_path / "source", [(f"{'ab'[i % 2]}/{i}.png", encoded(seed=i)) for i in range(12)])
    config = encoding(tmp_path / "source", tmp_path / "out")
    manifest = precompute(config)
    before = {f.name: (tmp_path / "out" / f.name).read_bytes() for f in manifest.files}
    path = tmp_path / "out" / "chunk-00001.parquet"
    path.write_bytes(bytes(len(before[path.name])))
    assert precompute(config) == manifest, "of the right size: not looked into"
    check(tmp_path / "out", "1 problem:\n  chunk-00001.parquet: checksum differs")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")}
    assert precompute(config) == manifest
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    assert [n for n in before if times.get(n) != (tmp_path / "out" / n).stat().st_mtime_ns] == ["chunk-00001.parquet"]
    # The digits' autoencoder knows no colours, but these smooth pictures come back roughly; noise would not (under 8 dB).
    (tmp_path / "source").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"source.*: no such file or folder"):
        verify(VerifyConfig(folder=config.output, decode=5))
    line = verify(VerifyConfig(folder=config.output, decode=5, source=str(tmp_path / "moved")))
    found = re.fullmatch(r"12 latents in 3 files are whole; PSNR of 5 decoded: mean ([\d.]+) dB, least ([\d.]+) dB "
                         r"\(.*\); (.*)", line)
    assert float(found[1]) >= float(found[2]) > 8
    with Image.open(found[3]) as picture:
        assert picture.width > 5 * 32
    write_folder(tmp_path / "other", [("a/zzz.png", encoded())])
    with pytest.raises(ValueError, match=r"has no image '[ab]/\d+.png'; name by --source"):
        verify(VerifyConfig(folder=config.output, decode=5, source=str(tmp_path / "other")))


@pytest.fixture(scope="module")
def digits(tmp_path_factory, ray_session):
    """The settings of a finished run over the digits."""
    config = encoding("digits", tmp_path_factory.mktemp("digits") / "out", chunk_size=1000, rows_per_group=128)
    precompute(config)
    return config


@pytest.mark.ray
@pytest.mark.slow
def test_psnr_is_high_for_the_pictures_that_the_autoencoder_knows(digits):
    line = verify(VerifyConfig(folder=digits.output, decode=40))
    assert float(re.search(r"mean ([\d.]+) dB", line)[1]) > 30


def test_a_plan_gives_counts_sizes_and_time(tmp_path):
    write_folder(tmp_path / "source", [(f"{'ab'[i % 2]}/{i}.png", b"" if i == 3 else encoded(seed=i)) for i in range(30)])
    text = plan_precompute(encoding(tmp_path / "source", tmp_path / "out", flip=True))
    assert "30 images of 2 classes in 30 files (pictures" in text
    assert "8 files, 17.16 kB (4 x 4 x 4 of 32 x 32 pixels, with mirror images)" in text
    assert "on 30 images here" in text
    assert "1 of 30 (3.3%), such as 'b/3.png': no bytes; more than --max-rejected 0.01 stops the job" in text
    assert re.search(r"time +about \d+ s and some 20 s to start, with 1 workers and 4 decoders each", text)
    assert not (tmp_path / "out").exists()


def test_the_planned_size_is_that_of_imagenet():
    """REFERENCE figure: 21 GB for 1,281,167 images at 256 pixels, 42 GB with mirror images."""
    assert round(1_281_167 * latents.row_bytes((4, 32, 32), flip=False) / 1e9) == 21
    assert round(1_281_167 * latents.row_bytes((4, 32, 32), flip=True) / 1e9) == 42


@pytest.mark.ray
@pytest.mark.slow
def test_the_planned_size_is_the_size_written(digits):
    planned = float(re.search(r"2 files, ([\d.]+) kB", plan_precompute(digits))[1]) * 1000
    written = sum(size for name, size in storage.list_sizes(digits.output).items() if name.startswith("chunk"))
    assert planned == pytest.approx(written, rel=0.15)
