"""Training's batches: mirror images, micro-batches, both splits, reading ahead, no noise shared."""

import dataclasses
import itertools
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mdt_ray.data import latents
from mdt_ray.data.latent_reader import LatentReader
from mdt_ray.data.loader import Batch, Loader, LoaderConfig
from tests import s3
from tests.helpers import make_latents

CONFIG = LoaderConfig(batch_size=24, num_lanes=12, seed=0, num_classes=10, class_dropout_prob=0.5, num_tokens=16)
FLIP = dataclasses.replace(CONFIG, flip=True)
TENSORS = [f.name for f in dataclasses.fields(Batch) if f.name not in ("step", "mask_ratio_draw")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    make_latents(folder, num_images=130, num_files=3, flip=True)
    return folder


def loader(folder, config=CONFIG, rank=0, world_size=1, **arguments) -> Loader:
    return Loader(str(folder), latents.open_manifest(str(folder)), config, rank, world_size, **arguments)


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)


# Mirror images


def test_half_of_the_images_are_mirrored_by_a_coin_of_their_own(folder):
    """x_0 less the posterior's noise is the mean of the image or of its mirror image; all other draws stay."""
    plain, flipped = loader(folder), loader(folder, FLIP)
    coins = []
    for step in range(20):
        a, b = plain.batch(step), flipped.batch(step)
        assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in TENSORS if n != "x_0")
        images = a.images.numpy()
        both = [torch.from_numpy(flipped.reader.read(images, np.full(24, side))[0]).float() for side in (False, True)]
        z = (a.x_0 - both[0][:, 0]) / both[0][:, 1]  # the noise, which is the same
        coin = (b.x_0 - a.x_0).flatten(1).abs().amax(1) > 0
        expected = torch.where(coin[:, None, None, None], both[1][:, 0] + both[1][:, 1] * z, a.x_0)
        torch.testing.assert_close(b.x_0, expected)
        coins.append(coin)
    share = torch.stack(coins).float().mean().item()
    assert abs(share - 0.5) < 4 * 0.5 / 480**0.5
    assert not equal(flipped.batch(3), flipped.batch(3, attempt=1))


def test_mirror_images_that_are_missing_are_asked_for_by_name(tmp_path):
    make_latents(tmp_path, flip=False)
    with pytest.raises(ValueError, match=rf"flip = True: {tmp_path} holds no mirror images .*--flip`, .*--no-flip"):
        loader(tmp_path, FLIP)
    loader(tmp_path)


def test_without_flip_mirror_images_are_neither_read_nor_kept(folder):
    assert "moments_flip" not in loader(folder).reader._load(0)
    assert "moments_flip" in loader(folder, FLIP).reader._load(0)


