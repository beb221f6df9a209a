"""How far predicted latencies are from measured ones, on whole models of families that no profile was calibrated by.

    autolite calibrate --threads 1 --budget 5m
    python benchmarks/prediction.py --threads 1
    python benchmarks/prediction.py --target my-board.yaml --device ssh://pi@raspberrypi --threads 4
    python benchmarks/prediction.py --published
    python benchmarks/prediction.py --table hat --folder FOLDER

Random models (`autolite.devices.submodels`) with other seeds than those of a calibration: widths, depths, number
formats, lengths and batches, each timed beside a reference, as a calibration does. Prints the mean error, the part
within 10 %, Kendall's rank correlation, and how many of the measured times are in the intervals of 90 %.

With `--published` nothing is timed: what the shipped profiles predict stands beside times of whole models that others
published (`data/published.yaml`), with what a profile owes to the row itself.
"""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import click
import numpy as np
import published as others
from hat_tables import NORMAL, kendall, report
from rich.console import Console
from rich.table import Table

from autolite.devices import connected
from autolite.devices.base import check_runtime, health_of
from autolite.devices.calibrate import Timed, timed, undisturbed
from autolite.devices.submodels import Recipe, recipes
from autolite.hardware import load_target
from autolite.hardware.predict import predict

FAMILIES = ("roberta", "qwen2", "qwen3")
SECONDS = (5e-5, 0.15)  # that a model may take at the peak of fp32
AT_ONCE = 4


@click.command()
@click.option("--target", default="local", show_default=True, help="Whose predictions.")
@click.option("--device", default="local", show_default=True, help="Where models are timed.")
@click.option("--models", default=40, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--seed", default=1, show_default=True, help="Of the models; a calibration has 0.")
@click.option("--published", is_flag=True, help="Compare with what others published; time nothing.")
@click.option("--table", type=click.Choice(["hat"]), help="Measured elsewhere; then nothing is timed.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path(), help="Of the table.")
@click.option("--splits", default=20, show_default=True, help="Of the table's rows.")
def main(
    target: str,
    device: str,
    models: int,
    threads: int,
    seed: int,
    published: bool,
    table: str | None,
    folder: Path,
    splits: int,
) -> None:
    if published:
        others.show(Console(width=160))
        return
    if table is not None:
        for line in report(folder, splits):
            click.echo(line)
        return
    console, profile = Console(width=140), load_target(target, threads)
    peak = profile.unit.peak["fp32"].value * 1e9
    chosen = recipes(threads, (SECONDS[0] * peak, SECONDS[1] * peak), FAMILIES, seed)
    pairs: list[tuple[Recipe, Timed]] = []
    with connected(device) as there:
        check_runtime(health_of(there), device)
        while len(pairs) < models:
            batch = list(islice(chosen, AT_ONCE))
            pairs += zip(batch, timed(there, batch, threads), strict=True)
    rows: list[tuple[Recipe, float, float, float]] = []
    for (recipe, _), sample in zip(pairs, undisturbed([each for _, each in pairs]), strict=True):
        price = predict(sample.shape, profile, sample.workload)["latency_ms"]
        sigma = math.log(price.high / price.value) / NORMAL["95 %"]
        rows.append((recipe, price.value, sigma, sample.milliseconds))
    predicted, sigmas, measured = (np.array([row[i] for row in rows]) for i in (1, 2, 3))
    errors = predicted / measured - 1
    shown = Table(title=f"{profile.name}: {profile.description}", title_justify="left")
    for head in (
        "family",
        "layers",
        "width",
        "FFN",
        "attention",
        "feed-forward",
        "call",
        "predicted",
        "measured",
        "off",
    ):
        shown.add_column(head, justify="left" if head in ("family", "attention", "feed-forward", "call") else "right")
    for (recipe, value, _, real), error in zip(rows, errors, strict=True):
        call = f"{recipe.workload.batch} x {recipe.workload.tokens}"
        sizes = map(str, (recipe.layers, recipe.hidden, recipe.ffn))
        formats = (recipe.attention, recipe.feed_forward)
        shown.add_row(recipe.family, *sizes, *formats, call, f"{value:.3g}", f"{real:.3g}", f"{error:+.0%}")
    console.print(shown)
    inside = np.abs(np.log(predicted / measured)) <= NORMAL["90 %"] * sigmas
    console.print(
        f"{len(rows)} models: {np.abs(errors).mean():.1%} off in the mean, {(np.abs(errors) <= 0.1).mean():.0%} within "
        f"10 %, Kendall's tau {kendall(predicted, measured):.3f}, {inside.mean():.0%} in the intervals of 90 %"
    )


if __name__ == "__main__":
    main()
