"""What every runtime promises, and how files that are no models are refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from autolite import registry
from autolite.contracts import tiny_context
from autolite.errors import ModelError
from autolite.formats import FORMATS
from autolite.techniques.base import Student
from autolite.techniques.quantize import Quantize, QuantizeConfig

MISSING = pytest.mark.skipif(find_spec("openvino") is None, reason="needs autolite[openvino]")
runtimes = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[MISSING] * (name == "openvino")) for name in registry.names("runtime")]
)
INPUTS = {
    "input_ids": np.array([[5, 6, 7, 8], [9, 10, 1, 1]], np.int64),
    "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.int64),
}


def student(family: str = "bert", task: str = "text-classification", seed: int = 0, **formats: str) -> Student:
    context = tiny_context(family, registry.get("task", task), seed)
    return Quantize().apply(context.teacher, QuantizeConfig(**formats), context) if formats else context.teacher


@runtimes
def test_what_is_emitted_runs_again_and_again(name: str, tmp_path: Path) -> None:
    runtime = registry.get("runtime", name)
    files = runtime.emit(student(), tmp_path)
    assert all(file.is_file() and file.parent == tmp_path for file in files)
    runner = runtime.load(files[0], threads=2)
    first, second = runner.run(INPUTS)["logits"], runner.run(INPUTS)["logits"]
    assert first.shape == (2, 3)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, second)
    assert runtime.version


@runtimes
def test_padding_changes_nothing(name: str, tmp_path: Path) -> None:
    runtime = registry.get("runtime", name)
    runner = runtime.load(runtime.emit(student(), tmp_path)[0])
    alone = runner.run({key: array[1:, :2] for key, array in INPUTS.items()})["logits"]
    np.testing.assert_allclose(runner.run(INPUTS)["logits"][1:], alone, atol=1e-5)


@runtimes
def test_language_models_answer_at_every_token_and_do_not_look_ahead(name: str, tmp_path: Path) -> None:
    runtime = registry.get("runtime", name)
    runner = runtime.load(runtime.emit(student("llama", "language-modeling"), tmp_path)[0])
    whole = runner.run(INPUTS)["logits"]
    assert whole.shape == (2, 4, 96)
    start = runner.run({key: array[:, :2] for key, array in INPUTS.items()})["logits"]
    np.testing.assert_allclose(whole[:, :2], start, atol=1e-5)


# What `auto` writes untimed is what ONNX Runtime's own adapter writes, so that its formats are those of the rows above;
# `fake` computes with none of them.
@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(
            name, form, marks=[MISSING] * (name == "openvino") + [pytest.mark.slow] * (name in ("auto", "fake"))
        )
        for name in registry.names("runtime")
        for form in FORMATS
    ],
)
def test_every_format_it_claims_is_run(name: str, form: str, tmp_path: Path) -> None:
    runtime = registry.get("runtime", name)
    assert form in runtime.formats
    table = form if FORMATS[form].embedding else "fp32"
    made = student(attention=form, ffn=form, embedding=table, head=form)
    logits = runtime.load(runtime.emit(made, tmp_path)[0]).run(INPUTS)["logits"]
    assert np.isfinite(logits).all()


@runtimes
def test_equal_students_give_equal_bytes_and_others_do_not(name: str, tmp_path: Path) -> None:
    runtime = registry.get("runtime", name)
    contents = [
        b"".join(file.read_bytes() for file in runtime.emit(made, tmp_path / str(i)))
        for i, made in enumerate((student(), student(), student(seed=1), student(ffn="int8")))
    ]
    assert contents[0] == contents[1]
    assert len(set(contents)) == 3


@runtimes
def test_missing_truncated_and_foreign_files_are_refused_in_one_sentence(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runtime = registry.get("runtime", name)
    file, *_ = runtime.emit(student(), tmp_path)
    with pytest.raises(ModelError, match="missing"):
        runtime.load(tmp_path / "missing")
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"%PDF-1.7 not a model", b'{"fake": 2}'):
        file.write_bytes(content)
        with pytest.raises(ModelError, match=file.name) as caught:
            runtime.load(file)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_the_fake_runtime_knows_models_apart(tmp_path: Path) -> None:
    runtime = registry.get("runtime", "fake")
    outputs = [
        runtime.load(runtime.emit(made, tmp_path / str(i))[0]).run(INPUTS)["logits"]
        for i, made in enumerate((student(), student(seed=1), student(head="int8")))
    ]
    assert not np.array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])
    assert np.abs(np.stack(outputs)).max() <= 1
