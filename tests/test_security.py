"""What the code must never do with what users and buckets give it, read from its syntax; and secrets, which are not written.
"""

import ast
import re

import pytest

from mdt_ray import cli, config_io, presets, storage
from mdt_ray.config import TrainConfig
from tests.conftest import ROOT

FILES = sorted(path for folder in ("mdt_ray", "pipelines", "tune_spaces", "scripts", "benchmarks")
               for path in (ROOT / folder).rglob("*.py"))
UNSAFE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"}
MAY_PICKLE = {"mdt_ray/jobs/fanout.py"}
"""Carries an error from one of our own actors to the driver, in memory."""
FORBIDDEN = {"eval", "exec", "os.system", "os.popen", "pandas.read_pickle", "pd.read_pickle", "np.fromfile"}


def problems(source: str) -> list[str]:
    """Why a file could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"imports {a.name}" for a in node.names if a.name.split(".")[0] in UNSAFE]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE:
            found.append(f"imports from {node.module}")
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in FORBIDDEN:
                found.append(f"calls {name}")
            if name == "torch.load" and given.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if given.get("allow_pickle", "False") != "False":
                found.append(f"{name} with allow_pickle")
            if given.get("shell", "False") != "False":
                found.append(f"{name} with a shell")
            if re.search(r"(Tuner|Trainer)\.(can_)?restore$", name):
                found.append(f"{name}: Ray's snapshots are pickles")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(path):
    allowed = {"imports pickle"} if str(path.relative_to(ROOT)) in MAY_PICKLE else set()
    assert set(problems(path.read_text())) <= allowed


@pytest.mark.parametrize("bad", [
    "import pickle", "from cloudpickle import loads", "import yaml", "torch.load(f)", "torch.load(f, weights_only=False)",
    "torch.load(f, weights_only=flag)", "np.load(f, allow_pickle=True)", "eval(text)", "os.system(text)",
    "subprocess.run(text, shell=True)", "Tuner.restore(path)"])
def test_the_search_finds_what_it_is_for(bad):
    assert problems(bad)


SECRETS = {
    "s3://key:secret@bucket/a": "s3://***@bucket/a",
    "s3://bucket/a?access_key=K&secret_key=S&region=r": "s3://bucket/a?***&***&region=r",
    "http://user:word@tracker:5000": "http://***@tracker:5000",
}


@pytest.mark.parametrize(("uri", "shown"), SECRETS.items())
def test_a_uri_with_a_secret_is_refused_and_shown_without(uri, shown, tmp_path, capsys):
    assert config_io.redacted(f"reading {uri} now") == f"reading {shown} now"
    (tmp_path / "run.toml").write_text(f"output = '{uri}'\n")
    for words in (["train", "digits", "--output", uri], ["train", "--config", f"{tmp_path}/run.toml"],
                  ["submit", "train", "--output", uri], ["train", "digits", f"--output={uri}"]):
        assert cli.main(words) == 2
        captured = capsys.readouterr()
        assert shown in captured.err
        assert not any(part in captured.err for part in ("secret@", "word@", "=S"))
    for call in (storage.resolve, storage.exists, storage.read_bytes):
        with pytest.raises(ValueError, match="holds a secret") as caught:
            call(uri)
        assert uri not in str(caught.value)
    with pytest.raises(ValueError, match=r"output = .*holds a secret"):
        config_io.from_dict(TrainConfig, {"output": uri})


@pytest.mark.parametrize("uri", ["s3://bucket/a@b:c?endpoint_override=http://127.0.0.1:9000&region=us", "hdfs://me@host:8020/x",
                                 "a:b@c", "sqlite:///mlflow.db", "https://host/x?y=1:2@3", "/data/a:b@c"])
def test_a_uri_without_one_is_not(uri):
    config_io.refuse_secrets("output", uri)
    assert config_io.redacted(uri) == uri


def test_presets_and_settings_hold_none():
    for name in ("digits", "fashion", "imagenet256-s-2"):
        for key, value in config_io.flatten(config_io.to_dict(presets.preset(name))).items():
            config_io.refuse_secrets(key, str(value))
