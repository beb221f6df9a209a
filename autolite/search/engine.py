"""The ask/tell loop: runs each stage within its part of the budget, and takes up what an earlier process left."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autolite.compress import canonical, student_plan
from autolite.errors import PlanError
from autolite.measure import Measurement
from autolite.pareto import nondominated
from autolite.plan import Plan
from autolite.search.confirm import confirm
from autolite.search.evaluate import Evaluation, discard, evaluate, price
from autolite.search.problem import Problem
from autolite.search.progress import Clock, FrontRow, Observer, Snapshot
from autolite.search.scoring import kept
from autolite.search.stages import Decision, decide, objectives
from autolite.search.studies import MAX_DUPLICATES, StageStudy
from autolite.space import STAGES, Stage
from autolite.store import Store

if TYPE_CHECKING:
    from optuna import Trial

SPLITS: dict[Stage, str] = {"screen": "screen", "recover": "search", "confirm": "selection"}
EXPLORE_AFTER = 5  # duplicates in a row before the sampler is replaced by a random one


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
            for params in decision.queue:
                self.studies[stage].enqueue(params)
            self._run_stage(stage, decision)

    def show(self, **changes: Any) -> None:
        """Tell the observer what changed."""
        counts: dict[str, tuple[int, int]] = {
            stage: (len(study.trials()), self._planned.get(stage, 0)) for stage, study in self.studies.items()
        }
        left = self.clock.left
        self._snapshot = replace(self._snapshot, **changes, spent=self.clock.spent, left=left, trials=counts)
        self._observer(self._snapshot)

    def _teacher(self, stage: Stage) -> None:
        problem, split = self.problem, SPLITS[stage]
        quality = problem.teacher_quality(split, self.store)
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
            self._run_trial(stage, trial, decision)
        duplicates = 0
        while duplicates < MAX_DUPLICATES and self._time_for_another(stage, decision):
            trial = study.ask(explore=duplicates >= EXPLORE_AFTER)
            duplicates = 0 if self._run_trial(stage, trial, decision) else duplicates + 1

    def _time_for_another(self, stage: Stage, decision: Decision) -> bool:
        study = self.studies[stage]
        done = study.trials()
        if len(done) >= decision.trials:
            return False
        if decision.deadline is None:
            return True
        if stage != "screen" and not study.waiting():
            return False
        # A stage always does one trial, so that a tight budget still ends with a model.
        costs = [float(t.user_attrs["seconds"]) for t in done[-5:]]
        expected = sum(costs) / len(costs) if costs else 0.0
        return not done or self.clock.spent + expected <= decision.deadline

    def _run_trial(self, stage: Stage, trial: Trial, decision: Decision) -> bool:
        """Evaluate one trial and tell it; returns False for a plan that this study has seen before."""
        problem, study = self.problem, self.studies[stage].study
        params = problem.space.suggest(trial, stage)
        plan = problem.space.plan(params, decision.effort, problem.settings.seed)
        try:
            shape = problem.shape(plan)
        except PlanError as error:
            self._tell_infeasible(stage, trial, plan, price(problem, problem.teacher.shape), {"plan": 1.0}, str(error))
            return True
        plan = canonical(plan, problem.teacher.shape)
        twin = next((t for t in self.studies[stage].trials() if t.user_attrs["plan_digest"] == plan.digest), None)
        if twin is not None:
            trial.set_user_attr("duplicate_of", twin.number)
            self._drop(study, trial)
            return False
        predicted = price(problem, shape)
        violated = self._certain_violations(predicted)
        if violated:
            self._tell_infeasible(stage, trial, plan, predicted, violated, "the predicted price is above the limit")
            return True
        self.show(stage=stage, doing=f"trial {trial.number}", step=0, steps=decision.effort)
        if stage == "confirm":
            candidate, evaluation = confirm(problem, plan, self.store, self._progress)
            trial.set_user_attr("candidate", candidate.to_json())
            latency = candidate.latency_ms
        else:
            folder = problem.settings.out / "scratch"
            evaluation = evaluate(problem, plan, SPLITS[stage], folder, self._progress)
            latency = evaluation.predicted["latency_ms"]
            discard(folder)
        self._tell(stage, trial, plan, decision, evaluation, latency)
        return True

    def _tell(
        self, stage: Stage, trial: Trial, plan: Plan, decision: Decision, found: Evaluation, latency: Measurement
    ) -> None:
        problem, study = self.problem, self.studies[stage]
        fraction = kept(found.score, problem.teacher_score(SPLITS[stage], self.store), problem.task, plan.seed)
        student = student_plan(plan).digest
        siblings = [t for t in study.trials() if t.user_attrs["student"] == student]
        measurements = [*found.predicted.values()]
        if latency.source == "measured":
            measurements.append(latency)
        attributes = {
            "stage": stage,
            "plan": plan.to_json(),
            "plan_digest": plan.digest,
            "student": student,
            "effort": decision.effort,
            "kept": fraction.value,
            "latency_ms": latency.value,
            "seconds": found.seconds,
            # A student taken from the cache cost nothing here; planning needs what it cost to make.
            "train_seconds": max([found.train_seconds, *(t.user_attrs["train_seconds"] for t in siblings)]),
            "measurements": self.store.add_measurements(plan.digest, stage, measurements),
        }
        for key, value in attributes.items():
            trial.set_user_attr(key, value)
        limits = problem.settings.constraints
        size, memory = found.predicted["size_bytes"].value, found.predicted["memory_bytes"].value
        self._constrain(trial, latency=(latency.value, limits.max_latency_ms), size=(size, limits.max_size_bytes))
        self._constrain(trial, memory=(memory, limits.max_memory_bytes))
        if stage == "confirm" and limits.max_drop is not None:
            trial.set_constraint("max_drop", 1 - limits.max_drop - fraction.value)
        value = problem.task.summary(found.score.ratio)
        study.study.tell(trial, [value, latency.value, size])
        self.clock.save(force=True)
        self.show(front=self._front(stage))

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

    @staticmethod
    def _constrain(trial: Trial, **pairs: tuple[float, float | None]) -> None:
        for name, (value, limit) in pairs.items():
            if limit is not None:
                trial.set_constraint(name, value / limit - 1)

    @staticmethod
    def _drop(study: Any, trial: Trial) -> None:
        from optuna.trial import TrialState

        study.tell(trial, state=TrialState.PRUNED)

    def _progress(self, done: int, total: int) -> None:
        self.clock.save()
        self.show(step=done, steps=total)

    def _front(self, stage: Stage) -> tuple[FrontRow, ...]:
        """The front of this stage so far, fastest first; at most ten rows."""
        trials = self.studies[stage].trials()
        if not trials:
            return ()
        points = objectives(self.problem, trials)
        rows = [
            FrontRow(Plan.from_json(t.user_attrs["plan"]).describe(), 1 - p[0], math.exp(-p[1]), math.exp(-p[2]))
            for t, p, best in zip(trials, points, nondominated(points), strict=True)
            if best
        ]
        return tuple(sorted(rows, key=lambda r: -r.faster)[:10])
