"""The HTML page of a run of all four jobs."""

import json
from typing import Any

import numpy as np

from mdt_ray import checkpoints, config_io, storage
from mdt_ray.config import EvaluateConfig, QuickstartConfig
from mdt_ray.data import images, latents, listings, readers, sources
from mdt_ray.evaluation import chunks
from mdt_ray.evaluation.results import metric_name
from mdt_ray.report import figures
from mdt_ray.report.html import STYLE, headline, img, is_current, section, table, text, write_page
from mdt_ray.report.sweep import picture, points_table


def write(config: QuickstartConfig, evaluations: dict[str, EvaluateConfig], results: dict[str, dict[str, Any]],
          sweep: dict[str, Any], seconds: dict[str, float]) -> str:
    """Write <output>/report/index.html; returns its path. A page that shows these results already is left alone.

    Args:
        config: resolved, the folders of all jobs in it.
        evaluations, results: settings and metrics.json of each evaluation by name; `guided`, and `unguided-...` for each
            checkpoint kept, oldest first.
        sweep: content of results.json.
        seconds: time that each stage took.
    """
    uri = storage.join(config.output, "report", "index.html")
    inputs = config_io.fingerprint([results, sweep, seconds, STYLE])
    if is_current(uri, inputs):
        return uri
    unguided = {name: result for name, result in results.items() if name.startswith("unguided")}
    body = "".join([
        _headline(config, results["guided"], list(unguided.values())),
        _samples(config, evaluations["guided"], results["guided"]),
        _training(config, list(unguided.values())),
        _progress(evaluations, unguided),
        _sweep(sweep),
        _metrics(results["guided"], list(unguided.values())[-1]),
        _stages(seconds),
        _reproduce(config, results["guided"]),
    ])
    write_page(uri, f"mdt_ray: {config.output}", body, inputs)
    return uri


def _headline(config: QuickstartConfig, guided: dict, unguided: list[dict]) -> str:
    name = guided["extractor"]
    fid, accuracy = (metric_name(metric, name, guided["num_samples"]) for metric in ("fid", "label_accuracy"))
    first, last = unguided[0]["metrics"][fid], unguided[-1]["metrics"][fid]
    cards = [(f"{last:.4g}", f"{fid}, unguided, step {unguided[-1]['checkpoint']['step']}"),
             (f"{first:.4g}", f"{fid} at step {unguided[0]['checkpoint']['step']}")]
    if accuracy in guided["metrics"]:
        cards.insert(0, (f"{guided['metrics'][accuracy]:.1%}",
                         f"of {guided['num_samples']} samples are read as the label asked for, "
                         f"at guidance {guided['sampling']['cfg_scale']:g}"))
    if (halves := _halves(guided)) is not None:
        cards.append((f"{halves[1]:.4g}", f"fid_{name} between {halves[0]}"))
    other = "" if name == "inception" else ", not Inception's"
    return headline(f"Masked Diffusion Transformer: {storage.name(config.output)}",
                    "From images to metrics: latents, training, a sweep and samples, all on Ray. "
                    f"The metrics are in the features of the <i>{text(name)}</i> network{other}.", cards)


def _halves(result: dict) -> tuple[str, float] | None:
    """The distance that a perfect sampler would score, where the reference was measured here."""
    value = result["reference"].get(f"fid_{result['extractor']}_between_halves")
    return None if value is None else ("two halves of the real images", value)


def _samples(config: QuickstartConfig, evaluation: EvaluateConfig, result: dict) -> str:
    manifest = latents.open_manifest(config.precompute.output)
    count = min(10, manifest.num_classes)
    drawn = _by_class(*_kept(evaluation, evaluation.keep_images), count)
    real = _by_class(*_real_images(config, 60 * count), count)
    scale = result["sampling"]["cfg_scale"]
    return section("Samples, class by class", f"Drawn by the averaged weights at step {result['checkpoint']['step']} with "
                   f"guidance {scale:g}, {result['sampling']['num_sampling_steps']} steps of "
                   f"{result['sampling']['sampler']}, in index order: not chosen.",
                   f'<div class="pair"><figure style="margin:0">{img(_class_grid(drawn, manifest), "samples by class")}'
                   '<figcaption class="muted">samples</figcaption></figure><figure style="margin:0">'
                   f'{img(_class_grid(real, manifest), "real images by class")}'
                   '<figcaption class="muted">real images</figcaption></figure></div>')


