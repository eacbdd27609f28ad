"""The Inception-v3 of FID, sFID, IS, precision and recall: the TensorFlow graph of 2015-12-05, frozen, in float32.

Szegedy et al. 2015 (arXiv:1512.00567) with that graph's quirks. Not torchvision's Inception: that one resizes and
pools differently and gives another FID. Not the weights either: `load_inception` says where they are to be had.

B batch, H x W image. Names of the layers are those of the published weights.
"""

from __future__ import annotations

import http.client
import io
import logging
import re
import shlex
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.nn.functional as F
from torch import nn

from mdt_ray import storage
from mdt_ray.evaluation.features import Features, check_images
from mdt_ray.evaluation.precision import full_float32

logger = logging.getLogger(__name__)

WEIGHTS_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
IMAGE_SIZE = 299
NUM_POOL = 2048
NUM_CLASSES = 1008
NUM_SPATIAL_CHANNELS = 7  # sFID (Nash et al. 2021): 7 * 17 * 17 = 2023, close to the width of the pool features
BN_EPS = 1e-3
TIMEOUT_SECONDS = 60  # of silence, in a download

# A branch of a block: its name and its convolutions as (out channels, kernel height, kernel width, stride). Stride 1 keeps
# the map's size, stride 2 has no padding. A list in the last place is a fork: its convolutions run side by side.
_BLOCK_A = {"branch1x1": [(64, 1, 1, 1)],
            "branch5x5": [(48, 1, 1, 1), (64, 5, 5, 1)],
            "branch3x3dbl": [(64, 1, 1, 1), (96, 3, 3, 1), (96, 3, 3, 1)]}
_BLOCK_B = {"branch3x3": [(384, 3, 3, 2)],
            "branch3x3dbl": [(64, 1, 1, 1), (96, 3, 3, 1), (96, 3, 3, 2)],
            "branch_pool": []}
_BLOCK_D = {"branch3x3": [(192, 1, 1, 1), (320, 3, 3, 2)],
            "branch7x7x3": [(192, 1, 1, 1), (192, 1, 7, 1), (192, 7, 1, 1), (192, 3, 3, 2)],
            "branch_pool": []}
_BLOCK_E = {"branch1x1": [(320, 1, 1, 1)],
            "branch3x3": [(384, 1, 1, 1), [(384, 1, 3, 1), (384, 3, 1, 1)]],
            "branch3x3dbl": [(448, 1, 1, 1), (384, 3, 3, 1), [(384, 1, 3, 1), (384, 3, 1, 1)]],
            "branch_pool": [(192, 1, 1, 1)]}


def _block_c(width: int) -> dict:
    return {"branch1x1": [(192, 1, 1, 1)],
            "branch7x7": [(width, 1, 1, 1), (width, 1, 7, 1), (192, 7, 1, 1)],
            "branch7x7dbl": [(width, 1, 1, 1), (width, 7, 1, 1), (width, 1, 7, 1), (width, 7, 1, 1), (192, 1, 7, 1)],
            "branch_pool": [(192, 1, 1, 1)]}


