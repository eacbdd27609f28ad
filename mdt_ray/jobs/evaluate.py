"""Job `evaluate`: checkpoint -> samples -> metrics, in chunks of fixed index ranges over a pool of actors.

    run.json                       settings, identity
    chunks/<first>.safetensors     features (and the first pictures) of images first, first + 1, ...
    reference-<hash>/              the same for the real images
    metrics.json                   written last
"""

import contextlib
import dataclasses
import functools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mdt_ray import checkpoints, config_io, run_folder, storage
from mdt_ray.config import EvaluateConfig, SamplingConfig
from mdt_ray.data import listings, readers, sources
from mdt_ray.data.listings import Listing
from mdt_ray.data.sources import Source
from mdt_ray.evaluation import chunks, gate
from mdt_ray.inference.sampler import Sampler, check_guide, check_weights
from mdt_ray.jobs import fanout, progress, session
from mdt_ray.training.run import autocast_dtype

METRICS = "metrics.json"
LISTING = "listing.parquet"


@dataclass(frozen=True)
class Plan:
    """One evaluation, resolved: which files it needs and where."""

    config: EvaluateConfig
    run: dict
    facts: dict
    """state.json of the checkpoint."""
    inputs: dict[str, Any]
    """Hashes of what is read (checkpoint, guide, reference), and the format of the chunks."""
    source: Source
    """The real images."""
    listing: Listing
    reference_folder: str

    def sample_uris(self) -> dict[str, dict[str, Any]]:
        """File of each chunk of samples -> its item of work."""
        config = self.config
        return {storage.join(config.output, "chunks", f"{start:08d}.safetensors"):
                {"kind": "sample", "start": start, "stop": min(start + config.chunk_size, config.num_samples)}
                for start in range(0, config.num_samples, config.chunk_size)}

    def reference_uris(self) -> dict[str, dict[str, Any]]:
        """File of each chunk of real images -> its item of work."""
        count, size = self.listing.table.num_rows, self.config.chunk_size
        return {storage.join(self.reference_folder, "chunks", f"{start:08d}.safetensors"):
                {"kind": "reference", "start": start, "stop": min(start + size, count)}
                for start in range(0, count, size)}

    def write_listing(self) -> None:
        """For the actors: part k holds the images of the reference's chunk k."""
        parts = [np.arange(item["start"], item["stop"]) for item in self.reference_uris().values()]
        listings.write_parts(storage.join(self.reference_folder, LISTING), self.listing, parts)


def plan(config: EvaluateConfig, reference_root: str | None = None) -> Plan:
    """Resolve checkpoint, reference and identity. Raises ValueError for what is missing or does not fit."""
    checkpoint, sampling, inputs = resolve(config.checkpoint, config.sampling)
    reference = config.reference if config.reference == "digits" else storage.absolute(config.reference)
    config = dataclasses.replace(config, checkpoint=checkpoint, reference=reference, output=storage.absolute(config.output),
                                 sampling=sampling)
    facts = storage.read_json(storage.join(checkpoint, "state.json"))
    chunks.check_extractor(config.extractor, facts["image_size"])
    source = sources.open_source(config.reference)
    fingerprint = config_io.fingerprint([source.fingerprint, config.extractor, facts["image_size"], config.chunk_size,
                                         chunks.FORMAT])
    inputs |= {"reference": fingerprint, "format": chunks.FORMAT}
    run = run_folder.describe("evaluate", config, inputs)
    return Plan(config=config, run=run, facts=facts, inputs=inputs, source=source, listing=listings.list_images(source),
                reference_folder=storage.join(storage.absolute(reference_root or config.output), f"reference-{fingerprint}"))


def resolve(checkpoint: str, sampling: SamplingConfig) -> tuple[str, SamplingConfig, dict[str, str]]:
    """The checkpoint's URI, the settings with the guide's, and the hashes of both for the identity of what is drawn.

    Raises ValueError for a checkpoint, weights or a guide that are not there, or a guide of other latents.
    """
    checkpoint = checkpoints.resolve(storage.absolute(checkpoint))
    check_weights(checkpoint, sampling.weights)
    inputs = {"checkpoint": _hash_of(checkpoint)}
    if sampling.guide:
        guide = checkpoints.resolve(storage.absolute(sampling.guide))
        check_weights(guide, sampling.guide_weights)
        check_guide(storage.read_json(storage.join(checkpoint, "state.json")), guide)
        sampling, inputs["guide"] = dataclasses.replace(sampling, guide=guide), _hash_of(guide)
    return checkpoint, sampling, inputs


