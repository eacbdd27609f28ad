"""The command line `mdt-ray <job>`: parse, then import the job. Help imports neither torch, ray nor diffusers."""

import dataclasses
import importlib
import itertools
import json
import logging
import operator
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from mdt_ray import config_io, presets
from mdt_ray.config import (
    ClusterConfig,
    ConvertConfig,
    EvaluateConfig,
    InpaintConfig,
    InspectConfig,
    PlanConfig,
    PrecomputeConfig,
    QuickstartConfig,
    ReconstructConfig,
    ReferenceConfig,
    SampleConfig,
    SubmitConfig,
    SweepConfig,
    TrainConfig,
    TuneConfig,
    VerifyConfig,
)
from mdt_ray.interrupts import Stopped


class Job(NamedTuple):
    """A command of `mdt-ray`."""

    config: type
    text: str
    needed: tuple[str, ...]
    """Settings without which it cannot start."""
    function: str
    """What its module in jobs/ calls it."""
    module: str = ""
    """Its module in jobs/; by default the first word of its name."""
    positional: str = ""
    """The setting that a first word gives; by default the preset."""


JOBS = {
    "precompute": Job(PrecomputeConfig, "images -> VAE latents in Parquet (Ray Data)", ("output", "source"), "precompute"),
    "train": Job(TrainConfig, "latents -> checkpoints (Ray Train, DDP)", ("output", "latents"), "train"),
    "tune": Job(TuneConfig, "a sweep of training settings -> a ranked table (Ray Tune)", ("output",), "tune"),
    "evaluate": Job(EvaluateConfig, "checkpoint -> samples -> FID, sFID, IS, precision, recall",
                    ("output", "reference"), "evaluate"),
    "evaluate sweep": Job(SweepConfig, "settings of sampling on one checkpoint -> the frontier of FID and IS", ("output",),
                          "sweep", "sweep"),
    "reference": Job(ReferenceConfig, "real images -> reference statistics for evaluate", ("output", "source"), "reference",
                     positional="source"),
    "sample": Job(SampleConfig, "checkpoint -> pictures: a grid, PNGs, an npz", ("output", "checkpoint"), "sample"),
    "inpaint": Job(InpaintConfig, "pictures with a part of them hidden -> pictures", ("output", "checkpoint", "images"),
                   "inpaint"),
    "convert": Job(ConvertConfig, "weights of MDT, MDTv2, DiT or diffusers' DiT <-> checkpoints", ("output", "source"),
                   "convert"),
    "ema": Job(ReconstructConfig, "snapshots of a training run -> a checkpoint averaged over any length",
               ("output", "source", "sigma_rel"), "ema"),
    "quickstart": Job(QuickstartConfig, "all four in order, then a report page", ("output",), "quickstart"),
    "plan": Job(PlanConfig, "whether a training run fits, how long it takes, what it writes", (), "plan_train",
                "plan_train"),
    "plan precompute": Job(PrecomputeConfig, "how large the latents will be, and how long they will take", ("source",),
                           "plan_precompute"),
    "plan evaluate": Job(EvaluateConfig, "how long an evaluation takes", ("reference",), "plan_evaluate", "plan_evaluate"),
    "latents inspect": Job(InspectConfig, "what a folder of latents holds", ("folder",), "inspect", positional="folder"),
    "latents verify": Job(VerifyConfig, "whether a folder of latents is whole, and what some decode to", ("folder",),
                          "verify", positional="folder"),
    "submit": Job(SubmitConfig, "one of these on a Ray cluster, with its progress and its exit code here", (), "submit"),
    "submit list": Job(ClusterConfig, "the jobs of a cluster", (), "list_jobs"),
    "submit logs": Job(ClusterConfig, "what a job printed, and prints", ("job",), "logs", positional="job"),
    "submit stop": Job(ClusterConfig, "stop a job, after its checkpoint; the same command goes on", ("job",), "stop",
                       positional="job"),
}


UPLOADED = "working_dir_files"
"""Name of the folder below which Ray puts the working directories of submitted jobs, and deletes them."""


