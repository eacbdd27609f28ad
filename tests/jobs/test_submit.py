"""`submit` to a Ray head of its own, behind its token: what a laptop sees of jobs that end well, fail, and are stopped."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile

import pytest
from ray._private.runtime_env.packaging import create_package

from mdt_ray import checkpoints, cli
from mdt_ray.config import SubmitConfig
from mdt_ray.jobs import submit
from tests import clusters, harness, s3
from tests.conftest import ROOT
from tests.helpers import make_latents
from tests.jobs.test_kills import TRAIN
from tests.test_cli import run as command_line


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", "digits"], r"output = 'runs/digits/train': on the cluster that is in a temporary folder; name a bucket"),
    (["--name", "train", "train", "digits"], "output = 'runs/digits/train'"),
    (["--detach", "train", "digits", "--loss.mask-ratio", "1"], r"loss.mask_ratio = 1.0: must be in"),
    (["submit", "list"], "a submitted command cannot be `submit`"),
    (["train", "--output", "s3://key:secret@bucket/run"], r"--output = 's3://\*\*\*@bucket/run': holds a secret"),
    (["evaluate", "imagenet256-s-2", "--output", "s3://bucket/judged"], "--reference: not given; name it"),
    (["--command", "train", "digits"], "output = 'runs/digits/train'"),
    (["--stop-seconds", "0", "train", "--output", "s3://bucket/run"], "stop_seconds = 0: must be positive"),
    (["--name", "nightly/train", "train", "--output", "s3://bucket/run"], "name = 'nightly/train': may have letters"),
    (["--name", "run #3", "train", "--output", "s3://bucket/run"], "name = 'run #3': may have letters"),
    ([], "no job to submit; name one: mdt-ray submit"),
    (["trian", "digits"], "unknown job 'trian'; did you mean 'train'"),
])
def test_a_wrong_command_is_refused_here(arguments, message, capsys):
    code, _, error = command_line("submit", "--address", "http://127.0.0.1:1", *arguments, capsys=capsys)
    assert code == 2
    assert re.search(message, " ".join(error.split()))


@pytest.mark.parametrize(("arguments", "message"), [
    (["submit", "train", "--latents", "s3://bucket/latents", "--output", "s3://bucket/run"],
     "RAY_API_SERVER_ADDRESS = 'http://127.0.0.1:1': Failed to connect to Ray at address: http://127.0.0.1:1; name the"),
    (["submit", "list"], "name the cluster's dashboard, as --address http://127.0.0.1:8265"),
    (["submit", "list", "--address", "http://127.0.0.1:2"], "address = 'http://127.0.0.1:2': Failed to connect"),
    (["submit", "--address", "http://127.0.0.1:2", "logs", "x"], "submit logs: error: address = 'http://127.0.0.1:2'"),
    (["submit", "stop"], "--job: not given; name it"),
    (["submit", "--address", "http://127.0.0.1:2", "stop"], "--job: not given; name it"),
    (["submit", "--dry-run", "--working-dir", "/", "train", "--output", "/x", "--latents", "/y"], "your keys and all else"),
])
def test_no_cluster_ends_with_1_and_what_to_do(arguments, message, monkeypatch, capsys):
    """The address that was given wins over the environment's, which Ray would take first."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    assert cli.main(arguments) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_address_where_no_ray_answers_is_not_taken_for_one_that_asks_for_a_token():
    """`http://` was forgotten: Ray looks for its control store there."""
    patience = {f"RAY_{name}_s": "1" for name in ("py_gcs_connect_timeout", "gcs_rpc_server_reconnect_timeout",
                                                  "gcs_rpc_server_connect_timeout")}
    done = harness.attempt(["submit", "list", "--address", "127.0.0.1:1"], os.environ | patience)
    assert done.returncode == 1
    assert "name the cluster's dashboard, as --address http://127.0.0.1:8265" in done.stderr
    assert "token" not in done.stderr


