"""Registers AutoLite's reshaping with transformers when, and only when, transformers itself is imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"  # the module that keeps the quantizers known to transformers
_OURS = "autolite.hf_quantizer"


def install() -> None:
    """Register now if transformers' registry is loaded, else as soon as it is; imports nothing heavy itself."""
    if _REGISTRY in sys.modules:
        importlib.import_module(_OURS)
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())


class _OnImport:
    """Finds the registry like Python does, and imports our module once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        sys.meta_path.remove(self)
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            importlib.import_module(_OURS)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
