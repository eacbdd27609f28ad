"""Nearest training latents against a brute force search, and the memorisation rule on copies and on unseen images."""

import json
import tracemalloc

import numpy as np
import pytest
import torch

from mdt_ray import storage
from mdt_ray.config import VaeConfig
from mdt_ray.data import images, latents, listings, readers, sources
from mdt_ray.data.latents import Manifest
from mdt_ray.data.vae import Vae, load_vae, to_unit_range
from mdt_ray.evaluation import neighbours
from mdt_ray.evaluation.neighbours import held_out, memorisation, nearest
from mdt_ray.report import figures
from mdt_ray.report.memorisation import memorisation as report

SCALE, SHIFT = 0.5, 0.25


def write(folder, means: np.ndarray, std: float | np.ndarray = 0.05, mirrored: np.ndarray | None = None,
          validation_share: float = 0.1, rows_per_group: int = 16, vae: dict | None = None) -> Manifest:
    """A finished folder of latents with these raw posterior means (N, C, h, w), in two files."""
    std = np.broadcast_to(std, means.shape)
    moments = np.stack([means, std], 1)  # (N, 2, C, h, w)
    flipped = None if mirrored is None else np.stack([mirrored, std], 1)
    files = []
    for number, rows in enumerate(np.array_split(np.arange(len(means)), 2)):
        table = latents.encode_table([f"image-{row}" for row in rows], [int(row) % 7 for row in rows], moments[rows],
                                     None if flipped is None else flipped[rows], validation_share, {})
        files.append(latents.write_file(str(folder), latents.file_name(number), table, rows_per_group))
    manifest = Manifest(identity="test", shape=list(means.shape[1:]), image_size=32, num_classes=7,
                        flip=flipped is not None, vae=vae or {"scale": SCALE, "shift": SHIFT, "weights_hash": "none"},
                        class_counts=[0] * 7, class_names=list("abcdefg"), files=files)
    latents.write_manifest(str(folder), manifest)
    return manifest


def normal(count: int, seed: int = 0, shape: tuple[int, ...] = (4, 4, 4)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float16)


def scaled(raw: np.ndarray) -> np.ndarray:
    return ((raw.astype(np.float32) - SHIFT) * SCALE).astype(np.float32)


def rows_of(manifest: Manifest, split: str) -> np.ndarray:
    """Numbers of the split's images."""
    starts = np.cumsum([0] + [f.num_rows for f in manifest.files])
    held = {int(start) + row for start, f in zip(starts, manifest.files, strict=False) for row in f.validation_rows}
    return np.array([row for row in range(manifest.num_rows) if (row in held) == (split == "validation")])


def brute_force(queries: np.ndarray, views: list[np.ndarray], num_nearest: int):
    """Distances, places and mirrored (Q, n) each, by all differences in float64; `views` as (N, C, h, w), scaled."""
    differences = [queries[:, None].astype(np.float64) - view[None] for view in views]
    each = np.stack([np.sqrt(np.square(d.reshape(*d.shape[:2], -1)).sum(-1)) for d in differences])  # (1 or 2, Q, N)
    distances = each.min(0)
    places = distances.argsort(1, kind="stable")[:, :num_nearest]
    return (np.take_along_axis(distances, places, 1), places, np.take_along_axis(each.argmin(0), places, 1))


def same(a: neighbours.Neighbours, b: neighbours.Neighbours) -> bool:
    return all(np.array_equal(x, getattr(b, name)) for name, x in vars(a).items())


# The search


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("offset", [0, 300])  # far from zero, float16 leaves many images equally near, and sums round badly
def test_agrees_with_brute_force(tmp_path, split, flip, offset):
    means = normal(300) + np.float16(offset)
    mirrored = normal(300, seed=1) + np.float16(offset) if flip else None
    manifest = write(tmp_path, means, mirrored=mirrored)
    queries = scaled(normal(20, seed=2) + np.float16(offset))
    found = nearest(queries, str(tmp_path), manifest, 4, split)
    rows = rows_of(manifest, split)
    views = [scaled(view[rows]) for view in (means, mirrored) if view is not None]
    distances, places, from_mirror = brute_force(queries, views, 4)
    assert found.distances == pytest.approx(distances, rel=1e-12)
    assert found.ids.tolist() == [[f"image-{rows[p]}" for p in places_] for places_ in places]
    assert np.array_equal(found.labels, rows[places] % 7)
    assert np.array_equal(found.mirrored, from_mirror.astype(bool))
    assert np.array_equal(found.latents, np.stack(views)[from_mirror, places])
    assert found.latents.dtype == np.float32


