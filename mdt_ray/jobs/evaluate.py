"""Job `evaluate`: checkpoint -> samples -> metrics, in chunks of fixed index ranges that stream through pools of actors; or
the metrics of pictures made elsewhere.

    run.json                       settings, identity
    chunks/<first>.safetensors     features (and the first pictures) of images first, first + 1, ...
    reference-<hash>/chunks/       the same of the real images
    seeds-<first>/                 such a folder for each of several ranges of seeds
    neighbours.png                 training images nearest to the kept samples, where `latents` names them
    metrics.parquet                one row: the numbers and all that identifies them
    metrics.json                   the same, written last
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mdt_ray import checkpoints, config_io, run_folder, storage, tables
from mdt_ray.config import EvaluateConfig, SamplingConfig, require
from mdt_ray.data import latents, picture_sets
from mdt_ray.data.picture_sets import PictureSet
from mdt_ray.evaluation import chunks, extractors, gate, reference, results
from mdt_ray.evaluation.reference import Reference
from mdt_ray.evaluation.results import Summary
from mdt_ray.inference.sampler import check_guide, check_weights, load_decoder
from mdt_ray.interrupts import Wish
from mdt_ray.jobs.drawing import draw_missing
from mdt_ray.jobs.measuring import Measurement, absolute_weights, chunk_ranges, measure_missing, place
from mdt_ray.report.memorisation import memorisation

METRICS, ROW, NEIGHBOURS = "metrics.json", "metrics.parquet", "neighbours.png"
REFERENCE = "reference.npz"
"""What `reference` writes."""


@dataclass(frozen=True)
class Plan:
    """One evaluation, resolved: which files it needs and where."""

    config: EvaluateConfig
    run: dict
    facts: dict
    """state.json of the checkpoint; empty for pictures made elsewhere."""
    inputs: dict[str, Any]
    """Hashes of what is read (checkpoint, guide or samples, reference, extractor), and the format of the chunks."""
    samples: Measurement | None
    """Of pictures made elsewhere; None where they are drawn."""
    reference: Measurement | None
    """Of the reference's pictures; None where it has statistics only."""
    statistics: Reference | None
    """Those given as the reference."""

    @property
    def sample_uris(self) -> list[str]:
        """Files of the samples' chunks, in index order."""
        return [uri for uri, _, _ in chunk_ranges(self.config.output, self.config.num_samples, self.config.chunk_size)]


def plan(config: EvaluateConfig, reference_root: str | None = None, known: dict[Any, Any] | None = None) -> Plan:
    """Resolve checkpoint or samples, reference and identity. Raises ValueError for what is missing or does not fit.

    `known` keeps for the next call what takes long, or may change meanwhile: lists of pictures, hashes of weights, and which
    checkpoint of a training output was the newest.
    """
    known = {} if known is None else known
    config = absolute(config)
    require(bool(config.checkpoint or config.samples), "checkpoint", "", "not given; name one, or pictures by --samples")
    require(bool(config.reference), "reference", "", "not given; name real images, or statistics of them (.npz)")
    if config.latents:
        _once(known, latents.open_manifest, config.latents)  # the search comes last, and should not fail then
    facts, samples = {}, None
    if config.checkpoint:
        checkpoint, sampling, inputs = resolve(config.checkpoint, config.sampling, known)
        facts = storage.read_json(storage.join(checkpoint, "state.json"))
        config = dataclasses.replace(config, checkpoint=checkpoint, sampling=sampling)
        image_size = facts["image_size"]
    else:
        samples = _given_samples(config, _once(known, picture_sets.open_pictures, config.samples))
        image_size, inputs = samples.image_size, {"samples": samples.pictures.fingerprint}
    measured, statistics, hashes = open_reference(config, image_size, reference_root or config.output, known)
    inputs |= hashes | {"format": chunks.FORMAT}
    return Plan(config=config, run=run_folder.describe("evaluate", config, inputs), facts=facts, inputs=inputs,
                samples=samples, reference=measured, statistics=statistics)


def absolute(config: EvaluateConfig) -> EvaluateConfig:
    """The config with absolute paths (workers change directory)."""
    sampling, guide = config.sampling, config.sampling.guide
    return dataclasses.replace(config, output=storage.absolute(config.output), samples=place(config.samples),
                               reference=_statistics_in(place(config.reference)),
                               extractor_weights=absolute_weights(config.extractor_weights),
                               latents=config.latents and storage.absolute(config.latents),
                               sampling=dataclasses.replace(sampling, guide=guide and storage.absolute(guide)))


