"""precompute on a real Ray: every image once, bad ones listed, the same bytes whatever happens, clear refusals."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mdt_ray import config_io, run_folder, storage
from mdt_ray.config import PrecomputeConfig, VaeConfig
from mdt_ray.data import images, latents, listings, readers, sources
from mdt_ray.data.vae import load_vae, to_unit_range
from mdt_ray.jobs import encode
from mdt_ray.jobs.precompute import cut, precompute, prepare
from tests.data.pictures import encoded, sample, write_folder, write_parquet, write_tar

pytestmark = pytest.mark.ray


def encoding(source, output, **changes) -> PrecomputeConfig:
    return config_io.override(PrecomputeConfig(), {
        "source": str(source), "output": str(output), "vae.path": "digits", "image_size": 32, "chunk_size": 4,
        "encode_batch_size": 4, "validation_share": 0.2} | changes)


def rows_of(folder, manifest) -> list[dict]:
    return pa.concat_tables([pq.read_table(folder / f.name) for f in manifest.files]).to_pylist()


def parquet(root, count: int = 12):
    root.mkdir(parents=True, exist_ok=True)
    return write_parquet(root / "s.parquet", [(encoded(seed=i), i % 3) for i in range(count)])


def folders(root, count: int = 12):
    return write_folder(root, [(f"{'cab'[i % 3]}/{i}.png", encoded(seed=i)) for i in range(count)])


def tars(root, count: int = 12):
    for tar in range(2):
        members = [m for i in range(tar, count, 2) for m in sample(f"{i}", encoded(seed=i), i % 3, suffix="png")]
        write_tar(root / f"{tar}.tar", members)
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory, ray_session):
    """A finished run, to be left as it is: twelve pictures in `source`, their latents in `out`."""
    root = tmp_path_factory.mktemp("finished")
    precompute(encoding(folders(root / "source"), root / "out"))
    return root


# What is written


@pytest.mark.parametrize("make", [folders, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (parquet, tars))])
def test_every_image_is_encoded_once_and_the_job_says_so(tmp_path, ray_session, caplog, make):
    caplog.set_level("INFO")
    manifest = precompute(encoding(make(tmp_path / "source"), tmp_path / "out", flip=True))
    assert (manifest.num_rows, manifest.num_classes, manifest.shape, manifest.num_rejected) == (12, 3, [4, 4, 4], 0)
    assert manifest.class_counts == [4, 4, 4]
    assert manifest.class_names == (["a", "b", "c"] if make is folders else ["0", "1", "2"])
    assert [f.num_rows for f in manifest.files] == [4, 4, 4]
    rows = rows_of(tmp_path / "out", manifest)
    number = {row["id"]: int("".join(c for c in row["id"].removeprefix("0/").removeprefix("1/") if c.isdecimal()))
              for row in rows}
    assert sorted(number.values()) == list(range(12))
    # The stored moments are the VAE's, of the image and of its mirror image.
    vae = load_vae(VaeConfig(path="digits"))
    for row in rows:
        seed = number[row["id"]]
        assert row["label"] == ({0: 2, 1: 0, 2: 1}[seed % 3] if make is folders else seed % 3)
        pixels = images.center_crop(images.decode_image(encoded(seed=seed)), 32)
        for column, picture in (("moments", pixels), ("moments_flip", pixels[:, ::-1])):
            expected = vae.encode(to_unit_range(torch.from_numpy(picture[None].copy())))[0].numpy()
            found = np.frombuffer(row[column], np.float16).reshape(2, 4, 4, 4)
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    for pattern in (r"12 images of 3 classes in \d+ files", r"12 latents in 3 files, 0.0 MB; 0 images rejected",
                    r"latents per channel: mean( -?\d+\.\d{3}){4}, std( \d+\.\d{3}){4}",
                    r"images/s in .* work: reading \d+%, decoding \d+%, encoding \d+%, writing \d+%; encoders waited \d+%"):
        assert re.search(pattern, caplog.text), pattern


def test_pictures_are_shuffled_over_the_files_and_other_sources_are_not(tmp_path):
    listing = listings.list_images(sources.open_source(str(folders(tmp_path, 60))))
    shuffled, same, in_order = (cut(listing, kind, 13) for kind in ("pictures", "pictures", "parquet"))
    assert [len(part) for part in shuffled] == [len(part) for part in in_order] == [12] * 5
    assert [part.tolist() for part in shuffled] == [part.tolist() for part in same]
    assert np.concatenate(in_order).tolist() == sorted(np.concatenate(shuffled)) == list(range(60))
    labels = listing.table["label"].to_numpy()
    assert all(set(labels[part]) == {0, 1, 2} for part in shuffled)


def test_the_statistics_are_those_of_draws_from_the_posteriors(finished):
    manifest = latents.open_manifest(str(finished / "out"))
    rows = [np.frombuffer(row["moments"], np.float16).reshape(2, 4, 4, 4) for row in rows_of(finished / "out", manifest)]
    mean, std = torch.from_numpy(np.stack(rows)).double().unbind(1)
    draws = mean + std * torch.randn(800, *mean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert manifest.statistics["mean"] == pytest.approx(draws.mean((0, 1, 3, 4)).tolist(), abs=0.01)
    assert manifest.statistics["std"] == pytest.approx(draws.std((0, 1, 3, 4)).tolist(), rel=0.01)


def encode_here(config: PrecomputeConfig) -> np.ndarray:
    """A source's latents by the real tasks and the real encoder, in this process: (n, 1 or 2, 2, C, h, w)."""
    config, source, _ = prepare(config)
    rows = listings.list_images(source).table
    encoder = encode.Encoder(config_io.to_dict(config), source.folder, source.kind, "run", "", None)
    pieces = readers.read_pieces(source.folder, source.kind, rows, encode.piece_size(config))
    decoded = [images.decode_piece(piece, config.image_size, config.exif_rotation) for piece in pieces]
    return np.concatenate([encoder._encode(piece.images) for piece in decoded])