class _Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, height: int, width: int, stride: int, same: bool) -> None:
        super().__init__()
        padding = (height // 2, width // 2) if same else 0
        self.conv = nn.Conv2d(in_channels, out_channels, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=BN_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Block(nn.Module):
    """Branches side by side, joined along the channels in the order given; `pool` feeds the branch named so."""

    def __init__(self, in_channels: int, branches: dict[str, list], pool) -> None:
        super().__init__()
        self.pool = pool
        self.branches: dict[str, list[list[str]]] = {}  # for each branch, the names of the layers of each step
        self.out_channels = 0
        for branch, steps in branches.items():
            self.branches[branch], channels = [], in_channels
            for number, step in enumerate(steps, start=1):
                fork = step if isinstance(step, list) else [step]
                name = f"{branch}_{number}" if len(steps) > 1 else branch
                names = [name + letter for letter in "ab"] if isinstance(step, list) else [name]
                for layer, conv in zip(names, fork, strict=True):
                    self.add_module(layer, _Conv(channels, *conv, same=conv[-1] == 1))
                self.branches[branch].append(names)
                channels = sum(conv[0] for conv in fork)
            self.out_channels += channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for branch, steps in self.branches.items():
            ys = [self.pool(x) if branch == "branch_pool" else x]
            for names in steps:
                ys = [self.get_submodule(name)(ys[0]) for name in names]
            outputs += ys
        return torch.cat(outputs, dim=1)


def _average_pool(x: torch.Tensor) -> torch.Tensor:
    """TensorFlow's "SAME" average: over the pixels inside the image alone, where torch's default counts the padding."""
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)


def _halve(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=2)


class Inception(nn.Module):
    """Images in, `Features` out: pool (B, 2048), spatial (B, 2023), logits (B, 1008), float32.

    Always in eval mode and without gradients: batch norm uses its stored statistics, so an image's features do not
    depend on its batch. `state_dict` None leaves random weights, whose features mean nothing.
    """

    name = "inception"

    def __init__(self, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Raises ValueError where `state_dict` is not, key for key and shape for shape, that of this network."""
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 3, 2, same=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, 3, 1, same=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, 3, 1, same=True)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1, 1, 1, same=False)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, 3, 1, same=False)
        channels = 192
        for name, branches, pool in [
            ("Mixed_5b", {**_BLOCK_A, "branch_pool": [(32, 1, 1, 1)]}, _average_pool),
            ("Mixed_5c", {**_BLOCK_A, "branch_pool": [(64, 1, 1, 1)]}, _average_pool),
            ("Mixed_5d", {**_BLOCK_A, "branch_pool": [(64, 1, 1, 1)]}, _average_pool),
            ("Mixed_6a", _BLOCK_B, _halve),
            ("Mixed_6b", _block_c(128), _average_pool),
            ("Mixed_6c", _block_c(160), _average_pool),
            ("Mixed_6d", _block_c(160), _average_pool),
            ("Mixed_6e", _block_c(192), _average_pool),
            ("Mixed_7a", _BLOCK_D, _halve),
            ("Mixed_7b", _BLOCK_E, _average_pool),
            ("Mixed_7c", _BLOCK_E, _max_pool),  # a quirk of the graph; the paper averages here too
        ]:
            block = _Block(channels, branches, pool)
            self.add_module(name, block)
            channels = block.out_channels
        self.fc = nn.Linear(NUM_POOL, NUM_CLASSES)
        if state_dict is not None:
            self.check(state_dict)
            self.load_state_dict(state_dict, strict=False)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Inception:
        """Stays in eval mode, whatever `mode`: a model that holds this network may be switched to training."""
        return super().train(False)

    def check(self, given: Mapping[str, torch.Tensor]) -> None:
        """Raise ValueError unless `given` is this network's state dict, key for key and shape for shape.

        Counters of batches mean nothing in eval mode: they may be there or not.
        """
        own = self.state_dict()
        problems = {
            "missing": [k for k in own if k not in given and not k.endswith(".num_batches_tracked")],
            "unexpected": [k for k in given if k not in own],
            "of another shape": [f"{k} {tuple(given[k].shape)} for {tuple(own[k].shape)}"
                                 for k in given if k in own and given[k].shape != own[k].shape],
        }
        if any(problems.values()):
            found = "; ".join(f"{len(keys)} keys {what} (first: {keys[0]})" for what, keys in problems.items() if keys)
            raise ValueError(f"state_dict: not that of the 2015-12-05 Inception-v3: {found}")

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> Features:
        """Features of uint8 `images` (B, 3, H, W) in 0..255, of any size. ValueError on any other dtype or shape."""
        check_images(images)
        device = self.fc.weight.device
        with torch.autocast(device.type, enabled=False), full_float32():
            x = resize_tf1(images.to(device=device, dtype=torch.float32), IMAGE_SIZE)  # (B, 3, 299, 299)
            x = (x - 128) / 128
            if device.type == "cpu":  # a third faster there (EPYC, one thread: 78 ms an image instead of 110)
                x = x.contiguous(memory_format=torch.channels_last)
            return self._features(x)

    def _features(self, x: torch.Tensor) -> Features:
        x = self.Conv2d_1a_3x3(x)  # (B, 32, 149, 149)
        x = self.Conv2d_2a_3x3(x)  # (B, 32, 147, 147)
        x = _halve(self.Conv2d_2b_3x3(x))  # (B, 64, 73, 73)
        x = self.Conv2d_3b_1x1(x)  # (B, 80, 73, 73)
        x = _halve(self.Conv2d_4a_3x3(x))  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        # The 1x1 branch comes first in the block's output; TensorFlow flattens its channels last.
        spatial = x[:, :NUM_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)
        x = self.Mixed_7a(self.Mixed_6e(x))  # (B, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))  # (B, 2048, 8, 8)
        x = x.mean((2, 3), keepdim=True)  # (B, 2048, 1, 1)
        # Without bias, as Inception Score has always been computed. As a 1x1 convolution: one guard against TF32 is enough.
        logits = F.conv2d(x, self.fc.weight[:, :, None, None])  # (B, 1008, 1, 1)
        return Features(x.flatten(1), spatial, logits.flatten(1))


def resize_tf1(x: torch.Tensor, size: int) -> torch.Tensor:
    """TensorFlow 1's `resize_bilinear` with align_corners=False: float32 (B, C, H, W) -> (B, C, size, size).

    Pixel i of the output lies at i * (in / out) of the input, without half-pixel centres and without antialiasing; first
    along x, then along y, in TensorFlow's order of operations, hence to the same bits on CPU.
    """
    for dim in (3, 2):
        length = x.shape[dim]
        source = torch.arange(size, dtype=torch.float32) * torch.tensor(length / size, dtype=torch.float32)
        lower = source.long()
        weight = (source - lower).to(x.device)
        weight = weight if dim == 3 else weight[:, None]
        low = x.index_select(dim, lower.to(x.device))
        high = x.index_select(dim, (lower + 1).clamp(max=length - 1).to(x.device))
        x = low + (high - low) * weight
    return x


def load_inception(weights: str | Path | None = None, sha256: str | None = None,
                   device: str | torch.device = "cpu") -> Inception:
    """The network with published weights, such as `WEIGHTS_URL` (torch-fidelity's conversion; 96 MB, 1008 classes).

    weights: a local path, a URI that `storage` opens, or an http(s) URL, downloaded once into torch.hub's cache
    (`<torch.hub.get_dir()>/checkpoints`, moved by TORCH_HOME); None is that cache's copy of `WEIGHTS_URL`.
    sha256: the file's checksum, 64 hex digits; without it, a name that ends as `-6726825d.pth` gives the first eight.

    Raises ValueError, naming the file, if it is not there (with the command that fetches it), cannot be downloaded,
    has another checksum, or holds no state dict of this network. What fails never enters the cache.
    """
    state_dict, _ = read_inception_weights(weights, sha256)
    return Inception(state_dict).to(device)


def read_inception_weights(weights: str | Path | None = None,
                           sha256: str | None = None) -> tuple[Mapping[str, torch.Tensor], str]:
    """What `load_inception` would load: the state dict, checked, and its file's sha256; downloads and raises as it does."""
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"sha256 must be 64 lower-case hex digits, got {sha256!r}")
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    source = str(cache / Path(WEIGHTS_URL).name if weights is None else weights)
    is_url = source.startswith(("http://", "https://"))
    location = str(cache / Path(urlsplit(source).path).name) if is_url else storage.absolute(source)
    target = Path(location) if "://" not in location else cache / Path(WEIGHTS_URL).name
    command = (f"mkdir -p {shlex.quote(str(target.parent))} && "
               f"curl -L -o {shlex.quote(str(target))} {shlex.quote(source if is_url else WEIGHTS_URL)}"
               + (f", and copy that file to {location}" if "://" in location else ""))
    download = is_url and not storage.exists(location)
    origin = source if download else location
    try:
        data = _download(source) if download else storage.read_bytes(location)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"Inception weights: cannot read {origin} ({error}); fetch them with: {command}") from error
    named = re.search(r"-([0-9a-f]{8})\.\w+$", location)
    expected, found = sha256 or (named[1] if named else ""), storage.sha256(data)
    if not found.startswith(expected):
        raise ValueError(f"Inception weights: {origin} has sha256 {found}, but it must be (or begin with) {expected}; "
                         f"if the file is damaged, delete it and fetch it with: {command}")
    try:
        state_dict = _read_state_dict(data)
        with torch.device("meta"):  # names and shapes, without memory for weights
            Inception().check(state_dict)
    except ValueError as error:
        raise ValueError(f"Inception weights: {origin}: {error}") from error
    if download:
        storage.write_bytes(location, data)
    logger.info("Inception weights: %s, sha256 %s", location, found)
    return state_dict, found


def _download(url: str) -> bytes:
    """The whole answer: `read` without a size raises IncompleteRead where the connection ends early."""
    logger.info("downloading %s", url)
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
        return answer.read()


def _read_state_dict(data: bytes) -> Mapping[str, torch.Tensor]:
    try:
        state_dict = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch.load raise nearly anything, from EOFError to AssertionError
        raise ValueError(f"no file of torch.save ({type(error).__name__})") from error
    if not isinstance(state_dict, Mapping) or not all(isinstance(v, torch.Tensor) for v in state_dict.values()):
        raise ValueError("no state dict of tensors")
    return state_dict
