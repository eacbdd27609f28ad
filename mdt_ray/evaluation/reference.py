"""Reference statistics: mean and covariance of a data set's features in an .npz, as ADM publishes them and as we do.

ADM's files hold `mu, sigma` (pool features), `mu_s, sigma_s` (spatial ones, for sFID) and pictures, `arr_0`, for precision
and recall. Ours hold the same and, as JSON in `facts`, what the numbers depend on; ADM's evaluator reads them too. Not a
batch of pictures alone: data/arrays.py.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mdt_ray.data import npz
from mdt_ray.data.arrays import PICTURES, NpzImages, fingerprint, open_npz, write_npz
from mdt_ray.evaluation import inception

FORMAT = 1
FACTS = ("format", "extractor", "weights_hash", "transform", "image_size", "num_images", "source")
"""Of whole data: `num_images` were measured, while arr_0 may hold fewer. Unknown ones are None."""
WIDTHS = {inception.Inception.name: (inception.NUM_POOL, 17 * 17 * inception.NUM_SPATIAL_CHANNELS)}
"""Of pool and spatial features, by extractor."""
MAX_WIDTH = 2**14
"""Of features: 2 GiB of covariance. Wider ones are a damaged or hostile file."""
MAX_FACTS_BYTES = 2**20
ASYMMETRY = 1e-5
"""Share of the largest value by which a covariance may differ from its transpose: more than rounding of float32 sums."""
REMEDIES = {
    "extractor": "measure both with one extractor",
    "weights_hash": "use the weights that the reference was measured with, or measure it again with these",
    "transform": "measure the reference again with that transform, for another crop or resize moves every metric",
    "image_size": "take the reference of that size: resizing either side moves every metric",
}


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of a data set's features."""

    mu: np.ndarray  # (D,) float64
    sigma: np.ndarray  # (D, D) float64
    mu_s: np.ndarray | None  # (S,) float64; None in files made for FID alone
    sigma_s: np.ndarray | None  # (S, S) float64
    facts: dict[str, Any]
    """By the names in FACTS."""
    images: NpzImages | None = None
    """Where the file's pictures are, for precision and recall."""
    uri: str = ""
    """Of the file that was read."""

    @property
    def has_images(self) -> bool:
        return self.images is not None

    @property
    def fingerprint(self) -> str:
        """64 hex digits for the file's numbers and pictures: the same from wherever its data were read."""
        return fingerprint(self.uri, without=frozenset({"facts"}))


def is_statistics(uri: str) -> bool:
    """Whether an .npz holds statistics; a batch of pictures (arr_0 alone) does not. Raises ValueError for no .npz."""
    with npz.open_archive(uri) as archive:
        return bool({"mu", "sigma"} & set(archive.keys))


def read_reference(uri: str) -> Reference:
    """The statistics in an .npz, checked: shapes that fit, finite values, symmetric covariances.

    A file without `facts` is taken for one of ADM's: extractor inception, image_size from arr_0, the rest unknown (None).
    Raises ValueError naming file and array.
    """
    with npz.open_archive(uri) as archive:
        if not {"mu", "sigma"} & set(archive.keys):
            raise ValueError(f"{uri}: has no statistics (mu, sigma), but {archive.keys}; give a reference, or measure the "
                             "pictures first")
        mu, sigma = _read_gaussian(archive, "mu", "sigma")
        mu_s, sigma_s = None, None
        if {"mu_s", "sigma_s"} & set(archive.keys):
            mu_s, sigma_s = _read_gaussian(archive, "mu_s", "sigma_s")
        images = open_npz(uri) if PICTURES in archive.keys else None
        facts = _read_facts(archive) if "facts" in archive.keys else _official_facts(images)
        if images is not None:
            _check_size(uri, facts, images.height, images.width)
    return Reference(mu, sigma, mu_s, sigma_s, facts, images, uri)


