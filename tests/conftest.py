"""Fixtures for all tests: the reference vectors, small latents, and one Ray session."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests import s3

# With more threads than idle cores, torch's threads wait for each other and run many times slower.
torch.set_num_threads(1)
# A shell lets what it starts in the background ignore Ctrl-C, and that what it starts: tests send it to jobs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def vectors() -> dict[str, torch.Tensor]:
    """Outputs of the public reference implementations; see tests/data/README.md."""
    return load_file(DATA / "reference_a.safetensors")


@pytest.fixture(scope="session")
def vector_config() -> dict:
    with safe_open(DATA / "reference_a.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"])["config"]


def with_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors below a prefix, without it."""
    return {name[len(prefix):]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |a - b| / max |b|; parity means at most 1e-4."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="session")
def ray_session():
    """One Ray for the whole test session, started as the jobs start it."""
    import ray

    from mdt_ray.jobs import session

    os.environ.update(s3.KEYS)  # Ray's workers inherit what is set now
    session.start(dashboard=True)  # as `tune` needs it: another start would end the one that tests have the address of
    yield ray
    ray.shutdown()
