"""`mdt-ray submit`: another command as a job of a Ray cluster, over Ray's job API (HTTP). No Ray is started here.

The cluster needs the dependencies alone; the package goes there with the working directory.
"""

import asyncio
import datetime
import logging
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import aiohttp
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobStatus, JobSubmissionClient

import mdt_ray
from mdt_ray import config_io
from mdt_ray.config import ClusterConfig, SubmitConfig
from mdt_ray.jobs import session

logger = logging.getLogger(__name__)

BAR = re.compile(r"^\w[\w -]*: +\d+%\|")
"""What tqdm draws (jobs/progress.py), a line each in the log of a job."""
ERROR = re.compile(r"^mdt-ray [\w -]+: error: ")
"""How a job's last words begin (cli.py)."""
HINT = "(--debug shows the traceback)"
OURS = ("python", "-m", "mdt_ray.cli")
"""What a submitted command begins with on the cluster, where there is no `mdt-ray`."""
SECRET_FILES = (".env", ".env.*", "storage.env", "*.pem", "*.key", "id_rsa*", "id_ed25519*", ".netrc", ".aws/", ".ssh/",
                ".ray/", "credentials*.json")
"""What never goes along, in the words of .gitignore."""
IGNORE_FILES, SKIPPED = (".rayignore", ".gitignore"), {".git", ".venv", "venv", "__pycache__"}
"""Where Ray looks for what is to stay; and what it leaves out anyway."""
UPLOAD_BYTES = 100e6
"""Of a folder without any of them, at most."""
PATIENCE_SECONDS = 120.0
"""For a dashboard that does not answer while a job is followed."""


class JobEnded(RuntimeError):
    """A submitted job did not end well, or goes on alone; `exit_code` is for who submitted it."""

    def __init__(self, text: str, exit_code: int):
        super().__init__(text)
        self.exit_code = exit_code


def submit(config: SubmitConfig) -> str:
    """Upload, start and follow `config.command`; returns what to print last.

    Raises JobEnded with the job's own exit code where that is not 0 (130 where Ctrl-C ended the following and not the job),
    ValueError for a name that the cluster has had and a folder that is not to be uploaded, RuntimeError for a cluster that
    does not answer or refuses.
    """
    folder = Path(config.working_dir).absolute()
    _refuse_upload(folder)
    client = _client(config.address)
    environment: dict = {"working_dir": str(folder), "excludes": list(SECRET_FILES), "env_vars": {
        "RAY_JOB_STOP_WAIT_TIME_S": str(config.stop_seconds), "PYTHONUNBUFFERED": "1"}}
    if not (folder / "mdt_ray" / "cli.py").is_file():
        package = Path(mdt_ray.__file__).parent
        environment["py_modules"] = [str(package), str(package.parent / "tune_spaces")]
    words = [word for word in config.command[:2] if re.fullmatch(r"[\w-]+", word) and not word.startswith("-")]
    name = config.name or f"{'-'.join(words)}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    _start(client, name, shlex.join([*OURS, *config.command]), environment)
    if config.detach:
        return f"job {name}\n{_handles(name, config.address)}"
    logger.info("job %s", name)
    return _follow(client, name, config.address)


def preview(config: SubmitConfig) -> str:
    """What `submit` would do. Raises ValueError for a folder that is not to be uploaded; asks no cluster."""
    _refuse_upload(Path(config.working_dir).absolute())
    return (f"mdt-ray submit would upload {config.working_dir} and run on the cluster:\n"
            f"  {shlex.join(['mdt-ray', *config.command])}")