def open_reference(config: EvaluateConfig, image_size: int, root: str,
                   known: dict[Any, Any]) -> tuple[Measurement | None, Reference | None, dict[str, str]]:
    """The reference's pictures to be measured (below `root`), its statistics where it brings them, and the hashes of it and
    of the extractor. Raises ValueError for what is missing, or does not fit images of that side."""
    chunks.check_extractor(config.extractor, image_size)
    weights_hash = _once(known, extractors.weights_hash, config.extractor, config.extractor_weights)
    measured, statistics = _reference(config, image_size, weights_hash, storage.absolute(root), known)
    hashes = [measured and measured.fingerprint(weights_hash), statistics and statistics.fingerprint]
    return measured, statistics, {"reference": config_io.fingerprint(hashes), "extractor": weights_hash}


def _statistics_in(uri: str) -> str:
    """The file of a folder that `reference` wrote; anything else as it is."""
    if uri in ("", "digits") or storage.base(uri).endswith(".npz"):
        return uri
    made = storage.join(uri, REFERENCE)
    return made if storage.exists(made) else uri


def _once(known: dict[Any, Any], function: Callable[..., Any], *arguments: Any) -> Any:
    if (function, *arguments) not in known:
        known[(function, *arguments)] = function(*arguments)
    return known[(function, *arguments)]


def _given_samples(config: EvaluateConfig, pictures: PictureSet) -> Measurement:
    if config.num_samples > pictures.num_images:
        raise ValueError(f"num_samples = {config.num_samples}: {config.samples} holds {pictures.num_images} pictures; use "
                         f"--num-samples {pictures.num_images}")
    return Measurement(pictures=pictures, folder=config.output, image_size=picture_sets.side_of(pictures), exact=True,
                       extractor=config.extractor, extractor_weights=config.extractor_weights, chunk_size=config.chunk_size,
                       num_images=config.num_samples, num_kept=config.keep_images)


def _reference(config: EvaluateConfig, image_size: int, weights_hash: str, root: str,
               known: dict[Any, Any]) -> tuple[Measurement | None, Reference | None]:
    """The reference's pictures to be measured, and its statistics where it brings them."""
    statistics = None
    if storage.base(config.reference).endswith(".npz") and reference.is_statistics(config.reference):
        statistics = _once(known, reference.read_reference, config.reference)
        reference.check_fits(statistics, extractor=config.extractor, weights_hash=weights_hash,
                             transform=extractors.transform(config.extractor), image_size=image_size)
        if not statistics.has_images:
            return None, statistics
    pictures = _once(known, picture_sets.open_pictures, config.reference)
    if pictures.image_size not in (None, image_size):
        raise ValueError(f"reference = {config.reference!r}: has pictures of {pictures.image_size} pixels, but the samples "
                         f"have {image_size}; take a reference of that size")
    measured = Measurement(pictures=pictures, folder="", image_size=image_size, exact=False, extractor=config.extractor,
                           extractor_weights=config.extractor_weights, chunk_size=config.chunk_size,
                           num_images=pictures.num_images, num_kept=config.keep_images)
    folder = storage.join(root, f"reference-{measured.fingerprint(weights_hash)}")
    return dataclasses.replace(measured, folder=folder), statistics


def resolve(checkpoint: str, sampling: SamplingConfig,
            known: dict[Any, Any] | None = None) -> tuple[str, SamplingConfig, dict[str, str]]:
    """The checkpoint's URI, the settings with the guide's, and the hashes of both for the identity of what is drawn. `known`
    as in `plan`.

    Raises ValueError for a checkpoint, weights or a guide that are not there, or a guide of other latents.
    """
    known = {} if known is None else known
    checkpoint = _once(known, checkpoints.resolve, storage.absolute(checkpoint))
    check_weights(checkpoint, sampling.weights)
    inputs = {"checkpoint": _hash_of(checkpoint, sampling.weights)}
    if sampling.guide:
        guide = _once(known, checkpoints.resolve, storage.absolute(sampling.guide))
        check_weights(guide, sampling.guide_weights)
        check_guide(storage.read_json(storage.join(checkpoint, "state.json")), guide)
        require(sampling.cfg_scale != 1, "sampling.guide", sampling.guide, "has no effect with cfg_scale = 1")
        sampling, inputs["guide"] = dataclasses.replace(sampling, guide=guide), _hash_of(guide, sampling.guide_weights)
    return checkpoint, sampling, inputs


