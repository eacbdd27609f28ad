"""What a driver asks of the cluster, without one."""

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
