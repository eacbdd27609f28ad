"""`plan`: what it says of a run, what it refuses, and that nothing has to be there for it."""

import re
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest

from mdt_ray import checkpoints, cli, config_io, presets
from mdt_ray.config import EmaConfig, ModelConfig, PlanConfig
from mdt_ray.jobs import plan_train, units
from mdt_ray.jobs.plan_train import GPUS
from mdt_ray.training import cost as costs
from mdt_ray.training.run import run_rank
from tests.conftest import ROOT
from tests.helpers import make_latents, tiny_training

SMALL = PlanConfig(model=ModelConfig(hidden_size=64, depth=3, num_heads=4), precision="bf16", num_steps=1000)
ON_GPUS = {"workers.gpus_per_worker": 1, "workers.num_workers": 8}


@pytest.fixture(autouse=True, scope="module")
def counted_once():
    """A cost takes seconds to count, and many plans here differ in what it does not depend on."""
    count, known = costs.count, {}

    def counted(config, dtype, on_gpu):
        key = (config.model, config.loss, config.optim, config.ema, config.gradient_checkpointing, dtype, on_gpu)
        if key not in known:
            known[key] = count(config, dtype, on_gpu)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "count", counted)
        yield


def lines(config: PlanConfig) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in plan_train.plan_train(config).splitlines())


def small(**changes) -> PlanConfig:
    return config_io.override(SMALL, {name.replace("__", "."): value for name, value in changes.items()})


