"""All four jobs and the report, as a newcomer runs them but shorter; and that a second run does nothing."""

import json
import re
from pathlib import Path

import pytest

from mdt_ray import cli
from mdt_ray.jobs import quickstart
from tests import harness
from tests.helpers import Page

pytestmark = pytest.mark.ray

SHORT = ["--train.num-steps", "20", "--train.keep-every-steps", "10", "--train.checkpoint-every-steps", "10",
         "--tune.train.num-steps", "10", "--tune.max-trials", "2", "--tune.evaluate.num-samples", "30",
         "--tune.evaluate.sampling.num-sampling-steps", "5", "--evaluate.num-samples", "60",
         "--evaluate.sampling.num-sampling-steps", "5"]
"""A quickstart in a minute or two."""


def test_each_stage_has_resources_of_its_own():
    stages = ("precompute", "train", "tune.train", "tune.evaluate", "evaluate")
    words = [word for k, stage in enumerate(stages) for word in (f"--{stage}.workers.num-workers", str(k + 2))]
    config = quickstart.resolve(cli.parse("quickstart", ["digits", *words]).settings)
    found = (config.precompute, config.train, config.tune.train, config.tune.evaluate, config.evaluate)
    assert [stage.workers.num_workers for stage in found] == [2, 3, 4, 5, 6]
    assert quickstart.evaluations_of(config)["guided"].workers.num_workers == 6


@pytest.fixture(scope="module")
def run(tmp_path_factory, ray_session) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("quickstart") / "<b>runs & co"
    command = ["quickstart", "digits", "--output", str(folder), *SHORT]
    numbers, report = harness.run_here(command).splitlines()
    assert re.match(r"fid_digits_60 [\d.]+  ", numbers)
    assert "label_accuracy_digits_60 " in numbers
    assert report == f"report {folder}/report/index.html"
    return folder, command


def test_the_report_is_one_whole_page(run):
    folder, _ = run
    page = Page((folder / "report" / "index.html").read_text())
    assert page.fetched == [], "nothing is loaded from outside"
    assert page.open == [], "every tag is closed"
    assert page.headings == ["Samples, class by class", "Training", "The same noise, as training goes on", "Sweep",
                             "Metrics, and what identifies them", "Time", "Reproduce"]
    assert len(page.images) == 6
    assert all(image["alt"] and len(image["src"]) > 2000 for image in page.images)
    text = " ".join(page.text)
    assert "<b>runs & co" in text, "strings from outside are shown as they are, not as markup"
    measured = ("fid", "sfid", "is", "precision", "recall", "kid", "label_accuracy")
    for name in (*(f"{metric}_digits_60" for metric in measured), "fid_digits_30", "dpm-solver++", "seeds 0 .. 59"):
        assert name in text, name
    assert not re.search(r"\bFID\b", text), "these metrics are not Inception's"


def test_every_stage_left_its_result(run):
    folder, _ = run
    assert json.loads((folder / "stages.json").read_text()).keys() == {"precompute", "train", "tune", "evaluate"}
    assert len(json.loads((folder / "tune" / "results.json").read_text())["trials"]) == 2
    names = sorted(p.name for p in (folder / "evaluate").iterdir() if not p.name.startswith("reference"))
    assert names == ["guided", "unguided-step-00000000", "unguided-step-00000010", "unguided-step-00000020"]
    scales = [json.loads((folder / "evaluate" / n / "metrics.json").read_text())["sampling"]["cfg_scale"] for n in names]
    assert scales == [3.0, 1.0, 1.0, 1.0]
    assert harness.leftovers(folder) == []


def test_a_second_run_changes_nothing(run):
    folder, command = run
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    harness.run_here(command)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


def test_another_setting_is_refused_with_the_difference(run):
    _, command = run
    with pytest.raises(ValueError, match=r"optim.lr: 0.004 -> 0.1"):
        harness.run_here([*command, "--train.optim.lr", "0.1"])
