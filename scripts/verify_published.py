"""Computes the published metrics of ADM's ImageNet samples with our code, from the files they were published with.

    python scripts/verify_published.py --reference VIRTUAL_imagenet256_labeled.npz \\
        --samples admnet_guided_upsampled_imagenet256.npz --certificate agreement.json

Prints a table and a certificate (JSON) of both numbers, their differences and what they depend on. Exit code 0 if every
number is at least as close to TensorFlow's as a published torch port of the evaluator comes, 1 if not, 2 if something is
missing. Reads 60,000 pictures: have a GPU. Not how a run is evaluated: that is `mdt-ray evaluate`.
"""

import argparse
import hashlib
import importlib.metadata
import json
import logging
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from mdt_ray import __version__, storage
from mdt_ray.data import arrays
from mdt_ray.evaluation import metrics
from mdt_ray.evaluation.features import Extractor
from mdt_ray.evaluation.inception import WEIGHTS_URL, load_inception
from mdt_ray.evaluation.reference import Reference, check_fits, read_reference
from mdt_ray.evaluation.results import softmax
from mdt_ray.evaluation.statistics import FeatureStatistics

logger = logging.getLogger("verify_published")

SUBJECT = "ADM-G, ADM-U, ImageNet 256x256, 50,000 samples (arXiv:2105.05233; digits of its evaluator's README)"
PUBLISHED = {"fid": 3.94256, "sfid": 6.14043, "is": 215.837, "precision": 0.8265, "recall": 0.5309}
"""By ADM's evaluator, which runs the TensorFlow graph."""
TORCH_PORT = {"fid": 3.94103, "sfid": 6.14049, "is": 215.976, "precision": 0.82548, "recall": 0.5285}
"""By a published port of that evaluator to torch: the agreement to beat."""
TOLERANCES = {name: round(abs(PUBLISHED[name] - TORCH_PORT[name]), 6) for name in PUBLISHED}
PRECISION_RECALL_OPTIONS: dict[str, Any] = {"adm_float16": True}
"""Of metrics.precision_recall: what makes it measure distances as ADM's evaluator does belongs here."""
PACKAGES = ("torch", "numpy", "scipy", "pyarrow")


@dataclass(frozen=True)
class Comparison:
    """One metric."""

    ours: float
    published: float
    torch_port: float
    difference: float
    tolerance: float
    agrees: bool


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, help=".npz with mu, sigma, mu_s, sigma_s and pictures")
    parser.add_argument("--samples", required=True, help=".npz with pictures")
    parser.add_argument("--inception", default=str(Path(torch.hub.get_dir()) / "checkpoints" / Path(WEIGHTS_URL).name),
                        help=f"weights; by default torch.hub's copy of {WEIGHTS_URL}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--certificate", help="file to write the certificate to as well")
    settings = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        certificate = verify(settings)
        if settings.certificate:
            storage.write_json(settings.certificate, certificate)
    except (ValueError, OSError) as error:
        parser.error(str(error))  # exits with 2
    print(table(certificate))
    print(json.dumps(certificate, indent=1))
    return 0 if certificate["agrees"] else 1


def verify(settings: argparse.Namespace) -> dict[str, Any]:
    """The certificate. Raises ValueError for files that are missing or do not fit."""
    if torch.device(settings.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {settings.device}: torch sees no GPU; give --device cpu")
    reference, samples = read_reference(settings.reference), arrays.open_npz(settings.samples)
    if not reference.has_images or reference.mu_s is None:
        raise ValueError(f"--reference {settings.reference}: must have mu_s, sigma_s and arr_0 too, for sFID, precision and "
                         "recall; take the published file")
    network = load_inception(settings.inception, device=settings.device)
    paths = {name: getattr(settings, name) for name in ("reference", "samples", "inception")}
    files = {name: {"name": Path(uri).name, "sha256": sha256_of(uri)} for name, uri in paths.items()}
    check_fits(reference, extractor=network.name, weights_hash=files["inception"]["sha256"][:16],
               transform=reference.facts["transform"],  # of samples nobody can tell: they were drawn at that size
               image_size=samples.height)
    compared = compare(measure(network, reference, samples, settings.batch_size))
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"subject": SUBJECT, "agrees": all(c.agrees for c in compared.values()),
            "rule": "every |difference| from TensorFlow's number is at most that of the torch port",
            "metrics": {name: asdict(c) for name, c in compared.items()}, "files": files,
            "num_samples": samples.num_images, "num_reference_images": reference.images.num_images,
            "precision_recall_options": PRECISION_RECALL_OPTIONS, "device": name_of(settings.device),
            "versions": {"python": platform.python_version(), "mdt_ray": __version__, **versions},
            "date": datetime.now(UTC).isoformat(timespec="seconds")}


