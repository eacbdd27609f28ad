"""A look at every node before training starts: it reads the latents, writes the output and holds the same software.

Not a watch: what joins or breaks later is not seen here, and shows as a failed worker.
"""

import contextlib
import logging
import time
import uuid
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import NodeDiedError, RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mdt_ray import run_folder, storage, tables
from mdt_ray.config import TrainConfig, WorkersConfig
from mdt_ray.data import latents
from mdt_ray.data.latents import LatentFile, Manifest
from mdt_ray.jobs import nodes, session

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 120.0
"""For all nodes together; a check takes about a second, most of it Ray starting a process."""

REMEDIES = {
    "silent": "look at that node's storage (a mount that hangs?) or take the node out of the cluster",
    "broken": "install there what the driver has (one image for all nodes is the safest)",
    "gpus": "mend the driver or install a torch built for CUDA there, or start that node's Ray with the GPUs it has",
    "latents": "put the latents on storage that every node mounts at this path, or on an object store; check credentials "
               "there",
    "damaged": f"{latents.REBUILD}, or copy it anew where the node has a copy of its own",
    "output": "put the output on storage that every node may write to, a shared mount or an object store; check room and "
              "credentials there",
    "shared": "put the output on storage that every node mounts at this path, or on an object store",
    "versions": "install the driver's versions there (one image for all nodes is the safest)",
}
"""By kind of failure, worst first."""

TOKEN = "driver"
SEE_ALL_GPUS = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
"""A task that reserves no GPU sees all of the node's, also where the node was set up to hide them."""


def check_nodes(config: TrainConfig, manifest: Manifest) -> None:
    """Let every living node that could hold a worker show that it can do its part, all at the same time.

    Args: a config with absolute paths and its latents' manifest, as `train.prepare` returns them.
    Raises ValueError with a line per node and failure, worst first, each with its remedy; OSError where the driver itself
    cannot write the output. A node that dies meanwhile is left out with a warning.
    """
    session.require_room(config.workers)
    began, asked = time.monotonic(), worker_nodes(config.workers)
    folder = storage.join(config.output, f"preflight{storage.TEMPORARY}{uuid.uuid4().hex}")
    with _token(folder, asked) as token:
        failures = _ask(asked, (config.latents, manifest.files[0], manifest.content, folder, token,
                                config.workers.gpus_per_worker > 0))
    if failures:
        order = list(REMEDIES)
        failures.sort(key=lambda failure: (order.index(failure[0]), failure[1]))
        lines = [f"{node}: {text}; {REMEDIES[kind]}" for kind, node, text in failures]
        raise ValueError(f"{len({node for _, node, _ in failures})} of {len(asked)} nodes cannot train:\n  " +
                         "\n  ".join(lines))
    logger.info("preflight: %d node(s) can read %s and write %s (%.1f s)", len(asked), config.latents, config.output,
                time.monotonic() - began)


def worker_nodes(workers: WorkersConfig) -> list[dict[str, Any]]:
    """Ray's entries of the living nodes that stay and could hold at least one worker, were they empty."""
    going = nodes.draining()
    return [node for node in ray.nodes()
            if node["Alive"] and node["NodeID"] not in going and nodes.num_fitting(node["Resources"], workers)]


def name_of(node: dict[str, Any]) -> str:
    return f"node {node['NodeManagerAddress']} (id {node['NodeID'][:12]})"


@contextlib.contextmanager
def _token(folder: str, asked: list[dict[str, Any]]) -> Iterator[str]:
    """A secret that the driver leaves in a local output for nodes other than its own to find: with a disk of its own, each
    node would write happily, and nobody would find its checkpoints. Empty where there is nothing to tell apart."""
    here = ray.get_runtime_context().get_node_id()
    token = uuid.uuid4().hex if storage.is_local(folder) and any(node["NodeID"] != here for node in asked) else ""
    try:
        if token:
            storage.write_bytes(storage.join(folder, TOKEN), token.encode())
        yield token
    finally:
        with contextlib.suppress(OSError):  # of a store that does not answer, which the nodes have said already
            storage.remove(folder)


def _ask(asked: list[dict[str, Any]], arguments: tuple) -> list[tuple[str, str, str]]:
    """Run `examine` on each node; returns (kind, node, what is wrong) of each failure."""
    options = {"runtime_env": SEE_ALL_GPUS} if arguments[-1] else {}
    tasks = {examine.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
                             **options).remote(*arguments): node for node in asked}
    silent = set(ray.wait(list(tasks), num_returns=len(tasks), timeout=TIMEOUT_SECONDS)[1]) if tasks else set()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    here, failures = run_folder.versions(), []
    for task, node in tasks.items():
        found: list[tuple[str, str]] = []
        try:
            if task in silent:
                ray.cancel(task, force=True)
                found = [("silent", f"no answer within {TIMEOUT_SECONDS:g} s")]
            else:
                found = _judge(ray.get(task), here, node["Resources"].get("GPU", 0))
        except (NodeDiedError, TaskUnschedulableError):
            alive.discard(node["NodeID"])
        except RayError as error:
            found = [("broken", f"the check does not run there ({_reason(getattr(error, 'cause', None) or error)})")]
        if node["NodeID"] in alive:
            failures += [(kind, name_of(node), text) for kind, text in found]
        else:
            logger.warning("preflight: %s was lost meanwhile and is left out", name_of(node))
    return failures


