"""Makes the table of the tabular benchmark: every plan of a small search space, evaluated once, without training.

    python benchmarks/tabular_data.py

The model is `tabular_model.py`'s; its six blocks are the attention and the feed-forward part of its three layers. Each
has six levels (the part of its heads or neurons that is kept, by Fisher scores, and the number format of what is kept,
rounded to nearest), which makes 6^6 = 46 656 plans. A plan's loss is that of its blocks stitched together: the weights
of a block do not depend on the others, and what comes out of the first layers is computed once for all plans that share
them. Writes benchmarks/data/tabular.npz (`tabular.Table` reads it).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tabular_model import FOLDER

from autolite.architecture import ModelShape, shape_of
from autolite.compress import compress, shape_after
from autolite.export import decoded
from autolite.files import sha256
from autolite.hardware import load_target
from autolite.hardware.predict import predict
from autolite.measure import Workload
from autolite.plan import Plan, make_step
from autolite.reload import load_model
from autolite.tasks.base import Split
from autolite.tasks.language_modeling import LanguageModeling
from autolite.techniques.base import PARTS, Context, Student
from autolite.techniques.prune import Prune
from autolite.techniques.quantize import Quantize

FILE = Path(__file__).parent / "data" / "tabular.npz"
TARGET, WORKLOAD = "pixel8", Workload(batch=1, tokens=64)
# The part that is kept (one of so many heads or neurons), and the number format.
LEVELS = ((1, "int8"), (1, "int4"), (1, "int2-asym"), (2, "int8"), (2, "int4"), (4, "int4"))
UNIT = 1e-4  # nats; losses are stored as whole numbers of it

Choice = Sequence[int]  # a level for each block: layer 0 attention, layer 0 ffn, layer 1 attention ...


def load_context() -> tuple[Context, Split]:
    """Return the teacher with the examples that scores are taken from, and those that the loss is taken of."""
    task = LanguageModeling()
    with np.load(FOLDER / "blocks.npz") as file:
        splits = {name: Split(name, list(file[name].astype(np.int64)), None, np.zeros(0, np.int64)) for name in file}
    model, _ = load_model(str(FOLDER), task.auto_class)
    return Context(Student(model, shape_of(model)), task, splits["train"], pad_id=0), splits["search"]


def plan_of(choice: Choice, shape: ModelShape) -> Plan:
    """Return the plan that brings each block of a model of `shape` to its level; the embedding is in int8 always."""
    kept, formats = zip(*(LEVELS[level] for level in choice), strict=True)
    layers = shape.stacks[0].layers
    heads = tuple(layer.kv_heads // part for layer, part in zip(layers, kept[::2], strict=True))
    ffn = tuple(layer.ffn // part for layer, part in zip(layers, kept[1::2], strict=True))
    return Plan(
        (
            make_step("prune", {"heads": heads, "ffn": ffn, "importance": "fisher"}),
            make_step("quantize", {"attention": formats[::2], "ffn": formats[1::2], "embedding": "int8"}),
        )
    )


@torch.inference_mode()
def score(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """Return the mean loss in nats and the number of characters that were right, of [blocks, characters, symbols]."""
    rows, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return float(torch.nn.functional.cross_entropy(rows, labels)), int((rows.argmax(1) == labels).sum())


@torch.inference_mode()
def evaluate(model: Any, split: Split) -> tuple[float, int]:
    """Return a whole model's `score`."""
    ids = torch.from_numpy(np.stack(split.input_ids))
    return score(model(ids).logits, ids)


def evaluate_all(models: list[Any], split: Split) -> Iterator[tuple[float, int]]:
    """Yield the `score` of every plan, the last block's level changing fastest. Each of `models` is at one level."""
    ids = torch.from_numpy(np.stack(split.input_ids))
    network = models[0].transformer
    state = network.wte(ids) + network.wpe(torch.arange(ids.shape[1]))

    def after(state: torch.Tensor, layer: int) -> Iterator[tuple[float, int]]:
        if layer == len(network.h):
            yield score(models[0].lm_head(network.ln_f(state)), ids)
            return
        blocks = [model.transformer.h[layer] for model in models]
        for attending in blocks:
            middle = state + attending.attn(attending.ln_1(state))[0]
            inner = blocks[0].ln_2(middle)
            for feeding in blocks:
                yield from after(middle + feeding.mlp(inner), layer + 1)

    return after(state, 0)


