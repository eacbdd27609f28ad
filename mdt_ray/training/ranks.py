"""What ranks tell each other beside gradients: facts between the hosts' CPUs, which never wait for a GPU's queue, and the
state to begin with."""

import datetime
import functools
import io
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist


def is_first() -> bool:
    """Whether this is rank 0, or alone."""
    return not _several() or dist.get_rank() == 0


def largest(*values: float) -> list[float]:
    """Of each value the largest on any rank. Every rank must call it."""
    if not _several():
        return list(values)
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_hosts(dist.group.WORLD))
    return found.tolist()


def from_first(value: Any) -> Any:
    """Rank 0's value: of Python's plain types, and tensors without data ("meta"). Every rank must call it.

    Read as weights are: torch's object collectives would run what they are sent, and their ports ask for no token.
    """
    if not _several():
        return value
    data = torch.empty(0, dtype=torch.uint8)
    if is_first():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        data = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    size = torch.tensor(len(data))
    share([size])
    data.resize_(int(size))
    share([data])
    return torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)


def share(tensors: Iterable[torch.Tensor]) -> None:
    """Give every rank rank 0's values, in place. Every rank must call it with tensors of the same shapes."""
    if not _several():
        return
    for tensor in tensors:
        dist.broadcast(tensor, src=0, group=_hosts(dist.group.WORLD) if tensor.device.type == "cpu" else dist.group.WORLD)


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


@functools.cache
def _hosts(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """The default group if it runs on CPUs, else one that does, made once for it."""
    patience = datetime.timedelta(days=1)  # (who hangs is for the watchdog to say)
    return world if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=patience)