def _read_gaussian(archive: npz.Archive, mu_key: str, sigma_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D); nothing large is read before the headers fit."""
    shapes = []
    for key in (mu_key, sigma_key):
        header = npz.read_header(archive, key)
        if header.dtype.kind != "f":
            raise ValueError(f"{archive.uri}: {key} is {header.dtype}, but statistics are floating-point; write them so")
        shapes.append(header.shape)
    _check_shapes(archive.uri, mu_key, shapes[0], sigma_key, shapes[1])
    mu, sigma = (npz.read_array(archive, key).astype(np.float64) for key in (mu_key, sigma_key))
    _check_values(archive.uri, mu_key, mu, sigma_key, sigma)
    return mu, sigma


def _check_shapes(uri: str, mu_key: str, mu: tuple[int, ...], sigma_key: str, sigma: tuple[int, ...]) -> None:
    if len(mu) != 1 or not 1 <= mu[0] <= MAX_WIDTH or sigma != (mu[0], mu[0]):
        raise ValueError(f"{uri}: {mu_key} has shape {mu} and {sigma_key} {sigma}, but they must be (D,) and (D, D), "
                         f"D in 1..{MAX_WIDTH}; write the mean and the covariance of the same features")


def _check_values(uri: str, mu_key: str, mu: np.ndarray, sigma_key: str, sigma: np.ndarray) -> None:
    for key, array in ((mu_key, mu), (sigma_key, sigma)):
        bad = int((~np.isfinite(array)).sum())
        if bad:
            raise ValueError(f"{uri}: {bad} of {array.size} values of {key} are not finite, but all must be; copy the file "
                             "again, or measure the data again")
    asymmetry, largest = float(np.abs(sigma - sigma.T).max()), float(np.abs(sigma).max())
    smallest = float(sigma.diagonal().min())
    if asymmetry > ASYMMETRY * largest or smallest < -ASYMMETRY * largest:
        raise ValueError(f"{uri}: {sigma_key} is no covariance: it differs from its transpose by {asymmetry:.4g}, and its "
                         f"smallest variance is {smallest:.4g} (largest value: {largest:.4g}), but it must be symmetric, "
                         "without negative variances; measure the data again")


def _official_facts(images: NpzImages | None) -> dict[str, Any]:
    is_square = images is not None and images.height == images.width
    return {**dict.fromkeys(FACTS), "extractor": inception.Inception.name,
            "image_size": images.height if is_square else None}


def _read_facts(archive: npz.Archive) -> dict[str, Any]:
    header = npz.read_header(archive, "facts")
    if header.dtype.kind != "U" or header.shape != () or header.dtype.itemsize > MAX_FACTS_BYTES:
        raise ValueError(f"{archive.uri}: facts is {header.dtype} {header.shape}, but must be one string of JSON; write the "
                         "file with write_reference")
    try:
        facts = json.loads(str(npz.read_array(archive, "facts")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{archive.uri}: facts: damaged JSON ({error}); measure the data again") from error
    if isinstance(facts, dict) and isinstance(facts.get("format"), int) and facts["format"] > FORMAT:
        raise ValueError(f"{archive.uri}: facts has format {facts['format']}, but this version reads up to {FORMAT}; update "
                         "mdt-ray")
    _check_facts(archive.uri, facts)
    return facts


def _check_facts(uri: str, facts: Any) -> None:
    if not isinstance(facts, dict) or set(facts) != set(FACTS) or not isinstance(facts["extractor"], str) \
            or not isinstance(facts["format"], int):
        found = sorted(facts) if isinstance(facts, dict) else type(facts).__name__
        raise ValueError(f"{uri}: facts are {found}, but must be {sorted(FACTS)}, with a name as extractor and a number "
                         "as format; measure the data again")


def _check_size(uri: str, facts: dict[str, Any], height: int, width: int) -> None:
    size = facts["image_size"]
    if size is not None and (height, width) != (size, size):
        raise ValueError(f"{uri}: {PICTURES} holds pictures of {height}x{width}, but facts' image_size is {size}; write "
                         "those that were measured")


def write_reference(uri: str, reference: Reference, pictures: Iterable[np.ndarray] = (),
                    shape: tuple[int, int, int, int] | None = None) -> None:
    """Write statistics, and pictures where `shape` is given, whole or not at all, for `read_reference` and ADM's evaluator.

    Args:
        pictures: parts (n, H, W, 3) uint8 of arr_0, written as they come.
        shape: of all of them, (N, H, W, 3).
    `reference.images` is not looked at; the facts' format may be missing and is ours. Equal statistics give equal bytes.
    Raises ValueError as `read_reference`, and where pictures are not as many as said or not of the facts' image_size.
    """
    facts = {**reference.facts, "format": FORMAT}
    _check_facts(uri, facts)
    found = {"mu": reference.mu, "sigma": reference.sigma, "mu_s": reference.mu_s, "sigma_s": reference.sigma_s}
    arrays = {key: np.asarray(array, np.float64) for key, array in found.items() if array is not None}
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mu in arrays or sigma in arrays or mu == "mu":
            _check_shapes(uri, mu, np.shape(found[mu]), sigma, np.shape(found[sigma]))
            _check_values(uri, mu, arrays[mu], sigma, arrays[sigma])
    if shape is not None:
        _check_size(uri, facts, *shape[1:3])
    arrays["facts"] = np.array(json.dumps(facts, sort_keys=True))
    write_npz(uri, arrays, pictures=pictures, shape=shape)


def check_fits(reference: Reference, *, extractor: str, weights_hash: str | None, transform: Any, image_size: int) -> None:
    """Raise ValueError with all in which samples measured so cannot be compared with the reference, and what to do.

    Facts that the reference does not know (None, in ADM's files) pass, except that widths must be the extractor's.
    """
    asked = {"extractor": extractor, "weights_hash": weights_hash, "transform": transform, "image_size": image_size}
    problems = [f"{name} is {reference.facts[name]!r}, but the samples' is {value!r}: {REMEDIES[name]}"
                for name, value in asked.items() if reference.facts[name] not in (None, value)]
    if extractor in WIDTHS:
        widths = (reference.mu.size, None if reference.mu_s is None else reference.mu_s.size)
        problems += [f"{name} has {found} features, but {extractor} gives {expected}: take a reference measured with it"
                     for name, found, expected in zip(("mu", "mu_s"), widths, WIDTHS[extractor], strict=True)
                     if found not in (None, expected)]
    if problems:
        raise ValueError(f"reference {reference.uri}: {'; '.join(problems)}")
