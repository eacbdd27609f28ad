"""One fault in each run of a job, at a random moment, over three hosts and a store: what is left equals that of an
undisturbed run.

    python -m tests.chaos.chaos [--runs 25] [--jobs precompute train tune evaluate] [--first 0] [--logs runs/chaos]

The kind of fault, and after which share of the run it comes, follow from the number of the run alone. Where the fault ended
the job, the same command is given again, as a person would. Prints a line a run, and as the last one JSON with the figures.
"""

import argparse
import contextlib
import json
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from mdt_ray import storage
from mdt_ray.data.sources import DIGITS
from mdt_ray.training.meters import MACHINE_COLUMNS
from tests.chaos.rig import Rig

OUTAGE_SECONDS = 10.0
"""Of the store, and of a host's network."""
REBOOT_SECONDS = 5.0
"""Until a lost host is there again."""
RUN_SECONDS = 400.0
"""For a command to end, or what it started to be gone."""
ATTEMPTS = 3
"""Commands, the first one included, until a job must be done."""
TITLE_SECONDS = 3.0
"""In which the process that is to be killed must show itself: some live for milliseconds only."""
NUM_STEPS = 25
"""Of a training."""
WORKERS = {"precompute": ("ray::MapWorker", "ray::decode_piece", "ray::read_chunk"),
           "train": ("ray::RayTrainWorker", "ray::TrainController"), "tune": ("ray::ImplicitFunc",),
           "evaluate": ("ray::MapWorker",)}
"""Titles of the processes that do a job's work: encoders, decoders, readers; ranks and what watches them; drivers of trials;
samplers, decoders and feature networks."""
RAYS_OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_StatsActor", "ray::ActorLocationTracker",
            "ray::_AutoscalingCoordinatorActor")
"""Processes that Ray keeps for the next job."""
FAULTS = ("driver", "worker", "node", "store", "network")


@dataclass(frozen=True)
class Outcome:
    """A run with a fault."""

    job: str
    number: int
    fault: str
    """Its kind, and what it struck."""
    moment: float
    """Seconds after the start."""
    commands: int
    """Given in all."""
    recovery: float | None
    """Seconds from the fault to the next thing that the job wrote; None where nothing was missing any more."""
    lost: float
    """Seconds that it took longer than the undisturbed run."""
    wrong: list[str]
    """In what it differs, or what is left over."""


