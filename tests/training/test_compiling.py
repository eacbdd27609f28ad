"""Compiled blocks: as many compilations as there are kinds of block and shapes, none later, and the same losses."""

import dataclasses
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from mdt_ray.config import LossConfig, ModelConfig
from mdt_ray.models.compiling import compile_blocks
from mdt_ray.models.layers import gelu
from tests.helpers import make_latents, tiny_training
from tests.training.test_training import prepared, run

pytestmark = [pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on CPUs"),
              pytest.mark.filterwarnings("default")]  # PyTorch's compiler warns of itself in many places


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    make_latents(folder, num_images=130, side=8)
    return folder


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def settings(folder, output, kind: str, **changes):
    """64 tokens. v1 keeps 44 of them; v2 draws a ratio for every step, and keeps 32 or 40."""
    model = ModelConfig(kind=kind, patch_size=1, hidden_size=32, depth=6 if kind == "mdt_v2" else 3, num_heads=2,
                        decode_layer=2 if kind == "mdt_v2" else 1)
    loss = LossConfig(mask_ratio=0.3, mask_ratio_span=0.2) if kind == "mdt_v2" else LossConfig(mask_ratio=0.3)
    return tiny_training(folder, output, model=model, loss=loss, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_compiled"), [
    # One kind of block, for all tokens of B images (encoder, side-interpolator), for the kept ones, and for all of 2B.
    ("mdt_v1", 3),
    # Blocks without a long skip for all tokens and two numbers of kept ones, blocks with one for these and for all of 2B.
    ("mdt_v2", 7),
    ("dit", 1)])
def test_every_kind_and_shape_is_compiled_once_and_losses_agree(folder, tmp_path, kind, num_compiled):
    seen = []
    compiled = settings(folder, tmp_path / "compiled", kind, num_steps=200, checkpoint_every_steps=100, compile=True)
    eager = run(dataclasses.replace(compiled, output=str(tmp_path / "eager"), num_steps=20, compile=False)).history
    assert not counters["stats"]["unique_graphs"]
    found = run(compiled, report=lambda row: seen.append(counters["stats"]["unique_graphs"])).history
    assert seen[-1] == num_compiled
    assert seen[20:] == [num_compiled] * 180
    for one, other in zip(found, eager, strict=False):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert [row["loss"] for row in found[:3]] == pytest.approx([row["loss"] for row in eager[:3]], rel=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_compiled_gelu_is_gelu(dtype, bound):
    """It is written in another way; values and gradients, far out too."""
    x = torch.linspace(-20, 20, 8001).to(dtype)
    both = []
    for function, inputs in ((torch.compile(gelu, dynamic=False), x.clone()), (gelu, x.double())):
        inputs.requires_grad_()
        value = function(inputs)
        value.sum().backward()
        both.append((value.double(), inputs.grad.double()))
    for found, expected in zip(*both, strict=True):
        assert ((found - expected).abs() <= bound * (1 + expected.abs())).all()


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, pytest.param(
    {"accumulation": 5}, marks=pytest.mark.slow)])  # 12 lanes in parts of 2 and of 3
def test_with_other_savings_losses_agree(folder, tmp_path, changes):
    compiled = settings(folder, tmp_path / "compiled", "mdt_v1", num_steps=4, compile=True, **changes)
    found, expected = (run(config).history for config in
                       (compiled, dataclasses.replace(compiled, output=str(tmp_path / "eager"), compile=False)))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    assert counters["stats"]["unique_graphs"] == (6 if "accumulation" in changes else 3)


def test_a_compiled_run_goes_on_eagerly(folder, tmp_path):
    config = settings(folder, tmp_path, "mdt_v1", num_steps=10, compile=True)
    run(config)
    history = run(dataclasses.replace(config, num_steps=12, compile=False)).history
    assert [row["step"] for row in history] == list(range(1, 13))


@pytest.mark.slow
def test_more_shapes_than_pytorch_allows_by_itself(tmp_path):
    """Ten numbers of kept tokens, where its limit is eight."""
    make_latents(tmp_path / "latents")
    _, state, step, loader = prepared(tmp_path / "latents", tmp_path)
    compile_blocks(state.model)
    batch = loader.batch(0)
    for num_hidden in range(1, 11):
        step.loss = LossConfig(mask_ratio=num_hidden / 16)
        with torch.no_grad():
            step(batch)
    assert counters["stats"]["unique_graphs"] == 10 + 2
