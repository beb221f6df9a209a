"""AutoLite: compress Hugging Face transformers for a device by searching."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from autolite import transformers_hook
from autolite.search import search

if TYPE_CHECKING:
    from autolite.front import Candidate, Front, Result, read_front
    from autolite.inference import pipeline
    from autolite.limits import Constraints
    from autolite.plan import Plan
    from autolite.search.reprice import reprice

__version__ = "0.1.0"
__all__ = ["Candidate", "Constraints", "Front", "Plan", "Result", "pipeline", "read_front", "reprice", "search"]

transformers_hook.install()  # folders of compressed models then load with plain `from_pretrained`

_HOMES = {name: "autolite.front" for name in ("Candidate", "Front", "Result", "read_front")}
_HOMES |= {"Constraints": "autolite.limits", "pipeline": "autolite.inference", "Plan": "autolite.plan"}
_HOMES |= {"reprice": "autolite.search.reprice"}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import autolite` stays light."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'autolite' has no attribute {name!r}")
