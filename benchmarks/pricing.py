"""How many plans are priced in a second: latency, size, memory and energy, with intervals, without weights.

    python benchmarks/pricing.py
    python benchmarks/pricing.py --targets raspberry-pi-5,x86-avx2 --plans 10000

Random plans of MiniLM-L6's shape (heads and neurons of each layer, depth, a number format for each part), priced all at
once, and one by one. The goal is 10,000 plans in less than two seconds.
"""

from __future__ import annotations

import time
from dataclasses import replace

import click
import numpy as np

from autolite.architecture import LayerShape, ModelShape, Stack
from autolite.hardware import blocks, footprint, pieces
from autolite.hardware.predict import predict, predict_all
from autolite.hardware.profile_files import load_profile
from autolite.measure import Workload

FORMS = ("fp32", "int8", "int7", "int4", "kmeans4")


def plans(count: int, seed: int) -> list[ModelShape]:
    rng = np.random.default_rng(seed)

    def layer(number: int, attention: str, ffn: str) -> LayerShape:
        heads = int(rng.integers(1, 13))
        return LayerShape(heads, heads, 32, 96 * int(rng.integers(1, 17)), number, number, attention, ffn)

    def shape() -> ModelShape:
        attention, ffn, table, head = (str(form) for form in rng.choice(FORMS, 4))
        layers = tuple(layer(number, attention, ffn) for number in range(rng.integers(1, 7)))
        found = ModelShape("bert", (Stack("encoder", 384, layers),), 30522, 384, 512, 2)
        return replace(found, embedding_format=table, head_format=head)

    return [shape() for _ in range(count)]


def forget() -> None:
    """Let nothing be known from before."""
    known = blocks.block_of, footprint.computed_by, footprint.stored, footprint.activations_of, footprint.read_as
    for each in (*known, pieces._attention, pieces._feed_forward, pieces._around, pieces._firsts):
        each.cache_clear()


@click.command()
@click.option("--targets", default="pixel8", show_default=True)
@click.option("--plans", "count", default=10_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(targets: str, count: int, seed: int) -> None:
    shapes, workload = plans(count, seed), Workload(1, 64, 1)
    click.echo("| target | plans | all at once | one by one | |")
    click.echo("|---|---|---|---|---|")
    for target in targets.split(","):
        profile = load_profile(target)
        predict(shapes[0], profile, workload)
        few = shapes[: max(1, count // 20)]
        forget()
        begun = time.perf_counter()
        alone = [predict(shape, profile, workload) for shape in few]
        one = (time.perf_counter() - begun) / len(few)
        forget()
        begun = time.perf_counter()
        together = predict_all(shapes, profile, workload)
        took = time.perf_counter() - begun
        assert all(
            np.isclose(a["latency_ms"].value, b["latency_ms"].value) for a, b in zip(alone, together, strict=False)
        )
        click.echo(
            f"| {target} | {count} | {took:.2f} s | {1e3 * one:.2f} ms each | {count / took:,.0f} plans a second |"
        )


if __name__ == "__main__":
    main()
