"""What the code must never do with what users and buckets give it, read from its syntax; and secrets, which are not written.
"""

import ast
import pickle
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdt_ray import checkpoints, cli, config_io, presets, storage, tables
from mdt_ray.config import TrainConfig
from mdt_ray.data import listings, sources
from tests.conftest import ROOT
from tests.data.pictures import write_folder

FILES = sorted(path for folder in ("mdt_ray", "pipelines", "tune_spaces", "scripts", "benchmarks")
               for path in (ROOT / folder).rglob("*.py"))
UNSAFE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"}
MAY_PICKLE = {"mdt_ray/jobs/fanout.py"}
"""Carries an error from one of our own actors to the driver, in memory."""
FORBIDDEN = re.compile(r"""
    (eval|exec|__import__|builtins\..*)$ | os\.(system|popen)$ | subprocess\.(getoutput|getstatusoutput)$ | .*\bread_pickle$
    | (np|numpy)\.fromfile$ | torch\.(jit|package)\. | torch\.hub\.load$ | (.*\.)?(cloudpickle|pickle)\b
    | (.*\.)?ExperimentAnalysis$ | (.*\.)?(Tuner|\w*Trainer|\w*[sS]earch\w*)\.(can_)?restore$ | .*\.restore_from_dir$
    | (.*\.)?tune\.run$ | .*\b(\w+_object_list|(all_)?gather_object)$
""", re.VERBOSE)
"""Calls, by their full name."""
LOAD = re.compile(r"(np|numpy|torch)(\.[\w.]+)?\.(load|read_array)$")


