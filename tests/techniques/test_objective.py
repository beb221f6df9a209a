"""What a distillation step compares: on every family, for students of other widths, depths and heads, by several
teachers, with and without labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autolite import contracts, registry
from autolite.architecture import shape_of
from autolite.errors import DataError, ModelError, PlanError
from autolite.parts import layers_of
from autolite.tasks.base import IGNORED, Split
from autolite.techniques.attention import recorded
from autolite.techniques.base import Context, Student, weights_digest
from autolite.techniques.distill import Distill, DistillConfig, stream
from autolite.techniques.losses import attention_scores
from autolite.techniques.objective import Objective, layer_map
from autolite.techniques.prune import Prune, PruneConfig
from autolite.techniques.teacher import observe, teacher_outputs, training_split
from autolite.testing import tiny_inputs, tiny_model, tiny_tokenizer

MakeContext = Callable[..., Context]
DISTILL = Distill()
EVERYTHING = {"attention": 1.0, "queries": 1.0, "keys": 1.0, "values": 1.0, "relation_heads": 4}


def context_of(family: str) -> Context:
    return contracts.tiny_context(family, contracts.tiny_task(family))


def pruned(context: Context) -> Student:
    return Prune().apply(context.teacher, PruneConfig(heads=0.5, ffn=0.5, round_to=8, importance="magnitude"), context)


def loss_of(student: Student, config: DistillConfig, context: Context, step: int = 0) -> float:
    objective = Objective.of(student, config, context)
    return objective(next(stream(config, context)), step).item()


@pytest.mark.parametrize("family", contracts.FAMILIES)
def test_recorded_attention_is_the_models_own(family: str) -> None:
    """Probabilities from the recorded queries, keys and masks are those that transformers' eager attention returns."""
    model = tiny_model(family, "language-modeling" if family in contracts.DECODERS else "text-classification")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        with recorded(model) as attention:
            found = model(**inputs).logits
        torch.testing.assert_close(found, model(**inputs).logits, atol=1e-5, rtol=1e-5)
        model.set_attn_implementation("eager")
        expected = model(**inputs, output_attentions=True).attentions
    real = inputs.get("attention_mask", torch.ones(3, expected[0].shape[-1])).bool()
    for layer, one, maps in zip(layers_of(model), attention, expected, strict=True):
        scores = attention_scores(one.query, one.key, layer.scale).masked_fill(~one.allowed, -torch.inf)
        for ours, theirs, mask in zip(scores.softmax(-1), maps, real, strict=True):
            torch.testing.assert_close(ours[:, mask], theirs[:, mask], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", contracts.FAMILIES)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    context = context_of(family)
    kinds: tuple[Any, Any] = ("kl", "mse")
    for kind in kinds:
        config = DistillConfig(alpha=0, batch_size=8, attention_kind=kind, **EVERYTHING)
        # Only the teacher's outputs are rounded to bfloat16.
        assert loss_of(context.teacher, config, context) < 1e-3
        assert loss_of(pruned(context), config, context) > 0.05


@pytest.mark.parametrize("family", contracts.FAMILIES)
@pytest.mark.parametrize("settings", [{"attention": 1.0}, {"values": 1.0, "relation_heads": 4}])
def test_each_comparison_alone_is_learned(family: str, settings: dict[str, Any]) -> None:
    context = context_of(family)
    student = pruned(context)
    config = DistillConfig(steps=12, batch_size=24, learning_rate=3e-3, alpha=1.0, hidden=0.0, **settings)
    # A task loss of nothing leaves what is compared inside the models alone.
    context = replace(context, task=contracts_task_without_loss(context))
    before = loss_of(student, config, context)
    assert loss_of(DISTILL.apply(student, config, context), config, context) < 0.9 * before


def contracts_task_without_loss(context: Context) -> Any:
    from autolite.tasks.custom import CustomTask

    return CustomTask(context.task, own_loss=lambda logits, labels: 0.0 * logits.sum())


@pytest.mark.parametrize("family", contracts.FAMILIES)
def test_a_student_of_every_earlier_technique_is_compared_with_its_teacher(family: str) -> None:
    """Shared layers with differences, fewer layers and heads, a factored table, and a vocabulary of its own."""
    context = replace(context_of(family), tokenizer=tiny_tokenizer())
    earlier: dict[str, dict[str, Any]] = {
        "share": {"part": "all", "groups": 1, "rank": 2},
        "embedding": {"rank": 0.5} if family in contracts.DECODERS else {"rank": 0.5, "vocabulary": 0.75},
        "prune": {"heads": 0.5, "ffn": 0.5, "depth": 0.67, "round_to": 8, "importance": "magnitude"},
    }
    student = context.teacher
    for name, settings in earlier.items():
        if (name, family) != ("embedding", "vit"):
            technique = registry.get("technique", name)
            config = technique.resolve(student.shape, technique.Config(**settings), context)
            student = technique.apply(student, config, context)
    config = DistillConfig(steps=12, batch_size=24, learning_rate=3e-3, alpha=0.0, layers=(0, 2), **EVERYTHING)
    done = DISTILL.apply(student, config, context)
    assert done.shape == student.shape == shape_of(done.model)
    assert loss_of(done, config, context) < 0.95 * loss_of(student, config, context)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_states_of_another_width_are_compared_through_a_learned_map(kind: Any, make_context: MakeContext) -> None:
    context = make_context()
    model = tiny_model("bert", hidden_size=16, num_attention_heads=2, layers=2)
    student = Student(model, shape_of(model))
    config = DistillConfig(steps=60, batch_size=24, learning_rate=1e-2, hidden_kind=kind, alpha=1.0)
    objective = Objective.of(student, config, context)
    assert [tuple(p.shape) for p in objective.projections.parameters()] == [(32, 16), (32, 16)]
    context = replace(context, task=contracts_task_without_loss(context))
    before = loss_of(student, config, context)
    done = DISTILL.apply(student, config, context)
    assert {name for name, _ in done.model.named_parameters()} == {name for name, _ in model.named_parameters()}
    assert weights_digest(done.model) == weights_digest(DISTILL.apply(student, config, context).model)
    # The map that comes with a new objective is untrained: a student that learned with another one fits it no better,
    # so that the loss is compared in the course of one run.
    seen: list[float] = []
    original = Objective.__call__

    def watched(self: Objective, item: Any, step: int) -> torch.Tensor:
        loss = original(self, item, step)
        seen.append(loss.item())
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "__call__", watched)
        DISTILL.apply(student, config, context)
    assert seen[0] == pytest.approx(before, rel=1e-3)
    assert seen[-1] < 0.7 * seen[0]