def list_jobs(config: ClusterConfig) -> str:
    """The submitted jobs of a cluster, newest first, a line each: name, state, start, duration, command."""
    rows = [("job", "state", "started", "took", "command")]
    found = [job for job in _client(config.address).list_jobs() if job.submission_id]
    for job in sorted(found, key=lambda job: job.start_time or 0, reverse=True):
        state = job.status.value.lower()
        if job.driver_exit_code:
            state += f" ({job.driver_exit_code})"
        begin = (job.start_time or 0) / 1000
        seconds = int((job.end_time / 1000 if job.end_time else time.time()) - begin)
        rows.append((job.submission_id, state, f"{datetime.datetime.fromtimestamp(begin):%Y-%m-%d %H:%M}",
                     str(datetime.timedelta(seconds=seconds)), _typed(job.entrypoint)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
                     for row in rows)


def logs(config: ClusterConfig) -> str:
    """Follow a job as `submit` does, from its first line. Raises as `submit`, and ValueError for a job that is not there."""
    client = _client(config.address)
    _info(client, config.job)
    return _follow(client, config.job, config.address)


def stop(config: ClusterConfig) -> str:
    """Ask a job to stop, wait until it has, and say how it ended. Raises ValueError for a job that is not there."""
    client = _client(config.address)
    if _info(client, config.job).status.is_terminal():
        return f"job {config.job} had ended: {_state(client, config.job)}"
    client.stop_job(config.job)
    while not (info := client.get_job_info(config.job)).status.is_terminal():
        time.sleep(0.5)
    return (f"job {config.job}: {_state(client, config.job)}; submit the same command from the same folder to go on:\n"
            f"  {_typed(info.entrypoint, f'mdt-ray submit{_at(config.address)}')}")


def _refuse_upload(folder: Path) -> None:
    """Raise ValueError for a folder with all of a person's, and for a large one that says of nothing to stay."""
    remedy = "give the command in another folder, or name one with --working-dir"
    if folder.resolve() in (Path.home().resolve(), *Path.home().resolve().parents):
        raise ValueError(f"working_dir = {str(folder)!r}: your keys and all else would go to the cluster; {remedy}")
    num_bytes = 0
    for file in folder.rglob("*") if not any((folder / name).exists() for name in IGNORE_FILES) else ():
        if file.is_file() and not SKIPPED & set(file.relative_to(folder).parts):
            num_bytes += file.stat().st_size
        if num_bytes > UPLOAD_BYTES:
            raise ValueError(f"working_dir = {str(folder)!r}: more than {UPLOAD_BYTES / 1e6:.0f} MB would go to the cluster;"
                             f" name what is to stay in a .rayignore there, {remedy}")


def _start(client: JobSubmissionClient, name: str, entrypoint: str, environment: dict) -> None:
    """Upload and start. A cluster that has only just begun has no process for that yet."""
    end, told = time.monotonic() + PATIENCE_SECONDS, False
    while True:
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=environment, metadata={"name": name})
            return
        except RuntimeError as error:
            if f"{name} already exists" in str(error):
                raise ValueError(f"name = {name!r}: the cluster has had a job of that name; give another one, or follow it: "
                                 f"mdt-ray submit logs {name}") from error
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > end:
                raise RuntimeError(f"the cluster's head has no agent, which starts jobs, after {PATIENCE_SECONDS:.0f} s; "
                                   "look for dashboard_agent.log in session_latest/logs of Ray's folder there (/tmp/ray, if "
                                   "--temp-dir names no other); a port that another Ray on that machine has "
                                   "(--dashboard-agent-listen-port) is one cause") from error
            if not told:
                logger.info("waiting for the agent of the cluster's head, which starts jobs")
                told = True
        time.sleep(1)


def _client(address: str) -> JobSubmissionClient:
    # (They name every file that is not uploaded, and every connection.)
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    where = session.find_dashboard(address)
    try:
        return JobSubmissionClient()
    except AuthenticationError as error:
        said = "refuses the token that it was given" if "invalid" in str(error) else "asks for its token"
        raise RuntimeError(f"{where}: the cluster {said}; set RAY_AUTH_MODE=token, and have the token of its head in "
                           "RAY_AUTH_TOKEN, the file named by RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token, the first of "
                           "which counts") from error
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        raise RuntimeError(f"{where}: {str(error).strip().removesuffix('.')}; name the cluster's dashboard, as --address "
                           "http://127.0.0.1:8265 where that is forwarded from its head") from error


def _info(client: JobSubmissionClient, name: str):
    try:
        return client.get_job_info(name)
    except RuntimeError as error:
        raise ValueError(f"job = {name!r}: the cluster has no such job; `mdt-ray submit list` names them") from error


