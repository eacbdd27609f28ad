"""What a source holds, whatever its kind: the same images, labels and bytes; and what is refused."""

import json
import os
import time
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdt_ray import storage, tables
from mdt_ray.data import images, listings, readers, sources
from tests import s3
from tests.data.pictures import encoded, sample, write_folder, write_parquet, write_tar

PICTURES = [encoded(seed=i, kind="jpeg") for i in range(7)]
CLASSES = ["n02", "n01", "n02", "n03", "n01", "n01", "n03"]


def read(source: sources.Source, piece_size: int = 3) -> list[tuple[str, int, bytes]]:
    rows = listings.list_images(source).table
    found = []
    for piece in readers.read_pieces(source.folder, source.kind, rows, piece_size):
        assert len(piece.ids) == len(piece.labels) == len(piece.data) <= piece_size
        found += zip(piece.ids, piece.labels, piece.data.to_pylist(), strict=True)
    return found


def imagenet(root):
    named = zip(range(len(PICTURES)), CLASSES, PICTURES, strict=True)
    return write_folder(root, [(f"{c}/{c}_{i}.JPEG", data) for i, c, data in named])


def table_of_labels(root, name="labels.csv", columns=("file", "label")):
    write_folder(root, [(f"{i}.jpg", data) for i, data in enumerate(PICTURES)])
    files = [f"{i}.jpg" for i in range(len(PICTURES))]
    if name.endswith(".csv"):
        (root / name).write_text("\n".join([",".join(columns), *(f"{f},{c}" for f, c in zip(files, CLASSES, strict=True))]))
    else:
        pq.write_table(pa.table(dict(zip(columns, (files, CLASSES), strict=True))), root / name)
    return root


def tars(root, form="cls"):
    for start, stop in ((0, 4), (4, 7)):
        members = [m for i in range(start, stop) for m in sample(f"{i:04d}", PICTURES[i], CLASSES[i], form)]
        write_tar(root / f"train-{start}.tar", [("._junk", b"x"), *members])
    return root


def parquet(root):
    write_parquet(root / "a.parquet", list(zip(PICTURES[:4], CLASSES[:4], strict=True)))
    write_parquet(root / "sub" / "b.parquet", list(zip(PICTURES[4:], CLASSES[4:], strict=True)))
    return root


@pytest.mark.parametrize(("make", "kind"), [
    (imagenet, "pictures"), (table_of_labels, "pictures"),
    (lambda root: table_of_labels(root, "metadata.parquet", ("file_name", "class")), "pictures"),
    (tars, "tar"), (lambda root: tars(root, "json"), "tar"), (parquet, "parquet")],
    ids=["folders", "csv", "parquet labels", "tar cls", "tar json", "parquet"])
@pytest.mark.parametrize("piece_size", [1, 3, 100])
def test_every_kind_gives_the_same_images(tmp_path, make, kind, piece_size):
    source = sources.open_source(str(make(tmp_path / "source")))
    assert source.kind == kind
    listing = listings.list_images(source)
    assert listing.class_names == ["n01", "n02", "n03"], "numbered in the order of their names"
    found = read(source, piece_size)
    assert sorted((label, data) for _, label, data in found) == sorted(
        (listing.class_names.index(c), data) for c, data in zip(CLASSES, PICTURES, strict=True))
    assert len({image_id for image_id, _, _ in found}) == 7


@pytest.mark.parametrize(("make", "ids"), [
    (imagenet, ["n01/n01_1.JPEG", "n01/n01_4.JPEG", "n01/n01_5.JPEG", "n02/n02_0.JPEG", "n02/n02_2.JPEG", "n03/n03_3.JPEG",
                "n03/n03_6.JPEG"]),
    (tars, [f"train-0/{i:04d}" for i in range(4)] + [f"train-4/{i:04d}" for i in range(4, 7)]),
    (parquet, [f"a-{i}.png" for i in range(4)] + [f"b-{i}.png" for i in range(3)])])
def test_ids_are_paths_or_keys(tmp_path, make, ids):
    found = read(sources.open_source(str(make(tmp_path))))
    assert [image_id for image_id, _, _ in found] == ids


