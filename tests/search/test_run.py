"""A whole search as its user meets it: what it leaves, going on, growing, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnxruntime
import optuna
import pytest
import torch
import transformers
from optuna.trial import TrialState

import autolite
from autolite.errors import AutoliteError, InputError, ModelError, NoCandidateError, PlanError, RunError
from autolite.files import sha256
from autolite.front import Result
from autolite.runtime import modelfile
from autolite.runtime.requirements import required
from autolite.search import engine
from autolite.search.progress import Snapshot
from autolite.store import Store
from autolite.techniques.distill import Distill
from tests.conftest import RunSearch, write_jsonl

SCHEMA = Path(__file__).parents[2] / "docs" / "front.schema.json"


def studies(run: Path) -> dict[str, optuna.Study]:
    url = f"sqlite:///{run / 'study.db'}"
    stages = ("screen", "recover", "confirm")
    return {stage: optuna.load_study(study_name=f"{run.name}/{stage}", storage=url) for stage in stages}


def completed(run: Path) -> dict[tuple[str, str], list[float]]:
    """The values of every evaluated trial of the three studies, by stage and plan; the teachers are left out."""
    found = [
        ((stage, t.user_attrs["plan_digest"]), t.values)
        for stage, study in studies(run).items()
        for t in study.get_trials(states=(TrialState.COMPLETE,))
        if not (t.user_attrs.get("teacher") or t.user_attrs.get("infeasible"))
    ]
    assert len(dict(found)) == len(found), "a plan was evaluated twice in a study"
    return dict(found)


def test_front_json_is_what_the_schema_promises(finished: Result) -> None:
    data = json.loads((finished.path / "front.json").read_text(encoding="utf-8"))
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(data, schema)
    assert data["candidates"]
    assert data["complete"]


def test_no_candidate_of_the_front_beats_another(finished: Result) -> None:
    points = [(-c.kept.value, c.latency_ms.value, c.size_bytes.value) for c in finished.front]
    for one in points:
        assert not any(all(a <= b for a, b in zip(o, one, strict=True)) and o != one for o in points)


def test_the_budget_is_kept_to_the_trial(finished: Result) -> None:
    assert len(completed(finished.path)) == 8


def test_trial_0_of_each_study_is_the_teacher(finished: Result) -> None:
    for study in studies(finished.path).values():
        assert study.trials[0].user_attrs["teacher"]
        assert study.trials[0].values[2] == (finished.path / "teacher" / "model.onnx").stat().st_size


def test_every_candidate_runs_in_plain_onnxruntime_with_the_quality_and_size_that_is_claimed(
    finished: Result, tiny_data: Path
) -> None:
    rows = [json.loads(line) for line in tiny_data.read_text(encoding="utf-8").splitlines()]
    for candidate in finished.front:
        folder = finished.path / candidate.path
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer([r["text"] for r in rows], padding=True, return_tensors="np")
        manifest = json.loads((folder / "autolite.json").read_text(encoding="utf-8"))
        assert manifest["artifacts"][0]["requires"] == required(folder / "model.onnx")
        assert manifest["inputs"] == [i.name for i in session.get_inputs()]
        (logits,) = session.run(None, {name: inputs[name].astype(np.int64) for name in manifest["inputs"]})
        accuracy = float((logits.argmax(-1) == [r["label"] for r in rows]).mean())
        assert candidate.test is not None
        assert abs(accuracy - candidate.test.value) < 0.25  # other rows, and 40 of them only
        assert candidate.size_bytes.value == (folder / "model.onnx").stat().st_size


def test_every_candidate_reloads_in_transformers_and_in_the_pipeline(finished: Result) -> None:
    for candidate in finished.front:
        folder = finished.path / candidate.path
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        text = "w3 great w5 w7"
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        (found,) = autolite.pipeline(str(folder))(text)
        assert found["label"] in model.config.id2label.values()
        # The artifact also quantizes activations; the reloaded model computes with them in float32.
        assert abs(found["score"] - float(expected.max())) < 0.15
        manifest = json.loads((folder / "autolite.json").read_text(encoding="utf-8"))
        assert manifest["plan_digest"] == candidate.plan.digest


def test_weights_too_large_for_one_file_follow_their_model_everywhere(
    run_search: RunSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modelfile, "MAX_PROTOBUF", 10_000)
    result = run_search(out=tmp_path / "run", budget="3trials")
    picked = result.pick(max_drop=1.0)
    (artifact,) = picked.candidate.artifacts
    assert artifact["files"] == ["model.onnx", "model.onnx.data"]
    assert picked.candidate.size_bytes.value == sum((picked.folder / f).stat().st_size for f in artifact["files"])
    out = picked.export(tmp_path / "deploy")
    manifest = json.loads((out / "autolite.json").read_text(encoding="utf-8"))
    assert {name: manifest["sha256"][name] for name in artifact["files"]} == {
        name: sha256(out / name) for name in artifact["files"]
    }
    expected = autolite.pipeline(str(out))("w1 great")
    ort = picked.export(tmp_path / "phone", format="ort")
    assert autolite.pipeline(str(ort))("w1 great") == expected
    assert not list(ort.glob("model.onnx*"))
    (out / "model.onnx.data").unlink()
    with pytest.raises(ModelError, match="which is not beside it"):
        autolite.pipeline(str(out))


def test_pick_and_export_give_a_folder_that_runs(
    finished: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picked = finished.pick(max_drop=0.9)
    assert picked.candidate.latency_ms.value == min(c.latency_ms.value for c in finished.front)
    out = picked.export(tmp_path / "deploy")
    assert autolite.pipeline(str(out))("w1 great")[0]["score"] > 0.5
    with pytest.raises(InputError, match="not an empty folder"):
        picked.export(out)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    picked.export(".")
    assert {f.name for f in Path().iterdir()} == {f.name for f in out.iterdir()}
    assert {f.name for f in tmp_path.iterdir()} == {"deploy", "here"}, "nothing half-done is left"
    with pytest.raises(NoCandidateError, match=r"max_size.*nearest"):
        finished.pick(max_size_bytes=10)


def test_the_frame_has_a_row_a_candidate(finished: Result) -> None:
    frame = finished.front.to_frame()
    assert list(frame["id"]) == [c.id for c in finished.front]


def test_equal_plans_and_seeds_give_equal_results(finished: Result, run_search: RunSearch, tmp_path: Path) -> None:
    again = run_search(out=tmp_path / "again")
    ours, theirs = (strip(r.front.to_json()) for r in (again, finished))
    assert ours == theirs


def strip(front: dict[str, Any]) -> dict[str, Any]:
    """A front without what differs between equal runs: the time spent."""
    return {**front, "budget": {**front["budget"], "spent_seconds": 0}}


def test_a_finished_run_answers_at_once_and_goes_on_when_the_budget_grows(
    run_search: RunSearch, tmp_path: Path
) -> None:
    seen: list[Snapshot] = []
    out = tmp_path / "grows"
    first = run_search(out=out, budget="4trials")
    before = completed(out)
    run_search(out=out, budget="4trials", observer=seen.append)
    assert not seen
    store = Store(f"sqlite:///{out / 'study.db'}", "grows")
    finished: list[Any] = []

    def watch(shown: Snapshot) -> None:
        seen.append(shown)
        finished.append(store.get("finished"))

    run_search(out=out, budget="7trials", observer=watch)
    assert not any(finished)  # a worker that comes now waits for its trials
    store.close()
    after = completed(out)
    assert len(before) == 4
    assert len(after) == 7
    assert before.items() <= after.items()
    assert len(first.front) >= 1


@pytest.mark.slow
def test_a_run_goes_on_from_trials_to_time_and_with_more_time(run_search: RunSearch, tmp_path: Path) -> None:
    out = tmp_path / "r"
    spent = run_search(out=out, budget="3trials").front.budget["spent_seconds"]
    trials = completed(out)
    for _ in range(2):
        spent = run_search(out=out, budget=f"{3 * spent + 20:.0f}s").front.budget["spent_seconds"]
        more = completed(out)
        assert trials.items() < more.items()
        trials = more


def test_a_space_with_fewer_plans_than_trials_ends(
    run_search: RunSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MAX_FRUITLESS", 20)
    space = tmp_path / "few.yaml"
    stages = "".join(f"  {stage}: {{trials: 9, effort: 0}}\n" for stage in ("screen", "recover", "confirm"))
    steps = "steps: [{quantize: {ffn: [int8, fp32]}}]"
    space.write_text(f"name: few\ndescription: two plans\n{steps}\nstages:\n{stages}", encoding="utf-8")
    result = run_search(out=tmp_path / "r", space=str(space), budget="50trials")
    assert len(completed(tmp_path / "r")) == 4  # both plans, screened and confirmed
    assert result.front.complete


def test_other_constraints_on_a_finished_run_choose_anew(run_search: RunSearch, tmp_path: Path) -> None:
    out = tmp_path / "r"
    wide = run_search(out=out, space="quantize-only", budget="12trials").front
    trials = completed(out)
    limit = min(c.size_bytes.value for c in wide)
    narrow = run_search(out=out, space="quantize-only", budget="12trials", max_size=limit).front
    assert all(c.size_bytes.value <= limit for c in narrow)
    again = run_search(out=out, space="quantize-only", budget="12trials").front
    assert {c.id for c in again} == {c.id for c in wide}
    assert all((out / c.path / "model.onnx").is_file() for c in again)
    assert completed(out) == trials


def test_a_candidate_folder_that_was_deleted_is_made_anew(run_search: RunSearch, tmp_path: Path) -> None:
    out = tmp_path / "r"
    front = run_search(out=out, budget="3trials").front
    before = {c.id: (out / c.path / "model.onnx").read_bytes() for c in front}
    shutil.rmtree(out / "candidates")
    (out / "front.json").write_text("{", encoding="utf-8")
    front = run_search(out=out, budget="3trials").front
    assert {c.id: (out / c.path / "model.onnx").read_bytes() for c in front} == before


def test_a_storage_url_keeps_the_study_elsewhere_and_apart(run_search: RunSearch, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'team.db'}"
    for parent in ("a", "b"):
        result = run_search(out=tmp_path / parent / "run", storage=storage, budget="2trials")
        assert result.front.complete
        assert not (result.path / "study.db").exists()
    assert len(optuna.get_all_study_names(storage)) == 6


def test_a_wrong_option_can_be_corrected_in_the_same_folder(run_search: RunSearch, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        run_search(out=tmp_path / "r", workload="tokens=9999")
    assert run_search(out=tmp_path / "r", workload="tokens=9", budget="2trials").front.workload["tokens"] == 9


def test_a_training_that_diverges_is_told_and_the_search_goes_on(
    run_search: RunSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Distill.apply, []

    def diverges_once(self: Distill, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise PlanError("the loss is not finite: lower learning_rate")
        return original(self, *arguments)

    monkeypatch.setattr(Distill, "apply", diverges_once)
    result = run_search(out=tmp_path / "r", budget="4trials")
    refused = [t for s in studies(result.path).values() for t in s.trials if t.user_attrs.get("infeasible")]
    assert "learning_rate" in refused[0].user_attrs["infeasible"]
    assert len(completed(result.path)) == 4


def test_constraints_that_nothing_meets_end_with_the_nearest_misses(
    run_search: RunSearch, hopeless_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "misses"
    told = r"on pixel8 misses min_quality by .*front\.json; .*on x86-avx512 misses min_quality .*front-x86-avx512\.json"
    with pytest.raises(NoCandidateError, match=told) as caught:
        run_search(data=hopeless_data, target="pixel8,x86-avx512", out=out, budget="3trials", min_quality=0.95)
    assert caught.value.exit_code == 3
    for target in (None, "x86-avx512"):
        front = autolite.read_front(out, target)
        assert not front.candidates
        assert front.nearest_misses[0]["blocked_by"].keys() == {"min_quality"}
        assert (out / front.nearest_misses[0]["path"] / "model.onnx").is_file()


def test_a_limit_below_the_whole_space_is_refused_before_training(run_search: RunSearch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--max-size.*cannot be met: the least"):
        run_search(out=tmp_path / "r", max_size="1kB")
    assert not (tmp_path / "r" / "students").exists()


def test_another_model_in_the_same_folder_is_refused_and_nothing_is_lost(
    finished: Result, run_search: RunSearch, tiny_data: Path, tmp_path: Path
) -> None:
    before = (finished.path / "front.json").read_bytes()
    rows = [json.loads(line) for line in tiny_data.read_text(encoding="utf-8").splitlines()]
    other = write_jsonl(tmp_path / "other.jsonl", rows[:-1])
    with pytest.raises(RunError, match=r"another data .*--out"):
        run_search(out=finished.path, data=other)
    with pytest.raises(RunError, match="another target"):
        run_search(out=finished.path, target="raspberry-pi-5")
    assert (finished.path / "front.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "pixle8"}, "did you mean 'pixel8'"),
        ({"space": "defualt"}, "did you mean 'default'"),
        ({"task": "text-clasification"}, "did you mean 'text-classification'"),
        ({"budget": "soon"}, "15m"),
        ({"max_drop": "150%"}, "--max-drop"),
        ({"data": "no/such/file.jsonl"}, "no/such/file.jsonl"),
        ({"model": "no/such/folder"}, "no/such/folder"),
        ({"data": None}, "data is missing"),
        ({"label": "lable"}, "did you mean 'label'"),
        ({"workload": "tokens=9999"}, "positions"),
        ({"workload": "token=9"}, "tokens"),
        ({"device": "gpu0"}, "--device"),
        ({"min_quality": float("nan")}, "--min-quality"),
        ({"min_quality": 95}, "--min-quality"),
        ({"storage": "nonsense"}, "storage URL"),
    ],
)
def test_bad_input_is_one_sentence(run_search: RunSearch, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(AutoliteError, match=message) as caught:
        run_search(out=tmp_path / "r", **change)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f.write_text(""), "empty"),
        (lambda f: f.write_text('{"text": "w1 w2", "label": "excellent"}\n' * 40), "excellent"),
        (lambda f: f.write_text('{"stuff": "w1 w2", "label": 1}\n' * 40), "--text"),
        (lambda f: f.write_text('{"text": "w1", "label": 1}\n{"text": \n'), "line 2"),
        (lambda f: f.write_bytes(b"\xff\xfe\x00bad"), "reviews.jsonl"),
    ],
)
def test_bad_data_is_one_sentence(run_search: RunSearch, tmp_path: Path, make: Any, message: str) -> None:
    file = tmp_path / "reviews.jsonl"
    make(file)
    with pytest.raises(AutoliteError, match=message) as caught:
        run_search(out=tmp_path / "r", data=file)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_bad_model_is_one_sentence(run_search: RunSearch, tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_teacher, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(AutoliteError, match="pickle"):
        run_search(out=tmp_path / "r", model=folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}), encoding="utf-8")
    with pytest.raises(
        AutoliteError, match="'mamba' model, of which transformers has no class for AutoModelForSequence"
    ):
        run_search(out=tmp_path / "r", model=folder)


def test_a_study_that_is_no_database_is_named(run_search: RunSearch, tmp_path: Path) -> None:
    out = tmp_path / "r"
    out.mkdir()
    (out / "study.db").write_bytes(b"half a page of something that is no database at all " * 40)
    with pytest.raises(RunError, match="not a readable study"):
        run_search(out=out)


def test_half_a_study_is_named(run_search: RunSearch, tmp_path: Path) -> None:
    out = tmp_path / "r"
    run_search(out=out, budget="2trials")
    (out / "front.json").unlink()
    assert not list(out.glob("study.db-*")), "a run that ended leaves one file"
    whole = (out / "study.db").read_bytes()
    (out / "study.db").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match="not a readable study"):
        run_search(out=out, budget="2trials")


@pytest.mark.parametrize("runtime", ["onnxruntime", "fake"])
def test_every_runtime_carries_a_search(run_search: RunSearch, tmp_path: Path, runtime: str) -> None:
    result = run_search(out=tmp_path / runtime, runtime=runtime, budget="3trials")
    assert result.front.target["runtime"] == runtime
    assert len(completed(result.path)) == 3


@pytest.mark.parametrize("target", ["iphone-15", "raspberry-pi-5", "x86-avx2"])  # with kernels of their own
def test_every_target_carries_a_search(run_search: RunSearch, tmp_path: Path, target: str) -> None:
    result = run_search(out=tmp_path / target, target=target, budget="2trials", space="quantize-only")
    assert all(c.latency_ms.source == "predicted" for c in result.front)
