"""The actors of an evaluation that draw: samplers and decoders. What they import (models, autoencoders) takes seconds and
memory, which readers and feature networks (jobs/stages.py) do without.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.numpy import load as load_safetensors

from mdt_ray import config_io, storage
from mdt_ray.autocast import autocast_dtype
from mdt_ray.config import EvaluateConfig, WorkersConfig
from mdt_ray.inference.sampler import Networks, draw_latents, labels_of, load_decoder, load_networks
from mdt_ray.jobs import session
from mdt_ray.jobs.fanout import Stage
from mdt_ray.jobs.stages import ARRAYS, Measure, Read, packed

SHARE = 0.1
"""Of a GPU, for all decoders together, and for all feature networks: a sampler fits beside them, wherever they are."""
SAMPLERS_PER_HELPER = 4
"""Samplers that one decoder and one feature network keep up with: these call a network once, samplers hundreds of times."""


class Draw:
    """Item with plan, start, stop -> latents and labels of these images; loads networks when it first needs them.

    Items of `Read` it passes on to one: an evaluation's few real images are not worth actors of their own.
    """

    def __init__(self, plain: list[dict[str, Any]], handed: list[dict[str, Any]], workers: dict[str, Any],
                 mailbox: Any = None):
        self.read = Read(handed)
        self.configs = [config_io.from_dict(EvaluateConfig, p) for p in plain]
        self.device = torch.device(session.settle(WorkersConfig(**workers)))
        session.full_float32()
        self.mailbox = mailbox
        self.networks = functools.lru_cache(maxsize=1)(self._networks)

    def _networks(self, *key: Any) -> Networks:
        config = next(c for c in self.configs if _networks_of(c) == key)
        dtype = autocast_dtype(config.precision, self.device)
        return load_networks(config.checkpoint, config.sampling, self.device, dtype, config.compile)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if "exact" in item:
            return self.read(item)
        config, start, stop = self.configs[item["plan"]], item["start"], item["stop"]
        networks = self.networks(*_networks_of(config))
        began, parts = time.time(), []
        labels = labels_of(start, stop, networks.num_classes, config.labels, config.seed)  # (n,)
        busy = 0.0
        for first, part in _batches(labels, config.sample_batch_size):
            started = time.perf_counter()
            parts.append(draw_latents(networks, config.sampling, start + first, part, config.seed).cpu())
            busy += time.perf_counter() - started
            if self.mailbox is not None:
                self.mailbox.put.remote({"chunk": item["number"], "num_read": first + len(part)}, item["number"])
        return item | packed(latents=torch.cat(parts).numpy(), labels=labels.numpy()) | {
            "drawer": f"{os.uname().nodename}:{os.getpid()}", "began": began, "ended": time.time(), "busy": busy}


def _networks_of(config: EvaluateConfig) -> tuple[Any, ...]:
    """What settings must share to share networks."""
    s = config.sampling
    return config.checkpoint, s.weights, s.guide, s.guide_weights, config.precision, config.compile


class Decode:
    """Latents -> pictures; keeps latents of the first images, to look for copies. What was read goes on as it is."""

    def __init__(self, plain: list[dict[str, Any]], workers: dict[str, Any]):
        self.configs = [config_io.from_dict(EvaluateConfig, p) for p in plain]
        self.device = session.settle(WorkersConfig(**workers))
        session.full_float32()
        self.vae = functools.cache(lambda uri: load_decoder(storage.read_json(storage.join(uri, "state.json")), self.device))

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if "exact" in item:
            return item
        config, arrays = self.configs[item["plan"]], load_safetensors(item[ARRAYS])
        vae, parts = self.vae(config.checkpoint), []
        for _, part in _batches(torch.from_numpy(arrays["latents"]), config.sample_batch_size):
            parts.append(vae.decode(part.to(self.device), config.sampling.round_pixels).cpu().permute(0, 2, 3, 1))
        return item | packed(pictures=torch.cat(parts).contiguous().numpy(), labels=arrays["labels"],
                              latents=arrays["latents"][:max(config.keep_images - item["start"], 0)])


def drawing(plain: list[dict[str, Any]], handed: list[dict[str, Any]], workers: WorkersConfig,
            mailbox: Any = None) -> list[Stage]:
    """The stages of drawn pictures, and of those to compare them with. On GPUs samplers leave a fifth to the others."""
    count = math.ceil(workers.num_workers / SAMPLERS_PER_HELPER)
    helper = dataclasses.replace(workers, num_workers=count, gpus_per_worker=workers.gpus_per_worker * SHARE / count)
    own = dataclasses.replace(workers, gpus_per_worker=workers.gpus_per_worker * (1 - 2 * SHARE))
    return [Stage(Draw, (plain, handed, vars(own), mailbox), own), Stage(Decode, (plain, vars(helper)), helper, False),
            Stage(Measure, (vars(helper),), helper, False)]


def _batches(tensor: torch.Tensor, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Parts of a tensor and the row that each starts at."""
    return zip(range(0, len(tensor), size), tensor.split(size), strict=True)