@pytest.mark.parametrize("make", [imagenet, tars, parquet])
def test_names_may_hold_any_character(tmp_path, make):
    """Spaces, and what would mean something in a URI."""
    root = make(tmp_path / "a b#c?d%20e")
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_file():
            path.rename(path.with_name(f"x %41#é?{path.name}"))
    assert sorted(data for _, _, data in read(sources.open_source(str(root)))) == sorted(PICTURES)


def test_symbolic_links_are_followed(tmp_path):
    imagenet(tmp_path / "there")
    (tmp_path / "source").mkdir()
    for name in ("n01", "n02", "n03"):
        (tmp_path / "source" / name).symlink_to(tmp_path / "there" / name)
    assert len(read(sources.open_source(str(tmp_path / "source")))) == 7


def test_other_files_are_left_out_and_said(tmp_path, caplog):
    others = ("n01/x.heic", "n02/y.HEIC", "README", ".DS_Store")
    root = write_folder(imagenet(tmp_path), [(name, b"x") for name in others])
    assert len(read(sources.open_source(str(root)))) == 7
    assert "3 other files are left out (2 .heic, 1 without a suffix)" in caplog.text


def test_file_names_that_look_like_numbers(tmp_path):
    write_folder(tmp_path, [(f"00{i}.jpg", data) for i, data in enumerate(PICTURES)])
    rows = [f"00{i}.jpg,{float(i)}" for i in range(7)]
    (tmp_path / "labels.csv").write_text("\n".join(["id,label", *rows]))
    assert [label for _, label, _ in read(sources.open_source(str(tmp_path)))] == list(range(7))
    (tmp_path / "labels.csv").write_text("\n".join(["id,label", *rows, rows[3]]))
    refused(tmp_path, r"labels = .*: '003.jpg' occurs twice")


def test_a_samples_other_pictures_are_not_it(tmp_path):
    members = [("1.mask.png", b"mask"), *sample("1", PICTURES[0], 3), ("1.png", b"second")]
    write_tar(tmp_path / "a.tar", members)
    assert read(sources.open_source(str(tmp_path / "a.tar"))) == [("a/1", 3, PICTURES[0])]


def test_numbers_stay_numbers(tmp_path):
    write_tar(tmp_path / "t" / "a.tar", [m for i in range(3) for m in sample(f"{i}", PICTURES[i], 10 * i)])
    listing = listings.list_images(sources.open_source(str(tmp_path / "t" / "a.tar")))
    assert listing.table["label"].to_pylist() == [0, 10, 20]
    assert listing.class_names == [str(c) for c in range(21)]


def test_folders_called_by_numbers_are_names(tmp_path):
    write_folder(tmp_path, [(f"{name}/x.png", PICTURES[0]) for name in ("2", "10", "9")])
    assert listings.list_images(sources.open_source(str(tmp_path))).class_names == ["10", "2", "9"]


def test_names_of_classes_come_from_hugging_faces_description(tmp_path):
    description = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    write_parquet(tmp_path / "s.parquet", [(PICTURES[0], 0)], {"huggingface": json.dumps(description)})
    assert listings.list_images(sources.open_source(str(tmp_path / "s.parquet"))).class_names == ["cat", "dog"]


@pytest.mark.parametrize("description", [
    "{", "[" * 10**5, "[]", '{"info": 1}', '{"info": {"features": {"label": {"names": "cat"}}}}',
    '{"info": {"features": {"label": {"names": [1, 2]}}}}', '{"info": {"features": {"label": {"names": null}}}}'])
def test_a_description_that_names_no_classes_is_none(tmp_path, description):
    """Other tools write it too, and the labels are there."""
    write_parquet(tmp_path / "s.parquet", [(PICTURES[0], 1)], {"huggingface": description})
    assert listings.list_images(sources.open_source(str(tmp_path / "s.parquet"))).class_names == ["0", "1"]


def test_images_without_a_path_are_named_by_file_and_row(tmp_path):
    write_parquet(tmp_path / "s.parquet", [(PICTURES[i], 0) for i in range(5)], named=False)
    found = read(sources.open_source(str(tmp_path / "s.parquet")))
    assert [image_id for image_id, _, _ in found] == [f"s.parquet#{i}" for i in range(5)]


def test_a_plain_binary_image_column_is_read(tmp_path):
    pq.write_table(pa.table({"image": pa.array(PICTURES, pa.binary()), "label": list(range(7))}), tmp_path / "s.parquet")
    assert [data for _, _, data in read(sources.open_source(str(tmp_path / "s.parquet")))] == PICTURES