def test_layer_maps(make_context: MakeContext) -> None:
    shapes = [shape_of(tiny_model("bert", layers=layers)) for layers in (2, 6)]
    assert layer_map(*shapes, "uniform") == (2, 5)
    assert layer_map(*shapes, "last") == (4, 5)
    assert layer_map(*shapes, (0, 3)) == (0, 3)
    assert DistillConfig(layers="0, 3").layers == (0, 3)  # type: ignore[arg-type]
    kept = replace(shapes[0], source_layers=((0, 1),))
    assert layer_map(kept, shapes[1], "source") == (0, 5)
    assert layer_map(kept, shapes[1], "uniform") == (2, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (0, 1)}, r"names 2 layers for 3"),
        ({"layers": (0, 1, 3)}, r"must lie in 0 to 2"),
        ({"values": 1, "relation_heads": 3}, r"3 does not divide the 32 value channels of the student's last layer"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_training(
    settings: dict[str, Any], message: str, make_context: MakeContext
) -> None:
    context = make_context()
    with pytest.raises(PlanError, match=message):
        DISTILL.resolve(context.teacher.shape, DistillConfig(**settings), context)
    assert not context.memory


def test_without_the_architecture_map_attention_is_refused() -> None:
    shape = shape_of(tiny_model("electra"))
    for settings in ({"attention": 1.0}, {"queries": 1.0}, {"layers": "last"}):
        with pytest.raises(PlanError, match="needs the architecture map"):
            DISTILL.shape(shape, DistillConfig(**settings))  # type: ignore[arg-type]
    assert DISTILL.shape(shape, DistillConfig(hidden=1.0)) == shape


def test_schedules_change_the_loss_by_the_step(make_context: MakeContext) -> None:
    context = make_context()
    student = pruned(context)
    config = DistillConfig(steps=11, batch_size=24, schedule="linear", alpha=1.0, alpha_end=0.0, matching_end=0.0)
    first, middle, last = (loss_of(student, config, context, step) for step in (0, 5, 10))
    fixed = DistillConfig(batch_size=24, alpha=1.0)
    assert first == pytest.approx(loss_of(student, fixed, context))
    assert last == pytest.approx(loss_of(student, DistillConfig(batch_size=24, alpha=0.0, hidden=0.0), context))
    assert middle == pytest.approx(
        loss_of(student, DistillConfig(batch_size=24, alpha=0.5, hidden=0.5), context), rel=1e-4
    )


def test_accumulated_batches_make_the_step_of_one_large_batch(make_context: MakeContext) -> None:
    context = make_context(examples=16)
    same_length = [np.resize(ids, 6) for ids in context.train.input_ids]
    context = replace(context, train=replace(context.train, input_ids=same_length))
    student = pruned(context)
    usual = {"steps": 3, "hidden": 0.0, "learning_rate": 1e-3}
    whole = DISTILL.apply(student, DistillConfig(batch_size=16, **usual), context).model  # type: ignore[arg-type]
    split = DISTILL.apply(student, DistillConfig(batch_size=4, accumulate=4, **usual), context).model  # type: ignore[arg-type]
    moved = torch.cat([(a - b).flatten() for a, b in zip(whole.parameters(), student.model.parameters(), strict=True)])
    apart = torch.cat([(a - b).flatten() for a, b in zip(whole.parameters(), split.parameters(), strict=True)])
    assert apart.norm() < 0.1 * moved.norm()


def unlabelled(split: Split) -> Split:
    return replace(split, labels=np.full(len(split), IGNORED))


def test_labels_that_are_unknown_change_nothing_at_alpha_0(make_context: MakeContext) -> None:
    context = make_context()
    config = DistillConfig(steps=3, batch_size=8, alpha=0.0)
    known = DISTILL.apply(pruned(context), config, context)
    blind = DISTILL.apply(pruned(context), config, replace(context, train=unlabelled(context.train), memory={}))
    assert weights_digest(known.model) == weights_digest(blind.model)


def test_the_hard_loss_is_the_mean_over_the_labels_there_are(make_context: MakeContext) -> None:
    context = make_context()
    some = context.train.labels.copy()
    some[::3] = IGNORED
    config = DistillConfig(batch_size=24, alpha=1.0, hidden=0.0)
    half = replace(context, train=replace(context.train, labels=some), memory={})
    student = pruned(context)
    batch = next(context.task.batches(half.train, 24, context.pad_id))
    logits = observe(student.model, {n: torch.from_numpy(a) for n, a in batch.inputs.items()}, False, ())["logits"]
    chosen = batch.labels != IGNORED
    expected = torch.nn.functional.cross_entropy(logits[chosen].float(), torch.from_numpy(batch.labels[chosen]))
    assert loss_of(student, config, half) == pytest.approx(expected.item())
    nothing = replace(context, train=unlabelled(context.train), memory={})
    assert loss_of(student, config, nothing) == 0.0
    assert weights_digest(DISTILL.apply(student, config.model_copy(update={"steps": 1}), nothing).model)


def test_texts_without_labels_join_the_batches(make_context: MakeContext) -> None:
    context = make_context()
    more = unlabelled(make_context(examples=9).train)
    context = replace(context, unlabelled=more)
    assert len(training_split(context, 0)) == 33
    assert sum(len(batch.indices) for batch in teacher_outputs(context, 8).batches) == 33
    assert context.training_data() != replace(context, unlabelled=None).training_data()


def shuffled(split: Split, rng: np.random.Generator) -> Split:
    """Swap the words of every example: what it says is unknown."""
    return Split(split.name, [rng.permutation(ids) for ids in split.input_ids], None, np.full(len(split), IGNORED))


def test_augmentation_is_new_for_each_epoch_and_the_same_for_a_seed(make_context: MakeContext) -> None:
    context = replace(make_context(), augment=shuffled)
    words = [np.concatenate(training_split(context, epoch).input_ids) for epoch in (0, 0, 1)]
    assert (words[0] == words[1]).all()
    assert not (words[0] == words[2]).all()
    config = DistillConfig(steps=9, batch_size=8, alpha=0.0)
    once, again = (DISTILL.apply(pruned(context), config, replace(context, memory={})) for _ in range(2))
    assert weights_digest(once.model) == weights_digest(again.model)
    assert "shuffled" not in str(context.memory)


def test_an_augmentation_that_loses_labels_is_refused(make_context: MakeContext) -> None:
    context = replace(make_context(), augment=lambda split, rng: replace(split, labels=split.labels[:-1]))
    with pytest.raises(DataError, match="24 examples and 23 labels"):
        DISTILL.apply(context.teacher, DistillConfig(steps=1), context)


@pytest.fixture
def second(tmp_path: Path) -> Callable[..., str]:
    """Write another teacher to a folder; it says other things than the first."""

    def write(name: str = "second", words: tuple[str, ...] = (), **config: Any) -> str:
        tiny_model("bert", seed=5, **config).save_pretrained(tmp_path / name)
        tiny_tokenizer(words).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


def test_several_teachers_are_all_listened_to(make_context: MakeContext, second: Callable[..., str]) -> None:
    context = replace(make_context(), tokenizer=tiny_tokenizer())
    other = second()
    config = DistillConfig(batch_size=24, alpha=0.0, hidden=0.0, temperature=2.0, teachers=(other,))
    twice = config.model_copy(update={"teachers": ()})
    student = pruned(context)
    alone = loss_of(student, twice, context)
    together = loss_of(student, config, context)
    batch = next(context.task.batches(context.train, 24, context.pad_id))
    inputs = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
    with torch.no_grad():
        first, theirs = (m(**inputs).logits / 2 for m in (context.teacher.model, tiny_model("bert", seed=5)))
        p = (first.softmax(-1) + theirs.softmax(-1)) / 2
        q = (student.model(**inputs).logits / 2).softmax(-1)
    assert together == pytest.approx(4 * (p * (p / q).log()).sum(-1).mean().item(), rel=0.02)
    assert together != pytest.approx(alone, rel=0.02)


def test_a_plan_names_the_content_of_its_teachers(make_context: MakeContext, second: Callable[..., str]) -> None:
    context = replace(make_context(), tokenizer=tiny_tokenizer())
    other = second()
    config = DISTILL.resolve(context.teacher.shape, DistillConfig(teachers=other), context)  # type: ignore[arg-type]
    assert config.model_dump()["digests"] == (weights_digest(tiny_model("bert", seed=5)),)
    tiny_model("bert", seed=6).save_pretrained(other)
    with pytest.raises(PlanError, match="this plan was made with teachers of the content"):
        DISTILL.resolve(context.teacher.shape, config, replace(context, memory={}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_labels": 2}, "has the labels LABEL_0, LABEL_1, but"),
        ({"words": ("other",)}, "has another vocabulary"),
        ({"max_position_embeddings": 6}, "takes 6 tokens, but the longest example has 9"),
    ],
)
def test_teachers_of_another_task_are_refused(
    settings: dict[str, Any], message: str, make_context: MakeContext, second: Callable[..., str]
) -> None:
    context = replace(make_context(), tokenizer=tiny_tokenizer())
    with pytest.raises(ModelError, match=message):
        DISTILL.resolve(context.teacher.shape, DistillConfig(teachers=(second(**settings),)), context)
