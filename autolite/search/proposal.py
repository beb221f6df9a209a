"""What the screen tries next: by the additive model, from what its study has."""

from __future__ import annotations

import math

import numpy as np

from autolite.compress import canonical
from autolite.errors import PlanError
from autolite.search.additive import Observation, learn, predicted, propose
from autolite.search.evaluate import price
from autolite.search.prices import beyond_on_all
from autolite.search.problem import Problem
from autolite.search.settings import OBJECTIVES
from autolite.search.studies import StageStudy, params_of
from autolite.space import Params


def proposal(problem: Problem, study: StageStudy, effort: int) -> Params | None:
    """Return the parameters of the plan that is predicted to add the most hypervolume to what was evaluated, and is
    evaluated just now; None if nothing new does that is within the limits by prediction. `effort` is what the study's
    plans are trained for."""
    frontier = problem.frontier
    base = price(problem, problem.teacher.shape)
    latency, size = base["latency_ms"].value, base["size_bytes"].value
    evaluated = {t.number for t in study.trials()}
    seen, running = [], []
    asked = study.asked()
    known = {digest for t in asked if (digest := t.user_attrs.get("plan_digest"))}
    for trial in asked:
        try:
            params = frontier.settled(problem.space.complete(params_of(trial)))
            frontier.structure(params)
        except PlanError:
            continue
        if trial.number in evaluated:
            attributes = trial.user_attrs
            lost, error = 1 - attributes["kept"], (attributes["kept"] - attributes["kept_low"]) / 1.96
            prices = math.log(attributes["latency_ms"] / latency), math.log(trial.values[2] / size)
            seen.append(Observation(params, lost, error, prices))
        elif not trial.state.is_finished():
            running.append(params)
    if running:
        costs = learn(frontier, seen)
        seen += [predicted(frontier, costs, params) for params in running]
    limits = problem.settings.constraints
    # Another target may be as fast as is asked for where this one is not.
    slowest = math.inf if problem.others else min(limits.max_latency_ms or math.inf, _prompt_limit(problem))
    within = slowest / latency, (limits.max_size_bytes or math.inf) / size

    def is_new(params: Params) -> bool:
        try:
            plan = problem.plan(params, effort)
            shape = problem.shape(plan)
        except PlanError:
            return False
        if canonical(plan, problem.teacher.shape).digest in known:
            return False
        if problem.others:
            return not beyond_on_all(problem.prices, shape, limits)
        found = price(problem, shape)
        return limits.hold(found) and not problem.prices[0].lack(found)

    columns = [OBJECTIVES.index(name) for name in problem.settings.objectives]
    rng = np.random.default_rng(study.next_seed())
    found = propose(frontier, seen, is_new, columns, within, rng, limits.max_drop or 0.0)
    return None if found is None else problem.space.complete(found)


def _prompt_limit(problem: Problem) -> float:
    """The limit of the time to the first token, where that is the whole call."""
    most = problem.settings.constraints.max_ttft_ms
    return math.inf if most is None or problem.workload.generated else most
