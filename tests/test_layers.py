"""The rules of the house: who imports whom, and that nothing happens at import."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "mdt_ray"
BASE = {"autocast", "config", "config_io", "presets", "processes", "scratch", "storage", "thrift", "parquet_index",
        "parquet_pages", "tables", "run_folder", "checkpoints", "interrupts"}
MAY_IMPORT = {
    **dict.fromkeys(BASE, BASE),
    "models": BASE | {"models"},
    "diffusion": BASE | {"diffusion"},
    "data": BASE | {"data"},
    "training": BASE | {"models", "diffusion", "data", "inference", "training"},
    "inference": BASE | {"models", "diffusion", "data", "inference"},
    "evaluation": BASE | {"models", "diffusion", "data", "inference", "evaluation"},
    "report": BASE | {"models", "diffusion", "data", "training", "inference", "evaluation", "tuning", "report"},
    "tuning": BASE | {"evaluation", "tuning"},
    "jobs": BASE | {"models", "diffusion", "data", "training", "inference", "evaluation", "report", "tuning", "jobs"},
    "cli": BASE,
    "__init__": set(),
}


def imports(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        if name.startswith("mdt_ray."):
            part = name.split(".")[1]
            if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file():
                assert part in MAY_IMPORT[layer], f"{path} imports {name}"
        if name.split(".")[0] == "ray":
            assert layer == "jobs", f"{path} imports {name}: only mdt_ray/jobs/ imports Ray"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_say_what_they_are(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_only_the_session_reads_the_environment():
    readers = [p for p in FILES if "os.environ" in p.read_text() or "getenv" in p.read_text()]
    assert [p.name for p in readers] == ["session.py"]


def test_pipelines_are_thin():
    for path in (ROOT / "pipelines").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 50


@pytest.mark.parametrize("arguments", [
    ["--help"], ["train", "--help"], ["quickstart", "--help"], ["evaluate", "digits", "--dry-run"]])
def test_help_imports_no_heavy_library(arguments, tmp_path):
    code = ("import sys\nfrom mdt_ray.cli import main\n"
            f"try:\n    code = main({arguments!r})\nexcept SystemExit as stop:\n    code = stop.code\n"
            "heavy = {'torch', 'ray', 'diffusers', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
            "sys.exit(f'imports {heavy}' if heavy or code else 0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("job", "left_out"), [
    ("train", {"diffusers", "scipy.stats", "matplotlib"}), ("precompute", {"diffusers", "scipy.stats", "matplotlib"}),
    ("evaluate", {"diffusers", "scipy.stats", "matplotlib"}), ("trial", {"diffusers", "scipy.stats", "matplotlib"}),
    ("decode", {"torch", "diffusers", "scipy", "matplotlib", "ray.data"})])
def test_processes_of_a_job_load_what_they_need(job, left_out):
    """Each of them imports its job's module, on a laptop all at once."""
    code = f"import sys\nimport mdt_ray.jobs.{job}\nsys.exit(str({left_out!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "set()\n"
