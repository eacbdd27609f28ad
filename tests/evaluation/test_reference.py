"""Reference statistics in .npz files: ADM's as they are published, ours with facts, and what is refused."""

import json
import os
import re

import numpy as np
import pytest

from mdt_ray.data import arrays
from mdt_ray.evaluation import reference as references
from mdt_ray.evaluation.reference import Reference, check_fits, is_statistics, read_reference, write_reference

FACTS = {"extractor": "digits", "weights_hash": "ab" * 32, "transform": "adm-crop", "image_size": 8, "num_images": 100,
         "source": "digits"}
MEASURED = {"extractor": "digits", "weights_hash": "ab" * 32, "transform": "adm-crop", "image_size": 8}


def gaussian(width, seed=0):
    """Mean and covariance of random features."""
    features = np.random.default_rng(seed).normal(size=(3 * width, width))
    return features.mean(0), np.cov(features.T)


def pictures(count=7, side=8):
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def ours(**changes):
    (mu, sigma), (mu_s, sigma_s) = gaussian(5), gaussian(4, seed=1)
    return Reference(**{"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s, "facts": FACTS, **changes})


def official(path, save=np.savez, **changes):
    """A file with ADM's keys (or others, or without: None), small."""
    found = ours()
    members = {"arr_0": pictures(), "mu": found.mu, "sigma": found.sigma, "mu_s": found.mu_s, "sigma_s": found.sigma_s,
               **changes}
    save(path, **{key: array for key, array in members.items() if array is not None})
    return str(path)


# Ours.

def test_what_is_written_is_read(tmp_path):
    uri, images, expected = str(tmp_path / "x.npz"), pictures(), ours()
    write_reference(uri, expected, iter([images[:3], images[3:]]), images.shape)
    found = read_reference(uri)
    for name in ("mu", "sigma", "mu_s", "sigma_s"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.facts == {**FACTS, "format": 1}
    assert found.has_images
    np.testing.assert_array_equal(arrays.read_images(found.images, 0, 7), images)
    with np.load(uri, allow_pickle=False) as read:
        assert list(read) == ["arr_0", "mu", "sigma", "mu_s", "sigma_s", "facts"], "as ADM's evaluator looks for them"
        assert json.loads(str(read["facts"])) == found.facts
    write_reference(str(tmp_path / "again.npz"), found, [images], images.shape)
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "x.npz").read_bytes()


def test_the_fingerprint_is_of_numbers_and_pictures_wherever_they_were_read(tmp_path):
    images = pictures()

    def of(name, images=images, **changes):
        write_reference(str(tmp_path / name), ours(**changes), [images], images.shape)
        return read_reference(str(tmp_path / name)).fingerprint

    first = of("a.npz")
    assert of("b.npz", facts=FACTS | {"source": "s3://bucket/digits"}) == first
    assert len({first, of("c.npz", mu=ours().mu + 1), of("d.npz", images=255 - images)}) == 3


def test_without_pictures_and_without_spatial_features(tmp_path):
    uri = str(tmp_path / "x.npz")
    write_reference(uri, ours(mu_s=None, sigma_s=None))
    found = read_reference(uri)
    assert (found.mu_s, found.sigma_s, found.has_images) == (None, None, False)


@pytest.mark.parametrize(("changes", "shape", "message"), [
    ({"mu": np.zeros(6)}, None, r"mu has shape \(6,\) and sigma \(5, 5\)"),
    ({"sigma_s": None}, None, r"mu_s has shape \(4,\) and sigma_s \(\)"),
    ({"mu": np.full(5, np.nan)}, None, "5 of 5 values of mu are not finite"),
    ({"facts": {}}, None, r"facts are \['format'\], but must be \['extractor'"),
    ({"facts": {**FACTS, "extractor": None}}, None, "with a name as extractor"),
    ({}, (7, 9, 9, 3), "pictures of 9x9, but facts' image_size is 8"),
    ({}, (8, 8, 8, 3), "7 pictures came, but 8 were announced"),
])
def test_what_does_not_fit_is_not_written(tmp_path, changes, shape, message):
    uri = tmp_path / "x.npz"
    with pytest.raises(ValueError, match=rf"{uri}: .*{message}"):
        write_reference(str(uri), ours(**changes), [pictures()], shape)
    assert os.listdir(tmp_path) == []


# ADM's.

@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_official_file_drops_in(tmp_path, save):
    path, expected = official(tmp_path / "x.npz", save), ours()
    found = read_reference(path)
    np.testing.assert_array_equal(found.sigma_s, expected.sigma_s)
    assert found.facts == {"format": None, "extractor": "inception", "weights_hash": None, "transform": None,
                           "image_size": 8, "num_images": None, "source": None}
    np.testing.assert_array_equal(arrays.read_images(found.images, 2, 4), pictures()[2:4])
    assert is_statistics(path)


def test_official_files_may_lack_pictures_and_spatial_features(tmp_path):
    found = read_reference(official(tmp_path / "x.npz", arr_0=None, mu_s=None, sigma_s=None))
    assert (found.mu_s, found.has_images, found.facts["image_size"]) == (None, False, None)
    found = read_reference(official(tmp_path / "y.npz", mu=ours().mu.astype(np.float32), arr_0=pictures()[:, :4]))
    assert found.mu.dtype == np.float64
    assert found.facts["image_size"] is None, "of pictures that are not square"


def test_a_batch_of_pictures_is_no_statistics(tmp_path):
    np.savez(tmp_path / "x.npz", pictures(), np.arange(7))
    assert not is_statistics(str(tmp_path / "x.npz"))
    with pytest.raises(ValueError, match=r"has no statistics \(mu, sigma\), but \['arr_0', 'arr_1'\]; give a reference"):
        read_reference(str(tmp_path / "x.npz"))
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"no \.npz"):
        is_statistics(str(tmp_path / "junk"))


def changed(array, at, value):
    array = array.copy()
    array[at] = value
    return array


MU, SIGMA = gaussian(5)


@pytest.mark.parametrize(("changes", "message"), [
    ({"sigma": None}, "has no array 'sigma'"),
    ({"mu": None}, "has no array 'mu'"),
    ({"mu_s": None}, "has no array 'mu_s'"),
    ({"mu": MU[None]}, r"mu has shape \(1, 5\)"),
    ({"sigma": SIGMA[:4]}, r"sigma \(4, 5\), but they must be \(D,\) and \(D, D\)"),
    ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"D in 1..16384"),
    ({"mu": np.zeros(2**14 + 1)}, r"D in 1..16384"),
    ({"mu": np.arange(5)}, "mu is int64, but statistics are floating-point"),
    ({"sigma": changed(SIGMA, (1, 2), np.nan)}, "1 of 25 values of sigma are not finite"),
    ({"mu_s": np.full(4, np.inf)}, "4 of 4 values of mu_s are not finite"),
    ({"sigma": changed(SIGMA, (1, 2), 0.5)}, "sigma is no covariance: it differs from its transpose by 0"),
    ({"sigma": -np.eye(5)}, "smallest variance is -1"),
    ({"mu": np.array([{}] * 5)}, "mu holds Python objects"),
    ({"sigma": np.asfortranarray(changed(SIGMA, (1, 2), 0.5))}, "sigma is in Fortran order"),
    ({"arr_0": pictures().astype(np.float32)}, "arr_0 is float32"),
    ({"facts": np.array("{")}, "facts: damaged JSON"),
    ({"facts": np.array("[" * 100_000)}, "facts: damaged JSON"),
    ({"facts": np.array("[]")}, "facts are list, but must be"),
    ({"facts": np.array('{"format": 2, "new": 0}')}, "facts has format 2, but this version reads up to 1; update"),
    ({"facts": np.array(json.dumps({**FACTS, "format": "1"}))}, "a number as format"),
    ({"facts": np.array(json.dumps({**FACTS, "format": 1, "image_size": 9}))}, "8x8, but facts' image_size is 9"),
    ({"facts": np.array(["{}"])}, "must be one string of JSON"),
    ({"facts": np.array(" " * 2**18 + "{}")}, "must be one string of JSON"),
    ({"facts": np.array({})}, "facts holds Python objects"),
], ids=range(24))
def test_damaged_and_hostile_files_are_refused(tmp_path, changes, message):
    path = official(tmp_path / "x.npz", np.savez_compressed, **changes)
    with pytest.raises(ValueError, match=rf"{path}: .*{message}"):
        read_reference(path)


