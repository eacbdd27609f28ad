"""Snapshots of the power-function averages: written, listed, and added up to averages of other lengths (`mdt-ray ema`).

    ema_snapshots/step-<step>/
      ema_power_<std>/    diffusers' save_pretrained layout (safetensors, float32)
      state.json          step, the sigma_rel of each, and what sampling needs to know (as in a checkpoint)
      checksums.json      sha256 of every other file, written last
"""

import itertools
import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from mdt_ray import checkpoints, storage
from mdt_ray.checkpoints import CHECKSUMS, SNAPSHOTS
from mdt_ray.config import EmaConfig
from mdt_ray.inference.sampler import load_model
from mdt_ray.models import MDT, DiT
from mdt_ray.training.ema import gamma_of, power_names
from mdt_ray.training.posthoc import Profile
from mdt_ray.training.state import TrainState, copy_to_host


def save_snapshot(state: TrainState, output: str, config: EmaConfig, facts: dict) -> Callable[[], None]:
    """Copy the power-function averages to the host's memory; returns what writes the snapshot, whole, also from another
    thread. Nothing is done where it is there already: what is there is of this same run of steps (`drop_after`).

    `facts` are stored in state.json beside the step.
    """
    uri = storage.join(output, SNAPSHOTS, checkpoints.name(state.step))
    if storage.exists(storage.join(uri, CHECKSUMS)):
        return lambda: None
    names = power_names(config)
    modules = {name: copy_to_host(state.averages[name]) for name in names}
    values = {"step": state.step, "power_stds": names, **facts}

    def write() -> None:
        with checkpoints.create(uri) as folder:
            for name, module in modules.items():
                module.save_pretrained(folder / name)
            (folder / "state.json").write_text(json.dumps(values, indent=1))

    return write


def drop_after(output: str, step: int) -> None:
    """Delete the snapshots beyond a step that training goes back to, and what a killed writer left half-written.

    They come again. Where the steps do not repeat to the last bit (GPUs, another number of workers, another attempt), the
    old ones would be of weights that led nowhere.
    """
    storage.clear_leftovers(storage.join(output, SNAPSHOTS))
    for uri in checkpoints.list_finished(output, SNAPSHOTS):
        if checkpoints.step_of(uri) > step:
            checkpoints.remove(uri)


def list_until(output: str, step: int | None) -> list[str]:
    """URIs of the snapshots of a training output up to a step (None: all), oldest first.

    Raises ValueError if there are none, or none of `step`: what is stored later has weights that came after it, and what is
    stored before lacks some.
    """
    found = checkpoints.list_finished(output, SNAPSHOTS)
    if not found:
        raise ValueError(f"source = {output!r}: holds no {SNAPSHOTS}; name a training output, of a run with, say, "
                         "--ema.power-stds 0.05 0.10 --ema.snapshot-every-steps 10000")
    steps = [checkpoints.step_of(uri) for uri in found]
    if step is not None and step not in steps:
        near = min(steps, key=lambda other: abs(other - step))
        raise ValueError(f"step = {step}: must have a snapshot; there are {len(steps)} of steps {steps[0]} to {steps[-1]}, "
                         f"the nearest of step {near}")
    return [uri for uri in found if step is None or checkpoints.step_of(uri) <= step]


class Stored(NamedTuple):
    """One average in a snapshot."""

    uri: str
    name: str
    sigma_rel: float

    @property
    def profile(self) -> Profile:
        """What it averages over."""
        return Profile(gamma_of(self.sigma_rel), checkpoints.step_of(self.uri))


def read_stored(uris: list[str]) -> list[Stored]:
    """All averages in some snapshots."""
    return [Stored(uri, name, std) for uri in uris
            for name, std in storage.read_json(storage.join(uri, "state.json"))["power_stds"].items()]


@torch.no_grad()
def add_up(stored: list[Stored], coefficients: np.ndarray) -> MDT | DiT:
    """The model whose parameters are the sum of coefficients (K,) times the stored averages, summed in float64.

    One average is in memory at a time, beside the sum. Raises ValueError naming a damaged snapshot.
    """
    sums: list[torch.Tensor] = []
    terms = zip(stored, coefficients, strict=True)
    for uri, group in itertools.groupby(terms, key=lambda term: term[0].uri):
        with storage.fetched(uri) as folder:
            fault = checkpoints.damage(folder)
            if fault:
                raise ValueError(f"{uri}: damaged ({fault}); bring it back, or delete that folder to do without it")
            for term, coefficient in group:
                model = load_model(str(folder), term.name)
                sums = sums or [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
                for total, parameter in zip(sums, model.parameters(), strict=True):
                    total.add_(parameter, alpha=float(coefficient))
    for total, parameter in zip(sums, model.parameters(), strict=True):
        parameter.copy_(total)
    return model
