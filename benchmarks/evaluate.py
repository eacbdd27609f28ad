"""An evaluation's figures: its numeric side against plain NumPy and SciPy; sampling; and what Ray costs it.

    python benchmarks/evaluate.py [--quick] [--only FIGURES]

Features are made up: of 2,048 values, not negative, close to a 64-dimensional surface. Every measurement runs in a process
of its own (its peak memory counts the interpreter and the inputs). Frechet distance and statistics take one thread and are
timed by its processor, so that a busy machine matters little. FIGURES is a name of `PARTS`. `sampling` (sampling.py) and
`overhead` (evaluate_overhead.py) take longer, so --quick leaves them out unless they are named.
"""

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg

from mdt_ray.evaluation.metrics import frechet_distance, precision_recall
from mdt_ray.evaluation.statistics import FeatureStatistics

WIDTH, CHUNK = 2048, 500


def features(count: int, seed: int) -> np.ndarray:
    """(count, WIDTH) float32; another seed, another set, each a little off the others."""
    surface = np.random.default_rng(0).standard_normal((64, WIDTH), dtype=np.float32) / 8
    generator = np.random.default_rng(seed)
    found = np.empty((count, WIDTH), dtype=np.float32)
    for start in range(0, count, CHUNK):
        part = found[start:start + CHUNK]
        part[:] = (generator.standard_normal((len(part), 64), dtype=np.float32) + 0.1 * seed) @ surface
        part += 0.1 * generator.standard_normal(part.shape, dtype=np.float32)
        np.maximum(part, 0, out=part)
    return found


