"""The Optuna side of a search: one multi-objective study for each stage, asked and told by us."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna import Study, Trial
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from autolite.errors import RunError
from autolite.interrupts import let_finish
from autolite.search.leases import Lease, LeaseLostError
from autolite.search.samplers import SAMPLERS, MakeSampler, sampler_of
from autolite.search.settings import Settings
from autolite.space import BY_LAYER, STAGES, Params, Stage
from autolite.store import change_lease, changed_rows, engine_kwargs, storage_errors
from autolite.tasks.base import Task

OBJECTIVES = ("quality", "latency_ms", "size_bytes")
PROPOSED = "additive"  # the key of what is queued one by one, by a model of the trials so far
QUEUED = "queued"  # the attribute of a trial with the queue that it was begun from, and its place there
STEPS = "steps"  # the attribute of a trial from a queue with its training steps, whoever takes it up under what budget
LEVELS = "levels"  # the attribute of a trial with the level of each layer, for settings that are "by-layer" in Optuna


class FencedStorage(RDBStorage):
    """Optuna's tables, in which a trial that was begun under a lease is finished by the holder of that lease alone."""

    def __init__(self, url: str, run: str = "") -> None:
        super().__init__(url, engine_kwargs=engine_kwargs(url))
        let_finish(self.engine)
        self._run = run
        self._fences: dict[int, Lease] = {}

    def fence(self, trial_id: int, lease: Lease) -> None:
        """Finish the trial only while `lease` is held, and give the lease up with it."""
        self._fences[trial_id] = lease

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Do what Optuna does; raises `LeaseLostError` instead, if the lease was lost."""
        lease = self._fences.get(trial_id)
        if lease is None or not state.is_finished():
            return bool(super().set_trial_state_values(trial_id, state, values))
        # Optuna takes this thread's session too and commits it: both writes are one transaction, and the first one
        # makes whoever wants to take the lease wait for the second.
        session = self.scoped_session()
        try:
            if not changed_rows(session, change_lease(self._run, lease.key, lease.token, 0.0)):
                raise LeaseLostError(lease.key)
            return bool(super().set_trial_state_values(trial_id, state, values))
        finally:
            session.rollback()  # of nothing, after a commit
            session.close()


@dataclass(frozen=True)
class StageStudy:
    """One stage's study. Trial 0 is the teacher; a trial that runs when its process dies is taken up again."""

    stage: Stage
    study: Study
    seed: int
    storage: FencedStorage
    sampler: MakeSampler

    def trials(self) -> list[FrozenTrial]:
        """Return the finished trials that were really evaluated, the teacher's left out."""
        return _evaluated(self.study)

    def waiting(self) -> int:
        """Return how many enqueued trials have not begun."""
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def ensure_teacher(self, values: list[float], attributes: dict[str, Any]) -> None:
        """Make the teacher trial 0."""
        if not self.study.get_trials(deepcopy=False):
            self.study.ask()
        first = self.study.get_trials(deepcopy=False)[0]
        if first.state == TrialState.RUNNING:
            trial = self._live(first)
            for key, value in attributes.items():
                trial.set_user_attr(key, value)
            self.study.tell(first.number, values)

    def queued(self, key: str) -> list[int | None]:
        """Return the places in the queue `key` of the trials that wait, those that are asked next first; None for what
        is not from there."""
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return [place_in(trial, key) for trial in waiting]

    def given_up(self, key: str) -> set[int | None]:
        """Return the places in the queue `key` of what was dropped, or failed."""
        failed = self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        return {place_in(trial, key) for trial in failed}

    def enqueue(self, queue: Iterable[Params], key: str, steps: Sequence[int] = ()) -> None:
        """Queue trials with these parameters, and their training steps if these are given; what an earlier process
        queued under the same `key` is not repeated."""
        known = {t.user_attrs.get(QUEUED) for t in self.study.get_trials(deepcopy=False)}
        for place, params in enumerate(queue):
            name = f"{key} {place}"
            if name not in known:
                levels = {setting: list(value) for setting, value in params.items() if isinstance(value, list | tuple)}
                attributes: dict[str, Any] = {QUEUED: name} | ({LEVELS: levels} if levels else {})
                attributes |= {STEPS: steps[place]} if steps else {}
                self.study.enqueue_trial({**params, **dict.fromkeys(levels, BY_LAYER)}, user_attrs=attributes)

    def drop_queued(self, key: str) -> None:
        """Give up what is queued under other keys than `key`: what an earlier rung did not get to."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            if not str(trial.user_attrs.get(QUEUED)).startswith((f"{key} ", f"{PROPOSED} ")):
                self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def drop_next(self) -> None:
        """Give up the trial that would be asked next."""
        (first, *_) = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        self.storage.set_trial_state_values(first._trial_id, TrialState.FAIL)

    def running(self) -> list[FrozenTrial]:
        """Return the trials that were begun and not told yet, the teacher's left out."""
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [t for t in running if t.number > 0]

    def begun(self) -> list[FrozenTrial]:
        """Return the trials that were evaluated or run now, as of one moment: in two looks, one that is told in between
        would be in neither."""
        states = (TrialState.COMPLETE, TrialState.RUNNING)
        return _counting(self.study.get_trials(deepcopy=False, states=states))

    def take_up(self, frozen: FrozenTrial) -> Trial:
        """Return a running trial that its process left; the rest of it is drawn as it would have been."""
        self.study.sampler = self.sampler(self._seed_of(frozen.number))
        trial = self._live(frozen)
        fixed = frozen.system_attrs.get("fixed_params", {})
        for name, distribution in frozen.distributions.items():
            # Its process may have died while it drew: what it has is drawn again, so that the next is the same.
            if name not in fixed and name not in trial.relative_params and not distribution.single():
                self.study.sampler.sample_independent(self.study, frozen, name, distribution)
        return trial

    def twin(self, number: int, plan_digest: str) -> FrozenTrial | None:
        """Return another trial that was evaluated, or is just now, with this plan."""
        same = (t for t in self.begun() if t.user_attrs.get("plan_digest") == plan_digest)
        return next((t for t in same if t.number != number), None)

    def tell(
        self, trial: Trial, lease: Lease, values: list[float] | None = None, state: TrialState | None = None
    ) -> None:
        """Finish a trial.

        Raises:
            LeaseLostError: if another process has taken it since; nothing is written then.
        """
        self.storage.fence(trial._trial_id, lease)
        try:
            self.study.tell(trial, values, state)
        except (ValueError, UpdateFinishedTrialError) as error:
            if self.storage.get_trial(trial._trial_id).state.is_finished():
                raise LeaseLostError(lease.key) from error
            raise

    def ask(self, explore: bool) -> Trial:
        """Return a new trial, or the next one in the queue."""
        seed = self.next_seed()
        self.study.sampler = SAMPLERS["random"](seed) if explore else self.sampler(seed)
        return self.study.ask()

    def next_number(self) -> int:
        """Return the number of the trial that is asked next."""
        trials = self.study.get_trials(deepcopy=False)
        return next((t.number for t in trials if t.state == TrialState.WAITING), len(trials))

    def next_seed(self) -> int:
        """Return the seed of the trial that is asked next: a resumed study then asks what an undisturbed one would."""
        return self._seed_of(self.next_number())

    def _seed_of(self, number: int) -> int:
        return zlib.crc32(f"{self.seed} {self.stage} {number}".encode())

    def asked(self) -> list[FrozenTrial]:
        """Return every trial with parameters of its own, whatever became of it."""
        return [t for t in self.study.get_trials(deepcopy=False) if t.number > 0 and t.params]

    def _live(self, frozen: FrozenTrial) -> Trial:
        return Trial(self.study, frozen._trial_id)