def test_bf16_is_near_fp32_and_another_run(finished):
    full, half = (encode_here(encoding(finished / "source", finished / "none", precision=p)) for p in ("fp32", "bf16"))
    assert 0 < np.abs(full.astype(float) - half).max() < 0.1
    with pytest.raises(ValueError, match=r"precision: 'fp32' -> 'bf16'"):
        precompute(encoding(finished / "source", finished / "out", precision="bf16"))


def test_the_last_batch_does_not_change_an_image(tmp_path):
    """An encoder fills its last batch, so that an image's latents do not depend on how many follow it."""
    found = []
    for count in (6, 5):
        write_parquet(tmp_path / f"{count}.parquet", [(encoded(seed=i), 0) for i in range(count)])
        found.append(encode_here(encoding(tmp_path / f"{count}.parquet", tmp_path / "out")))
    assert np.array_equal(found[0][:5], found[1])


def test_pieces_are_whole_batches_whatever_the_size():
    for size, batch in ((32, 64), (256, 64), (512, 8), (1024, 3)):
        config = PrecomputeConfig(image_size=size, encode_batch_size=batch)
        assert encode.piece_size(config) % batch == 0
    assert encode.piece_size(PrecomputeConfig(image_size=256, encode_batch_size=64)) == 64


# Bad images


def test_bad_images_are_listed_and_the_job_goes_on(tmp_path, ray_session):
    """The first chunk has bad images only, and so no file."""
    good = encoded()
    write_parquet(tmp_path / "s.parquet", [(b"x", 0)] * 4 + [(good, 0), (b"", 1), (good[:60], 0), (good, 1)])
    config = encoding(tmp_path / "s.parquet", tmp_path / "out", max_rejected=0.8)
    manifest = precompute(config)
    assert (manifest.num_rows, manifest.num_rejected) == (2, 6)
    assert [f.name for f in manifest.files] == ["chunk-00001.parquet"]
    rejected = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert [r["id"] for r in rejected] == [f"s-{i}.png" for i in (0, 1, 2, 3, 5, 6)]
    assert rejected[4]["reason"] == "no bytes"
    assert "not a readable image" in rejected[5]["reason"]
    assert precompute(config) == manifest


