"""Job `precompute`: images -> VAE posterior -> Parquet, chunk by chunk, restartable by running the same command again.

    plan.json             chunks: file and rows of the source, written first
    chunks/k.json         what chunk k holds, written after its Parquet file
    chunk-k.parquet       the latents
    manifest.json         written last
"""

import json
import logging
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from mdt_ray import config_io, run_folder, storage
from mdt_ray.config import PrecomputeConfig, VaeConfig
from mdt_ray.data import images, latents
from mdt_ray.data.latents import LatentFile, Manifest
from mdt_ray.data.vae import load_vae, vae_fingerprint
from mdt_ray.jobs import fanout, progress, session

logger = logging.getLogger(__name__)


def precompute(config: PrecomputeConfig) -> Manifest:
    """Encode the source; returns the manifest. Does nothing where it is finished.

    Raises ValueError for a bad source or VAE, and if the output holds another run or has another writer.
    """
    config = config_io.override(config, {"output": storage.absolute(config.output)})
    if config.source != "digits":
        config = config_io.override(config, {"source": storage.absolute(config.source)})
    files = images.list_source(config.source)
    inputs = {"source": config_io.fingerprint(images.source_fingerprint(files)), "vae": vae_fingerprint(config.vae)}
    run = run_folder.describe("precompute", config, inputs)
    run_folder.check_identity(config.output, run)
    try:
        return latents.open_manifest(config.output)
    except ValueError:
        pass  # not finished, or damaged: go on below
    with run_folder.claim(config.output, run):
        return _encode_missing(config, run, _plan(config, files))


def _plan(config: PrecomputeConfig, files: list[images.SourceFile]) -> list[dict[str, Any]]:
    """Chunks of at most chunk_size rows that never span files: a pure function of source and config, kept for people."""
    chunks = []
    for file in files:
        for start in range(0, file.num_rows, config.chunk_size):
            stop = min(start + config.chunk_size, file.num_rows)
            chunks.append({"chunk": len(chunks), "file": json.dumps(asdict(file)), "start": start, "stop": stop})
    storage.write_json(storage.join(config.output, "plan.json"), chunks)
    return chunks


def _encode_missing(config: PrecomputeConfig, run: dict, chunks: list[dict[str, Any]]) -> Manifest:
    started = time.perf_counter()
    entries = {c["chunk"]: _finished_entry(config.output, c["chunk"]) for c in chunks}
    missing = [c for c in chunks if entries[c["chunk"]] is None]
    names = images.class_names(config.source)
    with progress.bar(sum(c["stop"] - c["start"] for c in chunks), "image", "precompute",
                      initial=sum(c["stop"] - c["start"] for c in chunks if entries[c["chunk"]])) as bar:
        if missing:
            session.start()
            plain = config_io.to_dict(config)
            reader = Reader(config.image_size, len(names) if names else None)
            rows = fanout.run_chunks(missing, Encoder, (plain,), config.workers, prepare=reader)
            for row in rows:
                entries[row["chunk"]] = json.loads(row["entry"])
                bar.update(entries[row["chunk"]]["num_read"])
    manifest = _manifest(config, run, list(entries.values()), names)
    latents.write_manifest(config.output, manifest)
    logger.info("%d latents in %d files, %d images rejected, %.1f s", manifest.num_rows, len(manifest.files),
                len(manifest.rejected), time.perf_counter() - started)
    return latents.open_manifest(config.output)


def _finished_entry(output: str, chunk: int) -> dict | None:
    """What a finished chunk holds; None if it is not finished or its file is damaged."""
    try:
        entry = storage.read_json(_entry_uri(output, chunk))
        latents.check_file(output, LatentFile(**entry["file"]))
        return entry
    except (FileNotFoundError, ValueError):
        return None


def _entry_uri(output: str, chunk: int) -> str:
    return storage.join(output, "chunks", f"{chunk:05d}.json")


