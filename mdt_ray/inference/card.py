"""The model card of a checkpoint: what was trained, on what, how, and how to use it, written from the run's own files."""

import html
import json
import re
from typing import Any

from mdt_ray import checkpoints, storage
from mdt_ray.config import NON_COMMERCIAL

HEAD = """---
library_name: diffusers
tags:
- {tag}
- diffusion
- class-conditional
{license}---

# {title}

    from mdt_ray.inference.pipeline import MDTPipeline
    pipe = MDTPipeline.from_pretrained("<this folder>")
    images = pipe({labels}guidance_scale=3.8, guidance_power=4, num_inference_steps=50).images

"""


def model_card(checkpoint: str) -> str:
    """The card's Markdown, from state.json, run.json, metrics.parquet and the model's config. Raises FileNotFoundError if
    the checkpoint lacks the first, the second or the last."""
    facts = storage.read_json(storage.join(checkpoint, "state.json"))
    run = storage.read_json(storage.join(checkpoint, "run.json"))
    model = {k: v for k, v in storage.read_json(storage.join(checkpoint, "ema", "config.json")).items() if k[0] != "_"}
    origin, started = facts.get("origin"), facts.get("started_from")
    license = (origin or started or {}).get("license")
    trained = run.get("trained", run.get("config", {}))  # (a reconstructed average names the settings of its training)
    kind = origin["layout"] if origin else trained.get("model", {}).get("kind", "mdt")
    side = facts["image_size"]
    width, patch = model["hidden_size"], model["patch_size"]
    title = _line(f"{kind}, {model['depth']} blocks of width {width}, patch {patch}, {side}x{side}")
    text = HEAD.format(tag="dit" if "dit" in kind else "masked-diffusion-transformer", title=title,
                       license=f"license: {json.dumps(license)}\n" if license else "",
                       labels="class_labels=[0], " if model["num_classes"] else "")
    text += _origin(origin) if origin else _training(checkpoint, facts, trained)
    if started:
        text += f"Training started from the weights of `{_code(started['file'])}`.\n\n"
    if license == NON_COMMERCIAL:
        text += ("**Licence.** The published weights of MDT and DiT are for non-commercial use (CC BY-NC 4.0); converting "
                 "them, or training on from them, does not change that.\n\n")
    text += _table("Model", model)
    text += _table("Latents", {"VAE": facts["vae"]["path"], "revision": facts["vae"]["revision"],
                               "shape": facts["latent_shape"], "classes": facts["num_classes"]})
    return text + _table("Versions", run.get("versions", {}))


def _training(checkpoint: str, facts: dict[str, Any], config: dict[str, Any]) -> str:
    rows = {"steps": facts["step"]}
    if config:
        rows |= {"images seen": facts["step"] * config["batch_size"], "batch size": config["batch_size"],
                 "EMA decay": config["ema"]["decay"], "seed": config["seed"], "precision": config["precision"]}
        if "average" in facts:
            rows["EMA decay"] = "power function of sigma_rel {sigma_rel:g}, reconstructed to {error:.2%}".format(
                **facts["average"])
        rows |= {f"optim.{name}": value for name, value in config["optim"].items()}
        rows |= {f"loss.{name}": value for name, value in config["loss"].items()}
    uri = storage.join(checkpoint, "metrics.parquet")
    history = checkpoints.read_metrics(uri) if storage.exists(uri) else []
    if history:
        losses = {name: value for name, value in history[-1].items() if name.startswith("loss") and value is not None}
        rows |= {name: f"{value:.4g}" for name, value in losses.items()}
    return "Trained by `mdt-ray train`; the weights are the averaged (EMA) ones.\n\n" + _table("Training", rows)


def _origin(origin: dict[str, Any]) -> str:
    notes = "".join(f"- {_line(note)}\n" for note in origin["notes"])
    file, layout, sha256 = _code(origin["file"]), _line(origin["layout"]), _line(origin["sha256"])
    return f"Converted from `{file}` (layout {layout}, sha256 {sha256}).\n\n{notes}\n"


def _table(title: str, rows: dict[str, Any]) -> str:
    lines = "".join(f"| {_line(name)} | {_line(value)} |\n" for name, value in rows.items())
    return f"## {title}\n\n| | |\n|---|---|\n{lines}\n"


def _line(value: Any) -> str:
    """A value from a checkpoint, which may be anybody's, as text of one line that is no markup: no HTML, no picture, no link
    that says it is another, no cell of a table."""
    return re.sub(r"[\\|!\[\]]", r"\\\g<0>", html.escape(_code(value), quote=False))


def _code(value: Any) -> str:
    """The same for between backticks."""
    return " ".join(str(value).split()).replace("`", "'")