def test_copies_are_at_distance_zero_and_the_first_of_equal_ones_wins(tmp_path):
    means = normal(200)
    means[150] = means[100] = means[50]
    manifest = write(tmp_path, means, validation_share=0)
    found = nearest(scaled(means[[50, 7]]), str(tmp_path), manifest, 3)
    assert found.ids[0].tolist() == ["image-50", "image-100", "image-150"]
    assert found.distances[0].tolist() == [0, 0, 0]
    assert (found.ids[1, 0], found.distances[1, 0]) == ("image-7", 0)
    assert nearest(scaled(means[[50]]), str(tmp_path), manifest, 2).ids.tolist() == [["image-50", "image-100"]]


def test_a_folder_of_copies_only(tmp_path):
    manifest = write(tmp_path, np.repeat(normal(1), 100, axis=0), validation_share=0)
    found = nearest(scaled(normal(1)), str(tmp_path), manifest, 3)
    assert found.ids.tolist() == [["image-0", "image-1", "image-2"]]
    assert found.distances.tolist() == [[0, 0, 0]]


def test_an_image_and_its_mirror_image_count_once(tmp_path):
    means = normal(100)
    manifest = write(tmp_path, means, mirrored=means[..., ::-1], validation_share=0)
    found = nearest(scaled(means[[3, 60]][..., ::-1]), str(tmp_path), manifest)
    assert found.ids[:, 0].tolist() == ["image-3", "image-60"]
    assert found.distances[:, 0].tolist() == [0, 0]
    assert found.mirrored[:, 0].all()
    assert np.array_equal(found.latents[:, 0], scaled(means[[3, 60]][..., ::-1]))
    assert [len(set(ids)) for ids in found.ids.tolist()] == [3, 3]


@pytest.mark.parametrize("rows_per_group", [1, 7, 64, 1000])
@pytest.mark.parametrize("block_values", [1, 500, 2**21])
def test_the_cut_into_blocks_changes_no_bit(tmp_path, monkeypatch, rows_per_group, block_values):
    means = normal(150)
    means[140] = means[9]
    queries = np.concatenate([scaled(normal(10, seed=2)), scaled(means[[9]]), np.full((1, 4, 4, 4), 9e29, np.float32)])
    expected = nearest(queries, str(tmp_path / "a"), write(tmp_path / "a", means))
    monkeypatch.setattr(neighbours, "BLOCK_VALUES", block_values)
    assert same(nearest(queries, str(tmp_path / "b"), write(tmp_path / "b", means, rows_per_group=rows_per_group)), expected)


def test_memory_does_not_grow_with_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_VALUES", 2**14)
    queries, peaks = scaled(normal(8, seed=2, shape=(4, 8, 8))), {}
    for count in (1000, 1000, 8000):  # (the first one also imports and fills caches)
        folder = tmp_path / str(count)
        # (An index grows with its row groups, and is held as bytes while it is looked at.)
        manifest = write(folder, normal(count, shape=(4, 8, 8)), rows_per_group=200)
        tracemalloc.start()
        nearest(queries, str(folder), manifest)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[8000] < 1.3 * peaks[1000]
    assert peaks[8000] < 8000 * 4 * 8 * 8 * 2 / 4  # a quarter of the means alone


@pytest.mark.parametrize(("queries", "message"), [
    (normal(3, shape=(4, 4, 8)), r"queries: have shape \(3, 4, 4, 8\), but must be \(Q, 4, 4, 4\)"),
    (normal(3)[0], r"queries: have shape \(4, 4, 4\)"),
    (normal(0), r"queries: have shape \(0, 4, 4, 4\), .* with Q > 0"),
    (np.where(np.arange(3)[:, None, None, None] == 1, np.nan, normal(3)), "queries: latent 1 is not finite"),
    (np.full((1, 4, 4, 4), 1e30), "queries: latent 0 is not finite or not below 1e")])