class Chaos:
    """A rig with the undisturbed runs of the jobs on it. What jobs print goes to a file each in `logs`."""

    def __init__(self, rig: Rig, logs: Path):
        self.rig, self.logs = rig, logs
        self.seconds: dict[str, float] = {}
        self.expected: dict[str, dict[str, Any]] = {}
        rig.store.put("source/digits.parquet", (DIGITS / "digits.parquet").read_bytes())

    def uri(self, path: str) -> str:
        return self.rig.store.uri(path)

    def command(self, job: str, output: str) -> list[str]:
        """A small run of a job on the digits, which are in the store, and so is the output."""
        latents, trained = self.uri("straight/precompute"), self.uri("straight/train")
        words = {
            "precompute": ["--source", self.uri("source"), "--chunk-size", "60", "--encode-batch-size", "20",
                           "--workers.num-workers", "2"],
            "train": ["--latents", latents, "--num-steps", str(NUM_STEPS), "--checkpoint-every-steps", "5",
                      "--log-every-steps", "1", "--precision", "fp32", "--workers.num-workers", "2",
                      "--workers.cpus-per-worker", "1.5"],  # no two fit on one host
            "tune": ["--train.latents", latents, "--train.num-steps", "15", "--train.checkpoint-every-steps", "5",
                     "--evaluate.num-samples", "50", "--max-trials", "2"],
            "evaluate": ["--checkpoint", trained, "--num-samples", "240", "--chunk-size", "40", "--workers.num-workers",
                         "2"],
        }[job]
        return [job, "digits", "--output", self.uri(output), *words]

    def straight(self, job: str) -> None:
        """The undisturbed run, once. Raises AssertionError where even that fails."""
        started = time.monotonic()
        code, text = self.finish(job, self.rig.submit(*self.command(job, f"straight/{job}")))
        assert code == 0, text
        self.seconds[job] = time.monotonic() - started
        self.expected[job] = essence(job, self.rig.store.objects(f"straight/{job}"), NUM_STEPS)
        assert self.expected[job]

    def run(self, job: str, number: int) -> Outcome:
        """Run `number` of a job, with its fault."""
        draw = random.Random(f"{job} {number}")
        faults = FAULTS if self.rig.is_network else FAULTS[:-1]  # without cables none can be pulled
        fault = faults[(number + list(WORKERS).index(job)) % len(faults)]
        share = draw.uniform(0.15, 0.92)
        for attempt in range(ATTEMPTS):
            output = f"chaos/{job}-{number}-{attempt}"
            moment = share * self.seconds[job]
            started = time.monotonic()
            process, commands = self.rig.submit(*self.command(job, output)), 1
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            title = WORKERS[job][number // len(faults) % len(WORKERS[job])]
            struck = self._strike(job, fault, title, draw, process)
            if struck is not None:
                break
            code, text = self.finish(f"{job}-{number}", process)
            assert code == 0, text
            assert not self.differences(job, output)
            self.seconds[job] = time.monotonic() - started  # over before, so it was an undisturbed run
            share *= 0.9
        else:
            raise AssertionError(f"{job} {number}: always ended before anything could be done to it")
        victim, heal = struck
        wrong: list[str] = []
        with self._progress(output) as recovery:
            heal()
            code, text = self.finish(f"{job}-{number}", process)
            while code != 0 and commands < ATTEMPTS:
                print(f"  {time.monotonic() - started:.0f} s: exit code {code}: {_last_line(text)}", flush=True)
                wrong += self.broken(job, output)  # before it can be mended
                commands += 1
                code, text = self.finish(f"{job}-{number}", self.rig.submit(*self.command(job, output)))
        lost = time.monotonic() - started - self.seconds[job]
        wrong += [f"exit code {code}: {text[-500:]}"] if code else self.differences(job, output)
        if commands > 1 and fault != "driver":
            wrong.append(f"{commands} commands")
        return Outcome(job, number, victim, moment, commands, recovery[0] if recovery else None, lost,
                       wrong + self.broken(job, output) + self.left_over(output))

    def _strike(self, job: str, fault: str, title: str, draw: random.Random,
                process: subprocess.Popen) -> tuple[str, Callable[[], None]] | None:
        """Do it; returns what was struck, and what heals it, to be called some time later. None where the job ended before.

        Args:
            title: of the process to kill, if there is one soon; else another one of the job's work.
        """
        rig, started = self.rig, time.monotonic()
        while process.poll() is None and fault in ("driver", "worker"):
            titles = [f"mdt_ray.cli {job}"] if fault == "driver" else [title]
            if fault == "worker" and time.monotonic() > started + TITLE_SECONDS:
                titles = WORKERS[job]
            if found := rig.find(*titles):
                with contextlib.suppress(psutil.Error):
                    victim = draw.choice(found)
                    name = " ".join(victim.cmdline()).strip()
                    if any(part in name for part in titles):  # still at it
                        victim.kill()
                        return fault if fault == "driver" else name, lambda: None
            time.sleep(0.05)
        if process.poll() is not None:
            return None
        if fault == "store":
            name, outage = draw.choice([("hung", rig.store_hung), ("cut", rig.store.cut)])
            return f"store {name}", _over(outage())
        host = draw.choice(rig.hosts[1:])
        if fault == "network":
            return f"network of {host.name}", _over(host.unplugged())
        host.kill()
        return f"node {host.name}", _after(REBOOT_SECONDS, lambda: rig.start(host))

    @contextlib.contextmanager
    def _progress(self, output: str) -> Iterator[list[float]]:
        """Seconds from here until the job has written something again, once it has."""
        began, over, found = time.monotonic(), threading.Event(), []
        held: set[str] | None = None

        def watch() -> None:
            nonlocal held
            while not over.wait(0.5) and not found:
                with contextlib.suppress(OSError):
                    names = set(self.rig.store.times(output)) - {"lock.json", "run.json"}
                    held = names if held is None else held
                    if names - held:
                        found.append(time.monotonic() - began)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield found
        finally:
            over.set()
            thread.join()

    def finish(self, name: str, process: subprocess.Popen) -> tuple[int, str]:
        """Its exit code (124 where it took too long) and what it printed."""
        code = 124
        try:
            text, _ = process.communicate(timeout=RUN_SECONDS)
            code = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
        with (self.logs / f"{name}.log").open("a") as log:
            log.write(text)
        return code, text

    def differences(self, job: str, output: str) -> list[str]:
        """In what the artefacts are not those of the undisturbed run."""
        ours, theirs = essence(job, self.rig.store.objects(output), NUM_STEPS), self.expected[job]
        return [f"{name} differs" for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]

    def broken(self, job: str, output: str) -> list[str]:
        """What is only half there under a final name, at any time. (What is just being replaced, or deleted, may look so
        once: workers of a killed driver may still be about.)"""
        seen = []
        for _ in range(2):
            objects = self.rig.store.objects(output)
            seen.append({name for name in objects if not self._is_sound(job, name, objects)})
            time.sleep(1)
        return [f"{name} is broken" for name in sorted(seen[0] & seen[1])]

    def _is_sound(self, job: str, name: str, objects: dict[str, bytes]) -> bool:
        expected = self.expected[job].get(name)
        if isinstance(expected, bytes):
            return objects[name] == expected
        if name.endswith("/checksums.json"):
            return _is_whole(name, objects)
        try:
            if name.endswith(".json"):
                json.loads(objects[name])
            elif name.endswith(".parquet"):
                pq.read_table(pa.BufferReader(objects[name]))
            elif name.endswith(".safetensors"):
                load_safetensors(objects[name])
        except (ValueError, OSError, SafetensorError):
            return False
        return True

    def left_over(self, output: str) -> list[str]:
        """Locks, half-written files, processes and reservations that nobody will ever need."""
        found = [f"{name} is left" for name in self.rig.store.times(output)
                 if name.endswith("lock.json") or ".tmp-" in name or "/ray/" in f"/{name}"]
        end = time.monotonic() + 40
        while (left := self._running()) and time.monotonic() < end:
            time.sleep(1)
        return found + left

    def _running(self) -> list[str]:
        found = []
        for process in self.rig.find("mdt_ray.cli", "ray::"):
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if not any(part in title for part in RAYS_OWN):
                    found.append(f"process {title[:80]} is left")
        groups = [group for group in self.rig.listed("placement_groups") if group["state"] != "REMOVED"]
        return found + [f"placement group {group} is left" for group in groups]


def _last_line(text: str) -> str:
    return next((line[:300] for line in reversed(text.splitlines()) if line.strip()), "")


def _over(outage: contextlib.AbstractContextManager) -> Callable[[], None]:
    """Begin it; returns what ends it, in time."""
    outage.__enter__()
    return _after(OUTAGE_SECONDS, lambda: outage.__exit__(None, None, None))


def _after(seconds: float, do: Callable[[], None]) -> Callable[[], None]:
    def wait() -> None:
        time.sleep(seconds)
        do()

    return wait


def rows_of(objects: dict[str, bytes]) -> list[dict[str, Any]]:
    """Of a training's metrics, where it has some."""
    return pq.read_table(pa.BufferReader(objects["metrics.parquet"])).to_pylist() if "metrics.parquet" in objects else []


def essence(job: str, objects: dict[str, bytes], num_steps: int) -> dict[str, Any]:
    """What must be the same: latents and features byte for byte, metrics and losses bit for bit, trials by name, and of the
    rest that it is there; and checkpoints that are not what their checksums say."""
    if job == "precompute":
        return {name: data for name, data in objects.items() if name not in ("run.json", "source.parquet")}  # paths, times
    if job == "evaluate":
        chunks = {name: data if "chunks/" in name else True for name, data in objects.items()}
        return chunks | {"metrics": json.loads(objects["metrics.json"])["metrics"] if "metrics.json" in objects else None}
    if job == "train":
        last, same = f"checkpoints/step-{num_steps:08d}/", (".safetensors", "optimizer.pt", "state.json")
        names = {name: True for name in objects if "/" not in name or name.startswith("checkpoints/")}
        bits = {name: data for name, data in objects.items() if name.startswith(last) and name.endswith(same)}
        return names | bits | {
            "damaged": [name for name in objects if name.endswith("/checksums.json") and not _is_whole(name, objects)],
            "rows": [{k: v for k, v in row.items() if k not in MACHINE_COLUMNS} for row in rows_of(objects)]}
    names = {name: True for name in objects if "/" not in name or name.endswith("/result.json")}
    table = json.loads(objects["results.json"]) if "results.json" in objects else {"trials": []}
    trials = [(t["name"], t["status"], t["metrics"], [row["loss"] for row in t["curve"]]) for t in table["trials"]]
    return names | {"trials": trials, "others": [table.get(key) for key in ("left", "stopped", "failed")]}


def _is_whole(name: str, objects: dict[str, bytes]) -> bool:
    """Whether all files below are what the checksums say."""
    folder = name.rpartition("/")[0]
    sums = json.loads(objects[name])
    return bool(sums) and sums == {file: storage.sha256(objects.get(f"{folder}/{file}", b"")) for file in sums}


def main(jobs: list[str], runs: int, logs: Path, first: int = 0) -> dict[str, Any]:
    """All runs; returns the figures."""
    logs.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder, Rig(Path(folder)) as rig:
        chaos = Chaos(rig, logs)
        begin_with = ["precompute", "train"] if "evaluate" in jobs else ["precompute"]
        for job in dict.fromkeys([*begin_with, *jobs]):
            chaos.straight(job)
            print(f"{job}: {chaos.seconds[job]:.0f} s undisturbed", flush=True)
        for number in range(first, first + runs):
            for job in jobs:
                outcome = chaos.run(job, number)
                outcomes.append(outcome)
                print(f"{job} {number}: {outcome.fault} after {outcome.moment:.0f} s, {outcome.commands} commands, "
                      f"{outcome.lost:+.0f} s: {'; '.join(outcome.wrong) or 'survived'}", flush=True)
    survived = [o for o in outcomes if not o.wrong]
    recoveries = [o.recovery for o in survived if o.recovery is not None]
    return {"faults_injected": len(outcomes), "faults_survived": len(survived),
            "lost_work_seconds": statistics.median(o.lost for o in survived) if survived else None,
            "recovery_seconds": statistics.median(recoveries) if recoveries else None}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the rig is taken down
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", choices=list(WORKERS), default=list(WORKERS))
    parser.add_argument("--logs", type=Path, default=Path("runs/chaos"), help="folder for what the jobs print")
    given = parser.parse_args()
    figures = main(given.jobs, given.runs, given.logs, given.first)
    print(json.dumps({"name": "chaos", "machine": platform.processor() or platform.machine(), "figures": figures}))
    sys.exit(figures["faults_injected"] != figures["faults_survived"])