def test_an_address_of_the_environment_may_hold_no_secret(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://me:hunter2@127.0.0.1:1")
    with pytest.raises(ValueError, match=r"http://\*\*\*@127.0.0.1:1': holds a secret") as caught:
        cli.main(["submit", "list", "--debug"])
    assert "hunter2" not in str(caught.value)


def test_the_command_begins_at_the_first_word_that_is_a_job():
    words = ["--name", "train", "--detach", "evaluate", "sweep", "--output", "s3://b/x"]
    assert cli._cut(words) == (words[:3], words[3:])
    assert cli._cut(["--address=tune", "tune", "digits"]) == (["--address=tune"], ["tune", "digits"])
    assert cli._cut(["--detach", "--", "tune", "--", "x"]) == (["--detach"], ["tune", "--", "x"])
    assert cli.job_of(["submit", "--help", "list"]) == ("submit list", ["--help"])
    for words in (["train", "digits", "--output", "/x"], ["evaluate", "--output", "/x", "--dry-run"]):
        assert cli.submission(SubmitConfig(), words).command == tuple(words)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_log_is_shown_as_it_was_and_its_bar_in_one_line(monkeypatch, is_terminal):
    """In whatever pieces it comes."""
    log = "starting Ray\ntrain     :   0%|  | 0/10\ntrain     :  50%|# | 5/10\nwarning\ntrain     : 100%|##| 10/10\ndone"
    for size in (1, 3, 1000):
        stream = io.StringIO()
        stream.isatty = lambda: is_terminal
        monkeypatch.setattr(sys, "stderr", stream)
        screen = submit._Screen()
        for start in range(0, len(log), size):
            screen.show(log[start:start + size])
        screen.end()
        assert screen.shown == len(log)
        shown = stream.getvalue()
        if is_terminal:
            assert shown == ("starting Ray\ntrain     :   0%|  | 0/10\r\x1b[Ktrain     :  50%|# | 5/10\nwarning\n"
                             "train     : 100%|##| 10/10\ndone\n")
        else:
            assert shown == log + "\n"


def test_a_dry_run_says_what_would_be_run(capsys):
    command = ["train", "digits", "--output", "/shared/my run"]
    code, out, _ = command_line("submit", "--dry-run", *command, capsys=capsys)
    assert code == 0
    assert out.endswith("mdt-ray submit would upload . and run on the cluster:\n"
                        "  mdt-ray train digits --output '/shared/my run'\n")


def test_the_upload_is_small(tmp_path):
    """Packed by Ray itself, of a working copy with all that stands in .rayignore."""
    create_package(str(ROOT), tmp_path / "package.zip", include_gitignore=True)
    assert 1e5 < (tmp_path / "package.zip").stat().st_size < 5e6
    with zipfile.ZipFile(tmp_path / "package.zip") as packed:
        names = packed.namelist()
    assert {"pipelines/all.py", "mdt_ray/cli.py", "tune_spaces/mask_ratio.py"} <= set(names)
    assert not [name for name in names if name.split("/")[0] in ("tests", "runs", ".git", ".venv")]


def test_what_is_named_as_keys_are_is_not_uploaded(tmp_path):
    """Packed by Ray itself; by `ray job submit`, from the repository, too."""
    folder = tmp_path / "project"
    for name in ("run.toml", "a/.env", "a/x.pem", ".env.local", ".netrc", ".aws/credentials", "credentials-1.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    create_package(str(folder), tmp_path / "package.zip", include_gitignore=True, excludes=list(submit.SECRET_FILES))
    with zipfile.ZipFile(tmp_path / "package.zip") as packed:
        assert {name for name in packed.namelist() if not name.endswith("/")} == {"run.toml"}
    assert set(submit.SECRET_FILES) <= set((ROOT / ".rayignore").read_text().splitlines())


def test_a_home_folder_and_a_large_one_are_not_uploaded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "people" / "me"))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    (tmp_path / "people" / "me" / "data").mkdir(parents=True)
    for folder in ("people/me", "people"):
        with pytest.raises(ValueError, match="your keys and all else would go to the cluster; give the command in another"):
            submit.submit(SubmitConfig(working_dir=str(tmp_path / folder)))
    data = tmp_path / "people" / "me" / "data"
    with (data / "large.bin").open("wb") as file:
        file.truncate(101 * 10**6)
    with pytest.raises(ValueError, match=r"more than 100 MB would go to the cluster; name what is to stay in a \.rayignore"):
        submit.submit(SubmitConfig(working_dir=str(data)))
    for name in (".rayignore", ".gitignore"):
        (data / name).write_text("*.bin")
        with pytest.raises(RuntimeError, match="name the cluster's dashboard"):
            submit.submit(SubmitConfig(working_dir=str(data), address="http://127.0.0.1:1"))
        (data / name).unlink()
    (data / ".venv").mkdir()
    (data / "large.bin").rename(data / ".venv" / "large.bin")  # which Ray leaves out
    with pytest.raises(RuntimeError, match="name the cluster's dashboard"):
        submit.submit(SubmitConfig(working_dir=str(data), address="http://127.0.0.1:1"))


