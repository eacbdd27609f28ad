"""scripts/verify_published.py, from files to exit code: its numbers are those of plain formulas on the same pictures."""

import hashlib
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from mdt_ray.evaluation.inception import Inception
from tests.conftest import ROOT
from tests.evaluation.test_inception import filled_weights

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "scripts" / "verify_published.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("verify_published", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def smooth_pictures(count, seed):
    """Of few colours, so that features differ enough for some to be near and some far."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 256, (count, 2, 2, 3))
    return (levels.repeat(8, 1).repeat(8, 2) // 2 + rng.integers(0, 128, (count, 16, 16, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Twelve samples, ten reference pictures, statistics of the latter, random weights: as files and as features."""
    folder = tmp_path_factory.mktemp("published")
    weights = filled_weights(Inception())
    torch.save(weights, folder / "inception.pth")
    network = Inception(weights)
    # Samples of less contrast: some of each set are out of reach of the other.
    pictures = {"reference": smooth_pictures(10, seed=2), "samples": smooth_pictures(12, seed=4) // 4 * 3 + np.uint8(16)}
    found = {name: {k: v.double().numpy() for k, v in network(torch.from_numpy(p).permute(0, 3, 1, 2))._asdict().items()}
             for name, p in pictures.items()}
    moments = {name: (x.mean(0), np.cov(x.T)) for name, x in found["reference"].items() if name != "logits"}
    np.savez(folder / "reference.npz", arr_0=pictures["reference"], mu=moments["pool"][0], sigma=moments["pool"][1],
             mu_s=moments["spatial"][0], sigma_s=moments["spatial"][1])
    np.savez_compressed(folder / "samples.npz", pictures["samples"], np.arange(12))
    return folder, found


def arguments_of(folder, **files):
    files = {"reference": "reference.npz", "samples": "samples.npz", "inception": "inception.pth", **files}
    return [word for name, file in files.items() for word in (f"--{name}", str(folder / file))]


@pytest.fixture(scope="module")
def done(made):
    command = [sys.executable, SCRIPT, *arguments_of(made[0]), "--device", "cpu", "--batch-size", "5", "--certificate",
               "out/certificate.json"]
    return subprocess.run(command, cwd=made[0], capture_output=True, text=True)


def frechet(a, b):
    """From the data: the trace of the root of the product is the nuclear norm of the centred sets' cross product."""
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    return (a**2).sum() + (b**2).sum() - 2 * scipy.linalg.svdvals(a @ b.T).sum()


def share_inside(points, balls, k=3):
    """Share of points within reach of a ball around each of the others' centres, to its k-th neighbour."""
    radii = np.sort(np.linalg.norm(balls[:, None] - balls, axis=2), axis=1)[:, k]
    return (np.linalg.norm(points[:, None] - balls, axis=2) <= radii).any(1).mean()


def test_numbers_are_those_of_plain_formulas(made, done):
    _, found = made
    ref, samples = found["reference"], found["samples"]
    p = torch.from_numpy(samples["logits"]).softmax(1).numpy()
    expected = {name: ((ref[kind].mean(0) - samples[kind].mean(0)) ** 2).sum() + frechet(ref[kind], samples[kind])
                for name, kind in (("fid", "pool"), ("sfid", "spatial"))}
    expected |= {"is": np.exp((p * np.log(p / p.mean(0))).sum(1).mean()),
                 "precision": share_inside(samples["pool"], ref["pool"]),
                 "recall": share_inside(ref["pool"], samples["pool"])}
    certificate = json.loads(done.stdout[done.stdout.index("{"):])
    assert {name: c["ours"] for name, c in certificate["metrics"].items()} == pytest.approx(expected, rel=1e-4)
    assert 0 < expected["precision"] < expected["recall"] < 1
    rows = [line.split() for line in done.stdout.partition("{")[0].splitlines()]
    assert [row[:3] for row in rows[1:]] == [[name, f"{c['ours']:.5f}", f"{c['published']:.5f}"]
                                             for name, c in certificate["metrics"].items()]


def test_other_pictures_disagree_with_the_published_numbers(made, done):
    folder, _ = made
    assert done.returncode == 1, done.stderr
    certificate = json.loads(done.stdout[done.stdout.index("{"):])
    assert json.loads((folder / "out" / "certificate.json").read_text()) == certificate
    assert certificate["agrees"] is False
    assert not any(c["agrees"] for c in certificate["metrics"].values())
    assert (certificate["num_samples"], certificate["num_reference_images"]) == (12, 10)
    for name, file in (("reference", "reference.npz"), ("samples", "samples.npz"), ("inception", "inception.pth")):
        expected = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        assert certificate["files"][name] == {"name": file, "sha256": expected}
    assert certificate["versions"].keys() == {"python", "mdt_ray", "torch", "numpy", "scipy", "pyarrow"}


@pytest.mark.parametrize(("files", "message"), [
    ({"samples": "gone.npz"}, "gone.npz: no such file"),
    ({"reference": "samples.npz"}, "samples.npz: has no statistics (mu, sigma)"),
    ({"reference": "fid_only.npz"}, "fid_only.npz: must have mu_s, sigma_s and arr_0 too"),
    ({"inception": "gone.pth"}, "Inception weights: cannot read"),
])
def test_what_is_missing_is_named(made, script, capsys, files, message):
    np.savez(made[0] / "fid_only.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(SystemExit, match=r"^2$"):
        script.main(arguments_of(made[0], **files))
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""


def test_agreement_is_that_of_the_torch_port_or_better(script):
    for numbers in (script.PUBLISHED, script.TORCH_PORT):
        assert all(c.agrees for c in script.compare(numbers).values())
    for name, published in script.PUBLISHED.items():
        beyond = published + 1.01 * (script.TORCH_PORT[name] - published)
        for value in (beyond, 2 * published - beyond, float("nan")):
            agrees = {n: c.agrees for n, c in script.compare({**script.TORCH_PORT, name: value}).items()}
            assert agrees == {**dict.fromkeys(script.PUBLISHED, True), name: False}
    assert script.TOLERANCES == {"fid": 0.00153, "sfid": 6e-05, "is": 0.139, "precision": 0.00102, "recall": 0.0024}
