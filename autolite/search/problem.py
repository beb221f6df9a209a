"""Problem: everything a search works on, loaded, checked and scored once (stage S0)."""

from __future__ import annotations

import hashlib
import io
import json
import math
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autolite import registry
from autolite.architecture import ModelShape, shape_of
from autolite.compress import resolve, shape_after
from autolite.errors import InputError, PlanError, first_line
from autolite.export import Provenance
from autolite.files import sha256, write_atomically
from autolite.front import Quality
from autolite.hardware import LOCAL, load_target
from autolite.hardware.profile import Profile
from autolite.hardware.profile_files import dump_profile, parse_profile
from autolite.measure import Workload
from autolite.plan import Plan
from autolite.runtime.auto import AutoRuntime
from autolite.runtime.base import Runtime
from autolite.search.frontier import Frontier
from autolite.search.prices import Prices
from autolite.search.samplers import ADDITIVE
from autolite.search.scoring import Score, quality, score, scoring_threads
from autolite.search.settings import Settings
from autolite.space import BY_LAYER, Params, Space
from autolite.store import Store
from autolite.tasks.base import Split, Task, TaskData
from autolite.tasks.custom import CustomTask
from autolite.techniques.base import Context, Student
from autolite.techniques.features import room
from autolite.unmapped import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCREEN_EXAMPLES = 1000  # enough to rank plans (standard error about one point) at a fraction of the whole split's cost


@dataclass(frozen=True)
class Problem:
    """A search's inputs. `baseline` is the teacher's fp32 artifact; `teacher_scores` its score on each split."""

    settings: Settings
    space: Space
    task: Task
    data: TaskData
    teacher: Student
    tokenizer: PreTrainedTokenizerBase
    runtime: Runtime
    profile: Profile
    workload: Workload
    context: Context
    baseline: list[Path]
    teacher_scores: dict[str, Score]
    others: tuple[Prices, ...] = ()

    @property
    def prices(self) -> tuple[Prices, ...]:
        """What shapes cost on each target, the first one's first."""
        return Prices(self.teacher.shape, self.profile, self.workload), *self.others

    def split(self, name: str, data: TaskData | None = None) -> Split:
        """Return the split of `data` (the teacher's) called "screen", "search", "selection" or "test"."""
        data = data or self.data
        if name != "screen":
            found: Split = getattr(data, name)
            return found
        count = min(SCREEN_EXAMPLES, len(data.search))
        chosen = np.sort(np.random.default_rng(self.settings.seed).permutation(len(data.search))[:count])
        return replace(data.search.take(chosen), name="screen")

    def data_of(self, tokenizer: PreTrainedTokenizerBase) -> TaskData:
        """Return the rows to score on in the tokens of a student whose vocabulary was cut; its `train` is empty."""
        digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
        key = f"data-{digest}"
        if key not in self.context.memory:
            data = self.task.load(self.settings.data, tokenizer, self.teacher.model.config)
            self.context.memory[key] = replace(data, train=data.train.take([]))
        found: TaskData = self.context.memory[key]
        return found

    def emit(self, student: Student, folder: Path, *, final: bool) -> list[Path]:
        """Write a student's artifact for the workload. Of equivalent forms a `final` one has the fastest: by
        measurements where the target is here, for which whatever else trains here pauses."""
        tuned = final and self.profile.name == LOCAL
        return self.runtime.emit(student, folder, self.workload, tuned)

    @property
    def times_finalists(self) -> bool:
        """Whether the confirmed candidates are timed together in the end, here or on a device."""
        return self.profile.name == LOCAL or self.settings.measure_on is not None

    def runtime_of(self, file: Path) -> Runtime:
        """Return the runtime that an artifact is for: the search's own, or the one that "auto" took."""
        return self.runtime.of(file) if isinstance(self.runtime, AutoRuntime) else self.runtime

    def teacher_score(self, name: str) -> Score:
        """Return the teacher's score on a split; made once, then read from the run's folder."""
        if name not in self.teacher_scores:
            split = self.split(name)
            file = self.settings.out / "teacher" / f"{name}-{self.identity}.scores.npy"
            try:
                self.teacher_scores[name] = Score(np.load(file, allow_pickle=False))
            except (OSError, ValueError, EOFError):
                runner = self.runtime.load(self.baseline[0], threads=scoring_threads())
                self.teacher_scores[name] = scored = score(runner, self.task, split, self.context.pad_id)
                stream = io.BytesIO()
                np.save(stream, scored.examples)
                write_atomically(file, stream.getvalue())
        return self.teacher_scores[name]

    @property
    def identity(self) -> str:
        """Digest of the teacher's artifact and of the data's content: what its scores belong to."""
        return hashlib.sha256(f"{sha256(self.baseline[0])} {self.data.fingerprint}".encode()).hexdigest()[:12]

    def teacher_quality(self, name: str) -> Quality:
        """Return the teacher's metric on a split, with its interval.

        Raises:
            InputError: if it is no number: no example of the split counts.
        """
        if not math.isfinite(ratio := self.teacher_score(name).ratio):
            raise InputError(
                f"the teacher's {self.task.metric} on the {name} split is {ratio} ({len(self.split(name))} examples): "
                "none of them counts for it; use more data, or another metric"
            )
        return quality(self.teacher_score(name), self.task, name, self.settings.seed)

    def plan(self, params: Params, effort: int) -> Plan:
        """Decode `params` into a plan, resolved for this teacher.

        Raises:
            PlanError: if a step cannot be applied.
        """
        levels = self.frontier.levels(params)
        return resolve(self.space.plan(params, effort, self.settings.seed, levels), self.context)

    @property
    def additive(self) -> bool:
        """Whether an additive model proposes plans: it needs levels by layer."""
        return self.settings.sampler == ADDITIVE and bool(self.space.layered)

    @property
    def frontier(self) -> Frontier:
        """What makes levels for each layer, priced on the target."""
        return Frontier(self.space, self.context, self._price)

    def _price(self, shapes: Sequence[ModelShape]) -> list[tuple[float, float]]:
        found = self.prices[0].of_shapes(shapes)
        return [(each["latency_ms"].value, each["size_bytes"].value) for each in found]

    def shape(self, plan: Plan) -> ModelShape:
        """Return the shape that a resolved plan leads to.

        Raises:
            PlanError: if the plan cannot be applied, or uses a format that the runtime or the target lacks; nothing has
                been trained then.
        """
        shape = shape_after(plan, self.teacher.shape)
        for what, known in ((self.runtime.name, self.runtime.formats), (self.profile.name, self.profile.formats)):
            missing = sorted(shape.formats - set(known))
            if missing:
                raise PlanError(f"{what} cannot run the format {missing[0]}; it has {', '.join(sorted(known))}")
        if useless := sorted(shape.sparsity - set(self.profile.sparsity)):
            gains = ", ".join(sorted(self.profile.sparsity)) or "none"
            raise PlanError(
                f"prune.sparsity: {self.profile.name} gains nothing from {useless[0]} zeros (it does from: {gains}), "
                "which cost quality: leave them out, or cut heads, neurons or layers instead"
            )
        return shape


