"""One kill per job, with real processes: the same command again ends with the artefacts of an undisturbed run."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mdt_ray import checkpoints, storage
from mdt_ray.training.meters import MACHINE_COLUMNS
from tests import harness
from tests.conftest import ROOT
from tests.data.pictures import encoded, write_folder
from tests.helpers import make_latents

pytestmark = pytest.mark.ray

TRAIN = ["--batch-size", "24", "--num-lanes", "12", "--precision", "fp32", "--log-every-steps", "1",
         "--model.patch-size", "1", "--model.hidden-size", "32", "--model.depth", "3", "--model.num-heads", "2",
         "--model.decode-layer", "1", "--optim.lr", "1e-3"]


@pytest.fixture(scope="module")
def environment(ray_session):
    from mdt_ray.jobs import session

    return session.environment()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def latents(folder) -> str:
    make_latents(folder / "latents", num_images=200)
    return str(folder / "latents")


@pytest.fixture(scope="module")
def checkpoint(folder, ray_session) -> str:
    """A short training on the digits' own latents, for what needs a VAE."""
    harness.run_here(["precompute", "digits", "--output", f"{folder}/digits"])
    harness.run_here(["train", "digits", "--latents", f"{folder}/digits", "--output", f"{folder}/digits-train",
                      "--num-steps", "5", "--workers.num-workers", "1"])
    return f"{folder}/digits-train"


@pytest.fixture(scope="module")
def pictures(folder) -> str:
    """Some hundred pictures that take a while to decode; one is broken."""
    large = [encoded((900, 700), seed=i, kind="jpeg") for i in range(8)]
    write_folder(folder / "pictures", [(f"{'abc'[i % 3]}/{i:03d}.jpg", b"x" if i == 50 else large[i % 8])
                                       for i in range(300)])
    return str(folder / "pictures")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["decode_piece", "MapWorker", "read_chunk"])
def test_precompute_survives_a_killed_process(folder, pictures, environment, victim):
    def command(name: str) -> list[str]:
        return ["precompute", "digits", "--source", pictures, "--output", f"{folder}/{name}", "--chunk-size", "15",
                "--encode-batch-size", "8", "--workers.num-workers", "1", "--flip"]

    if not (folder / "straight").exists():
        harness.run_here(command("straight"))
    killed = folder / f"killed-{victim}"
    code = harness.run_and_kill(command(killed.name), environment, victim=victim,
                                when=lambda: len(list(killed.glob("chunks/*.json"))) >= 3)
    assert code == 0, "Ray replaces the process, and the run goes on by itself"
    expected, found = (harness.files(path, "**/*") for path in (folder / "straight", killed))
    assert len(expected) == 20 + 20 + 5  # chunks and their records; manifest, source, plan, rejected, run
    assert found.keys() == expected.keys()
    assert [name for name in expected if name != "run.json" and found[name] != expected[name]] == []
    assert harness.leftovers(killed) == []


@pytest.mark.slow
def test_precompute_goes_on_after_a_driver_is_killed_again_and_again(folder, pictures, environment):
    killed = folder / "killed-driver"
    command = ["precompute", "digits", "--source", pictures, "--output", str(killed), "--chunk-size", "15",
               "--encode-batch-size", "8", "--workers.num-workers", "1", "--flip"]
    finished = {}
    for moment in ("run.json", "plan.parquet", "chunks/*[3-9].json"):
        code = harness.run_and_kill(command, environment, when=lambda moment=moment: any(killed.glob(moment)))
        assert code == -9
        assert not (killed / "manifest.json").exists()
        assert {p: p.stat().st_mtime_ns for p in finished} == finished
        finished = {p: p.stat().st_mtime_ns for p in killed.glob("chunks/*.json")}
    assert finished
    harness.run(command, environment)
    assert {p: p.stat().st_mtime_ns for p in finished} == finished, "finished chunks are not encoded again"
    expected, found = (harness.files(path, "**/*") for path in (folder / "straight", killed))
    assert found.keys() == expected.keys()
    assert [name for name in expected if name != "run.json" and found[name] != expected[name]] == []
    assert harness.leftovers(killed) == []


@pytest.mark.slow
def test_precompute_decodes_on_other_nodes_and_survives_the_loss_of_one(folder, pictures, environment):
    """The head has one CPU, which the encoder takes: decoding can only run elsewhere, and waits while there is nowhere."""
    lost = folder / "lost-node"
    outside = {k: v for k, v in environment.items() if k != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-m", "tests.jobs.nodes", pictures, str(lost)], env=outside, cwd=ROOT,
                          capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert 3 <= seen["chunks_at_loss"] < 20
    assert not seen["decoded_on_head"]
    assert seen["decoder_nodes"] == 2
    harness.run_here(["precompute", "digits", "--source", pictures, "--output", f"{folder}/no-loss", "--chunk-size", "15",
                      "--encode-batch-size", "8", "--workers.num-workers", "1", "--validation-share", "0.2",
                      "--rows-per-group", "128"])
    for pattern in ("chunk-*", "chunks/*"):
        assert harness.files(lost, pattern) == harness.files(folder / "no-loss", pattern)
    assert harness.leftovers(lost) == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "RayTrainWorker"])
