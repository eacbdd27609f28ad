"""Config: strict reading, overrides, identity."""

import contextlib
import dataclasses
import functools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

import mdt_ray
from mdt_ray import config_io, presets, processes, run_folder, storage
from mdt_ray.cli import parse
from mdt_ray.config import ModelConfig, OptimConfig, SamplingConfig, SweepConfig, TrainConfig, TuneConfig, WorkersConfig
from tests import s3
from tests.conftest import ROOT


def test_round_trip_through_json():
    config = presets.digits()
    again = config_io.from_dict(type(config), json.loads(json.dumps(config_io.to_dict(config))))
    assert again == config


def test_toml_and_run_json_load_through_the_same_reader(tmp_path):
    (tmp_path / "run.toml").write_text("batch_size = 128\n[optim]\nlr = 1e-3\n")
    loaded = config_io.load_file(TrainConfig, tmp_path / "run.toml")
    assert (loaded.batch_size, loaded.optim.lr) == (128, 1e-3)
    (tmp_path / "run.json").write_text(json.dumps(run_folder.describe("train", loaded, {})))
    assert config_io.load_file(TrainConfig, tmp_path / "run.json") == loaded


def test_lists_come_as_tuples_from_every_side(tmp_path):
    """TOML, a run's own run.json, dotted overrides, the command line; an int is a float, and the cadence is operational."""
    (tmp_path / "run.toml").write_text("[ema]\nmore_decays = [0.99, 0]\n"
                                       "power_stds = [0.05, 0.1]\nsnapshot_every_steps = 7\n")
    loaded = config_io.load_file(TrainConfig, tmp_path / "run.toml")
    assert (loaded.ema.more_decays, loaded.ema.power_stds) == ((0.99, 0.0), (0.05, 0.1))
    run = run_folder.describe("train", loaded, {})
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert config_io.load_file(TrainConfig, tmp_path / "run.json") == loaded
    dotted = {"ema.more_decays": [0.99, 0], "ema.power_stds": (0.05, 0.1), "ema.snapshot_every_steps": 9}
    overridden = config_io.override(TrainConfig(), dotted)
    assert config_io.difference(config_io.to_dict(loaded), config_io.to_dict(overridden)) == \
        ["ema.snapshot_every_steps: 7 -> 9"]
    arguments = ["--ema.more-decays", "0.99", "0", "--ema.power-stds", "0.05", "0.1", "--ema.snapshot-every-steps", "9"]
    assert parse("train", arguments).settings == overridden
    run_folder.record(str(tmp_path / "out"), run)
    run_folder.check_identity(str(tmp_path / "out"), run_folder.describe("train", overridden, {}))
    fewer = config_io.override(overridden, {"ema.more_decays": []})
    with pytest.raises(ValueError, match=r"ema.more_decays: \[0.99, 0.0\] -> \[\]"):
        run_folder.check_identity(str(tmp_path / "out"), run_folder.describe("train", fewer, {}))


def test_an_interval_may_be_there_or_not():
    """Through JSON, as settings reach workers and folders."""
    for interval in (None, (0, 400)):
        config = SamplingConfig(cfg_interval=interval)
        assert config_io.from_dict(SamplingConfig, json.loads(json.dumps(config_io.to_dict(config)))) == config
    for wrong, message in (([1, 2, 3], "must be a list of 2"), (7, "must be a list or None"), (["a", 1], "must be int")):
        with pytest.raises(ValueError, match=message):
            config_io.from_dict(SamplingConfig, {"cfg_interval": wrong})
    sweep = SweepConfig(cfg_interval=((0, 999), (0, 400)))
    assert config_io.from_dict(SweepConfig, json.loads(json.dumps(config_io.to_dict(sweep)))) == sweep


def test_dotted_and_nested_overrides_agree():
    dotted = config_io.override(TrainConfig(), {"optim.lr": 1e-3, "optim.warmup_steps": 7, "loss.mask_ratio": 0.5})
    nested = config_io.override(TrainConfig(), {"optim": {"lr": 1e-3, "warmup_steps": 7}, "loss": {"mask_ratio": 0.5}})
    assert dotted == nested
    assert dotted.optim == OptimConfig(lr=1e-3, warmup_steps=7)