def test_bad_queries_are_refused(tmp_path, queries, message):
    manifest = write(tmp_path, normal(100))
    for search in (nearest, memorisation):
        with pytest.raises(ValueError, match=message):
            search(queries.astype(np.float32), str(tmp_path), manifest)


def test_a_split_of_too_few_images_is_refused(tmp_path):
    manifest = write(tmp_path, normal(20), validation_share=0)
    with pytest.raises(ValueError, match=r"split = 'validation': .* holds 0 such images, but num_nearest = 3"):
        nearest(scaled(normal(2)), str(tmp_path), manifest, split="validation")
    with pytest.raises(ValueError, match=r"split = 'train': .* holds 20 such images, but num_nearest = 21"):
        nearest(scaled(normal(2)), str(tmp_path), manifest, 21)
    with pytest.raises(ValueError, match="num_nearest = 0: must be at least 1"):
        nearest(scaled(normal(2)), str(tmp_path), manifest, 0)


# The rule


def test_copies_are_memorised_and_unseen_images_are_not(tmp_path):
    means = normal(3000)
    manifest = write(tmp_path, means)
    train, unseen = rows_of(manifest, "train"), rows_of(manifest, "validation")
    copies = memorisation(scaled(means[train[:100]]), str(tmp_path), manifest).numbers()
    assert (copies["memorised_share"], copies["least_distance"]) == (1, 0)
    assert copies["num_held_out"] == len(unseen)
    assert copies["expected_share"] == 3 / (len(unseen) + 1)  # 1% of about 300
    same_images = memorisation(held_out(str(tmp_path), manifest), str(tmp_path), manifest).numbers()
    assert same_images["memorised_share"] == 3 / len(unseen)
    assert same_images["median_distance"] == same_images["held_out_median_distance"]
    others = memorisation(scaled(normal(1000, seed=9)), str(tmp_path), manifest).numbers()
    assert 0 < others["memorised_share"] < 0.03
    half = memorisation(scaled(np.concatenate([means[train[:50]], normal(50, seed=9)])), str(tmp_path), manifest).numbers()
    assert half["memorised_share"] == pytest.approx(0.5, abs=0.03)


def test_copies_are_told_where_the_posterior_is_wide(tmp_path):
    """What a model that knows the training images by heart draws lies farther from their means than unseen means do."""
    means, std = normal(2000) * np.float16(0.5), 0.55
    manifest = write(tmp_path, means, std)
    train, unseen = rows_of(manifest, "train"), rows_of(manifest, "validation")
    noise = std * np.random.default_rng(5).normal(size=(len(train), 4, 4, 4))
    by_heart = memorisation(scaled(means[train] + noise), str(tmp_path), manifest)
    assert by_heart.numbers()["memorised_share"] > 0.5
    of_means = nearest(scaled(means[unseen]), str(tmp_path), manifest).distances[:, 0]
    assert np.median(by_heart.nearest) > np.median(of_means)
    new = normal(500, seed=8) * np.float16(0.5) + std * np.random.default_rng(6).normal(size=(500, 4, 4, 4))
    assert memorisation(scaled(new), str(tmp_path), manifest).numbers()["memorised_share"] < 0.05


def test_held_out_images_are_always_the_same_and_not_too_many(tmp_path, monkeypatch):
    means = normal(1000)
    manifest = write(tmp_path, means, std=0)
    unseen = scaled(means[rows_of(manifest, "validation")])
    assert np.array_equal(held_out(str(tmp_path), manifest), unseen)
    monkeypatch.setattr(neighbours, "MAX_HELD_OUT", 20)
    some = held_out(str(tmp_path), manifest)
    assert np.array_equal(some, held_out(str(tmp_path), manifest))
    places = [int(np.flatnonzero((unseen == one).all((1, 2, 3)))[0]) for one in some]
    assert len(set(places)) == 20
    assert max(places) > len(unseen) // 2 > min(places)
    assert memorisation(scaled(means[:5]), str(tmp_path), manifest).numbers()["num_held_out"] == 20