@pytest.mark.parametrize("row_group_size", [1, 3, 100])
def test_any_rows_of_parquet_in_any_row_groups(tmp_path, row_group_size):
    write_parquet(tmp_path / "s.parquet", [(bytes([i]), i) for i in range(20)], row_group_size=row_group_size)
    source = sources.open_source(str(tmp_path / "s.parquet"))
    table = listings.list_images(source).table
    for rows in ([3], list(range(5, 17)), list(range(20)), [1, 2, 9, 10, 4], [19, 0]):
        pieces = readers.read_pieces(source.folder, source.kind, table.take(rows), 4)
        assert [d for piece in pieces for d in piece.data.to_pylist()] == [bytes([row]) for row in rows]


def test_a_plan_is_read_part_by_part(tmp_path):
    listing = listings.list_images(sources.open_source(str(imagenet(tmp_path / "source"))))
    uri = str(tmp_path / "plan.parquet")
    listings.write_parts(uri, listing, [[4, 0, 2], [1], [6, 5, 3]])
    rows, sizes, names = listings.read_parts(uri, [2])
    assert (sizes, names) == ([3, 1, 3], ["n01", "n02", "n03"])
    assert rows.equals(listing.table.take([6, 5, 3]))
    assert listings.read_parts(uri, [])[0].num_rows == 0
    assert listings.read_parts(uri)[0].num_rows == 7


# Changes


def test_changed_files_are_named(tmp_path):
    root = imagenet(tmp_path / "source")
    before = sources.open_source(str(root))
    uri = str(tmp_path / "kept.parquet")
    sources.write_files(uri, before)
    assert sources.changes(tables.read(uri), sources.open_source(str(root))) == []
    (root / "n01" / "n01_1.JPEG").unlink()
    (root / "n02" / "new.JPEG").write_bytes(PICTURES[0])
    (root / "n03" / "n03_3.JPEG").write_bytes(b"longer" + PICTURES[3])
    same_size = root / "n03" / "n03_6.JPEG"
    same_size.write_bytes(bytes(len(PICTURES[6])))
    os.utime(same_size, ns=(1, 1))
    after = sources.open_source(str(root))
    assert sources.changes(tables.read(uri), after) == [
        "n01/n01_1.JPEG: removed", "n02/new.JPEG: added",
        f"n03/n03_3.JPEG: {len(PICTURES[3])} -> {len(PICTURES[3]) + 6} bytes", "n03/n03_6.JPEG: modified since"]
    assert before.fingerprint != after.fingerprint


def test_a_source_may_move(tmp_path):
    before = sources.open_source(str(imagenet(tmp_path / "source")))
    sources.write_files(str(tmp_path / "kept.parquet"), before)
    moved = sources.open_source(str(imagenet(tmp_path / "moved")))
    for path in (tmp_path / "moved").rglob("*.JPEG"):
        os.utime(path, ns=(5, 5))
    assert moved.fingerprint == before.fingerprint
    same = sources.open_source(f"{tmp_path}/source/")
    os.utime(tmp_path / "source" / "n01" / "n01_1.JPEG", ns=(5, 5))
    again = sources.open_source(f"{tmp_path}/source/")
    assert same.place == before.place
    assert sources.changes(tables.read(str(tmp_path / "kept.parquet")), again) == ["n01/n01_1.JPEG: modified since"]
    assert sources.changes(tables.read(str(tmp_path / "kept.parquet")), moved) == []


def test_labels_are_part_of_the_fingerprint(tmp_path):
    source = sources.open_source(str(table_of_labels(tmp_path)))
    before = source.fingerprint
    (tmp_path / "labels.csv").write_text((tmp_path / "labels.csv").read_text().replace("n03", "n01"))
    assert sources.open_source(str(tmp_path)).fingerprint != before


# Bad input


def refused(path, message: str, **options) -> None:
    with pytest.raises(ValueError, match=message):
        listings.list_images(sources.open_source(str(path), **options))


def test_nothing_to_read_is_refused(tmp_path):
    refused(tmp_path / "none", r"source = .*none': no such file or folder")
    refused(tmp_path, r"holds no picture .*, no \*.parquet and no \*.tar")
    write_parquet(tmp_path / "empty.parquet", [])
    refused(tmp_path, r"holds no image")


