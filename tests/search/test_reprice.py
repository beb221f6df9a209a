"""One search, many targets: what a run confirmed, with another target's prices."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jsonschema
import optuna
import pytest
from click.testing import CliRunner
from optuna.trial import create_trial

import autolite
from autolite.architecture import ModelShape
from autolite.cli import main
from autolite.compress import shape_after
from autolite.errors import InputError, RunError, TargetError
from autolite.front import Candidate, Front, Interval, Quality, Result, write_json
from autolite.hardware.predict import predict, predict_faster
from autolite.hardware.profile_files import dump_profile, load_profile
from autolite.limits import Constraints
from autolite.measure import Workload
from autolite.plan import Plan, make_step
from autolite.search.choose import blocked, choose
from autolite.search.reprice import Prices, reprice
from autolite.store import TEACHER_SHAPE, Store
from tests.shapes import bert_shape

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "front.schema.json").read_text(encoding="utf-8"))
SHAPE = bert_shape()
WORKLOAD = Workload(batch=1, tokens=64, threads=4)


def in_format(form: str, *before: Any, attention: str | None = None) -> Plan:
    groups = {"attention": attention or form, "ffn": form, "embedding": form, "head": form}
    return Plan((*before, make_step("quantize", groups)))


# On pixel8 8-bit products are fast: int8 beats bf16 in all three, so that bf16 is not on the front.
INT8, BF16 = in_format("int8"), in_format("bf16")
KMEANS = in_format("kmeans4")
NARROW = (make_step("prune", {"ffn": 0.5}), make_step("distill", {"steps": 20}))


def candidate(plan: Plan, kept: float, prices: Prices) -> Candidate:
    shape = shape_after(plan, SHAPE)
    return Candidate(
        id=plan.digest[:8],
        path=f"candidates/{plan.digest[:8]}",
        plan=plan,
        quality=Quality("accuracy", "maximize", 0.9 * kept, 0.8 * kept, 0.95 * kept, "selection"),
        test=None,
        kept=Interval(kept, kept - 0.03, kept + 0.02),
        artifacts=({"runtime": "onnxruntime", "version": "1", "files": ["model.onnx"]},),
        **prices.of(plan, predict(shape, prices.profile, WORKLOAD)["size_bytes"].value + 1234),  # files have a header
    )


def make_run(
    out: Path,
    confirmed: dict[Plan, float],
    screened: dict[Plan, float] | None = None,
    limits: Constraints | None = None,
    asked: str = "default",
    stage: str = "confirm",
) -> Path:
    """A run on pixel8 as its folder remembers it, without any model: finished, or interrupted in an earlier stage."""
    prices = Prices(SHAPE, load_profile("pixel8"), WORKLOAD)
    candidates = [replace(candidate(plan, kept, prices), stage=stage) for plan, kept in confirmed.items()]
    limits = limits or Constraints()
    front, misses = choose(candidates, limits, ("quality", "latency", "size"))
    out.mkdir()
    (out / ".name").write_text("mine", encoding="utf-8")
    base = predict(SHAPE, prices.profile, WORKLOAD)
    quality = asdict(Quality("accuracy", "maximize", 0.9, 0.8, 0.95, "selection"))
    written = Front(
        model={"name": "minilm", "family": "bert", "parameters": 1},
        task="text-classification",
        target={"name": "pixel8", "runtime": "onnxruntime", "unit": "big"},
        workload=asdict(WORKLOAD),
        baseline={
            "runtime": "onnxruntime",
            "latency_ms": base["latency_ms"].to_json(),
            "size_bytes": base["size_bytes"].to_json(),
            "path": "teacher/model.onnx",
        },
        teacher={"quality": quality, "test": None},
        confidence={"level": 0.95, "scored_on": "a processor"},
        constraints=limits,
        objectives=("quality", "latency", "size"),
        candidates=tuple(front),
        nearest_misses=blocked(misses, limits),
        budget={"asked": "1h", "spent_seconds": 3600.0, "trials": {}},
        versions={},
        complete=stage == "confirm",
    )
    write_json(out / "front.json", written.to_json())
    url = f"sqlite:///{out / 'study.db'}"
    store = Store(url, "mine")
    store.put(TEACHER_SHAPE, SHAPE.to_json())
    store.put("identity", {"workload": asked})
    store.close()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trials: dict[str, list[tuple[list[float], dict[str, Any]]]] = {"screen": [], "recover": [], "confirm": []}
    for one in candidates if stage == "confirm" else ():
        values = [one.quality.value, one.latency_ms.value, one.size_bytes.value]
        trials["confirm"].append((values, {"candidate": one.to_json()}))
    for plan, kept in (screened or {}).items():
        one = candidate(plan, kept, prices)
        values = [one.quality.value, one.latency_ms.value, one.size_bytes.value]
        trials["screen"].append((values, {"plan": plan.to_json(), "kept": kept}))
    for name, done in trials.items():
        study = optuna.create_study(
            study_name=f"mine/{name}", storage=url, directions=["maximize", "minimize", "minimize"]
        )
        study.add_trial(create_trial(values=[0.9, 1.0, 1.0], user_attrs={"teacher": True}))
        for values, attributes in done:
            study.add_trial(create_trial(values=values, user_attrs=attributes))
    return out


@pytest.fixture
def board(tmp_path: Path) -> Callable[..., str]:
    """Write a profile like pixel8's with slow 8-bit products, and what else is asked for; returns its path."""

    def write(lacks: tuple[str, ...] = ()) -> str:
        profile = load_profile("pixel8")
        peaks = {**profile.unit.peak, "int8": profile.unit.peak["int8"].model_copy(update={"value": 5.0})}
        unit = profile.unit.model_copy(update={"peak": peaks})
        formats = {form: kernels for form, kernels in profile.formats.items() if form not in lacks}
        changed = profile.model_copy(update={"name": "board", "units": (unit,), "formats": formats})
        (tmp_path / "board.yaml").write_text(dump_profile(changed), encoding="utf-8")
        return str(tmp_path / "board.yaml")

    return write


