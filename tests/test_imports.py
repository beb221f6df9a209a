"""The layout: each module imports only from those above it, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import autolite

ROOT = Path(autolite.__file__).parent
# Each line may import from itself and the lines above it.
LAYERS = [
    "errors",
    "files",
    "cache",
    "machine",
    "saturation",
    "registry",
    "plan",
    "families",
    "vocabulary",
    "factored",
    "unmapped",
    "architecture",
    "products",
    "configured",
    "delta",
    "parts",
    "surgery",
    "residual",
    "reshaping",
    "packing",
    "groups",
    "levels",
    "linear_grids",
    "codebooks",
    "formats",
    "host_lock",
    "interrupts",
    "rounds",
    "measure",
    "store",
    "hf_quantizer transformers_hook reload",
    "hardware",
    "tasks",
    "techniques",
    "runtime",
    "generation",
    "inference",
    "artifact",
    "profiling",
    "space",
    "compress",
    "pareto",
    "limits",
    "front",
    "devices",
    "export",
    "search",
    "report",
    "cli",
    "__main__",
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
FREE = {"testing", "contracts", ""}  # helpers for tests may import anything; "" is the package itself


def top(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported(file: Path) -> set[str]:
    """The autolite modules a file imports when it runs, those under TYPE_CHECKING left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "autolite":
            names = [f"autolite.{a.name}" for a in node.names] if node.module == "autolite" else [node.module]
            found |= {top(name) for name in names}
        elif isinstance(node, ast.Import):
            found |= {top(a.name) for a in node.names if a.name.split(".")[0] == "autolite"}
    return found


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_upwards(file: Path) -> None:
    own = file.relative_to(ROOT).parts[0].removesuffix(".py")
    if own in ("__init__", *FREE):
        return
    assert own in LEVEL, f"{own} has no place in the layout: give it one in LAYERS"
    below = {name for name in imported(file) - FREE if LEVEL[name] > LEVEL[own]}
    assert not below, f"{file.name} imports from below: {sorted(below)}"


@pytest.mark.parametrize(
    "command", ["import autolite", "from autolite import cli; cli.main(['--help'], standalone_mode=False)"]
)
def test_nothing_heavy_is_imported_early(command: str) -> None:
    heavy = ["torch", "transformers", "onnxruntime", "onnx", "optuna", "pandas", "datasets", "sqlalchemy"]
    heavy += ["pydantic", "numpy", "rich", "openvino"]
    code = f"{command}\nimport sys\nprint('HEAVY', [m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_every_public_name_is_there() -> None:
    for name in autolite.__all__:
        assert getattr(autolite, name) is not None
    with pytest.raises(AttributeError):
        _ = autolite.no_such_name  # type: ignore[attr-defined]


TIMES = {"measure.py", "rounds.py"}  # calls of models
# What may look at a clock beside these: budgets, the view that shows one, when to save or to look, what teachers take
# of the time of trainings, and how long a device is waited for.
CLOCKS = {
    "devices/calibrate.py",
    "devices/runner.py",
    "devices/timing.py",
    "host_lock.py",
    "techniques/teacher.py",
    "techniques/checkpoint.py",
    "search/progress.py",
    "search/engine.py",
    "search/evaluate.py",
    "search/run.py",
    "report/live.py",
}


def test_nothing_but_measure_times_a_model() -> None:
    """Elsewhere the only clock is the slow one that budgets are kept by, and no session is made beside it."""
    assert {f.relative_to(ROOT).as_posix() for f in ROOT.rglob("*.py") if "perf_counter" in f.read_text()} == TIMES
    for file in ROOT.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        modules = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        modules |= {str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)}
        assert not modules & {"timeit", "cProfile", "profile"}, file
        if "time" in modules and file.name not in TIMES:
            assert file.relative_to(ROOT).as_posix() in CLOCKS, f"{file.name} has a clock: time with autolite.measure"
            read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "time"}
            assert "monotonic" in read <= {"monotonic", "sleep"}, file
            assert "InferenceSession" not in file.read_text(), file