def _hash_of(checkpoint: str, weights: str) -> str:
    """Of the weights and of state.json: equal for equal models, whatever run they come from."""
    checksums = storage.read_json(storage.join(checkpoint, checkpoints.CHECKSUMS))
    used = {name: value for name, value in checksums.items() if name.startswith(f"{weights}/") or name == "state.json"}
    return config_io.fingerprint(used)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Sample and measure; returns the content of metrics.json. Does nothing where that is written."""
    return evaluate_many([config])[0]


def evaluate_many(configs: list[EvaluateConfig], reference_root: str | None = None,
                  pool: bool = True, wish: Wish | None = None, known: dict[Any, Any] | None = None) -> list[dict[str, Any]]:
    """Several evaluations as one job, in which an actor loads each model once; they share the real images' features.

    Args:
        reference_root: folder of the real images' features; by default the first output.
        pool: False works in this process, without Ray, below a folder that the caller has claimed.
        wish: of such work, says when to stop: Stopped is raised before the next chunk.
        known: what earlier calls of this process opened and measured of the real images; this one adds to it.
    Raises ValueError as `plan`, and if an output holds another run or has another writer.
    """
    root = reference_root or configs[0].output
    known = {} if known is None else known
    wholes = [plan(config, root, known) for config in configs]
    parts = {p.config.output: _ranges(p, root, known) for p in wholes}
    for p in [*wholes, *(part for of in parts.values() for part in of)]:
        run_folder.check_identity(p.config.output, p.run)
    todo = [p for p in wholes if not all(map(_finished, [p, *parts[p.config.output]]))]
    with contextlib.ExitStack() as stack:
        for p in todo:
            if pool:
                stack.enter_context(run_folder.claim(p.config.output, p.run))
            else:
                run_folder.record(p.config.output, p.run)
            folders = {part.config.output for part in parts[p.config.output]}
            if pool and p.reference:  # without, several processes may write it
                folders.add(p.reference.folder)
            for folder in folders:
                storage.clear_leftovers(storage.join(folder, "chunks"))
        missing = [part for p in todo for part in parts[p.config.output] if not _finished(part)]
        started = time.perf_counter()
        busy = _run_missing(missing, pool, wish)
        compared: dict[str, tuple[Reference, Summary | None]] = known.setdefault("compared", {})
        for part in missing:
            run_folder.record(part.config.output, part.run)
            timing = {"seconds": (time.perf_counter() - started) / len(missing), "samplers": busy}
            if busy is None and storage.exists(storage.join(part.config.output, METRICS)):  # no image was drawn now
                timing = {key: value for key, value in _found(part).items() if key in timing}
            _write_metrics(part, compared, timing)
        for p in todo:
            if p.config.num_seed_ranges > 1:
                _write_ranges(p, parts[p.config.output])
    return [_found(p) for p in wholes]


def _ranges(whole: Plan, root: str, known: dict[Any, Any]) -> list[Plan]:
    """One evaluation for each range of seeds; the plan itself where there is one."""
    config = whole.config
    if config.num_seed_ranges == 1:
        return [whole]
    seeds = range(config.seed, config.seed + config.num_seed_ranges * config.num_samples, config.num_samples)
    return [plan(dataclasses.replace(config, seed=seed, num_seed_ranges=1,
                                     output=storage.join(config.output, f"seeds-{seed}")), root, known)
            for seed in seeds]


def _finished(p: Plan) -> bool:
    """Whether the metrics are there, and computed as asked for now: some settings need no other chunks."""
    if not storage.exists(storage.join(p.config.output, METRICS)):
        return False
    found, config = _found(p), p.config
    asked = {"adm_float16": config.adm_float16, "num_seed_ranges": config.num_seed_ranges}
    searched = (found.get("memorisation") or {}).get("latents", "")
    return all(found.get(key) == value for key, value in asked.items()) and (
        config.num_seed_ranges > 1 or config.latents in ("", searched))


def _found(p: Plan) -> dict[str, Any]:
    return storage.read_json(storage.join(p.config.output, METRICS))


def _run_missing(plans: list[Plan], pool: bool, wish: Wish | None) -> dict[str, float] | None:
    """Write the chunks that are not there; returns how busy the samplers were, where there were any."""
    if not plans:
        return None
    workers = plans[0].config.workers
    references = [p.reference for p in plans if p.reference]
    given = [p.samples for p in plans if p.samples]
    if given:
        measure_missing([*given, *references], workers, pool, "measure")
    return draw_missing([p.config for p in plans if not p.samples], references, workers, pool, wish)


def _write_metrics(p: Plan, compared: dict[str, tuple[Reference, Summary | None]], timing: dict[str, Any]) -> None:
    config = p.config
    samples = results.summarise(chunks.read_chunk(uri) for uri in p.sample_uris)
    wrong = gate.reasons(samples.facts, num_expected=config.num_samples, num_classes=p.facts.get("num_classes", 0),
                         labels="" if p.samples else config.labels)
    if p.inputs["reference"] not in compared:  # settings of a sweep share one
        compared[p.inputs["reference"]] = _compared(p)
    statistics, real = compared[p.inputs["reference"]]
    if real is not None:
        wrong += [f"the reference: {reason}" for reason in gate.reasons(real.facts, num_expected=real.num_images,
                                                                        num_rejected=real.num_rejected)]
    if wrong:
        raise ValueError(f"{config.output}: these images give no metrics:\n  " + "\n  ".join(wrong))
    values, intervals = results.compare(samples, statistics, real and real.features, config.extractor, config.adm_float16)
    _write(p, {"metrics": values, "intervals": intervals, "memorisation": _memorisation(p)} |
           _description(p, statistics, real) | timing)


def _memorisation(p: Plan) -> dict[str, Any] | None:
    """Writes the picture of the kept samples nearest to training images; returns its numbers."""
    if not p.config.latents:
        return None
    pictures, _ = chunks.kept_images(p.sample_uris, p.config.keep_images)
    drawn = chunks.kept_latents(p.sample_uris, p.config.keep_images)
    numbers, picture = memorisation(drawn, pictures, p.config.latents, load_decoder(p.facts))
    storage.write_bytes(storage.join(p.config.output, NEIGHBOURS), picture)
    return {"latents": p.config.latents} | numbers


def _compared(p: Plan) -> tuple[Reference, Summary | None]:
    """The reference's statistics (its own, or of its pictures), and what is known of its pictures."""
    real = None
    if p.reference:
        chosen = None if p.statistics else chunks.spread(p.reference.num_images, results.MAX_REFERENCES)
        real = results.summarise((chunks.read_chunk(uri) for uri in p.reference.items()), chosen)
    return p.statistics or real.statistics, real