def ids(found: Front) -> list[str]:
    return [c.id for c in found]


def test_the_runs_own_target_gives_the_runs_own_front(finished: Result) -> None:
    found = reprice(finished, "pixel8")
    assert found.front == finished.front
    assert not found.refused
    assert not found.removed


def test_another_target_changes_prices_and_leaves_quality(finished: Result) -> None:
    found = reprice(finished.path, "raspberry-pi-5").front
    profile = load_profile("raspberry-pi-5")
    own = {c.id: c for c in finished.front}
    both = [c for c in found if c.id in own]
    assert both
    for one in both:
        before = own[one.id]
        assert (one.kept, one.quality, one.test) == (before.kept, before.quality, before.test)
        assert one.size_bytes.value == before.size_bytes.value
        assert one.latency_ms.value != before.latency_ms.value
        assert one.latency_ms.source == one.faster.source == one.memory_bytes.source == "predicted"
        manifest = json.loads((finished.path / before.path / "autolite.json").read_text(encoding="utf-8"))
        shape = ModelShape.from_json(manifest["shape"])  # as the student was really built
        workload = Workload(**found.workload)
        assert one.latency_ms == predict(shape, profile, workload)["latency_ms"]
    named = {"name": "raspberry-pi-5", "runtime": "onnxruntime", "unit": profile.default_unit}
    assert found.target.items() >= named.items()
    assert sum(found.target["basis"].values()) == pytest.approx(1, abs=1e-3)
    assert found.workload == {**finished.front.workload, "threads": profile.threads}


def test_the_front_is_what_the_schema_promises(finished: Result) -> None:
    jsonschema.validate(json.loads(json.dumps(reprice(finished, "x86-avx512").front.to_json())), SCHEMA)
    none = reprice(finished, "x86-avx512", max_latency="1us").front
    assert not none.candidates
    assert none.nearest_misses
    jsonschema.validate(json.loads(json.dumps(none.to_json())), SCHEMA)


