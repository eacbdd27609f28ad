"""The HTML page of a run of all four jobs: one file, pictures inside, every string escaped."""

import base64
import html
import json
from typing import Any

import numpy as np

from mdt_ray import checkpoints, config_io, storage
from mdt_ray.config import EvaluateConfig, QuickstartConfig
from mdt_ray.data import images, latents, listings, readers, sources
from mdt_ray.evaluation import chunks
from mdt_ray.evaluation.results import metric_name
from mdt_ray.report import figures

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.55 system-ui, sans-serif; color: #1c2733; background: #f4f6f9; margin: 0; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
p { margin: .3rem 0 .8rem; } .muted { color: #5b6b7b; }
section { background: #fff; border: 1px solid #e3e8ee; border-radius: 8px; padding: 1.1rem 1.3rem; margin-top: 1.1rem; }
img { max-width: 100%; height: auto; display: block; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin-top: 1.1rem; }
.card { background: #fff; border: 1px solid #e3e8ee; border-radius: 8px; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.5rem; } .card span { color: #5b6b7b; font-size: .85rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; align-items: start; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #e3e8ee; vertical-align: top; }
th { color: #5b6b7b; font-weight: 600; font-size: .85rem; } td.num, th.num { text-align: right; }
.scroll { overflow-x: auto; }
pre { overflow-x: auto; background: #f4f6f9; padding: .8rem; border-radius: 6px; font-size: .8rem; }
"""


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
    mark = f'<meta name="inputs" content="{inputs}">'
    if storage.exists(uri) and mark in storage.read_bytes(uri)[:2000].decode(errors="replace"):
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
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8">{mark}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>mdt_ray: {_text(config.output)}</title><style>{STYLE}</style></head>"
            f"<body><main>{body}</main></body></html>\n")
    storage.write_bytes(uri, page.encode())
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
    cells = "".join(f'<div class="card"><b>{_text(value)}</b><span>{_text(label)}</span></div>' for value, label in cards)
    return (f"<h1>Masked Diffusion Transformer: {_text(config.output.rstrip('/').rpartition('/')[2])}</h1>"
            f'<p class="muted">From images to metrics: latents, training, a sweep and samples, all on Ray. '
            f"The metrics are in the features of the <i>{_text(name)}</i> network{other}.</p>"
            f'<div class="cards">{cells}</div>')


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
    return _section("Samples, class by class", f"Drawn by the averaged weights at step {result['checkpoint']['step']} with "
                    f"guidance {scale:g}, {result['sampling']['num_sampling_steps']} steps of "
                    f"{result['sampling']['sampler']}, in index order: not chosen.",
                    f'<div class="pair"><figure style="margin:0">{_img(_class_grid(drawn, manifest), "samples by class")}'
                    '<figcaption class="muted">samples</figcaption></figure><figure style="margin:0">'
                    f'{_img(_class_grid(real, manifest), "real images by class")}'
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
    return _section("Training", f"{last['step']} steps, {last['images_seen']:,} images, "
                    f"{last['images_per_second']:.0f} images/s at the end, {last['skipped_steps']} steps skipped.",
                    f'<div class="pair">{_img(losses, "loss of full and masked pass over training")}'
                    f'{_img(distance, "distance to the real images over training")}</div>')


def _progress(evaluations: dict[str, EvaluateConfig], unguided: dict[str, dict]) -> str:
    rows = [_kept(evaluations[name], 20)[0] for name in unguided]
    labels = [f"step {result['checkpoint']['step']}" for result in unguided.values()]
    return _section("The same noise, as training goes on", "Unguided; every column starts from the same noise and label.",
                    _img(figures.grid(rows, labels), "samples at each checkpoint kept"))


def _sweep(sweep: dict[str, Any]) -> str:
    metric, trials, keys = sweep["metric"], sweep["trials"], list(sweep["trials"][0]["point"])
    head = [*keys, metric, "final loss", "parameters", "training s"]
    rows = [[*(t["point"][k] for k in keys), f"{t['metrics'][metric]:.4g}", f"{t['curve'][-1]['loss']:.4f}",
             f"{t['num_parameters']:,}", f"{t['train_seconds']:.1f}"] for t in trials]
    pictures = ""
    if len(keys) == 2:
        xs, ys = (sweep["space"][k] for k in keys)
        values = np.full((len(ys), len(xs)), np.nan)
        for row in sweep["points"]:
            values[ys.index(row["point"][keys[1]]), xs.index(row["point"][keys[0]])] = row["mean"]
        pictures = _img(figures.heat_map([str(x) for x in xs], [str(y) for y in ys], values, keys[0], keys[1], metric),
                        f"{metric} over {keys[0]} and {keys[1]}")
    steps = trials[0]["curve"][-1]["step"]
    return _section("Sweep", f"{len(trials)} trials of {steps} steps each, best first. So short a run ranks settings by how "
                    "fast they start, with one seed: not by how good they become.",
                    f'<div class="scroll">{_table(head, rows)}</div>{pictures}')


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
    return _section("Metrics, and what identifies them", note, '<div class="scroll">' + _table(
        ["metric", "unguided", f"guidance {guided['sampling']['cfg_scale']:g}"], rows) + "<br>" +
        _table(["setting", "value"], [[k, v] for k, v in facts.items()]) + "</div>")


def _stages(seconds: dict[str, float]) -> str:
    rows = [[name, f"{value:.1f}"] for name, value in seconds.items()]
    rows.append(["all", f"{sum(seconds.values()):.1f}"])
    return _section("Time", "Seconds that each stage took, starting Ray and its workers included.",
                    _table(["stage", "s"], rows))


def _reproduce(config: QuickstartConfig, guided: dict) -> str:
    settings = json.dumps(config_io.to_dict(config), indent=1)
    return _section("Reproduce", f"Run {guided['run']}. The settings of all jobs:",
                    f"<details><summary>settings</summary><pre>{_text(settings)}</pre></details>")


def _kept(evaluation: EvaluateConfig, count: int) -> tuple[np.ndarray, np.ndarray]:
    return chunks.kept_images(chunks.uris_of(evaluation), count)


def _real_images(config: QuickstartConfig, count: int) -> tuple[np.ndarray, np.ndarray]:
    source = sources.open_source(config.precompute.source, config.precompute.labels)
    rows = listings.list_images(source).table.slice(0, count)
    piece = readers.read_few(source.folder, source.kind, rows)
    found = images.decode_piece(piece, config.precompute.image_size, config.precompute.exif_rotation)
    return found.images, np.array(found.labels)


def _by_class(pictures: np.ndarray, labels: np.ndarray, count: int, per_class: int = 10) -> list[np.ndarray]:
    return [pictures[labels == c][:per_class] for c in range(count)]


def _class_grid(rows: list[np.ndarray], manifest: latents.Manifest) -> bytes:
    return figures.grid(rows, manifest.class_names[:len(rows)])


def _section(title: str, text: str, content: str) -> str:
    return f'<section><h2>{_text(title)}</h2><p class="muted">{_text(text)}</p>{content}</section>'


def _table(head: list[str], rows: list[list[Any]]) -> str:
    cells = "".join(f"<th>{_text(h)}</th>" for h in head)
    lines = "".join("<tr>" + "".join(f"<td>{_text(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"


def _img(png: bytes, alt: str) -> str:
    return f'<img alt="{_text(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _text(value: Any) -> str:
    return html.escape(str(value))