# Micro-batches


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 5), (1, 12), (3, 4), (5, 2)])
def test_micro_batches_joined_are_the_whole_batch(folder, world_size, accumulation):
    for rank in range(world_size):
        with loader(folder, FLIP, rank, world_size, accumulation=accumulation) as reader:
            whole = reader.batch(7)
            parts = next(reader.batches(7))
        assert len(parts) == accumulation
        sizes = [len(part.t) // 2 for part in parts]  # in lanes
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
        for name in TENSORS:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        assert {part.mask_ratio_draw for part in parts} == {whole.mask_ratio_draw}
        assert {part.step for part in parts} == {7}


@pytest.mark.parametrize("accumulation", [0, 5])
def test_a_micro_batch_without_a_lane_is_refused(folder, accumulation):
    with pytest.raises(ValueError, match=rf"accumulation = {accumulation}: must .* 3 workers not exceed num_lanes = 12"):
        loader(folder, CONFIG, 0, 3, accumulation=accumulation)


# Both splits


def test_the_splits_partition_the_rows(folder):
    manifest = latents.open_manifest(str(folder))
    table = {split: [] for split in ("train", "validation")}
    for file in manifest.files:
        for row in pq.read_table(folder / file.name).to_pylist():
            table[row["split"]].append((row["label"], row["moments"]))
    assert len(table["validation"]) > 3
    for split, rows in table.items():
        reader = LatentReader(str(folder), manifest, max_groups=2, split=split)
        assert reader.num_images == sum(reader.group_sizes) == len(rows)
        order = np.random.default_rng(0).permutation(len(rows))
        moments, labels = reader.read(order)
        assert labels.tolist() == [rows[i][0] for i in order]
        assert [m.tobytes() for m in moments] == [rows[i][1] for i in order]
        assert len(reader._held) <= 2
        assert reader.read(order[:0])[0].shape == (0, 2, 4, 4, 4)


# Noise


def test_no_noise_is_shared_by_ranks_lanes_streams_or_steps(folder):
    draws = []
    for rank in range(3):
        reader = loader(folder, FLIP, rank, 3)
        for step, attempt in itertools.product(range(20), range(2)):
            batch = reader.batch(step, attempt)
            draws += [*batch.eps_full.flatten(1), *batch.eps_masked.flatten(1)]
            draws += [*torch.nn.functional.pad(batch.mask_noise, (0, 48))]
    assert len(torch.unique(torch.stack(draws), dim=0)) == len(draws) == 3 * 24 * 20 * 2


def test_the_posterior_noise_is_that_of_no_pass(folder):
    reader = loader(folder)
    batch = reader.batch(0)
    moments, _ = reader.reader.read(batch.images.numpy())
    mean, std = torch.from_numpy(moments).float().unbind(1)
    z = ((batch.x_0 - mean) / std).flatten()
    for eps in (batch.eps_full, batch.eps_masked):
        assert abs((z * eps.flatten()).mean().item()) < 4 / len(z) ** 0.5


# Reading ahead


def test_batches_read_ahead_are_those_asked_for_alone(folder):
    """Over several epochs; the loader that reads alone has no pool."""
    alone = loader(folder, FLIP)
    with loader(folder, FLIP) as ahead:
        for step, (batch,) in zip(range(30, 50), ahead.batches(30), strict=False):
            assert equal(batch, alone.batch(step))


@pytest.mark.parametrize("max_groups", [1, 3, 6])
def test_no_more_row_groups_are_held_than_allowed_and_the_batches_stay(folder, max_groups):
    """Also where one step needs more than may be held: then groups are read again."""
    alone, held = loader(folder), []
    with loader(folder) as ahead:
        reader = ahead.reader
        reader.max_groups = max_groups

        def load(group: int, load=reader._load) -> dict:
            held.append(len(reader._held))
            return load(group)

        reader._load = load
        for step, (batch,) in zip(range(10), ahead.batches(0), strict=False):
            held.append(len(reader._held))
            assert equal(batch, alone.batch(step))
    assert max(held) <= max_groups


def test_a_group_in_use_is_not_read_again(tmp_path):
    """What a loader may hold by itself is enough: in an epoch each lane reads a group once for each of its stretches."""
    make_latents(tmp_path, num_images=4000, num_files=2, validation_share=0)
    with loader(tmp_path, dataclasses.replace(CONFIG, batch_size=12), 0, 12) as ahead:
        reader, loaded = ahead.reader, []
        assert reader.max_groups < len(reader.groups)
        load = reader._load
        reader._load = lambda group: loaded.append(group) or load(group)
        lane = [int(batch.images) for (batch,) in itertools.islice(ahead.batches(0), 330)]
    groups = reader.groups_of(np.array(lane))
    pieces = 16 * 3  # 330 images in 16 stretches of 21 rows, each in at most 3 groups of 16
    assert len(np.unique(groups)) <= pieces
    assert len(loaded) <= pieces + 16  # the next epoch's first ones


def test_groups_are_fetched_side_by_side(folder):
    """No group comes back before four are on their way: one thread alone would wait for ever."""
    begun, four = itertools.count(1), threading.Event()
    with loader(folder) as ahead:
        load = ahead.reader._load

        def wait(group: int) -> dict:
            if next(begun) == 4:
                four.set()
            assert four.wait(timeout=60)
            return load(group)

        ahead.reader._load = wait
        (batch,) = next(ahead.batches(0))
    assert equal(batch, loader(folder).batch(0))


def test_threads_end_on_exit_also_when_nobody_takes_the_batches(folder):
    before = set(threading.enumerate())
    with loader(folder) as ahead:
        next(ahead.batches(0))
        assert len(set(threading.enumerate()) - before) > 1
    assert set(threading.enumerate()) == before


def test_an_error_while_fetching_is_raised_at_the_step_that_needs_it(folder):
    with loader(folder) as ahead:
        bad = int(ahead.reader.groups_of(ahead.batch(0).images.numpy())[0])
        steps = [n for n in range(20) if bad in ahead.reader.groups_of(loader(folder).batch(n).images.numpy())]
    with loader(folder) as ahead:
        load = ahead.reader._load

        def fail(group: int) -> dict:
            if group == bad:
                raise ValueError("chunk.parquet: row group 0 is not readable")
            return load(group)

        ahead.reader._load = fail
        batches = ahead.batches(0)
        for _ in range(steps[0]):
            next(batches)
        with pytest.raises(ValueError, match=r"chunk.parquet: row group 0 is not readable"):
            next(batches)


def test_batches_from_an_object_store_equal_those_from_disk(folder, monkeypatch):
    s3.give_keys(monkeypatch)
    with s3.serve() as store:
        store.upload(folder, "latents")
        uri = store.uri("latents")
        with Loader(uri, latents.open_manifest(uri), FLIP, 1, 3) as there, loader(folder, FLIP, 1, 3) as here:
            for (a,), (b,) in itertools.islice(zip(there.batches(5), here.batches(5), strict=True), 12):
                assert equal(a, b)
