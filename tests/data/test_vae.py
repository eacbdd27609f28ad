"""The autoencoder: by folder, by hub id with its revision pinned, by subfolder; its scale and shift."""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL

from mdt_ray.config import VaeConfig
from mdt_ray.data.sources import DIGITS
from mdt_ray.data.vae import check_image_size, load_vae, pin_revision, to_unit_range, vae_config
from tests.conftest import ROOT

COMMIT, NEWER = "a" * 40, "b" * 40


def cached(folder, commit: str) -> None:
    """The hub's cache as its client leaves it: the digits' autoencoder as user/pictures, in the subfolder vae."""
    repository = folder / "models--user--pictures"
    (repository / "snapshots" / commit / "vae").mkdir(parents=True, exist_ok=True)
    for file in (DIGITS / "vae").iterdir():
        (repository / "snapshots" / commit / "vae" / file.name).write_bytes(file.read_bytes())
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


def offline(folder, code: str) -> str:
    """Run in a process that knows the cache and no network; what it prints."""
    environment = os.environ | {"HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_a_hub_id_is_pinned_to_its_commit_and_a_run_keeps_it(tmp_path):
    """Also where the hub has a newer one since, and whether or not the command names the old one."""
    code = ("from mdt_ray.config import PrecomputeConfig, VaeConfig\nfrom mdt_ray.data.vae import load_vae\n"
            "from mdt_ray.jobs.precompute import prepare\nfrom mdt_ray import run_folder\nfrom pathlib import Path\n"
            "from tests.data.test_vae import COMMIT, NEWER, cached\n"
            "for commit, revision in ((COMMIT, None), (NEWER, None), (NEWER, COMMIT)):\n"
            f"    cached(Path({str(tmp_path / 'hub')!r}), commit)\n"
            "    config, _, run = prepare(PrecomputeConfig(source='digits', image_size=32,\n"
            f"        output={str(tmp_path / 'out')!r},\n"
            "        vae=VaeConfig(path='user/pictures/vae', revision=revision)))\n"
            "    run_folder.record(config.output, run)\n"
            "    print(config.vae.revision, load_vae(config.vae).weights_hash, run['name'])")
    first, *others = offline(tmp_path / "hub", code).splitlines()
    assert first.startswith(f"{COMMIT} {load_vae(VaeConfig(path='digits')).weights_hash} ")
    assert others == [first, first]


def test_a_folder_needs_no_revision():
    assert pin_revision(VaeConfig(path="digits")) == VaeConfig(path="digits")
    assert pin_revision(VaeConfig(path=str(DIGITS / "vae"))).revision is None


def test_scale_and_shift_come_from_the_autoencoders_own_settings(tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                  up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5, shift_factor=0.25).save_pretrained(tmp_path)
    vae = load_vae(VaeConfig(path=str(tmp_path)))
    assert (vae.scale, vae.shift) == (0.5, 0.25)
    images = torch.randint(0, 256, (2, 16, 24, 3), dtype=torch.uint8)
    moments = vae.encode(to_unit_range(images))
    assert moments.shape == (2, 2, 4, 8, 12)
    assert (moments[:, 1] > 0).all()
    x_0 = (moments[:, 0] - vae.shift) * vae.scale
    expected = ((vae.model.decode(moments[:, 0]).sample + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    assert torch.equal(vae.decode(x_0), expected)
    check_image_size(VaeConfig(path=str(tmp_path)), 18)
    with pytest.raises(ValueError, match=r"image_size = 17: must be divisible by 2"):
        check_image_size(VaeConfig(path=str(tmp_path)), 17)


def test_what_is_no_autoencoder_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"vae.path = '.*none': no AutoencoderKL there"):
        load_vae(VaeConfig(path=str(tmp_path / "none")))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match=r"no AutoencoderKL there .*; give a local folder, a hub id"):
        load_vae(VaeConfig(path=str(tmp_path)))
    with pytest.raises(ValueError, match=r"no AutoencoderKL there \(its config.json has no block_out_channels\); give a"):
        vae_config(VaeConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"no AutoencoderKL there \(Expecting .*\); give a local folder"):
        vae_config(VaeConfig(path=str(tmp_path)))


def test_unit_range():
    x = to_unit_range(torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 2, 1))
    assert x.flatten().tolist() == [-1.0, 1.0]
    assert x.shape == (1, 1, 1, 2)
