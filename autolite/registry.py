"""Names of techniques, tasks and runtimes, and where each lives: `"module:attribute"`, imported when first asked for.

Other packages add their own through the entry-point groups `autolite.technique`, `autolite.task` and
`autolite.runtime`. Targets and search spaces are YAML files, found with `data_dir`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from autolite.errors import InputError, unknown

BUILTIN: dict[str, dict[str, str]] = {
    "technique": {
        "share": "autolite.techniques.share:Share",
        "embedding": "autolite.techniques.embedding:Embedding",
        "prune": "autolite.techniques.prune:Prune",
        "distill": "autolite.techniques.distill:Distill",
        "quantize": "autolite.techniques.quantize:Quantize",
        "recover": "autolite.techniques.recover:Recover",
    },
    "task": {
        "text-classification": "autolite.tasks.text_classification:TextClassification",
        "language-modeling": "autolite.tasks.language_modeling:LanguageModeling",
    },
    "runtime": {
        "onnxruntime": "autolite.runtime.onnxruntime:OnnxRuntime",
        "openvino": "autolite.runtime.openvino:OpenVino",
        "auto": "autolite.runtime.auto:AutoRuntime",
        "fake": "autolite.runtime.fake:FakeRuntime",
    },
}


@cache
def _known(kind: str) -> dict[str, str]:
    extra = {point.name: point.value for point in entry_points(group=f"autolite.{kind}")}
    return {**extra, **BUILTIN[kind]}


def names(kind: str) -> list[str]:
    """Return the registered names of `kind` ("technique", "task", "runtime"), built-in ones first."""
    return list(BUILTIN[kind]) + sorted(set(_known(kind)) - set(BUILTIN[kind]))


@cache
def get(kind: str, name: str) -> Any:
    """Import and instantiate what is registered as `name`.

    Raises:
        InputError: if nothing has that name; the message suggests the nearest.
    """
    known = _known(kind)
    if name not in known:
        raise InputError(unknown(kind, name, known))
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module), attribute)()


def data_dir(name: str) -> Path:
    """Return the folder of shipped data files called `name`: inside the wheel, or beside the package in a checkout."""
    inside = Path(__file__).parent / name
    return inside if inside.is_dir() else Path(__file__).parent.parent / name
