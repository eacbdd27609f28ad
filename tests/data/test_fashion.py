"""scripts/make_fashion.py: idx files become pictures that `precompute` reads. On made files of the real ones' layout."""

import gzip
import struct
import sys

import numpy as np
import pytest

from mdt_ray.data import images, listings, readers, sources
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    yield pytest.importorskip("make_fashion", reason="needs scikit-learn, `pip install mdt-ray[assets]`")
    sys.path.remove(str(ROOT / "scripts"))


def write_idx(path, values: np.ndarray) -> None:
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes()))


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for part, count in (("train", 25), ("t10k", 7)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", generator.integers(0, 256, (count, 28, 28), np.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


def test_idx_files_become_pictures_with_labels(script, folder, monkeypatch):
    monkeypatch.setattr(script, "IMAGES_PER_FILE", 10)
    pixels, labels = script.read_fashion(folder)
    assert pixels.shape == (32, 32, 32)
    raw = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    assert pixels[25, 2:-2, 2:-2].tobytes() == raw[:28 * 28], "the test pictures follow the training ones"
    assert not pixels[:, :2].any()
    assert not pixels[:, :, -2:].any()
    script.write_pictures(folder / "images", pixels, labels)
    source = sources.open_source(str(folder / "images"))
    listed = listings.list_images(source)
    assert listed.table.num_rows == 32, "no name occurs twice"
    assert listed.class_names == script.NAMES
    found = images.decode_pieces(readers.read_pieces(source.folder, source.kind, listed.table, 10_000), 32)
    assert found.rejected == []
    assert np.array_equal(found.images, np.repeat(pixels[..., None], 3, axis=3))
    assert found.labels == labels.tolist()


def test_other_files_are_refused(script, folder):
    (folder / "x.gz").write_bytes(gzip.compress(b"\0\0\x0d\1" + bytes(8)))
    with pytest.raises(ValueError, match=r"x.gz: begins with b.*, but an idx file of unsigned bytes begins"):
        script.read_idx(folder / "x.gz")
