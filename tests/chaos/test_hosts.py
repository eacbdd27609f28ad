"""The four jobs over three hosts, submitted from outside, with a store that is reached over the network only."""

import json

import pytest

from tests.chaos.chaos import Chaos
from tests.chaos.rig import Rig

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def chaos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rig")
    with Rig(folder) as rig:
        yield Chaos(rig, folder)


@pytest.mark.parametrize("job", ["precompute", "train", "tune", "evaluate"])
def test_a_job_runs_over_hosts_and_a_store(chaos, job):
    """In this order: a job begins with what those before it left in the store."""
    chaos.straight(job)
    left = chaos.rig.store.objects(f"straight/{job}")
    run = json.loads(left["run.json"])
    assert run["config"]["output"].startswith("s3://")
    assert {"precompute": "manifest.json", "train": "metrics.parquet", "tune": "results.json",
            "evaluate": "metrics.json"}[job] in left
    assert chaos._left_over(f"straight/{job}") == []
