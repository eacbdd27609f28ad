"""What the drivers cost (benchmarks/scale.py), a tenth of it: that it still runs with the jobs as they are."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PARTS = {
    "chunks": {"chunks", "actors"},
    "files": {"files", "open_manifest_seconds", "restart_reads_chunks_seconds", "list_pictures_seconds",
              "s3_open_manifest_seconds"},
    "sweep": {"trials", "sweep_seconds_per_trial", "finished_sweep_opens_in_seconds"}}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_the_simulations_of_scale_run(part):
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "scale.py"), "--quick", "--only", part],
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert figures.keys() >= PARTS[part]
    assert all(value > 0 for value in figures.values())