@pytest.mark.parametrize(("values", "message"), [
    ({"optim.lrr": 1.0}, r"unknown setting 'optim.lrr'; did you mean 'optim.lr'"),
    ({"opti": {}}, r"unknown setting 'opti'; did you mean 'optim'"),
    ({"optim": 3}, r"optim = 3: must be a table"),
    ({"batch_size": "many"}, r"batch_size = 'many': must be int"),
    ({"batch_size": True}, r"batch_size = True: must be int"),
    ({"precision": "fp8"}, r"precision = 'fp8': must be one of"),
    ({"loss.mask_ratio": 1.0}, r"loss.mask_ratio = 1.0: must be in \[0, 1\)"),
    ({"loss.mask_ratio": -0.1}, r"loss.mask_ratio = -0.1"),
    ({"num_lanes": 7}, r"num_lanes = 7: must divide batch_size = 256"),
    ({"workers.num_workers": 65}, r"must not exceed num_lanes = 64"),
    ({"accumulation": 0}, r"accumulation = 0: must be positive"),
    ({"workers.num_workers": 8, "accumulation": 9},
     r"accumulation = 9: times workers.num_workers = 8 must not exceed num_lanes = 64"),
    ({"model": {"input_size": 9}}, r"model.patch_size = 2: must divide the latent size 9"),
    ({"model": {"decode_layer": 13}}, r"model.decode_layer = 13: must be between 0 and depth"),
    ({"model": {"num_heads": 5}}, r"model.hidden_size = 384: must be divisible by num_heads = 5"),
    ({"ema": {"more_decays": [0.99, 1.0]}}, r"ema.more_decays = 1.0: must be in \[0, 1\)"),
    ({"ema.more_decays": [0.9999]}, r"ema.more_decays = \(0.9999,\): must differ from each other and from decay = 0.9999"),
    ({"ema.more_decays": 0.99}, r"ema.more_decays = 0.99: must be a list"),
    ({"ema.more_decays": [0.9, "b"]}, r"ema.more_decays\[1\] = 'b': must be float"),
    ({"ema.power_stds": [0.05, 0.3], "ema.snapshot_every_steps": 5}, r"ema.power_stds = 0.3: must be between 0 and 0.2886"),
    ({"ema.power_stds": [0.05, 0.0501], "ema.snapshot_every_steps": 5}, r"must differ from each other in the first three"),
    ({"ema.power_stds": [0.05]}, r"ema.snapshot_every_steps = 0: must be positive where there are power_stds"),
    ({"ema.snapshot_every_steps": -1}, r"ema.snapshot_every_steps = -1: must not be negative"),
    ({"optim": {"schedule": "cosine"}}, r"optim.schedule_steps = None: a schedule of kind cosine needs it, above"),
])
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        config_io.from_dict(TrainConfig, values)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        config_io.load_file(TrainConfig, tmp_path / "none.toml")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="not valid json"):
        config_io.load_file(TrainConfig, tmp_path / "bad.json")


def test_operational_fields_are_not_identity():
    base = TrainConfig()
    same = dataclasses.replace(base, num_steps=7, workers=WorkersConfig(num_workers=3), output="elsewhere", keep_last=9,
                               accumulation=4)
    other = dataclasses.replace(base, model=ModelConfig(depth=10))
    identity = config_io.identity_fields
    assert identity(base) == identity(same)
    assert config_io.difference(identity(base), identity(other)) == ["model.depth: 12 -> 10"]
    assert config_io.difference(identity(base), identity(dataclasses.replace(base, flip=True))) == ["flip: False -> True"]


def test_an_integer_learning_rate_names_the_same_run_as_a_float():
    a, b = (config_io.from_dict(TrainConfig, {"optim": {"lr": lr}}) for lr in (1, 1.0))
    assert config_io.fingerprint(config_io.identity_fields(a)) == config_io.fingerprint(config_io.identity_fields(b))


def test_output_of_another_run_is_refused_with_the_difference(tmp_path):
    output = str(tmp_path)
    first = run_folder.describe("train", TrainConfig(), {})
    with run_folder.claim(output, first):
        pass
    second = run_folder.describe("train", config_io.override(TrainConfig(), {"optim.lr": 1e-3}), {})
    with pytest.raises(ValueError, match=r"holds another run(.|\n)*optim.lr: 0.0003 -> 0.001"):
        run_folder.check_identity(output, second)
    operational = run_folder.describe("train", config_io.override(TrainConfig(), {"num_steps": 5}), {})
    run_folder.check_identity(output, operational)
    with pytest.raises(ValueError, match=r"inputs.latents: None -> 'abc'"):
        run_folder.check_identity(output, run_folder.describe("train", TrainConfig(), {"latents": "abc"}))


