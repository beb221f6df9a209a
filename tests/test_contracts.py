"""The contracts, over everything that is registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autolite import contracts, registry
from autolite.errors import PlanError
from autolite.hardware.profile_files import load_profile, profile_names

SETTINGS: dict[str, dict[str, Any]] = {
    "share": {"part": "ffn", "groups": 1, "init": "best", "rank": 2},
    "embedding": {"rank": 0.5, "vocabulary": 0.75},
    "prune": {"heads": 0.5, "ffn": 0.5, "round_to": 8},
    "distill": {"steps": 2, "batch_size": 8},
    "quantize": {"attention": "int8", "ffn": "kmeans4", "embedding": "int4"},
    "recover": {"steps": 2, "batch_size": 8},
}


@pytest.mark.parametrize("family", contracts.FAMILIES)
@pytest.mark.parametrize("name", registry.names("technique"))
def test_techniques(name: str, family: str) -> None:
    context = contracts.tiny_context(family, contracts.tiny_task(family))
    technique, settings = registry.get("technique", name), SETTINGS[name]
    if name == "embedding" and family == "vit":
        with pytest.raises(PlanError, match="no table of words"):
            technique.shape(context.teacher.shape, technique.Config(**settings))
        return
    if name == "embedding" and family in contracts.DECODERS:
        settings = {"rank": 0.5}  # what a language model predicts is not cut
    contracts.check_technique(technique, context, settings)


@pytest.mark.parametrize("family", contracts.FAMILIES)
def test_distillation_by_everything_it_can_compare(family: str) -> None:
    context = contracts.tiny_context(family, contracts.tiny_task(family))
    compared = {"attention": 1.0, "queries": 1.0, "keys": 1.0, "values": 1.0, "relation_heads": 4, "layers": "last"}
    ends = {"schedule": "cosine", "temperature_end": 1.0, "alpha_end": 0.5, "matching_end": 0.1}
    settings = {"steps": 3, "batch_size": 8, "accumulate": 2, "hidden_kind": "cosine", **compared, **ends}
    contracts.check_technique(registry.get("technique", "distill"), context, settings)


@pytest.mark.parametrize("name", registry.names("task"))
def test_tasks(name: str, tiny_data: Path) -> None:
    family = "llama" if name == "language-modeling" else "bert"
    contracts.check_task(registry.get("task", name), tiny_data, family)


@pytest.mark.parametrize("name", registry.names("runtime"))
def test_runtimes(name: str, tmp_path: Path) -> None:
    contracts.check_runtime(registry.get("runtime", name), tmp_path)


@pytest.mark.parametrize("name", profile_names())
def test_targets(name: str) -> None:
    contracts.check_target(load_profile(name))


PRUNING: list[dict[str, Any]] = [
    {"hidden": 0.75, "round_to": 8, "importance": "fisher"},
    {"hidden": 0.5, "heads": 0.5, "round_to": 8, "importance": "wanda", "reconstruct": True},
    {"heads": 0.5, "ffn": 0.5, "round_to": 8, "importance": "second-order"},
    {"heads": 0.5, "ffn": 0.5, "round_to": 8, "allocation": "global"},
    {"heads": 0.5, "ffn": 0.5, "round_to": 8, "allocation": "isomorphic", "importance": "activation"},
    {"hidden": 0.5, "round_to": 8, "importance": "second-order"},
    {"depth": 0.67, "layers": "similarity"},
    {"depth": 0.67, "layers": "second-order"},
    {"depth": 0.67, "layers": "damage", "hidden": 0.75, "heads": 0.5, "round_to": 8, "reconstruct": True},
    {"depth": 0.34, "layers": "damage", "ffn": 0.5, "round_to": 8, "allocation": "isomorphic"},
    {"sparsity": "2:4"},
    {"sparsity": "50%", "mask": "magnitude", "heads": 0.5},
]


@pytest.mark.parametrize("family", contracts.FAMILIES)
def test_every_way_to_prune(family: str) -> None:
    context = contracts.tiny_context(family, contracts.tiny_task(family))
    for settings in PRUNING:
        contracts.check_technique(registry.get("technique", "prune"), context, settings)