def load_problem(
    settings: Settings,
    space: Space,
    store: Store,
    note: Callable[[str], None],
    baseline: list[Path] | None = None,
) -> Problem:
    """Load the model, the data and the target, and emit the baseline, unless another process did: `baseline`.

    Raises:
        ModelError, DataError, TargetError, InputError: before anything expensive.
    """
    from autolite.reload import load_model
    from autolite.tasks.demo import demo_model_path

    task: Task = registry.get("task", settings.task)
    if settings.loss is not None or settings.metric is not None:
        task = CustomTask(task, settings.loss, settings.metric)
    runtime: Runtime = registry.get("runtime", settings.runtime)
    if isinstance(runtime, AutoRuntime) and settings.target != LOCAL:
        raise InputError(
            f"--runtime auto times both runtimes on this machine, which is not '{settings.target}': use --target "
            "local, or name the runtime"
        )
    _check_device(settings.device)
    note("loading the model")
    model, tokenizer = load_model(settings.model or str(demo_model_path()), task.auto_class)
    teacher = Student(model, shape_of(model))
    space = _applicable(space, teacher.shape, note)
    note("reading the data")
    data = task.load(settings.data, tokenizer, model.config)
    for line in data.notes:
        note(line)
    note("preparing the target")
    default = replace(task.workload(data), threads=0)  # 0: not asked for
    asked = Workload.parse(settings.workload, default) if settings.workload else default
    profile = _profile(settings.target, asked.threads or None, store, note)
    workload = replace(asked, threads=asked.threads or profile.threads)
    positions = positions_of(model)
    if workload.tokens + workload.generated > positions:
        raise InputError(
            f"workload {workload} needs {workload.tokens + workload.generated} positions, but the model has "
            f"{positions}: give fewer with --workload tokens=..."
        )
    Prices(teacher.shape, profile, workload).check(settings.constraints)
    folder = settings.out / "teacher"
    folder.mkdir(parents=True, exist_ok=True)
    cache = settings.out / "cache"
    cache.mkdir(exist_ok=True)
    pad_id = tokenizer.pad_token_id or 0
    context = Context(
        teacher,
        task,
        data.train,
        pad_id,
        settings.seed,
        settings.device,
        cache=cache,
        unlabelled=data.unlabelled,
        augment=settings.augment,
        tokenizer=tokenizer,
        cache_limit=room(cache) if settings.cache_bytes is None else settings.cache_bytes,
    )
    if baseline is None:
        note("emitting the baseline")
        baseline = runtime.emit(teacher, folder, workload, tuned=profile.name == LOCAL)
    others = tuple(_prices(name, teacher.shape, asked, store, note) for name in settings.others)
    return Problem(
        settings, space, task, data, teacher, tokenizer, runtime, profile, workload, context, baseline, {}, others
    )