def test_train_goes_on_after_a_kill(folder, latents, environment, victim):
    def command(name: str) -> list[str]:
        return ["train", "--latents", latents, "--output", f"{folder}/{name}", *TRAIN, "--num-steps", "60",
                "--checkpoint-every-steps", "10", "--workers.num-workers", "2"]

    straight, killed = folder / "straight-train", folder / f"killed-train-{victim}"
    if not straight.exists():
        harness.run_here(command("straight-train"))
    code = harness.run_and_kill(command(killed.name), environment, victim=victim,
                                when=lambda: any(killed.glob("checkpoints/step-*2[0-9]/checksums.json")))
    assert code == (-9 if victim == "driver" else 0), "Ray Train replaces a worker by itself"
    harness.run(command(killed.name), environment)
    a, b = (checkpoints.latest(str(output)) for output in (straight, killed))
    for name in ("model/diffusion_pytorch_model.safetensors", "ema/diffusion_pytorch_model.safetensors", "optimizer.pt"):
        assert storage.read_bytes(f"{a}/{name}") == storage.read_bytes(f"{b}/{name}"), name
    rows = [[{k: v for k, v in row.items() if k not in MACHINE_COLUMNS}
             for row in checkpoints.read_metrics(f"{uri}/metrics.parquet")] for uri in (a, b)]
    assert len(rows[0]) == 60
    assert rows[0] == rows[1]
    assert harness.leftovers(killed) == []


@pytest.mark.slow
def test_what_a_lost_controller_had_reserved_is_given_back(folder, latents, environment):
    """Killed while its workers start: nobody but the driver knows of their placement group then."""
    from ray.util import placement_group_table

    def starting() -> bool:
        return any(group["state"] == "CREATED" for group in placement_group_table().values())

    output = folder / "lost-controller"
    code = harness.run_and_kill(["train", "--latents", latents, "--output", str(output), *TRAIN, "--num-steps", "5",
                                 "--workers.num-workers", "2", "--workers.cpus-per-worker", "2"], environment,
                                when=starting, victim="TrainController")  # there is no room for two more
    assert code == 0
    assert checkpoints.newest_step(str(output)) == 5
    assert harness.open_placement_groups() == []


@pytest.mark.slow
def test_what_a_failed_controller_had_reserved_is_given_back(ray_session):
    """It lets go of workers of which a host goes away just as they are told to begin."""
    import ray.train
    from ray.exceptions import ActorUnavailableError
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    from mdt_ray.jobs import train

    class Host(WorkerGroupCallback):
        def after_worker_group_training_start(self, worker_group):
            raise ActorUnavailableError("socket closed", None)

    class Trainer(train._Trainer):
        def _create_default_callbacks(self) -> list:
            return [*super()._create_default_callbacks(), Host()]

    trainer = Trainer(lambda settings: time.sleep(600), train_loop_config={},
                      scaling_config=ray.train.ScalingConfig(num_workers=1))
    with pytest.raises(ActorUnavailableError, match="socket closed"):
        train._fit(trainer)
    assert harness.open_placement_groups() == []


@pytest.mark.slow
def test_nothing_that_would_outlive_a_killed_driver_is_started(folder, latents, environment):
    """Ray Train's PlacementGroupCleaner stays for ever where its controller dies before it was told to look."""
    before = harness.ray_processes("TrainController")  # of trainings in this process, which may keep them
    seen, output = [], f"{folder}/attended"

    def has_trained() -> bool:
        seen.append(harness.ray_process("PlacementGroupCleaner"))
        return checkpoints.newest_step(output) >= 10

    harness.run_and_kill(["train", "--latents", latents, "--output", output, *TRAIN, "--num-steps", "1000",
                          "--checkpoint-every-steps", "10"], environment, when=has_trained)
    assert set(seen) == {None}
    end = time.monotonic() + 40
    while left := {*harness.ray_processes("TrainController"), *harness.ray_processes("RayTrainWorker")} - {*before}:
        assert time.monotonic() < end, left
        time.sleep(0.5)
    assert harness.open_placement_groups() == []


@pytest.fixture(scope="module")
def straight_evaluate(folder, checkpoint) -> list[str]:
    """An undisturbed evaluation; returns its command, of which the last word is the output."""
    command = ["evaluate", "digits", "--checkpoint", checkpoint, "--num-samples", "200", "--chunk-size", "10",
               "--workers.num-workers", "1", "--output", f"{folder}/straight-evaluate"]
    harness.run_here(command)
    return command


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "MapWorker"])
def test_evaluate_goes_on_after_a_kill(folder, straight_evaluate, environment, victim):
    """Of the driver, or of a sampler, decoder or feature network, whichever is found first."""
    killed = folder / f"killed-evaluate-{victim}"
    command = [*straight_evaluate[:-1], str(killed)]
    code = harness.run_and_kill(command, environment, victim=victim,
                                when=lambda: len(list(killed.glob("chunks/*"))) >= 3)
    assert code == (-9 if victim == "driver" else 0), "a lost actor is replaced within the run"
    assert (killed / "metrics.json").exists() == (victim != "driver")
    finished = {p: p.stat().st_mtime_ns for p in killed.glob("chunks/*.safetensors")}
    harness.run(command, environment)
    assert {p: p.stat().st_mtime_ns for p in finished} == finished, "finished chunks are not drawn again"
    straight = folder / "straight-evaluate"
    assert harness.files(killed, "chunks/*") == harness.files(straight, "chunks/*")
    metrics = [json.loads((output / "metrics.json").read_text())["metrics"] for output in (straight, killed)]
    assert metrics[0] == metrics[1]
    assert harness.leftovers(killed) == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "ImplicitFunc"])
