"""The Optuna side of a search: one multi-objective study for each stage, asked and told by us."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autolite.errors import RunError, StorageError
from autolite.search.settings import Settings
from autolite.space import STAGES, Params, Stage
from autolite.store import engine_kwargs, storage_errors
from autolite.tasks.base import Task

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

OBJECTIVES = ("quality", "latency_ms", "size_bytes")
MAX_DUPLICATES = 30


@dataclass(frozen=True)
class StageStudy:
    """One stage's study. Trial 0 is the teacher; a trial that runs when the process dies is taken up again."""

    stage: Stage
    study: Study
    seed: int

    def trials(self) -> list[FrozenTrial]:
        """Return the finished trials that were really evaluated, the teacher's left out."""
        from optuna.trial import TrialState

        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return [t for t in done if t.number > 0 and not t.user_attrs.get("infeasible")]

    def waiting(self) -> int:
        """Return how many enqueued trials have not begun."""
        from optuna.trial import TrialState

        return len(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def ensure_teacher(self, values: list[float], attributes: dict[str, Any]) -> None:
        """Make the teacher trial 0."""
        from optuna.trial import TrialState

        if not self.study.get_trials(deepcopy=False):
            self.study.ask()
        first = self.study.get_trials(deepcopy=False)[0]
        if first.state == TrialState.RUNNING:
            trial = self._live(first)
            for key, value in attributes.items():
                trial.set_user_attr(key, value)
            self.study.tell(first.number, values)

    def enqueue(self, params: Params, **attributes: Any) -> None:
        """Queue a trial with these parameters, once."""
        self.study.enqueue_trial(params, user_attrs=attributes, skip_if_exists=True)

    def unfinished(self) -> Iterator[Trial]:
        """Yield the trials that an earlier process left running."""
        from optuna.trial import TrialState

        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if frozen.number > 0:
                yield self._live(frozen)

    def ask(self, explore: bool) -> Trial:
        """Return a new trial. The sampler is seeded by the trial's number, so that a resumed study asks the same."""
        from optuna.samplers import RandomSampler, TPESampler

        number = len(self.study.get_trials(deepcopy=False))
        seed = zlib.crc32(f"{self.seed} {self.stage} {number}".encode())
        self.study.sampler = (
            RandomSampler(seed=seed) if explore else TPESampler(seed=seed, multivariate=True, group=True)
        )
        return self.study.ask()

    def _live(self, frozen: FrozenTrial) -> Trial:
        from optuna import Trial

        return Trial(self.study, frozen._trial_id)


def open_studies(settings: Settings, task: Task) -> dict[Stage, StageStudy]:
    """Open or create the run's three studies.

    Raises:
        RunError: if the database holds something else under these names, or is not readable.
        StorageError: if it cannot be reached.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Multivariate TPE and metric names are "experimental" by name only; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    url = settings.storage_url
    directions = [task.direction, "minimize", "minimize"]
    try:
        with storage_errors(url):
            storage = optuna.storages.RDBStorage(url, engine_kwargs=engine_kwargs(url))
            studies: dict[Stage, StageStudy] = {}
            for stage in STAGES:
                study = optuna.create_study(
                    study_name=f"{settings.run_name}/{stage}",
                    storage=storage,
                    directions=directions,
                    load_if_exists=True,
                )
                if [d.name.lower() for d in study.directions] != directions:
                    raise RunError(f"{url} holds a study '{study.study_name}' with other objectives; use another --out")
                study.set_metric_names([task.metric, *OBJECTIVES[1:]])
                studies[stage] = StageStudy(stage, study, settings.seed)
            return studies
    except optuna.exceptions.StorageInternalError as error:
        raise StorageError(f"the database {url} cannot be used: {str(error).splitlines()[0]}") from error