def _state(client: JobSubmissionClient, name: str) -> str:
    info = client.get_job_info(name)
    code = "" if info.driver_exit_code is None else f" with exit code {info.driver_exit_code}"
    return f"{info.status.value.lower()}{code}"


def _at(address: str) -> str:
    return f" --address {shlex.quote(address)}" if address else ""


def _typed(entrypoint: str, before: str = "mdt-ray") -> str:
    """A job's command as one types it, without secrets."""
    ours = shlex.join(OURS) + " "
    return config_io.redacted(f"{before} {entrypoint.removeprefix(ours)}" if entrypoint.startswith(ours) else entrypoint)


def _handles(name: str, address: str) -> str:
    return f"follow it: mdt-ray submit logs {name}{_at(address)}\nstop it: mdt-ray submit stop {name}{_at(address)}"


def _follow(client: JobSubmissionClient, name: str, address: str) -> str:
    screen = _Screen()
    try:
        _print_all(client, name, address, screen)
    except KeyboardInterrupt:
        raise JobEnded(f"job {name} goes on\n{_handles(name, address)}", 130) from None
    finally:
        screen.end()
    info = client.get_job_info(name)
    if info.status == JobStatus.SUCCEEDED:
        return f"job {name} succeeded"
    if info.status == JobStatus.STOPPED:
        raise JobEnded(f"job {name} was stopped; the same command goes on", 143)
    code = info.driver_exit_code or 1
    code = 128 - code if code < 0 else code  # of a process that no shell stood above
    how = f"was ended by {signal.Signals(code - 128).name}" if code - 128 in set(signal.Signals) else "failed"
    if code - 128 in (signal.SIGINT, signal.SIGTERM):  # of somebody else than Ray, which then says that it was stopped
        raise JobEnded(f"job {name} {how}; the same command goes on", code)
    raise JobEnded(f"job {name} {how}: {_last_error(client.get_job_logs(name)) or info.message}", code)


def _last_error(log: str) -> str:
    """What a job said last of what is wrong, which may take lines; or its last line."""
    lines = [line for line in log.splitlines() if line.strip() and not BAR.match(line) and line != HINT]
    begin = max((i for i, line in enumerate(lines) if ERROR.match(line)), default=len(lines) - 1)
    return "\n".join(ERROR.sub("", line) for line in lines[begin:]) if lines else ""


def _print_all(client: JobSubmissionClient, name: str, address: str, screen: "_Screen") -> None:
    """Print what the job printed and prints, until it has ended. A connection that breaks is made again."""
    lost_since = None
    while True:
        try:
            is_over = client.get_job_status(name).is_terminal()
            if not is_over:
                lost_since = None  # of a job that has ended, what is missing is its log
            asyncio.run(_tail(client, name, screen))
            if is_over or client.get_job_status(name).is_terminal():
                return
        except (OSError, RuntimeError, aiohttp.ClientError) as error:  # those of requests are OSErrors
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > PATIENCE_SECONDS:
                raise RuntimeError(f"the cluster has not answered for {PATIENCE_SECONDS:.0f} s ({error}); job {name} may go "
                                   f"on\n{_handles(name, address)}") from error
        time.sleep(1)


async def _tail(client: JobSubmissionClient, name: str, screen: "_Screen") -> None:
    seen = 0
    async for text in client.tail_job_logs(name):  # from its first line, also the second time
        screen.show(text[max(screen.shown - seen, 0):])
        seen += len(text)


class _Screen:
    """A job's log here: whole lines, and on a terminal its progress bar in one line."""

    def __init__(self):
        self.shown = 0
        self.rest = ""
        self.is_on_bar = False

    def show(self, text: str) -> None:
        self.shown += len(text)
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self._put(line)

    def end(self) -> None:
        if self.rest:
            self._put(self.rest)
        if self.is_on_bar:
            print(file=sys.stderr)
        self.rest, self.is_on_bar = "", False

    def _put(self, line: str) -> None:
        is_bar = bool(BAR.match(line)) and sys.stderr.isatty()
        if self.is_on_bar:
            print("\r\x1b[K" if is_bar else "", end="" if is_bar else "\n", file=sys.stderr)
        print(line, end="" if is_bar else "\n", file=sys.stderr, flush=True)
        self.is_on_bar = is_bar
