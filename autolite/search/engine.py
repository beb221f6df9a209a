"""The ask/tell loop: runs each stage within its part of the budget, and takes up what an earlier process left."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from autolite.compress import canonical, student_plan
from autolite.errors import PlanError
from autolite.files import sha256
from autolite.front import Candidate
from autolite.measure import Measurement
from autolite.pareto import nondominated
from autolite.plan import Plan
from autolite.search.confirm import confirm
from autolite.search.evaluate import Evaluation, evaluate, price
from autolite.search.problem import Problem
from autolite.search.progress import Clock, FrontRow, Observer, Snapshot
from autolite.search.scoring import kept
from autolite.search.stages import Decision, decide, expected_seconds, objectives
from autolite.search.studies import StageStudy
from autolite.space import STAGES, Stage
from autolite.store import Store

if TYPE_CHECKING:
    from optuna import Trial

SPLITS: dict[Stage, str] = {"screen": "screen", "recover": "search", "confirm": "selection"}
EXPLORE_AFTER = 5  # fruitless trials in a row before the sampler is replaced by a random one
MAX_FRUITLESS = 200


class Engine:
    """One run of the stages. Holds no result itself: everything is in the studies and the store."""

    def __init__(
        self, problem: Problem, studies: dict[Stage, StageStudy], store: Store, clock: Clock, observer: Observer
    ) -> None:
        self.problem, self.studies, self.store, self.clock = problem, studies, store, clock
        self._observer = observer
        self._snapshot = Snapshot("profile", "scoring the teacher")
        self._planned: dict[str, int] = {}

    def run(self) -> None:
        """Run every stage to the end of its budget."""
        for stage in STAGES:
            self.show(stage=stage, doing="scoring the teacher", step=0, steps=0)
            self._teacher(stage)
            decision = self._decision(stage)
            self._planned[stage] = decision.trials
            self.studies[stage].enqueue(decision.queue, str(self.clock.budget))
            self._run_stage(stage, decision)

    def show(self, **changes: Any) -> None:
        """Tell the observer what changed."""
        self._snapshot = replace(self._snapshot, **changes, spent=self.clock.spent, left=self.clock.left)
        self._observer(self._snapshot)

    def _counts(self) -> dict[str, tuple[int, int]]:
        return {stage: (len(study.trials()), self._planned.get(stage, 0)) for stage, study in self.studies.items()}

    def _teacher(self, stage: Stage) -> None:
        problem, split = self.problem, SPLITS[stage]
        quality = problem.teacher_quality(split)
        predicted = price(problem, problem.teacher.shape)
        size = float(sum(f.stat().st_size for f in problem.baseline))
        attributes = {"teacher": True, "plan": Plan(seed=problem.settings.seed).to_json(), "stage": stage}
        self.studies[stage].ensure_teacher([quality.value, predicted["latency_ms"].value, size], attributes)

    def _decision(self, stage: Stage) -> Decision:
        """Read what this stage decided under this budget, or decide now."""
        key = f"stage {stage} {self.clock.budget}"
        known = self.store.get(key)
        if known is not None:
            return Decision.from_json(known)
        decision = decide(stage, self.problem, self.studies, self.clock)
        self.store.put(key, decision.to_json())
        return decision

    def _run_stage(self, stage: Stage, decision: Decision) -> None:
        study = self.studies[stage]
        for trial in study.unfinished():
            if self._in_time(stage, decision):
                self._run_trial(stage, trial, decision)
            else:
                study.study.tell(trial, state=TrialState.FAIL)
        fruitless = 0  # trials in a row that were seen before or cannot be: the space is exhausted when they are many
        while fruitless < MAX_FRUITLESS and self._time_for_another(stage, decision):
            trial = study.ask(explore=fruitless >= EXPLORE_AFTER)
            fruitless = 0 if self._run_trial(stage, trial, decision) else fruitless + 1

    def _time_for_another(self, stage: Stage, decision: Decision) -> bool:
        study = self.studies[stage]
        if len(study.trials()) >= decision.trials:
            return False
        # Under a time budget the later stages only run what was promoted; there is no time to explore any more.
        open_end = decision.deadline is None or stage == "screen" or study.waiting() > 0
        return open_end and self._in_time(stage, decision)

    def _in_time(self, stage: Stage, decision: Decision) -> bool:
        """Whether a trial like the last ones ends before the deadline; a stage always does one, so that a tight budget
        still ends with a model."""
        if decision.deadline is None or not self.studies[stage].trials():
            return True
        expected = expected_seconds(self.problem, self.studies[stage], decision, str(self.clock.budget))
        return self.clock.spent + expected <= decision.deadline

    def _run_trial(self, stage: Stage, trial: Trial, decision: Decision) -> bool:
        """Evaluate one trial and tell it; returns False for a plan that was seen before or cannot be evaluated."""
        problem, study = self.problem, self.studies[stage].study
        params = problem.space.suggest(trial, stage)
        plan = Plan(seed=problem.settings.seed)  # of what cannot be made a plan of
        try:
            plan = problem.plan(params, decision.effort)
            shape = problem.shape(plan)
        except PlanError as error:
            self._tell_infeasible(stage, trial, plan, price(problem, problem.teacher.shape), {"plan": 1.0}, str(error))
            return False
        plan = canonical(plan, problem.teacher.shape)
        twin = next((t for t in self.studies[stage].trials() if t.user_attrs["plan_digest"] == plan.digest), None)
        if twin is not None:
            trial.set_user_attr("duplicate_of", twin.number)
            study.tell(trial, state=TrialState.PRUNED)
            return False
        predicted = price(problem, shape)
        violated = self._certain_violations(predicted)
        if violated:
            self._tell_infeasible(stage, trial, plan, predicted, violated, "the predicted price is above the limit")
            return False
        self.show(stage=stage, doing=f"trial {trial.number}", step=0, steps=decision.effort, trials=self._counts())
        candidate: Candidate | None = None
        begun = time.monotonic()
        try:
            if stage == "confirm":
                candidate, evaluation = confirm(problem, plan, self._progress)
            else:
                folder = problem.settings.out / "scratch"
                evaluation = evaluate(problem, plan, SPLITS[stage], folder, self._progress)
                shutil.rmtree(folder)
        except PlanError as error:  # what only training shows, such as a loss that diverges
            self._tell_infeasible(stage, trial, plan, predicted, {"plan": 1.0}, str(error))
            return False
        self._tell(stage, trial, plan, decision, evaluation, candidate, time.monotonic() - begun)
        return True

    def _tell(
        self,
        stage: Stage,
        trial: Trial,
        plan: Plan,
        decision: Decision,
        found: Evaluation,
        candidate: Candidate | None,
        seconds: float,
    ) -> None:
        problem, study = self.problem, self.studies[stage]
        if candidate is None:
            latency, measurements = found.predicted["latency_ms"], list(found.predicted.values())
            fraction = kept(found.score, problem.teacher_score(SPLITS[stage]), problem.task, plan.seed)
        else:
            latency, measurements, fraction = candidate.latency_ms, candidate.measurements(), candidate.kept
            trial.set_user_attr("candidate", candidate.to_json())
            for file in found.files:
                final = problem.settings.out / candidate.path / file.name
                self.store.add_artifact(plan.digest, final, sha256(final))
        student = student_plan(plan).digest
        siblings = [t for t in study.trials() if t.user_attrs["student"] == student]
        attributes = {
            "stage": stage,
            "plan": plan.to_json(),
            "plan_digest": plan.digest,
            "student": student,
            "effort": decision.effort,
            "kept": fraction.value,
            "latency_ms": latency.value,
            "seconds": seconds,
            "own_train_seconds": found.train_seconds,
            # A student taken from the cache cost nothing here; planning needs what it cost to make.
            "train_seconds": max([found.train_seconds, *(t.user_attrs["train_seconds"] for t in siblings)]),
            "measurements": self.store.add_measurements(plan.digest, stage, measurements),
        }
        for key, value in attributes.items():
            trial.set_user_attr(key, value)
        if candidate is not None:
            for name, excess in problem.settings.constraints.excesses(candidate).items():
                trial.set_constraint(name, excess)
        value = problem.task.summary(found.score.ratio)
        study.study.tell(trial, [value, latency.value, found.predicted["size_bytes"].value])
        self.clock.save(force=True)
        self.show(front=self._front(stage), front_stage=stage, trials=self._counts())

    def _tell_infeasible(
        self,
        stage: Stage,
        trial: Trial,
        plan: Plan,
        predicted: dict[str, Measurement],
        violated: dict[str, float],
        reason: str,
    ) -> None:
        """Tell a plan that is refused before anything is trained: predicted prices, and the stage's worst quality."""
        study = self.studies[stage].study
        done = [t.values[0] for t in study.get_trials(deepcopy=False) if t.values]
        worst = min(done) if self.problem.task.direction == "maximize" else max(done)
        for key, value in {"stage": stage, "plan": plan.to_json(), "infeasible": reason}.items():
            trial.set_user_attr(key, value)
        for key, excess in violated.items():
            trial.set_constraint(key, excess)
        study.tell(trial, [worst, predicted["latency_ms"].value, predicted["size_bytes"].value])

    def _certain_violations(self, predicted: dict[str, Measurement]) -> dict[str, float]:
        """Limits that even the low end of the prediction's interval is above, by their relative excess."""
        limits = self.problem.settings.constraints
        memory = self.problem.profile.memory.size.value * 1e9
        pairs = {
            "latency": (predicted["latency_ms"].low, limits.max_latency_ms),
            "size": (predicted["size_bytes"].low, limits.max_size_bytes),
            "memory": (predicted["memory_bytes"].low, min(memory, limits.max_memory_bytes or memory)),
        }
        return {k: value / limit - 1 for k, (value, limit) in pairs.items() if limit is not None and value > limit}

    def _progress(self, done: int, total: int) -> None:
        self.clock.save()
        self.show(step=done, steps=total)

    def _front(self, stage: Stage) -> tuple[FrontRow, ...]:
        """The front of this stage so far, fastest first; at most ten rows."""
        trials = self.studies[stage].trials()
        if not trials:
            return ()
        points = objectives(self.problem, trials)
        rows = []
        for t, p, best in zip(trials, points, nondominated(points), strict=True):
            if best:
                candidate = t.user_attrs.get("candidate")
                faster = candidate["faster"]["value"] if candidate else math.exp(-p[1])
                rows.append(
                    FrontRow(Plan.from_json(t.user_attrs["plan"]).describe(), 1 - p[0], faster, math.exp(-p[2]))
                )
        return tuple(sorted(rows, key=lambda r: -r.faster)[:10])
