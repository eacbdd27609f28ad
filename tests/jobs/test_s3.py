"""Jobs with an object store as source and as target: a real server over HTTP, real processes, real kills."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mdt_ray import config_io, presets, storage
from mdt_ray.config import EvaluateConfig, PrecomputeConfig, ReferenceConfig
from mdt_ray.data import latents
from mdt_ray.data.sources import DIGITS
from mdt_ray.jobs import quickstart
from mdt_ray.jobs.evaluate import evaluate_many
from mdt_ray.jobs.precompute import precompute
from mdt_ray.jobs.reference import reference
from tests import harness, s3
from tests.data.pictures import encoded, sample, write_folder, write_parquet, write_tar
from tests.helpers import Page, make_latents
from tests.jobs.test_kills import TRAIN
from tests.jobs.test_quickstart import SHORT

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def store(ray_session):
    with s3.serve() as store:
        yield store


@pytest.fixture(scope="module")
def environment(ray_session):
    from mdt_ray.jobs import session

    return session.environment()


@pytest.fixture(scope="module")
def source(store, tmp_path_factory):
    """The same 40 pictures as a folder, as tars and as Parquet: in the store and on disk."""
    root = tmp_path_factory.mktemp("source")
    pictures = [encoded(seed=i, kind="jpeg") for i in range(40)]
    write_folder(root / "folder", [(f"{'abcd'[i % 4]}/{i}{' +%41#?é' if i == 7 else ''}.jpg", data)
                                    for i, data in enumerate(pictures)])
    for tar in range(2):
        members = [m for i in range(tar * 20, tar * 20 + 20) for m in sample(f"{i}", pictures[i], i % 4)]
        write_tar(root / "tars" / f"{tar}.tar", members)
    write_parquet(root / "parquet" / "s.parquet", [(data, i % 4) for i, data in enumerate(pictures)])
    store.upload(root, "source")
    return root


SETTINGS = ["--vae.path", "digits", "--image-size", "32", "--chunk-size", "8", "--encode-batch-size", "4"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "tars", "parquet"])
def test_from_store_to_store_equals_from_disk_to_disk(store, source, tmp_path, kind):
    harness.run_here(["precompute", "--source", f"{source}/{kind}", "--output", str(tmp_path / "out"), *SETTINGS])
    command = ["precompute", "--source", store.uri(f"source/{kind}"), "--output", store.uri(f"out-{kind}"), *SETTINGS]
    harness.run_here(command)
    there = store.objects(f"out-{kind}")
    here = harness.files(tmp_path / "out", "**/*")
    assert there.keys() == here.keys()
    assert [name for name in here if here[name] != there[name]] == ["run.json", "source.parquet"], "paths, times"
    if kind == "folder":
        before = store.times("out-folder")
        harness.run_here(command)
        assert store.times("out-folder") == before, "a finished job changes nothing"


def test_every_checkpoint_kept_has_an_evaluation_of_its_own(store):
    """Whatever stands behind the paths in their URIs."""
    for step in (0, 5, 10, 20):
        store.put(f"run/train/checkpoints/step-{step:08d}/checksums.json", b"{}")
    config = config_io.override(presets.digits(), {"output": store.uri("run"), "train.keep_every_steps": 10})
    found = quickstart.evaluations_of(quickstart.resolve(config))
    assert list(found) == ["guided", "unguided-step-00000000", "unguided-step-00000010", "unguided-step-00000020"]
    assert [e.checkpoint for e in found.values()] == [store.uri("run/train")] + [
        store.uri(f"run/train/checkpoints/step-{step:08d}") for step in (0, 10, 20)]
    assert [e.output for e in found.values()] == [store.uri(f"run/evaluate/{name}") for name in found]


@pytest.mark.slow
def test_all_four_jobs_and_the_page_come_to_lie_in_the_store(store, caplog):
    command = ["quickstart", "digits", "--output", store.uri("all"), *SHORT]
    last = harness.run_here(command)
    found = store.objects("all")
    assert last.splitlines()[1] == f"report {store.uri('all/report/index.html')}"
    page = Page(found["report/index.html"].decode())
    assert (page.fetched, page.open, len(page.images)) == ([], [], 6)
    assert "Masked Diffusion Transformer: all" in page.text
    judged = [json.loads(data)["checkpoint"]["step"] for name, data in sorted(found.items())
              if re.fullmatch(r"evaluate/unguided-step-\d+/metrics.json", name)]
    assert judged == [0, 10, 20]
    assert not [name for name in found if "?" in name or ".tmp-" in name or name.endswith("lock.json")]
    for name, data in (*found.items(), ("the log", caplog.text.encode()), ("the output", last.encode())):
        assert s3.SECRET.encode() not in data, name
    before = store.times("all")
    assert harness.run_here(command) == last
    assert store.times("all") == before, "a finished job changes nothing"


@pytest.mark.slow
def test_a_killed_job_goes_on_and_no_partial_object_counts(store, source, environment):
    command = ["precompute", "--source", store.uri("source/folder"), "--output", store.uri("killed"), *SETTINGS,
               "--chunk-size", "2", "--encode-batch-size", "2"]
    code = harness.run_and_kill(command, environment, when=lambda: len(store.objects("killed/chunks")) >= 3)
    assert code == -9
    found = store.objects("killed")
    assert "manifest.json" not in found
    entries = {name: json.loads(data) for name, data in found.items() if name.startswith("chunks/")}
    assert 3 <= len(entries) < 20
    # One finished object is cut short behind the job's back; its record still says that it is finished.
    damaged = sorted(entries)[0].removeprefix("chunks/").removesuffix(".json")
    store.put(f"killed/chunk-{damaged}.parquet", found[f"chunk-{damaged}.parquet"][:100])
    before = store.times("killed")
    harness.run(command, environment)
    after, manifest = store.objects("killed"), latents.open_manifest(store.uri("killed"))
    assert manifest.num_rows == 40
    assert {f.name: f.sha256 for f in manifest.files} == {
        name: storage.sha256(data) for name, data in after.items() if name.startswith("chunk-")}
    again = {name for name, time in store.times("killed").items() if time != before.get(name)}
    finished = {f"chunk-{name.removeprefix('chunks/').removesuffix('.json')}.parquet" for name in entries}
    assert again & finished == {f"chunk-{damaged}.parquet"}, "finished chunks are not encoded again"


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "RayTrainWorker"])
def test_training_killed_amid_an_upload_goes_on_bit_for_bit(store, environment, tmp_path_factory, victim):
    folder = tmp_path_factory.getbasetemp() / "training"
    if not folder.exists():
        make_latents(folder / "latents", num_images=200)
        store.upload(folder / "latents", "latents")
        harness.run_here(["train", "--latents", f"{folder}/latents", "--output", f"{folder}/straight", *TRAIN,
                          "--num-steps", "300", "--checkpoint-every-steps", "5", "--keep-every-steps", "100",
                          "--workers.num-workers", "2"])
    name = f"train-{victim}"
    command = ["train", "--latents", store.uri("latents"), "--output", store.uri(name), *TRAIN, "--num-steps", "300",
               "--checkpoint-every-steps", "5", "--keep-every-steps", "100", "--workers.num-workers", "2"]

    def amid_an_upload() -> bool:
        names = [path.split("/") for path in store.times(f"{name}/checkpoints")]
        finished = {step for step, *_, file in names if file == "checksums.json"}
        return len(finished) >= 2 and max(step for step, *_ in names) not in finished

    code = harness.run_and_kill(command, environment, when=amid_an_upload, victim=victim)
    assert code == (-9 if victim == "driver" else 0)
    harness.run(command, environment)
    there = store.objects(f"{name}/checkpoints")
    here = harness.files(folder / "straight" / "checkpoints", "**/*")
    assert there.keys() == here.keys(), "half-written checkpoints are gone, and the same ones are kept"
    assert {path.split("/")[0] for path in here} == {f"step-{step:08d}" for step in (0, 100, 200, 295, 300)}
    for path in (path for path in here if path.endswith((".safetensors", "optimizer.pt"))):
        assert there[path] == here[path], path
    assert not [path for path in store.objects(name) if path.startswith("ray/") or path.endswith("lock.json")]


def test_an_upload_that_dies_leaves_no_object(store, environment):
    uri = store.uri("half/x.bin")
    code = ("import os\nfrom mdt_ray import storage\n"
            f"fs, path = storage.resolve({uri!r})\n"
            "stream = fs.open_output_stream(path)\n"
            "for _ in range(4):\n    stream.write(bytes(6 * 2**20))\n"
            "print('parts sent', flush=True)\nos.kill(os.getpid(), 9)\n")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-9, "parts sent\n")
    assert not storage.exists(uri)
    storage.write_bytes(uri, bytes(20 * 2**20))
    assert len(storage.read_bytes(uri)) == 20 * 2**20


def test_what_is_not_there_is_named(store):
    with pytest.raises(ValueError, match=r"source = 's3://pictures/nothing.*: no such file or folder"):
        precompute(PrecomputeConfig(source=store.uri("nothing"), output=store.uri("out")))
    with pytest.raises(ValueError, match=r"source = 's3://no-such-bucket.*: (no such file|cannot be listed)"):
        precompute(PrecomputeConfig(source=store.uri("x").replace("pictures", "no-such-bucket"), output=store.uri("out")))


def test_a_store_that_is_down_is_an_error_that_says_so(monkeypatch):
    s3.give_keys(monkeypatch)
    monkeypatch.setattr(storage, "RETRY_SECONDS", (1.0,))
    with s3.serve() as store:
        uri = store.uri("x.bin")
        storage.write_bytes(uri, b"there")
    with pytest.raises(OSError, match=r"x.bin.*: could not be written .*run the same command again"):
        storage.write_bytes(uri, b"gone")


def test_an_evaluation_in_the_store_has_the_numbers_of_one_on_disk(store, tmp_path):
    """Samples, reference statistics, weights and output: statistics are built there, and a lost chunk is made again."""
    generator = np.random.default_rng(0)
    for name, count in (("samples", 60), ("real", 90)):
        np.savez(tmp_path / f"{name}.npz", arr_0=generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
    shutil.copy(DIGITS / "features.safetensors", tmp_path / "weights.safetensors")
    store.upload(tmp_path, "evaluation")

    def judge(at) -> dict:
        made = reference(ReferenceConfig(source=at("real.npz"), output=at("statistics"), image_size=32, extractor="digits",
                                         extractor_weights=at("weights.safetensors"), chunk_size=40), pool=False)
        config = EvaluateConfig(samples=at("samples.npz"), reference=made, output=at("judged"), num_samples=60,
                                chunk_size=25, extractor="digits", extractor_weights=at("weights.safetensors"))
        first = evaluate_many([config], pool=False)[0]
        storage.remove(at("judged/chunks/00000025.safetensors"))
        storage.remove(at("judged/metrics.json"))
        assert evaluate_many([config], pool=False)[0]["metrics"] == first["metrics"]
        return first

    there, here = judge(lambda name: store.uri(f"evaluation/{name}")), judge(lambda name: str(tmp_path / name))
    assert there["metrics"] == here["metrics"]
    assert there["reference"]["hash"] == here["reference"]["hash"]
