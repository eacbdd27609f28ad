"""Pictures in .npz files: read as numpy reads them, a range at a time; damaged and hostile files are refused by name."""

import io
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from mdt_ray import storage
from mdt_ray.data import arrays, npz
from tests import s3

SHAPE = (23, 6, 5, 3)


def pictures(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(path, save=np.savez, **members):
    save(path, **members)
    return str(path)


@pytest.fixture(params=[np.savez, np.savez_compressed], ids=["stored", "deflated"])
def save(request):
    return request.param


# Reading.

def test_any_range_is_what_numpy_reads(tmp_path, save):
    expected, labels = pictures(), np.arange(23, dtype=np.int32) % 4
    found = arrays.open_npz(saved(tmp_path / "x.npz", save, mu=np.zeros(3), arr_0=expected, arr_1=labels))
    assert (found.num_images, found.height, found.width, found.has_labels) == (23, 6, 5, True)
    assert found.is_stored == (save is np.savez)
    for start, stop in [(0, 23), (0, 1), (22, 23), (7, 15), (9, 9), (23, 23)]:
        got = arrays.read_images(found, start, stop)
        assert got.dtype == np.uint8
        assert got.flags.writeable
        np.testing.assert_array_equal(got, expected[start:stop])
    np.testing.assert_array_equal(arrays.read_labels(found), labels)
    assert arrays.read_labels(found).dtype == np.int64


@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_a_stream_is_all_of_them_in_order(tmp_path, save, batch_size):
    expected = pictures()
    parts = list(arrays.stream_images(arrays.open_npz(saved(tmp_path / "x.npz", save, arr_0=expected)), batch_size))
    assert {len(p) for p in parts[:-1]} <= {batch_size}
    np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_pictures_of_np_savez_without_names_have_no_labels(tmp_path):
    np.savez(tmp_path / "x.npz", pictures())
    found = arrays.open_npz(str(tmp_path / "x.npz"))
    assert not found.has_labels
    np.testing.assert_array_equal(arrays.read_labels(found), np.full(23, -1))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 24)])
def test_ranges_outside_are_refused(tmp_path, start, stop):
    found = arrays.open_npz(saved(tmp_path / "x.npz", arr_0=pictures()))
    with pytest.raises(ValueError, match=rf"range {start}..{stop}: must lie in 0..23"):
        arrays.read_images(found, start, stop)


