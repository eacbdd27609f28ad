"""A small checkpoint for the digits' VAE, one for each kind of model."""

import pytest
import torch

from mdt_ray import config_io
from mdt_ray.config import ModelConfig, OptimConfig, TrainConfig, VaeConfig
from mdt_ray.data.vae import load_vae
from mdt_ray.training import state as states
from mdt_ray.training.optim import build_optimizer
from mdt_ray.training.step import build_model


def make_checkpoint(output, **model) -> str:
    """A whole checkpoint with random weights, as `train` writes it."""
    config = TrainConfig(model=ModelConfig(**{"input_size": 4, "in_channels": 4, "patch_size": 1, "hidden_size": 32,
                                              "depth": 3, "num_heads": 2, "num_classes": 10, "decode_layer": 1} | model))
    torch.manual_seed(0)
    transformer = build_model(config.model)
    for parameter in transformer.parameters():
        parameter.data.normal_(0, 0.1)
    vae = load_vae(VaeConfig(path="digits"))
    num_classes = config.model.num_classes
    facts = {"vae": {"path": "digits", "revision": None, "scale": vae.scale, "shift": vae.shift,
                     "weights_hash": vae.weights_hash}, "image_size": 32, "latent_shape": [4, 4, 4],
             "class_names": [f"digit {c}, number {c}" for c in range(num_classes)], "num_classes": num_classes}
    state = states.TrainState(model=transformer, ema=transformer, optimizer=build_optimizer(transformer, OptimConfig()))
    state.history.append({"step": 0, "loss": 1.25, "loss_full": 0.75})
    run = {"config": config_io.to_dict(config), "versions": {"torch": torch.__version__}}
    return states.save_checkpoint(state, str(output), run, facts)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def checkpoint_v2(tmp_path_factory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint-v2"), kind="mdt_v2")