def _training(config: QuickstartConfig, unguided: list[dict]) -> str:
    rows = checkpoints.read_metrics(storage.join(config.train.output, "metrics.parquet"))
    steps = [row["step"] for row in rows]
    series = {"full pass": (steps, [row["loss_full"] for row in rows])}
    if "loss_masked" in rows[0]:
        series["masked pass"] = (steps, [row["loss_masked"] for row in rows])
    held_out = [row for row in rows if "val_loss" in row]
    if held_out:
        series["held-out images, full pass of the averaged weights"] = (
            [row["step"] for row in held_out], [row["val_loss"] for row in held_out])
    losses = figures.curves(series, "step", "loss", log=True)
    name = unguided[-1]["extractor"]
    fid = metric_name("fid", name, unguided[-1]["num_samples"])
    distance = figures.curves(
        {f"{fid}, unguided": ([r["checkpoint"]["step"] for r in unguided], [r["metrics"][fid] for r in unguided])},
        "step", fid, log=True,
        level=_halves(unguided[-1]))
    last = rows[-1]
    return section("Training", f"{last['step']} steps, {last['images_seen']:,} images, "
                   f"{last['images_per_second']:.0f} images/s at the end, {last['skipped_steps']} steps skipped.",
                   f'<div class="pair">{img(losses, "loss of full and masked pass over training")}'
                   f'{img(distance, "distance to the real images over training")}</div>')


def _progress(evaluations: dict[str, EvaluateConfig], unguided: dict[str, dict]) -> str:
    rows = [_kept(evaluations[name], 20)[0] for name in unguided]
    labels = [f"step {result['checkpoint']['step']}" for result in unguided.values()]
    return section("The same noise, as training goes on", "Unguided; every column starts from the same noise and label.",
                   img(figures.grid(rows, labels), "samples at each checkpoint kept"))


def _sweep(found: dict[str, Any]) -> str:
    steps = found["trials"][0]["curve"][-1]["step"]
    return section("Sweep", f"{len(found['trials'])} trials of {steps} steps each, the best first. So short a run ranks "
                   "settings by how fast they start, with one seed: not by how good they become.",
                   f'<div class="scroll">{points_table(found)}</div>{picture(found)}')


def _metrics(guided: dict, unguided: dict) -> str:
    rows = [[name, f"{unguided['metrics'][name]:.4g}", f"{value:.4g}"] for name, value in guided["metrics"].items()]
    facts = {
        "samples": f"{guided['num_samples']}, labels {guided['labels']}, seeds {guided['seed']} .. "
                   f"{guided['seed'] + guided['num_samples'] - 1}",
        "sampler": json.dumps(guided["sampling"]), "precision": guided["precision"],
        "checkpoint": f"step {guided['checkpoint']['step']}, hash {guided['checkpoint']['hash']}",
        "VAE": f"{guided['vae']['path']}, weights {guided['vae']['weights_hash']}, scale {guided['vae']['scale']:.5g}",
        "real images": f"{guided['reference']['num_images']} of {guided['reference']['source']}",
        "extractor": guided["extractor"], "versions": json.dumps(guided["versions"]),
    }
    note = ("Guidance above 1 makes samples clearer and less diverse: accuracy and precision rise, and so does the distance "
            "to the real images.")
    return section("Metrics, and what identifies them", note, '<div class="scroll">' + table(
        ["metric", "unguided", f"guidance {guided['sampling']['cfg_scale']:g}"], rows) + "<br>" +
        table(["setting", "value"], [[k, v] for k, v in facts.items()]) + "</div>")


def _stages(seconds: dict[str, float]) -> str:
    rows = [[name, f"{value:.1f}"] for name, value in seconds.items()]
    rows.append(["all", f"{sum(seconds.values()):.1f}"])
    return section("Time", "Seconds that each stage took, starting Ray and its workers included.",
                   table(["stage", "s"], rows))


def _reproduce(config: QuickstartConfig, guided: dict) -> str:
    settings = json.dumps(config_io.to_dict(config), indent=1)
    return section("Reproduce", f"Run {guided['run']}. The settings of all jobs:",
                   f"<details><summary>settings</summary><pre>{text(settings)}</pre></details>")


def _kept(evaluation: EvaluateConfig, count: int) -> tuple[np.ndarray, np.ndarray]:
    return chunks.kept_images(chunks.uris_of(evaluation), count)


def _real_images(config: QuickstartConfig, count: int) -> tuple[np.ndarray, np.ndarray]:
    source = sources.open_source(config.precompute.source, config.precompute.labels)
    rows = listings.list_images(source).table.slice(0, count)
    pieces = readers.read_pieces(source.folder, source.kind, rows, count)
    found = images.decode_pieces(pieces, config.precompute.image_size, config.precompute.exif_rotation)
    return found.images, np.array(found.labels)


def _by_class(pictures: np.ndarray, labels: np.ndarray, count: int, per_class: int = 10) -> list[np.ndarray]:
    return [pictures[labels == c][:per_class] for c in range(count)]


def _class_grid(rows: list[np.ndarray], manifest: latents.Manifest) -> bytes:
    return figures.grid(rows, manifest.class_names[:len(rows)])