def test_what_was_dominated_on_the_runs_target_comes_back(tmp_path: Path, board: Callable[..., str]) -> None:
    run = make_run(tmp_path / "run", {INT8: 0.99, BF16: 0.98})
    int8, bf16 = INT8.digest[:8], BF16.digest[:8]
    assert ids(autolite.read_front(run)) == [int8]
    found = reprice(run, board())
    assert ids(found.front) == [bf16, int8]
    assert bf16 in found.removed
    slow, fast = (shape_after(plan, SHAPE) for plan in (INT8, BF16))
    profile = load_profile(board())
    assert found.front.candidates[0].faster == predict_faster(SHAPE, fast, profile, WORKLOAD)
    assert found.front.candidates[1].latency_ms == predict(slow, profile, WORKLOAD)["latency_ms"]
    assert found.front.baseline["latency_ms"] == predict(SHAPE, profile, WORKLOAD)["latency_ms"].to_json()


def test_what_the_target_cannot_run_is_refused_by_the_name_of_its_format(
    tmp_path: Path, board: Callable[..., str]
) -> None:
    run = make_run(tmp_path / "run", {INT8: 0.99, KMEANS: 0.95})
    found = reprice(run, board(lacks=("kmeans4",)))
    assert ids(found.front) == [INT8.digest[:8]]
    assert list(found.refused) == [KMEANS.digest[:8]]
    assert "board cannot run kmeans4" in found.refused[KMEANS.digest[:8]]
    with pytest.raises(TargetError, match=r"none of the 2 candidates .* can run on board: board cannot run int8"):
        reprice(run, board(lacks=("kmeans4", "int8")))


def test_plans_that_were_only_screened_are_counted_where_they_beat_the_front(
    tmp_path: Path, board: Callable[..., str]
) -> None:
    narrow = in_format("bf16", *NARROW)
    screened = {narrow: 0.985, in_format("bf16", make_step("distill", {"steps": 20})): 0.999, in_format("int4"): 0.1}
    run = make_run(tmp_path / "run", {INT8: 0.99, BF16: 0.98}, screened)
    assert not reprice(run, "pixel8").promising  # bf16 gains nothing there, and int4 is worse, not better
    found = reprice(run, board())
    # Not the plan that was confirmed with other training: its better score of before is noise.
    assert [c.plan for c in found.promising] == [narrow]
    assert found.promising[0].stage == "screen"
    assert not reprice(run, board(), max_drop=0.01).promising
    done = CliRunner().invoke(main, ["front", str(run), "--target", board()])
    assert "Plans that were only screened and look better here: 1;" in done.output


def test_limits_choose_anew(tmp_path: Path, board: Callable[..., str]) -> None:
    run = make_run(tmp_path / "run", {INT8: 0.99, KMEANS: 0.9}, limits=Constraints(max_drop=0.05))
    assert ids(reprice(run, board()).front) == [INT8.digest[:8]]
    assert set(ids(reprice(run, board(), max_drop="20%").front)) == {INT8.digest[:8], KMEANS.digest[:8]}
    size = predict(shape_after(KMEANS, SHAPE), load_profile("pixel8"), WORKLOAD)["size_bytes"].value + 1234
    assert ids(reprice(run, board(), max_drop="20%", max_size=size).front) == [KMEANS.digest[:8]]
    assert reprice(run, board(), max_size=size).front.nearest_misses
    assert reprice(run, board()).front.constraints == Constraints(max_drop=0.05)


def test_the_workload_is_the_runs_own_on_the_threads_of_the_target(tmp_path: Path) -> None:
    eight = load_profile("x86-avx512").threads
    run = make_run(tmp_path / "run", {INT8: 0.99})
    assert reprice(run, "x86-avx512").front.workload == asdict(replace(WORKLOAD, threads=eight))
    found = reprice(run, "x86-avx512", workload="tokens=32,threads=2").front
    assert found.workload == asdict(Workload(1, 32, 2))
    asked = make_run(tmp_path / "asked", {INT8: 0.99}, asked="threads=4")
    assert reprice(asked, "x86-avx512").front.workload == asdict(WORKLOAD)
    with pytest.raises(InputError, match="positions"):
        reprice(run, "x86-avx512", workload="tokens=4000")


