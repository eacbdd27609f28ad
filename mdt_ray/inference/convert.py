"""Files of weights in and out: published .pt files, diffusers folders, our checkpoints. The naming is models/official.py."""

import argparse
import io
import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file

from mdt_ray import checkpoints, run_folder, storage
from mdt_ray.config import NON_COMMERCIAL
from mdt_ray.inference.card import model_card
from mdt_ray.inference.labels import imagenet_classes
from mdt_ray.inference.sampler import load_model
from mdt_ray.models import CLASSES, MDT, DiT, official

SPARE = "spare.safetensors"
"""Beside a converted model: the published tensors that ours has no place for, so that a conversion back is bit-equal."""


@dataclass(frozen=True)
class Weights:
    """A state dict of another origin, and what its own config says."""

    tensors: official.StateDict
    known: dict[str, Any]
    sha256: str


def read_weights(source: str) -> Weights:
    """A file (.pt, .pth, .bin, .safetensors; path or URI) or a diffusers folder of a DiT.

    Training checkpoints of DiT hold several state dicts: the averaged one, `ema`, is taken.
    Raises ValueError if there is nothing, or it holds anything but tensors.
    """
    folder = next((f for f in (source, storage.join(source, "transformer"))
                   if storage.exists(storage.join(f, "config.json"))), None)
    if folder:
        return _read_diffusers(folder)
    try:
        data = storage.read_bytes(source)
    except OSError as error:
        raise ValueError(f"source = {source!r}: no such file, nor a diffusers folder ({error})") from error
    if source.partition("?")[0].endswith(".safetensors"):
        return Weights(_plain_names(load_safetensors(data)), {}, storage.sha256(data))
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # (DiT's training checkpoints keep their arguments)
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler fails in many ways on what is no pickle: KeyError, IndexError, ...
        raise ValueError(f"source = {source!r}: not a file of plain tensors ({type(error).__name__}), and nothing else is "
                         "opened, since a pickle can run code; save its state dict alone with torch.save") from error
    for name in ("ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ValueError(f"source = {source!r}: holds no state dict of tensors")
    return Weights(_plain_names(content), {}, storage.sha256(data))


def _plain_names(tensors: official.StateDict) -> official.StateDict:
    """Without what DDP and torch.compile put before every name."""
    return {name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}


def _read_diffusers(folder: str) -> Weights:
    config = storage.read_json(storage.join(folder, "config.json"))
    if config.get("_class_name") != "DiTTransformer2DModel":
        raise ValueError(f"source = {folder!r}: holds a {config.get('_class_name')}, not a DiTTransformer2DModel")
    with storage.fetched(folder) as local:
        model = _diffusers_dit().from_pretrained(local, low_cpu_mem_usage=False)
    known = {"num_heads": config["num_attention_heads"], "input_size": config["sample_size"]}
    tensors = model.state_dict()
    # By content: a folder may hold shards of either format.
    digests = [name + storage.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()]
    return Weights(tensors, known, storage.sha256("".join(digests).encode()))


def _diffusers_dit() -> type:
    """Imported where one is converted: that takes a second, and every training imports this file."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel


def write_checkpoint(converted: official.Converted, output: str, *, source: str, sha256: str, run: dict[str, Any],
                     vae: dict[str, Any], image_size: int | None, license: str) -> None:
    """A checkpoint that MDTPipeline, `evaluate` and `train --init-from` open: ema/, state.json, run.json, the card, spare
    tensors.

    vae: path and revision; its weights are not looked at.
    image_size: side of the images, in pixels; None takes 8 times the latent's (SD, SDXL, Flux).
    license: identifier for the card.
    """
    config = converted.model.config
    num_classes, size = config.num_classes, config.input_size
    names = list(imagenet_classes()) if num_classes == 1000 else [str(c) for c in range(num_classes)]
    facts = {"step": 0, "attempt": 0, "vae": vae | {"weights_hash": None}, "image_size": image_size or size * 8,
             "latent_shape": [config.in_channels, size, size], "class_names": names, "num_classes": num_classes,
             "origin": {"file": storage.name(source), "layout": converted.layout, "sha256": sha256,
                        "license": license, "notes": converted.notes}}
    publish(converted.model, output, run, facts, converted.spare)


def is_published(output: str, run: dict[str, Any]) -> bool:
    """Whether `publish` has been here. Raises ValueError if the folder holds another run, or other files, which it would
    replace."""
    run_folder.check_identity(output, run)
    if storage.exists(storage.join(output, checkpoints.CHECKSUMS)):
        return True
    if storage.is_local(output) and storage.list_names(output):  # (elsewhere these may be parts of an upload)
        raise ValueError(f"output = {output!r}: holds other files; name a new folder")
    return False


def publish(model: MDT | DiT, output: str, run: dict[str, Any], facts: dict[str, Any],
            spare: official.StateDict | None = None) -> None:
    """A checkpoint for inference, whole: the model as ema/, state.json (`facts`), run.json, the card, spare tensors."""
    with checkpoints.create(output) as folder:
        model.save_pretrained(folder / "ema")
        (folder / "state.json").write_text(json.dumps(facts, indent=1))
        (folder / "run.json").write_text(json.dumps(run, indent=1))
        if spare:
            save_file(spare, folder / SPARE)
        (folder / "README.md").write_text(model_card(str(folder)))


def export_weights(source: str, layout: official.Layout, output: str, weights: str = "ema") -> None:
    """Write the weights of a checkpoint of ours in another layout: a .pt file, or for diffusers_dit a folder.

    Raises ValueError if `source` is no checkpoint of ours, or that layout cannot hold it.
    """
    if not checkpoints.is_here(source):
        raise ValueError(f"source = {source!r}: neither a checkpoint of ours nor a training output; convert it to one first")
    uri = checkpoints.resolve(source)
    model, spare = load_model(uri, weights), None
    if storage.exists(storage.join(uri, SPARE)):
        spare = load_safetensors(storage.read_bytes(storage.join(uri, SPARE)))
    state_dict = official.export(model, layout, spare)
    if layout != "diffusers_dit":
        buffer = io.BytesIO()
        torch.save(state_dict, buffer)
        return storage.write_bytes(output, buffer.getvalue())
    transformer = _diffusers_dit()(**official.diffusers_config(model))
    transformer.load_state_dict(state_dict, strict=True)
    with storage.create_folder(output, last="config.json") as folder:
        transformer.save_pretrained(folder)
    return None


def fingerprint_of(source: str) -> str:
    """A name of the weights at `source` by their content. Raises ValueError if there are none."""
    if not checkpoints.is_here(source):
        return read_weights(source).sha256[:16]
    return storage.sha256(storage.read_bytes(storage.join(checkpoints.resolve(source), checkpoints.CHECKSUMS)))[:16]


def _is_our_pipeline(source: str) -> bool:
    part = storage.join(source, "transformer", "config.json")
    return storage.exists(part) and storage.read_json(part).get("_class_name") in CLASSES


def origin_of(source: str) -> dict[str, Any]:
    """What a model card says of the weights at `source`: their file, and their licence where that is known."""
    origin: dict[str, Any] = {"file": storage.name(source), "license": None}
    if not checkpoints.is_here(source):
        return origin | {"license": None if _is_our_pipeline(source) else NON_COMMERCIAL}
    facts = storage.read_json(storage.join(checkpoints.resolve(source), "state.json"))
    before = facts.get("origin") or facts.get("started_from") or {}
    return origin | {"license": before.get("license")}


def load_any(source: str) -> MDT | DiT:
    """The model of a checkpoint or pipeline of ours, of a training output, or of anything that can be converted."""
    if checkpoints.is_here(source):
        return load_model(checkpoints.resolve(source), "ema")
    if _is_our_pipeline(source):
        return load_model(source, "transformer")
    weights = read_weights(source)
    return official.load(weights.tensors, official.infer_config(weights.tensors, **weights.known))
