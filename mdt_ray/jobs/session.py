"""Connecting to Ray: a running cluster where there is one, else a small local one. The only reader of the environment."""

import atexit
import contextlib
import logging
import os
import secrets
import signal
import tempfile
from pathlib import Path

import ray
from ray._private.worker import get_dashboard_url

from mdt_ray import config_io, scratch
from mdt_ray.config import WorkersConfig
from mdt_ray.interrupts import Wish, stop_signals
from mdt_ray.jobs import nodes

logger = logging.getLogger(__name__)

DASHBOARD = "RAY_API_SERVER_ADDRESS"
"""Variable that says where a cluster's dashboard is."""
WAITING_CPUS = 2
"""Logical CPUs of a local session beyond the machine's, for processes that mostly wait (drivers, readers)."""

LONGEST_FOLDER = 31
"""Characters of Ray's folder: its sockets' paths, up to 76 longer, have 107 at most."""

QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # a worker's print would appear twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the default of 2 s delays every start and restart
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the driver looks for itself (jobs/nodes.py)
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # the jobs draw their own
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own table of settings and trials
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's rows before its end have no metrics
}


def start(dashboard: bool = False) -> None:
    """Connect once: to RAY_ADDRESS (set inside `ray job submit`), else to a local cluster that ends with this process.

    dashboard: a local cluster needs its processes, which take a percent or two of a small machine, for Tune alone: they
    free the placement groups of trials that were stopped. One that runs without is started again.
    """
    if ray.is_initialized():
        if not dashboard or os.environ.get("RAY_ADDRESS") or get_dashboard_url():
            return
        ray.shutdown()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    logger.info("%s", f"joining the Ray at {address}" if address else "starting Ray on this machine")
    if address:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        keep_token()
        folder = ray_folder()
        try:
            ray.init(address="local", num_cpus=(os.cpu_count() or 1) + WAITING_CPUS, include_dashboard=dashboard,
                     object_store_memory=512 * 1024**2, log_to_driver=False, logging_level=logging.ERROR, _temp_dir=folder)
        except Exception as error:  # Ray raises Exception itself
            raise RuntimeError(f"Ray did not start: {str(error).strip()}; where the machine is busy, run the same command "
                               f"again later. Its logs are in session_latest/logs of its folder, {folder}") from error
        atexit.register(ray.shutdown)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # it counts finished chunks only, and one may take an hour
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.WARNING)


def ray_folder() -> str:
    """Where a local Ray keeps sockets, logs, and code that workers run: below RAY_TMPDIR, else where only this user may
    write. (Ray makes its own, /tmp/ray, for all to write to.)"""
    if given := os.environ.get("RAY_TMPDIR"):
        return os.path.join(os.path.abspath(given), "ray")
    folder = os.path.join(scratch.private_folder(), "ray")
    return folder if len(folder) <= LONGEST_FOLDER else os.path.join(scratch.private_folder("/tmp"), "ray")


def keep_token() -> None:
    """See that the token of this user's Rays is there and nobody else's to read: Ray would make a file that all may read."""
    if os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} or os.environ.get("RAY_AUTH_MODE") == "disabled":
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if not path.exists():
        number, made = tempfile.mkstemp(dir=path.parent)  # mode 0600
        with os.fdopen(number, "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # another's process was faster
            os.link(made, path)
        os.unlink(made)
    with contextlib.suppress(OSError):  # mounted, or another's
        path.chmod(0o600)


def start_heeding(dashboard: bool = False) -> Wish:
    """`start`, with signals that come meanwhile noted in what is returned."""
    with stop_signals() as wish:
        try:
            start(dashboard)
        except SystemExit:  # from Ray's own handler of SIGTERM, which is there from the middle of its start on
            wish.signum = signal.SIGTERM
        except Exception:  # a terminal's Ctrl-C also ends the processes that Ray was starting
            if wish.signum is None:
                raise
    return wish


def find_dashboard(address: str) -> str:
    """Let Ray's clients speak to `address`, where one is given: they would take the environment's first. Returns what names
    theirs, for an error. Raises ValueError for one with a secret."""
    if address:
        os.environ[DASHBOARD] = address
        return f"address = {address!r}"
    for name in (DASHBOARD, "RAY_ADDRESS"):
        if found := os.environ.get(name):
            config_io.refuse_secrets(name, found)
            return f"{name} = {found!r}"
    return "address: not given"


def require_spare_cpu(workers: WorkersConfig) -> None:
    """Raise ValueError where the workers take every CPU of this machine's Ray and leave none to the tasks that feed them;
    a cluster may grow, so there it is a warning."""
    have = ray.cluster_resources().get("CPU", 0)
    taken = 0 if workers.gpus_per_worker else workers.num_workers * workers.cpus_per_worker
    if taken + 1 > have:
        _refuse(f"workers.num_workers = {workers.num_workers}: with {workers.cpus_per_worker:g} CPUs each they take all of "
                f"the {have:g} that Ray has, and reading and decoding needs at least one", "use fewer")


def room(workers: WorkersConfig) -> int:
    """How many workers this Ray holds at the same time where nothing else runs; of a local session's CPUs those that the
    machine has."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not os.environ.get("RAY_ADDRESS"):
        found = [have | {"CPU": max(have.get("CPU", 0) - WAITING_CPUS, 0)} for have in found]
    return sum(nodes.num_fitting(have, workers) for have in found)


def require_room(workers: WorkersConfig) -> None:
    """Raise ValueError where this machine's Ray cannot hold the workers, a warning on a cluster. What others take of it now
    does not count: that may become free."""
    room = sum(nodes.num_fitting(node["Resources"], workers) for node in ray.nodes() if node["Alive"])
    if workers.num_workers > room:
        have = ray.cluster_resources()
        _refuse(f"workers.num_workers = {workers.num_workers}: with {workers.cpus_per_worker:g} CPUs and "
                f"{workers.gpus_per_worker:g} GPUs each, Ray has room for {room} (it has {have.get('CPU', 0):g} CPUs and "
                f"{have.get('GPU', 0):g} GPUs)", "use fewer or smaller ones")


def _refuse(text: str, remedy: str) -> None:
    if os.environ.get("RAY_ADDRESS"):
        logger.warning("%s; waiting for more nodes", text)
    else:
        raise ValueError(f"{text}; {remedy}")


def settle(workers: WorkersConfig, deterministic: bool = False) -> str:
    """In a worker process: as many torch threads as it reserved CPUs; returns the device to work on."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS adds up in any order, and torch refuses
    import torch  # here, because the preflight's tasks load this module and have no second to spare for it

    torch.set_num_threads(max(1, int(workers.cpus_per_worker)))
    return "cuda" if workers.gpus_per_worker else "cpu"


def full_float32() -> None:
    """In a worker process: fp32 means fp32. cuDNN's convolutions would take TF32 by default."""
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def environment() -> dict[str, str]:
    """Environment for a process of ours that should use this session's cluster."""
    return os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
