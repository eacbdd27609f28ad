"""What a driver asks of the cluster, without one; and who may ask a local one."""

import subprocess
import sys

import pytest

from mdt_ray.config import WorkersConfig
from mdt_ray.jobs import session


def test_a_cluster_is_asked_for_nodes_while_training_runs_and_one_machine_is_not(monkeypatch):
    asked = []
    monkeypatch.setattr(session, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with session.wanted_nodes(WorkersConfig(num_workers=2)):
        pass
    assert asked == []
    monkeypatch.setenv("RAY_ADDRESS", "a cluster")
    with session.wanted_nodes(WorkersConfig(num_workers=2), 0):
        assert asked == []
    with session.wanted_nodes(WorkersConfig(num_workers=2, cpus_per_worker=4, gpus_per_worker=1), 3):
        assert asked == [[{"CPU": 4, "GPU": 1}] * 6]
    assert asked[1:] == [[]]

    def fail() -> None:
        with session.wanted_nodes(WorkersConfig(num_workers=1, cpus_per_worker=2)):
            raise RuntimeError("a worker was lost")

    with pytest.raises(RuntimeError, match="a worker was lost"):
        fail()
    assert asked[2:] == [[{"CPU": 2}], []]


@pytest.mark.ray
def test_a_local_ray_answers_nobody_without_its_token(ray_session):
    """Its ports are open to the network, for Ray knows no other way."""
    code = "import ray; ray.init(logging_level='ERROR'); print('in', len(ray.nodes()))"
    mine = session.environment()
    for environment, is_in in ((mine, True), (mine | {"RAY_AUTH_MODE": "disabled"}, False)):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=90)
        assert ("in 1" in done.stdout, done.returncode == 0) == (is_in, is_in), done.stderr[-2000:]
        assert is_in or "auth" in done.stderr.lower()