def peak_of(function):
    """Bytes that Python and numpy held at most during a call, beyond those before it."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_the_range_and_not_the_file(tmp_path, save):
    """Pictures of 64 MiB; noise, so that the deflated ones take as much. zlib and zipfile hold a block or two each."""
    shape = (1024, 128, 171, 3)
    path = saved(tmp_path / "x.npz", save, arr_0=pictures(shape))
    assert os.path.getsize(path) > 64e6
    image = 128 * 171 * 3
    held = 2**20 if save is np.savez else 3.5 * npz.BLOCK_BYTES
    found = arrays.open_npz(path)
    assert peak_of(lambda: arrays.open_npz(path)) < 2**20
    assert peak_of(lambda: arrays.fingerprint(found.uri)) < 2**20
    assert peak_of(lambda: arrays.read_images(found, 1000, 1016)) < 16 * image + held
    assert peak_of(lambda: [None for _ in arrays.stream_images(found, 16)]) < 3 * 16 * image + 4 * 2**20


# What a file must be.

OBJECTS = np.array([{"a": 1}] * 3, dtype=object)


@pytest.mark.parametrize(("members", "message"), [
    ({"mu": np.zeros(3), "sigma": np.eye(3)}, r"has no array 'arr_0', but \['mu', 'sigma'\]"),
    ({"arr_0": pictures().astype(np.float32)}, r"float32 \(23, 6, 5, 3\).*\(\(x \+ 1\) \* 127.5\).clip\(0, 255\).astype"),
    ({"arr_0": pictures().astype(np.int64)}, r"int64 .*astype\(np.uint8\)"),
    ({"arr_0": pictures((4, 3, 8, 9))}, r"\(4, 3, 8, 9\), but .* colours go last: save .transpose\(0, 2, 3, 1\)"),
    ({"arr_0": pictures((4, 8, 9, 4))}, r"\(4, 8, 9, 4\), but pictures are uint8 \(N, H, W, 3\)"),
    ({"arr_0": pictures((8, 9, 3))}, r"\(8, 9, 3\), but"),
    ({"arr_0": pictures((0, 8, 9, 3))}, r"\(0, 8, 9, 3\), but .* one to 10000000"),
    ({"arr_0": np.asfortranarray(pictures())}, r"Fortran order.*np.ascontiguousarray\(arr_0\)"),
    ({"arr_0": OBJECTS}, r"arr_0 holds Python objects.*pickles"),
    ({"arr_0": np.zeros(3, dtype=[("a", "u1"), ("日", "u1")])}, r"arr_0 has no readable .npy header \(version \(3, 0\)"),
    ({"arr_0": pictures(), "arr_1": np.zeros(22, np.int64)}, r"arr_1 is int64 \(22,\), but labels .*\(23,\)"),
    ({"arr_0": pictures(), "arr_1": np.zeros((23, 10), np.int64)}, r"arr_1 is int64 \(23, 10\)"),
    ({"arr_0": pictures(), "arr_1": np.zeros(23)}, r"arr_1 is float64 \(23,\)"),
    ({"arr_0": pictures(), "arr_1": np.array([None] * 23)}, r"arr_1 holds Python objects"),
], ids=range(14))
@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
def test_other_contents_are_refused_with_the_remedy(tmp_path, members, message):
    path = saved(tmp_path / "x.npz", np.savez_compressed, **members)
    with pytest.raises(ValueError, match=rf"{path}: .*{message}"):
        arrays.open_npz(path)


def test_pictures_too_large_for_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "MAX_PICTURES", 22)
    with pytest.raises(ValueError, match=r"\(23, 6, 5, 3\), but .* one to 22, of at most"):
        arrays.open_npz(saved(tmp_path / "many.npz", np.savez_compressed, arr_0=pictures()))
    monkeypatch.undo()
    monkeypatch.setattr(arrays, "MAX_PIXELS", 29)
    with pytest.raises(ValueError, match=r"\(23, 6, 5, 3\), but .* of at most 29 pixels"):
        arrays.open_npz(saved(tmp_path / "x.npz", arr_0=pictures()))


def test_pictures_that_unpack_to_more_than_any_do_are_refused(tmp_path, monkeypatch):
    """A file of a hundred megabytes could hold a hundred gigabytes of black, of which readers would hold 500 pictures."""
    black = np.zeros((9, 200, 200, 3), np.uint8)
    packed, stored = saved(tmp_path / "packed.npz", np.savez_compressed, arr_0=black), saved(tmp_path / "x.npz", arr_0=black)
    assert arrays.open_npz(packed).num_images == 9
    monkeypatch.setattr(arrays, "MAX_PACKED_BYTES", 2**20)
    with pytest.raises(ValueError, match=r"packed.npz: arr_0 unpacks from \d+ to 1080128 bytes, .*; save it with np.savez"):
        arrays.open_npz(packed)
    assert arrays.open_npz(stored).num_images == 9


def test_what_is_no_npz_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", pictures())
    (tmp_path / "empty").touch()
    (tmp_path / "junk").write_bytes(b"PK\x05\x06" + bytes(300))
    whole = (saved(tmp_path / "x.npz", arr_0=pictures()), (tmp_path / "x.npz").read_bytes())[1]
    (tmp_path / "cut").write_bytes(whole[:-30])
    for name, message in [("x.npy", "no .npz, or one that was cut short"), ("empty", "no .npz"), ("cut", "cut short"),
                          ("junk", "has no array 'arr_0'|no .npz"), ("gone", "no such file"), ("", "cannot be read")]:
        with pytest.raises(ValueError, match=rf"{tmp_path}/{name}: .*({message})"):
            arrays.open_npz(f"{tmp_path}/{name}")
    with pytest.raises(ValueError, match="cannot open 'nowhere://x'"):
        arrays.open_npz("nowhere://x")


def zipped(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return str(path)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def with_shape(shape):
    """A header that promises uint8 of that shape, without any data."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize(("data", "message"), [
    (npy(pictures())[:-1], "has 2069 bytes of data, but by its header.*2070"),
    (npy(pictures()) + b"x", "has 2071 bytes of data"),
    (with_shape((10**12, 256, 256, 3)), "has 0 bytes of data"),
    (with_shape((-2, -2, 1, 3)), "has 0 bytes|by its header"),
    (b"", "no readable .npy header"),
    (b"\x93NUMPY\x01\x00\x08\x00" + b"{'descr'", "no readable .npy header"),
    (b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000, "no readable .npy header"),
    (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b" " * 100_000, "no readable .npy header"),
    (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**17) + b" " * 2**17, r"no readable .npy header \(of 131072 bytes\)"),
    (b"\x93NUMPY\x02\x00\x00", "no readable .npy header"),
], ids=range(10))
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_that_are_not_what_their_header_says_are_refused(tmp_path, data, message, compression):
    path = zipped(tmp_path / "x.npz", {"arr_0.npy": data}, compression)
    with pytest.raises(ValueError, match=rf"{path}: arr_0 .*({message})"):
        arrays.open_npz(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_unpacks_without_bounds_is_refused(tmp_path, compression):
    path = zipped(tmp_path / "x.npz", {"arr_0.npy": npy(pictures())}, compression)
    with pytest.raises(ValueError, match=f"{path}: arr_0 is compressed in a way that numpy does not write"):
        arrays.open_npz(path)


def test_changed_bytes_are_noticed_by_the_checksum(tmp_path, save):
    path = saved(tmp_path / "x.npz", save, arr_0=pictures((23, 60, 50, 3)))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[150_000] ^= 64
    (tmp_path / "x.npz").write_bytes(data)
    found = arrays.open_npz(path)
    with pytest.raises(ValueError, match=rf"{path}: (damaged|arr_0 ends)"):
        list(arrays.stream_images(found, 5))
    if save is np.savez_compressed:
        with pytest.raises(ValueError, match=rf"{path}: (damaged|arr_0 ends)"):
            arrays.read_images(found, 20, 23)


def test_lies_of_the_directory_are_refused(tmp_path, save):
    """Sizes in the central directory raised: the data then ends before what they promise."""
    path = zipped(tmp_path / "x.npz", {"arr_0.npy": with_shape((40, 6, 5, 3)) + pictures().tobytes()},
                  zipfile.ZIP_STORED if save is np.savez else zipfile.ZIP_DEFLATED)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    at = data.index(b"PK\x01\x02")
    size = len(with_shape((40, 6, 5, 3))) + 3600
    struct.pack_into("<I", data, at + 24, size)
    if save is np.savez:
        struct.pack_into("<I", data, at + 20, size)
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(ValueError, match=rf"{path}: (arr_0 ends|damaged)"):
        arrays.read_images(arrays.open_npz(path), 30, 40)


def test_encrypted_members_are_refused(tmp_path):
    path = saved(tmp_path / "x.npz", arr_0=pictures())
    data = bytearray((tmp_path / "x.npz").read_bytes())
    for at, flags in ((0, 6), (data.index(b"PK\x01\x02"), 8)):
        data[at + flags] |= 1
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(ValueError, match=rf"{path}: damaged, or not written by numpy \(.*encrypted"):
        arrays.open_npz(path)


def test_a_file_replaced_after_it_was_opened_is_noticed(tmp_path, save):
    found = arrays.open_npz(saved(tmp_path / "x.npz", save, arr_0=pictures()))
    saved(tmp_path / "x.npz", save, arr_0=pictures((30, 6, 5, 3)))
    for read in (lambda: arrays.read_images(found, 0, 1), lambda: next(arrays.stream_images(found, 1))):
        with pytest.raises(ValueError, match=r"bytes, but had \d+ when it was opened"):
            read()


def test_the_fingerprint_is_of_the_content(tmp_path):
    images, labels = pictures(), np.arange(23)

    def of(name, save=np.savez, **members):
        return arrays.fingerprint(str(saved(tmp_path / name, save, **members)))

    first = of("a.npz", arr_0=images, arr_1=labels)
    assert len(first) == 64
    assert of("b.npz", np.savez_compressed, arr_1=labels, arr_0=images) == first
    other = images.copy()
    other[11, 3, 2, 1] ^= 1
    assert len({first, of("c.npz", arr_0=other, arr_1=labels), of("d.npz", arr_0=images, arr_1=labels + 1),
                of("e.npz", arr_0=images), of("f.npz", arr_0=images, arr_2=labels)}) == 5


# Writing.

def parts_of(images, *sizes):
    return iter(np.split(images, np.cumsum(sizes)[:-1]))


def test_what_is_written_numpy_and_we_read(tmp_path):
    images = pictures()
    others = {"mu": np.arange(4.0), "sigma": np.eye(4)[::-1].T, "facts": np.array('{"é": 1}'), "arr_1": np.arange(23)}
    uri = str(tmp_path / "new" / "x.npz")
    arrays.write_npz(uri, others, pictures=parts_of(images, 10, 0, 13), shape=np.array(images.shape))
    with np.load(uri, allow_pickle=False) as read:
        assert list(read) == ["arr_0", "mu", "sigma", "facts", "arr_1"]
        np.testing.assert_array_equal(read["arr_0"], images)
        for key, array in others.items():
            np.testing.assert_array_equal(read[key], array)
            assert (read[key].shape, read[key].dtype) == (array.shape, array.dtype)
    found = arrays.open_npz(uri)
    assert found.is_stored
    np.testing.assert_array_equal(arrays.read_images(found, 5, 19), images[5:19])
    np.testing.assert_array_equal(arrays.read_labels(found), np.arange(23))
    assert os.listdir(tmp_path / "new") == ["x.npz"]


def test_equal_arrays_are_equal_bytes(tmp_path):
    images = pictures()
    arrays.write_npz(str(tmp_path / "a.npz"), {"mu": np.arange(4)}, pictures=parts_of(images, 23), shape=SHAPE)
    os.utime(tmp_path / "a.npz", (0, 0))
    arrays.write_npz(str(tmp_path / "b.npz"), {"mu": np.arange(4)}, pictures=parts_of(images[:, ::-1][:, ::-1], 3, 20),
                     shape=SHAPE)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert {info.date_time for info in archive.infolist()} == {arrays.EPOCH}


def test_large_members_are_in_the_64_bit_form(tmp_path, monkeypatch):
    """The limit is lowered, so that a small file has the fields of one above 2 GiB."""
    arrays.write_npz(str(tmp_path / "small.npz"), {}, pictures=[pictures()], shape=SHAPE)
    with monkeypatch.context() as patch:
        patch.setattr(zipfile, "ZIP64_LIMIT", 1500)
        arrays.write_npz(str(tmp_path / "x.npz"), {"mu": np.arange(4)}, pictures=[pictures()], shape=SHAPE)
    data = (tmp_path / "x.npz").read_bytes()
    assert data[28:30] != (tmp_path / "small.npz").read_bytes()[28:30], "the length of the extra field"
    with np.load(tmp_path / "x.npz") as read:
        np.testing.assert_array_equal(read["arr_0"], pictures())
    found = arrays.open_npz(str(tmp_path / "x.npz"))
    np.testing.assert_array_equal(arrays.read_images(found, 4, 9), pictures()[4:9])


@pytest.mark.parametrize(("parts", "others", "message"), [
    ([pictures((22, 6, 5, 3))], {}, "22 pictures came, but 23 were announced"),
    ([pictures(), pictures((1, 6, 5, 3))], {}, "24 or more pictures came, but 23"),
    ([pictures((23, 5, 6, 3))], {}, r"picture 0 on is uint8 \(23, 5, 6, 3\), but must be uint8 \(n, 6, 5, 3\)"),
    ([pictures().astype(float)], {}, "is float64"),
    ([pictures()], {"x": OBJECTS}, "Object arrays cannot be saved"),
])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, parts, others, message):
    uri = str(tmp_path / "x.npz")
    storage.write_bytes(uri, b"old")
    with pytest.raises(ValueError, match=message):
        arrays.write_npz(uri, others, pictures=parts, shape=SHAPE)
    assert storage.read_bytes(uri) == b"old"
    assert os.listdir(tmp_path) == ["x.npz"]


