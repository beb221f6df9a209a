"""Small models of many sizes, families and number formats, with random weights: what a profile is calibrated by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autolite.architecture import ModelShape, shape_of
from autolite.devices.timing import Artifact
from autolite.families import FAMILIES as ARCHITECTURES
from autolite.measure import Workload, random_texts

FAMILIES = ("bert", "distilbert", "albert", "gpt2", "llama")
FORMATS = ("fp32", "int8", "int7", "int4", "kmeans4", "int8-weight")
_GROUPED = ("llama", "qwen2", "qwen3")  # two heads share their keys and values, where the number of heads is even
_DIMENSIONS = 10


@dataclass(frozen=True)
class Recipe:
    """A model to be made, and the call that it is timed with. Sizes are those of `ModelShape`."""

    family: str
    layers: int
    heads: int
    head_dim: int
    ffn: int
    vocab: int
    attention: str
    feed_forward: str
    embedding: str
    workload: Workload

    @property
    def hidden(self) -> int:
        """Width between the layers."""
        return self.heads * self.head_dim

    @property
    def flops(self) -> float:
        """About what a call computes: the products with the layers' matrices."""
        per_token = self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.ffn)
        return 2.0 * per_token * self.workload.batch * self.workload.tokens


def recipes(
    threads: int, flops: tuple[float, float], families: Sequence[str] = FAMILIES, seed: int = 0
) -> Iterator[Recipe]:
    """Yield recipes without end: one to twelve layers, 64 to 768 wide, on 4 to 256 tokens, some in batches.

    Sizes are a scrambled Sobol sequence (Owen 1998), so that any number of them covers the ranges evenly; families
    take turns.

    Args:
        threads: of the calls.
        flops: the least and the most that a call computes; others are left out.
        families: of the models.
        seed: equal seeds give equal recipes.
    """
    import torch

    engine = torch.quasirandom.SobolEngine(_DIMENSIONS, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    number = 0
    while True:
        u = [min(each, 1 - 1e-6) for each in engine.draw(1)[0].tolist()]
        head_dim = (16, 32, 64)[int(3 * u[0])]
        hidden = 64 * (768 / 64) ** u[1]
        found = Recipe(
            family=families[number % len(families)],
            layers=1 + int(12 * u[2] ** 1.5),
            heads=max(1, round(hidden / head_dim)),
            head_dim=head_dim,
            ffn=8 * max(1, round(hidden * 2 ** (5 * u[3] - 3) / 8)),
            vocab=round(2 ** (9 + 4 * u[4])),
            attention=_one(FORMATS, u[5]),
            feed_forward=_one(FORMATS, u[6]),
            embedding=_one(("fp32", "int8", "int4"), u[7]),
            workload=Workload(
                batch=max(1, round(2 ** (8 * u[8] - 5))), tokens=round(2 ** (2 + 6 * u[9])), threads=threads
            ),
        )
        if flops[0] <= found.flops <= flops[1]:
            number += 1
            yield found


def made(recipe: Recipe, folder: Path) -> tuple[ModelShape, Artifact]:
    """Make a recipe's model in a folder; return its shape and what can be timed."""
    from autolite.runtime.onnxruntime import OnnxRuntime
    from autolite.techniques.base import Student
    from autolite.techniques.quantize import Quantize, QuantizeConfig
    from autolite.testing import tiny_model

    sizes: dict[str, Any] = {
        "hidden_size": recipe.hidden,
        "num_attention_heads": recipe.heads,
        "vocab_size": recipe.vocab,
        "max_position_embeddings": 300,
    }
    sizes[{"gpt2": "n_inner", "distilbert": "hidden_dim"}.get(recipe.family, "intermediate_size")] = recipe.ffn
    if recipe.family == "albert":
        sizes["embedding_size"] = min(128, recipe.hidden)
    if recipe.family in _GROUPED:
        sizes["num_key_value_heads"] = recipe.heads // 2 if recipe.heads % 2 == 0 else recipe.heads
    if recipe.family == "qwen3":
        sizes["head_dim"] = recipe.head_dim
    task = "language-modeling" if ARCHITECTURES[recipe.family].causal else "text-classification"
    model = tiny_model(recipe.family, task, layers=recipe.layers, **sizes)
    student = Student(model, shape_of(model))
    head = recipe.embedding if student.shape.tied else "fp32"
    parts = QuantizeConfig(attention=recipe.attention, ffn=recipe.feed_forward, embedding=recipe.embedding, head=head)
    student = Quantize().apply(student, parts, None)  # type: ignore[arg-type]  # rounding to nearest needs no data
    files = OnnxRuntime().emit(student, folder, recipe.workload)
    (inputs,) = random_texts(recipe.vocab, recipe.workload, count=1)
    return student.shape, Artifact(files, inputs)


def _one(names: Sequence[str], u: float) -> str:
    return names[int(len(names) * u)]