def test_several_kinds_are_refused(tmp_path):
    imagenet(tmp_path)
    tars(tmp_path)
    refused(tmp_path, r"holds pictures \(n01/.*\) and tar \(train-0.tar, ...\); name a folder that holds one kind")


def test_pictures_without_labels_are_refused(tmp_path):
    write_folder(tmp_path, [("a.png", PICTURES[0])])
    refused(tmp_path, r"its pictures have no labels; give each class a subfolder, or name a table .* --labels")
    write_folder(tmp_path, [("n01/b.png", PICTURES[0])])
    refused(tmp_path, r"1 pictures lie beside the class folders, such as 'a.png'")


def test_tables_of_labels_are_checked(tmp_path):
    root = table_of_labels(tmp_path / "source")
    text = (root / "labels.csv").read_text()
    (root / "labels.csv").write_text(text.replace("3.jpg,n03", "33.jpg,n03"))
    refused(root, r"labels = .*: 1 pictures have no row, such as '3.jpg' and 1 rows have no picture, such as '33.jpg'")
    (root / "labels.csv").write_text(text.replace("file,", "picture,"))
    refused(root, r"has columns picture, label; needs file and label")
    (root / "labels.csv").unlink()
    elsewhere = tmp_path / "elsewhere.csv"
    elsewhere.write_text(text)
    assert len(read(sources.open_source(str(root), str(elsewhere)))) == 7
    refused(root, r"labels = .*missing.csv': not a readable CSV", labels=str(tmp_path / "missing.csv"))
    refused(tars(tmp_path / "tars"), r"the source's tar files carry their own labels", labels=str(elsewhere))


@pytest.mark.parametrize(("label", "names", "message"), [
    (-1, None, r"image 's-1.png' has label -1: must be a number from 0 to 1048575"),
    (None, None, r"1 images have no label, such as 's-1.png'"),
    (2**21, None, r"image 's-1.png' has label 2097152: must be a number from 0 to 1048575"),
    (2, ["cat", "dog"], r"image 's-1.png' has label 2: must be below the source's number of classes, 2"),
])
def test_a_label_outside_the_classes_is_refused(tmp_path, label, names, message):
    description = {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})} if names else None
    write_parquet(tmp_path / "s.parquet", [(PICTURES[0], 0), (PICTURES[1], label)], description)
    refused(tmp_path / "s.parquet", message)


def test_samples_without_a_label_or_a_picture_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [*sample("1", PICTURES[0], 3), ("2.jpg", PICTURES[1])])
    refused(tmp_path, r"1 images have no label, such as 'a/2'")
    write_tar(tmp_path / "a.tar", [*sample("1", PICTURES[0], 3), ("2.cls", b"1")])
    refused(tmp_path, r"a.tar: sample '2' has no picture")
    write_tar(tmp_path / "a.tar", [("1.jpg", PICTURES[0]), ("1.json", b"{")])
    refused(tmp_path, r"a.tar: not a readable tar \('1.json' is no JSON")


def test_an_id_that_occurs_twice_is_refused(tmp_path):
    write_parquet(tmp_path / "a" / "s.parquet", [(PICTURES[0], 0)])
    write_parquet(tmp_path / "b" / "s.parquet", [(PICTURES[1], 0)])
    refused(tmp_path, r"1 ids occur twice, such as 's-0.png' \(in a/s.parquet and b/s.parquet\)")


def test_damaged_files_are_named(tmp_path):
    path = parquet(tmp_path / "p") / "a.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    refused(tmp_path / "p", r"a.parquet: not a readable Parquet file")
    pq.write_table(pa.table({"picture": [1]}), path)
    refused(tmp_path / "p", r"a.parquet: has no column 'image'")
    path = tars(tmp_path / "t") / "train-4.tar"
    data = path.read_bytes()
    path.write_bytes(data[:3000])
    refused(tmp_path / "t", r"train-4.tar: truncated, damaged, or several tars in one, at byte 2560 of 3000")
    path.write_bytes(b"\1" * 5000)
    refused(tmp_path / "t", r"train-4.tar: not a readable tar")


