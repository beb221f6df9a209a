"""What the screen tries next: by the additive model, from what its study has."""

from __future__ import annotations

import math

import numpy as np

from autolite.errors import PlanError
from autolite.search.additive import Observation, learn, predicted, propose
from autolite.search.evaluate import price
from autolite.search.problem import Problem
from autolite.search.settings import OBJECTIVES
from autolite.search.studies import StageStudy, params_of
from autolite.space import Params


def proposal(problem: Problem, study: StageStudy) -> Params | None:
    """Return the parameters of the plan that is predicted to add the most hypervolume to what was evaluated, and is
    evaluated just now; None if nothing new does."""
    frontier = problem.frontier
    base = price(problem, problem.teacher.shape)
    latency, size = base["latency_ms"].value, base["size_bytes"].value
    evaluated = {t.number: t for t in study.trials()}
    tried, seen, running = [], [], []
    for trial in study.asked():
        try:
            params = frontier.settled(problem.space.complete(params_of(trial)))
            frontier.structure(params)
        except PlanError:
            continue
        tried.append(params)
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
    within = (limits.max_latency_ms or math.inf) / latency, (limits.max_size_bytes or math.inf) / size
    columns = [OBJECTIVES.index(name) for name in problem.settings.objectives]
    found = propose(frontier, seen, tried, columns, within, np.random.default_rng(study.next_seed()))
    return None if found is None else problem.space.complete(found)