def test_one_writer_per_folder(tmp_path):
    run = run_folder.describe("train", TrainConfig(), {})
    with run_folder.claim(str(tmp_path), run):
        with pytest.raises(ValueError, match="is being written by process"):
            with run_folder.claim(str(tmp_path), run):
                pass
    with run_folder.claim(str(tmp_path), run):  # free again
        pass


def test_an_owner_may_end_at_any_moment_of_the_next_claim(tmp_path, monkeypatch):
    """Its lock goes after each of the first calls of the storage in turn."""
    run, output = run_folder.describe("train", TrainConfig(), {}), str(tmp_path)
    lock = storage.join(output, "lock.json")
    names = ("exists", "read_json", "list_names", "write_json")
    calls = {name: getattr(storage, name) for name in names}
    for moment in range(8):
        made, owner = [], processes.where() | {"pid": 2**22, "started": "then", "token": "before"}
        storage.write_json(lock, owner)

        def call(name, *arguments, made=made, moment=moment):
            found = calls[name](*arguments)
            made.append(name)
            if len(made) == moment and calls["exists"](lock) and calls["read_json"](lock).get("token") == "before":
                storage.remove(lock)
            return found

        for name in names:
            monkeypatch.setattr(storage, name, functools.partial(call, name))
        with run_folder.claim(output, run) as claim:
            assert run_folder.holds(claim)
        monkeypatch.undo()