def test_no_image_of_a_damaged_or_joined_tar_is_lost_silently(tmp_path):
    """tarfile itself ends without a word where a header is damaged or another tar begins."""
    members = [m for i in range(6) for m in sample(f"{i}", b"x" * 700, i)]
    path = write_tar(tmp_path / "t" / "a.tar", members)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    place = whole.index(b"4.jpg")
    damaged[place:place + 100] = b"\7" * 100
    path.write_bytes(damaged)
    refused(tmp_path / "t", r"a.tar: truncated, damaged, or several tars in one")
    path.write_bytes(whole + whole)
    refused(tmp_path / "t", r"a.tar: truncated, damaged, or several tars in one")
    write_tar(path, [*sample("1", b"x", 0), *sample("2", b"x", 0), *sample("1", b"y", 1)])
    refused(tmp_path / "t", r"a.tar: not a readable tar \(sample '1' occurs twice\)")


def test_a_large_row_group_is_read_in_parts_and_warned_of(tmp_path, monkeypatch, caplog):
    """Memory holds a few megabytes of it, whatever its size."""
    rows = [(np.random.default_rng(i).bytes(1_000_000), 0) for i in range(64)]
    path = write_parquet(tmp_path / "s.parquet", rows, row_group_size=1000, write_batch_size=2, use_dictionary=False)
    source = sources.open_source(str(path))
    monkeypatch.setattr(listings, "LARGE_ROW_GROUP", 50)
    table = listings.list_images(source).table
    assert "s.parquet has row groups of 64 rows" in caplog.text
    before = pa.total_allocated_bytes()
    pieces = readers.read_pieces(source.folder, source.kind, table, 4)
    assert [len(d) for d in next(pieces).data.to_pylist()] == [1_000_000] * 4
    assert pa.total_allocated_bytes() - before < 40_000_000


def test_sparse_rows_of_a_tar_do_not_read_all_of_it(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    data = [rng.bytes(300_000) for _ in range(30)]
    path = write_tar(tmp_path / "a.tar", [m for i in range(30) for m in sample(f"{i:02d}", data[i], 0)])
    source = sources.open_source(str(path))
    table = listings.list_images(source).table
    read, limit = [], pa.total_allocated_bytes() + 3_000_000
    for piece in readers.read_pieces(source.folder, source.kind, table.take([0, 29]), 2):
        read += piece.data.to_pylist()
        assert pa.total_allocated_bytes() < limit
    assert read == [data[0], data[29]]


def test_a_table_of_labels_beside_a_folder_of_pictures(tmp_path):
    """As Hugging Face's imagefolder has it."""
    write_folder(tmp_path, [(f"images/{i}.jpg", data) for i, data in enumerate(PICTURES)])
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + "\n".join(
        f"./images/{i}.jpg,{c}" for i, c in enumerate(CLASSES)))
    listing = listings.list_images(sources.open_source(str(tmp_path)))
    assert listing.class_names == ["n01", "n02", "n03"]


def test_what_is_no_class_folder_makes_no_class(tmp_path):
    write_folder(imagenet(tmp_path / "source"), [(".ipynb_checkpoints/x.png", PICTURES[0]), ("__MACOSX/y.png", PICTURES[0])])
    assert listings.list_images(sources.open_source(str(tmp_path / "source"))).class_names == ["n01", "n02", "n03"]
    write_folder(tmp_path / "parent", [("train/n01/x.png", PICTURES[0]), ("val/n01/y.png", PICTURES[0])])
    refused(tmp_path / "parent", r"its folders are train, val, not classes; name one of them as the source")


def test_links_that_lead_nowhere_are_named(tmp_path):
    (imagenet(tmp_path) / "n01" / "lost.JPEG").symlink_to(tmp_path / "nowhere")
    refused(tmp_path, r"n01/lost.JPEG' is a link that leads nowhere")


def test_a_file_that_vanishes_is_named(tmp_path):
    source = sources.open_source(str(imagenet(tmp_path)))
    rows = listings.list_images(source).table
    (tmp_path / "n01" / "n01_4.JPEG").unlink()
    with pytest.raises(ValueError, match=r"n01/n01_4.JPEG: cannot be read .* put it back"):
        list(readers.read_pieces(source.folder, source.kind, rows, 4))


