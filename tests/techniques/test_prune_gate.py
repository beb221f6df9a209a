"""The gate: pruned in every way at once = reloaded = trained on and saved again = exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from autolite.architecture import shape_of
from autolite.compress import compress
from autolite.contracts import FAMILIES
from autolite.hardware.footprint import file_size
from autolite.parts import matrices_of
from autolite.plan import Plan, make_step
from autolite.reload import load_student, save_student
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.techniques.base import Context, Student
from autolite.techniques.prune import Prune, PruneConfig
from autolite.techniques.share import Share, ShareConfig
from autolite.testing import tiny_inputs

MakeContext = Callable[..., Context]


def pruned(family: str, make_tiny: MakeContext) -> Student:
    """Four layers of which two share their neurons, cut to fewer channels, layers, and its own width in each."""
    context = make_tiny(family, layers=4)
    shared = Share().apply(context.teacher, ShareConfig(part="ffn", groups=3), context)
    one = family == "albert"  # one set of weights
    config = PruneConfig(
        depth=(0, 1, 3),
        heads=(1, 1, 1) if one else (1, 2, 1),
        ffn=(24, 24, 24) if one else (24, 24, 40),
        hidden=0.75,
        round_to=8,
        importance="second-order",
        sparsity="2:4",
    )
    return Prune().apply(shared, config, context)


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(**tiny_inputs(model)).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_pruned_is_stored_trained_and_exported_as_it_is(
    family: str, make_tiny: MakeContext, tmp_path: Path
) -> None:
    student = pruned(family, make_tiny)
    expected = outputs(student.model)
    save_student(student.model, student.shape, tmp_path / "one")
    again, shape = load_student(tmp_path / "one")
    assert shape == student.shape
    assert torch.equal(outputs(again), expected)
    plain: Any = getattr(transformers, type(student.model).__name__).from_pretrained(tmp_path / "one")
    assert torch.equal(outputs(plain.eval()), expected)

    bare: Any = transformers.AutoModel.from_pretrained(tmp_path / "one").eval()
    inputs = tiny_inputs(bare)
    with torch.no_grad():
        states = [model(**inputs).last_hidden_state for model in (bare, plain.base_model)]
    assert torch.equal(*states)

    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-2)
    plain(**tiny_inputs(plain)).logits.square().mean().backward()
    optimizer.step()
    plain.save_pretrained(tmp_path / "two")
    trained, shape = load_student(tmp_path / "two")
    assert shape == student.shape
    assert torch.equal(outputs(trained), outputs(plain))
    assert not torch.equal(outputs(trained), expected)
    assert shape_of(trained).without_formats() == student.shape.without_formats()

    files = OnnxRuntime().emit(student, tmp_path)
    inputs = tiny_inputs(student.model)
    found = OnnxRuntime().load(files[0]).run({name: tensor.numpy() for name, tensor in inputs.items()})["logits"]
    real = inputs["attention_mask"].bool() if expected.ndim == 3 else slice(None)
    torch.testing.assert_close(torch.from_numpy(found)[real], expected[real], atol=1e-4, rtol=1e-4)

    weights = sum(m.weight.numel() for group in matrices_of(student.model).values() for m in group.values())
    size = sum(file.stat().st_size for file in files)
    assert 4 * weights < size
    assert abs(file_size(student.shape) - size) < 0.2 * size  # the graph is most of so small a file's rest


def test_a_pruned_and_trained_student_comes_back_from_disk(make_tiny: MakeContext, tmp_path: Path) -> None:
    pruning = {"hidden": 0.75, "depth": 0.67, "layers": "similarity", "ffn": 0.5, "round_to": 8, "sparsity": "2:4"}
    steps = (
        make_step("prune", {**pruning, "allocation": "isomorphic"}),
        make_step("distill", {"steps": 2, "hidden": 0, "batch_size": 8}),
    )
    made, found = (compress(Plan(steps), make_tiny("bert"), tmp_path) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 1
    assert found.shape == made.shape
    assert found.shape.stacks[0].hidden == 24
    state = made.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.model.state_dict().items())
