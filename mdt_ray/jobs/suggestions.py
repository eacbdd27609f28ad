"""Points that Optuna's TPE suggests, through Ray Tune. A file of its own, since Optuna is not needed for other searches."""

import json
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import optuna
import ray.tune
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from mdt_ray import storage
from mdt_ray.tuning.space import Point, Space

logger = logging.getLogger(__name__)
MAX_REPEATS = 20
"""Suggestions that are known already, in a row, after which a new point is taken: TPE would repeat the best for long."""
MAX_DRAWS = 1000
"""Draws from ranges, without a new point, after which the space counts as exhausted."""
AWAY_SECONDS = 120.0
"""How long a store may not answer before nothing more is suggested."""


class Suggestions(OptunaSearch):
    """Optuna, of one metric or more, which gives every point once, and none while its training runs in another process.

    It is told of a trial that failed or was ended early as one without metrics.
    """

    def __init__(self, space: Space, metrics: list[str], modes: list[str], known: list[Point], seed: int,
                 training_of: Callable[[Point], str | None]):
        """known: points that come first, in this order. training_of: what trials share that may not run at the same time;
        where it raises OSError, it is asked again, for some time."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        domains = {key: ray.tune.choice(value) if isinstance(value, list) else value for key, value in space.values.items()}
        # (With a list of metrics Tune hands on what a trial ends with, and no rows before, which do not have them.)
        super().__init__(self.convert_search_space(domains), metric=metrics, mode=modes, points_to_evaluate=known, seed=seed)
        self.space, self.draw_seed, self.training_of = space, seed, training_of
        self.seen: set[str] = set()
        self.num_queued = len(known)
        self.waiting: optuna.Trial | None = None
        self.training: str | None = ""
        """That of the point that waits; empty where it is not known yet."""
        self.trainings: dict[str, str | None] = {}
        """Of the trials that run."""
        self.exhausted = False
        """Whether there was no new point left."""
        self.finished = False
        self.away_since: float | None = None
        self.failure: OSError | None = None
        """What the store said last, where it refused, or did not answer for AWAY_SECONDS."""

    def set_finished(self) -> None:
        """Suggest no more."""
        self.finished = True

    def suggest(self, trial_id: str) -> Point | str | None:
        if self.finished:
            return self.FINISHED
        if self.waiting is None:
            self.waiting, self.training = self._new(), ""
        if self.waiting is None:
            self.exhausted = True
            return self.FINISHED
        if self.training == "":
            try:
                self.training = self.training_of(self.waiting.params)
            except OSError as error:  # Tune asks again, every moment
                self.away_since = self.away_since or time.monotonic()
                if storage.is_refusal(error) or time.monotonic() - self.away_since > AWAY_SECONDS:
                    self.failure, self.finished = error, True
                    return self.FINISHED
                logger.warning("%s", error)
                return None
            self.away_since = None
        if self.training is not None and self.training in self.trainings.values():
            return None
        self.trainings[trial_id] = self.training
        self._ot_trials[trial_id], self.waiting = self.waiting, None
        return super().suggest(trial_id)

    def _new(self) -> optuna.Trial | None:
        """A point that was not suggested yet, or None."""
        for _ in range(MAX_REPEATS):
            found, queued = self._ask(), self.num_queued > 0
            self.num_queued -= queued
            if self._is_new(found.params) or queued:
                return found
            self._ot_study.tell(found, state=TrialState.FAIL)
        is_finite = self.space.num_points < math.inf
        for point in self.space.grid() if is_finite else self.space.drawn(MAX_DRAWS, self.draw_seed):
            if self._is_new(point):
                self._ot_study.enqueue_trial(point)
                return self._ask()
        return None

    def _ask(self) -> optuna.Trial:
        return self._ot_study.ask(fixed_distributions=self._space)

    def _is_new(self, point: Point) -> bool:
        """Whether it was not asked for before; from now on it was."""
        key = json.dumps(point, sort_keys=True)
        is_new = key not in self.seen
        self.seen.add(key)
        return is_new

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.trainings.pop(trial_id, None)
        finished = result is not None and all(name in result for name in self.metric)
        super().on_trial_complete(trial_id, result if finished else None, error=not finished)