def test_pictures_that_unpack_to_more_than_any_picture_are_rejected(tmp_path, monkeypatch):
    """A dictionary page and compression make them of nothing; rows are unpacked one at a time then."""
    monkeypatch.setattr(readers, "MAX_PICTURE_BYTES", 4 * 2**20)
    large = bytes(5 * 2**20)
    path = write_parquet(tmp_path / "bomb.parquet", [(large, 0)] * 120 + [(PICTURES[0], 0)], row_group_size=1000,
                         compression="zstd", use_dictionary=True, dictionary_pagesize_limit=2**24)
    assert path.stat().st_size < 2**20
    source = sources.open_source(str(tmp_path))
    rows = listings.list_images(source).table
    before = pa.total_allocated_bytes()
    pool, peaks, found = pa.default_memory_pool(), [], []
    for piece in readers.read_pieces(source.folder, source.kind, rows, 8):
        found += piece.data.to_pylist()
        peaks.append(pool.bytes_allocated() - before)
    assert found == [b""] * 120 + [PICTURES[0]]
    assert max(peaks) < 100 * 2**20


@pytest.mark.parametrize(("images", "options", "text"), [
    (lambda: pa.array([bytes(2**29)]), {"compression": "zstd", "use_dictionary": False}, "unpacks to pages of 53687"),
    (lambda: pa.array([bytes(2**26)] * 9), {"compression": "zstd", "dictionary_pagesize_limit": 2**30}, "to pages of"),
    (lambda: pa.array([b"a"] * 20), {"use_dictionary": False, "column_encoding": {"image": "DELTA_BYTE_ARRAY"}},
     "holds texts as differences from each other: not read"),
    (lambda: pa.nulls(2, pa.binary(2**20)), {}, r"column image is of type fixed_size_binary\[\d+\]; it must be of bytes"),
    (lambda: pa.array([[b"a"]] * 2), {}, r"column image is of type list<.*>; it must be of bytes"),
    (lambda: pa.array([1, 2]), {}, r"column image is of type int64; it must be of bytes")])
def test_pictures_that_take_memory_before_their_size_is_known_are_refused(tmp_path, images, options, text):
    path = tmp_path / "s.parquet"
    found = images()
    pq.write_table(pa.table({"image": found, "label": [0] * len(found)}), path, **options)
    source = sources.open_source(str(tmp_path))
    with pytest.raises(ValueError, match=rf"s.parquet: .*{text}"):
        list(readers.read_pieces(source.folder, source.kind, listings.list_images(source).table, 4))


@pytest.mark.parametrize("image", [pa.binary(), pa.struct([("bytes", pa.binary())]),
                                   pa.struct([("path", pa.int64()), ("bytes", pa.binary())])])
def test_pictures_without_names_among_empty_row_groups(tmp_path, image):
    rows = [bytes([i]) for i in range(10)]
    column = pa.array(rows if image == pa.binary() else [{"bytes": row} for row in rows], image)
    with pq.ParquetWriter(tmp_path / "s.parquet", pa.schema([("image", image)])) as writer:
        for start, stop in ((0, 0), (0, 3), (3, 3), (3, 10), (10, 10)):
            writer.write_table(pa.table({"image": column.slice(start, stop - start)}))
    source = sources.open_source(str(tmp_path), need_labels=False)
    listing = listings.list_images(source).table
    assert listing["id"].to_pylist() == [f"s.parquet#{i}" for i in range(10)]
    pieces = readers.read_pieces(source.folder, source.kind, listing, 4)
    assert [data for piece in pieces for data in piece.data.to_pylist()] == rows


def test_pictures_are_looked_at_whatever_other_columns_hold(tmp_path):
    """Large ones of their own come in parts, by what the index says of them."""
    more = np.random.default_rng(0).bytes(readers.MAX_SURVEYED_BYTES)
    pq.write_table(pa.table({"image": [bytes(2**29)], "more": [more]}), tmp_path / "s.parquet", compression="zstd",
                   use_dictionary=False)
    source = sources.open_source(str(tmp_path), need_labels=False)
    with pytest.raises(ValueError, match=r"s.parquet: .*unpacks to pages of 53687\d+ bytes: not read"):
        list(readers.read_pieces(source.folder, source.kind, listings.list_images(source).table, 4))


