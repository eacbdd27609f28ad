"""The preflight: what it lets pass, and what it says of a node that cannot do its part."""

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys

import pytest

from mdt_ray import run_folder
from mdt_ray.config import WorkersConfig
from mdt_ray.data import latents
from tests import s3
from tests.conftest import ROOT
from tests.helpers import make_latents, tiny_training

NODE = r"^node [\d.]+ \(id [0-9a-f]{12}\): "


@pytest.fixture
def manifest(tmp_path, ray_session):
    return make_latents(tmp_path / "latents")


def refusal(manifest, latents_uri, output, **changes) -> list[str]:
    """The lines of what check_nodes raises, after the first."""
    from mdt_ray.jobs import preflight

    with pytest.raises(ValueError, match=r"^1 of 1 nodes cannot train:\n") as caught:
        preflight.check_nodes(tiny_training(latents_uri, output, **changes), manifest)
    return str(caught.value).split("\n  ")[1:]


def assert_lines(lines: list[str], *patterns: str) -> None:
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.search(pattern, line), line


@pytest.mark.ray
def test_a_sound_node_passes_and_nothing_is_left(manifest, tmp_path, caplog):
    from mdt_ray.jobs import preflight

    with caplog.at_level(logging.INFO):
        preflight.check_nodes(tiny_training(tmp_path / "latents", tmp_path / "out"), manifest)
    assert re.search(r"preflight: 1 node\(s\) can read .*/latents and write .*/out", caplog.text)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.ray
def test_each_failure_has_its_line_and_remedy_the_worst_first(manifest, tmp_path):
    """Latents that go after the manifest was opened, and an output below a regular file."""
    (tmp_path / "file").write_text("")
    path = tmp_path / "latents" / manifest.files[0].name
    path.unlink()
    assert_lines(refusal(manifest, tmp_path / "latents", tmp_path / "file" / "out"),
                 rf"{NODE}cannot read {path}: FileNotFoundError: .*; put the latents on storage that every node mounts",
                 rf"{NODE}cannot write below {tmp_path}/file/out: NotADirectoryError: .*; put the output on storage that")


@pytest.mark.ray
def test_damaged_and_other_latents_are_refused(manifest, tmp_path):
    """A node may read a copy of the latents on its own disk; not other latents."""
    folder = tmp_path / "latents"
    files = [dataclasses.replace(manifest.files[0], sha256="0" * 64), *manifest.files[1:]]
    latents.write_manifest(str(folder), dataclasses.replace(manifest, files=files))
    assert_lines(refusal(manifest, folder, tmp_path / "out"), rf"{NODE}{folder} holds other latents than the driver's; put")
    path = folder / manifest.files[0].name
    path.write_bytes(b"\0" * manifest.files[0].num_bytes)
    assert_lines(refusal(manifest, folder, tmp_path / "out"), rf"{NODE}{path}: ValueError: .*; run the same `mdt-r")
    path.write_bytes(b"PAR1")
    assert_lines(refusal(manifest, folder, tmp_path / "out"), rf"{NODE}{path}: 4 bytes, must be \d+ \(truncated .*; run")


@pytest.mark.ray
def test_a_node_that_hangs_is_named(manifest, tmp_path, monkeypatch):
    """Opening a FIFO waits until someone writes, which nobody does: as a mount does whose server has gone."""
    from mdt_ray.jobs import preflight

    path = tmp_path / "latents" / manifest.files[0].name
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(preflight, "TIMEOUT_SECONDS", 0.5)
    assert_lines(refusal(manifest, tmp_path / "latents", tmp_path / "out"), rf"{NODE}no answer within 0.5 s; look at that")


@pytest.mark.ray
def test_an_object_store_is_tried_as_the_workers_will_use_it(manifest, tmp_path):
    from mdt_ray.jobs import preflight

    with s3.serve() as store:
        store.upload(tmp_path / "latents", "latents")
        good, out = store.uri("latents"), store.uri("out")
        preflight.check_nodes(tiny_training(good, out), manifest)
        assert store.objects("out") == {}
        assert_lines(refusal(manifest, *(uri.replace("pictures", "no-such-bucket") for uri in (good, out))),
                     rf"{NODE}cannot read s3://no-such-bucket/latents/chunk-00000.parquet\?.*: .*(NOT_FOUND|not exist)",
                     rf"{NODE}cannot write below s3://no-such-bucket/out\?.*: .*(NO_SUCH_BUCKET|not exist)")


@pytest.mark.slow
@pytest.mark.ray
def test_a_store_that_is_down_is_named(manifest, tmp_path):
    with s3.serve() as store:
        uri = store.uri("out")
    assert_lines(refusal(manifest, tmp_path / "latents", uri), rf"{NODE}cannot write below s3://.*; put the output on")


