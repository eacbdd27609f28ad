"""What asks a cluster's autoscaler for nodes, on a real Ray without one. With one: test_survival.py."""

import time

import pytest
import ray

from mdt_ray.config import WorkersConfig
from mdt_ray.jobs import nodes
from tests import harness

pytestmark = pytest.mark.ray
ONE = WorkersConfig(cpus_per_worker=1)


@pytest.fixture(autouse=True)
def session(ray_session):
    assert harness.open_placement_groups() == []
    yield
    assert harness.open_placement_groups() == []


def soon(what) -> bool:
    end = time.monotonic() + 20
    while not what() and time.monotonic() < end:
        time.sleep(0.05)
    return what()


def test_room_is_held_from_when_there_is_some_until_the_end():
    free = nodes.room_for(ONE)
    demand = nodes.Demand(ONE, 2, "mine")
    assert not demand.is_met()
    demand.ask()
    assert soon(demand.is_met)
    assert soon(lambda: nodes.room_for(ONE) == free - 2)
    demand.ask()
    assert len(nodes.reserved()) == 1, "once"
    demand.close()
    assert soon(lambda: nodes.room_for(ONE) == free)


def test_what_is_asked_for_takes_nothing_while_it_does_not_all_fit():
    free = nodes.room_for(ONE)
    demand = nodes.Demand(ONE, free + 1, "mine")
    demand.ask()
    time.sleep(1)
    assert not demand.is_met()
    assert nodes.room_for(ONE) == free
    demand.close()


def test_what_a_lost_process_asked_for_goes_with_the_next_of_its_name():
    lost = nodes.Demand(ONE, 1, "mine")
    lost.ask()
    other = nodes.Demand(ONE, 1, "another's")
    other.ask()
    again = nodes.Demand(ONE, 1, "mine")
    assert soon(lambda: len(nodes.reserved()) == 1)
    lost.ask()
    assert soon(lost.is_met), "one that was removed is asked for again"
    again.close()
    lost.close()
    other.close()


@ray.remote(num_cpus=0)
class Holder:
    """As Ray Train's controller in a trial's process."""

    def hold(self) -> None:
        self.demand = nodes.Demand(ONE, 1, f"held-{ray.get_runtime_context().get_actor_id()}")
        self.demand.ask()


def test_what_lost_processes_had_reserved_is_given_back():
    """And nothing of those that live."""
    lost, alive, mine = Holder.remote(), Holder.remote(), nodes.Demand(ONE, 1, "mine")
    ray.get([lost.hold.remote(), alive.hold.remote()])
    mine.ask()
    assert soon(lambda: len(nodes.reserved()) == 3)
    assert nodes.orphans() == set()
    ray.kill(lost)
    assert soon(lambda: len(nodes.orphans()) == 1)
    nodes.release(nodes.orphans())
    assert soon(lambda: len(nodes.reserved()) == 2)
    assert nodes.orphans() == set()
    mine.close()
    ray.kill(alive)
    assert soon(lambda: len(nodes.orphans()) == 1)
    nodes.release(nodes.orphans())
    assert soon(lambda: nodes.reserved() == set())
