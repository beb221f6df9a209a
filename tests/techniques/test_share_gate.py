"""The gate of sharing: written out = shared = reloaded and trained on = exported; what is shared is stored once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from safetensors import safe_open

from autolite import contracts
from autolite.architecture import ModelShape, shape_of
from autolite.compress import compress
from autolite.errors import PlanError
from autolite.export import decoded
from autolite.hardware.predict import predict
from autolite.hardware.profile_files import load_profile
from autolite.measure import Workload
from autolite.parts import layers_of, matrices_of
from autolite.plan import Plan, make_step
from autolite.reload import load_student, save_student
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.techniques.base import Student
from autolite.techniques.importance import taylor
from autolite.techniques.quantize import Quantize, QuantizeConfig
from autolite.techniques.share import Share, ShareConfig
from autolite.testing import tiny_inputs, tiny_model
from tests.relaxed import FAMILIES, logits, relaxed, task_of, written_out

families = pytest.mark.parametrize("family", FAMILIES)


def exported(student: Student, folder: Path) -> tuple[Path, np.ndarray]:
    (file,) = OnnxRuntime().emit(student, folder)
    inputs = {name: tensor.numpy() for name, tensor in tiny_inputs(student.model).items()}
    return file, OnnxRuntime().load(file).run(inputs)["logits"]


def real(values: Any, model: Any) -> np.ndarray:
    """The logits of tokens that are no padding."""
    values = np.asarray(values)
    return values[tiny_inputs(model)["attention_mask"].bool().numpy()] if values.ndim == 3 else values


@families
def test_written_out_is_shared_is_exported(family: str, tmp_path: Path) -> None:
    plain, shared = relaxed(family)
    reference = real(logits(written_out(shared, plain)), plain)
    _, found = exported(Student(shared, shape_of(shared)), tmp_path)
    np.testing.assert_allclose(real(logits(shared), plain), reference, atol=1e-5, rtol=0)
    np.testing.assert_allclose(real(found, plain), reference, atol=2e-5, rtol=0)


@families
def test_a_folder_reloads_is_trained_on_and_saved_again(family: str, tmp_path: Path) -> None:
    plain, shared = relaxed(family)
    save_student(shared, shape_of(shared), tmp_path / "one")
    kind = getattr(transformers, type(shared).__name__)
    loaded, info = kind.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(loaded), logits(shared))
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as stream:
        assert len(stream.keys()) == len(list(shared.parameters()))
    labels = tiny_inputs(plain)["input_ids"] if task_of(family) == "language-modeling" else torch.tensor([0, 1, 2])
    optimizer = torch.optim.Adam(loaded.parameters(), lr=1e-2)
    for _ in range(2):
        torch.autograd.backward(loaded(**tiny_inputs(loaded), labels=labels).loss)
        assert all(p.grad is not None and p.grad.any() for n, p in loaded.named_parameters() if "down" in n)
        optimizer.step()
    loaded.save_pretrained(tmp_path / "two")
    again, shape = load_student(tmp_path / "two")
    assert torch.equal(logits(again), logits(loaded))
    assert not torch.equal(logits(again), logits(shared))
    assert shape == shape_of(again) == shape_of(shared)
    torch.testing.assert_close(logits(again), logits(written_out(again, plain_norms(again, plain))), atol=1e-4, rtol=0)


def plain_norms(trained: Any, plain: Any) -> Any:
    """`plain` with all that was trained beside the layers' projections."""
    ours, theirs = dict(trained.named_parameters()), dict(plain.named_parameters())
    with torch.no_grad():
        for name in ours.keys() & theirs.keys():
            theirs[name].copy_(ours[name])
    return plain


# Of each format the rounding of activations, which is the runtime's own, is what differs from the decoded model.
FORMATS = {"bf16": 1e-4, "int8": 0.15, "int8-static": 0.35, "int4": 0.2, "kmeans4": 0.2}


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3", "vit"])
@pytest.mark.parametrize("form", FORMATS)
def test_quantized_models_compute_with_the_decoded_matrices_and_factors(family: str, form: str, tmp_path: Path) -> None:
    context = contracts.tiny_context(family, contracts.tiny_task(family))
    plain, shared = relaxed(family)
    student = Student(shared, shape_of(shared))
    student = Quantize().apply(student, QuantizeConfig(attention=form, ffn=form), context)
    factors = {key for group in matrices_of(shared).values() for key, m in group.items() if m.factor}
    assert {student.encoded[key].format for key in factors} == {"bf16" if form == "bf16" else "int8-weight"}
    _, found = exported(student, tmp_path)
    expected = real(logits(decoded(student)), plain)
    assert np.square(real(found, plain) - expected).mean() ** 0.5 <= FORMATS[form] * expected.std()


