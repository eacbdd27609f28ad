"""The command line: exit codes, messages with remedies, previews."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mdt_ray import cli
from tests.conftest import ROOT
from tests.helpers import make_latents


def run(*arguments: str, capsys) -> tuple[int, str, str]:
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:  # tyro's own errors
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(("arguments", "message"), [
    (["trian"], "unknown job 'trian'; did you mean 'train'"),
    (["train", "digts"], "unknown preset 'digts'; did you mean 'digits'"),
    (["train", "zzz"], "unknown preset 'zzz'; known: digits, fashion, imagenet256-{s,b,l,xl}-{1,2,4,8}{,-fast},"),
    (["train", "digits", "--optim.lrr", "1"], "Perhaps you meant"),
    (["train", "digits", "--loss.mask-ratio", "1.0"], "loss.mask_ratio = 1.0: must be in [0, 1)"),
    (["train", "digits", "--model.patch-size", "3"], "model.patch_size = 3: must divide the latent size 4"),
    (["train", "--config", "none.toml"], "no such file"),
    (["train", "--config"], "--config: needs a file"),
])
def test_a_wrong_command_line_ends_with_2(arguments, message, capsys):
    code, _, error = run(*arguments, capsys=capsys)
    assert code == 2
    assert message in " ".join(error.split())


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", "--output", "{tmp}/out"], "--latents: not given"),
    (["train", "--latents", "{tmp}/none", "--output", "{tmp}/out"], "no manifest.json, so no finished latents"),
    (["train", "--latents", "{tmp}/latents", "--output", "{tmp}/out", "--model.num-classes", "3"],
     "model.num_classes = 3: the latents have 10"),
    (["precompute", "--source", "{tmp}/none", "--output", "{tmp}/out"], "no such file or folder"),
    (["precompute", "digits", "--source", "{tmp}/latents", "--output", "{tmp}/out"], "has no column 'image'"),
    (["evaluate", "digits", "--checkpoint", "{tmp}/none", "--output", "{tmp}/out"], "neither a checkpoint nor a training"),
    (["evaluate", "digits", "--checkpoint", "{tmp}/none", "--output", "{tmp}/out", "--reference", ""],
     "--reference: not given"),
    (["evaluate", "digits", "--samples", "{tmp}/none.npz", "--output", "{tmp}/out"], "none.npz"),
    (["quickstart", "imagenet256-s-2", "--output", "{tmp}/out"], "evaluate.reference = '': not given; name real images"),
    (["tune", "digits", "--output", "{tmp}/out", "--train.latents", "{tmp}/latents", "--evaluate.reference", ""],
     "evaluate.reference = '': not given; name real images"),
    (["tune", "digits", "--output", "{tmp}/out", "--train.latents", "{tmp}/latents", "--space", "mask_ration"],
     "neither a search space nor the path of a .py file; did you mean 'mask_ratio'"),
])
def test_a_failed_job_ends_with_1_and_one_message(arguments, message, tmp_path, capsys):
    make_latents(tmp_path / "latents")
    code, _, error = run(*(a.format(tmp=tmp_path) for a in arguments), capsys=capsys)
    assert code == 1
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists(), "nothing is written before the settings are found good"


def test_what_a_terminal_would_obey_is_told_as_letters(tmp_path, capsys):
    code, _, error = run("evaluate", "digits", "--samples", f"{tmp_path}/\x1b[2J\u202e.npz", "--output", f"{tmp_path}/out",
                         capsys=capsys)
    assert code == 1
    assert r"\x1b[2J\u202e.npz" in error


@pytest.mark.parametrize("words", [["plan", "digits", "--dry-run"], ["train", "--help"], ["--help"]])
def test_who_reads_the_output_may_have_gone(words):
    """As `| head` does."""
    process = subprocess.Popen([sys.executable, "-m", "mdt_ray.cli", *words], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="no manifest"):
        cli.main(["train", "--latents", str(tmp_path), "--output", str(tmp_path / "out"), "--debug"])


def test_an_output_with_another_identity_is_refused(tmp_path, capsys):
    make_latents(tmp_path / "latents")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps({"job": "train", "name": "x", "identity": {"seed": 7}}))
    code, _, error = run("train", "--latents", f"{tmp_path}/latents", "--output", f"{tmp_path}/out", capsys=capsys)
    assert code == 1
    assert "holds another run" in error
    assert "seed: 7 -> 0" in error


def test_dry_run_prints_the_settings_and_writes_nothing(tmp_path, capsys):
    code, out, _ = run("train", "digits", "--optim.lr", "0.5", "--output", f"{tmp_path}/out", "--dry-run", capsys=capsys)
    assert code == 0
    settings, _, last = out.rpartition("}\n")
    assert json.loads(settings + "}")["optim"]["lr"] == 0.5
    assert "starts from nothing" in last
    assert list(tmp_path.iterdir()) == []


def test_plan_is_a_job_and_plan_precompute_another(tmp_path, capsys):
    for words, keys in ((["plan"], {"gpu", "mfu", "latents"}), (["plan", "precompute"], {"source", "vae"})):
        code, out, _ = run(*words, "digits", "--dry-run", capsys=capsys)
        assert code == 0
        assert keys <= json.loads(out.rpartition("}\n")[0] + "}").keys()
        assert f"mdt-ray {' '.join(words)} would write nothing" in out
    code, _, error = run("plan", "precompute", "--source", f"{tmp_path}/none", capsys=capsys)
    assert code == 1
    assert "no such file or folder" in error


def test_settings_win_over_file_over_preset(tmp_path, capsys):
    (tmp_path / "run.toml").write_text("seed = 5\nbatch_size = 32\nnum_lanes = 8\n")
    _, out, _ = run("train", "--config", f"{tmp_path}/run.toml", "--seed", "6", "--output", "x", "--dry-run", capsys=capsys)
    settings = json.loads(out.rpartition("}\n")[0] + "}")
    assert (settings["seed"], settings["batch_size"]) == (6, 32)


def test_entry_points_run_from_a_working_directory_that_is_not_installed(tmp_path):
    """As `ray job submit --working-dir` runs them."""
    site, upload = tmp_path / "site", tmp_path / "upload"
    site.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():  # -S: without what its .pth files add
        if "mdt_ray" not in path.name:
            (site / path.name).symlink_to(path)
    for folder in ("mdt_ray", "pipelines", "tune_spaces"):
        shutil.copytree(ROOT / folder, upload / folder)
    make_latents(tmp_path / "latents", num_images=200)
    for name in ("precompute", "train", "tune", "evaluate", "all"):
        words = ["digits", "--dry-run", *["--train.latents", "latents"] * (name == "tune")]
        done = subprocess.run([sys.executable, "-S", str(upload / "pipelines" / f"{name}.py"), *words], cwd=tmp_path,
                              env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "starts from nothing" in done.stdout


def test_what_would_go_with_an_uploaded_working_directory_is_refused(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "working_dir_files" / "_ray_pkg_0123"  # where Ray unpacks it on the cluster
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for words, text in ((["--output", "runs/x"], "on the cluster that is in a temporary folder; name a bucket"),
                        (["--output", str(tmp_path / "x"), "--latents", "nowhere"], "no manifest.json")):
        code, _, error = run("train", "digits", *words, capsys=capsys)
        assert code == 1
        assert text in error
    assert not list(folder.iterdir())


def test_what_a_sweep_would_run_is_said_and_checked(tmp_path, monkeypatch, capsys):
    make_latents(tmp_path / "latents")
    monkeypatch.chdir(tmp_path)
    words = ["tune", "digits", "--dry-run", "--num-seeds", "2"]
    code, out, error = run(*words, "--train.latents", "latents", capsys=capsys)
    assert code == 0, error
    assert ("mask_ratio_decoder_depth: 8 trials with 2 seeds each, of which 0 have ended; ranked by fid_digits_300; "
            "search grid, scheduler none\n") in out
    code, _, error = run(*words, capsys=capsys)
    assert code == 1
    assert "runs/digits/latents: no manifest.json, so no finished latents" in error
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_presets_are_offered_where_a_job_takes_them(capsys):
    for job in cli.JOBS:
        with pytest.raises(SystemExit) as done:
            cli.parse(job, ["--help"])
        assert done.value.code == 0
        offered = "presets: digits" in capsys.readouterr().out
        try:
            cli.parse(job, ["digits"])
            taken = not cli.JOBS[job].positional
        except ValueError as error:
            taken = "has no presets" not in str(error) and job != "submit"
        assert offered == taken, job