def _manifest(config: PrecomputeConfig, run: dict, entries: list[dict], names: list[str] | None) -> Manifest:
    counts: Counter[int] = Counter()
    for entry in entries:
        counts.update({int(label): n for label, n in entry["class_counts"].items()})
    if not counts:
        raise ValueError(f"source = {config.source!r}: no readable image; see {storage.join(config.output, 'chunks')}")
    num_classes = len(names) if names else max(counts) + 1
    first = entries[0]
    return Manifest(identity=run["name"], shape=first["shape"], image_size=config.image_size, vae=first["vae"],
                    num_classes=num_classes, class_counts=[counts[c] for c in range(num_classes)],
                    class_names=names or [str(c) for c in range(num_classes)], flip=config.flip,
                    rejected=[r for e in entries for r in e["rejected"]],
                    files=[LatentFile(**e["file"]) for e in entries if e["file"]["num_rows"]])


class Reader:
    """Reads and decodes a chunk's images on a CPU task. A bad image is listed, not fatal; a bad label is."""

    def __init__(self, image_size: int, num_classes: int | None = None):
        self.image_size = image_size
        self.num_classes = num_classes  # where the source says so

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        file = images.SourceFile(**json.loads(item["file"]))
        ids, labels, pixels, rejected = [], [], [], []
        for image in images.read_images(file, item["start"], item["stop"]):
            if image.label is None or not 0 <= image.label < (self.num_classes or image.label + 1):
                rule = f"below the source's number of classes, {self.num_classes}" if self.num_classes else "at least 0"
                raise ValueError(f"{file.uri}: image {image.id!r} has label {image.label!r}: must be {rule}; "
                                 "correct the label, or leave the image out")
            try:
                pixels.append(images.center_crop(images.decode_image(image.data), self.image_size))
            except ValueError as error:
                rejected.append({"id": image.id, "reason": str(error)})
                continue
            ids.append(image.id)
            labels.append(image.label)
        header = {"ids": ids, "labels": labels, "rejected": rejected}
        return {"chunk": item["chunk"], "header": json.dumps(header), "pixels": b"".join(p.tobytes() for p in pixels)}


class Encoder:
    """Encodes a chunk in fixed batches and writes its file: the same chunk gives the same bytes."""

    def __init__(self, plain: dict[str, Any]):
        self.config = config_io.from_dict(PrecomputeConfig, plain)
        self.device = session.settle(self.config.workers)
        self.vae = load_vae(self.config.vae, self.device)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        config, header = self.config, json.loads(item["header"])
        shape = (len(header["ids"]), config.image_size, config.image_size, 3)
        pixels = np.frombuffer(item["pixels"], np.uint8).reshape(shape)  # (n, H, W, 3)
        moments = self._encode(pixels)  # (n, 2, C, h, w)
        flipped = self._encode(pixels[:, :, ::-1]) if config.flip else None
        facts = {"shape": list(moments.shape[2:]), "image_size": config.image_size, "dtype": "float16",
                 "vae": self._vae_facts(config.vae), "schema_version": latents.SCHEMA_VERSION}
        table = latents.encode_table(header["ids"], header["labels"], moments, flipped, config.validation_share, facts)
        uri = storage.join(config.output, f"chunk-{item['chunk']:05d}.parquet")
        entry = {"file": asdict(latents.write_file(uri, table, config.rows_per_group)), "rejected": header["rejected"],
                 "num_read": len(header["ids"]) + len(header["rejected"]), "shape": facts["shape"], "vae": facts["vae"],
                 "class_counts": Counter(header["labels"])}
        storage.write_json(_entry_uri(config.output, item["chunk"]), entry)
        return {"chunk": item["chunk"], "entry": json.dumps(entry)}

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, 3) -> posterior mean and std (n, 2, C, h, w), in batches of one size.

        The last batch is filled up with its own images, since another batch size changes the last bits.
        """
        size, parts = self.config.encode_batch_size, []
        for first in range(0, max(len(pixels), 1), size):
            part = pixels[first:first + size]
            batch = np.resize(part, (size, *part.shape[1:])) if len(part) else np.zeros((size, *part.shape[1:]), np.uint8)
            moments = self.vae.encode(torch.from_numpy(images.to_unit_range(batch)).to(self.device))
            parts.append(moments[:len(part)].cpu().numpy())
        return np.concatenate(parts)

    def _vae_facts(self, config: VaeConfig) -> dict[str, Any]:
        return {"path": config.path, "revision": config.revision, "scale": self.vae.scale, "shift": self.vae.shift,
                "weights_hash": self.vae.weights_hash}