@pytest.mark.parametrize("family", contracts.FAMILIES)
@pytest.mark.parametrize(
    ("part", "form", "rank"),
    [("all", "fp32", 0), ("all", "int8", 0), ("attention", "int4", 0), ("ffn", "kmeans4", 0), ("all", "int4", 2)],
)
def test_what_is_shared_is_stored_once(family: str, part: str, form: str, rank: int, tmp_path: Path) -> None:
    model = tiny_model(family, task_of(family), layers=4)
    config = ShareConfig(part=part, groups=2, rank=rank)  # type: ignore[arg-type]
    student = Share().apply(Student(model, shape_of(model)), config, None)  # type: ignore[arg-type]
    student = Quantize().apply(student, QuantizeConfig(attention=form, ffn=form), None)  # type: ignore[arg-type]
    (file,) = OnnxRuntime().emit(student, tmp_path)
    stored = sum(len(tensor.raw_data) for tensor in onnx.load(file).graph.initializer)
    encoded = sum(matrix.nbytes for matrix in student.encoded.values())
    floats = [p for name, p in student.model.named_parameters() if name not in student.encoded]
    assert stored <= encoded + sum(p.nbytes for p in floats) + 900  # the smallest matrix here has 1024 values
    save_student(student.model, student.shape, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stream:
        assert len(stream.keys()) == len(list(student.model.parameters()))


def plan_of(*steps: tuple[str, dict[str, Any]], seed: int = 1) -> Plan:
    return Plan(tuple(make_step(name, config) for name, config in steps), seed)


@pytest.mark.parametrize("family", contracts.FAMILIES)
def test_sharing_composes_with_what_comes_after_it(family: str, tmp_path: Path) -> None:
    context = contracts.tiny_context(family, contracts.tiny_task(family), layers=4)
    plan = plan_of(
        ("share", {"part": "all", "groups": 2, "init": "best", "rank": 2}),
        ("prune", {"heads": 0.5, "ffn": 0.5, "round_to": 8}),
        ("distill", {"steps": 2, "batch_size": 8}),
        ("quantize", {"attention": "int8-weight", "ffn": "bf16"}),
    )
    student = compress(plan, context, tmp_path)
    assert shape_of(student.model) == student.shape.without_formats()
    kept = compress(plan, context, tmp_path)  # read from the disk
    assert torch.equal(logits(kept.model), logits(student.model))
    _, found = exported(student, tmp_path)
    expected = real(logits(decoded(student)), student.model)
    np.testing.assert_allclose(real(found, student.model), expected, atol=1e-4, rtol=0)
    if family == "albert":
        return  # nothing to share
    untrained = compress(plan_of(*[(s.technique, s.config.model_dump()) for s in plan.steps[:2]]), context)
    before, after = (dict(s.model.named_parameters()) for s in (untrained, student))
    factors = [name for name in before if name.endswith("up.weight")]
    assert factors
    assert not any(torch.equal(before[name], after[name]) for name in factors)  # distillation trains them


@families
def test_sets_may_have_their_own_widths(family: str, tmp_path: Path) -> None:
    from autolite.surgery import keep_heads, keep_neurons

    _, shared = relaxed(family)
    keep_heads(shared, 2, [0])
    keep_neurons(shared, 0, range(9))
    shape = shape_of(shared)
    save_student(shared, shape, tmp_path / "one")
    loaded, told = load_student(tmp_path / "one")
    assert told == shape
    assert torch.equal(logits(loaded), logits(shared))
    _, found = exported(Student(shared, shape), tmp_path)
    np.testing.assert_allclose(real(found, shared), real(logits(shared), shared), atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3", "vit"])
@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "int4"])
def test_the_price_is_that_of_the_file(family: str, form: str, tmp_path: Path) -> None:
    _, shared = relaxed(family)
    with torch.no_grad():  # equal tensors, such as fresh norms, would be stored once
        for parameter in shared.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    student = Student(shared, shape_of(shared))
    student = Quantize().apply(student, QuantizeConfig(attention=form, ffn=form), None)  # type: ignore[arg-type]
    emitted = sum(file.stat().st_size for file in OnnxRuntime().emit(student, tmp_path))
    found = predict(student.shape, load_profile("pixel8"), Workload())["size_bytes"].value
    assert abs(found - emitted) < 2500 * len(student.shape.stacks[0].layers)


def with_rank(shape: ModelShape, rank: int) -> ModelShape:
    layers = shape.stacks[0].layers
    return shape.with_layers(0, tuple(replace(x, attention_rank=rank, ffn_rank=rank) for x in layers))


def test_a_higher_rank_costs_more() -> None:
    from tests.shapes import bert_shape, llama_shape

    for shape in (bert_shape(), llama_shape()):
        prices = [
            predict(with_rank(shape, rank), load_profile("pixel8"), Workload(1, 64, 1, 8)) for rank in (0, 4, 8, 32)
        ]
        for metric in prices[0].keys() - {"tokens_per_second"}:
            values = [price[metric].value for price in prices]
            assert values == sorted(set(values)), metric
    assert with_rank(bert_shape(), 4) == ModelShape.from_json(with_rank(bert_shape(), 4).to_json())


def test_layers_of_two_sets_of_widths_are_refused() -> None:
    _, shared = relaxed("bert")
    with pytest.raises(PlanError, match="rank 3 in attention already"):
        Share().shape(shape_of(shared), ShareConfig(part="attention"))
    assert len(layers_of(shared)) == 4


@families
def test_units_of_a_shared_block_are_as_important_as_in_all_its_uses(family: str) -> None:
    context = contracts.tiny_context(family, contracts.tiny_task(family))
    plain, shared = relaxed(family)
    copies, uses = (
        taylor(model, context.task, context.train, context.pad_id) for model in (written_out(shared, plain), shared)
    )
    for found, of_each, sets in (
        (uses.heads, copies.heads, [0, 0, 2, 2]),
        (uses.neurons, copies.neurons, [0, 1, 0, 1]),
    ):
        for index, number in enumerate(sets):
            expected = sum(scores for scores, other in zip(of_each, sets, strict=True) if other == number)
            torch.testing.assert_close(found[index], expected, atol=1e-5, rtol=1e-4)