def measure(network: Extractor, reference: Reference, samples: arrays.NpzImages, batch_size: int) -> dict[str, float]:
    """The metrics of samples, in the order of their file (which IS depends on)."""
    pool, spatial = FeatureStatistics(reference.mu.size), FeatureStatistics(reference.mu_s.size)
    vectors, probabilities = [], []
    for part in features_of(network, samples, batch_size):
        pool.update(part["pool"])
        spatial.update(part["spatial"])
        vectors.append(part["pool"])
        probabilities.append(softmax(part["logits"]).astype(np.float32))
    reference_vectors = [part["pool"] for part in features_of(network, reference.images, batch_size)]
    logger.info("distances")
    precision, recall = metrics.precision_recall(np.concatenate(reference_vectors), np.concatenate(vectors),
                                                 **PRECISION_RECALL_OPTIONS)
    return {"fid": metrics.frechet_distance(pool.mean, pool.covariance, reference.mu, reference.sigma),
            "sfid": metrics.frechet_distance(spatial.mean, spatial.covariance, reference.mu_s, reference.sigma_s),
            "is": metrics.inception_score(np.concatenate(probabilities)), "precision": precision, "recall": recall}


def features_of(network: Extractor, pictures: arrays.NpzImages, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Features of all pictures of a file, a batch at a time, as numpy arrays by their names in `Features`."""
    done = 0
    for batch in arrays.stream_images(pictures, batch_size):
        found = network(torch.from_numpy(batch).permute(0, 3, 1, 2))
        yield {name: getattr(found, name).cpu().numpy() for name in found._fields}
        done += len(batch)
        if done // 1000 > (done - len(batch)) // 1000 or done == pictures.num_images:
            logger.info("%s: %d of %d pictures", Path(pictures.uri).name, done, pictures.num_images)


def compare(values: dict[str, float]) -> dict[str, Comparison]:
    """Ours and the published numbers, by metric."""
    found = {}
    for name, published in PUBLISHED.items():
        difference = values[name] - published
        # The slack is what a sum in float64 rounds: the torch port's own numbers must pass.
        agrees = abs(difference) <= TOLERANCES[name] + 1e-9
        found[name] = Comparison(values[name], published, TORCH_PORT[name], difference, TOLERANCES[name], agrees)
    return found


def table(certificate: dict[str, Any]) -> str:
    lines = [f"{'':10}{'ours':>12}{'published':>12}{'difference':>14}{'tolerance':>12}  agrees"]
    lines += [f"{name:10}{c['ours']:12.5f}{c['published']:12.5f}{c['difference']:+14.5f}{c['tolerance']:12.5f}  "
              f"{'yes' if c['agrees'] else 'no'}" for name, c in certificate["metrics"].items()]
    return "\n".join(lines)


def sha256_of(uri: str) -> str:
    """Of a file of any size. Raises OSError, or ValueError for a URI that no filesystem opens."""
    fs, path = storage.resolve(uri)
    digest = hashlib.sha256()
    with fs.open_input_stream(path) as stream:
        while block := stream.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def name_of(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.machine() + " CPU"


if __name__ == "__main__":
    sys.exit(main())
