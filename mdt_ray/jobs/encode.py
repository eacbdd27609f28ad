"""The encoder actors of `precompute`: pieces of decoded pictures in, a file of latents out, a chunk at a time.

An encoder has its next chunk read and decoded, and writes its last one, while it encodes. Reading and decoding are tasks:
decode.py.
"""

import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from mdt_ray import config_io, run_folder, storage
from mdt_ray.autocast import autocast_dtype
from mdt_ray.config import PrecomputeConfig
from mdt_ray.data import latents
from mdt_ray.data.images import Pixels
from mdt_ray.data.readers import Piece
from mdt_ray.data.vae import load_vae, to_unit_range
from mdt_ray.jobs import nodes, session
from mdt_ray.jobs.decode import decode_piece, read_chunk

logger = logging.getLogger(__name__)
PIECE_BYTES = 4 * 2**20
"""Pixels that a piece holds at least: tasks for less cost more than the work in them."""


def piece_size(config: PrecomputeConfig) -> int:
    """Images of a piece: batches of the VAE, as many as make PIECE_BYTES. A function of identity fields alone, because an
    image's batch decides its last bits. (Where pictures are so large that a piece ends before, that follows from them.)"""
    batch_bytes = config.encode_batch_size * config.image_size**2 * 3
    return config.encode_batch_size * max(1, PIECE_BYTES // batch_bytes)


class Encoder:
    """Turns chunks of the plan into files: the same chunk gives the same bytes. Called from two threads at a time."""

    def __init__(self, plain: dict[str, Any], folder: str, kind: str, run_name: str, claim: run_folder.Claim, mailbox: Any):
        self.config = config_io.from_dict(PrecomputeConfig, plain)
        self.folder, self.kind, self.run_name, self.claim, self.mailbox = folder, kind, run_name, claim, mailbox
        self.device = session.settle(self.config.workers)
        torch.backends.cudnn.deterministic = True
        session.full_float32()
        self.vae = load_vae(self.config.vae, self.device)
        self.dtype = autocast_dtype(self.config.precision, torch.device(self.device))
        self.turn = threading.Lock()
        self.read_chunk = read_chunk.options(label_selector=nodes.off_the_head())

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        chunk, seconds = item["chunk"], Counter()
        pieces = self._decoded(chunk)
        with self.turn:  # the device works on one chunk; the other thread's is read and decoded meanwhile, or written
            ids, labels, rejected, parts, num_read = [], [], [], [], 0
            for piece in _timed(pieces, seconds, "waiting"):
                started = time.perf_counter()
                parts.append(self._encode(piece.images))
                seconds.update(encoding=time.perf_counter() - started, reading=piece.read_seconds,
                               decoding=piece.decode_seconds)
                ids += piece.ids
                labels += piece.labels
                rejected += piece.rejected
                num_read += len(piece.ids) + len(piece.rejected)
                self.mailbox.put.remote({"chunk": chunk, "num_read": num_read}, chunk)
        started = time.perf_counter()
        entry = self._write(chunk, ids, labels, np.concatenate(parts)) | {"rejected": rejected, "num_read": num_read}
        storage.write_json(entry_uri(self.config.output, chunk), entry)
        seconds.update(writing=time.perf_counter() - started)
        return {"chunk": chunk, "entry": json.dumps(entry), "seconds": json.dumps(seconds)}

    def _decoded(self, chunk: int) -> Iterator[Pixels]:
        """The chunk's pieces in order. Reading and decoding begin with the call, and stay a few pieces ahead."""
        config = self.config
        read = self.read_chunk.remote(config.output, chunk, self.folder, self.kind, piece_size(config))
        ahead: deque[tuple[Any, Any]] = deque()  # a piece, and its pixels to be

        def fill() -> None:
            while len(ahead) < config.decoders_per_worker:
                try:
                    piece = next(read)
                except StopIteration:
                    break
                ahead.append((piece, decode_piece.remote(piece, config.image_size, config.exif_rotation)))

        def pieces() -> Iterator[Pixels]:
            while ahead:
                piece, pixels = ahead.popleft()
                try:
                    yield ray.get(pixels)
                except RayTaskError:
                    raise  # what the task raised
                except RayError as error:
                    logger.warning("chunk %d: a decoder died (%s); its pictures are tried one by one", chunk, error)
                    yield from self._one_by_one(ray.get(piece))
                fill()

        fill()
        return pieces()

    def _one_by_one(self, piece: Piece) -> Iterator[Pixels]:
        """The pixels of a piece one of whose pictures kills its decoder: that one is rejected, the others are kept.

        They stay in one piece, so that their batches are those of an undisturbed run.
        """
        config, found = self.config, []
        for part in piece.singly():
            try:
                found.append(ray.get(decode_piece.remote(part, config.image_size, config.exif_rotation)))
            except RayTaskError:
                raise
            except RayError:
                found.append(Pixels.of_rejected(part.ids[0], "its decoder died", config.image_size))
        yield Pixels.joined(found)

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, 3) -> float16 posterior mean and std (n, 1 or 2, 2, C, h, w): of the image, of its mirror image.

        The last batch is filled up with its own images, since another batch size changes the last bits.
        """
        size, parts = self.config.encode_batch_size, []
        for first in range(0, max(len(pixels), 1), size):
            part = pixels[first:first + size]
            batch = np.resize(part, (size, *pixels.shape[1:]))  # zeros, if there is none
            x = to_unit_range(torch.from_numpy(batch).to(self.device))  # (B, 3, H, W)
            views = [x, x.flip(-1)] if self.config.flip else [x]
            moments = torch.stack([self.vae.encode(view, self.dtype) for view in views], 1)  # (B, 1 or 2, 2, C, h, w)
            parts.append(moments[:len(part)].half())
        return torch.cat(parts).cpu().numpy()

    def _write(self, chunk: int, ids: list[str], labels: list[int], moments: np.ndarray) -> dict[str, Any]:
        config = self.config
        if not np.isfinite(moments).all():
            row = int(np.flatnonzero(~np.isfinite(moments).reshape(len(moments), -1).all(1))[0])
            raise ValueError(f"image {ids[row]!r}: its latent is not finite in {config.precision}; use --precision fp32, or "
                             "another VAE")
        if not run_folder.holds(self.claim):
            raise run_folder.TakenOver.of(config.output)
        vae = {"path": config.vae.path, "revision": config.vae.revision, "scale": self.vae.scale, "shift": self.vae.shift,
               "weights_hash": self.vae.weights_hash}
        facts = {"shape": list(moments.shape[3:]), "image_size": config.image_size, "dtype": "float16", "vae": vae,
                 "precision": config.precision, "schema_version": latents.SCHEMA_VERSION}
        table = latents.encode_table(ids, labels, moments[:, 0], moments[:, 1] if config.flip else None,
                                     config.validation_share, facts)
        file = latents.write_file(config.output, latents.file_name(chunk), table, config.rows_per_group)
        return {"run": self.run_name, "file": asdict(file), "shape": facts["shape"], "vae": vae,
                "class_counts": Counter(labels), "sums": latents.sums(moments[:, 0])}


def entry_uri(output: str, chunk: int) -> str:
    """What a finished chunk holds, written after its file."""
    return storage.join(output, "chunks", f"{chunk:05d}.json")


def _timed(pieces: Iterator[Pixels], seconds: Counter, name: str) -> Iterator[Pixels]:
    """The same, with the time spent in waiting for them counted."""
    while True:
        started = time.perf_counter()
        piece = next(pieces, None)
        seconds[name] += time.perf_counter() - started
        if piece is None:
            return
        yield piece