def full_names(tree: ast.AST) -> dict[str, str]:
    """What the names that a file imports stand for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names if node.module}
    return names


def problems(source: str) -> list[str]:
    """Why a file could run what it reads."""
    found, tree = [], ast.parse(source)
    names = full_names(tree)

    def full(node: ast.expr) -> str:
        first, dot, rest = ast.unparse(node).partition(".")
        return names.get(first, first) + dot + rest

    called = {id(part) for node in ast.walk(tree) if isinstance(node, ast.Call) for part in ast.walk(node.func)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in called:
            found += [f"hands on {name}" for name in [full(node)] if LOAD.match(name) or FORBIDDEN.match(name)]
        if isinstance(node, ast.Import):
            found += [f"imports {a.name}" for a in node.names if UNSAFE & set(a.name.split("."))]
        elif isinstance(node, ast.ImportFrom):
            found += [f"imports {a.name} from {node.module}" for a in node.names
                      if UNSAFE & {*(node.module or "").split("."), a.name}]
        elif isinstance(node, ast.Call):
            name, given = full(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            words = {a.value for a in node.args if isinstance(a, ast.Constant)}
            if FORBIDDEN.match(name):
                found.append(f"calls {name}")
            if name.endswith("import_module") and UNSAFE & words:
                found.append(f"imports {words}")
            loads = LOAD.match(name)
            if loads and loads[1] == "torch" and given.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            is_positional = loads and loads[1] != "torch" and (len(node.args) > 1 or None in given)  # or by **
            if is_positional or given.get("allow_pickle", "False") != "False":
                found.append(f"{name} with allow_pickle")
            if given.get("use_safetensors", "True") != "True":
                found.append(f"{name} without safetensors")
            if {"trust_remote_code", "custom_pipeline"} & given.keys():
                found.append(f"{name} with code from elsewhere")
            if given.get("shell", "False") != "False":
                found.append(f"{name} with a shell")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(path):
    allowed = {"imports pickle", "calls pickle.loads", "calls pickle.dumps"} \
        if str(path.relative_to(ROOT)) in MAY_PICKLE else set()
    assert set(problems(path.read_text())) <= allowed


@pytest.mark.parametrize("bad", [
    "import pickle", "from cloudpickle import loads", "import yaml", "torch.load(f)", "torch.load(f, weights_only=False)",
    "torch.load(f, weights_only=flag)", "np.load(f, allow_pickle=True)", "eval(text)", "os.system(text)",
    "subprocess.run(text, shell=True)", "Tuner.restore(path)", "from ray import cloudpickle", "import ray.cloudpickle as p",
    "ray.cloudpickle.loads(b)", "from torch import load\nload(f)", "torch.jit.load(f)", "torch.hub.load(f)",
    "np.load(f, None, True)", "subprocess.getoutput(text)", "importlib.import_module('pickle')",
    "ray.tune.ExperimentAnalysis(p)", "from pandas import read_pickle\nread_pickle(p)", "__import__('pickle')",
    "TorchTrainer.restore(p)", "import torch as t\nt.load(f)", "from torch.serialization import load\nload(f)",
    "torch.serialization.load(f)", "import pandas as p\np.read_pickle(f)", "from os import system\nsystem(text)",
    "from subprocess import getoutput as g\ng(t)", "AutoencoderKL.from_pretrained(f, use_safetensors=False)",
    "from ray.tune import Tuner as T\nT.restore(p)", "load(f, trust_remote_code=True)",
    "DiffusionPipeline.from_pretrained(f, custom_pipeline=name)", "map(torch.load, files)", "read = torch.load\nread(f)",
    "from numpy import load\nmap(load, files)", "np.load(f, **settings)", "np.lib.format.read_array(f, True)",
    "map(eval, texts)", "ray.tune.run(f, resume=True)", "optuna_search.restore(f)", "found.restore_from_dir(f)",
    "dist.broadcast_object_list(held)", "from torch.distributed import all_gather_object\nall_gather_object(a, b)"])
def test_the_search_finds_what_it_is_for(bad):
    assert problems(bad)


SECRETS = {
    "s3://key:secret@bucket/a": "s3://***@bucket/a",
    "s3://AKIA:wJalr/K7MDENG/secret@bucket/a": "s3://***@bucket/a",
    "s3://bucket/a?access_key=K&secret_key=S&region=r": "s3://bucket/a?***&***&region=r",
    "http://user:word@tracker:5000": "http://***@tracker:5000",
    "https://host/a?X-Amz-Signature=S&sig=S": "https://host/a?***&***",
    "https://host/a?X-Goog-Signature=S&b=1": "https://host/a?***&b=1",
    "https://host/a?AWSAccessKeyId=S&Signature=S&Expires=1": "https://host/a?***&***&Expires=1",
    "https://host/a?token=S": "https://host/a?***",
    "https://host/a?b=1&api_key=S&password=S": "https://host/a?b=1&***&***",
    "https://secret@host/a": "https://***@host/a",
    "https://host/a?auth=S&b=1&pass=S&db-pwd=S&session-token=S&access%5Fkey=S": "https://host/a?***&b=1&***&***&***&***",
    "gs://key:se/cret@bucket/a": "gs://***@bucket/a",
    "postgresql://user:se/cret@host/db": "postgresql://***@host/db",
}
NO_SECRETS = ["s3://bucket/a?endpoint_override=http://10.0.0.1:9000&region=r", "http://tracker:5000/a@b", "s3://bucket/a@2x",
              "hdfs://name:9000/a@b"]


@pytest.mark.parametrize("uri", NO_SECRETS)
def test_what_is_no_secret_is_taken(uri):
    config_io.refuse_secrets("output", uri)
    assert config_io.redacted(uri) == uri


@pytest.mark.parametrize(("uri", "shown"), SECRETS.items())
def test_a_uri_with_a_secret_is_refused_and_shown_without(uri, shown, tmp_path, capsys):
    assert config_io.redacted(f"reading {uri} now") == f"reading {shown} now"
    (tmp_path / "run.toml").write_text(f"output = '{uri}'\n")
    (tmp_path / "list.toml").write_text(f"output = ['{uri}']\n")
    for words in (["train", "digits", "--output", uri], ["train", "--config", f"{tmp_path}/run.toml"],
                  ["train", "--config", f"{tmp_path}/list.toml"], [uri],
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


def pickled(path: Path, column: str) -> Path:
    """A Parquet file with a column of Ray's type whose values are unpickled: making one of them creates `path`.ran."""
    class Payload:
        def __reduce__(self):
            return (Path.touch, (Path(f"{path}.ran"),))

    field = pa.field(column, pa.large_binary(), metadata={"ARROW:extension:name": "ray.data.arrow_pickled_object"})
    image = pa.array([{"bytes": b"x", "path": "a"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table([image, pa.array([pickle.dumps(Payload())], pa.large_binary())],
                     schema=pa.schema([("image", image.type), field]))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def test_columns_of_python_objects_are_bytes(tmp_path):
    import ray.data  # noqa: F401  (it registers the type)

    path = pickled(tmp_path / "source" / "x.parquet", "label")
    with pytest.raises(ValueError, match=r"x.parquet: .*column label is of type binary; it must be of numbers or of texts"):
        listings.list_images(sources.open_source(str(path.parent)))
    with pytest.raises(ValueError, match=r"column .* is of type"):
        listings.list_images(sources.open_source(str(write_folder(tmp_path / "p", [("a.png", b"")])), labels=str(path)))
    for read in (checkpoints.read_metrics, tables.read, listings.read_parts):
        with pytest.raises(ValueError, match=r"column .* is of type"):
            read(str(path))
    assert not Path(f"{path}.ran").exists()
    pq.read_table(path).to_pylist()  # as it would be without that
    assert Path(f"{path}.ran").exists()


def test_a_table_that_unpacks_to_much_is_not_read(tmp_path):
    path = tmp_path / "rejected.parquet"
    pq.write_table(pa.table({"id": ["a" * 2**16] * 2000, "reason": [""] * 2000}), path, compression="zstd")
    assert path.stat().st_size < 4096
    with pytest.raises(ValueError, match=r"rejected.parquet: unpacks to more than 100 times its size"):
        tables.read(str(path))
    table = pa.table({"id": [f"image-{i}" for i in range(10_000)], "reason": ["broken"] * 10_000})
    tables.write(str(path), table)
    assert tables.read(str(path)) == table
    tables.write(str(path), table[:0])
    assert tables.read(str(path)) == table[:0]


def plan(uri: str, names: list[str]) -> None:
    count = len(names)
    rows = pa.table([[f"{i}" for i in range(count)], [0] * count, names, [0] * count, [0] * count], schema=listings.LISTING)
    listings.write_parts(uri, listings.Listing(rows, ["a"]), [range(count)])


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "a/../../b.png", ".."])
def test_a_plan_names_files_of_its_source_only(tmp_path, name):
    uri = str(tmp_path / "plan.parquet")
    plan(uri, ["a/..b/c...png", "b.png"])
    assert listings.read_parts(uri)[0].num_rows == 2
    plan(uri, ["a.png", name])
    with pytest.raises(ValueError, match=r"plan.parquet: damaged \(names files outside the source\)"):
        listings.read_parts(uri, [0])


def test_a_plan_that_unpacks_to_much_is_not_read(tmp_path):
    uri = str(tmp_path / "plan.parquet")
    plan(uri, ["a" * 2**16] * 2000)
    assert (tmp_path / "plan.parquet").stat().st_size < 8192
    with pytest.raises(ValueError, match=r"plan.parquet: damaged \(unpacks to more than 100 times its size: not read\)"):
        listings.read_parts(uri, [0])
