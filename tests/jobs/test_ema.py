"""`mdt-ray ema`: the average of a length that was not stored, beside one that was tracked all along; what it refuses."""

import dataclasses
import shutil

import pytest
import torch

from mdt_ray import checkpoints, config_io, run_folder, storage
from mdt_ray.cli import main
from mdt_ray.config import EmaConfig, EvaluateConfig, SamplingConfig, VaeConfig
from mdt_ray.data import latents
from mdt_ray.data.vae import load_vae
from mdt_ray.inference.pipeline import MDTPipeline
from mdt_ray.inference.sampler import load_model
from mdt_ray.jobs.evaluate import evaluate_many
from mdt_ray.models import MDT
from mdt_ray.training.contract import resolve_model
from mdt_ray.training.run import run_rank
from tests.helpers import make_latents, tiny_training

ORACLE = "ema_power_0.075"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    """64 steps with 16 snapshots of 0.05 and 0.1; 0.075 is tracked in the checkpoints, and struck out of the snapshots."""
    folder = tmp_path_factory.mktemp("trained")
    make_latents(folder / "latents", num_images=130)
    ema = EmaConfig(decay=0.9, power_stds=(0.05, 0.1, 0.075), snapshot_every_steps=4)
    config = tiny_training(folder / "latents", folder / "out", num_steps=64, ema=ema, checkpoint_every_steps=8,
                           keep_last=99)
    manifest = latents.open_manifest(config.latents)
    vae = load_vae(VaeConfig(path="digits"))
    manifest = dataclasses.replace(manifest, vae=manifest.vae | {"weights_hash": vae.weights_hash})
    config = dataclasses.replace(config, model=resolve_model(config.model, manifest))
    run = run_folder.describe("train", config, {})
    run_folder.record(config.output, run)
    run_rank(config, manifest, run)
    for uri in checkpoints.list_finished(config.output, checkpoints.SNAPSHOTS):
        facts = storage.read_json(f"{uri}/state.json")
        facts["power_stds"].pop(ORACLE)
        storage.write_json(f"{uri}/state.json", facts)
        sums = storage.read_json(f"{uri}/checksums.json")
        sums["state.json"] = storage.sha256(storage.read_bytes(f"{uri}/state.json"))
        storage.write_json(f"{uri}/checksums.json", sums)
    return config.output


def flat(uri: str, weights: str = "ema") -> torch.Tensor:
    return torch.cat([p.double().flatten() for p in load_model(uri, weights).parameters()])