def test_pictures_that_unpack_to_much_together_come_in_smaller_pieces(tmp_path, monkeypatch):
    """Each of them may be as large as this, but a file of some kilobytes has 200."""
    monkeypatch.setattr(readers, "MAX_PIECE_BYTES", 8 * 2**20)
    large = [bytes([i]) * (3 * 2**20) for i in range(200)]
    path = write_parquet(tmp_path / "bomb.parquet", [(data, 0) for data in large], row_group_size=1000, compression="zstd",
                         use_dictionary=False, write_batch_size=2)
    assert path.stat().st_size < 2**20
    source = sources.open_source(str(tmp_path))
    rows = listings.list_images(source).table
    at = 0
    for piece in readers.read_pieces(source.folder, source.kind, rows, 100):
        assert piece.ids == rows["id"].to_pylist()[at:at + len(piece.ids)]
        assert piece.data.to_pylist() == large[at:at + len(piece.ids)]
        assert piece.data.nbytes < 12 * 2**20
        at += len(piece.ids)
    assert at == 200
    found = images.decode_pieces(readers.read_pieces(source.folder, source.kind, rows.slice(10, 5), 5), 32)
    assert [entry["id"] for entry in found.rejected] == rows["id"].to_pylist()[10:15]


def test_a_parquet_file_with_fewer_rows_than_were_listed_is_named(tmp_path):
    path = write_parquet(tmp_path / "s.parquet", [(bytes([i]), i) for i in range(20)], row_group_size=5)
    source = sources.open_source(str(path))
    rows = listings.list_images(source).table
    write_parquet(path, [(bytes([i]), i) for i in range(18)], row_group_size=5)
    with pytest.raises(ValueError, match=r"s.parquet: rows \d+..20 are not readable"):
        list(readers.read_pieces(source.folder, source.kind, rows, 4))


def test_a_mounted_file_system_has_another_chance(tmp_path, monkeypatch):
    """A real error of the kernel for a folder that is read as a file, until it is one."""
    monkeypatch.setattr(readers, "MOUNTED_SECONDS", (0.05, 0.05))
    write_folder(tmp_path, [("a/1.png", PICTURES[0])])
    source = sources.open_source(str(tmp_path))
    rows, path = listings.list_images(source).table, tmp_path / "a" / "1.png"
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"a/1.png: cannot be read .*; mend the access"):
        list(readers.read_pieces(source.folder, source.kind, rows, 4))

    def mend(seconds: float) -> None:
        path.rmdir()
        path.write_bytes(PICTURES[0])

    monkeypatch.setattr(readers, "time", types.SimpleNamespace(sleep=mend, perf_counter=time.perf_counter))
    [piece] = readers.read_pieces(source.folder, source.kind, rows, 4)
    assert piece.data.to_pylist() == [PICTURES[0]]


@pytest.mark.parametrize("compact", [True, False])
def test_texts_that_unpack_to_gigabytes_are_refused(tmp_path, compact):
    """In a dictionary, which is unpacked once here, or one by one, of which the pages tell the size."""
    rows = [(PICTURES[0], "x" * 2**20)] * 300
    path = write_parquet(tmp_path / "bomb.parquet", rows, row_group_size=300, compression="zstd", use_dictionary=compact,
                         dictionary_pagesize_limit=2**24)
    assert path.stat().st_size < 2**17
    source, before = sources.open_source(str(tmp_path)), pa.default_memory_pool().max_memory()
    with pytest.raises(ValueError, match=r"bomb.parquet: (label .*texts of more than 4096 bytes|unpacks to)"):
        listings.list_images(source)
    assert pa.default_memory_pool().max_memory() - before < 2**26


def test_more_rows_than_bytes_and_labels_of_no_known_type_are_refused(tmp_path):
    image = pa.array([{"bytes": b"", "path": ""}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    few = tmp_path / "few" / "x.parquet"
    few.parent.mkdir()
    pq.write_table(pa.table({"image": image, "label": [[1, 2]]}), few)
    refused(few.parent, r"x.parquet: column label is of type list<.*>; it must be of numbers or of texts")
    many = tmp_path / "many" / "x.parquet"
    many.parent.mkdir()
    rows = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**6, np.int32)), pa.array([0]))
    pq.write_table(pa.table({"image": pa.nulls(10**6, image.type), "label": rows}), many, row_group_size=10**6)
    refused(many.parent, r"x.parquet: not a readable Parquet file \(has 1000000 rows in \d+ bytes: not read\)")


