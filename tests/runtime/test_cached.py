"""Decoders go on from the keys and values of earlier calls: what they compute is what one call with everything does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import PreTrainedModel

from autolite import surgery
from autolite.architecture import shape_of
from autolite.errors import ModelError
from autolite.hardware.footprint import activations_of
from autolite.hardware.pieces import pieces_of
from autolite.measure import Decoder, Workload
from autolite.runtime.emit import emit
from autolite.runtime.inputs import nothing_before
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.runtime.ortformat import convert
from autolite.runtime.variants import Place, usual
from autolite.techniques.base import Student
from autolite.techniques.quantize import Quantize, QuantizeConfig
from autolite.testing import PAD, VOCAB, tiny_model

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
OPTIONS = Place("cached").options
families = pytest.mark.parametrize("family", FAMILIES)
options = pytest.mark.parametrize("option", OPTIONS)


def decoder(family: str, **settings: Any) -> PreTrainedModel:
    more = {"sliding_window": None, "num_key_value_heads": 1} if family == "mistral" else {}
    return tiny_model(family, "language-modeling", **(more | settings))


def written(model: PreTrainedModel, folder: Path, option: str = "Attention", **formats: str) -> Path:
    student = Student(model, shape_of(model))
    if formats:
        student = Quantize().apply(student, QuantizeConfig(**formats), None)  # type: ignore[arg-type]
    return emit(student, folder, choices=lambda place: option if place.kind == "cached" else usual(place))[0]


class Session:
    """The model as anybody runs it: each call takes what the one before gave."""

    def __init__(self, file: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        self.past: dict[str, np.ndarray] = {}

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, **more: np.ndarray) -> np.ndarray:
        for one in self.session.get_inputs()[2:]:
            _, heads, _, dim = one.shape
            self.past.setdefault(one.name, np.zeros((len(ids), heads, 0, dim), np.float32))
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **self.past, **more}
        logits, *presents = self.session.run(None, feed)
        names = [output.name.replace("present", "past_key_values") for output in self.session.get_outputs()[1:]]
        self.past = dict(zip(names, presents, strict=True))
        return np.asarray(logits)


def of_torch(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(input_ids=ids, attention_mask=mask).logits.numpy())


def random_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def greedy(runner: Any, prompt: torch.Tensor, count: int) -> Iterator[int]:
    reading, ids = runner.reading(prompt.shape[1] + count), prompt.numpy()
    for _ in range(count):
        ids = reading.read(ids).argmax(axis=-1)[:, None]
        yield int(ids[0, 0])


@options
@families
def test_greedy_text_is_that_of_transformers(family: str, option: str, tmp_path: Path) -> None:
    model, prompt = decoder(family), random_ids(1, 7)
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, eos_token_id=None
    )
    runner = OnnxRuntime().load(written(model, tmp_path, option))
    assert list(greedy(runner, prompt, 40)) == expected[0, 7:].tolist()


@options
@pytest.mark.parametrize("side", ["left", "right", "none"])
@families
def test_a_batch_read_in_pieces_is_one_read_at_once(family: str, side: str, option: str, tmp_path: Path) -> None:
    """With padding that is not at the end of what was read before, too, as when a batch is generated from prompts of
    different lengths."""
    model, ids = decoder(family), random_ids(3, 12)
    mask = torch.ones_like(ids)
    if side != "none":
        for row, padding in enumerate((0, 2, 5)):
            place = slice(0, padding) if side == "left" else slice(6 - padding, 6)
            mask[row, place], ids[row, place] = 0, PAD
    expected, real = of_torch(model, ids, mask), mask.bool().numpy()
    file = written(model, tmp_path, option)
    whole = Session(file)(ids, mask)
    np.testing.assert_allclose(whole[real], expected[real], atol=1e-4)
    # GroupQueryAttention takes several tokens behind others of one sequence only.
    pieces = [(0, 6), *((i, i + 1) for i in range(6, 12))]
    if option != "GroupQueryAttention":
        pieces = [(0, 6), (6, 8), (8, 11), (11, 12)]
    session = Session(file)
    found = np.concatenate([session(ids[:, a:b], mask[:, :b]) for a, b in pieces], axis=1)
    np.testing.assert_allclose(found[real], expected[real], atol=1e-4)


@options
@families
def test_one_sequence_is_read_in_pieces_of_any_size(family: str, option: str, tmp_path: Path) -> None:
    model, ids = decoder(family), random_ids(1, 20)
    expected = of_torch(model, ids, torch.ones_like(ids))[0]
    runner = OnnxRuntime().load(written(model, tmp_path, option))
    reading = runner.reading(20)
    for start, end in ((0, 1), (1, 9), (9, 10), (10, 20)):
        (logits,) = reading.read(ids[:, start:end].numpy())
        np.testing.assert_allclose(logits, expected[end - 1], atol=1e-4)
    with pytest.raises(ModelError, match=r"21 tokens are to be read, but there is room for 20"):
        reading.read(ids[:, :1].numpy())


@options
def test_layers_of_different_widths_and_shared_ones(option: str, tmp_path: Path) -> None:
    for family in ("gpt2", "qwen3"):
        model = decoder(family)
        surgery.share_layers(model, attention=[0, 1, 1], feed_forward=[0, 0, 0])
        surgery.keep_heads(model, 0, [1] if family == "qwen3" else [0, 2, 3])
        surgery.keep_neurons(model, 0, range(3, 40))
        ids = random_ids(2, 9)
        expected = of_torch(model, ids, torch.ones_like(ids))
        session = Session(written(model, tmp_path / family, option))
        for end in (5, *range(6, 10)):
            start = 0 if end == 5 else end - 1
            logits = session(ids[:, start:end], torch.ones(2, end, dtype=torch.int64))
            np.testing.assert_allclose(logits, expected[:, start:end], atol=1e-4)


@pytest.mark.parametrize("form", ["int8", "int4", "kmeans4"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_quantized_students_decode_as_they_read(family: str, form: str, tmp_path: Path) -> None:
    """Up to the activations' quantization, whose step each call takes of its own values."""
    file = written(decoder(family), tmp_path, attention=form, ffn=form, embedding=form)
    ids = random_ids(1, 24)
    whole = Session(file)(ids, torch.ones_like(ids))
    session = Session(file)
    steps = [session(ids[:, i : i + 1], torch.ones(1, i + 1, dtype=torch.int64)) for i in range(24)]
    found = np.concatenate(steps, axis=1)
    assert np.square(found - whole).mean() ** 0.5 <= 0.2 * whole.std()