def alone(task: str, *counts: int, threads: int | None = None) -> dict[str, float]:
    """What a function of `TASKS` returns in a process of its own, with that process's peak."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)) if threads else {}
    command = [sys.executable, __file__, "--task", json.dumps([task, *counts])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | limits)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{task:<20} " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
    return found


def timed(function: Callable) -> tuple[dict[str, float], object]:
    """Seconds by the clock and of all processors, and what the function returns."""
    start, processors = time.perf_counter(), time.process_time()
    result = function()
    return {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - processors}, result


def peak_gb() -> float:
    """Most memory that this process has held (Linux; getrusage's figure would begin with that of the parent)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


# Frechet distance


def frechet(quick: bool) -> dict[str, float]:
    found = alone("frechet", 1 if quick else 5, threads=1)
    return {"frechet_speedup_vs_sqrtm": found["sqrtm_processor_seconds"] / found["processor_seconds"],
            "frechet_processor_seconds": found["processor_seconds"]}


def both_forms(rounds: int) -> dict[str, float]:
    """Median processor seconds of ours and of the classical form, in turns."""
    both = [FeatureStatistics(WIDTH).update(features(6 * CHUNK, seed)) for seed in (1, 2)]
    arguments = [x for s in both for x in (s.mean, s.covariance)]
    frechet_distance(*(x[(slice(64),) * x.ndim] for x in arguments))  # loads its libraries
    spent = []
    for _ in range(rounds):
        ours, distance = timed(functools.partial(frechet_distance, *arguments))
        classical, expected = timed(functools.partial(frechet_by_sqrtm, *arguments))
        assert abs(distance - expected) < 1e-6 * expected, (distance, expected)
        spent.append((ours["processor_seconds"], classical["processor_seconds"]))
    return dict(zip(("processor_seconds", "sqrtm_processor_seconds"), np.median(spent, axis=0).tolist(), strict=True))


def frechet_by_sqrtm(mu1, sigma1, mu2, sigma2) -> float:
    """The classical form."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root))


# Mean and covariance


def statistics_of_rows(quick: bool) -> dict[str, float]:
    count = 10_000 if quick else 50_000
    figures = {}
    for prefix, task in (("statistics", "merged"), ("np_cov", "np.cov")):
        found = alone(task, count, threads=1)
        figures[f"{prefix}_rows_per_second"] = count / found["processor_seconds"]
        figures[f"{prefix}_peak_gb"] = found["peak_gb"]
    return figures


def merged(count: int) -> dict[str, float]:
    """Chunks as they come, none kept."""
    total, seconds = FeatureStatistics(WIDTH), {"seconds": 0.0, "processor_seconds": 0.0}
    for start in range(0, count, CHUNK):
        part = features(CHUNK, start + 1)
        spent, _ = timed(functools.partial(total.update, part))
        seconds = {key: value + spent[key] for key, value in seconds.items()}
    spent, _ = timed(lambda: (total.mean, total.covariance))
    return {key: value + spent[key] for key, value in seconds.items()}


def stacked(count: int) -> dict[str, float]:
    """All rows in one array."""
    rows = features(count, 1)
    return timed(lambda: (rows.mean(axis=0, dtype=np.float64), np.cov(rows, rowvar=False)))[0]


# Precision and recall


def neighbourhoods(quick: bool) -> dict[str, float]:
    small = (2_500, 10_000)
    suffix, counts = ("_quick", small) if quick else ("", (10_000, 50_000))
    plain, ours = alone("plain", *small), alone("precision_recall", *small)
    assert (plain["precision"], plain["recall"]) == (ours["precision"], ours["recall"])
    whole = ours if quick else alone("precision_recall", *counts)
    figures = {f"precision_recall_seconds{suffix}": whole["seconds"],
               f"precision_recall_processor_seconds{suffix}": whole["processor_seconds"],
               f"precision_recall_peak_gb{suffix}": whole["peak_gb"],
               "precision_recall_speedup_vs_float64": plain["processor_seconds"] / ours["processor_seconds"]}
    if not quick:
        figures["adm_float16_processor_seconds"] = alone("adm_float16", *counts)["processor_seconds"]
    return figures


def two_sets(function: Callable, *counts: int) -> dict[str, float]:
    """Of so many references and samples."""
    ref, samples = (features(count, seed) for seed, count in enumerate(counts, 1))
    spent, (precision, recall) = timed(functools.partial(function, ref, samples))
    return spent | {"precision": precision, "recall": recall}


def plain_precision_recall(ref: np.ndarray, samples: np.ndarray, k: int = 3) -> tuple[float, float]:
    """All distances in float64, whole rows sorted out at a time."""
    def rows_of(a, b):
        norms = [(x.astype(np.float64) ** 2).sum(axis=1) for x in (a, b)]
        columns = b.astype(np.float64).T
        for start in range(0, len(a), CHUNK):
            rows = slice(start, start + CHUNK)
            products = a[rows].astype(np.float64) @ columns
            yield rows, np.maximum(norms[0][rows, None] - 2 * products + norms[1], 0)

    radii = [np.concatenate([np.partition(d, k, axis=1)[:, k] for _, d in rows_of(x, x)]) for x in (ref, samples)]
    inside = np.zeros(len(samples), dtype=bool), np.zeros(len(ref), dtype=bool)
    for rows, distances in rows_of(ref, samples):
        inside[0][:] |= (distances <= radii[0][rows, None]).any(axis=0)
        inside[1][rows] = (distances <= radii[1]).any(axis=1)
    return float(inside[0].mean()), float(inside[1].mean())


def sampling(quick: bool) -> dict[str, float]:
    from sampling import measure  # here and below: the processes of others should not hold their libraries

    return measure(quick)


def overhead(quick: bool) -> dict[str, float]:
    from evaluate_overhead import measure

    return measure(quick)


PARTS = {"frechet": frechet, "statistics": statistics_of_rows, "precision_recall": neighbourhoods, "sampling": sampling,
         "overhead": overhead}
LONG = ("sampling", "overhead")
TASKS = {"frechet": both_forms, "merged": merged, "np.cov": stacked,
         "plain": functools.partial(two_sets, plain_precision_recall),
         "precision_recall": functools.partial(two_sets, precision_recall),
         "adm_float16": functools.partial(two_sets, functools.partial(precision_recall, adm_float16=True))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds, under a minute on 2 cores")
    parser.add_argument("--only", choices=PARTS, help="these figures alone")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        name, *counts = json.loads(arguments.task)
        found = TASKS[name](*counts)
        return print(json.dumps(found | {"peak_gb": peak_gb()}))
    figures: dict[str, float] = {}
    names = [name for name in PARTS if not (arguments.quick and name in LONG)]
    for name in [arguments.only] if arguments.only else names:
        figures |= PARTS[name](arguments.quick)
    figures = {name: round(value, 3) for name, value in figures.items()}
    print(json.dumps({"name": "evaluate", "machine": platform.machine(), "figures": figures}))


if __name__ == "__main__":
    main()