def _description(p: Plan, statistics: Reference, real: Summary | None) -> dict[str, Any]:
    """All that identifies the numbers."""
    config, drawn = p.config, p.samples is None
    halves = {f"fid_{config.extractor}_between_halves": real.distance_between_halves} if not p.statistics else {}
    return {
        "num_samples": config.num_samples, "seed": config.seed if drawn else None,
        "labels": config.labels if drawn else None,
        "sampling": vars(config.sampling) if drawn else None, "precision": config.precision if drawn else None,
        "extractor": config.extractor, "extractor_hash": p.inputs["extractor"],
        "transform": extractors.transform(config.extractor), "adm_float16": config.adm_float16, "num_seed_ranges": 1,
        "compile": config.compile if drawn else None, "chunk_size": config.chunk_size,
        "sample_batch_size": config.sample_batch_size if drawn else None,
        "device": "cuda" if config.workers.gpus_per_worker else "cpu",
        "samples": None if drawn else {"uri": config.samples, "hash": p.inputs["samples"]},
        "checkpoint": {"uri": config.checkpoint, "hash": p.inputs["checkpoint"], "step": p.facts["step"]} if drawn else None,
        "guide": {"uri": config.sampling.guide, "hash": p.inputs["guide"]} if config.sampling.guide else None,
        "vae": p.facts.get("vae"),
        "reference": {"source": config.reference, "hash": _hash_of_reference(p),
                      "num_images": statistics.facts["num_images"],
                      "num_rejected": real.num_rejected if real else 0} | halves,
        "run": p.run["name"], "versions": p.run["versions"],
    }


def _hash_of_reference(p: Plan) -> str:
    """Of its content alone, however it is cut."""
    return p.statistics.fingerprint[:16] if p.statistics else p.reference.pictures.fingerprint


def _write_ranges(p: Plan, parts: list[Plan]) -> None:
    found = [_found(part) for part in parts]
    over = results.over_ranges([f["metrics"] for f in found])
    each = [{key: f[key] for key in ("seed", "metrics", "intervals", "memorisation")} for f in found]
    _write(p, found[0] | {"metrics": over.pop("mean"), "intervals": {}, "memorisation": None, "ranges": over, "seeds": each,
                          "num_seed_ranges": len(parts), "seed": p.config.seed, "run": p.run["name"],
                          "seconds": sum(f["seconds"] for f in found)})


def _write(p: Plan, found: dict[str, Any]) -> None:
    flat = {name: json.dumps(value) if isinstance(value, list | tuple) else value
            for name, value in config_io.flatten(json.loads(json.dumps(found))).items()}
    tables.write(storage.join(p.config.output, ROW), pa.Table.from_pylist([flat]))
    storage.write_json(storage.join(p.config.output, METRICS), found)