def _hash_of(checkpoint: str) -> str:
    return storage.sha256(storage.read_bytes(storage.join(checkpoint, checkpoints.CHECKSUMS)))[:16]


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Sample and measure; returns the content of metrics.json. Does nothing where that is written."""
    return evaluate_many([config])[0]


def evaluate_many(configs: list[EvaluateConfig], reference_root: str | None = None,
                  pool: bool = True) -> list[dict[str, Any]]:
    """Several evaluations as one job, in which an actor loads each model once; they share the real images' features.

    Args:
        reference_root: folder of the real images' features; by default the first output.
        pool: False works in this process, without Ray, below a folder that the caller has claimed.
    Raises ValueError as `plan`, and if an output holds another run or has another writer.
    """
    root = reference_root or configs[0].output
    plans = [plan(config, root) for config in configs]
    for p in plans:
        run_folder.check_identity(p.config.output, p.run)
    todo = [p for p in plans if not storage.exists(storage.join(p.config.output, METRICS))]
    with contextlib.ExitStack() as stack:
        for p in todo:
            if pool:
                stack.enter_context(run_folder.claim(p.config.output, p.run))
            else:
                run_folder.record(p.config.output, p.run)
        started = time.perf_counter()
        _run_missing(todo, pool)
        for p in todo:
            _write_metrics(p, (time.perf_counter() - started) / len(todo))
    return [storage.read_json(storage.join(p.config.output, METRICS)) for p in plans]


def _run_missing(plans: list[Plan], pool: bool) -> None:
    items: dict[str, dict[str, Any]] = {}
    for number, p in enumerate(plans):
        for uri, item in (p.reference_uris() | p.sample_uris()).items():
            items.setdefault(uri, item | {"plan": number, "uri": uri})
    missing = [item for uri, item in items.items() if not storage.exists(uri)]
    if not missing:
        return
    for p in plans:
        if p.reference_uris().keys() & {item["uri"] for item in missing}:
            p.write_listing()
    plain = [{"config": config_io.to_dict(p.config), "image_size": p.facts["image_size"],
              "folder": p.source.folder, "kind": p.source.kind,
              "listing": storage.join(p.reference_folder, LISTING)} for p in plans]
    if not pool:
        work = Evaluator(plain)
        for item in missing:
            work(item)
        return
    session.start()
    total = sum(item["stop"] - item["start"] for item in items.values())
    waiting = sum(item["stop"] - item["start"] for item in missing)
    with progress.bar(total, "image", "evaluate", initial=total - waiting) as bar:
        for row in fanout.run_chunks(missing, Evaluator, (plain,), plans[0].config.workers):
            bar.update(row["num_images"])


def _write_metrics(p: Plan, seconds: float) -> None:
    config = p.config
    samples = chunks.read_chunks(list(p.sample_uris()))
    reference = chunks.read_chunks(list(p.reference_uris()))
    wrong = gate.reasons(samples.facts, num_expected=config.num_samples, num_classes=p.facts["num_classes"],
                         labels=config.labels)
    wrong += [f"the reference: {reason}" for reason in gate.reasons(reference.facts, num_expected=len(reference.labels))]
    if wrong:
        raise ValueError(f"{config.output}: these images give no metrics:\n  " + "\n  ".join(wrong))
    values = chunks.compute_metrics(samples, reference, config.extractor)
    facts = {
        "checkpoint": {"uri": config.checkpoint, "hash": p.inputs["checkpoint"], "step": p.facts["step"]},
        "guide": {"uri": config.sampling.guide, "hash": p.inputs["guide"]} if config.sampling.guide else None,
        "vae": p.facts["vae"],
        "reference": {"source": config.reference, "num_images": len(reference.labels),
                      f"fid_{config.extractor}_between_halves": chunks.distance_between_halves(reference)},
        "run": p.run["name"], "versions": p.run["versions"], "seconds": seconds,
    }
    storage.write_json(storage.join(config.output, METRICS), chunks.describe_metrics(config, values, facts))


class Evaluator:
    """Does one item of any of the evaluations; keeps the sampler of the last one."""

    def __init__(self, plain: list[dict[str, Any]]):
        self.configs = [config_io.from_dict(EvaluateConfig, p["config"]) for p in plain]
        self.plain = plain
        self.device = session.settle(self.configs[0].workers)
        self.sampler = functools.lru_cache(maxsize=1)(self._sampler)
        self.extractor = functools.cache(lambda name: chunks.EXTRACTORS[name]())

    def _sampler(self, number: int) -> Sampler:
        config = self.configs[number]
        dtype = autocast_dtype(config.precision, torch.device(self.device))
        return Sampler(config.checkpoint, config.sampling, self.device, dtype)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        config, extractor = self.configs[item["plan"]], self.extractor(self.configs[item["plan"]].extractor)
        if item["kind"] == "sample":
            arrays = chunks.sample_chunk(self.sampler(item["plan"]), extractor, config, item["start"], item["stop"])
        else:
            p = self.plain[item["plan"]]
            rows, _, _ = listings.read_parts(p["listing"], [item["start"] // config.chunk_size])
            piece = readers.read_few(p["folder"], p["kind"], rows)
            arrays = chunks.reference_chunk(extractor, piece, p["image_size"], config.keep_images - item["start"])
        chunks.write_chunk(item["uri"], arrays)
        return {"num_images": item["stop"] - item["start"]}