def test_rounding_is_no_asymmetry(tmp_path):
    sigma = changed(SIGMA, (1, 2), SIGMA[1, 2] + 1e-6 * SIGMA.max())
    sigma = changed(sigma, (slice(4, None), slice(None)), 0)
    sigma[:, 4] = 0
    sigma[4, 4] = -1e-17  # what a difference of sums leaves of a constant feature
    np.testing.assert_array_equal(read_reference(official(tmp_path / "x.npz", sigma=sigma)).sigma, sigma)


# Whether samples can be compared with it.

def test_what_was_measured_alike_fits(tmp_path):
    write_reference(str(tmp_path / "x.npz"), ours())
    check_fits(read_reference(str(tmp_path / "x.npz")), **MEASURED)


@pytest.mark.parametrize(("name", "value"), [
    ("extractor", "other"), ("weights_hash", "cd" * 32), ("weights_hash", None), ("transform", "fit"), ("image_size", 16)])
def test_each_difference_is_named_with_both_sides_and_the_remedy(name, value):
    message = f"reference a.npz: {name} is {FACTS[name]!r}, but the samples' is {value!r}: {references.REMEDIES[name]}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_fits(ours(uri="a.npz"), **{**MEASURED, name: value})


def test_all_differences_are_named_at_once():
    with pytest.raises(ValueError, match=r"weights_hash is .*; transform is .*; image_size is 8, but the samples' is 16"):
        check_fits(ours(), **{**MEASURED, "weights_hash": "", "transform": "", "image_size": 16})


def test_an_official_file_fits_by_its_widths(tmp_path):
    """Widths of the published files; covariances that compress well."""
    asked = {"extractor": "inception", "weights_hash": "ab" * 32, "transform": "adm-crop", "image_size": 8}
    members = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    found = read_reference(official(tmp_path / "x.npz", np.savez_compressed, **members))
    check_fits(found, **asked)
    with pytest.raises(ValueError, match="image_size is 8, but the samples' is 16"):
        check_fits(found, **{**asked, "image_size": 16})
    with pytest.raises(ValueError, match="extractor is 'inception', but the samples' is 'digits': measure both"):
        check_fits(found, **{**asked, "extractor": "digits"})
    members |= {"mu_s": None, "sigma_s": None}
    check_fits(read_reference(official(tmp_path / "y.npz", np.savez_compressed, **members)), **asked)
    small = read_reference(official(tmp_path / "z.npz"))
    with pytest.raises(ValueError, match=r"mu has 5 features, but inception gives 2048.*mu_s has 4 .* gives 2023"):
        check_fits(small, **asked)
