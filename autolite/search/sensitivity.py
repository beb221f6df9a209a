"""S0: how much the loss rises at each level of each layer, estimated in one sweep and kept for later runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autolite import registry
from autolite.cache import remember, remembered
from autolite.space import Space
from autolite.techniques.base import Context, Layered, weights_digest

_REVISION = 1  # of the estimates, raised whenever they change: a file of another one is not read

Damages = dict[str, NDArray[np.float64]]


def damages(space: Space, context: Context) -> Damages:
    """Return, for each setting of `space` that can have a level for each layer, the estimated rise of the loss in nats
    [levels, layers] if one layer of the teacher has one of its levels, and nothing else is done or trained.

    A file in the user's cache folder, named by the weights, the training data, the seed, the levels and the revision of
    the estimates, serves other runs, targets and budgets.
    """
    found: Damages = {}
    for name, setting in space.layered.items():
        technique: Layered = registry.get("technique", name.partition(".")[0])
        memory = f"damage-{name}-{setting.levels}"
        if memory not in context.memory:
            context.memory[memory] = _kept(technique, name, setting.levels, context)
        found[name] = context.memory[memory]
    return found


def _kept(technique: Layered, name: str, levels: tuple[object, ...], context: Context) -> NDArray[np.float64]:
    key = [weights_digest(context.teacher.model), context.training_data(), context.seed, name, levels, _REVISION]
    values = remembered("sensitivities", key)
    if values is None:
        values = technique.damage(name.partition(".")[2], levels, context)
        remember("sensitivities", key, values)
    return np.array(values, dtype=np.float64)
