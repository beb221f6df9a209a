"""Latencies of whole transformers that others published (`data/published.yaml`), beside what the profiles predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from autolite.architecture import LayerShape, ModelShape, Stack
from autolite.formats import FORMATS
from autolite.hardware.predict import predict
from autolite.hardware.profile_files import load_profile
from autolite.measure import Measurement, Workload

FILE = Path(__file__).parent / "data" / "published.yaml"
METRICS = ("latency_ms", "ttft_ms", "tokens_per_second")
FITTED = ("yes", "related", "no")
STEPS = 16  # that a rate of tokens is predicted for
RIGHT = ("published", "predicted", "interval", "ratio")
COLUMNS = ("device", "model", "format", "call", *RIGHT, "inside", "fitted", "source")
OF = {"ttft_ms": ", prompt", "tokens_per_second": ", steps"}
PATCH = {"vit-b16": 768, "vit-l16": 768, "clip-b32-image": 3072}  # values of a flattened patch


@dataclass(frozen=True)
class Published:
    """A row of the file: what was published of a model on a device, and whether the profile owes a number to it."""

    device: str
    model: str
    format: str
    batch: int
    tokens: int
    threads: int
    metric: str
    value: float
    source: str
    fitted: str
    note: str = ""

    @property
    def workload(self) -> Workload:
        """The call that it is about."""
        steps = STEPS if self.metric == "tokens_per_second" else 0
        return Workload(self.batch, self.tokens, self.threads, steps)


def shape(name: str, numbers: Sequence[Any], form: str) -> ModelShape:
    """Return the shape of a model of the file, all matrices in this number format."""
    family, layers, hidden, heads, kv_heads, dim, ffn, vocab, outputs = numbers
    causal = family in ("gpt2", "llama", "qwen2")
    every = tuple(LayerShape(heads, kv_heads, dim, ffn, i, i, form, form) for i in range(layers))
    stack = Stack("decoder" if causal else "encoder", hidden, every, family in ("llama", "qwen2"), causal)
    table = form if FORMATS[form].embedding else "int8"
    return ModelShape(
        family,
        (stack,),
        vocab,
        PATCH.get(name, hidden),
        4096 if causal else 1024,
        vocab if outputs == -1 else outputs,
        embedding_format=table,
        head_format=form,
    )


def load(path: Path = FILE) -> tuple[list[Published], dict[str, Sequence[Any]], dict[str, str]]:
    """Read the file: its rows, its models and its sources.

    Raises:
        ValueError: naming the row that is wrong.
    """
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = [Published(*row) for row in data["rows"]]
    for row in rows:
        for what, known in (
            ("model", data["models"]),
            ("source", data["sources"]),
            ("metric", METRICS),
            ("fitted", FITTED),
            ("format", FORMATS),
        ):
            if getattr(row, what) not in known:
                raise ValueError(f"{path}: {row}: unknown {what} {getattr(row, what)!r}")
    return rows, data["models"], data["sources"]


def priced(rows: Sequence[Published], models: dict[str, Sequence[Any]]) -> list[Measurement]:
    """Predict what each row is about."""
    profiles = {row.device: load_profile(row.device) for row in rows}
    return [
        predict(shape(row.model, models[row.model], row.format), profiles[row.device], row.workload)[row.metric]
        for row in rows
    ]


def slowness(row: Published, found: Measurement) -> float:
    """Return the predicted time as a multiple of the published one; of rates, the inverse."""
    return row.value / found.value if row.metric == "tokens_per_second" else found.value / row.value


def summary(ratios: np.ndarray, inside: np.ndarray) -> str:
    """Say how far such predicted times are from the published ones."""
    logs = np.log(ratios)
    off = np.exp(np.abs(logs))
    return (
        f"{len(ratios)} rows: a factor of {off.mean():.2f} off in the mean, {(off <= 1.35).mean():.0%} within 1.35, "
        f"{inside.mean():.0%} inside the interval; predicted / published {np.exp(logs.mean()):.2f}"
    )


def show(console: Console) -> None:
    """Print the rows beside their predictions, and how far these are off: of all, and by what was fitted."""
    rows, models, sources = load()
    found = priced(rows, models)
    ratios = np.array([slowness(row, one) for row, one in zip(rows, found, strict=True)])
    inside = np.array([one.low <= row.value <= one.high for row, one in zip(rows, found, strict=True)])
    table = Table(title="Published times beside predicted ones (ms, or tokens a second)", title_justify="left")
    for head in COLUMNS:
        table.add_column(head, justify="right" if head in RIGHT else "left", no_wrap=True)
    for row, one, ratio, is_in in zip(rows, found, ratios.tolist(), inside.tolist(), strict=True):
        call = f"{row.batch} x {row.tokens}{OF.get(row.metric, '')}"
        values = (f"{row.value:.4g}", f"{one.value:.3g}", f"{one.low:.3g} to {one.high:.3g}", f"{ratio:.2f}")
        last = ("yes" if is_in else "no", row.fitted, row.source)
        table.add_row(row.device, row.model, row.format, call, *values, *last)
    console.print(table)
    for name, source in sources.items():
        console.print(f"  {name}: {source}", highlight=False)
    console.print("ratio: predicted time / published time, of rates of tokens the inverse; remarks are in the file")
    for fitted in FITTED:
        chosen = np.array([row.fitted == fitted for row in rows])
        console.print(f"fitted {fitted}: {summary(ratios[chosen], inside[chosen])}", highlight=False)
        if fitted == "no":
            for device in dict.fromkeys(row.device for row in rows):
                here = chosen & np.array([row.device == device for row in rows])
                if here.any():
                    console.print(f"  {device}: {summary(ratios[here], inside[here])}", highlight=False)
    console.print(f"all: {summary(ratios, inside)}", highlight=False)