@pytest.mark.slow
def test_a_plan_needs_no_data_writes_nothing_and_starts_no_ray(tmp_path):
    code = ("import sys\nfrom mdt_ray import cli\n"
            "code = cli.main(['plan', 'imagenet256-xl-2', '--workers.num-workers', '64'])\n"
            "assert 'ray' not in sys.modules\nsys.exit(code)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    text = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert text["model"].endswith("256 tokens: 699,776,752 parameters, 675,855,072 at inference")
    assert text["operations"].startswith("118.6 GMAC a pass over an image at inference; training takes 1.246 TFLOP an image")
    assert "of the 40 GB of gpu = a100-40gb, for 4 images at once in tf32" in text["memory"]
    assert text["latents"].startswith("none yet; assumed 1,281,167 images, latents 4 x 32 x 32 with mirror images: 42.06 GB")
    assert text["steps"] == "6,500,000 of 256 images: 1,298.8 epochs"
    assert re.match(r"6\.\d days on 64 GPUs, 10,... GPU hours at 2,8\d\d images/s \(assumed: 35% of 156 TFLOP", text["time"])
    # Weights, their average and Adam's two moments: 4 x 4 bytes a parameter.
    assert text["checkpoints"].startswith("11.2 GB each, 2 of 1,301 kept: 22.39 GB")


def test_what_does_not_fit_is_refused_with_remedies_that_help(capsys):
    assert cli.main(["plan", "imagenet256-b-2", "--model.depth", "4", "--batch-size", "4096"]) == 1
    error = capsys.readouterr().err
    assert re.search(r"workers.num_workers = 8: 512 images at once on a GPU need [\d.]+ GB \(weights .*\), and the memory "
                     r"of gpu = 'a100-40gb' is 40 GB; give --accumulation \d+ or --workers.num-workers \d+ or ", error)
    parts, enough = (int(re.search(rf"{flag} (\d+)", error)[1]) for flag in ("--accumulation", "--workers.num-workers"))
    others = re.findall(r"--gpu (\S+)", error)
    assert others
    config = config_io.override(presets.plan_of(presets.preset("imagenet256-b-2")),
                                {"model.depth": 4, "batch_size": 4096})
    config, _ = plan_train.with_model(config)
    cost = plan_train._cost(config)

    def check(**changes):
        plan_train.check_memory(config_io.override(config, {k.replace("__", "."): v for k, v in changes.items()}), cost)

    check(workers__num_workers=enough)
    check(accumulation=parts)
    with pytest.raises(ValueError, match=f"workers.num_workers = {enough - 1}"):
        check(workers__num_workers=enough - 1)
    with pytest.raises(ValueError, match=r"workers.num_workers = 8"):
        check(accumulation=parts - 1)
    for name in GPUS:
        if name in others:
            check(gpu=name)
        else:
            with pytest.raises(ValueError, match=f"gpu = '{name}'"):
                check(gpu=name)
    check(workers__gpus_per_worker=0)  # a CPU's memory is not known here


def test_a_model_that_no_number_of_workers_fits_is_refused_too():
    config, _ = plan_train.with_model(small(model__hidden_size=16384, model__num_heads=128, **ON_GPUS))
    with pytest.raises(ValueError, match="is 40 GB; give a smaller batch_size or model"):
        plan_train.check_memory(config, plan_train._cost(config))


def test_the_latents_that_are_there_are_counted(tmp_path):
    manifest = make_latents(tmp_path, num_images=100)
    found = lines(small(latents=str(tmp_path), model__patch_size=1))
    size = units.size(sum(file.num_bytes for file in manifest.files))
    assert found["latents"] == f"{size}, 100 images in 2 files"
    assert found["model"].startswith("mdt_v1, 3 blocks of width 64, 16 tokens")
    assert found["steps"] == f"1,000 of 256 images: {256_000 / manifest.num_train:,.1f} epochs"
    with pytest.raises(ValueError, match=r"model.num_classes = 5: the latents have 10"):
        lines(small(latents=str(tmp_path), model__num_classes=5))
    (tmp_path / manifest.files[0].name).unlink()
    with pytest.raises(ValueError, match="missing"):
        lines(small(latents=str(tmp_path)))


def test_a_measured_rate_wins_over_an_assumed_one():
    assert lines(small(images_per_second=500.0))["time"] == "9 min at 500 images/s (measured, as given)"
    measured = lines(small(images_per_second=500.0, **ON_GPUS))
    assert measured["time"] == "9 min on 8 GPUs, 1 GPU hours at 500 images/s (measured, as given)"
    assert "not estimated for CPUs" in lines(SMALL)["time"]


def test_time_goes_by_the_peak_of_the_precision_and_by_the_fullest_worker():
    def rate(**changes) -> float:
        text = lines(small(**ON_GPUS | changes))["time"]
        return float(re.search(r"at ([\d,]+) images/s", text)[1].replace(",", ""))

    base = rate(gpu="h100")
    assert rate(gpu="h100", mfu=0.175) == pytest.approx(base / 2, rel=0.001)
    assert rate(gpu="h100", precision="tf32") == pytest.approx(base * 494 / 989, rel=0.001)
    assert rate(gpu="a100-80gb") == pytest.approx(base * 312 / 989, rel=0.001)
    # 64 lanes on 33 workers: most have two, as with 32.
    assert rate(gpu="h100", workers__num_workers=33) == rate(gpu="h100", workers__num_workers=32)
    assert "lanes" not in lines(small(workers__num_workers=32))["steps"]
    assert lines(small(workers__num_workers=33))["steps"].endswith(
        "; 64 lanes do not divide over 33 workers: all wait for those with 2")
    assert rate(gpu="h100", accumulation=2) == base
    # Two workers on a GPU share it.
    assert rate(gpu="h100", workers__num_workers=16, workers__gpus_per_worker=0.5) == pytest.approx(base, rel=0.001)


def test_workers_that_share_a_gpu_need_its_memory_together():
    alone, sharing = (plan_train.with_model(small(**ON_GPUS, gpu="h100"))[0] for _ in range(2))
    sharing = config_io.override(sharing, {"workers.gpus_per_worker": 0.5})
    cost = plan_train._cost(alone)
    assert plan_train._needed(sharing, cost) == 2 * plan_train._needed(alone, cost)


def test_the_checkpoints_kept_are_those_that_a_run_keeps(tmp_path):
    make_latents(tmp_path / "latents", num_images=60)
    config = tiny_training(tmp_path / "latents", tmp_path / "out", checkpoint_every_steps=3, keep_every_steps=6, keep_last=2,
                           ema=EmaConfig(power_stds=(0.05,), snapshot_every_steps=7))
    plan = config_io.override(PlanConfig(), config_io.to_dict(config))
    found = lines(plan)["checkpoints"]
    plan, manifest = plan_train.with_model(plan)
    run_rank(plan, manifest, {"config": {}})
    steps = [checkpoints.step_of(uri) for uri in checkpoints.list_finished(plan.output)]
    assert steps == [0, 6, 12, 18, 20]
    assert f"each, {len(steps)} of 8 kept" in found
    assert len(checkpoints.list_finished(plan.output, checkpoints.SNAPSHOTS)) == 3
    assert "; 3 snapshots of averages, all kept: " in found


def test_every_gpu_that_can_be_named_is_known():
    assert set(get_args(get_type_hints(PlanConfig)["gpu"])) == GPUS.keys()


@pytest.mark.parametrize(("changes", "message"), [
    ({"mfu": 0.0}, r"mfu = 0.0: must be in \(0, 1\]"),
    ({"images_per_second": 0.0}, "images_per_second = 0.0: must be positive"),
    ({"num_images": 0}, "num_images = 0: must be positive"),
])
def test_assumptions_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_numbers_for_people():
    assert [units.size(n) for n in (7, 21_070_000_000, 2e15)] == ["7 B", "21.07 GB", "2000 TB"]
    assert [units.duration(s) for s in (61.2, 600, 7200, 200_000)] == ["62 s", "10 min", "2.0 h", "2.3 days"]
    assert [units.rate(r) for r in (3.21, 2806.4)] == ["3.21", "2,806"]