@contextmanager
def open_studies(settings: Settings, run: str, task: Task) -> Iterator[dict[Stage, StageStudy]]:
    """Open or create the run's three studies; the connections are closed at the end.

    Raises:
        RunError: if the database holds something else under these names, or is not readable.
        StorageError: if it cannot be reached.
    """
    url = settings.storage_url
    directions = [task.direction, "minimize", "minimize"]
    with _storage(url, run) as storage:
        studies: dict[Stage, StageStudy] = {}
        for stage in STAGES:
            study = optuna.create_study(
                study_name=f"{run}/{stage}", storage=storage, directions=directions, load_if_exists=True
            )
            if [d.name.lower() for d in study.directions] != directions:
                raise RunError(f"{url} holds a study '{study.study_name}' with other objectives; use another --out")
            study.set_metric_names([task.metric, *OBJECTIVES[1:]])
            studies[stage] = StageStudy(stage, study, settings.seed, storage, sampler_of(settings.sampler))
        yield studies


def place_in(trial: FrozenTrial | Trial, key: str) -> int | None:
    """Return the place in the queue `key` that a trial was begun from; None if it is from no queue, or from another."""
    name = str(trial.user_attrs.get(QUEUED))
    return int(name.removeprefix(f"{key} ")) if name.startswith(f"{key} ") else None


def params_of(trial: FrozenTrial | Trial) -> Params:
    """Return a trial's parameters, with the level of each layer where it was begun with these."""
    return {**trial.params, **trial.user_attrs.get(LEVELS, {})}


def read_trials(url: str, run: str) -> dict[Stage, list[FrozenTrial]]:
    """Return the evaluated trials of a run's studies by stage; nothing is created.

    Raises:
        RunError: if the database has no studies of that run, or is not readable.
        StorageError: if it cannot be reached.
    """
    with _storage(url) as storage:
        try:
            return {s: _evaluated(optuna.load_study(study_name=f"{run}/{s}", storage=storage)) for s in STAGES}
        except KeyError:
            raise RunError(
                f"{url} has no study of the run '{run}': name the database that it was made with by --storage, or "
                "type its search command again"
            ) from None


def _evaluated(study: Study) -> list[FrozenTrial]:
    return _counting(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def _counting(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Leave out the teacher's and those that were refused."""
    return [t for t in trials if t.number > 0 and not t.user_attrs.get("infeasible")]


@contextmanager
def _storage(url: str, run: str = "") -> Iterator[FencedStorage]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Multivariate TPE and metric names are "experimental" by name only; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    with storage_errors(url):
        storage = FencedStorage(url, run)
        try:
            yield storage
        finally:
            storage.remove_session()
            storage.engine.dispose()
