"""Job `quickstart`: the four jobs in order, then the report page. Each stage that is finished is passed over."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

from mdt_ray import checkpoints, storage
from mdt_ray.config import EvaluateConfig, QuickstartConfig, require
from mdt_ray.data.latents import MANIFEST
from mdt_ray.jobs import evaluate, precompute, train, tune
from mdt_ray.report import page

STAGES = "stages.json"


def resolve(config: QuickstartConfig) -> QuickstartConfig:
    """The settings of all jobs with their folders below config.output."""
    root = storage.absolute(config.output)
    latents, trained = storage.join(root, "latents"), storage.join(root, "train")
    return dataclasses.replace(
        config, output=root,
        precompute=dataclasses.replace(config.precompute, output=latents),
        train=dataclasses.replace(config.train, latents=latents, output=trained),
        tune=dataclasses.replace(config.tune, output=storage.join(root, "tune"),
                                 train=dataclasses.replace(config.tune.train, latents=latents)),
        evaluate=dataclasses.replace(config.evaluate, checkpoint=trained, output=storage.join(root, "evaluate")))


def quickstart(config: QuickstartConfig) -> tuple[str, dict[str, float]]:
    """Run what is not finished yet; returns the path of the report page, and the metrics of the guided samples. Raises what
    the jobs raise."""
    config = resolve(config)
    for name, judged in (("evaluate", config.evaluate), ("tune.evaluate", config.tune.evaluate)):
        require(bool(judged.reference), f"{name}.reference", "", "not given; name real images, or statistics of them (.npz)")
    clock = _Clock(storage.join(config.output, STAGES))
    with clock.stage("precompute", is_done=_is_there(config.precompute.output, MANIFEST)):
        precompute.precompute(config.precompute)
    with clock.stage("train", is_done=checkpoints.newest_step(config.train.output) >= config.train.num_steps):
        train.train(config.train)
    with clock.stage("tune", is_done=_is_there(config.tune.output, tune.RESULTS)):
        sweep = tune.tune(config.tune)
    evaluations = evaluations_of(config)
    with clock.stage("evaluate", is_done=all(_is_there(each.output, evaluate.METRICS) for each in evaluations.values())):
        results = dict(zip(evaluations, evaluate.evaluate_many(list(evaluations.values()), config.evaluate.output),
                           strict=True))
    return page.write(config, evaluations, results, sweep, clock.seconds), results["guided"]["metrics"]


def evaluations_of(config: QuickstartConfig) -> dict[str, EvaluateConfig]:
    """The guided evaluation of the newest checkpoint, and an unguided one of every checkpoint kept for good, by name."""
    root, guided = config.evaluate.output, config.evaluate
    sampling = dataclasses.replace(guided.sampling, cfg_scale=1.0)
    found = {"guided": dataclasses.replace(guided, output=storage.join(root, "guided"))}
    finished = checkpoints.list_finished(config.train.output)
    for uri in finished:
        step = checkpoints.step_of(uri)
        if uri != finished[-1] and step % (config.train.keep_every_steps or config.train.num_steps):
            continue
        name = f"unguided-{checkpoints.name(step)}"
        found[name] = dataclasses.replace(guided, checkpoint=uri, sampling=sampling, output=storage.join(root, name))
    return found


def _is_there(output: str, name: str) -> bool:
    return storage.exists(storage.join(output, name))


class _Clock:
    """Seconds that each stage took, over all runs of the command; a stage that is done keeps its time."""

    def __init__(self, uri: str):
        self.uri = uri
        self.seconds: dict[str, float] = storage.read_json(uri) if storage.exists(uri) else {}

    @contextlib.contextmanager
    def stage(self, name: str, *, is_done: bool) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            if not is_done:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
                storage.write_json(self.uri, self.seconds)
