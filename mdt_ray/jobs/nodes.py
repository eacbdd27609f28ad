"""What the cluster's nodes hold, what they have free and which are about to go, and what a job reserves of them; much of it
without a public call of Ray's."""

import contextlib
from typing import Any

import ray
from ray._private import state
from ray._raylet import PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import (
    NODE_ID_LABEL_KEY,
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from mdt_ray.config import WorkersConfig

HEAD = "node:__internal_head__"
"""A resource of the head alone."""


def draining() -> set[str]:
    """Ids of nodes that were told to go (a spot instance's notice, `ray drain-node`) and still run."""
    return set(state.state.get_draining_nodes() or {})


def room_for(workers: WorkersConfig) -> int:
    """How many more workers fit on what is free now, on nodes that stay."""
    going = draining()
    free = {node: have for node, have in state.available_resources_per_node().items() if node not in going}
    return sum(num_fitting(have, workers) for have in free.values())


def num_fitting(resources: dict[str, float], workers: WorkersConfig) -> int:
    """How many workers one node holds with these resources."""
    need = {"CPU": workers.cpus_per_worker, "GPU": workers.gpus_per_worker}
    # Ray counts in units of 1e-4: 0.3 CPUs hold three workers of 0.1, whatever the quotient of floats.
    return int(min(resources.get(name, 0) / amount for name, amount in need.items() if amount) + 1e-6)


def bundle(workers: WorkersConfig) -> dict[str, float]:
    """What one worker reserves, as Ray names it."""
    return {"CPU": workers.cpus_per_worker} | ({"GPU": workers.gpus_per_worker} if workers.gpus_per_worker else {})


def off_the_head() -> dict[str, str]:
    """A label selector for what reserves nothing: of all nodes but a head that has no processors to give, where such work
    would find room too. Empty where the head has some."""
    for node in ray.nodes():
        if HEAD in node["Resources"] and not node["Resources"].get("CPU"):
            return {NODE_ID_LABEL_KEY: f"!{node['NodeID']}"}
    return {}


def reserved() -> set[str]:
    """Ids of this job's placement groups. (They end with the id of the job.)"""
    job = ray.get_runtime_context().get_job_id()
    return {name for name, group in placement_group_table().items()
            if name.endswith(job) and group["state"] != "REMOVED"}


def orphans() -> set[str]:
    """Ids of this job's placement groups whose creator, an actor, is dead: Ray frees them with the job only. (Ray Train's
    controller goes with a trial's process that is lost, and not what it had reserved.)"""
    job, found = ray.get_runtime_context().get_job_id(), set()
    for row in state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(row)
        is_open = group.state != PlacementGroupTableData.REMOVED and group.creator_job_id.hex() == job
        if is_open and group.creator_actor_dead and not ray.ActorID(group.creator_actor_id).is_nil():
            found.add(group.placement_group_id.hex())
    return found


def release(groups: set[str]) -> None:
    """Give back what placement groups hold, and end what runs in them."""
    for name in groups:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


class Demand:
    """Nodes that hold so many workers, asked of the autoscaler of a cluster that has one: by a placement group that waits.

    For workers that are started only where there is room: while they wait, Ray sees no demand. (It ends with the job, and is
    no other job's; of `request_resources` neither is true.)
    """

    def __init__(self, workers: WorkersConfig, num_workers: int, name: str):
        """name: of what waits. What a lost process left under it is removed."""
        self.name, self.bundles = name, [bundle(workers)] * num_workers
        self.group: PlacementGroup | None = None
        drop_demand(name)

    def ask(self) -> None:
        """Ask from now on."""
        facts = self._facts()
        if facts.get("state") == "RESCHEDULING" or _goes(facts):  # of other nodes a part may be held, of no use
            self.close()
            facts = {}
        if facts.get("state", "REMOVED") == "REMOVED":  # (with those of a lost controller, maybe)
            self.group = placement_group(self.bundles, name=self.name)

    def is_met(self) -> bool:
        """Whether there is room for all workers, on nodes that stay: it is held until `close`."""
        facts = self._facts()
        return facts.get("state") == "CREATED" and not _goes(facts)

    def close(self) -> None:
        """Ask no more, and give back what is held."""
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None

    def _facts(self) -> dict[str, Any]:
        return placement_group_table(self.group) if self.group else {}


def _goes(facts: dict[str, Any]) -> bool:
    """Whether a placement group is on a node that is about to go."""
    return bool(draining() & set(facts.get("bundles_to_node_id", {}).values()))


def drop_demand(name: str) -> None:
    """Remove what a process of this job asked for under a name, if it did. (A killed one's stays until the job ends.)"""
    with contextlib.suppress(ValueError):  # there is none
        remove_placement_group(get_placement_group(name))