def test_labels_of_any_length_are_not_read_from_tars(tmp_path):
    members = [*sample("a", PICTURES[0], 1), *sample("b", PICTURES[0], "9" * (2**20 + 1))]
    write_tar(tmp_path / "x.tar", members)
    refused(tmp_path, r"'b.cls' has 1048577 bytes, and a label at most 1048576")


@pytest.mark.parametrize("size", [b"\xff" * 10 + b"\xfe\x00", b"-0000000512\0"])
def test_a_tar_with_a_member_of_less_than_nothing_ends(tmp_path, size):
    """Python's reader goes back by as much, for ever."""
    write_tar(tmp_path / "x.tar", [*sample("a", PICTURES[0], 1), (".x", b"x")])
    data = bytearray((tmp_path / "x.tar").read_bytes())
    at = data.index(b".x\0")
    data[at + 124:at + 136] = size
    data[at + 148:at + 156] = b" " * 8
    data[at + 148:at + 156] = b"%06o\0 " % sum(data[at:at + 512])
    (tmp_path / "x.tar").write_bytes(data)
    refused(tmp_path, r"x.tar: not a readable tar")


def test_a_label_of_many_brackets_is_named(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.jpg", PICTURES[0]), ("a.json", b"[" * 100_000)])
    refused(tmp_path, r"x.tar: not a readable tar \('a.json' is no JSON")


def test_listing_a_tar_in_a_store_takes_no_request_a_picture(tmp_path, monkeypatch):
    s3.give_keys(monkeypatch)
    write_tar(tmp_path / "p" / "a.tar", [m for i in range(100) for m in sample(f"{i:02d}", os.urandom(200_000), 0)])
    with s3.serve() as store, s3.forwarded(store) as line:
        store.upload(tmp_path / "p", "p")
        source = sources.open_source(line.uri("p"))
        line.requests.clear()
        assert listings.list_images(source).table.num_rows == 100
        assert len(line.requests) <= 10


@pytest.mark.slow
def test_parquet_and_listings_are_read_on_when_a_store_answers_again(tmp_path, monkeypatch):
    """Its line is cut while a file is read, for longer than the SDK tries."""
    s3.give_keys(monkeypatch)
    monkeypatch.setattr(storage, "RETRY_SECONDS", (1.0, 2.0, 2.0))
    monkeypatch.setattr(readers, "STREAM_BYTES", 2**16)
    pictures = [os.urandom(300_000) for _ in range(30)]
    with s3.serve() as store, s3.forwarded(store) as line:
        store.upload(write_parquet(tmp_path / "p" / "a.parquet", [(data, 0) for data in pictures], row_group_size=5).parent,
                     "p")
        with line.cut(8.0):
            source = sources.open_source(line.uri("p"))
        listing = listings.list_images(source)
        listings.write_parts(line.uri("plan"), listing, [np.arange(30)])
        pieces, found = readers.read_pieces(source.folder, source.kind, listing.table, 4), []
        found += next(pieces).data.to_pylist()
        with line.cut(8.0):
            for piece in pieces:
                found += piece.data.to_pylist()
        assert found == pictures
        with line.cut(8.0):
            assert listings.read_parts(line.uri("plan"))[0].num_rows == 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_pictures_and_tars_are_read_on_when_a_store_answers_again(tmp_path, monkeypatch, kind):
    s3.give_keys(monkeypatch)
    pictures = [os.urandom(300_000) for _ in range(30)]
    if kind == "folder":
        write_folder(tmp_path / "p", [(f"a/{i:02d}.png", data) for i, data in enumerate(pictures)])
    else:
        write_tar(tmp_path / "p" / "a.tar", [m for i, data in enumerate(pictures) for m in sample(f"{i:02d}", data, 0)])
    with s3.serve() as store, s3.forwarded(store) as line:
        store.upload(tmp_path / "p", "p")
        source = sources.open_source(line.uri("p"))
        pieces, found = readers.read_pieces(source.folder, source.kind, listings.list_images(source).table, 4), []
        found += next(pieces).data.to_pylist()
        with line.cut(20.0):
            for piece in pieces:
                found += piece.data.to_pylist()
    assert found == pictures
