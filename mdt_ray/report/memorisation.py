"""The memorisation check of an evaluation: its numbers, and the suspicious samples beside the training images nearest to
them. The search is evaluation/neighbours.py.

N samples, n nearest, C latent channels, h x w latent, H x W image.
"""

from typing import Any

import numpy as np
import torch

from mdt_ray.data import latents
from mdt_ray.data.vae import Vae
from mdt_ray.evaluation import neighbours
from mdt_ray.evaluation.neighbours import Memorisation

NUM_NEAREST = 3


def memorisation(sample_latents: np.ndarray, sample_pictures: np.ndarray, folder: str, vae: Vae,
                 num_shown: int = 8) -> tuple[dict[str, Any], bytes]:
    """Compare samples with the training images of a folder (URI) of latents.

    Args:
        sample_latents: (N, C, h, w) float32, scaled, as the sampler draws them and the VAE decodes them.
        sample_pictures: (N, H, W, 3) uint8, the same samples decoded.
        vae: that the latents were made with.
    Returns the numbers (see `Memorisation`; also `suspects`, the samples shown), and a PNG with a row for each of the
    `num_shown` samples nearest to the training set.
    Raises ValueError if the latents are of another VAE or shape, and for a folder with fewer than 3 training images.
    """
    manifest = latents.open_manifest(folder)
    if vae.weights_hash != manifest.vae["weights_hash"]:
        raise ValueError(f"vae: has the weights {vae.weights_hash}, but {folder} was made with "
                         f"{manifest.vae['weights_hash']}, and distances between two latent spaces mean nothing; take the "
                         "folder that the model was trained on")
    if len(sample_pictures) != len(sample_latents):
        raise ValueError(f"sample_pictures: {len(sample_pictures)}, but must be as many as sample_latents, "
                         f"{len(sample_latents)}; give both of the same samples")
    found = neighbours.memorisation(sample_latents, folder, manifest, NUM_NEAREST)
    shown = found.nearest.argsort(kind="stable")[:num_shown]
    suspects = [{"sample": int(i), "distance": float(found.nearest[i]), "id": str(found.neighbours.ids[i, 0]),
                 "mirrored": bool(found.neighbours.mirrored[i, 0])} for i in shown]
    return found.numbers() | {"suspects": suspects}, _picture(found, shown, sample_pictures, vae)


def _picture(found: Memorisation, shown: np.ndarray, sample_pictures: np.ndarray, vae: Vae) -> bytes:
    from mdt_ray.report import figures  # loads matplotlib: not in every process that evaluates

    near, threshold = found.neighbours, found.threshold
    rows, labels, captions = [], [], []
    for i in shown:
        scaled = torch.from_numpy(near.latents[i]).to(next(vae.model.parameters()).device)  # (n, C, h, w)
        decoded = vae.decode(scaled, round_pixels=True).permute(0, 2, 3, 1).cpu().numpy()  # (n, H, W, 3)
        rows.append(np.concatenate([sample_pictures[i][None], decoded]))
        suspicious = threshold is not None and found.nearest[i] <= threshold
        labels.append(f"sample {i}\nmemorised?" if suspicious else f"sample {i}")
        captions.append(["", *(f"{distance:#.3g}" + ", mirrored" * bool(mirrored)
                               for distance, mirrored in zip(near.distances[i], near.mirrored[i], strict=True))])
    scale = min(2.2, max(1.0, sample_pictures.shape[1] / 110))
    return figures.grid(rows, labels, ["sample", "nearest", "2nd nearest", "3rd nearest"], scale, captions)