def _judge(answer: dict[str, Any], here: dict[str, str], num_gpus: float) -> list[tuple[str, str]]:
    """(kind, what is wrong) of each failure in a node's answer, by the driver's versions and the GPUs that Ray counts."""
    failures = list(answer["failures"])
    seen = answer.get("gpus")
    if seen and seen["count"] < num_gpus:
        failures.append(("gpus", f"Ray counts {num_gpus:g} GPUs there, torch {seen['torch']} (built for CUDA: "
                                 f"{seen['cuda'] or 'no'}) sees {seen['count']}"))
    if different := compare_versions(here, answer["versions"]):
        failures.append(("versions", f"versions differ from the driver's: {', '.join(different)}"))
    return failures


def compare_versions(here: dict[str, str], there: dict[str, str]) -> list[str]:
    """Differences that matter, as text, of two results of `run_folder.versions`.

    The machine may differ, Python's patch release too, and the build of a package (2.9.0+cpu on a head without GPUs).
    git counts where both know it.
    """
    def what_matters(name: str, version: str | None) -> str | None:
        if version is None:
            return None
        return ".".join(version.split(".")[:2]) if name == "python" else version.partition("+")[0]

    names = [name for name in here | there if name != "machine" and (name != "git" or {name} <= here.keys() & there.keys())]
    return [f"{name} {there.get(name, 'missing')} (driver: {here.get(name, 'missing')})" for name in names
            if what_matters(name, here.get(name)) != what_matters(name, there.get(name))]


@ray.remote(num_cpus=0)
def examine(latents_folder: str, file: LatentFile, content: str, folder: str, token: str, gpus: bool) -> dict[str, Any]:
    """What one node finds, in a task there. Imports torch only where GPUs are asked for: that takes longer than all else."""
    answer = {"failures": _try_latents(latents_folder, file, content) + _try_output(folder, token),
              "versions": run_folder.versions()}
    if gpus:
        import torch

        answer["gpus"] = {"count": torch.cuda.device_count() if torch.cuda.is_available() else 0,
                          "torch": torch.__version__, "cuda": torch.version.cuda}
    return answer


def _try_latents(folder: str, file: LatentFile, content: str) -> list[tuple[str, str]]:
    """Read both ends of a file, and the manifest: copies on the nodes' own disks will do if they are the same latents."""
    uri = storage.join(folder, file.name)
    try:
        fs, path = storage.resolve(uri)
        with storage.patiently(fs, lambda: fs.open_input_file(path)) as handle:
            damage = latents.damage_of(file, {file.name: handle.size()})
            if not damage:
                handle.read(4)
                try:
                    tables.open_handle(handle)
                except ValueError as error:
                    damage = _reason(error)
        if damage:
            return [("damaged", f"{uri}: {damage}")]
        if latents.read_manifest(folder).content != content:
            return [("latents", f"{folder} holds other latents than the driver's")]
    except (OSError, ValueError) as error:
        return [("latents", f"cannot read {uri}: {_reason(error)}")]
    return []


def _try_output(folder: str, token: str) -> list[tuple[str, str]]:
    """Find the driver's token, then write, read back and remove a file. In this order: no folder is made on a disk that is
    the node's own."""
    output = storage.parent(folder)
    try:
        if token and not _holds(storage.join(folder, TOKEN), token):
            return [("shared", f"{output} is another folder there than on the driver, whose file is not found")]
        uri = storage.join(folder, uuid.uuid4().hex)
        storage.write_bytes(uri, uri.encode())
        wrong = "" if storage.read_bytes(uri) == uri.encode() else "another content is read back"
        storage.remove(uri)
    except (OSError, ValueError) as error:
        wrong = _reason(error.__cause__ or error)  # the cause, for storage's own text has a remedy for another case
    return [("output", f"cannot write below {output}: {wrong}")] if wrong else []


def _holds(uri: str, token: str) -> bool:
    try:
        return storage.read_bytes(uri) == token.encode()
    except FileNotFoundError:
        return False


def _reason(error: BaseException) -> str:
    """Its last line of text: of Ray's own errors the rest is a stack."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()}"