@pytest.mark.parametrize(("log", "said"), [
    ("train: 10%|#\nmdt-ray train: error: folder holds another run:\n  lr: 1 -> 2\nUse another folder\ntrain: 20%|##\n",
     "folder holds another run:\n  lr: 1 -> 2\nUse another folder"),
    ("mdt-ray evaluate sweep: error: KeyError: 'a'\n(--debug shows the traceback)\n", "KeyError: 'a'"),
    ("starting\nKilled\n\n", "Killed"), ("", "")])
def test_the_last_error_is_what_was_said_of_it(log, said):
    assert submit._last_error(log) == said


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with clusters.head(tmp_path_factory.mktemp("head")) as head:
        yield head


def run(head, *words: str, cwd=ROOT, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mdt_ray.cli", "submit", *words, "--address", head.address]
    if words[0] not in ("list", "logs", "stop"):
        command = [*command[:4], "--address", head.address, *words]
    return subprocess.run(command, env=head.environment | {"PYTHONPATH": str(ROOT)} | environment, cwd=cwd, text=True,
                          capture_output=True, timeout=240)


def training(folder) -> list[str]:
    make_latents(folder / "latents", num_images=200)
    return ["train", *TRAIN, "--latents", f"{folder}/latents", "--output", f"{folder}/run"]


@pytest.mark.ray
def test_a_job_is_followed_to_its_end_good_or_bad(head, tmp_path):
    train = training(tmp_path)
    done = run(head, "--name", "short", *train, "--num-steps", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "job short succeeded\n"
    assert re.search(r"train +: 100%\|.* step 5/5 loss \d", done.stderr), done.stderr
    assert f"checkpoint {tmp_path}/run/checkpoints/step-00000005" in done.stderr, "what the job prints last"
    assert len(done.stderr.splitlines()) < 30, done.stderr
    failed = run(head, *train, "--optim.lr", "0.5", "--num-steps", "9")
    assert failed.returncode == 1
    assert "holds another run; these settings differ" in failed.stderr
    assert re.search(r"mdt-ray submit: error: job train-\d+-\d+ failed: .*holds another run; these settings differ.*"
                     "Use another output folder", failed.stderr, re.DOTALL)
    twice = run(head, "--name", "short", *train, "--num-steps", "5")
    assert (twice.returncode, "the cluster has had a job of that name" in twice.stderr) == (1, True), twice.stderr
    for environment, said in (({"RAY_AUTH_MODE": "disabled"}, "asks for its token"),
                              ({"RAY_AUTH_TOKEN": "a" * 64}, "refuses the token that it was given")):
        strange = run(head, "list", **environment)
        assert strange.returncode == 1
        assert f"the cluster {said}; set RAY_AUTH_MODE=token" in strange.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_a_detached_job_is_listed_and_stopped_and_goes_on(head, tmp_path):
    """From a folder that does not have the package."""
    train = training(tmp_path)
    long = [*train, "--num-steps", "100000", "--checkpoint-every-steps", "10"]
    detached = run(head, "--detach", "--name", "long", *long, cwd=tmp_path, AWS_SECRET_ACCESS_KEY=s3.SECRET)
    assert detached.returncode == 0, detached.stderr
    assert f"stop it: mdt-ray submit stop long --address {head.address}" in detached.stdout
    end = time.monotonic() + 120
    while checkpoints.newest_step(f"{tmp_path}/run") < 20:
        assert time.monotonic() < end, run(head, "logs", "long").stderr
        time.sleep(0.5)
    known = subprocess.run([str(harness.RAY), "job", "list", "--address", head.address], env=head.environment, text=True,
                           capture_output=True, check=True, timeout=120).stdout
    assert "--batch-size" in known
    assert s3.SECRET not in known
    listed = run(head, "list").stdout.splitlines()
    assert listed[1].split()[:2] == ["long", "running"]
    follower = subprocess.Popen([sys.executable, "-m", "mdt_ray.cli", "submit", "--address", head.address, "logs", "long"],
                                env=head.environment | {"PYTHONPATH": str(ROOT)}, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)
    while "step" not in follower.stdout.readline():
        assert follower.poll() is None
    follower.send_signal(signal.SIGINT)
    left, _ = follower.communicate(timeout=60)
    assert (follower.returncode, "mdt-ray submit logs: job long goes on\nfollow it: " in left) == (130, True), left
    stopped = run(head, "stop", "long")
    assert stopped.returncode == 0
    assert re.search("job long: stopped.*; submit the same command from the same folder to go on:\n  "
                     f"mdt-ray submit --address {head.address} train --batch-size", stopped.stdout), stopped.stdout
    step = checkpoints.newest_step(f"{tmp_path}/run")
    followed = run(head, "logs", "long")
    assert followed.returncode == 143
    assert int(re.findall(r"step (\d+)/100000", followed.stderr)[-1]) <= step, "a checkpoint of its own"
    assert "mdt-ray train: stopped; the newest checkpoint is that of step" in followed.stderr
    assert "mdt-ray submit logs: job long was stopped; the same command goes on" in followed.stderr
    again = run(head, "--name", "again", *train, "--num-steps", str(step + 5), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"going on from the checkpoint of step {step}\n" in again.stderr
    rows = checkpoints.read_metrics(f"{tmp_path}/run/metrics.parquet")
    assert [row["step"] for row in rows] == list(range(1, step + 6))
    assert harness.leftovers(tmp_path / "run") == []
    assert [line.split()[1] for line in run(head, "list").stdout.splitlines()[1:3]] == ["succeeded", "stopped"]
    unknown = run(head, "stop", "nobody")
    assert (unknown.returncode, "the cluster has no such job; `mdt-ray submit list`" in unknown.stderr) == (1, True)


@pytest.mark.ray
def test_what_a_job_uses_was_uploaded(head):
    """Nothing of the package is there."""
    command = "import importlib.metadata, mdt_ray; print('from', mdt_ray.__file__);" \
              "print(*[d.name for d in importlib.metadata.distributions() if 'mdt' in d.name], 'found')"
    submission = [str(harness.RAY), "job", "submit", "--address", head.address]
    for folder, code in ((["--working-dir", "."], 0), ([], 1)):
        done = subprocess.run([*submission, *folder, "--", "python", "-c", command], env=head.environment, cwd=ROOT,
                              text=True, capture_output=True, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        if folder:
            assert re.search(r"from \S+/working_dir_files/\S+/mdt_ray/__init__.py\nfound", done.stdout), done.stdout
        else:
            assert "No module named 'mdt_ray'" in done.stdout


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("number", "said"), [
    (9, "mdt-ray submit logs: error: job shot-9 was ended by SIGKILL: "),
    (15, "mdt-ray submit logs: job shot-15 was ended by SIGTERM; the same command goes on\n")])
def test_a_job_that_no_shell_stands_above_ends_with_its_signal(head, number, said):
    submission = [str(harness.RAY), "job", "submit", "--address", head.address, "--submission-id", f"shot-{number}",
                  "--no-wait", "--"]
    command = ["exec", "python", "-c", f"import os; os.kill(os.getpid(), {number})"]
    subprocess.run(submission + command, env=head.environment, check=True, capture_output=True, timeout=60)
    followed = run(head, "logs", f"shot-{number}")
    assert followed.returncode == 128 + number
    assert said in followed.stderr


def impatient(seconds: int) -> list[str]:
    return [sys.executable, "-c", "import sys; from mdt_ray import cli; from mdt_ray.jobs import submit; "
            f"submit.PATIENCE_SECONDS = {seconds}; sys.exit(cli.main(sys.argv[1:]))", "submit"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_head_without_an_agent_is_told(tmp_path):
    """Another process has its port."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        with clusters.head(tmp_path, agent_port=other.getsockname()[1]) as head:
            done = subprocess.run([*impatient(15), "--address", head.address, *training(tmp_path)], cwd=ROOT, text=True,
                                  env=head.environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120)
    assert done.returncode == 1
    assert "waiting for the agent of the cluster's head, which starts jobs\n" in done.stderr
    assert "error: the cluster's head has no agent, which starts jobs, after 15 s; look for" in done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_following_ends_when_the_cluster_does_not_come_back(tmp_path):
    train = [*training(tmp_path), "--num-steps", "100000"]
    with clusters.head(tmp_path) as head:
        process = subprocess.Popen(
            [*impatient(3), "--address", head.address, "--name", "orphan", *train], text=True,
            env=head.environment | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while "step" not in process.stdout.readline():
            assert process.poll() is None
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the cluster has not answered for 3 s" in said
    assert f"job orphan may go on\nfollow it: mdt-ray submit logs orphan --address {head.address}" in said


@pytest.mark.ray
@pytest.mark.slow
def test_every_pipeline_runs_from_an_uploaded_working_directory(head, tmp_path):
    """By Ray's own command. `all` runs them once more."""
    latents, trained, all_of_it = (f"{tmp_path}/{name}" for name in ("precompute", "train", "all"))
    small = ["--num-steps", "10", "--checkpoint-every-steps", "10", "--workers.num-workers", "1"]
    for name, words in {
        "precompute": ["--output", latents, "--workers.num-workers", "1"],
        "train": ["--latents", latents, "--output", trained, *small],
        "tune": ["--train.latents", latents, "--output", f"{tmp_path}/tune", "--train.num-steps", "10",
                 "--evaluate.num-samples", "40", "--max-trials", "1"],
        "evaluate": ["--checkpoint", trained, "--output", f"{tmp_path}/evaluate", "--num-samples", "40"],
        "all": ["--output", all_of_it, "--train.num-steps", "10", "--train.checkpoint-every-steps", "10",
                "--tune.train.num-steps", "10", "--tune.evaluate.num-samples", "40", "--tune.max-trials", "1",
                "--evaluate.num-samples", "40"],
    }.items():
        command = [str(harness.RAY), "job", "submit", "--address", head.address, "--working-dir", ".", "--", "python",
                   f"pipelines/{name}.py", "digits", *words]
        done = subprocess.run(command, env=head.environment, cwd=ROOT, text=True, capture_output=True, timeout=400)
        assert done.returncode == 0, f"{name}: {done.stdout[-3000:]}{done.stderr[-1000:]}"
    for folder, encoded in ((tmp_path, "precompute"), (tmp_path / "all", "latents")):
        assert (folder / encoded / "manifest.json").is_file()
        assert checkpoints.newest_step(str(folder / "train")) == 10
        assert (folder / "tune" / "results.json").is_file()
    assert (tmp_path / "evaluate" / "metrics.json").is_file()
    assert (tmp_path / "all" / "report" / "index.html").is_file()
