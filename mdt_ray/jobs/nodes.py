"""What the cluster's nodes have free and which of them are about to go. Ray has no public call for either: both are here."""

from ray._private import state

from mdt_ray.config import WorkersConfig


def draining() -> set[str]:
    """Ids of nodes that were told to go (a spot instance's notice, `ray drain-node`) and still run."""
    return set(state.state.get_draining_nodes() or {})


def room_for(workers: WorkersConfig) -> int:
    """How many more workers fit on what is free now, on nodes that stay."""
    need = {"CPU": workers.cpus_per_worker, "GPU": workers.gpus_per_worker}
    need = {name: amount for name, amount in need.items() if amount}
    going = draining()
    free = {node: have for node, have in state.available_resources_per_node().items() if node not in going}
    return sum(int(min(have.get(name, 0) / amount for name, amount in need.items()) + 1e-6) for have in free.values())