def main(arguments: list[str] | None = None) -> int:
    """Run a job; returns the exit code: 0 only on success, 1 for a failed job, 2 for a wrong command line, 128 + the number
    of the signal for one that was asked to stop, or whose reader has gone (as `| head` does)."""
    try:
        try:
            return _main(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        return 128 + signal.SIGPIPE


def _main(arguments: list[str]) -> int:
    typed = list(arguments)
    try:
        for name, value in itertools.pairwise(["", *arguments]):
            config_io.refuse_secrets(name, value)
    except ValueError as error:
        return _fail(arguments[0], error, 2)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    job, rest = job_of(arguments)
    if job not in JOBS:
        print(f"mdt-ray: {_unknown(job)}", file=sys.stderr)
        return 2
    debug = "--debug" in rest
    try:
        command = parse(job, rest)
    except ValueError as error:
        return _fail(job, error, 2)
    try:
        said = run(job, command.settings, command.dry_run)
    except Stopped as stop:
        print(f"mdt-ray {job}: {stop}; this goes on:\n  {shlex.join(['mdt-ray', *typed])}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        return _stopped(job, signal.SIGINT)
    except SystemExit as stop:
        if stop.code != signal.SIGTERM:  # (Ray's handler, in jobs without one of their own, exits with the signal's number)
            raise
        return _stopped(job, signal.SIGTERM)
    except Exception as error:
        if debug:
            raise
        return _fail(job, error, getattr(error, "exit_code", 1))
    print(said)
    return 0


def job_of(words: list[str]) -> tuple[str, list[str]]:
    """The job that a command line begins with, of one word or two, and what follows. It may be none of JOBS. What else
    `submit` does may come after its settings."""
    if words[0] == "submit" and (cut := _cut(words[1:]))[1] and f"submit {cut[1][0]}" in JOBS:
        return f"submit {cut[1][0]}", [*cut[1][1:], *cut[0]]
    two = " ".join(words[:2])
    return (two, words[2:]) if two in JOBS and len(words) > 1 else (words[0], words[1:])


def _unknown(job: str) -> str:
    return f"unknown job {job!r}{config_io.suggestion(job, JOBS)}"


def usage() -> str:
    """The top-level help."""
    lines = ["usage: mdt-ray <job> [preset] [--config FILE] [--dry-run] [--debug] [--setting value ...]", "",
             "Train and evaluate Masked Diffusion Transformers with Ray.",
             "The same command again goes on where it stopped.", "", "jobs:"]
    lines += [f"  {name:<16} {job.text}" for name, job in JOBS.items()]
    lines += ["", "presets:"]
    lines += [f"  {name:<45} {text}" for name, text in presets.OVERVIEW.items()]
    return "\n".join([*lines, "", "mdt-ray <job> --help lists the settings of a job."])


def parse(job: str, arguments: list[str]) -> Any:
    """A command (settings, dry_run) from `[preset] [--config FILE] [--setting value ...]`; later ones win. `submit` has
    another command after its settings.

    Raises ValueError for an unknown preset, file or setting; exits (code 2, or 0 for --help) as tyro does.
    """
    import tyro  # a tenth of a second that the top-level help does not need

    cls, text = JOBS[job].config, JOBS[job].text
    arguments, submitted = _cut(arguments) if job == "submit" else (arguments, [])
    arguments = [word for word in arguments if word != "--debug"]
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    if name and JOBS[job].positional:
        default = cls(**{JOBS[job].positional: name})
    else:
        default = _of_job(job, presets.preset(name)) if name else (presets.digits() if job == "quickstart" else cls())
    if job.endswith("evaluate") and "--samples" in arguments and "--checkpoint" not in arguments:
        default = dataclasses.replace(default, checkpoint="")  # a preset's
    if "--config" in arguments:
        place = arguments.index("--config")
        if place + 1 == len(arguments):
            raise ValueError("--config: needs a file")
        default = config_io.load_file(cls, arguments[place + 1])
        del arguments[place:place + 2]

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Command:
        settings: Annotated[cls, tyro.conf.arg(name="")]
        dry_run: bool = False
        """Print the resolved settings and what would happen, and stop."""

    command = tyro.cli(Command, args=arguments, prog=f"mdt-ray {job}", default=Command(settings=default),
                       description=f"{text}.\n\nusage: {_shape(job)}")
    if job == "submit":
        words = submitted or list(command.settings.command)  # given last, or by --command or a file
        if not words:
            raise ValueError("no job to submit; name one: mdt-ray submit [settings] <job> [what is to follow it]")
        command = dataclasses.replace(command, settings=submission(command.settings, words))
    return command


def _shape(job: str) -> str:
    if job == "submit":
        return "mdt-ray submit [settings] <job> [what is to follow it]"
    rest = "[--config FILE.toml|.json] [--debug] [settings]"
    if _from_preset(job):
        return f"mdt-ray {job} [preset] {rest}\n\npresets: {', '.join(presets.OVERVIEW)}"
    return f"mdt-ray {job} <{JOBS[job].positional}> {rest}" if JOBS[job].positional else f"mdt-ray {job} {rest}"


def _from_preset(job: str) -> Callable[[QuickstartConfig], Any] | None:
    """What gives a job's settings of a preset; None for a job that has no presets."""
    name = job.rpartition(" ")[2]
    found = {"quickstart": lambda preset: preset, "plan": presets.plan_of, "sweep": presets.sweep_of}
    if name in {field.name for field in dataclasses.fields(QuickstartConfig)}:
        return operator.attrgetter(name)
    return found.get(name)


def submission(config: SubmitConfig, words: list[str]) -> SubmitConfig:
    """`config` with a command line in it that parses here, has every setting that it needs, and whose output will be found
    again.

    Raises ValueError, or exits, as `parse` does.
    """
    job, rest = job_of(words)
    if job == "submit" or job.startswith("submit "):
        raise ValueError("a submitted command cannot be `submit`")
    if job not in JOBS:
        raise ValueError(_unknown(job))
    found = parse(job, rest)
    if not found.dry_run:
        _require_needed(job, found.settings)
    _refuse_temporary(found.settings)
    return dataclasses.replace(config, command=tuple(words))


def _require_needed(job: str, settings: Any) -> None:
    """Raise ValueError for a setting that the job cannot start without."""
    for name in JOBS[job].needed:
        if not getattr(settings, name):
            raise ValueError(f"--{name.replace('_', '-')}: not given; name it" + (
                f", or start from a preset ({', '.join(presets.OVERVIEW)})" if _from_preset(job) else ""))


def _refuse_temporary(settings: Any) -> None:
    """Raise ValueError where the output would go with the working directory of a cluster's job."""
    output = getattr(settings, "output", "")
    if output and "://" not in output and not Path(output).is_absolute():
        raise ValueError(f"output = {output!r}: on the cluster that is in a temporary folder; name a bucket (s3://...), or "
                         "an absolute path that all its nodes share")


def _cut(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What comes before the first word that is neither a setting nor its value, and the rest; `--` may stand between."""
    flags = ("--detach", "--no-detach", "--dry-run", "--no-dry-run", "--debug", "--help", "-h")
    for place, (before, word) in enumerate(itertools.pairwise(["", *arguments])):
        if before == "--command":  # whose values are many
            break
        if before.startswith("--") and "=" not in before and before not in flags:
            continue
        if word == "--" or not word.startswith("-"):
            return arguments[:place], arguments[place + (word == "--"):]
    return arguments, []


def run(job: str, config: Any, dry_run: bool = False) -> str:
    """Do the job (or say what it would do); returns the last line to print."""
    if dry_run:
        return _preview(job, config)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "matplotlib", "ray", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    _require_needed(job, config)
    if UPLOADED in Path.cwd().parts:
        _refuse_temporary(config)
    module = importlib.import_module(f"mdt_ray.jobs.{JOBS[job].module or job.partition(' ')[0]}")
    result = getattr(module, JOBS[job].function)(config)
    return _last_line(job, config, result)


def _of_job(job: str, preset: QuickstartConfig) -> Any:
    settings_of = _from_preset(job)
    if settings_of is None:
        raise ValueError(f"{job} has no presets; give its settings")
    return settings_of(preset)


def _preview(job: str, config: Any) -> str:
    settings = json.dumps(config_io.to_dict(config), indent=1)
    if job in ("tune", "submit"):  # of which the settings do not show what would be run
        settings += f"\n{importlib.import_module(f'mdt_ray.jobs.{job}').preview(config)}"
    if job == "submit":
        return settings
    if "output" not in JOBS[job].needed:
        return f"{settings}\nmdt-ray {job} would write nothing"
    run = _held_run(config.output)
    if run is None:
        state = "starts from nothing"
    else:
        held = {k: v for k, v in run["identity"].items() if k != "inputs"}
        lines = config_io.difference(held, json.loads(json.dumps(config_io.identity_fields(config))))
        state = "refused, since it holds another run:\n  " + "\n  ".join(lines) if lines else "goes on, or is finished"
    return f"{settings}\nmdt-ray {job} would write to {config.output}: {state}"


def _held_run(output: str) -> dict | None:
    """run.json of an output folder. A local one is read without importing what opens stores."""
    if "://" in output:
        from mdt_ray import storage

        uri = storage.join(output, "run.json")
        return storage.read_json(uri) if storage.exists(uri) else None
    path = Path(output, "run.json")
    return json.loads(path.read_text()) if path.is_file() else None


def _last_line(job: str, config: Any, result: Any) -> str:
    if job == "precompute":
        return f"{result.num_rows} latents of {result.num_classes} classes in {config.output}"
    if job == "train":
        return f"checkpoint {result}"
    if job == "tune":
        return importlib.import_module("mdt_ray.jobs.tune").summary(config.output, result)
    if job == "evaluate":
        found = [result["memorisation"] and _memorised(config.output, result["memorisation"]),
                 _below(config.output, "metrics.json")]
        return "\n".join([_numbers(result["metrics"]), *filter(None, found)])
    if job == "evaluate sweep":
        best = result["trials"][0]
        settings = ", ".join(f"{key} {value}" for key, value in best.items() if key not in ("metrics", "output"))
        return (f"best of {len(result['trials'])}: {settings}: {result['metric']} {best['metrics'][result['metric']]:.4g}\n"
                f"{_below(config.output, 'frontier.png')}\n"
                f"in full: mdt-ray evaluate --config {shlex.quote(_below(config.output, 'best.json'))}")
    if job == "quickstart":
        report, metrics = result
        return f"{_numbers(metrics)}\nreport {report}"
    return result


def _numbers(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _memorised(output: str, found: dict) -> str:
    share = found["memorised_share"]
    known = "least distance {least_distance:.3g} (no held-out images to compare with)" if share is None else \
        "{memorised_share:.1%} of {num_samples} samples are nearer to a training image than {threshold:.3g}, which " \
        "{expected_share:.1%} of unseen images are"
    return f"memorised: {known.format(**found)}; see {_below(output, 'neighbours.png')}"


def _below(folder: str, name: str) -> str:
    from mdt_ray import storage

    return storage.join(folder, name)


def _stopped(job: str, signum: int) -> int:
    print(f"\nmdt-ray {job}: stopped; the same command goes on", file=sys.stderr)
    return 128 + signum


def _fail(job: str, error: Exception, code: int) -> int:
    job, text = config_io.redacted(job), _harmless(config_io.redacted(str(error))) or type(error).__name__
    known = isinstance(error, ValueError | RuntimeError | OSError)
    wanted = code in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    print(f"mdt-ray {job}: {'' if wanted else 'error: '}{text if known else f'{type(error).__name__}: {text}'}",
          file=sys.stderr)
    if not known:
        print("(--debug shows the traceback)", file=sys.stderr)
    return code


def _harmless(text: str) -> str:
    """Without what a terminal would obey: a data set's names may hold anything."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


if __name__ == "__main__":
    sys.exit(main())