def test_the_version_is_not_that_of_another_repository(tmp_path, monkeypatch):
    """In which the package is installed."""
    installed = tmp_path / ".venv" / "site-packages" / "mdt_ray"
    installed.mkdir(parents=True)
    (tmp_path / "a.txt").write_text("a")
    for command in (["init", "-q"], ["add", "a.txt"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(mdt_ray, "__file__", str(installed / "__init__.py"))
    assert "git" not in run_folder.versions()
    monkeypatch.setattr(mdt_ray, "__file__", str(tmp_path / "mdt_ray" / "__init__.py"))
    assert "git" in run_folder.versions()


def test_a_claim_that_was_taken_over_no_longer_holds(tmp_path):
    run, output = run_folder.describe("train", TrainConfig(), {}), str(tmp_path)
    with run_folder.claim(output, run) as claim:
        assert run_folder.holds(claim)
        lock = storage.read_json(storage.join(output, "lock.json"))
        storage.write_json(storage.join(output, "lock.json"), lock | {"token": "another"})
        assert not run_folder.holds(claim)
    assert not run_folder.holds(claim)


@pytest.mark.parametrize("kind", ["disk", "store"])
def test_what_a_killed_run_left_half_written_goes_with_the_next(tmp_path, monkeypatch, kind):
    s3.give_keys(monkeypatch)
    with s3.serve() as store:
        output = store.uri("out") if kind == "store" else str(tmp_path)
        for name in ("results.json.tmp-1", "preflight.tmp-2/driver", "results.json", "sub/x.tmp-3"):
            storage.write_bytes(storage.join(output, name), b"x")
        with run_folder.claim(output, run_folder.describe("train", TrainConfig(), {})):
            assert storage.list_names(output) == ["lock.json", "results.json", "run.json", "sub"]
        assert storage.list_names(storage.join(output, "sub")) == ["x.tmp-3"], "which may be another's"


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    run = run_folder.describe("train", TrainConfig(), {})
    lock = storage.join(str(tmp_path), "lock.json")
    with run_folder.claim(str(tmp_path), run):
        ours = storage.read_json(lock)
    # Our own pid, but another start time: a pid that was used again.
    storage.write_json(lock, ours | {"started": "0"})
    with run_folder.claim(str(tmp_path), run):
        pass


def test_the_lock_of_a_dead_process_that_nobody_has_reaped_is_taken_over(tmp_path):
    """So it is in a container whose first process does not care for its children."""
    run, lock = run_folder.describe("train", TrainConfig(), {}), storage.join(str(tmp_path), "lock.json")
    code = ("import time; from mdt_ray import run_folder; from mdt_ray.config import TrainConfig\n"
            f"with run_folder.claim({str(tmp_path)!r}, run_folder.describe('train', TrainConfig(), {{}})): time.sleep(60)")
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        while not storage.exists(lock):
            assert owner.poll() is None
            time.sleep(0.05)
        with pytest.raises(ValueError, match=f"is being written by process {owner.pid}"):
            with run_folder.claim(str(tmp_path), run):
                pass
        owner.kill()
        while psutil.Process(owner.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)
        with run_folder.claim(str(tmp_path), run):
            pass
    finally:
        owner.kill()
        owner.wait()


def test_the_lock_of_another_container_with_this_host_name_is_that_of_another_host(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LEASE_SECONDS", 0.6)
    run, lock = run_folder.describe("train", TrainConfig(), {}), storage.join(str(tmp_path), "lock.json")
    with run_folder.claim(str(tmp_path), run):
        theirs = storage.read_json(lock) | {"space": "another pid namespace", "pid": 2**22 + 1}
    with renewed(lock, theirs), pytest.raises(ValueError, match="is being written"):
        with run_folder.claim(str(tmp_path), run):
            pass


def test_the_lock_of_a_process_that_cannot_be_seen_is_looked_at_for_longer(tmp_path, monkeypatch):
    """/proc may hide what others run."""
    def kill(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(run_folder, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr("os.kill", kill)
    run, lock = run_folder.describe("train", TrainConfig(), {}), storage.join(str(tmp_path), "lock.json")
    with run_folder.claim(str(tmp_path), run):
        theirs = storage.read_json(lock) | {"pid": 2**22 + 1}
    with renewed(lock, theirs), pytest.raises(ValueError, match="is being written"):
        with run_folder.claim(str(tmp_path), run):
            pass
    storage.write_json(lock, theirs | {"renewed": time.time()})
    with run_folder.claim(str(tmp_path), run):
        pass


@contextlib.contextmanager
def renewed(lock: str, held: dict, clock: float = 0.0) -> Iterator[None]:
    """A lock whose owner, by a clock so many seconds ahead, lives."""
    gone = threading.Event()

    def renew() -> None:
        while not gone.wait(0.05):
            storage.write_json(lock, held | {"renewed": time.time() + clock})

    storage.write_json(lock, held | {"renewed": time.time() + clock})
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        gone.set()
        thread.join()


@pytest.mark.parametrize("clock", [-100, 0, 100])  # of the other host, in seconds ahead
def test_a_lock_of_another_host_is_taken_over_unless_it_is_renewed(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(run_folder, "LEASE_SECONDS", 0.6)
    run, lock = run_folder.describe("train", TrainConfig(), {}), storage.join(str(tmp_path), "lock.json")
    held = {"host": "elsewhere", "pid": 1, "started": "0", "token": "theirs"}
    storage.write_json(lock, held | {"renewed": time.time() + clock})
    with run_folder.claim(str(tmp_path), run):
        pass
    with renewed(lock, held, clock), pytest.raises(ValueError, match="on elsewhere"):
        with run_folder.claim(str(tmp_path), run):
            pass
    storage.write_json(lock, held | {"renewed": time.time() - 601})
    monkeypatch.setattr(run_folder, "LEASE_SECONDS", 1000.0)  # nobody waits
    with run_folder.claim(str(tmp_path), run):
        pass


def test_a_choice_may_be_left_open():
    assert config_io.override(TuneConfig(), {"search": "random"}).search == "random"
    assert config_io.override(TuneConfig(), {"search": None}).search is None
    with pytest.raises(ValueError, match="search = 'gird': must be 'grid', 'random', 'optuna' or None"):
        config_io.override(TuneConfig(), {"search": "gird"})


@pytest.mark.parametrize("name", ["digits", "fashion", "imagenet256-v2-xl-2-fast"])
def test_toml_says_all_that_a_config_holds(tmp_path, name):
    preset = presets.preset(name)
    for config in (preset.train, preset.evaluate, preset.tune):
        (tmp_path / "x.toml").write_text(config_io.to_toml(config))
        assert config_io.load_file(type(config), tmp_path / "x.toml") == config


def test_toml_refuses_what_it_cannot_say():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        size: int | None = 3

    with pytest.raises(ValueError, match=r"size = None: TOML cannot say so, and its default is 3; write JSON"):
        config_io.to_toml(Odd(size=None))
