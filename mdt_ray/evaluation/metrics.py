"""FID's distance, Inception Score, precision and recall, KID: arrays in, floats out, equal to ADM's evaluator.

Not a feature extractor and not a runner: features come from an `Extractor`, means and covariances from `statistics`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.special
import torch

from mdt_ray.evaluation import coverage, coverage_float16
from mdt_ray.evaluation.statistics import finite_matrix

# Rounding leaves a covariance's zero eigenvalues slightly negative, float32 sums by up to about 1e-5 of the largest;
# below this share of it the matrix is no covariance.
_NEGATIVE_TOLERANCE = 1e-3


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """Squared Frechet distance of two Gaussians, the FID when they are fitted to features (Heusel et al. 2017).

        |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2))

    mu1, mu2: (D,); sigma1, sigma2: (D, D) symmetric, singular allowed (fewer samples than D). Float64 inside. With
    sigma_i = L_i L_i^T the last trace is the sum of singular values of M = L_1^T L_2, square roots of the eigenvalues of
    M M^T, which are those of sigma1 sigma2 but of a symmetric matrix: real, fast, and no `sqrtm`. Never negative. Expect
    eight digits or more, five where the eigenvalues span more than float64 does (eps in one becomes 1e-8 in its root).

    Raises ValueError on shapes that do not fit, values that are not finite, a sigma that is no covariance.
    """
    mu1, sigma1 = _gaussian("mu1", mu1, "sigma1", sigma1)
    mu2, sigma2 = _gaussian("mu2", mu2, "sigma2", sigma2)
    if mu1.shape != mu2.shape:
        raise ValueError(f"mu2: got width {mu2.size}, but it must be that of mu1, {mu1.size}; use one extractor")
    roots = _root("sigma1", sigma1).T @ _root("sigma2", sigma2)  # (R1, R2)
    gram = roots @ roots.T if len(roots) <= roots.shape[1] else roots.T @ roots
    with _one_thread():
        eigenvalues = torch.linalg.eigvalsh(torch.from_numpy(gram)).numpy()
    trace_of_root = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    difference = mu1 - mu2
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(float(distance), 0.0)  # a distance: less than 0 is rounding


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For torch's LAPACK (MKL, a tenth of the time of SciPy's OpenBLAS here), whose last bits depend on how many threads
    share a decomposition; more of them gain little."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def inception_score(probs, split_size: int = 5000) -> float:
    """Inception Score: mean over splits of exp(mean_i KL(p_i || mean of the split's p)) (Salimans et al. 2016).

    probs: (N, num_classes), each row a softmax, **in order of sample index**: splits are consecutive runs of
    `split_size` rows, so rows sorted by class or by arrival give another score. A shorter last split counts like the
    others (ADM's evaluator). Between 1 and num_classes.

    Raises ValueError on no rows, rows that are not probabilities, split_size < 1.
    """
    probs = finite_matrix("probs", probs)
    _at_least("split_size", split_size, 1)
    if len(probs) == 0:
        raise ValueError("probs: got 0 rows, but a score needs at least 1; sample some images first")
    scores = []
    for start in range(0, len(probs), split_size):
        part = probs[start : start + split_size].astype(np.float64)  # (n, C)
        # The slack is float16's rounding over a thousand classes; logits miss by far more.
        bad = (part < 0).any(axis=1) | (np.abs(part.sum(axis=1) - 1) > 1e-2)  # (n,)
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"probs: row {start + row} has minimum {part[row].min():.4g} and sum {part[row].sum():.4g}, but a row "
                "must be >= 0 and sum to 1; pass softmax outputs, not logits"
            )
        divergence = scipy.special.rel_entr(part, part.mean(axis=0)).sum(axis=1)  # (n,), 0 log 0 = 0
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def precision_recall(ref, samples, k: int = 3, *, block_size: int = 2048,
                     adm_float16: bool = False) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) as ADM's evaluator counts them.

    ref: (N, D), samples: (M, D), features of any real dtype. Every point has a ball that reaches to its k-th neighbour
    in its own set, the point itself being the 0th. Precision: share of samples inside (<=) at least one reference
    ball. Recall: share of references inside at least one sample ball. Both in 0..1.

    Squared distances are rounded to float32 after sums in float64, and copies of a point are at exactly 0: rounding of
    the sums is then invisible, and the result does not depend on `block_size` (rows per block), which only sets the
    memory beyond the inputs: they once more in float32, and up to 60 * (D + block_size) * block_size bytes.

    `adm_float16` computes distances in float16 as ADM does, where finite: the published numbers to their third digit, and
    moved by about 0.001 from the exact ones. That takes up to 1.5 GB, and several times as long.

    Raises ValueError on widths that differ, k or fewer points in a set, k or block_size < 1, values not finite.
    """
    ref, samples = finite_matrix("ref", ref), finite_matrix("samples", samples)
    _at_least("k", k, 1)
    _at_least("block_size", block_size, 1)
    _same_width(ref, samples)
    for field, value in (("ref", ref), ("samples", samples)):
        if len(value) <= k:
            raise ValueError(f"{field}: got {len(value)} rows, but k = {k} needs at least {k + 1}; add images")
    rule = coverage_float16 if adm_float16 else coverage
    samples_inside, ref_inside = rule.coverage(ref, samples, k, block_size)
    return float(samples_inside.mean()), float(ref_inside.mean())


class Interval(NamedTuple):
    """An estimate with its 95% confidence interval, nan where it cannot be told."""

    value: float
    low: float
    high: float


def half_width(values: np.ndarray) -> float:
    """Half of the 95% interval of the mean of values (n,), two at least, by Student's t."""
    return float(scipy.special.stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / len(values)**0.5)


def kernel_distance(ref, samples, *, block_size: int = 1000, seed: int = 0) -> Interval:
    """Kernel Inception distance: the unbiased squared MMD with the kernel (x . y / D + 1)^3 (arXiv 1801.01401, section 3).

    ref: (N, D), samples: (M, D). Both sets are shuffled and cut into blocks of `block_size` that share no image (what is
    left over is not used); the value is the mean over pairs of blocks. It may be negative: for equal distributions it is 0
    on average. As the blocks are independent, Student's t over them gives the interval, from two blocks on.

    Raises ValueError on widths that differ, fewer than two rows, block_size < 2, values not finite.
    """
    ref, samples = finite_matrix("ref", ref), finite_matrix("samples", samples)
    _at_least("block_size", block_size, 2)
    _same_width(ref, samples)
    for field, value in (("ref", ref), ("samples", samples)):
        if len(value) < 2:
            raise ValueError(f"{field}: got {len(value)} rows, but at least 2 are needed; add images")
    size = min(block_size, len(ref), len(samples))
    number = min(len(ref), len(samples)) // size
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(len(x))[:number * size].reshape(number, size) for x in (ref, samples)]
    values = np.array([_squared_mmd(ref[a], samples[b]) for a, b in zip(*orders, strict=True)])  # (number,)
    if number == 1:
        return Interval(float(values[0]), float("nan"), float("nan"))
    half = half_width(values)
    return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def _squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD of two sets of as many rows, (n, D) each: no point is compared with itself."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    count, width = a.shape
    within = [(x @ x.T / width + 1) ** 3 for x in (a, b)]  # (n, n)
    own = sum((kernel.sum() - np.trace(kernel)) / (count * (count - 1)) for kernel in within)
    return own - 2 * ((a @ b.T / width + 1) ** 3).mean()


def _same_width(ref: np.ndarray, samples: np.ndarray) -> None:
    if ref.shape[1] != samples.shape[1]:
        raise ValueError(
            f"samples: got width {samples.shape[1]}, but it must be that of ref, {ref.shape[1]}; use one extractor"
        )


def _at_least(field: str, value: int, minimum: int) -> None:
    """ValueError unless `value` is an integer >= minimum."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{field}: got {value!r}, but it must be an integer >= {minimum}; pass one, or the default")


def _gaussian(mu_field: str, mu, sigma_field: str, sigma) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and symmetric covariance (D, D) in float64, or ValueError naming the field at fault."""
    mu = np.asarray(mu)
    if mu.ndim != 1:
        raise ValueError(f"{mu_field}: got shape {mu.shape}, but it must be (D,); pass FeatureStatistics.mean")
    mu = finite_matrix(mu_field, mu[None])[0].astype(np.float64)  # (D,)
    sigma = finite_matrix(sigma_field, sigma).astype(np.float64)  # (D, D)
    if sigma.shape != (mu.size, mu.size):
        raise ValueError(
            f"{sigma_field}: got shape {sigma.shape}, but it must be ({mu.size}, {mu.size}) to fit {mu_field}; "
            "take both from the same FeatureStatistics"
        )
    asymmetry = float(np.abs(sigma - sigma.T).max())
    if asymmetry > 1e-5 * float(np.abs(sigma).max()):
        raise ValueError(
            f"{sigma_field}: differs from its transpose by {asymmetry:.4g}, but a covariance is symmetric; "
            "pass FeatureStatistics.covariance"
        )
    return mu, sigma


def _root(field: str, sigma: np.ndarray) -> np.ndarray:
    """L (D, R) with L L^T = sigma: its Cholesky factor (R = D), or V sqrt(w) without the eigenvalues that are 0 (R < D).

    Each of those would bring rounding of the size of sqrt(eps) into the trace.
    """
    try:
        return scipy.linalg.cholesky(sigma, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        eigenvalues, eigenvectors = (x.numpy() for x in torch.linalg.eigh(torch.from_numpy(sigma)))
    eigenvalues = _clip_negative(field, eigenvalues)
    keep = eigenvalues >= len(sigma) * np.finfo(np.float64).eps * eigenvalues[-1]  # the rule of numpy's matrix_rank
    return eigenvectors[:, keep] * np.sqrt(eigenvalues[keep])


def _clip_negative(field: str, eigenvalues: np.ndarray) -> np.ndarray:
    """Eigenvalues with rounding's negative ones at 0; ValueError where they are too negative to be rounding."""
    smallest, largest = float(eigenvalues.min()), float(np.abs(eigenvalues).max())
    if smallest < -_NEGATIVE_TOLERANCE * largest:
        raise ValueError(
            f"{field}: has a negative eigenvalue ({smallest:.4g}, the largest is {largest:.4g}), but a covariance has "
            "none; pass FeatureStatistics.covariance"
        )
    return np.maximum(eigenvalues, 0)
