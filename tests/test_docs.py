"""What the documents say still holds: commands parse, names exist, links lead somewhere."""

import importlib
import re
import shlex
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from mdt_ray import config_io, presets
from mdt_ray.cli import JOBS, job_of, parse
from mdt_ray.config import TrainConfig
from mdt_ray.data import latents
from tests.conftest import ROOT
from tests.helpers import make_latents

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("benchmarks/*.md")])


def commands() -> list[str]:
    found = []
    for path in DOCUMENTS:
        text = re.sub(r"\\\n\s*", " ", path.read_text())
        found += [line.strip().partition("  #")[0] for line in text.splitlines() if line.startswith("    mdt-ray ")]
    return [line for line in found if "<job>" not in line and "--config" not in line]


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    job, arguments = job_of(shlex.split(command)[1:])
    assert job in JOBS
    parse(job, arguments)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in link:
            assert (path.parent / link).exists(), f"{path}: {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_and_settings_exist(path):
    text = path.read_text()
    for module, names in re.findall(r"from (mdt_ray[\w.]*) import (\w+(?:, \w+)*)", text):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{path}: {module}.{name}"
    known = config_io.flatten(config_io.to_dict(TrainConfig())).keys()
    for setting in re.findall(r"`((?:model|loss|optim|ema)\.\w+)", text):
        assert setting in known, f"{path}: {setting}"
    for name in re.findall(r"imagenet256-[a-z0-9-]*\d", text):
        assert name in presets.PRESETS, f"{path}: {name}"


def test_a_stranger_reads_the_latents_in_five_lines(tmp_path, monkeypatch):
    """The lines of docs/latents.md, as they stand there."""
    make_latents(tmp_path / "latents", num_images=20, num_files=1)
    text = (ROOT / "docs" / "latents.md").read_text()
    block = re.search(r"\n\n((?:    .*\n)*    table = pq.read_table(?:.*\n)(?:    .*\n)*)", text)[1]
    lines = textwrap.dedent(block).splitlines()
    assert len(lines) == 5
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec("\n".join(lines), found)
    ours = latents.read_group(str(tmp_path / "latents"), latents.read_manifest(str(tmp_path / "latents")).files[0], 0,
                              [4, 4, 4], flip=False)
    assert found["mean"].shape == found["std"].shape == (20, 4, 4, 4)
    assert np.array_equal(found["moments"][:16], ours["moments"])


@pytest.mark.slow
def test_the_tables_of_scale_are_what_its_model_prints():
    printed = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "scale_model.py")], capture_output=True, text=True,
                             check=True).stdout
    document = (ROOT / "docs" / "scale.md").read_text()
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    assert [row for row in rows if row not in document.splitlines()] == []
