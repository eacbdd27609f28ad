"""What a run is at a step, and its checkpoint: a folder that opens without any training code.

    model/ ema/       diffusers' save_pretrained layout (safetensors)
    ema_<...>/        the same of every further average (training/ema.py)
    optimizer.pt      torch, read with weights_only
    state.json        step, images seen, attempt, and the latents' VAE, size and classes
    metrics.parquet   the rows logged so far
    run.json          settings, identity, versions
    checksums.json    sha256 of every other file, written last
"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from mdt_ray import checkpoints, storage
from mdt_ray.checkpoints import CHECKPOINTS
from mdt_ray.models import MDT, DiT
from mdt_ray.training import ranks


@dataclass
class TrainState:
    """The moving parts of a run. `step` steps are done; `attempt` counts returns to an earlier checkpoint."""

    model: MDT | DiT
    ema: MDT | DiT
    optimizer: torch.optim.Optimizer
    step: int = 0
    attempt: int = 0
    history: list[dict] = field(default_factory=list)
    """Rows of metrics logged so far, on rank 0 only."""
    more_ema: dict[str, MDT | DiT] = field(default_factory=dict)
    """Further averages, by the name of their folder."""

    @property
    def averages(self) -> dict[str, MDT | DiT]:
        """All averages by name."""
        return {"ema": self.ema, **self.more_ema}


def save_checkpoint(state: TrainState, output: str, run: dict, facts: dict) -> str:
    """Write a checkpoint whole; returns its URI.

    `run` is the content of run.json; `facts` are stored in state.json beside the step.
    """
    return snapshot(state, output, run, facts)()


def snapshot(state: TrainState, output: str, run: dict, facts: dict) -> Callable[[], str]:
    """Copy the state to the host's memory; returns what writes the copy, also from another thread while training goes on."""
    uri = storage.join(output, CHECKPOINTS, checkpoints.name(state.step))
    modules = {name: copy_to_host(module) for name, module in {"model": state.model, **state.averages}.items()}
    optimizer = tree_map(_to_host, state.optimizer.state_dict())
    values = {"step": state.step, "attempt": state.attempt, **facts}
    history = list(state.history)

    def write() -> str:
        with checkpoints.create(uri) as folder:
            for name, module in modules.items():
                module.save_pretrained(folder / name)
            torch.save(optimizer, folder / "optimizer.pt")
            (folder / "state.json").write_text(json.dumps(values, indent=1))
            (folder / "run.json").write_text(json.dumps(run, indent=1))
            checkpoints.write_metrics(str(folder / "metrics.parquet"), history)
        return uri

    return write


def copy_to_host(module: nn.Module) -> nn.Module:
    """The module with its weights copied to the host; nothing more is allocated on the device."""
    with torch.device("meta"):
        shell = type(module).from_config(module.config)
    shell.load_state_dict({name: _to_host(value) for name, value in module.state_dict().items()}, assign=True)
    return shell


def _to_host(value: object) -> object:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def restore(state: TrainState, files: Path | None) -> None:
    """Load a checkpoint into `state`, in place. Rank 0 has its files and gives the others what they hold: they need no
    store, and a store is not asked for a hundred gigabytes at once. Every rank must call it."""
    held = _read(state, files) if files else None
    values, optimizer = ranks.from_first(held and (held[0], tree_map(_to_meta, held[1])))
    optimizer = held[1] if held else tree_map(_empty, optimizer)
    state.optimizer.load_state_dict(optimizer)
    state.step, state.attempt = values["step"], values["attempt"]
    ranks.share(_tensors_of(state))


def _read(state: TrainState, files: Path) -> tuple[dict, dict]:
    """Fill the modules and the history; returns state.json's content and the optimiser's state."""
    for name, module in {"model": state.model, **state.averages}.items():
        module.load_state_dict(type(module).from_pretrained(files / name, low_cpu_mem_usage=False).state_dict())
    state.history[:] = checkpoints.read_metrics(str(files / "metrics.parquet"))
    return (json.loads((files / "state.json").read_text()),
            torch.load(files / "optimizer.pt", weights_only=True, map_location="cpu"))


def _tensors_of(state: TrainState) -> list[torch.Tensor]:
    """Every tensor that training changes, in the same order on every rank."""
    modules = [tensor for module in (state.model, *state.averages.values()) for tensor in module.state_dict().values()]
    return modules + [leaf for leaf in tree_leaves(state.optimizer.state_dict()) if isinstance(leaf, torch.Tensor)]


def _to_meta(value: object) -> object:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _empty(value: object) -> object:
    return torch.empty_like(value, device="cpu") if isinstance(value, torch.Tensor) else value


def prune_checkpoints(output: str, keep_last: int, keep_every_steps: int, spare: Collection[int] = ()) -> None:
    """Delete all but the newest `keep_last` checkpoints, those at a multiple of `keep_every_steps` (0: none), and those of
    the steps to `spare`."""
    finished = {checkpoints.step_of(uri): uri for uri in checkpoints.list_finished(output)}
    kept = checkpoints.kept(list(finished), keep_last, keep_every_steps)
    for step, uri in finished.items():
        if step not in kept and step not in spare:
            checkpoints.remove(uri)