def test_writing_holds_a_part_at_a_time(tmp_path):
    part = pictures((16, 128, 171, 3))
    assert peak_of(lambda: arrays.write_npz(
        str(tmp_path / "x.npz"), {}, pictures=(part for _ in range(64)), shape=(1024, 128, 171, 3))) < 2**20
    assert arrays.open_npz(str(tmp_path / "x.npz")).num_images == 1024


def test_in_an_object_store(tmp_path, monkeypatch, save):
    s3.give_keys(monkeypatch)
    shape = (60, 256, 256, 3)  # 12 MB: several blocks and parts of an upload
    images = pictures(shape)
    with s3.serve() as store:
        store.put("numpy.npz", (saved(tmp_path / "x.npz", save, arr_0=images), (tmp_path / "x.npz").read_bytes())[1])
        arrays.write_npz(store.uri("a/ours.npz"), {"arr_1": np.arange(60)}, pictures=parts_of(images, 20, 40), shape=shape)
        for name in ("numpy.npz", "a/ours.npz"):
            found = arrays.open_npz(store.uri(name))
            np.testing.assert_array_equal(arrays.read_images(found, 7, 59), images[7:59])
            np.testing.assert_array_equal(np.concatenate(list(arrays.stream_images(found, 25))), images)
        np.testing.assert_array_equal(arrays.read_labels(found), np.arange(60))
        with pytest.raises(ValueError, match="22 pictures came"):
            arrays.write_npz(store.uri("a/short.npz"), {}, pictures=[pictures((22, 6, 5, 3))], shape=SHAPE)
        assert list(store.objects("a")) == ["ours.npz"]
        with pytest.raises(ValueError, match="no such file"):
            arrays.open_npz(store.uri("a/short.npz"))


def test_small_arrays_are_read_whole(tmp_path, save):
    members = {"a": np.arange(6, dtype=">f8").reshape(2, 3), "b": np.array("text é"), "c": np.array(2.5),
               "d": np.empty((0, 3))}
    with npz.open_archive(saved(tmp_path / "x.npz", save, **members)) as archive:
        assert archive.keys == ["a", "b", "c", "d"]
        for key, array in members.items():
            found = npz.read_array(archive, key)
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