@families
def test_logits_are_computed_of_as_many_tokens_as_are_asked_for(family: str, tmp_path: Path) -> None:
    model, ids = decoder(family), random_ids(2, 9)
    mask = torch.ones_like(ids)
    file = written(model, tmp_path)
    for keep in (0, 1, 3, 9):
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep).logits.numpy()
        found = Session(file)(ids, mask, logits_to_keep=np.array(keep))
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_names_are_those_of_optimum_and_weights_are_stored_once(tmp_path: Path) -> None:
    model = decoder("llama", layers=2)
    graph = onnx.load(written(model, tmp_path / "with")).graph
    assert [i.name for i in graph.input] == [
        "input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value", "past_key_values.1.key",
        "past_key_values.1.value", "logits_to_keep",
    ]  # fmt: skip
    parts = [f"present.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    assert [o.name for o in graph.output] == ["logits", *parts]
    dims = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    assert dims["attention_mask"] == ["batch", "past + tokens"]
    assert dims["past_key_values.1.key"] == ["batch", 2, "past", 8]
    assert dims["logits_to_keep"] == []
    without = emit(Student(model, shape_of(model)), tmp_path / "without", cache=False)[0]
    assert abs((tmp_path / "with" / "model.onnx").stat().st_size - without.stat().st_size) < 3000  # nodes, no weights


@options
def test_a_graph_is_valid_and_runs_as_an_ort_file(option: str, tmp_path: Path) -> None:
    model, prompt = decoder("qwen3"), random_ids(1, 7)
    file = written(model, tmp_path, option)
    onnx.checker.check_model(onnx.load(file))
    made, _ = convert(file, tmp_path)
    onnx_text, ort_text = (list(greedy(OnnxRuntime().load(each), prompt, 12)) for each in (file, made))
    assert onnx_text == ort_text


def test_keys_and_values_are_written_where_they_are_read_if_attention_can(tmp_path: Path) -> None:
    """There, the past has more room than the mask says; other attention takes all of it as read."""
    ids = random_ids(1, 6)
    for option, in_place in (("GroupQueryAttention", True), ("Attention", False)):
        runner = OnnxRuntime().load(written(decoder("llama"), tmp_path / option, option))
        reading: Any = runner.reading(50)
        reading.read(ids.numpy())
        rooms = {each.shape()[2] for each in reading._binding.get_outputs()[1:]}
        assert rooms == ({50} if in_place else {6})


@pytest.mark.parametrize(
    ("family", "tokens", "generated", "held"),
    [("gpt2", 5, 3, 8), ("gpt2", 40, 2, 42 + 41), ("llama", 5, 3, 8 + 7), ("llama", 5, 0, 5)],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_predicted_memory_has_the_keys_and_values_that_are_held(
    family: str, tokens: int, generated: int, held: int, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens' at once, and beside a longer copy those that it is made of: `held` tokens of each sequence."""
    peaks, bound = [], {}
    bind, run = onnxruntime.IOBinding.bind_ortvalue_input, onnxruntime.InferenceSession.run_with_iobinding

    def bind_and_see(self: Any, name: str, value: Any) -> None:
        bound[name] = value
        bind(self, name, value)

    def run_and_see(self: Any, binding: Any, *more: Any) -> None:
        before = [value for name, value in bound.items() if name.startswith("past_key_values")]
        run(self, binding, *more)
        there = {value.data_ptr(): math.prod(value.shape()) for value in (*before, *binding.get_outputs()[1:])}
        peaks.append(4 * sum(there.values()))

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_ortvalue_input", bind_and_see)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", run_and_see)
    model, call = decoder(family), Workload(batch, tokens, 1, generated)
    shape = shape_of(model)
    runner = OnnxRuntime().load(emit(Student(model, shape), tmp_path, call)[0])
    runner.generating(generated).run({"input_ids": random_ids(batch, tokens).numpy()})
    assert len(peaks) == 1 + generated
    layer = shape.stacks[0].layers[0]
    assert max(peaks) == 2 * layer.kv_heads * layer.head_dim * held * batch * 4 * len(shape.stacks[0].layers)
    pieces = pieces_of([shape])
    assert max(peaks) == sum(activations_of(pieces.distinct[each], call)[1] for each in pieces.used)


def test_who_scores_gives_no_past_and_gets_logits_alone(tmp_path: Path) -> None:
    model = decoder("llama")
    ids = random_ids(2, 6)
    inputs = {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 6), np.int64)}
    runner = OnnxRuntime().load(written(model, tmp_path))
    assert isinstance(runner, Decoder)
    found = runner.run(inputs)
    assert list(found) == ["logits"]
    np.testing.assert_allclose(found["logits"], of_torch(model, ids, torch.ones_like(ids)), atol=1e-4)
    with pytest.raises(
        ModelError, match=r"past \+ tokens is 7 in one input, but 6 by the others: past = 0, tokens = 6"
    ):
        runner.run({**inputs, "attention_mask": np.ones((2, 7), np.int64)})
    past = {name: np.zeros((2, 2, 1, 8), np.float32) for name in runner.inputs if name.startswith("past")}
    runner.run({**inputs, **past, "attention_mask": np.ones((2, 7), np.int64)})