def run(*arguments: str, capsys) -> tuple[int, str, str]:
    code = main(["ema", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("step", [64, 48])
def test_it_equals_the_average_tracked_all_along(trained, tmp_path, capsys, step):
    """The error is small beside what separates the average from those stored, at the last step and at one before."""
    arguments = [] if step == 64 else ["--step", step]
    code, out, _ = run("--source", trained, "--sigma-rel", 0.075, "--output", tmp_path / "made", *arguments, capsys=capsys)
    assert code == 0
    assert f"at step {step}, from {step // 2} averages in {step // 4} snapshots; rms error of the fit 0." in out
    made, checkpoint = flat(str(tmp_path / "made")), f"{trained}/checkpoints/{checkpoints.name(step)}"
    tracked = flat(checkpoint, ORACLE)
    error = (made - tracked).norm()
    assert error < 0.01 * (flat(checkpoint, "model") - tracked).norm()
    assert error < 0.02 * min((flat(checkpoint, name) - tracked).norm() for name in ("ema_power_0.050", "ema_power_0.100"))


def test_a_stored_one_comes_back(trained, tmp_path, capsys):
    run("--source", trained, "--sigma-rel", 0.1, "--step", 32, "--output", tmp_path, capsys=capsys)
    stored = flat(f"{trained}/checkpoints/step-00000032", "ema_power_0.100")
    torch.testing.assert_close(flat(str(tmp_path)), stored, rtol=1e-6, atol=1e-7)


def test_the_checkpoint_opens_and_is_evaluated(trained, tmp_path, capsys):
    made = str(tmp_path / "made")
    run("--source", trained, "--sigma-rel", 0.06, "--output", made, capsys=capsys)
    assert checkpoints.damage(made) is None
    facts = storage.read_json(f"{made}/state.json")
    assert (facts["step"], facts["average"]["sigma_rel"], facts["average"]["num_snapshots"]) == (64, 0.06, 16)
    opened = MDT.from_pretrained(f"{made}/ema", low_cpu_mem_usage=False)
    assert {p.dtype for p in opened.parameters()} == {torch.float32}
    card = MDTPipeline.from_pretrained(made).card
    assert "| EMA decay | power function of sigma_rel 0.06, reconstructed to 0." in card
    assert "# mdt_v1, 3 blocks" in card
    found = evaluate_many([EvaluateConfig(
        checkpoint=made, output=str(tmp_path / "judged"), reference="digits", extractor="digits", num_samples=8,
        chunk_size=500, sample_batch_size=8, keep_images=0, sampling=SamplingConfig(sampler="ddim", num_sampling_steps=2))],
        pool=False)
    assert found[0]["metrics"]["fid_digits_8"] > 0


def test_the_same_command_does_nothing_and_another_is_refused(trained, tmp_path, capsys):
    arguments = ["--source", trained, "--output", tmp_path / "made"]
    _, first, _ = run(*arguments, "--sigma-rel", 0.075, capsys=capsys)
    before = (tmp_path / "made" / "checksums.json").stat().st_mtime_ns
    assert run(*arguments, "--sigma-rel", 0.075, "--step", 64, capsys=capsys)[:2] == (0, first)
    assert (tmp_path / "made" / "checksums.json").stat().st_mtime_ns == before
    for other, difference in ((["--sigma-rel", 0.08], "sigma_rel: 0.075 -> 0.08"),
                              (["--sigma-rel", 0.075, "--step", 60], "step: 64 -> 60")):
        code, _, error = run(*arguments, *other, capsys=capsys)
        assert code == 1
        assert "holds another run" in error
        assert difference in error


def test_a_coarse_fit_is_said(trained, tmp_path, capsys, caplog):
    run("--source", trained, "--sigma-rel", 0.06, "--output", tmp_path / "a", capsys=capsys)
    assert "differs from the wanted average" not in caplog.text
    run("--source", trained, "--sigma-rel", 0.02, "--output", tmp_path / "b", capsys=capsys)
    assert "differs from the wanted average by 1" in caplog.text
    assert "--ema.snapshot-every-steps" in caplog.text


def copied(trained, target) -> str:
    shutil.copytree(f"{trained}/ema_snapshots", target / "ema_snapshots")
    return str(target)


def test_a_damaged_snapshot_is_named(trained, tmp_path, capsys):
    source = copied(trained, tmp_path)
    weights = tmp_path / "ema_snapshots" / "step-00000012" / "ema_power_0.050" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    arguments = ["--source", source, "--sigma-rel", 0.075, "--output", tmp_path / "made"]
    code, _, error = run(*arguments, capsys=capsys)
    assert code == 1
    assert "step-00000012: damaged (ema_power_0.050/diffusion_pytorch_model.safetensors does not have its checksum)" in error
    assert not (tmp_path / "made").exists()
    shutil.rmtree(tmp_path / "ema_snapshots" / "step-00000012")
    assert run(*arguments, capsys=capsys)[0] == 0  # as the message says; also where only the snapshots are left
    assert MDTPipeline.from_pretrained(str(tmp_path / "made")).card


@pytest.mark.parametrize(("arguments", "message"), [
    (["--sigma-rel", 0.1, "--source", "{tmp}"], "holds no ema_snapshots; name a training output, of a run with, say, "
                                                 "--ema.power-stds 0.05 0.10 --ema.snapshot-every-steps"),
    (["--sigma-rel", 0.1, "--step", 65], "step = 65: must have a snapshot; there are 16 of steps 4 to 64, the nearest of"),
    (["--sigma-rel", 0.1, "--step", 3], "step = 3: must have a snapshot"),
    (["--sigma-rel", 0.3], "sigma_rel = 0.3: must be between 0 and 0.2886"),
    (["--sigma-rel", 0], "sigma_rel = 0.0: must be between 0 and 0.2886"),
    (["--sigma-rel", 0.1, "--step", 0], "step = 0: must be positive"),
    ([], "--sigma-rel: not given; name it\n"),
])
def test_what_cannot_be_is_refused(trained, tmp_path, capsys, arguments, message):
    arguments = [str(a).format(tmp=tmp_path) for a in arguments]
    source = [] if "--source" in arguments else ["--source", trained]
    code, _, error = run(*source, "--output", tmp_path / "made", *arguments, capsys=capsys)
    assert code != 0
    assert message in error
    assert not (tmp_path / "made").exists()


def test_a_folder_of_other_files_is_left_alone(trained, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    code, _, error = run("--source", trained, "--sigma-rel", 0.1, "--output", tmp_path, capsys=capsys)
    assert code == 1
    assert "holds other files; name a new folder" in error
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_further_averages_are_evaluated_by_name(trained, tmp_path):
    config = EvaluateConfig(checkpoint=trained, output=str(tmp_path / "judged"), reference="digits", extractor="digits",
                            num_samples=8, chunk_size=500, keep_images=0,
                            sampling=SamplingConfig(sampler="ddim", num_sampling_steps=2, weights="ema_power_0.050"))
    assert evaluate_many([config], pool=False)[0]["metrics"]["fid_digits_8"] > 0
    wrong = config_io.override(config, {"sampling.weights": "ema_0.5", "output": str(tmp_path / "other")})
    with pytest.raises(ValueError, match=r"weights = 'ema_0.5'.*use one of ema, ema_power_0.050, ema_power_0.075"):
        evaluate_many([wrong], pool=False)
    assert not (tmp_path / "other").exists()