def _prices(target: str, teacher: ModelShape, asked: Workload, store: Store, note: Callable[[str], None]) -> Prices:
    profile = _profile(target, asked.threads or None, store, note)
    return Prices(teacher, profile, replace(asked, threads=asked.threads or profile.threads))


def _applicable(space: Space, shape: ModelShape, note: Callable[[str], None]) -> Space:
    """Leave out what needs the architecture map if that does not have the model (techniques, and levels by layer), and
    training, if what is left changes only number formats: an uncut student has nothing to learn from its teacher.

    Raises:
        InputError: if nothing is left.
    """
    if shape.unmapped is not None:
        space = space.without({name: {BY_LAYER: setting.levels[0]} for name, setting in space.layered.items()})
    techniques = {name: registry.get("technique", name) for name, _ in space.techniques}
    missing = [name for name, technique in techniques.items() if technique.needs_map]
    if shape.unmapped is None or not missing:
        return space
    kept = {name: technique for name, technique in techniques.items() if name not in missing}
    training = [name for name, technique in kept.items() if technique.effort]
    if all(technique.numeric or technique.effort for technique in kept.values()):
        first = next((i for i, technique in enumerate(kept.values()) if technique.numeric), len(kept))
        kept = {name: kept[name] for i, name in enumerate(kept) if i > first or not kept[name].effort}
    if not kept:
        raise InputError(
            f"search space '{space.name}' has only what needs the architecture map ({', '.join(missing)}), which does "
            f"not have this '{shape.family}' model: choose another with --space, such as quantize-only"
        )
    idle = [name for name in training if name not in kept]
    note(
        f"the architecture map does not have this '{shape.family}' model: {', '.join(missing)} left out"
        + (f", and {', '.join(idle)}, which would have nothing to recover" if idle else "")
    )
    return space.only(kept)


def _check_device(name: str) -> None:
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"--device '{name}' cannot be used here ({first_line(error)}): use cpu, or cuda where there is one"
        ) from None


def _profile(target: str, threads: int | None, store: Store, note: Callable[[str], None]) -> Profile:
    """Load the target; this machine is measured once a run, so that all of its plans are priced by the same numbers."""
    if target != LOCAL:
        return load_target(target)
    known = store.get("profile")
    if known is not None:
        return parse_profile(known, "the run's profile of this machine")
    profile = load_target(target, threads, note)
    store.put("profile", dump_profile(profile))
    return profile


def clean_leftovers(out: Path) -> None:
    """Remove what an interrupted run left half-written."""
    for part in [*out.glob("candidates/.*"), *out.glob("scratch")]:
        shutil.rmtree(part, ignore_errors=True)
    for pattern in (".*.part", "*/.*.part", "cache/*/.*.part"):
        for part in out.glob(pattern):
            part.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Return the versions of everything a result depends on."""
    names = ("autolite", "torch", "transformers", "onnxruntime", "onnx", "onnxscript", "optuna", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def provenance(problem: Problem) -> Provenance:
    """Return what every candidate of this search came from."""
    return Provenance(
        model_name(problem.settings),
        problem.task,
        problem.profile.name,
        str(problem.workload),
        problem.data.fingerprint,
        versions(),
        problem.tokenizer,
    )


def model_name(settings: Settings) -> str:
    """Name the model for others: a hub name as it is, a folder without the path to it."""
    if settings.model is None:
        return "autolite-demo"
    path = Path(settings.model).expanduser()
    return path.resolve().name if path.exists() else settings.model


def describe_model(problem: Problem) -> dict[str, Any]:
    """Return what `front.json` says of the model."""
    return {
        "name": model_name(problem.settings),
        "family": problem.teacher.shape.family,
        "parameters": sum(p.numel() for p in problem.teacher.model.parameters()),
    }