def test_what_there_is_before_the_first_call_is_read_off_a_file(tmp_path: Path) -> None:
    file = written(decoder("llama", layers=2), tmp_path)
    found = nothing_before(file, 3)
    assert list(found) == [f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    assert {(array.shape, str(array.dtype)) for array in found.values()} == {((3, 2, 0, 8), "float32")}
    assert nothing_before(written(tiny_model("llama"), tmp_path / "classifier"), 3) == {}
    (tmp_path / "broken.onnx").write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ModelError, match="truncated"):
        nothing_before(tmp_path / "broken.onnx", 1)


def test_what_generates_nothing_has_no_cache(tmp_path: Path) -> None:
    classifier = tiny_model("llama")
    names = [i.name for i in onnx.load(written(classifier, tmp_path / "classifier")).graph.input]
    assert names == ["input_ids", "attention_mask"]
    other = tiny_model("opt", "language-modeling", ffn_dim=64, word_embed_proj_dim=32)
    assert not isinstance(OnnxRuntime().load(emit(Student(other, shape_of(other)), tmp_path / "other")[0]), Decoder)


def test_one_option_is_taken_for_all_layers_by_what_is_generated(tmp_path: Path) -> None:
    model = decoder("gpt2")
    surgery.keep_heads(model, 1, [0])
    asked = []

    def choose(place: Place) -> str:
        if place.kind == "cached":
            asked.append(place)
        return usual(place)

    for generated, operator in ((0, "Attention"), (64, "GroupQueryAttention")):
        asked.clear()
        (file,) = emit(
            Student(model, shape_of(model)), tmp_path / operator, Workload(tokens=16, generated=generated), choose
        )
        assert {place.sizes for place in asked} == {(1, 16, generated, 4, 4, 8)}
        kinds = [node.op_type for node in onnx.load(file).graph.node]
        assert kinds.count(operator) == 3


@families
@options
@pytest.mark.parametrize("batch", [1, 3])
def test_a_whole_call_reads_the_prompt_and_then_token_after_token(
    family: str, option: str, batch: int, tmp_path: Path
) -> None:
    """The tokens behind the prompt are those of the prompt again: what torch makes of all of them in one call."""
    model = decoder(family)
    runner = OnnxRuntime().load(written(model, tmp_path, option))
    ids = np.random.default_rng(0).integers(3, VOCAB, (batch, 4))
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(np.concatenate((ids, ids[:, :2]), axis=1))).logits[:, -1].numpy()
    found = runner.generating(2).run({"input_ids": ids})["logits"]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    alone = runner.generating(0).run({"input_ids": ids})["logits"]
    every = runner.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
    np.testing.assert_allclose(alone, every[:, -1], atol=1e-5)
