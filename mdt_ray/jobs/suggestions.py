"""Points that Optuna's TPE suggests, through Ray Tune. A file of its own, since Optuna is not needed for other searches."""

from typing import Any

import optuna
from ray.tune.search.optuna import OptunaSearch

from mdt_ray.tuning.space import Point


class Suggestions(OptunaSearch):
    """Optuna, of one metric or more, told of a trial that failed or was ended early as one without metrics."""

    def __init__(self, domains: dict[str, Any], metrics: list[str], modes: list[str], known: list[Point], seed: int):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # (With a list of metrics Tune hands on what a trial ends with, and no rows before, which do not have them.)
        super().__init__(self.convert_search_space(domains), metric=metrics, mode=modes, points_to_evaluate=known, seed=seed)

    def on_trial_complete(self, trial_id, result=None, error=False):
        finished = result is not None and all(name in result for name in self.metric)
        super().on_trial_complete(trial_id, result if finished else None, error=not finished)