def test_it_needs_neither_weights_nor_the_model(finished: Result, tmp_path: Path) -> None:
    """In a process of its own: nothing is left of the run but its study, and no runtime or data set is imported."""
    for name in ("study.db", ".name", "front.json"):
        shutil.copy(finished.path / name, tmp_path / name)
    code = (
        "import sys, autolite\n"
        f"front = autolite.reprice({str(tmp_path)!r}, 'raspberry-pi-5').front\n"
        "heavy = ('onnxruntime', 'onnx', 'openvino', 'datasets', 'pandas')\n"
        "print(len(front), [m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{len(reprice(finished, 'raspberry-pi-5').front)} []"


def test_a_run_that_did_not_keep_the_shape_is_read_off_a_candidate_in_other_formats(
    tmp_path: Path, board: Callable[..., str]
) -> None:
    run = make_run(tmp_path / "run", {in_format("int8", *NARROW): 0.9, INT8: 0.99})
    expected = reprice(run, board()).front
    store = Store(f"sqlite:///{run / 'study.db'}", "mine")
    store.put(TEACHER_SHAPE, None)
    store.close()
    with pytest.raises(RunError, match=r"earlier version.*larger --budget"):
        reprice(run, board())
    for plan in (in_format("int8", *NARROW), INT8):  # only the second has all of the teacher's layers and widths
        folder = run / "candidates" / plan.digest[:8]
        folder.mkdir(parents=True)
        write_json(folder / "autolite.json", {"shape": shape_after(plan, SHAPE).to_json()})
    assert reprice(run, board()).front == expected


def test_a_run_that_was_interrupted_before_it_confirmed_anything_has_its_early_candidates(
    tmp_path: Path, board: Callable[..., str]
) -> None:
    found = reprice(make_run(tmp_path / "run", {INT8: 0.99}, stage="recover"), board()).front
    assert ids(found) == [INT8.digest[:8]]
    assert found.candidates[0].stage == "recover"
    assert not found.complete


def test_the_table_names_the_target_and_the_change_of_rank(tmp_path: Path, board: Callable[..., str]) -> None:
    run = make_run(tmp_path / "run", {INT8: 0.99, BF16: 0.98, KMEANS: 0.95})
    done = CliRunner().invoke(main, ["front", str(run), "--target", board(lacks=("kmeans4",))])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].startswith("minilm on board: latency predicted, ")
    assert re.search(
        r"Predicted latencies rest on numbers that are \d+ % \w+.*: autolite targets show board", done.output
    )
    (bf16,) = [line.split() for line in lines if line.startswith(f"{BF16.digest[:8]}  -")]
    (int8,) = [line.split() for line in lines if line.startswith(f"{INT8.digest[:8]}  ") and "%" in line]
    assert (bf16[1], int8[1]) == ("-", f"{ids(autolite.read_front(run)).index(INT8.digest[:8]) + 1}.")
    assert lines.index(next(x for x in lines if x.startswith(BF16.digest[:8]))) < lines.index(
        next(x for x in lines if x.startswith(INT8.digest[:8]))
    )
    assert "as scored on the run's processor, a processor" in done.output
    assert f"Refused: {KMEANS.digest[:8]}: board cannot run kmeans4" in done.output


def test_json_on_standard_output_is_the_front(finished: Result) -> None:
    done = CliRunner().invoke(main, ["front", str(finished.path), "--target", "raspberry-pi-5", "--json"])
    assert done.exit_code == 0, done.output
    jsonschema.validate(json.loads(done.stdout), SCHEMA)
    assert Front.from_json(json.loads(done.stdout)) == reprice(finished, "raspberry-pi-5").front


def test_bad_usage_is_one_sentence(tmp_path: Path, finished: Result) -> None:
    def error(*words: str) -> str:
        done = CliRunner().invoke(main, ["front", *words])
        assert done.exit_code == 2
        assert "Traceback" not in done.output
        return done.output

    run = make_run(tmp_path / "run", {INT8: 0.99})
    assert "did you mean 'raspberry-pi-5'" in error(str(run), "--target", "raspbery-pi-5")
    assert "--workload needs --target" in error(str(run), "--workload", "tokens=3")
    assert "threads=64" in error(str(run), "--target", "pixel8", "--workload", "threads=64")
    assert "no such run" in error(str(tmp_path / "no"), "--target", "pixel8")
    (tmp_path / "other.db").touch()
    assert "has no study of the run 'mine'" in error(
        str(run), "--target", "pixel8", "--storage", f"sqlite:///{tmp_path / 'other.db'}"
    )
    (run / "study.db").unlink()
    assert "has no run" in error(str(run), "--target", "pixel8")