@pytest.mark.slow
def test_too_many_bad_images_stop_the_job_and_more_patience_goes_on(tmp_path, ray_session):
    write_parquet(tmp_path / "s.parquet", [(encoded(seed=i) if i % 3 else b"x", 0) for i in range(12)])
    with pytest.raises(ValueError, match=r"of 12 images are unreadable so far, such as 's-\d.png' .*: more than"):
        precompute(encoding(tmp_path / "s.parquet", tmp_path / "out", max_rejected=0.1))
    assert pq.read_table(tmp_path / "out" / "rejected.parquet").num_rows >= 2
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out" / "lock.json").exists()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("chunks/*.json")}
    manifest = precompute(encoding(tmp_path / "s.parquet", tmp_path / "out", max_rejected=0.5))
    assert (manifest.num_rows, manifest.num_rejected) == (8, 4)
    assert {p: p.stat().st_mtime_ns for p in done} == done


@pytest.mark.slow
def test_no_readable_image_is_refused(tmp_path, ray_session):
    write_parquet(tmp_path / "s.parquet", [(b"x", 0)] * 3)
    with pytest.raises(ValueError, match="no readable image"):
        precompute(encoding(tmp_path / "s.parquet", tmp_path / "out", max_rejected=1.0))


KILLS = b"this one kills"
"""Stands for a picture whose bytes crash the decoder."""


def deadly_decoder():
    """A task that decodes, but whose process dies of one picture: a real death of a real process."""
    import ray

    @ray.remote(num_cpus=1, max_retries=1)
    def decode_or_die(piece, image_size, exif_rotation):
        if any(data.as_py() == KILLS for data in piece.data):
            os._exit(1)
        return images.decode_piece(piece, image_size, exif_rotation)

    return decode_or_die


def test_a_picture_that_kills_its_decoder_is_rejected_alone(tmp_path, ray_session, monkeypatch):
    write_parquet(tmp_path / "s.parquet", [(KILLS if i == 2 else encoded(seed=i), 0) for i in range(8)])
    config, source, run = prepare(encoding(tmp_path / "s.parquet", tmp_path / "out", chunk_size=8))
    listing = listings.list_images(source)
    listings.write_parts(str(tmp_path / "out" / listings.PLAN), listing, cut(listing, source.kind, 8))
    monkeypatch.setattr(encode, "decode_piece", deadly_decoder())
    encoder = encode.Encoder(config_io.to_dict(config), source.folder, source.kind, run["name"], "", None)
    pieces = list(encoder._decoded(0))
    assert len(pieces) == 1
    assert pieces[0].rejected == [{"id": "s-2.png", "reason": "its decoder died"}]
    assert pieces[0].ids == [f"s-{i}.png" for i in (0, 1, 3, 4, 5, 6, 7)]
    assert len(pieces[0].images) == 7


def test_a_lost_mailbox_costs_nothing(ray_session):
    import ray

    from mdt_ray.jobs import progress

    rows = []
    with progress.watched(rows.append, interval_s=0.05) as mailbox:
        ray.get(mailbox.put.remote({"chunk": 0, "num_read": 1}, 0))
        while not rows:
            pass
        ray.kill(mailbox)
    assert rows == [{"chunk": 0, "num_read": 1}]


def test_workers_that_leave_no_cpu_are_refused(tmp_path, ray_session):
    with pytest.raises(ValueError, match=r"workers.num_workers = 99: with 1 CPUs each they take all of the"):
        precompute(encoding(parquet(tmp_path / "source"), tmp_path / "out", **{"workers.num_workers": 99}))
    assert ray_session.data.DataContext.get_current().execution_no_progress_timeout_s == -1, "a chunk may take an hour"


# Again


def test_a_finished_precompute_does_nothing_and_a_damaged_file_is_rebuilt(finished, tmp_path, ray_session):
    shutil.copytree(finished / "out", tmp_path / "out")
    config, first = encoding(finished / "source", tmp_path / "out"), latents.open_manifest(str(finished / "out"))

    def times() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}

    before = times()
    assert precompute(config) == first
    assert times() == before
    path = tmp_path / "out" / first.files[1].name
    path.write_bytes(path.read_bytes()[:100])
    assert precompute(config) == first
    after = times()
    changed = [os.path.basename(p) for p in before if before[p] != after[p] and p.endswith("parquet")]
    assert sorted(changed) == ["chunk-00001.parquet", "rejected.parquet"]


@pytest.mark.slow
def test_what_was_deleted_of_a_finished_precompute_is_made_again(finished, tmp_path, ray_session):
    shutil.copytree(finished / "out", tmp_path / "out")
    config, first = encoding(finished / "source", tmp_path / "out"), latents.open_manifest(str(finished / "out"))
    before = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").iterdir()}
    for name in ("manifest.json", first.files[1].name, "rejected.parquet", "source.parquet"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "chunk-00000.parquet.tmp-1234").write_bytes(b"left by a kill")
    assert precompute(config) == first
    assert {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / "rejected.parquet").unlink()
    assert precompute(config) == first
    assert (tmp_path / "out" / "rejected.parquet").exists()


@pytest.mark.slow
def test_chunks_of_another_run_are_not_taken_over(finished, tmp_path, ray_session):
    """Even where somebody deleted what says whose they are."""
    shutil.copytree(finished / "out", tmp_path / "out")
    for name in ("run.json", "manifest.json"):
        (tmp_path / "out" / name).unlink()
    found = precompute(encoding(finished / "source", tmp_path / "out", precision="bf16"))
    others = {f.sha256 for f in latents.open_manifest(str(finished / "out")).files}
    assert (found.precision, len(found.files), others & {f.sha256 for f in found.files}) == ("bf16", len(others), set())


def test_a_changed_source_or_setting_is_refused(finished, tmp_path):
    root, out = finished / "source", finished / "out"
    with pytest.raises(ValueError, match=r"validation_share: 0.2 -> 0.3"):
        precompute(encoding(root, out, validation_share=0.3))
    with pytest.raises(ValueError, match=r"another run; these settings differ:\n  exif_rotation: False -> True"):
        precompute(encoding(root, out, exif_rotation=True))
    shutil.copytree(root, tmp_path / "moved")
    picture = root / "a" / "1.png"
    before = picture.stat()
    os.utime(picture, ns=(7, 7))
    try:
        with pytest.raises(ValueError, match=r"the source has changed since this run began:\n  a/1.png: modified since\n"):
            precompute(encoding(root, out))
    finally:
        os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "moved" / "a" / "1.png").write_bytes(encoded(seed=99, size=(50, 50)))
    with pytest.raises(ValueError, match=r"a/1.png: \d+ -> \d+ bytes"):
        precompute(encoding(tmp_path / "moved", out))


def test_bad_settings_are_refused_before_ray_starts(tmp_path):
    with pytest.raises(ValueError, match=r"image_size = 36: must be divisible by 8, the downscaling of vae.path = 'digits'"):
        precompute(encoding(parquet(tmp_path / "source"), tmp_path / "out", image_size=36))
    with pytest.raises(ValueError, match=r"vae.path = '.*none': no AutoencoderKL there"):
        precompute(encoding(tmp_path / "source", tmp_path / "out", **{"vae.path": str(tmp_path / "none")}))
    with pytest.raises(ValueError, match=r"vae.path = '.*none': no AutoencoderKL there"):
        load_vae(VaeConfig(path=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"output = '.*source/out': lies in the source"):
        precompute(encoding(tmp_path / "source", tmp_path / "source" / "out"))
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "source").iterdir())) == 1
    parquet(tmp_path / "b?1")
    with pytest.raises(ValueError, match="no AutoencoderKL there"):  # and not that the one lies in the other
        precompute(encoding(tmp_path / "b?1", tmp_path / "b?2", **{"vae.path": str(tmp_path / "none")}))


def test_latents_that_are_not_finite_are_refused(tmp_path):
    config = encoding(parquet(tmp_path / "source"), tmp_path / "out")
    encoder = encode.Encoder(config_io.to_dict(config), "", "parquet", "run", "", None)
    moments = np.zeros((3, 1, 2, 4, 4, 4), np.float16)
    moments[1, 0, 0, 0, 0, 0] = np.inf
    with pytest.raises(ValueError, match=r"image 'b': its latent is not finite in fp32; use --precision fp32"):
        encoder._write(0, ["a", "b", "c"], [0, 0, 0], moments)


def test_an_encoder_whose_run_was_taken_over_writes_nothing(tmp_path):
    config = encoding(parquet(tmp_path / "source"), tmp_path / "out")
    encoder = encode.Encoder(config_io.to_dict(config), "", "parquet", "run", run_folder.Claim(config.output, "mine"), None)
    storage.write_json(str(tmp_path / "out" / "lock.json"), {"token": "another's"})
    with pytest.raises(RuntimeError, match="another run has taken over"):
        encoder._write(0, ["a"], [0], np.zeros((1, 1, 2, 4, 4, 4), np.float16))
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "lock.json"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """A real limit of the kernel on the size of files stands for the full disk."""
    code = ("import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "from mdt_ray import storage\n"
            f"storage.write_bytes({str(tmp_path / 'x.bin')!r}, bytes(5000))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "x.bin: could not be written (File too large); make room" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_chunks_say_what_they_hold(finished):
    folder = finished / "out"
    entry = json.loads((folder / "chunks" / "00001.json").read_text())
    assert (entry["num_read"], entry["rejected"], sum(entry["class_counts"].values())) == (4, [], 4)
    manifest = latents.open_manifest(str(folder))
    assert storage.sha256((folder / "chunk-00001.parquet").read_bytes()) == entry["file"]["sha256"]
    assert manifest.files[1].sha256 == entry["file"]["sha256"]