def test_without_held_out_images_there_is_no_share(tmp_path):
    means = normal(50)
    manifest = write(tmp_path, means, validation_share=0)
    numbers = memorisation(scaled(means[:5]), str(tmp_path), manifest).numbers()
    assert numbers == {"num_samples": 5, "num_held_out": 0, "least_distance": 0.0, "median_distance": 0.0,
                       "held_out_median_distance": None, "threshold": None, "memorised_share": None, "expected_share": None}


# The picture


@pytest.fixture(scope="module")
def digits_vae() -> Vae:
    return load_vae(VaeConfig(path="digits"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory, digits_vae):
    """A folder of the first 200 digits' latents with mirror images, and their moments (200, 2, C, h, w)."""
    source = sources.open_source("digits")
    piece = next(readers.read_pieces(source.folder, source.kind, listings.list_images(source).table, 200))
    x = to_unit_range(torch.from_numpy(images.decode_piece(piece, 32).images))
    moments, flipped = digits_vae.encode(x).numpy(), digits_vae.encode(x.flip(-1)).numpy()
    folder = tmp_path_factory.mktemp("digits")
    write(folder, moments[:, 0], moments[:, 1], flipped[:, 0],
          vae={"scale": digits_vae.scale, "shift": digits_vae.shift, "weights_hash": digits_vae.weights_hash})
    return str(folder), moments


def decoded(vae: Vae, x_0: np.ndarray) -> np.ndarray:
    return vae.decode(torch.from_numpy(x_0), round_pixels=True).permute(0, 2, 3, 1).numpy()


def test_the_picture_shows_the_suspects_first_beside_their_originals(digits, digits_vae):
    folder, moments = digits
    manifest = latents.read_manifest(folder)
    copied = rows_of(manifest, "train")[[30, 90]]
    noise = np.random.default_rng(1).normal(size=(3, *manifest.shape)) * 3
    samples = np.concatenate([noise, moments[copied, 0] * digits_vae.scale]).astype(np.float32)
    samples[4] += 0.01
    pictures = decoded(digits_vae, samples)
    numbers, png = report(samples, pictures, folder, digits_vae, num_shown=3)
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers["memorised_share"] == 2 / 5
    assert [s["sample"] for s in numbers["suspects"][:2]] == [3, 4]
    assert [s["id"] for s in numbers["suspects"][:2]] == [f"image-{row}" for row in copied]
    found = nearest(samples, folder, manifest)
    shown = [s["sample"] for s in numbers["suspects"]]
    assert np.abs(pictures[3].astype(int) - decoded(digits_vae, found.latents[3])[0]).max() <= 2
    captions = [["", *(f"{found.distances[i, k]:#.3g}" + ", mirrored" * int(found.mirrored[i, k]) for k in range(3))]
                for i in shown]
    assert png == figures.grid([np.concatenate([pictures[[i]], decoded(digits_vae, found.latents[i])]) for i in shown],
                               ["sample 3\nmemorised?", "sample 4\nmemorised?", f"sample {shown[2]}"],
                               ["sample", "nearest", "2nd nearest", "3rd nearest"], 1.0, captions)


def test_what_does_not_fit_the_folder_is_refused(digits, digits_vae, tmp_path):
    folder, _ = digits
    samples = normal(2).astype(np.float32)
    with pytest.raises(ValueError, match="sample_pictures: 1, but must be as many as sample_latents, 2"):
        report(samples, decoded(digits_vae, samples)[:1], folder, digits_vae)
    write(tmp_path, normal(50))
    with pytest.raises(ValueError, match=r"vae: has the weights .*, but .* was made with none"):
        report(samples, decoded(digits_vae, samples), str(tmp_path), digits_vae)
    storage.remove(storage.join(str(tmp_path), "chunk-00001.parquet"))
    with pytest.raises(ValueError, match=r"chunk-00001\.parquet: missing"):
        report(samples, decoded(digits_vae, samples), str(tmp_path), digits_vae)