def prices(shape: ModelShape, choices: np.ndarray) -> np.ndarray:
    """Return latency (ms) and bytes, [blocks, levels, 2], above those of level 0, with the latter in [0, 0].

    Raises:
        AssertionError: if a plan's price is not the sum of its blocks'; 100 plans among `choices` are tried.
    """
    profile = load_target(TARGET)

    def price(choice: Choice) -> np.ndarray:
        found = predict(shape_after(plan_of(choice, shape), shape), profile, WORKLOAD)
        return np.array([found["latency_ms"].value, found["size_bytes"].value])

    count = choices.shape[1]
    base = price([0] * count)
    table = np.array(
        [[price(np.eye(count, dtype=int)[b] * v) - base for v in range(len(LEVELS))] for b in range(count)]
    )
    for choice in np.random.default_rng(0).permutation(choices)[:100]:
        total = base + table[np.arange(count), choice].sum(0)
        np.testing.assert_allclose(total, price(choice), rtol=1e-9)
    table[0, 0] = base
    return table


def estimates(context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Return how much pruning and rounding are estimated to raise the loss, nats [blocks, levels] each; rounding counts
    by the part of a block that is left."""
    fractions, forms = [1 / part for part, _ in LEVELS], [form for _, form in LEVELS]
    pruning = [Prune().damage(setting, fractions, context) for setting in ("heads", "ffn")]
    rounding = [Quantize().damage(part, forms, context) for part in PARTS]
    # [parts, levels, layers] -> blocks, of which a layer has the two parts in turns
    found = [np.array(each).transpose(2, 0, 1).reshape(-1, len(LEVELS)) for each in (pruning, rounding)]
    return found[0], found[1] * fractions


@click.command()
def main() -> None:
    """Evaluate every plan and write the table."""
    torch.set_num_threads(1)
    context, split = load_context()
    teacher = context.teacher
    blocks = 2 * len(teacher.shape.stacks[0].layers)
    choices = np.array(list(itertools.product(range(len(LEVELS)), repeat=blocks)))
    table, (pruning, rounding) = prices(teacher.shape, choices), estimates(context)
    uniform = [compress(plan_of([level] * blocks, teacher.shape), context) for level in range(len(LEVELS))]
    models = [decoded(student).requires_grad_(False) for student in uniform]
    scores = np.empty((len(choices), 2))
    with click.progressbar(evaluate_all(models, split), length=len(choices)) as bar:
        for index, found in enumerate(bar):
            scores[index] = found
    loss, correct = evaluate(teacher.model, split)
    note = {
        "format": "loss and correct are of all plans, levels of the last block changing fastest; loss in 1e-4 nats, "
        "correct of `characters`; latency_ms and bytes [blocks, levels] are above a plan of level 0 throughout, whose "
        "own are latency_base and bytes_base; pruning and rounding [blocks, levels] are estimates in nats",
        "levels": LEVELS,
        "target": TARGET,
        "workload": str(WORKLOAD),
        "model": sha256(FOLDER / "model.safetensors"),
        "characters": len(split) * (len(split.input_ids[0]) - 1),
        "teacher": {"loss": loss, "correct": correct},
        "latency_base": table[0, 0, 0],
        "bytes_base": int(table[0, 0, 1]),
    }
    table[0, 0] = 0
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        FILE,
        loss=np.rint(scores[:, 0] / UNIT).astype(np.uint16),
        correct=scores[:, 1].astype(np.uint16),
        latency_ms=table[..., 0],
        bytes=table[..., 1].astype(np.int64),
        pruning=pruning,
        rounding=rounding,
        note=np.array(json.dumps(note)),
    )
    click.echo(f"{len(choices)} plans, {FILE.stat().st_size / 1e3:.0f} kB; the teacher loses {loss:.4f} nats")


if __name__ == "__main__":
    main()
