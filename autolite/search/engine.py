"""The ask/tell loop: runs each stage within its part of the budget, and takes up what an earlier process left."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from autolite.compress import canonical, is_trained, student_plan
from autolite.errors import PlanError
from autolite.files import sha256
from autolite.host_lock import give_way, working
from autolite.measure import Measurement
from autolite.pareto import nondominated
from autolite.plan import Plan
from autolite.search.confirm import Confirmed, confirm
from autolite.search.evaluate import Evaluation, evaluate, price
from autolite.search.leases import Lease, LeaseLostError, Leases, Pauses
from autolite.search.prices import beyond_on_all, least_excesses
from autolite.search.problem import Problem
from autolite.search.progress import Clock, FrontRow, Observer, Snapshot
from autolite.search.promotion import objectives
from autolite.search.proposal import proposal
from autolite.search.racing import Behind, surely_behind
from autolite.search.record import Times, a_step, of_evaluation, of_training
from autolite.search.schedule import Schedule
from autolite.search.scoring import Score, kept
from autolite.search.stages import RUNGS, Decision
from autolite.search.studies import LEVELS, PROPOSED, STEPS, StageStudy, place_in
from autolite.space import STAGES, Stage
from autolite.store import Store
from autolite.techniques.teacher import teaching

if TYPE_CHECKING:
    from optuna import Trial

SPLITS: dict[Stage, str] = {"screen": "screen", "recover": "search", "confirm": "selection"}
EXPLORE_AFTER = 5  # fruitless trials in a row before every second one is drawn at random
MAX_FRUITLESS = 50  # after which a space is taken to be exhausted
OPEN = "open stage"  # the fact with the stage that all processes work on now, and its decision


class Engine:
    """One run of the stages. Holds no result itself: everything is in the studies and the store."""

    def __init__(
        self,
        problem: Problem,
        studies: dict[Stage, StageStudy],
        store: Store,
        clock: Clock,
        leases: Leases,
        observer: Observer,
    ) -> None:
        self.problem, self.studies, self.store, self.clock, self.leases = problem, studies, store, clock, leases
        self.schedule = Schedule(problem, studies, store, clock)
        self._observer = observer
        self._snapshot = Snapshot("profile", "scoring the teacher")
        self._planned: dict[str, int] = {}

    def run(self) -> None:
        """Run every stage to the end of its budget."""
        for stage in STAGES:
            self.show(stage=stage, doing="scoring the teacher", step=0, steps=0)
            self._teacher(stage)
            for rung in range(RUNGS[stage]):
                decision = self.schedule.decision(stage, rung)
                self._planned[stage] = decision.trials
                if self.schedule.is_over(stage, rung):
                    continue
                self.studies[stage].drop_queued(decision.name)
                self.studies[stage].enqueue(decision.queue, decision.name, decision.efforts)
                self.store.put(OPEN, _opened(stage, decision))
                self.work(stage, decision)

    def show(self, **changes: Any) -> None:
        """Tell the observer what changed."""
        self._snapshot = replace(self._snapshot, **changes, spent=self.clock.spent, left=self.clock.left)
        self._observer(self._snapshot)

    def _counts(self) -> dict[str, tuple[int, int]]:
        return {stage: (len(study.trials()), self._planned.get(stage, 0)) for stage, study in self.studies.items()}

    def _teacher(self, stage: Stage) -> None:
        problem, split = self.problem, SPLITS[stage]
        quality = problem.teacher_quality(split)
        if stage == "confirm":  # slower than any student's: before the time that is left is shared out
            problem.teacher_quality("test")
        predicted = price(problem, problem.teacher.shape)
        size = float(sum(f.stat().st_size for f in problem.baseline))
        attributes = {"teacher": True, "plan": Plan(seed=problem.settings.seed).to_json(), "stage": stage}
        self.studies[stage].ensure_teacher([quality.value, predicted["latency_ms"].value, size], attributes)

    def work(self, stage: Stage, decision: Decision, goes_on: Callable[[], bool] | None = None) -> int:
        """Run trials of a stage, new ones and those of processes that died, until it is closed; returns how many.

        The process that decides closes it, when there is none left; any other also ends when `goes_on` is false.
        """
        self._planned[stage] = decision.trials
        done = fruitless = 0  # trials in a row that were seen before or cannot be: with many, the space is exhausted
        pauses = Pauses()
        while goes_on is None or goes_on():
            if goes_on is None:
                self.leases.check_lead()
            taken = self._take(stage, decision, fruitless, closing=goes_on is None)
            if taken is not None:
                trial, lease = taken
                if self._run_trial(stage, trial, lease, decision):
                    done, fruitless = done + 1, 0
                elif place_in(trial, decision.name) is None:  # what is queued says nothing of the space
                    fruitless += 1
                pauses = Pauses()
            elif self.store.get(OPEN) != _opened(stage, decision):
                break
            else:
                self.show(stage=stage, doing="waiting for other processes", step=0, steps=0, trials=self._counts())
                pauses.wait()
        return done

    def _take(self, stage: Stage, decision: Decision, fruitless: int, *, closing: bool) -> tuple[Trial, Lease] | None:
        """Take up a trial that nobody runs, or ask for a new one; if there is neither, and nobody runs one, close the
        stage, if that is for this process. Only one process at a time is here, so that no two take the last trial of
        the budget, and none begins one in a stage that is closed."""
        study = self.studies[stage]
        with suppress(LeaseLostError), self.leases.holding(f"asking {stage}") as asking:
            assert asking is not None
            if self.store.get(OPEN) != _opened(stage, decision):
                return None
            held = self.store.leases(f"trial {stage} ")
            running = study.running()
            for frozen in running:
                key = f"trial {stage} {frozen.number}"
                lease = None if key in held else self.leases.take(key)
                if lease is None:
                    continue
                trial = study.take_up(frozen)
                if self.schedule.is_open(stage, decision):
                    return trial, lease
                self._finish(stage, trial, lease, state=TrialState.FAIL)
            while study.waiting() and not self.schedule.in_time(stage, decision):
                study.drop_next()  # what is queued behind it may be cheaper
            if fruitless >= MAX_FRUITLESS or not self.schedule.another(stage, decision):
                if closing and not running:  # as of before the count: whoever ends in between may make room
                    self.leases.check(asking, asking=True)
                    self.store.put(OPEN, None)
                return None
            explore = fruitless >= EXPLORE_AFTER and fruitless % 2 == 1  # a limit may be met by what is proposed alone
            if stage == "screen" and self.problem.additive and not explore and not study.waiting():
                proposed = proposal(self.problem, study, decision.effort)
                study.enqueue([] if proposed is None else [proposed], f"{PROPOSED} {study.next_number()}")
            trial = study.ask(explore)
            self.problem.space.suggest(trial, stage)  # so that the next proposal knows of it
            lease = self.leases.take(f"trial {stage} {trial.number}")
            if lease is None:
                return None
            try:
                self.leases.check(asking, asking=True)
            except LeaseLostError:  # this process slept so long that another one may have asked for the same
                self._finish(stage, trial, lease, state=TrialState.FAIL)
                return None
            return trial, lease
        return None

    def _run_trial(self, stage: Stage, trial: Trial, lease: Lease, decision: Decision) -> bool:
        """Evaluate one trial and tell it; returns False for a plan that was seen before or cannot be evaluated."""
        try:
            return self._evaluate(stage, trial, lease, decision)
        except (LeaseLostError, UpdateFinishedTrialError):  # this process slept, and another has taken the trial
            return True
        finally:
            self.leases.end(lease)
            shutil.rmtree(self._scratch(stage, lease), ignore_errors=True)
            for part in (self.problem.settings.out / "candidates").glob(f".*{_mark(lease)}"):
                shutil.rmtree(part, ignore_errors=True)

    def _evaluate(self, stage: Stage, trial: Trial, lease: Lease, decision: Decision) -> bool:
        problem, study = self.problem, self.studies[stage]
        params = problem.space.suggest(trial, stage) | trial.user_attrs.get(LEVELS, {})
        effort = int(trial.user_attrs.get(STEPS, decision.effort))
        plan = Plan(seed=problem.settings.seed)  # of what cannot be made a plan of
        try:
            plan = problem.plan(params, effort)
            shape = problem.shape(plan)
        except PlanError as error:
            whole = price(problem, problem.teacher.shape)
            self._tell_infeasible(stage, trial, lease, plan, whole, {"plan": 1.0}, str(error))
            return False
        plan = canonical(plan, problem.teacher.shape)
        with self.leases.holding(f"asking {stage}"):  # or two processes might begin the same plan at once
            twin = study.twin(trial.number, plan.digest)
            if twin is None:
                trial.set_user_attr("plan_digest", plan.digest)
        if twin is not None:
            trial.set_user_attr("duplicate_of", twin.number)
            self._finish(stage, trial, lease, state=TrialState.PRUNED)
            return False
        predicted = price(problem, shape)
        violated = beyond_on_all(problem.prices, shape, problem.settings.constraints)
        if violated:
            beyond = ", ".join(f"{name} by {excess:.1%}" for name, excess in violated.items())
            reason = problem.prices[0].lack(predicted) or f"by prediction it is surely beyond {beyond}"
            self._tell_infeasible(stage, trial, lease, plan, predicted, violated, reason)
            return False
        prices = [predicted["latency_ms"].value, predicted["size_bytes"].value]
        prices += [each.latency(plan) for each in problem.others]
        self.show(stage=stage, doing=f"trial {trial.number}", step=0, steps=effort, trials=self._counts())
        confirmed: Confirmed | None = None
        students = problem.settings.out / "students"

        taught = teaching(problem.context)
        marks: list[tuple[float, int]] = []  # when so many steps of the training were done, teachers aside

        def progress(done: int, total: int) -> None:
            marks.append((time.monotonic() - taught.seconds, done))
            give_way()
            self.leases.check(lease)
            self._progress(done, total)

        step: float | None = None  # of the training before that for few bits, whose steps take longer

        def in_time(steps: int) -> int:
            nonlocal step
            step = a_step(marks)
            return self.schedule.recovery(stage, decision, plan, steps, step)

        def trained() -> bool:
            every = (replace(plan, seed=plan.seed + i) for i in range(self.schedule.seeds(stage)))
            return all(is_trained(each, problem.context, students) for each in every)

        try:
            # A student that another process trains just now is waited for, and then read from the disk.
            with self.leases.holding(f"student {student_plan(plan).digest}", unless=trained), working():
                begun, before = time.monotonic(), replace(taught)
                if stage == "confirm":
                    confirmed = confirm(
                        problem,
                        plan,
                        progress,
                        mark=_mark(lease),
                        check=lambda: self.leases.check(lease, asking=True),
                        seeds=self.schedule.seeds(stage),
                        in_time=in_time,
                    )
                    evaluation = confirmed.evaluation
                else:
                    folder, behind = self._scratch(stage, lease), self._behind(stage, prices)
                    evaluation = evaluate(problem, plan, SPLITS[stage], folder, progress, behind)
                lasted = time.monotonic() - begun
        except PlanError as error:  # what only training shows, such as a loss that diverges
            self._tell_infeasible(stage, trial, lease, plan, predicted, {"plan": 1.0}, str(error))
            return False
        times = Times(lasted, evaluation.train_seconds, taught.since(before), step or a_step(marks))
        self._tell(stage, trial, lease, plan, effort, evaluation, confirmed, prices, times)
        return True

    def _behind(self, stage: Stage, prices: list[float]) -> Behind | None:
        """What a plan of these prices is given up by: in the screen, one that is as fast (on each target) and as small,
        and surely keeps more of the quality. Later stages score whole splits: what went so far is worth knowing."""
        problem = self.problem
        if stage != "screen":
            return None
        rivals = [
            t.user_attrs["kept_low"]
            for t in self.studies[stage].trials()
            if all(a <= b for a, b in zip(t.user_attrs["prices"], prices, strict=True))
        ]
        if not rivals:
            return None
        return surely_behind(problem.teacher_score(SPLITS[stage]), max(rivals), problem.task, problem.settings.seed)

    def _scratch(self, stage: Stage, lease: Lease) -> Path:
        return self.problem.settings.out / "scratch" / f"{stage}{_mark(lease)}"

    def _finish(
        self,
        stage: Stage,
        trial: Trial,
        lease: Lease,
        values: list[float] | None = None,
        state: TrialState | None = None,
    ) -> None:
        self.leases.drop(lease)
        self.studies[stage].tell(trial, lease, values, state)

    def _tell(
        self,
        stage: Stage,
        trial: Trial,
        lease: Lease,
        plan: Plan,
        effort: int,
        found: Evaluation,
        confirmed: Confirmed | None,
        prices: list[float],
        times: Times,
    ) -> None:
        problem = self.problem
        self.leases.check(lease, asking=True)
        made, rounding = plan, None
        if confirmed is None:
            latency, measurements = found.predicted["latency_ms"], list(found.predicted.values())
            teacher = Score(problem.teacher_score(SPLITS[stage]).examples[found.seen])
            fraction = kept(found.score, teacher, problem.task, plan.seed)
        else:
            candidate, rounding, made = confirmed.candidate, confirmed.rounding, confirmed.candidate.plan
            latency, measurements, fraction = candidate.latency_ms, candidate.measurements(), candidate.kept
            trial.set_user_attr("candidate", candidate.to_json())
            for file in found.files:
                final = problem.settings.out / candidate.path / file.name
                self.store.add_artifact(candidate.plan.digest, final, sha256(final))
        durations, beside = self.schedule.durations(stage), self.studies[stage].trials()
        before = [t for t in durations.trials if durations.goes_on(t)]
        attributes = {
            **of_evaluation(stage, plan, fraction, len(found.seen), latency.value, prices),
            **of_training(stage, plan, effort, times, before, beside),
            "rounding": rounding and [rounding.whole, rounding.rounded, rounding.after],
            "worker": self.leases.owner,
            "measurements": self.store.add_measurements(made.digest, stage, measurements),
        }
        for key, value in attributes.items():
            trial.set_user_attr(key, value)
        if confirmed is not None:
            for name, excess in least_excesses(
                confirmed.candidate, problem.others, problem.settings.constraints
            ).items():
                trial.set_constraint(name, excess)
        # Some examples are harder than others: what was seen of a plan is compared with the teacher on the same ones.
        whole = problem.teacher_score(SPLITS[stage])
        value = problem.task.summary(whole.ratio + found.score.ratio - Score(whole.examples[found.seen]).ratio)
        self._finish(stage, trial, lease, [value, latency.value, found.predicted["size_bytes"].value])
        self.clock.save(force=True)
        self.show(front=self._front(stage), front_stage=stage, trials=self._counts())

    def _tell_infeasible(
        self,
        stage: Stage,
        trial: Trial,
        lease: Lease,
        plan: Plan,
        predicted: dict[str, Measurement],
        violated: dict[str, float],
        reason: str,
    ) -> None:
        """Tell a plan that is refused before anything is trained: predicted prices, and the stage's worst quality."""
        study = self.studies[stage].study
        self.leases.check(lease, asking=True)
        done = [t.values[0] for t in study.get_trials(deepcopy=False) if t.values]
        worst = min(done) if self.problem.task.direction == "maximize" else max(done)
        for key, value in {"stage": stage, "plan": plan.to_json(), "infeasible": reason}.items():
            trial.set_user_attr(key, value)
        for key, excess in violated.items():
            trial.set_constraint(key, excess)
        values = [worst, predicted["latency_ms"].value, predicted["size_bytes"].value]
        self._finish(stage, trial, lease, values)

    def _progress(self, done: int, total: int) -> None:
        self.clock.save()
        self.show(step=done, steps=total)

    def _front(self, stage: Stage) -> tuple[FrontRow, ...]:
        """The front of this stage so far, fastest first; at most ten rows."""
        trials = self.studies[stage].trials()
        if not trials:
            return ()
        base = price(self.problem, self.problem.teacher.shape)
        latency, size = base["latency_ms"].value, base["size_bytes"].value
        rows = []
        for t, best in zip(trials, nondominated(objectives(self.problem, trials)), strict=True):
            if best:
                candidate, plan = t.user_attrs.get("candidate"), Plan.from_json(t.user_attrs["plan"])
                faster = candidate["faster"]["value"] if candidate else latency / t.user_attrs["latency_ms"]
                rows.append(FrontRow(plan.describe(), t.user_attrs["kept"], faster, size / t.values[2]))
        return tuple(sorted(rows, key=lambda r: -r.faster)[:10])


def _mark(lease: Lease) -> str:
    """Return what keeps the files of a trial's holder apart from those of the holder before."""
    return f"-{lease.key.rpartition(' ')[2]}-{lease.token}"


def _opened(stage: Stage, decision: Decision) -> dict[str, Any]:
    return {"stage": stage, "decision": decision.to_json()}