def test_tune_goes_on_after_a_kill(folder, checkpoint, environment, victim):
    """A lost trial is started again by the sweep, a lost sweep by the same command, and training goes on from its newest
    checkpoint: those that were there are not written again."""
    def command(name: str) -> list[str]:
        return ["tune", "digits", "--output", f"{folder}/{name}", "--train.latents", f"{folder}/digits",
                "--train.num-steps", "60", "--train.checkpoint-every-steps", "15", "--train.keep-last", "9",
                "--evaluate.num-samples", "50", "--max-concurrent-trials", "1"]

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in killed.glob("trainings/*/checkpoints/step-????????/state.json")}

    harness.run_here(command("straight-tune"))
    name = f"killed-{victim}-tune"
    killed = folder / name
    at_kill: dict[Path, int] = {}
    code = harness.run_and_kill(command(name), environment, victim=victim,
                                when=lambda: len(list(killed.glob("trials/*/result.json"))) >= 1
                                and at_kill.update(written()) is None and len(at_kill) >= 8)
    assert len(at_kill) % 5, "in the middle of a training"
    assert code == (-9 if victim == "driver" else 0)
    finished = {p: p.stat().st_mtime_ns for p in killed.glob("trials/*/result.json")}
    assert len(finished) < 4 if victim == "driver" else len(finished) == 4
    harness.run(command(name), environment)
    assert {p: p.stat().st_mtime_ns for p in finished} == finished, "finished trials are not run again"
    assert {p: time for p, time in written().items() if p in at_kill} == at_kill
    results = [json.loads((folder / name / "results.json").read_text())["trials"]
               for name in ("straight-tune", name)]
    for trials in results:
        assert len(trials) == len({t["name"] for t in trials}) == 4
    assert [t["metrics"] for t in results[0]] == [t["metrics"] for t in results[1]]
    assert harness.leftovers(killed) == []
    assert harness.open_placement_groups() == []
    assert harness.ray_process("ImplicitFunc") is None, "no trial outlives its sweep"


@pytest.mark.slow
def test_a_trial_of_several_workers_gets_its_room_back_after_its_process_is_lost(folder, checkpoint, environment):
    """Ray Train's controller goes with it, and what that had reserved would stay: there is no room for two."""
    output = folder / "lost-trial-of-two"
    code = harness.run_and_kill(
        ["tune", "digits", "--output", str(output), "--train.latents", f"{folder}/digits", "--train.num-steps", "60",
         "--train.checkpoint-every-steps", "15", "--train.workers.num-workers", "2",
         "--train.workers.cpus-per-worker", "1.5", "--evaluate.num-samples", "50", "--max-trials", "1"],
        environment, victim="ImplicitFunc", timeout=240,
        when=lambda: any(output.glob("trainings/*/checkpoints/step-00000015/checksums.json")))
    assert code == 0
    assert len(json.loads((output / "results.json").read_text())["trials"]) == 1
    assert harness.leftovers(output) == []
    assert harness.open_placement_groups() == []


@pytest.mark.slow
def test_all_jobs_in_order_go_on_where_they_stopped(tmp_path, environment):
    """Killed while training, in the sweep and while evaluating: what was finished stays as it is."""
    command = ["quickstart", "digits", "--output", str(tmp_path), "--train.num-steps", "20",
               "--train.keep-every-steps", "10", "--train.checkpoint-every-steps", "10",
               "--tune.train.num-steps", "10", "--tune.evaluate.num-samples", "30", "--tune.max-trials", "2",
               "--evaluate.num-samples", "60", "--evaluate.sampling.num-sampling-steps", "5"]
    finished = {}
    for moment, done in {
        "train/checkpoints/step-00000010/checksums.json": "latents/*",
        "tune/trials/*/result.json": "train/checkpoints/*/*",
        "evaluate/*/chunks/*": "tune/trials/*/result.json"}.items():
        assert harness.run_and_kill(command, environment, when=lambda moment=moment: any(tmp_path.glob(moment))) == -9
        assert {p: p.stat().st_mtime_ns for p in finished} == finished
        finished |= {p: p.stat().st_mtime_ns for p in tmp_path.glob(done) if p.name != "lock.json"}
    assert len(finished) > 20
    harness.run(command, environment)
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    assert json.loads((tmp_path / "stages.json").read_text()).keys() == {"precompute", "train", "tune", "evaluate"}
    assert (tmp_path / "report" / "index.html").is_file()
    assert harness.leftovers(tmp_path) == []