@pytest.mark.ray
def test_gpus_that_torch_does_not_see_are_refused(manifest, tmp_path):
    """The task, its environment and torch are real; Ray's count is the only thing made up."""
    from mdt_ray.jobs import preflight

    node, = preflight.worker_nodes(WorkersConfig())
    node = node | {"Resources": node["Resources"] | {"GPU": 1000.0}}
    config = tiny_training(tmp_path / "latents", tmp_path / "out")
    arguments = (config.latents, manifest.files[0], manifest.content, f"{config.output}/x", "", True)
    (kind, name, text), = preflight._ask([node], arguments)
    assert (kind, f"{name}: "[:5]) == ("gpus", "node ")
    assert re.match(r"Ray counts 1000 GPUs there, torch \d.* \(built for CUDA: .*\) sees \d$", text)


@pytest.mark.ray
def test_workers_that_do_not_fit_are_refused_here_and_waited_for_on_a_cluster(manifest, tmp_path, monkeypatch, caplog):
    from mdt_ray.jobs import nodes, preflight

    config = tiny_training(tmp_path / "latents", tmp_path / "out", workers=WorkersConfig(num_workers=5, cpus_per_worker=400))
    with pytest.raises(ValueError, match=r"workers.num_workers = 5: with 400 CPUs and 0 GPUs each, Ray has room for 0 \(it "
                                         r"has \d+ CPUs and \d+ GPUs\); use fewer or smaller ones"):
        preflight.check_nodes(config, manifest)
    monkeypatch.setenv("RAY_ADDRESS", "a cluster")
    preflight.check_nodes(config, manifest)
    assert "workers.num_workers = 5: with 400 CPUs" in caplog.text
    assert "waiting for more nodes" in caplog.text
    node = {"CPU": 3.0, "GPU": 1.0}
    assert nodes.num_fitting(node, WorkersConfig()) == 3
    assert nodes.num_fitting({"CPU": 0.3}, WorkersConfig(cpus_per_worker=0.1)) == 3
    assert nodes.num_fitting(node, WorkersConfig(gpus_per_worker=0.5)) == 2
    assert nodes.num_fitting({"CPU": 3.0}, WorkersConfig(gpus_per_worker=1)) == 0
    assert nodes.num_fitting({}, WorkersConfig()) == 0


def test_versions_that_matter_are_compared():
    from mdt_ray.jobs.preflight import compare_versions

    here = run_folder.versions() | {"python": "3.11.4", "torch": "2.9.0+cpu", "numpy": "2.1.0", "git": "a1"}
    assert compare_versions(here, dict(here)) == []
    assert compare_versions(here, here | {"machine": "riscv", "python": "3.11.9", "torch": "2.9.0+cu128"}) == []
    assert compare_versions(here, {k: v for k, v in here.items() if k != "git"}) == []
    assert compare_versions({k: v for k, v in here.items() if k != "git"}, here) == []
    there = here | {"python": "3.12.4", "torch": "2.10.0", "git": "b2", "ray": "2.61"}
    del there["numpy"]
    assert compare_versions(here, there) == [
        "python 3.12.4 (driver: 3.11.4)", "torch 2.10.0 (driver: 2.9.0+cpu)", f"ray 2.61 (driver: {here['ray']})",
        "numpy missing (driver: 2.1.0)", "git b2 (driver: a1)"]


def test_its_tasks_do_not_load_torch():
    code = ("import sys, mdt_ray.jobs.preflight\n"
            "sys.exit(f'loads {found}' if (found := {'torch', 'ray.data'} & set(sys.modules)) else 0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_several_nodes(tmp_path):
    """A head without CPUs is not asked; a node with another package, with a disk of its own, or without the GPU that it
    claims, is refused; one that dies during the check is left out."""
    done = subprocess.run([sys.executable, "-m", "tests.jobs.preflight_nodes", str(tmp_path)], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    gpu, apart = (rf"node [\d.]+ \(id {seen[name]}\)" for name in ("gpu", "apart"))
    assert all(seen[scenario]["left"] == [] for scenario in ("apart and bare", "lost", "fine", "no GPU"))

    refused = seen["apart and bare"]
    assert_lines(refused["log"][:1], r"^WARNING workers.num_workers = 4: .* room for [23] .*; waiting for more nodes")
    if seen["may_mount"]:
        assert_lines(refused["error"].split("\n"), "^2 of 3 nodes cannot train:",
                     rf"\(id {seen['bare']}\): the check does not run there .*'mdt_ray\.(jobs\.preflight|data)'.*; install",
                     f"{apart}: {tmp_path}/out is another folder there than on the driver, .*; put the output on storage")

    assert_lines(seen["lost"]["error"].split("\n"), "^1 of 2 nodes cannot train:", f"{gpu}: cannot read .*chunk-00000")
    assert_lines(seen["lost"]["log"], f"WARNING preflight: {apart} was lost meanwhile and is left out")

    assert seen["fine"]["error"] == ""
    assert_lines(seen["fine"]["log"], r"INFO preflight: 1 node\(s\) can read")
    assert_lines(seen["no GPU"]["error"].split("\n"), "^1 of 1 nodes cannot train:",
                 f"{gpu}: Ray counts 1 GPUs there, torch .* sees 0; mend the driver or install a torch built for CUDA there",
                 f"{gpu}: cannot read .*chunk-00000")
